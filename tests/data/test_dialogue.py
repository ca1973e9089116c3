"""Dialogue pickles in the three layouts that are about, generated exactly, against plain reading; and real CMU-MOSI."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mmlib import MultimodalBatch, MultimodalDataset, data
from mmlib.data import dialogue
from mmlib.missing import MissingPlan

WIDTHS = {"audio": 7, "text": 5, "visual": 4}
NAMES = {"audio": "audio", "language": "text", "vision": "visual"}


def make(lengths=(3, 1, 4, 2, 5, 2, 3, 1, 4, 6, 2, 3, 4), scores=False, seed=0, widths=None, classes=6):
    """BALM's dict: every fifth utterance has no face."""
    g = np.random.default_rng(seed)
    content = {key: {} for key in ("text", "audio", "visual", "label", "speaker", "sentence")}
    videos = [f"Ses0{1 + i % 5}{'FM'[i % 2]}_impro{i:02d}" for i in range(len(lengths))]
    for video, n in zip(videos, lengths, strict=True):
        for key, width in (widths or WIDTHS).items():
            content[key][video] = [g.normal(2, 3, width).astype(np.float32) for _ in range(n)]
        for i in range(n):
            if i % 5 == 3:
                content["visual"][video][i][:] = 0
        content["label"][video] = [float(g.uniform(-3, 3)) if scores else int(g.integers(classes)) for _ in range(n)]
        content["speaker"][video] = ["M" if scores else "MF"[int(g.integers(2))] for _ in range(n)]
        content["sentence"][video] = [f"{video} says {i}" for i in range(n)]
    content["trainVid"], content["testVid"] = videos[:-3], videos[-3:]
    if scores:
        content["trainVid"], content["valVid"] = videos[:-5], videos[-5:-3]
    return content


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return path


def as_tuple(content):
    """MMGCN's nine."""
    ids = {v: [f"{v}_{i:03d}" for i in range(len(x))] for v, x in content["label"].items()}
    keys = ("speaker", "label", "text", "audio", "visual", "sentence", "trainVid", "testVid")
    return (ids, *(content[key] for key in keys))


def write_gcnet(folder: Path, content, name="IEMOCAP_features_raw_6way.pkl", frames=3) -> Path:
    """The label pickle and its folders; text and sound hold frames, faces lie one to a file."""
    ids = {v: [f"{v}_{i:03d}" for i in range(len(x))] for v, x in content["label"].items()}
    parts = [ids, content["label"], content["speaker"], content["sentence"], set(content["trainVid"])]
    parts += [set(content["valVid"])] if "valVid" in content else []
    path = write(folder / name, [*parts, set(content["testVid"])])
    g = np.random.default_rng(3)
    for key, place in (("audio", "wav2vec-large-c-UTT"), ("text", "deberta-large-4-UTT"), ("visual", "manet_UTT")):
        (folder / "features" / place).mkdir(parents=True)
        for video, rows in content[key].items():
            for utterance, speaker, row in zip(ids[video], content["speaker"][video], rows, strict=True):
                spread = g.normal(size=(frames, len(row))).astype(np.float32)
                x = row + spread - spread.mean(0)  # frames whose mean is the vector
                file = folder / "features" / place / utterance
                if key != "visual":
                    np.save(f"{file}.npy", x[None] if key == "audio" else row)
                    continue
                file.mkdir()
                for i in range(frames if row.any() else 0):
                    np.save(file / f"{speaker}_{i}.npy", x[i])
                np.save(file / f"{'F' if speaker == 'M' else 'M'}_0.npy", 100 + row)  # the other speaker's face
    return path


