"""MMSA's and MulT's pickles: every variant's layout generated, every way in which they may be broken, the real MOSI."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch

from mmlib import MissingPlan, coalitions, data, metrics, training
from mmlib.backbones import GenericBackbone
from mmlib.baselines import JointTraining
from mmlib.data import _readers, mmsa

SIZES = {"train": 10, "valid": 4, "test": 5}
# name, file, words x width, audio, vision, lengths: what thuiar/MMSA and its papers publish
VARIANTS = {
    "mosi-unaligned": ("mosi", "MOSI/Processed/unaligned_50.pkl", (50, 768), (375, 5), (500, 20), True),
    "mosi-aligned": ("mosi", "MOSI/Processed/aligned_50.pkl", (50, 768), (50, 5), (50, 20), False),
    "mosei-unaligned": ("mosei", "MOSEI/Processed/unaligned_50.pkl", (50, 768), (500, 74), (500, 35), True),
    "mosei-aligned": ("mosei", "MOSEI/Processed/aligned_50.pkl", (50, 768), (50, 74), (50, 35), False),
    "sims": ("sims", "SIMS/Processed/unaligned_39.pkl", (39, 768), (400, 33), (55, 709), True),
    "simsv2": ("simsv2", "SIMSv2/Processed/sims_unaligned.pkl", (39, 768), (400, 33), (55, 709), True),
    "simsv2-own": ("simsv2", "SIMS_V2/ch-simsv2s.pkl", (50, 768), (925, 25), (232, 177), True),
}
# name, file, aligned, words, audio, vision
MULT = {
    "mosi-aligned": ("mosi", "mosi_data.pkl", True, (50, 300), (50, 5), (50, 20)),
    "mosi-unaligned": ("mosi", "mosi_data_noalign.pkl", False, (50, 300), (375, 5), (500, 20)),
    "mosi-multibench": ("mosi", "mosi/mosi_raw.pkl", True, (50, 300), (50, 74), (50, 35)),
    "mosei-aligned": ("mosei", "mosei_senti_data.pkl", True, (50, 300), (50, 74), (50, 35)),
    "mosei-unaligned": ("mosei", "mosei_senti_data_noalign.pkl", False, (50, 300), (500, 74), (500, 35)),
}
KEYS = {"language": "text", "audio": "audio", "vision": "vision"}


def made_mmsa(shapes, lengths, scale, seed=0, sizes=SIZES, extra=False):
    """The content of a pickle in MMSA's layout, and the number of frames of every sample."""
    g = np.random.default_rng(seed)
    content, ends = {}, {}
    for s, (split, n) in enumerate(sizes.items()):
        part, end = {}, {}
        words = g.integers(4, shapes["language"][0] + 1, n)
        for m, (frames, width) in shapes.items():
            end[m] = words if m == "language" or not lengths else g.integers(1, frames + 1, n)
            x = g.normal(3, 2, (n, frames, width))
            x[np.arange(frames) >= end[m][:, None]] = 0
            part[KEYS[m]] = x.astype(np.float32 if m == "language" else np.float64)
        width = shapes["language"][0]
        mask = (np.arange(width) < words[:, None]).astype(int)
        ids = g.integers(1000, 20000, (n, width)) * mask
        ids[:, 0] = 101
        ids[np.arange(n), words - 1] = 102
        part["text_bert"] = np.stack([ids, mask, 0 * mask], 1).astype(np.float32)
        if not lengths:  # the frames of [CLS] and [SEP] are zero in the aligned files
            for m in ("audio", "vision"):
                part[m][:, 0] = 0
                part[m][np.arange(n), words - 1] = 0
        else:
            part["audio_lengths"], part["vision_lengths"] = end["audio"].tolist(), end["vision"].tolist()
        part["raw_text"] = np.array([f"words {split} {i}" for i in range(n)])
        part["id"] = np.array([f"v{s}{i // 3}$_${i}" for i in range(n)])
        part["annotations"] = np.array(["Positive"] * n)
        part["classification_labels"] = np.ones(n)
        part["regression_labels"] = g.uniform(-scale, scale, n)
        if extra:
            for k in "TAV":
                part[f"regression_labels_{k}"] = g.uniform(-scale, scale, n).astype(np.float32)
        content[split], ends[split] = part, end
    return content, ends


