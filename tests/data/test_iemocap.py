"""IEMOCAP in MMIN's layout: generated files with the true widths, every way in which they may be broken, a training."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch

from mmlib import data, training
from mmlib.backbones import MMINBackbone
from mmlib.baselines import JointTraining
from mmlib.data import iemocap

WIDTHS = {"audio": 130, "vision": 342, "language": 1024}
FILES = {"audio": "A/comparE.h5", "vision": "V/denseface.h5", "language": "L/bert_large.h5"}
COUNTS = {"trn": 24, "val": 8, "tst": 9}
FOLDS = (1, 2)


def utterances():
    return [f"Ses0{1 + k % 5}{'FM'[k % 2]}_impro0{k % 7}_F{k:03d}" for k in range(sum(COUNTS.values()))]


def split_of(fold):
    """Which utterances each split of a fold has: rotated by a few from fold to fold."""
    ids = np.roll(utterances(), 5 * (fold - 1))
    ends = np.cumsum([0, *COUNTS.values()])
    return {part: ids[a:b] for part, a, b in zip(COUNTS, ends[:-1], ends[1:], strict=True)}


def classes_of(ids):
    return np.array([int(name[-3:]) % 4 for name in ids])


def write_targets(root, fold, one_hot=True, column=True, kind=bytes):
    folder = root / "target" / str(fold)
    folder.mkdir(parents=True, exist_ok=True)
    for part, ids in split_of(fold).items():
        names = np.char.encode(ids, "ascii") if kind is bytes else ids
        np.save(folder / f"{part}_int2name.npy", names[:, None] if column else names)
        classes = classes_of(ids)
        np.save(folder / f"{part}_label.npy", np.eye(4)[classes] if one_hot else classes)


def write(root, seed=0):
    """The layout with HDF5 files; the mean of every utterance's features tells its class."""
    g = np.random.default_rng(seed)
    for place in "AVL":
        (root / place).mkdir(parents=True)
    ids, frames = utterances(), {}
    for modality, path in FILES.items():
        with h5py.File(root / path, "w") as file:
            for name, c in zip(ids, classes_of(ids), strict=True):
                x = g.normal(size=(g.integers(1, 10), WIDTHS[modality])) + 2 * c
                file[name] = x.astype(np.float32 if modality != "vision" else np.float64)
                frames[modality, name] = x.astype(np.float32)
    with h5py.File(root / "A/comparE_mean_std.h5", "w") as file:
        for fold in FOLDS:
            rows = np.concatenate([frames["audio", name] for name in split_of(fold)["trn"]])
            file[f"{fold}/mean"], file[f"{fold}/std"] = rows.mean(0), rows.std(0)
    for fold in FOLDS:
        write_targets(root, fold)
    return frames


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("IEMOCAP")
    return root, write(root)