def check(splits, content, videos, speakers="MF", tolerance=0.0):
    """Every value of every split against the pickle, utterance by utterance."""
    assert list(splits) == ["train", "valid", "test"]
    assert sorted(n for d in splits.values() for n in d.names) == sorted(v for part in videos.values() for v in part)
    for split, d in splits.items():
        if split in videos:
            assert d.names == list(videos[split])
        B, U = len(d), max(len(content["label"][v]) for v in d.names)
        assert d.data.shape == (B, U)
        for b, video in enumerate(d.names):
            n = len(content["label"][video])
            for u in range(U):
                real = u < n
                assert bool(d.data.extras["utterance"][b, u]) == real
                for m, (name, x) in enumerate(d.data.features.items()):
                    row = content[NAMES[name]][video][u] if real else np.zeros(x.shape[-1])
                    np.testing.assert_allclose(x[b, u, 0].numpy(), row, atol=tolerance, rtol=tolerance)
                    assert bool(d.present[b, u, m]) == bool(real and row.any())
                    assert bool(d.data.valid[name][b, u, 0]) == real
                    assert bool(d.data.observed[name][b, u, 0]) == bool(real and row.any())
                speaker = content["speaker"][video][u] if real else speakers[0]
                assert int(d.data.extras["speaker"][b, u]) == (speakers.index(speaker) if speaker else 0)
                target = content["label"][video][u] if real else 0
                assert float(d.target[b, u]) == pytest.approx(target)
    assert len({i for d in splits.values() for i in d.ids.tolist()}) == sum(len(d) for d in splits.values())


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_the_dict_of_balm(tmp_path):
    content = make()
    splits = data.load("dialogue", write(tmp_path / "iemocap.pkl", content), standardised=False)
    train, valid, test = (splits[s] for s in splits)
    check(splits, content, {"train": train.names, "valid": valid.names, "test": content["testVid"]})
    assert sorted(train.names + valid.names) == sorted(content["trainVid"])
    assert [len(d) for d in splits.values()] == [9, 1, 3]
    assert train.names == [v for v in content["trainVid"] if v not in valid.names]
    assert train.modalities == ("audio", "language", "vision")
    assert train.info["classes"] == ["happy", "sad", "neutral", "angry", "excited", "frustrated"]
    assert train.info["outputs"] == 6
    assert train.target.dtype == torch.int64
    assert train.info["speakers"] == 2
    assert train.info["corpus"] == "iemocap"
    assert train.info["layout"] == "BALM"
    faces = [x.any() for v in train.names for x in content["visual"][v]]
    assert train.info["utterances"] == len(faces)
    assert train.info["missing"] == {"audio": 0, "language": 0, "vision": len(faces) - sum(faces)}
    for d in splits.values():
        assert d.info["fingerprint"] == data.fingerprint(d)
        json.dumps(d.info)


def test_its_own_validation_videos_and_scores(tmp_path):
    content = make(scores=True)
    content["audio"]["unlisted"] = []
    content["label"]["unlisted"] = []
    splits = data.load("dialogue", write(tmp_path / "mosei.pkl", content), standardised=False)
    keys = {"train": "trainVid", "valid": "valVid", "test": "testVid"}
    check(splits, content, {split: content[key] for split, key in keys.items()})
    d = splits["train"]
    assert d.target.dtype == torch.float32
    assert (d.info["task"], d.info["outputs"], d.info["classes"], d.info["scale"]) == ("regression", 1, None, "mosi")
    assert d.info["split_seed"] is None
    assert d.info["speakers"] == 1
    assert d.info["unused"] == 1


def test_the_tuple_of_mmgcn(tmp_path):
    content = make()
    for key in ("text", "audio", "visual"):  # arrays [U, D] instead of lists of vectors
        content[key] = {v: np.stack(x) for v, x in content[key].items()}
    path = write(tmp_path / "IEMOCAP_features" / "IEMOCAP_features.pkl", as_tuple(content))
    splits = data.load("dialogue", tmp_path, standardised=False)
    check(splits, content, {s: splits[s].names for s in splits})
    assert splits["test"].info["layout"] == "MMGCN"
    same = data.load("dialogue", write(tmp_path / "other" / "iemocap.pkl", content), standardised=False)
    assert same["train"].info["fingerprint"] == splits["train"].info["fingerprint"]
    assert dialogue.transcripts(path) == content["sentence"]