def made_mult(aligned, shapes, seed=0):
    """A pickle in MulT's layout: zeros in front, no lengths, [n, 1, 1] scores, ids of three byte strings."""
    g = np.random.default_rng(seed)
    content, counts = {}, {}
    for s, (split, n) in enumerate(SIZES.items()):
        part, count = {}, {}
        words = g.integers(3, shapes["language"][0] // 2, n)
        for m, (frames, width) in shapes.items():
            count[m] = words if aligned else g.integers(2, frames // 2, n)
            x = g.normal(3, 2, (n, frames, width))
            x[np.arange(frames) < (frames - count[m])[:, None]] = 0
            part[KEYS[m]] = x.astype(np.float32)
        part["labels"] = g.uniform(-3, 3, (n, 1, 1)).astype(np.float32)
        part["id"] = np.array([[b"vid%d" % s, b"%d.5" % i, b"%d.9" % i] for i in range(n)])
        content[split], counts[split] = part, count
    return content, counts


def store(root, path, content, protocol=4):
    path = root / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def small(**options):
    """A small content in MMSA's layout."""
    shapes = {"language": (8, 6), "audio": (12, 3), "vision": (9, 4)}
    return made_mmsa(shapes, **{"lengths": True, "scale": 3, **options})


@pytest.mark.parametrize("variant", VARIANTS)
def test_mmsa_variants(tmp_path, variant):
    name, path, words, audio, vision, lengths = VARIANTS[variant]
    shapes = {"language": words, "audio": audio, "vision": vision}
    scale = 3 if name.startswith("mosei") or name == "mosi" else 1
    content, ends = made_mmsa(shapes, lengths, scale, extra=scale == 1)
    file = store(tmp_path, path, content)
    splits = data.load(name, tmp_path, standardised=False)
    assert list(splits) == ["train", "valid", "test"]
    for split, d in splits.items():
        assert d.modalities == ("language", "audio", "vision")
        assert d.feature_shapes == shapes
        assert d.names == [f"{name}/{key}" for key in content[split]["id"]]
        assert d.present.all()
        assert d.target.dtype == torch.float32
        np.testing.assert_allclose(d.target, content[split]["regression_labels"], rtol=1e-6)
        for m in shapes:
            valid = np.arange(shapes[m][0]) < ends[split][m][:, None]
            assert (d.data.valid[m].numpy() == valid).all()
            assert (d.data.observed[m].numpy() == valid).all()
            assert d.data.features[m].dtype == torch.float32
            assert (d.data.features[m].numpy() == content[split][KEYS[m]].astype(np.float32)).all()
        assert d.info["scale"] == ("mosi" if scale == 3 else "sims")
        assert (d.info["task"], d.info["outputs"], d.info["classes"]) == ("regression", 1, None)
        assert (d.info["name"], d.info["layout"], d.info["aligned"]) == (name, "mmsa", not lengths)
        assert (d.info["split"], d.info["split_seed"], d.info["official_split"]) == (split, None, False)
        assert d.info["missing"] == {"language": 0, "audio": 0, "vision": 0}
        assert (d.info["empty"], d.info["repairs"]) == ([], {})
        assert d.info["fingerprint"] == data.fingerprint(d)
        json.dumps(d.info)
        d.data.check_values()
        assert np.isfinite(metrics.msa_scores(-d.target, d.target, scale=d.info["scale"])["mae"])
    same = data.load(name, file, aligned=not lengths, standardised=False)  # the file itself
    assert same["test"].info["fingerprint"] == splits["test"].info["fingerprint"]
    with pytest.raises(ValueError, match="expected train, valid and test of .* as .* was published"):
        data.load(name, file, strict=True)


@pytest.mark.parametrize("variant", MULT)
def test_mult_variants(tmp_path, variant):
    name, path, aligned, words, audio, vision = MULT[variant]
    shapes = {"language": words, "audio": audio, "vision": vision}
    content, counts = made_mult(aligned, shapes)
    content["test"]["vision"][2] = 0  # no face was found
    content["test"]["audio"][3, -1, 1] = -np.inf
    store(tmp_path, path, content, protocol=2)
    for asked in (None, aligned):
        splits = data.load(name, tmp_path, aligned=asked, standardised=False)
    for s, (split, d) in enumerate(splits.items()):
        assert d.feature_shapes == shapes
        assert d.names[1] == f"{name}/vid{s}$_$1.5$_$1.9"
        assert (d.info["layout"], d.info["aligned"]) == ("mult", aligned)
        np.testing.assert_array_equal(d.target, content[split]["labels"].ravel())
        for m in shapes:
            for i, count in enumerate(counts[split][m]):
                if (split, m, i) == ("test", "vision", 2):
                    assert not d.data.valid[m][i].any()
                    continue
                assert d.data.valid[m][i].tolist() == [t < count for t in range(shapes[m][0])]
                expected = content[split][KEYS[m]][i, shapes[m][0] - count :]  # moved to the start
                expected = np.where(np.isinf(expected), 0, expected)
                np.testing.assert_array_equal(d.data.features[m][i, :count], expected)
                assert not d.data.features[m][i, count:].any()
    assert splits["test"].info["missing"] == {"language": 0, "audio": 0, "vision": 1}
    assert splits["test"].info["repairs"] == {"audio": {"minus_inf": 1}}
    with pytest.raises(FileNotFoundError, match=f"{name}: no "):
        data.load(name, tmp_path, aligned=not aligned)
    with pytest.raises(ValueError, match=f"aligned: expected {aligned}, since the frames"):
        data.load(name, tmp_path / path, aligned=not aligned)


class TestContents:
    def test_which_file(self, tmp_path):
        for path, seed in (("MOSI/Processed/unaligned_50.pkl", 1), ("MOSI/Processed/aligned_50.pkl", 2)):
            shapes = {"language": (8, 6), "audio": (8 if seed == 2 else 12, 3), "vision": (8 if seed == 2 else 9, 4)}
            store(tmp_path, path, made_mmsa(shapes, seed == 1, 3, seed)[0])
        name = lambda root, **o: data.load("mosi", root, **o)["train"].info["file"]
        assert name(tmp_path) == name(tmp_path, aligned=False) == "unaligned_50.pkl"
        assert name(tmp_path, aligned=True) == "aligned_50.pkl"
        assert name(tmp_path / "MOSI") == name(tmp_path / "MOSI" / "Processed") == "unaligned_50.pkl"
        (tmp_path / "MOSI/Processed/unaligned_50.pkl").unlink()
        assert name(str(tmp_path)) == "aligned_50.pkl"

    def test_float16_integers_lists_and_vectors(self, tmp_path):
        content, _ = small()
        for part in content.values():
            part["text"] = part["text"].astype(np.float16)
            part["audio"] = np.round(part["audio"]).astype(np.int32)
            part["vision"] = part["vision"][:, 0]  # [n, D]
            part["vision_lengths"] = np.ones((len(part["vision"]), 1), np.float64)
            part["regression_labels"] = part["regression_labels"].tolist()
            part["id"] = part["id"].tolist()
            part["audio"][:, 0] = 1
        d = data.load("mosi", store(tmp_path, "f.pkl", content), standardised=False)["train"]
        assert d.feature_shapes == {"language": (8, 6), "audio": (12, 3), "vision": (1, 4)}
        assert all(x.dtype == torch.float32 for x in d.data.features.values())
        np.testing.assert_array_equal(d.data.features["language"], content["train"]["text"].astype(np.float32))
        np.testing.assert_array_equal(d.data.features["audio"], content["train"]["audio"])

    def test_natural_missingness(self, tmp_path):
        content, _ = small()
        train = content["train"]
        train["vision"][2] = 0
        train["vision_lengths"][2] = 0
        train["audio"][3] = 0  # all-zero, though it has a length
        train["audio"][4] = -np.inf  # nothing is left of it
        train["audio_lengths"][5] = 0  # a length of zero hides what stands there
        for m in ("text", "audio", "vision"):
            train[m][7] = 0
        train["text_bert"][7] = 0
        train["audio"][8, 0] = 0  # a zero frame in between is a frame
        train["audio_lengths"][8] = 5
        file = store(tmp_path, "f.pkl", content)
        d = data.load("mosi", file)["train"]
        expected = np.ones((10, 3), bool)
        expected[[2, 3, 4, 5], [2, 1, 1, 1]] = False
        expected[7] = False
        assert (d.present.numpy() == expected).all()
        assert d.info["missing"] == {"language": 1, "audio": 4, "vision": 2}
        assert d.info["empty"] == ["mosi/v02$_$7"]
        for i, m in enumerate(d.modalities):
            gone = ~d.present[:, i]
            assert not d.data.valid[m][gone].any()
            assert not d.data.observed[m][gone].any()
            assert not d.data.features[m][gone].any()
        assert d.data.valid["audio"][8].sum() == 5
        assert d.info["repairs"]["audio"]["minus_inf"] == 3 * int(train["audio_lengths"][4])
        assert d.info["repairs"]["audio"]["beyond_length"] >= 1
        d.data.check_values()
        whole = data.load("mosi", file, drop="incomplete")["train"]
        assert len(whole) == 5
        assert whole.present.all()
        assert whole.info["missing"] == {"language": 0, "audio": 0, "vision": 0}
        some = data.load("mosi", file, drop="empty")["train"]
        assert len(some) == 9
        assert some.info["empty"] == []
        assert some.info["missing"] == {"language": 0, "audio": 3, "vision": 1}
        np.testing.assert_array_equal(whole.data.features["audio"], d.data.features["audio"][d.present.all(-1)])
        # a model gives numbers for all of them, the empty one too; masks drop only what is there
        model = GenericBackbone.for_data(d, width=4)
        assert torch.isfinite(coalitions.coalition_logits(model, d.data, coalitions.coalition_masks(3))).all()
        report = MissingPlan("imbalanced", rates=(0.3, 0.3, 0.3)).draw(some).realised()
        assert report["natural"]["audio"] == pytest.approx(3 / 9)

    def test_ids(self, tmp_path):
        content, ends = small()
        file = store(tmp_path, "f.pkl", content)
        d = data.load("mosi", file, text="ids", unk=7)["valid"]
        x = d.data.features["language"]
        assert x.dtype == torch.int64
        assert (x.numpy() == content["valid"]["text_bert"][:, 0]).all()
        assert d.data.fill == {"language": 7}
        assert d.data.valid["language"].sum(1).tolist() == ends["valid"]["language"].tolist()
        dropped = d.drop(torch.tensor([False, True, True])).data
        for row, count in zip(dropped.features["language"].tolist(), ends["valid"]["language"], strict=True):
            assert row == [101, *[7] * (count - 2), 102, *[0] * (8 - count)]
        assert d.info["units"]["language"] == "token ids"
        only = data.load("mosi", file, text="ids", modalities=("audio", "language"))["valid"]
        assert only.modalities == ("audio", "language")
        for part in content.values():  # the vectors are not needed
            del part["text"]
        again = data.load("mosi", store(tmp_path, "g.pkl", content), text="ids", unk=7)["valid"]
        assert torch.equal(again.data.features["language"], x)
        splits = data.load("mosi", file, text="ids")
        logits = training.predict(JointTraining(GenericBackbone.for_data(splits["train"], width=4)), splits["test"])
        assert logits.shape == (5, 1)

    def test_modalities_and_max_frames(self, tmp_path):
        content, ends = small()
        file = store(tmp_path, "f.pkl", content)
        one = data.load("mosi", file, modalities=("audio",), max_frames={"audio": 5})["test"]
        assert one.feature_shapes == {"audio": (5, 3)}
        assert one.data.valid["audio"].sum(1).tolist() == np.minimum(ends["test"]["audio"], 5).tolist()
        assert one.info["max_frames"] == {"audio": 5}
        every = data.load("mosi", file, max_frames=4, text="ids")["test"]
        assert every.feature_shapes == {"language": (4,), "audio": (4, 3), "vision": (4, 4)}
        # what is not asked for need not be there
        for part in content.values():
            del part["vision"], part["text"], part["text_bert"]
        data.load("mosi", store(tmp_path, "g.pkl", content), modalities=("audio",))

    def test_aligned_without_the_words(self, tmp_path):
        """The words that are not asked for still tell where the frames of an aligned file end."""
        shapes = {"language": (8, 6), "audio": (8, 3), "vision": (8, 4)}
        content, ends = made_mmsa(shapes, False, 3)
        content["test"]["text"][:] += 1  # BERT's vectors of padding are not zero
        file = store(tmp_path, "f.pkl", content)
        d = data.load("mosi", file, modalities=("audio",))["test"]
        assert d.data.valid["audio"].sum(1).tolist() == ends["test"]["language"].tolist()
        d = data.load("mosi", file)["test"]
        assert d.data.valid["language"].sum(1).tolist() == ends["test"]["language"].tolist()
        assert d.info["repairs"]["language"]["beyond_length"] == int((ends["test"]["language"] < 8).sum())
        for part in content.values():  # without a mask: the last frame of any of the three
            del part["text_bert"]
        content["test"]["text"] = content["test"]["audio"][..., [0, 1, 2, 0, 1, 2]]
        d = data.load("mosi", store(tmp_path, "g.pkl", content))["test"]
        assert d.data.valid["vision"].sum(1).tolist() == (ends["test"]["language"] - 1).tolist()

    def test_aligned_frames_stay_aligned(self, tmp_path):
        """Padding in front ends where the first of the three modalities begins, though the first word is unknown."""
        content, counts = made_mult(True, {"language": (20, 6), "audio": (20, 3), "vision": (20, 4)})
        for i, count in enumerate(counts["test"]["audio"]):
            content["test"]["text"][i, 20 - count] = 0
            content["test"]["vision"][i, 20 - count : 22 - count] = 0
        d = data.load("mosi", store(tmp_path, "f.pkl", content), standardised=False)["test"]
        for i, count in enumerate(counts["test"]["audio"]):
            for m in d.modalities:
                assert int(d.data.valid[m][i].sum()) == count
                expected = content["test"][KEYS[m]][i, 20 - count :]
                np.testing.assert_array_equal(d.data.features[m][i, :count], expected)

    def test_as_many_frames_as_words_but_lengths(self, tmp_path):
        content, ends = made_mmsa({"language": (8, 6), "audio": (8, 3), "vision": (8, 4)}, True, 3)
        file = store(tmp_path, "f.pkl", content)
        for asked, found in ((None, False), (False, False), (True, True)):  # the lengths count in any case
            d = data.load("mosi", file, aligned=asked)["train"]
            assert d.info["aligned"] is found
            assert d.data.valid["audio"].sum(1).tolist() == ends["train"]["audio"].tolist()

    def test_words_of_another_tokenisation(self, tmp_path):
        """Vectors of other words than the tokens': their own zeros tell where they end."""
        content, ends = small()
        for part in content.values():
            part["text"] = np.pad(part["text"], ((0, 0), (0, 3), (0, 0)))
        d = data.load("mosi", store(tmp_path, "f.pkl", content))["test"]
        assert d.data.valid["language"].shape == (5, 11)
        assert d.data.valid["language"].sum(1).tolist() == ends["test"]["language"].tolist()

    def test_unimodal_scores(self, tmp_path):
        content, _ = small(scale=1, extra=True)
        file = store(tmp_path, "SIMS/Processed/unaligned_39.pkl", content)
        d = data.load("sims", tmp_path, unimodal=True)["valid"]
        for m, k in (("language", "T"), ("audio", "A"), ("vision", "V")):
            np.testing.assert_array_equal(d.data.extras[f"target_{m}"], content["valid"][f"regression_labels_{k}"])
        assert d[[1, 2]].extras["target_audio"].shape == (2,)
        assert not data.load("sims", file)["valid"].data.extras
        del content["test"]["regression_labels_A"]
        with pytest.raises(ValueError, match="test lacks the key 'regression_labels_A'; it has"):
            data.load("sims", store(tmp_path, "f.pkl", content), unimodal=True)

    def test_transcripts(self, tmp_path):
        content, _ = small()
        file = store(tmp_path, "f.pkl", content)
        said = mmsa.transcripts("mosi", file)
        names = [key for d in data.load("mosi", file).values() for key in d.names]
        assert list(said) == names
        assert said[names[-1]] == "words test 4"
        del content["valid"]["raw_text"]
        with pytest.raises(ValueError, match="valid lacks the key 'raw_text'"):
            mmsa.transcripts("mosi", store(tmp_path, "g.pkl", content))

    def test_names(self, tmp_path):
        content, _ = small()
        content["valid"]["id"] = np.array(["a", "a", "b", "a"])  # names of videos alone
        del content["test"]["id"]
        splits = data.load("mosi", store(tmp_path, "f.pkl", content))
        assert splits["valid"].names == ["mosi/a", "mosi/a#2", "mosi/b", "mosi/a#3"]
        assert splits["test"].names[3] == "mosi/test/3"

    def test_lengths_with_one_too_many(self, tmp_path):
        content, ends = small()
        content["train"]["vision_lengths"].append(3)
        d = data.load("mosi", store(tmp_path, "f.pkl", content))["train"]
        assert d.data.valid["vision"].sum(1).tolist() == ends["train"]["vision"].tolist()
        content["train"]["vision_lengths"].insert(0, 1)  # and these belong to other samples
        with pytest.raises(ValueError, match=r"train\['vision_lengths'\]: expected 10 lengths, one a sample, got 12"):
            data.load("mosi", store(tmp_path, "g.pkl", content))


class TestStandardised:
    def test_by_hand(self, tmp_path):
        """Mean and deviation of the frames of train that are there, in a loop."""
        content, ends = small(sizes={"train": 6, "valid": 2, "test": 3})
        train = content["train"]
        train["audio"][1] = 0
        train["audio_lengths"][1] = 0
        content["test"]["audio"] *= 100
        rows = [train["audio"][i, t] for i in range(6) if i != 1 for t in range(ends["train"]["audio"][i])]
        rows = np.array(rows, np.float32).astype(np.float64)
        for j in range(3):
            low, high = np.quantile(rows[:, j], [0.005, 0.995])
            rows[:, j] = np.clip(rows[:, j], low, high)
        mean, std = rows.mean(0), rows.std(0)
        splits = data.load("mosi", store(tmp_path, "f.pkl", content))
        for split, d in splits.items():
            x = content[split]["audio"].astype(np.float32)
            for i in range(len(d)):
                for t in range(12):
                    z = np.zeros(3)
                    if d.present[i, 1] and t < ends[split]["audio"][i]:
                        z = np.clip((x[i, t] - mean) / std, -5, 5)
                    np.testing.assert_allclose(d.data.features["audio"][i, t], z, rtol=1e-5, atol=1e-6)
            assert "standardised on train" in d.info["units"]["audio"]
            assert "standardised" not in d.info["units"]["language"]
            np.testing.assert_array_equal(d.data.features["language"], content[split]["text"])
        assert splits["test"].data.features["audio"].abs().max() == 5

    def test_test_rows_do_not_matter(self, tmp_path):
        content, _ = small()
        a = data.load("mosi", store(tmp_path, "a.pkl", content))
        content["valid"]["audio"] *= 3
        content["test"]["audio"] -= 1
        b = data.load("mosi", store(tmp_path, "b.pkl", content))
        assert a["train"].info["fingerprint"] == b["train"].info["fingerprint"]
        assert a["valid"].info["fingerprint"] != b["valid"].info["fingerprint"]

    def test_huge_constant_and_rare_features(self, tmp_path):
        g = np.random.default_rng(0)
        content, _ = small(sizes={"train": 400, "valid": 3, "test": 3})
        train = content["train"]
        train["audio"] = g.normal(size=(400, 12, 3))
        train["audio_lengths"] = [12] * 400
        train["audio"][..., 1] = 1e7  # a constant
        train["audio"][..., 2] = 0  # rare: one frame in 240, past both percentiles
        train["audio"][::20, 5, 2] = 4
        train["audio"][7, 3, 0] = 1e30  # a value that would be all of the mean and of the deviation
        train["audio"][8, 3, 0] = -np.inf
        content["test"]["audio"][0, 0] = [-1e38, 2e7, 1e30]
        splits = data.load("mosi", store(tmp_path, "f.pkl", content))
        x = splits["train"].data.features["audio"]
        assert torch.isfinite(x).all()
        assert x.abs().max() <= 5
        assert x[..., 0].std() == pytest.approx(1, abs=0.05)
        assert x[..., 0].mean().abs() < 0.05
        assert not x[..., 1].any()
        assert sorted(x[..., 2].unique().tolist()) == pytest.approx([-(239**-0.5), 5])  # sqrt(239) of 5 and more
        assert x[7, 3, 0] == 5
        assert splits["test"].data.features["audio"][0, 0].tolist() == [-5, 5, 5]

    def test_in_parts(self, tmp_path, monkeypatch):
        file = store(tmp_path, "f.pkl", small()[0])
        whole = data.load("mosi", file)["test"]
        monkeypatch.setattr(_readers, "_parts", lambda f: (slice(i, i + 3) for i in range(0, len(f.x), 3)))
        pieces = data.load("mosi", file)["test"]
        torch.testing.assert_close(pieces.data.features["audio"], whole.data.features["audio"])


def delete(split, key):
    return lambda c: c[split].pop(key)


def change(split, key, function):
    def apply(c):
        c[split][key] = function(c[split][key])

    return apply


def put(split, key, place, value):
    return lambda c: c[split][key].__setitem__(place, value)


BROKEN = [
    # keys and splits
    (lambda c: c.pop("valid"), r"the split 'valid' is missing; the file has \['test', 'train'\]"),
    (lambda c: c.update(test=[1]), r"test: expected a dict of arrays, got list"),
    (delete("train", "text"), r"train lacks the key 'text'; it has annotations, audio, audio_lengths"),
    (delete("valid", "audio"), "valid lacks the key 'audio'"),
    (delete("test", "vision"), "test lacks the key 'vision'"),
    (delete("test", "text_bert"), "test lacks the key 'text_bert'"),
    (delete("train", "vision_lengths"), "train lacks the key 'vision_lengths'"),
    (delete("valid", "regression_labels"), r"valid lacks the key 'regression_labels' \(or MulT's 'labels'\); it has"),
    # sizes
    (change("train", "audio", lambda x: x[:9]), r"train\['audio'\]: expected frames \[10, T, D\], got float64 \(9, 12"),
    (change("valid", "text", lambda x: x[:3]), r"valid\['text'\]: expected frames \[4, T, D\], got float32 \(3, 8, 6"),
    (change("test", "regression_labels", lambda x: x[:4]), r"test\['id'\]: expected 4 entries, one a sample, got 5"),
    (change("test", "id", lambda x: x[:4]), r"test\['id'\]: expected 5 entries, one a sample, got 4"),
    (change("test", "regression_labels", lambda x: x[:0]), r"test\['regression_labels'\]: expected at least one"),
    (change("test", "regression_labels", lambda x: 1.0), r"test\['regression_labels'\]: expected at least one"),
    (change("train", "audio_lengths", lambda x: x[:9]), r"train\['audio_lengths'\]: expected 10 lengths.*\(9,\)"),
    # shapes and kinds
    (
        change("train", "vision", lambda x: x[..., None]),
        r"train\['vision'\]: expected frames \[10, T, D\], got float64",
    ),
    (change("test", "vision", lambda x: x[..., :3]), r"test\['vision'\]: .* shape \[9, 4\], as in train, got \[9, 3\]"),
    (change("valid", "audio", lambda x: x[:, :5]), r"valid\['audio'\]: .* shape \[12, 3\], as in train, got \[5, 3\]"),
    (
        change("valid", "audio", lambda x: [r[:k] for k, r in enumerate(x.tolist())]),
        r"valid\['audio'\]: expected an ar",
    ),
    (change("valid", "audio", lambda x: np.array([None] * 4)), r"valid\['audio'\]: expected (numbers|frames)"),
    (change("valid", "audio", lambda x: np.array([1, "x", 4, 5], object)), r"valid\['audio'\]: expected numbers"),
    (change("valid", "text", lambda x: np.array(["a"] * 4)), r"valid\['text'\]: expected numbers, got <U1 \(4,\)"),
    (change("test", "text_bert", lambda x: x[:, :2]), r"test\['text_bert'\]: expected ids, .* \[5, 3, L\]"),
    (put("test", "text_bert", (2, 1, 0), 2), r"test\['text_bert'\]: expected an attention mask of 0 and 1.*2.0"),
    (put("test", "text_bert", (2, 0, 0), -1), r"test\['text_bert'\]: expected token ids, integers from 0.*-1"),
    (put("test", "text_bert", (2, 0, 0), np.nan), r"test\['text_bert'\]: expected token ids"),
    # lengths
    (put("train", "audio_lengths", 4, 13), r"train\['audio_lengths'\]: .* 0 to the 12 frames, got 13 for sample 4"),
    (put("train", "vision_lengths", 4, -1), r"train\['vision_lengths'\]: .* got -1 for sample 4"),
    (put("train", "vision_lengths", 4, 1.5), r"train\['vision_lengths'\]: .* got 1.5 for sample 4"),
    (put("train", "vision_lengths", 4, np.nan), r"train\['vision_lengths'\]: .* got nan for sample 4"),
    # values
    (
        put("valid", "audio", (2, 0, 1), np.nan),
        r"valid\['audio'\]: .* NaN in 1 frames, .*v10\$_\$2 \(sample 2\), frame 0",
    ),
    (put("train", "text", (3, 0), np.nan), r"train\['text'\]: .* NaN in 1 frames, .*\(sample 3\), frame 0; nan='drop'"),
    (put("test", "vision", (1, 0, 2), np.inf), r"test\['vision'\]: .* infinity in 1 frames, .*\(sample 1\), frame 0$"),
    (put("test", "vision", (1, 0, 2), -np.inf), r"test\['vision'\]: .* infinity in 1 frames"),
    (put("test", "vision", (1, 0, 2), 1e300), r"test\['vision'\]: .* infinity in 1 frames"),
    (put("test", "audio", (1, 0, 2), np.inf), r"test\['audio'\]: .* infinity in 1 frames"),
    (change("train", "vision", lambda x: 0 * x), r"train\['vision'\]: the modality is missing in all 10 samples"),
    (change("train", "audio_lengths", lambda x: [0] * 10), r"train\['audio'\]: the modality is missing in all 10"),
    # scores
    (put("test", "regression_labels", 3, 3.5), r"test\['regression_labels'\]: .* \[-3, 3\], but 1 .* sample 3: 3.5"),
    (put("train", "regression_labels", 3, np.nan), r"train\['regression_labels'\]: .* the first of sample 3: nan"),
    (
        change("train", "regression_labels", lambda x: np.stack([x, x], 1)),
        r"train\['regression_labels'\]: expected a score for each of 10 samples, got shape \(10, 2\)",
    ),
    (put("test", "id", 0, "v00$_$1"), r"mosi/v00\$_\$1 is in train\['id'\] and again in test\['id'\]"),
]


class TestBadInput:
    @pytest.mark.parametrize(("damage", "match"), BROKEN, ids=range(len(BROKEN)))
    def test_damage(self, tmp_path, damage, match):
        content, _ = small()
        damage(content)
        file = store(tmp_path, "bad.pkl", content)
        with pytest.raises(ValueError, match=match) as caught:
            data.load("mosi", file)
        assert str(file) in str(caught.value)

    def test_scores_off_the_scale_of_sims(self, tmp_path):
        content, _ = small(scale=1)
        content["valid"]["regression_labels"][2] = -1.2
        with pytest.raises(ValueError, match=r"\['regression_labels'\]: expected scores in \[-1, 1\], but 1 .*: -1.2"):
            data.load("sims", store(tmp_path, "f.pkl", content))

    def test_mult_scores(self, tmp_path):
        content, _ = made_mult(True, {"language": (8, 6), "audio": (8, 3), "vision": (8, 4)})
        content["valid"]["labels"] = np.ones((4, 4, 2))  # IEMOCAP's, in the same layout
        with pytest.raises(ValueError, match=r"valid\['labels'\]: expected a score for each of 4 samples.*\(4, 4, 2\)"):
            data.load("mosi", store(tmp_path, "f.pkl", content))
        content["valid"]["labels"] = np.ones((4, 1, 1))
        with pytest.raises(ValueError, match="train lacks the key 'text_bert'"):
            data.load("mosi", store(tmp_path, "f.pkl", content), text="ids")

    def test_nan_frames_may_be_dropped(self, tmp_path):
        content, ends = small()
        content["train"]["audio"][3, 0, 1] = np.nan
        content["train"]["audio"][4] = np.nan
        content["train"]["vision"][5, -1] = np.nan  # beyond its length: nobody looks
        content["train"]["vision_lengths"][5] = 8
        d = data.load("mosi", store(tmp_path, "f.pkl", content), nan="drop")["train"]
        d.data.check_values()
        assert torch.isfinite(d.data.features["audio"]).all()
        assert d.data.valid["audio"][3, 0]
        assert not d.data.observed["audio"][3, 0]
        assert d.present[:, 1].tolist() == [i != 4 and (i != 3 or ends["train"]["audio"][3] > 1) for i in range(10)]
        assert d.info["repairs"]["audio"] == {"nan_frames": 1 + int(ends["train"]["audio"][4]), "beyond_length": 1}
        content["train"]["audio"][6, 0, 0] = np.inf
        with pytest.raises(ValueError, match="infinity in 1 frames"):
            data.load("mosi", store(tmp_path, "g.pkl", content), nan="drop")

    @pytest.mark.parametrize(("name", "other"), [("mosi", "sims"), ("sims", "mosei"), ("mosei", "simsv2")])
    def test_another_data_set(self, tmp_path, name, other):
        sizes = dict(zip(SIZES, mmsa._SOURCES[other].sizes, strict=True))
        content = {s: {"regression_labels": np.zeros(n), "text": 0} for s, n in sizes.items()}
        with pytest.raises(ValueError, match=f"its splits have the sizes of {other}, .* not of {name}"):
            data.load(name, store(tmp_path, "f.pkl", content))

    def test_official_split(self, tmp_path):
        content, _ = made_mmsa(
            {"language": (4, 2), "audio": (3, 2), "vision": (2, 2)},
            True,
            3,
            sizes={"train": 1284, "valid": 229, "test": 686},
        )
        assert data.load("mosi", store(tmp_path, "f.pkl", content), strict=True)["test"].info["official_split"]

    @pytest.mark.parametrize("keep", [0, 10, 0.5, -3])
    def test_truncated(self, tmp_path, keep):
        file = store(tmp_path, "f.pkl", small()[0])
        whole = file.read_bytes()
        file.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
        with pytest.raises(ValueError, match=r"f\.pkl: the (file is empty|pickle is truncated)"):
            data.load("mosi", file)

    def test_hostile(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "owned"),))

        content, _ = small()
        content["test"]["text"] = Evil()
        for bad in (content, Evil(), np.array([Evil()], dtype=object)):
            with pytest.raises(ValueError, match="refused to read this pickle: it asks for .*mkdir"):
                data.load("mosi", store(tmp_path, "f.pkl", bad))
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize("content", [[1, 2], np.ones(3), "text", {}])
    def test_something_else(self, tmp_path, content):
        with pytest.raises(
            ValueError, match=r"f\.pkl: (expected a dict of train, valid, test, got|the split 'train' is)"
        ):
            data.load("mosi", store(tmp_path, "f.pkl", content))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"text": "words"}, "text: expected 'features' or 'ids', got 'words'"),
            (
                {"modalities": ("audio", "audio")},
                "modalities: expected some of language, audio, vision, each once",
            ),
            ({"modalities": ()}, "modalities: expected (some|one) of"),
            ({"modalities": ["text"]}, "modalities: expected (some|one) of"),
            ({"max_frames": 0}, "max_frames: expected None or an integer of at least 1"),
            ({"max_frames": {"text": 3}}, r"max_frames: unknown modalities \['text'\]"),
            ({"drop": "all"}, "drop: expected None or 'empty' or 'incomplete', got 'all'"),
            ({"nan": "zero"}, "nan: expected 'error' or 'drop', got 'zero'"),
            ({"aligned": "yes"}, "aligned: expected None or True or False, got 'yes'"),
            ({"unk": -1}, "unk: expected an integer of at least 0, got -1"),
        ],
    )
    def test_options(self, tmp_path, options, match):
        with pytest.raises((TypeError, ValueError), match=match):
            data.load("mosi", tmp_path, **options)

    def test_drop_that_leaves_nothing(self, tmp_path):
        content, _ = small()
        content["test"]["vision"][:] = 0
        file = store(tmp_path, "f.pkl", content)
        assert data.load("mosi", file)["test"].info["missing"]["vision"] == 5
        with pytest.raises(ValueError, match="drop: f.pkl has no sample in test that 'incomplete' would keep"):
            data.load("mosi", file, drop="incomplete")

    def test_no_file(self, tmp_path):
        (tmp_path / "MOSI").mkdir()
        with pytest.raises(
            FileNotFoundError, match=r"(?s)no unaligned_50.pkl, .*aligned_50.pkl, .* in .*MOSI/Processed/"
        ):
            data.load("mosi", tmp_path)
        with pytest.raises(ValueError, match="aligned: sims has no aligned version"):
            data.load("sims", tmp_path, aligned=True)
        with pytest.raises(ValueError, match="name: expected one of mosi, mosei, sims, simsv2, got 'iemocap'"):
            mmsa.transcripts("iemocap", tmp_path)