@pytest.fixture
def broken(made, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(made[0], tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture(scope="module")
def arrays(made, tmp_path_factory):
    """The same data as one array a fold, like RedCore's MSP-IMPROV: no lengths, plain strings, numbers for classes."""
    root = tmp_path_factory.mktemp("MSP")
    for fold in FOLDS:
        write_targets(root, fold, one_hot=False, column=False, kind=str)
        for place, modality in zip("AVL", WIDTHS, strict=True):
            (root / place / str(fold)).mkdir(parents=True)
            for part, ids in split_of(fold).items():
                x = np.zeros((len(ids), 12, WIDTHS[modality]), np.float32)
                for i, name in enumerate(ids):
                    row = made[1][modality, name]
                    x[i, : len(row)] = row
                np.save(root / place / str(fold) / f"{part}.npy", x)
    return root


class TestContents:
    def test_shapes_and_facts(self, made):
        splits = data.load("iemocap", made[0])
        assert list(splits) == ["train", "valid", "test"]
        assert [len(d) for d in splits.values()] == list(COUNTS.values())
        for split, d in splits.items():
            assert d.modalities == ("audio", "vision", "language")
            assert {m: shape[1] for m, shape in d.feature_shapes.items()} == WIDTHS
            assert d.feature_shapes == splits["train"].feature_shapes
            assert all(x.dtype == torch.float32 for x in d.data.features.values())
            assert d.present.all()
            assert d.info["name"] == "iemocap"
            assert d.info["task"] == "classification"
            assert d.info["outputs"] == 4
            assert d.info["classes"] == ["class 0", "class 1", "class 2", "class 3"]
            assert d.info["classes_from"] == "not known"
            assert d.info["split"] == split
            assert d.info["split_seed"] is None
            assert d.info["fingerprint"] == data.fingerprint(d)
            d.data.check_values(4)
            json.dumps(d.info)
        longest = {m: max(len(x) for (k, _), x in made[1].items() if k == m) for m in WIDTHS}
        assert {m: shape[0] for m, shape in splits["test"].feature_shapes.items()} == longest

    @pytest.mark.parametrize("fold", FOLDS)
    def test_every_frame_is_where_it_belongs(self, made, fold):
        splits = data.load("iemocap", made[0], fold=fold, audio_norm=None)
        for d, (_, ids) in zip(splits.values(), split_of(fold).items(), strict=True):
            assert d.names == [f"iemocap/{name}" for name in ids]
            assert d.target.tolist() == classes_of(ids).tolist()
            for m in WIDTHS:
                for i, name in enumerate(ids):
                    row = made[1][m, name]
                    assert int(d.data.valid[m][i].sum()) == len(row)
                    assert d.data.valid[m][i, : len(row)].all()
                    np.testing.assert_array_equal(d.data.features[m][i, : len(row)].numpy(), row)
                    assert not d.data.features[m][i, len(row) :].any()
        ids = torch.cat([d.ids for d in splits.values()])
        assert len(ids.unique()) == sum(COUNTS.values())

    def test_an_utterance_has_the_same_id_in_every_fold(self, made):
        known = {}
        for fold in FOLDS:
            for d in data.load("iemocap", made[0], fold=fold).values():
                for name, key in zip(d.names, d.ids.tolist(), strict=True):
                    assert known.setdefault(name, key) == key

    def test_audio_is_standardised_on_the_training_frames(self, made):
        d = data.load("iemocap", made[0], fold=2)["train"].data
        frames = d.features["audio"][d.valid["audio"]].double()
        torch.testing.assert_close(frames.mean(0), torch.zeros(130).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(frames.std(0, correction=0), torch.ones(130).double(), atol=1e-5, rtol=0)
        assert not d.features["audio"][~d.valid["audio"]].any()  # the padding is zero, not minus the mean

    def test_statistics_are_those_of_the_file(self, broken):
        with h5py.File(broken / "A/comparE_mean_std.h5", "a") as file:
            file["1/mean"][...], file["1/std"][...] = 3.0, 2.0
        raw = data.load("iemocap", broken, audio_norm=None)["test"].data
        d = data.load("iemocap", broken)["test"].data
        expected = torch.where(raw.valid["audio"][..., None], (raw.features["audio"] - 3) / 2, 0)
        torch.testing.assert_close(d.features["audio"], expected)
        assert torch.equal(d.features["vision"], raw.features["vision"])

    def test_max_frames(self, made):
        whole = data.load("iemocap", made[0])["train"].data
        short = data.load("iemocap", made[0], max_frames={"audio": 3, "language": 1})["train"].data
        assert short.features["audio"].shape[1] == 3
        assert short.features["language"].shape[1] == 1
        assert torch.equal(short.features["audio"], whole.features["audio"][:, :3])
        assert torch.equal(short.valid["audio"], whole.valid["audio"][:, :3])
        assert torch.equal(short.features["vision"], whole.features["vision"])
        every = data.load("iemocap", made[0], max_frames=2)["test"]
        assert {shape[0] for shape in every.feature_shapes.values()} == {2}
        assert every.info["max_frames"] == dict.fromkeys(WIDTHS, 2)

    def test_no_frames_means_missing(self, broken):
        name = split_of(1)["val"][3]
        with h5py.File(broken / FILES["vision"], "a") as file:
            del file[name]
            file[name] = np.zeros((0, 342), np.float32)
        d = data.load("iemocap", broken)["valid"]
        assert (~d.present).nonzero().tolist() == [[3, 1]]
        assert not d.data.valid["vision"][3].any()

    def test_the_class_counts_name_the_classes(self):
        names = {1103: "anger", 1636: "happiness", 1708: "neutral", 1084: "sadness"}
        assert sum(names) == 5531 == 4446 + 557 + 528
        for counts in ((1636, 1084, 1708, 1103), (1103, 1636, 1708, 1084)):
            target = np.repeat(np.arange(4), counts)
            assert iemocap._class_names(target) == ([names[c] for c in counts], True)
            assert iemocap._class_names(target[1:]) == ([f"class {k}" for k in range(4)], False)

    def test_folder_names(self, made, tmp_path):
        base = data.load("iemocap", made[0])["test"].info["fingerprint"]
        for name in ("iemocap", "IEMOCAP_features_2021"):
            (tmp_path / name).mkdir()
            os.symlink(made[0], tmp_path / name / name)
            assert data.load("iemocap", tmp_path / name)["test"].info["fingerprint"] == base


class TestFingerprint:
    def test_it_is_the_contents(self, made, broken):
        prints = lambda root, **options: [d.info["fingerprint"] for d in data.load("iemocap", root, **options).values()]
        base = prints(made[0])
        assert base == prints(made[0]) == prints(broken)
        assert len(set(base)) == 3
        assert prints(made[0], fold=2) != base
        assert prints(made[0], audio_norm=None) != base
        assert prints(made[0], max_frames=4) != base
        name = split_of(1)["val"][0]
        with h5py.File(broken / FILES["language"], "a") as file:
            file[name][0, 0] += 1
        changed = prints(broken)
        assert [a == b for a, b in zip(base, changed, strict=True)] == [True, False, True]

    def test_it_does_not_change_between_versions(self, tmp_path):
        """The same small files give the same digits on every machine: results are stored under them."""
        ids = {part: [f"Ses01F_{part}_F{k:03d}" for k in range(2)] for part in COUNTS}
        for place, modality in zip("AVL", WIDTHS, strict=True):
            (tmp_path / place).mkdir()
            with h5py.File(tmp_path / FILES[modality], "w") as file:
                for k, name in enumerate(sum(ids.values(), [])):
                    file[name] = np.full((k + 1, WIDTHS[modality]), k + 1, np.float32)
            assert place == FILES[modality][0]
        (tmp_path / "target/1").mkdir(parents=True)
        for part, names in ids.items():
            np.save(tmp_path / f"target/1/{part}_int2name.npy", np.char.encode(names))
            np.save(tmp_path / f"target/1/{part}_label.npy", np.eye(4)[[0, 3]])
        splits = data.load("iemocap", tmp_path, audio_norm=None)
        assert [d.info["fingerprint"] for d in splits.values()] == PRINTS


PRINTS = ["624f7bb17c0d47dd", "56a54bda3a2c6c13", "0cec3c44c56f59f3"]


class TestArrays:
    def test_they_equal_the_files(self, made, arrays):
        for fold in FOLDS:
            a = data.load("iemocap", made[0], fold=fold, audio_norm=None)
            b = data.load("iemocap", arrays, fold=fold, audio_norm=None)
            for split in a:
                assert a[split].info["fingerprint"] == b[split].info["fingerprint"]
        assert "one array a fold" in b["train"].info["source"]

    def test_audio_is_standardised_here(self, made, arrays):
        a, b = data.load("iemocap", made[0]), data.load("iemocap", arrays)
        for split in a:
            torch.testing.assert_close(
                a[split].data.features["audio"], b[split].data.features["audio"], atol=1e-4, rtol=0
            )

    def test_normalised_audio_stays(self, arrays, tmp_path):
        shutil.copytree(arrays, tmp_path / "root")
        splits = data.load("iemocap", arrays)
        for split, part in {"train": "trn", "valid": "val", "test": "tst"}.items():
            np.save(tmp_path / f"root/A/1/{part}.npy", splits[split].data.features["audio"].numpy())
        again = data.load("iemocap", tmp_path / "root")["test"].data.features["audio"]
        torch.testing.assert_close(again, splits["test"].data.features["audio"], atol=1e-5, rtol=0)

    def test_an_utterance_of_zeros_keeps_a_frame(self, arrays, tmp_path):
        shutil.copytree(arrays, tmp_path / "root")
        x = np.load(arrays / "V/1/tst.npy")
        x[2] = 0
        np.save(tmp_path / "root/V/1/tst.npy", x)
        d = data.load("iemocap", tmp_path / "root", max_frames=5)["test"]
        assert d.data.valid["vision"][2].tolist() == [True, False, False, False, False]
        assert d.present.all()

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda x: x[:, :, :341], r"V/1/val.npy: expected frames \[8, T, 342\], got float32 \(8, 12, 341\)"),
            (lambda x: x[:7], r"expected frames \[8, T, 342\], got float32 \(7, 12, 342\)"),
            (lambda x: x[:, 0], r"got float32 \(8, 342\)"),
            (lambda x: x.astype("S4"), r"got \|S4"),
            (lambda x: np.array(list(x) + [None], dtype=object), "refused to read pickled objects"),
            (lambda x: np.where(np.arange(8)[:, None, None] == 6, np.nan, x), "{id6} has NaN .* first in frame 0"),
        ],
    )
    def test_broken_arrays(self, arrays, tmp_path, change, match):
        shutil.copytree(arrays, tmp_path / "root")
        path = tmp_path / "root/V/1/val.npy"
        np.save(path, change(np.load(path)), allow_pickle=True)
        with pytest.raises(ValueError, match=match.replace("{id6}", split_of(1)["val"][6])):
            data.load("iemocap", tmp_path / "root")

    def test_truncated_array(self, arrays, tmp_path):
        shutil.copytree(arrays, tmp_path / "root")
        path = tmp_path / "root/L/2/tst.npy"
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ValueError, match=r"L/2/tst.npy: not a whole .npy array \(.*copy or download it again"):
            data.load("iemocap", tmp_path / "root", fold=2)
        path.unlink()
        with pytest.raises(FileNotFoundError, match="L/2/tst.npy not found in"):
            data.load("iemocap", tmp_path / "root", fold=2)