def test_one_hot_speakers_and_bytes(tmp_path):
    content = make()
    content["speaker"] = {v: [[1, 0] if s == "M" else [0, 1] for s in x] for v, x in content["speaker"].items()}
    hot = data.load("dialogue", write(tmp_path / "iemocap.pkl", content))
    content["speaker"] = {v: [b"M" if s[0] else b"F" for s in x] for v, x in content["speaker"].items()}
    named = data.load("dialogue", write(tmp_path / "iemocap.pkl", content))
    assert all(hot[s].info["fingerprint"] == named[s].info["fingerprint"] for s in hot)
    swapped = data.load("dialogue", tmp_path / "iemocap.pkl", speakers=("F", "M"))
    real = hot["test"].data.extras["utterance"]
    assert bool((swapped["test"].data.extras["speaker"] == 1 - hot["test"].data.extras["speaker"])[real].all())


@pytest.mark.slow
def test_gcnets_folders(tmp_path):
    content = make()
    write_gcnet(tmp_path / "IEMOCAP", content)
    splits = data.load("dialogue", tmp_path, corpus="iemocap", standardised=False)
    check(splits, content, {s: splits[s].names for s in splits}, tolerance=1e-4)
    assert splits["train"].info["layout"] == "GCNet"
    assert splits["test"].names == sorted(content["testVid"])


@pytest.mark.slow
def test_gcnets_seven_with_nameless_speakers(tmp_path):
    content = make(scores=True)
    content["speaker"] = {v: [""] * len(x) for v, x in content["speaker"].items()}
    path = write_gcnet(tmp_path, content, "CMUMOSI_features_raw_2way.pkl")
    for faces in (tmp_path / "features" / "manet_UTT").iterdir():  # one speaker: faces bear no letter
        for file in sorted(faces.glob("[FM]_0.npy"))[:2]:
            file.unlink()
        for i, file in enumerate(sorted(faces.iterdir())):
            file.rename(faces / f"{i}.npy")
    for video, rows in content["visual"].items():
        for i, row in enumerate(rows):
            left = [np.load(f) for f in (tmp_path / "features" / "manet_UTT" / f"{video}_{i:03d}").iterdir()]
            row[:] = np.mean(left, 0) if left else 0
    splits = data.load("dialogue", path, standardised=False)
    keys = {"train": "trainVid", "valid": "valVid", "test": "testVid"}
    check(splits, content, {split: sorted(content[key]) for split, key in keys.items()}, "M", tolerance=1e-4)
    renamed = tmp_path / "features" / "sound"
    (tmp_path / "features" / "wav2vec-large-c-UTT").rename(renamed)
    with pytest.raises(FileNotFoundError, match="no folder .*wav2vec-large-c-UTT of audio features"):
        data.load("dialogue", path)
    for name in ("sound", str(renamed)):
        again = data.load("dialogue", path, features={"audio": name}, standardised=False)
        assert again["train"].info["fingerprint"] == splits["train"].info["fingerprint"]
    data.load("dialogue", path, modalities=("vision", "language"))  # the missing folder is not asked for


def test_four_classes_and_sessions(tmp_path):
    content = make(classes=4)
    write(tmp_path / "iemocap4.pkl", content)
    d = data.load("dialogue", tmp_path)["train"]
    assert d.info["classes"] == ["happy", "sad", "neutral", "angry"]
    for session in (1, 3):
        splits = data.load("dialogue", tmp_path, session=session, standardised=False)
        assert all(n[4] == str(session) for n in splits["test"].names)
        assert all(n[4] != str(session) for s in ("train", "valid") for n in splits[s].names)
        check(splits, content, {s: splits[s].names for s in splits})
        assert splits["train"].info["official_split"] is False


def test_an_unknown_corpus_is_told_by_its_labels(tmp_path):
    d = data.load("dialogue", write(tmp_path / "mine.pkl", make(classes=3)))["test"]
    assert (d.info["corpus"], d.info["task"], d.info["outputs"]) == (None, "classification", 3)
    assert d.info["classes"] == ["class 0", "class 1", "class 2"]
    content = make(scores=True)
    content["label"][content["trainVid"][0]][0] = 40.0
    assert data.load("dialogue", write(tmp_path / "mine.pkl", content))["test"].info["task"] == "regression"
    with pytest.raises(ValueError, match=r"utterance 0: expected scores in \[-3, 3\], got 40"):
        data.load("dialogue", tmp_path / "mine.pkl", corpus="mosi")