@pytest.fixture(scope="module")
def mosi(real_data):
    if not (real_data / "mosi" / "mosi_utterance.pkl").is_file():
        pytest.skip(f"no mosi/mosi_utterance.pkl in {real_data}")
    return real_data


@pytest.mark.real
class TestRealMOSI:
    @pytest.mark.slow
    def test_facts(self, mosi):
        splits = data.load("mosi", mosi)
        assert {s: len(d) for s, d in splits.items()} == {"train": 1284, "valid": 229, "test": 686}
        missing = {s: d.info["missing"] for s, d in splits.items()}
        assert {s: m["vision"] for s, m in missing.items()} == {"train": 694, "valid": 195, "test": 558}
        assert all(m["language"] == m["audio"] == 0 for m in missing.values())
        for d in splits.values():
            assert d.feature_shapes == {"language": (50, 384), "audio": (1, 73), "vision": (1, 100)}
            assert (float(d.target.min()), float(d.target.max())) == (-3, 3)
            assert d.info["official_split"]
            assert (d.info["aligned"], d.info["scale"], d.info["empty"], d.info["repairs"]) == (False, "mosi", [], {})
            d.data.check_values()
            for m in ("audio", "vision"):
                assert d.data.features[m].abs().max() <= 5
        assert {s: int((d.target == 0).sum()) for s, d in splits.items()} == {"train": 53, "valid": 13, "test": 30}
        train = splits["train"].data.features["audio"][:, 0]
        assert train.mean(0).abs().max() < 0.1
        assert 0.1 < train.std(0).min() < train.std(0).max() < 1.5
        assert len(data.load("mosi", mosi, drop="incomplete")["test"]) == 128

    def test_ids(self, mosi):
        test = data.load("mosi", mosi, text="ids", modalities=("language",))["test"]
        x, valid = test.data.features["language"], test.data.valid["language"]
        assert x.shape == (686, 50)
        assert int(x.max()) < 30522
        assert (x[:, 0] == 101).all()
        assert (x.gather(1, valid.sum(1, keepdim=True) - 1) == 102).all()
        assert not x[~valid].any()
        said = mmsa.transcripts("mosi", mosi)
        assert said["mosi/c7UH_rxdZv4$_$1"] == "oh my gosh bad movie"
        assert set(test.names) <= set(said)

    @pytest.mark.slow
    def test_late_fusion_learns(self, mosi):
        """Not a constant: its error is far below that of the best constant, and its order is the scores'."""
        splits = data.load("mosi", mosi)
        test = splits["test"]
        constant = (test.target - splits["train"].target.median()).abs().mean()
        assert constant == pytest.approx(1.456, abs=0.001)
        torch.manual_seed(0)
        method = JointTraining(GenericBackbone.for_data(splits["train"], width=32))
        config = training.TrainConfig(epochs=4, batch_size=32, device="cpu")
        training.fit(method, splits["train"], splits["valid"], config)
        scores = metrics.msa_scores(training.predict(method, test)[:, 0], test.target, scale=test.info["scale"])
        assert scores["mae"] < 1.05
        assert scores["corr"] > 0.6
        assert scores["f1_non0"] > 0.75