class TestOptions:
    @pytest.mark.parametrize("fold", [0, -1, "1", 1.0, True])
    def test_fold(self, made, fold):
        with pytest.raises((TypeError, ValueError), match="fold: expected an integer of at least 1, got"):
            data.load("iemocap", made[0], fold=fold)

    def test_fold_that_is_not_there(self, made):
        with pytest.raises(ValueError, match=r"fold: expected one of \[1, 2\], which .*target holds, got 11"):
            data.load("iemocap", made[0], fold=11)

    def test_audio_norm(self, made):
        with pytest.raises(ValueError, match="audio_norm: expected None or 'trn', got 'utt'"):
            data.load("iemocap", made[0], audio_norm="utt")

    @pytest.mark.parametrize("value", [0, -3, 2.5, True, {"audio": 0}, {"audio": "4"}])
    def test_max_frames(self, made, value):
        with pytest.raises((TypeError, ValueError), match="max_frames: expected None or an integer of at least 1"):
            data.load("iemocap", made[0], max_frames=value)

    def test_max_frames_of_an_unknown_modality(self, made):
        with pytest.raises(ValueError, match=r"max_frames: unknown modalities \['text'\]; known are \['audio', 'vis"):
            data.load("iemocap", made[0], max_frames={"text": 3})


class TestBrokenFiles:
    @pytest.mark.parametrize("path", [*FILES.values(), "A/comparE_mean_std.h5", "target/1/val_int2name.npy"])
    def test_missing(self, broken, path):
        (broken / path).unlink()
        with pytest.raises(FileNotFoundError) as error:
            data.load("iemocap", broken)
        assert f"iemocap: {path} not found in {broken}" in str(error.value)
        for part in ("A/comparE.h5, root/V/denseface.h5", "int2name", "https://sail.usc.edu/iemocap/"):
            assert part in str(error.value)

    def test_statistics_are_not_needed_without_normalisation(self, broken):
        (broken / "A/comparE_mean_std.h5").unlink()
        assert data.load("iemocap", broken, audio_norm=None)["train"].info["audio_norm"] is None

    def test_empty_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"A/comparE.h5, V/denseface.h5, .*target/1/tst_int2name.npy not f"):
            data.load("iemocap", tmp_path)

    @pytest.mark.parametrize("modality", WIDTHS)
    def test_ids_without_features(self, broken, modality):
        gone = split_of(1)["trn"][[4, 7]]
        with h5py.File(broken / FILES[modality], "a") as file:
            for name in gone:
                del file[name]
        match = rf"{FILES[modality]}: 2 of the 24 utterances of the train split .trn_int2name.npy. have no features, "
        match += rf"the first {gone[0]}, "
        with pytest.raises(ValueError, match=match + gone[1]):
            data.load("iemocap", broken)

    @pytest.mark.parametrize(
        ("value", "found"),
        [
            (np.zeros((4, 131), np.float32), r"float32 \(4, 131\)"),
            (np.zeros((4, 3, 130), np.float32), r"float32 \(4, 3, 130\)"),
            (np.zeros(130), r"float64 \(130,\)"),
            (np.zeros((2, 130), "S3"), r"\|S3 \(2, 130\)"),
            (None, "a group"),
        ],
    )
    def test_wrong_widths(self, broken, value, found):
        name = split_of(1)["tst"][1]
        with h5py.File(broken / FILES["audio"], "a") as file:
            del file[name]
            if value is None:
                file.create_group(name)
            else:
                file[name] = value
        with pytest.raises(ValueError, match=rf"A/comparE.h5: expected frames \[T, 130\] for {name}, got {found}"):
            data.load("iemocap", broken)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_frames_that_are_not_finite(self, broken, value):
        name = split_of(1)["trn"][0]
        with h5py.File(broken / FILES["vision"], "a") as file:
            del file[name]
            x = np.zeros((5, 342))
            x[3, 20] = value
            file[name] = x
        with pytest.raises(
            ValueError, match=rf"V/denseface.h5: {name} has NaN or infinite values, the first in frame 3"
        ):
            data.load("iemocap", broken)
        assert data.load("iemocap", broken, max_frames=3)  # what is not read does no harm

    @pytest.mark.parametrize("path", [FILES["language"], "A/comparE_mean_std.h5"])
    @pytest.mark.parametrize("damage", ["cut", "text", "empty"])
    def test_truncated_h5(self, broken, path, damage):
        whole = (broken / path).read_bytes()
        content = {"cut": whole[: len(whole) // 2], "text": b"<html>404</html>" * 100, "empty": b""}[damage]
        (broken / path).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path}: truncated, or not an HDF5 file \(.*copy or download it again"):
            data.load("iemocap", broken)

    def test_damaged_chunks(self, broken):
        """A whole file of which one compressed data set cannot be read."""
        name = split_of(1)["trn"][2]
        with h5py.File(broken / FILES["audio"], "a") as file:
            del file[name]
            d = file.create_dataset(
                name, data=np.random.default_rng(0).normal(size=(50, 130)), chunks=(50, 130), compression="gzip"
            )
            where = d.id.get_chunk_info(0)
        content = bytearray((broken / FILES["audio"]).read_bytes())
        content[where.byte_offset : where.byte_offset + where.size] = b"\xff" * where.size
        (broken / FILES["audio"]).write_bytes(bytes(content))
        with pytest.raises(ValueError, match=rf"A/comparE.h5: cannot read {name} \(.*the file is damaged"):
            data.load("iemocap", broken)

    @pytest.mark.parametrize(
        ("row", "found"),
        [([0, 0, 0, 0], "0.0, 0.0"), ([1, 1, 0, 0], "1.0, 1.0"), ([0.5, 0.5, 0, 0], "0.5"), ([2, 0, 0, -1], "2.0")],
    )
    def test_labels_that_are_not_one_hot(self, broken, row, found):
        path = broken / "target/1/val_label.npy"
        labels = np.load(path)
        labels[5] = row
        np.save(path, labels)
        with pytest.raises(
            ValueError, match=rf"val_label.npy: .* 1 are not, the first of {split_of(1)['val'][5]}: \[{found}"
        ):
            data.load("iemocap", broken)

    @pytest.mark.parametrize(
        ("labels", "match"),
        [
            (np.eye(4)[[0] * 7], r"expected the classes of 8 utterances, got float64 \(7, 4\)"),
            (np.zeros((8, 5)), r"expected one-hot classes \[n, 4\] or numbers \[n\] below 4, got shape \(8, 5\)"),
            (np.array([0, 1, 2, 3, 4, 0, 1, 2]), rf"1 are not, the first of {split_of(1)['val'][4]}: 4"),
            (np.array([0, 1, 2, 3, np.nan, 0, 1, 2]), "1 are not"),
            (np.array(["a"] * 8), "expected the classes of 8 utterances, got <U1"),
            (np.array([None] * 8), "refused to read pickled objects"),
        ],
    )
    def test_other_labels(self, broken, labels, match):
        np.save(broken / "target/1/val_label.npy", labels, allow_pickle=True)
        with pytest.raises(ValueError, match=match):
            data.load("iemocap", broken)

    @pytest.mark.parametrize(
        ("ids", "match"),
        [
            (np.arange(8), r"expected byte strings \[n\] or \[n, 1\], got int64 \(8,\)"),
            (np.array([[b"a", b"b"]] * 8), r"expected byte strings \[n\] or \[n, 1\], got \|S1 \(8, 2\)"),
            (np.array([], "S3"), "expected at least one utterance, got none"),
            (np.array([b"\xff\xfe"] * 8), "expected ids in UTF-8"),
            (np.array([b"a", None], dtype=object), "refused to read pickled objects"),
        ],
    )
    def test_other_ids(self, broken, ids, match):
        np.save(broken / "target/1/val_int2name.npy", ids, allow_pickle=True)
        with pytest.raises(ValueError, match="val_int2name.npy: " + match):
            data.load("iemocap", broken)

    def test_pickles_are_never_run(self, broken, tmp_path):
        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "owned"),))

        for content in (pickle.dumps(Evil()), None):
            path = broken / "target/1/trn_int2name.npy"
            if content is None:
                np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)
            else:
                path.write_bytes(content)
            with pytest.raises(ValueError, match="trn_int2name.npy: refused to read pickled objects"):
                data.load("iemocap", broken)
        assert not (tmp_path / "owned").exists()

    def test_a_zip_of_arrays(self, broken):
        path = broken / "target/1/trn_label.npy"
        with path.open("wb") as file:
            np.savez(file, a=np.eye(4))
        with pytest.raises(ValueError, match="trn_label.npy: expected one array, got an archive"):
            data.load("iemocap", broken)

    @pytest.mark.parametrize(("part", "other"), [("tst", "trn"), ("val", "val")])
    def test_ids_twice(self, broken, part, other):
        names = {p: np.load(broken / f"target/1/{p}_int2name.npy") for p in COUNTS}
        names[part][-1] = names[other][0]
        np.save(broken / f"target/1/{part}_int2name.npy", names[part])
        match = rf"utterance {names[other][0, 0].decode()} occurs in {other}_int2name.npy and again in {part}_int2name"
        with pytest.raises(ValueError, match=match):
            data.load("iemocap", broken)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda file: file.__delitem__("1"), r"expected the statistics of fold 1, got folds \['2'\]"),
            (lambda file: file.__delitem__("1/std"), "fold 1 lacks 'std'"),
            (lambda file: file["1/std"].__setitem__(4, 0), "expected .* positive standard deviations in fold 1"),
            (lambda file: file["1/mean"].__setitem__(4, np.nan), "expected finite means"),
            (
                lambda file: (file.__delitem__("1/mean"), file.__setitem__("1/mean", np.zeros(129))),
                r"expected mean and std \[130\] of fold 1, got \(129,\) for mean",
            ),
        ],
    )
    def test_statistics(self, broken, change, match):
        with h5py.File(broken / "A/comparE_mean_std.h5", "a") as file:
            change(file)
        with pytest.raises(ValueError, match="comparE_mean_std.h5: " + match):
            data.load("iemocap", broken)

    def test_an_utterance_without_anything(self, broken):
        name = split_of(1)["tst"][0]
        for modality, path in FILES.items():
            with h5py.File(broken / path, "a") as file:
                del file[name]
                file[name] = np.zeros((0, WIDTHS[modality]), np.float32)
        with pytest.raises(ValueError, match=f"{name} has no frames in any modality"):
            data.load("iemocap", broken)


@pytest.mark.slow
def test_mmin_trains_on_it(made):
    splits = data.load("iemocap", made[0])
    torch.manual_seed(0)
    method = JointTraining(MMINBackbone.for_data(splits["train"], dropout=0.2), modality_dropout=0.2)
    config = training.TrainConfig(epochs=25, batch_size=12, lr=2e-3, device="cpu", select="last")
    history = training.fit(method, splits["train"], splits["valid"], config)
    assert len(history.epochs) == 25
    complete = training.predict(method, splits["train"])
    assert complete.shape == (24, 4)
    assert (complete.argmax(-1) == splits["train"].target).float().mean() > 0.6
    audio = training.predict(method, splits["test"], present=torch.tensor([True, False, False]))
    assert torch.isfinite(audio).all()
    assert not torch.allclose(audio, training.predict(method, splits["test"]))