# --- options ---------------------------------------------------------------------------------------------------------


def test_standardised_on_present_training_utterances(tmp_path):
    content = make(lengths=(30,) * 13)
    path = write(tmp_path / "iemocap.pkl", content)
    raw, scaled = (data.load("dialogue", path, standardised=x) for x in (False, True))
    for name in ("audio", "vision"):
        m = raw["train"].data.index(name)
        there = raw["train"].present[..., m]
        rows = raw["train"].data.features[name][there][:, 0].double().numpy()
        low, high = np.quantile(rows, (0.005, 0.995), axis=0)
        rows = rows.clip(low, high)
        for split in raw:
            x, z = raw[split].data.features[name], scaled[split].data.features[name]
            there = raw[split].present[..., m]
            expected = ((x[there][:, 0].numpy() - rows.mean(0)) / rows.std(0)).clip(-5, 5)
            np.testing.assert_allclose(z[there][:, 0], expected, atol=1e-4)
            assert bool((z[~there] == 0).all())
    assert torch.equal(raw["test"].data.features["language"], scaled["test"].data.features["language"])


def test_modalities_share_and_seed_of_the_validation_videos(tmp_path):
    path = write(tmp_path / "iemocap.pkl", make())
    d = data.load("dialogue", path, modalities=("vision", "audio"), valid=0.35)
    assert d["train"].modalities == ("vision", "audio")
    assert [len(x) for x in d.values()] == [7, 3, 3]
    first, same, other = (data.load("dialogue", path, split_seed=s)["valid"].names for s in (0, 0, 3))
    assert first == same
    assert first != other


def test_missing_vectors_and_nan(tmp_path):
    content = make()
    video = content["testVid"][0]
    content["audio"][video][0] = None
    content["text"][video][0][:] = 0
    content["visual"][video][0][:] = 0
    splits = data.load("dialogue", write(tmp_path / "iemocap.pkl", content))
    test = splits["test"]
    assert test.present[0, 0].tolist() == [False, False, False]
    assert test.info["empty"] == 1
    content["audio"][video][1][2] = np.nan
    path = write(tmp_path / "iemocap.pkl", content)
    with pytest.raises(
        ValueError, match=f"{video}, utterance 1: 'audio': expected finite values, got 1 NaN .*nan='drop'"
    ):
        data.load("dialogue", path)
    dropped = data.load("dialogue", path, nan="drop")["test"]
    assert dropped.present[0, :2].tolist() == [[False, False, False], [False, True, True]]
    content["audio"][video][1][2] = np.inf
    with pytest.raises(ValueError, match="utterance 1: 'audio': expected finite values, got 1 NaN or infinite ones$"):
        data.load("dialogue", write(tmp_path / "iemocap.pkl", content), nan="drop")


def test_masks_are_drawn_by_utterance(tmp_path):
    d = data.load("dialogue", write(tmp_path / "iemocap.pkl", make(lengths=(40,) * 13)))["train"]
    whole = d.drop()
    whole.data = whole.data.replace(present=d.data.extras["utterance"][..., None].expand_as(d.present), observed={})
    rates = {"audio": 0.5, "language": 0.7, "vision": 0.3}
    for assign in ("shuffled", "blocked"):
        mask = MissingPlan("imbalanced", rates=rates, seed=1, assign=assign).draw(whole)
        achieved = mask.realised()
        assert achieved["samples"] == d.info["utterances"]
        assert achieved["empty"] == 0
        for m, rate in rates.items():
            assert abs(achieved["rates"][m] - (rate - 0.105 / 3)) < 0.02
        patterns = [len({tuple(p) for p in mask.apply(whole).present[b].tolist()}) for b in range(len(d))]
        assert (np.mean(patterns) < 3) == (assign == "blocked")


@pytest.mark.parametrize("assign", ["shuffled", "blocked"])
def test_masks_of_iemocaps_size(assign):
    """BALM's Eq. 36 on 5,810 utterances in 120 dialogues: its pattern counts, and the rates that they come to."""
    lengths = torch.tensor([48] * 119 + [98])
    real = torch.arange(98) < lengths[:, None]
    present = real[..., None].repeat(1, 1, 3)
    batch = MultimodalBatch(
        {m: torch.ones(120, 98, 1, 1) for m in dialogue.MODALITIES},
        present,
        ids=torch.arange(120),
        extras={"utterance": real},
    )
    rates = {"audio": 0.5, "language": 0.7, "vision": 0.3}
    mask = MissingPlan("imbalanced", rates=rates, seed=2, assign=assign).draw(MultimodalDataset(batch))
    achieved = mask.realised()
    assert achieved["samples"] == 5810
    counts = {"111": 610, "110": 261, "011": 610, "101": 1423, "100": 814, "010": 465, "001": 1627}
    assert achieved["subsets"] == counts
    for m, rate in {"audio": 0.4651, "language": 0.6651, "vision": 0.2651}.items():
        assert achieved["rates"][m] == pytest.approx(rate, abs=5e-5)
    assert not mask.present[~real].any()
    uniform = sum(len(set(map(tuple, mask.present[b][real[b]].tolist()))) == 1 for b in range(120))
    assert (uniform > 60) == (assign == "blocked")  # whole dialogues of one pattern: the released habit


# --- what is refused -------------------------------------------------------------------------------------------------


def _drop(key):
    return lambda c: c.pop(key)


def _set(*place):
    *keys, value = place

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


V = "Ses01F_impro00"
BAD = {
    "no text": (_drop("text"), "lacks the key 'text'; it has audio, label, sentence"),
    "no labels": (_drop("label"), "lacks the key 'label'"),
    "no test videos": (_drop("testVid"), "lacks the key 'testVid'"),
    "no speakers": (_drop("speaker"), "lacks the key 'speaker'"),
    "a list of vectors": (_set("audio", []), "'audio': expected a dict by video, got list"),
    "videos as a dict": (_set("trainVid", {}), "'trainVid': expected a list or set of videos, got dict"),
    "no training videos": (_set("trainVid", []), "expected at least one video for train, got none"),
    "one training video": (_set("trainVid", [V]), "expected at least one video for train, got none"),
    "a video in two splits": (lambda c: c["testVid"].append(V), f"{V} is in 'trainVid' and again in 'testVid'"),
    "a video twice": (lambda c: c["trainVid"].append(V), f"{V} is in 'trainVid' and again in 'trainVid'"),
    "a video that is not there": (lambda c: c["testVid"].append("Ses09"), "the video Ses09 of 'testVid' has no labels"),
    "a video without features": (lambda c: c["audio"].pop(V), f"the video {V} has no 'audio'"),
    "a video without speakers": (lambda c: c["speaker"].pop(V), f"the video {V} has no speakers"),
    "a video without utterances": (_set("label", V, []), f"the video {V} has no utterances"),
    "too few vectors": (lambda c: c["text"][V].pop(), f"{V}: expected 3 vectors of 'text', one an utterance, got 2"),
    "too few speakers": (lambda c: c["speaker"][V].pop(), f"{V}: expected 3 speakers, one an utterance, got 2"),
    "an unknown speaker": (_set("speaker", V, 1, "X"), f"{V}, utterance 1: unknown speaker 'X'; known are 'M', 'F'"),
    "widths in a dialogue": (
        _set("visual", V, 2, np.ones(3)),
        rf"'visual': expected vectors of one width in a dialogue, got widths \[3, 4\]; {V}, utterance 2 is the first",
    ),
    "widths between dialogues": (
        _set("audio", V, [np.ones(8)] * 3),
        f"'audio': expected vectors of one width, got (8 in {V} and 7 in|7 in .* and 8 in {V})",
    ),
    "a matrix": (_set("audio", V, 0, np.ones((2, 7))), r"utterance 0: 'audio': expected a vector \[D\], got shape"),
    "words": (_set("audio", V, 0, ["a"]), "utterance 0: 'audio': expected a vector of numbers"),
    "labels as a number": (_set("label", V, 3), "'label': expected a list over utterances, got int"),
    "labels of words": (_set("label", V, ["sad"] * 3), f"{V}: expected 3 numbers as labels"),
    "a seventh class": (_set("label", V, 2, 6), f"{V}, utterance 2: expected classes below 6, got 6"),
    "half a class": (_set("label", V, 2, 0.5), f"{V}, utterance 2: expected classes below 6, got 0.5"),
    "no faces in train": (
        lambda c: [x.fill(0) for v in c["trainVid"] for x in c["visual"][v]],
        "'visual' is missing in all training utterances",
    ),
    "no faces at all": (
        lambda c: c["visual"].update({v: [None] * len(x) for v, x in c["visual"].items()}),
        "'visual' is missing in all utterances",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_content(tmp_path, case):
    change, message = BAD[case]
    content = make()
    if case == "widths between dialogues":
        content["trainVid"].sort(key=lambda v: v != V)
    change(content)
    path = write(tmp_path / "iemocap.pkl", content)
    with pytest.raises(ValueError, match=message) as error:
        data.load("dialogue", path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("value", [[1, 2], 3, (None,) * 8, "text"])
def test_another_layout(tmp_path, value):
    with pytest.raises(ValueError, match=r"expected a dict .* \(BALM\), a tuple of nine \(MMGCN\), or a list of six"):
        data.load("dialogue", write(tmp_path / "x.pkl", value))


def test_bad_folders(tmp_path):
    content = make()
    path = write_gcnet(tmp_path, content)
    sound = tmp_path / "features" / "wav2vec-large-c-UTT" / f"{V}_000.npy"
    good = sound.read_bytes()
    sound.write_bytes(good[:60])
    with pytest.raises(ValueError, match=r"000.npy: not a whole .npy array"):
        data.load("dialogue", path)
    np.save(sound, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"000.npy: refused to read pickled objects"):
        data.load("dialogue", path)
    np.save(sound, np.array(["a"]))
    with pytest.raises(ValueError, match=r"000.npy: expected an array of numbers, got <U1"):
        data.load("dialogue", path)
    sound.unlink()
    with pytest.raises(ValueError, match=rf"no {V}_000.npy, nor a folder of that name"):
        data.load("dialogue", path)
    sound.write_bytes(good)
    faces = tmp_path / "features" / "manet_UTT" / f"{V}_000"
    speaker = content["speaker"][V][0]
    np.save(faces / f"{speaker}_9.npy", np.ones(9))
    with pytest.raises(ValueError, match=rf"{V}_000: expected frames of one width, got \[4, 9\]"):
        data.load("dialogue", path)
    (faces / f"{speaker}_9.npy").unlink()
    labels = pickle.loads(path.read_bytes())
    labels[0][V].pop()
    with pytest.raises(ValueError, match=f"{V}: expected 3 utterance ids, one a label, got 2"):
        data.load("dialogue", write(path, labels))


class Call:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("hostile", [Call(), {"text": Call()}, {"text": {"a": np.array([Call()], dtype=object)}}])
def test_hostile_pickles_are_refused(tmp_path, hostile):
    with pytest.raises(ValueError, match="refused to read this pickle: it asks for posix.system"):
        data.load("dialogue", write(tmp_path / "iemocap.pkl", hostile))


def test_truncated_pickles_are_refused(tmp_path):
    path = write(tmp_path / "iemocap.pkl", make())
    whole = path.read_bytes()
    for n in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="truncated|empty"):
            data.load("dialogue", path)


def test_bad_options(tmp_path):
    path = write(tmp_path / "iemocap.pkl", make())
    for options, message in (
        ({"corpus": "meld"}, "corpus: expected None or one of iemocap, iemocap4, mosi, mosei, got 'meld'"),
        ({"modalities": ("audio", "audio")}, "modalities: expected (some|one) of audio, language, vision, each once"),
        ({"modalities": ("text",)}, "modalities: expected (some|one) of"),
        ({"modalities": ()}, "modalities: expected (some|one) of"),
        ({"speakers": "MF"}, "speakers: expected a list or tuple of at least 1, each a string, got 'MF'"),
        ({"speakers": ()}, "speakers: expected a list or tuple of at least 1"),
        ({"valid": 1}, r"valid: expected a number in \(0, 1\), got 1"),
        ({"session": 6}, "session: expected None or an integer in .1, 5., got 6"),
        ({"nan": "keep"}, "nan: expected 'error' or 'drop', got 'keep'"),
        ({"features": {"audio": "x"}}, "features: iemocap.pkl holds its features itself"),
        ({"features": {"text": "x"}}, r"features: unknown modalities \['text'\]"),
        ({"speakers": ("M",)}, "unknown speaker 'F'; known are 'M'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            data.load("dialogue", path, **options)
    content = make()
    content["trainVid"] = [f"a{v}" for v in content["trainVid"]]
    for key in ("text", "audio", "visual", "label", "speaker"):
        content[key].update({f"a{v}": x for v, x in content[key].items()})
    with pytest.raises(ValueError, match="session: .* has videos whose fifth character is no session, such as aSes01"):
        data.load("dialogue", write(tmp_path / "x.pkl", content), session=1)


def test_which_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pickle of dialogues in"):
        data.load("dialogue", tmp_path)
    write(tmp_path / "mosi" / "mosi_conversation.pkl", make(scores=True))
    assert data.load("dialogue", tmp_path)["train"].info["corpus"] == "mosi"
    write(tmp_path / "iemocap.pkl", make())
    with pytest.raises(ValueError, match="corpus: .* holds iemocap, mosi; expected one of them"):
        data.load("dialogue", tmp_path)
    assert data.load("dialogue", tmp_path, corpus="iemocap")["train"].info["corpus"] == "iemocap"
    with pytest.raises(FileNotFoundError, match="no pickle of mosei in"):
        data.load("dialogue", tmp_path, corpus="mosei")
    content = make()
    del content["sentence"]
    with pytest.raises(ValueError, match="lacks the key 'sentence'"):
        dialogue.transcripts(write(tmp_path / "x.pkl", content))


def test_reading_changes_nothing(tmp_path):
    path = write(tmp_path / "iemocap.pkl", make())
    content = pickle.loads(path.read_bytes())
    before = copy.deepcopy(content)
    data.load("dialogue", path)
    assert path.read_bytes() == pickle.dumps(before)


# --- real CMU-MOSI ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.real
def test_real_mosi(real_data):
    path = real_data / "mosi" / "mosi_conversation.pkl"
    if not path.is_file():
        pytest.skip(f"no real data: {path} is not there")
    splits = data.load("dialogue", path, standardised=False)
    assert [len(d) for d in splits.values()] == [52, 10, 31]
    assert [d.info["utterances"] for d in splits.values()] == [1284, 229, 686]
    assert max(d.data.shape[1] for d in splits.values()) == 63
    assert splits["train"].feature_shapes == {"audio": (1, 73), "language": (1, 384), "vision": (1, 100)}
    assert [d.info["missing"]["vision"] for d in splits.values()] == [694, 195, 558]
    zeros = [int((d.target[d.data.extras["utterance"]] == 0).sum()) for d in splits.values()]
    assert zeros == [53, 13, 30]
    content = data.safe_pickle_load(path)
    keys = {"train": "trainVid", "valid": "valVid", "test": "testVid"}
    check(splits, content, {split: content[key] for split, key in keys.items()}, tolerance=1e-5)
    scaled = data.load("dialogue", path)
    assert float(scaled["train"].data.features["audio"].abs().max()) <= 5
    assert set(dialogue.transcripts(path)) == {n for d in splits.values() for n in d.names}
