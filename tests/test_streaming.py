"""Data sets that are read on demand: the same numbers as in memory, and little memory."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from mmlib import MultimodalBatch, MultimodalDataset
from mmlib.backbones import GenericBackbone, Table3Evaluator
from mmlib.baselines import JointTraining
from mmlib.data import fingerprint
from mmlib.methods import BALM, DEAR, DREAM, MCE
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, predict

ROOT = Path(__file__).resolve().parent.parent
N = 40
STREAM = TrainConfig(epochs=2, batch_size=8, lr=0.01, loader="stream", device="cpu")


LENGTHS = {"face": np.random.default_rng(2).integers(1, 7, N), "text": np.random.default_rng(3).integers(2, 8, N)}
LENGTHS["face"][0], LENGTHS["text"][0] = 6, 7


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "voice": rng.normal(size=(N, 5)),
        "face": rng.normal(size=(N, 6, 4)).astype("float32"),
        "scan": rng.normal(size=(N, 1, 8, 8)).astype("float32"),
        "text": rng.integers(2, 20, (N, 7)) * (np.arange(7) < LENGTHS["text"][:, None]),
    }


PRESENT = np.random.default_rng(1).random((N, 4)) > 0.3
PRESENT[:, 1] |= ~PRESENT.any(1)
OPTIONS = {"tokens": {"text": 20}, "fill": {"text": 1}, "lengths": LENGTHS}
TARGET = np.arange(N) % 3
IDS = [f"clip-{i}" for i in range(N)]


class Reader:
    """Rows of arrays, and which were asked for."""

    def __init__(self, ragged: bool = False):
        self.arrays, self.ragged, self.asked = arrays(), ragged, []

    def __call__(self, rows: list[int]) -> dict[str, object]:
        assert type(rows) is list
        assert all(type(row) is int for row in rows)
        self.asked.append(rows)
        found: dict[str, object] = {name: x[rows] for name, x in self.arrays.items()}
        if self.ragged:  # as files hold them: of their own lengths, and nothing where there is nothing
            for m, (name, x) in enumerate(self.arrays.items()):
                count = LENGTHS.get(name, np.full(N, len(x[0])))
                found[name] = [x[i][: count[i]] if PRESENT[i, m] or name == "text" else None for i in rows]
            found["voice"] = [x if x is None else x[:5] for x in found["voice"]]
        return found


def pair(ragged: bool = False) -> tuple[MultimodalDataset, MultimodalDataset, Reader]:
    """The same data set in memory and streamed."""
    reader = Reader(ragged)
    whole = MultimodalDataset.from_arrays(arrays(), TARGET, present=PRESENT, ids=IDS, **OPTIONS)
    return whole, MultimodalDataset.from_reader(reader, PRESENT, IDS, TARGET, **OPTIONS), reader


def same(a: MultimodalBatch, b: MultimodalBatch) -> bool:
    return fingerprint(a) == fingerprint(b)


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_are_those_in_memory(ragged: bool) -> None:
    whole, streamed, reader = pair(ragged)
    assert streamed.streamed
    assert not whole.streamed
    assert sum(map(len, reader.asked)) <= 4  # what it costs to know the shapes
    assert streamed.feature_shapes == whole.feature_shapes
    assert streamed.info == whole.info
    assert streamed.names == whole.names
    assert torch.equal(streamed.ids, whole.ids)
    assert torch.equal(streamed.present, whole.present)
    mask = torch.arange(N) % 3 == 0
    for rows in ([3], 3, -1, [5, 2, 2], slice(4, 9), slice(None), mask, mask.nonzero()[:, 0], np.array([7, 1])):
        assert same(streamed[rows], whole[rows]), rows
    assert len(streamed[[]]) == 0
    assert reader.asked[-1] != []
    for change in (
        lambda d: d.subset([9, 3, 30, 11]),
        lambda d: d.subset(mask).subset([2, 0]),
        lambda d: d.select(["text", "voice"]),
        lambda d: d.drop(present=["face", "text"]),
        lambda d: d.subset(mask).drop(present=["face", "voice"], keep_complete=True).select(["voice", "text"]),
        lambda d: MissingPlan("bernoulli", 0.4).draw(d).apply(d, keep_complete=True),
        lambda d: MissingPlan("lnln", 0.5).draw(d).apply(d.subset([8, 0, 21])),
    ):
        before = len(reader.asked)
        there = change(streamed)
        assert there.streamed
        assert len(reader.asked) == before  # masks and rows cost nothing
        assert same(there[:], change(whole)[:])
    assert torch.equal(
        MissingPlan("frames", 0.5).draw(streamed).present, MissingPlan("frames", 0.5).draw(whole).present
    )
    assert same(streamed.to("cpu").data, whole.data)
    assert not streamed.to("cpu").streamed


@pytest.mark.parametrize("workers", [0, 1])
def test_training_and_predictions_are_those_in_memory(workers: int) -> None:
    results = []
    for data in pair()[:2]:
        torch.manual_seed(0)
        method = JointTraining(GenericBackbone.for_data(data, width=4))
        config = TrainConfig(**{**vars(STREAM), "loader_workers": workers, "loader": "auto"})
        plan = MissingPlan("bernoulli", 0.3, resample=True)
        train, valid = data.subset(range(30)), data.subset(range(30, N))
        history = fit(method, train, valid, config, train_plan=plan)
        logits = predict(method, data, batch_size=8, present=["voice", "text"])
        results.append((history.frame().drop(columns="seconds"), logits))
    assert results[0][0].equals(results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_checkpoints_know_a_streamed_data_set_without_reading_it(tmp_path: Path) -> None:
    _, data, reader = pair()
    reader.asked.clear()
    first = fingerprint(data)
    assert fingerprint(data) == first
    assert fingerprint(data.subset(range(39))) != first
    assert fingerprint(data.drop(present=["voice"])) != first
    other = MultimodalDataset.from_reader(Reader(), PRESENT, IDS, TARGET, **OPTIONS, info={"fingerprint": "v2"})
    assert fingerprint(other) != first
    assert reader.asked == []
    method = JointTraining(GenericBackbone.for_data(data, width=4))
    path = tmp_path / "run.pt"
    once = TrainConfig(**{**vars(STREAM), "select": "last"})
    fit(method, data, config=once, checkpoint=path)
    reader.asked.clear()
    fit(method, data, config=once, checkpoint=path)  # all of it is done
    assert reader.asked == []


def test_what_needs_values_in_memory_says_so() -> None:
    _, data, _ = pair()
    method = JointTraining(GenericBackbone.for_data(data, width=4))
    with pytest.raises(ValueError, match="loader: a streamed data set stays where it is"):
        fit(method, data, config=TrainConfig(loader="resident", select="last"))
    with pytest.raises(ValueError, match="dataset: expected features with values"):
        predict(method, data.data)
    with pytest.raises(ValueError, match="data: expected features with values"):
        MultimodalDataset(data.data)
    with pytest.raises(ValueError, match="dataset: this plan looks at the values of 'voice'"):
        MissingPlan("mnar", {"voice": 0.5}).draw(data)
    mask = MissingPlan("mnar", {"voice": 0.5}).draw(data.to("cpu"))
    assert mask.apply(data).present[:, 0].sum() < data.present[:, 0].sum()


ROWS = {"a": np.ones((4, 3))}
HERE = np.ones((4, 1), bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, HERE), {}, TypeError, "read: expected a function of a list of row numbers, got 3"),
        ((lambda rows: [1], HERE), {}, TypeError, r"read\(rows\): expected a dict of arrays"),
        ((lambda rows: ROWS, HERE * 1.0), {}, TypeError, r"present: expected bool \[n, M\]"),
        ((lambda rows: ROWS, HERE[:, 0]), {}, ValueError, r"present: expected bool \[n, M\]"),
        ((lambda rows: ROWS, HERE[:0]), {}, ValueError, r"present: expected bool \[n, M\]"),
        ((lambda rows: ROWS, np.array([[True]] * 3 + [[False]])), {}, ValueError, r"1 have none, the first at \[3\]"),
        ((lambda rows: ROWS, ~HERE), {}, ValueError, "present: expected every modality in some sample"),
        (
            (lambda rows: {"a": np.ones((1, 3)), "b": np.ones((1, 3))}, HERE),
            {},
            ValueError,
            "present, read: expected 1 columns",
        ),
        ((lambda rows: {"a.b": np.ones((1, 3))}, HERE), {}, ValueError, "'a.b' cannot name a modality"),
        ((lambda rows: ROWS, HERE), {}, ValueError, "read: expected 1 rows of 'a', got 4"),
        ((lambda rows: {"a": ["x"]}, HERE), {}, ValueError, r"features\['a'\]: expected an array of numbers"),
        ((lambda rows: {"a": np.ones((1, 3))}, HERE, ["x"]), {}, ValueError, "ids: expected 4 unique ids"),
        ((lambda rows: {"a": np.ones((1, 3))}, HERE, None, [0]), {}, ValueError, "target: expected 4 values"),
        ((lambda rows: {"a": np.ones((1, 3))}, HERE), {"tokens": ("a",)}, TypeError, "expected integer token ids"),
        ((lambda rows: {"a": np.ones((1, 3))}, HERE), {"lengths": {"b": [1] * 4}}, ValueError, "lengths: unknown"),
        ((lambda rows: {"a": np.ones((1, 3, 2))}, HERE), {"lengths": {"a": [1] * 3}}, ValueError, r"lengths\['a'\]"),
        ((lambda rows: {"a": np.ones((1, 3, 2))}, HERE), {"lengths": {"a": [1.0] * 4}}, TypeError, r"lengths\['a'\]"),
    ],
)
def test_errors_when_it_is_made(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message):
        MultimodalDataset.from_reader(*arguments, **options)


@pytest.mark.parametrize(
    ("later", "error", "message"),
    [
        (lambda k: {"b": np.ones((k, 3))}, ValueError, r"read: expected features of 'a', got those of \['b'\]"),
        (lambda k: {"a": np.ones((k, 4))}, ValueError, r"read: expected features\['a'\] of shape \(2, 1, 3\)"),
        (lambda k: {"a": np.ones((k + 1, 3))}, ValueError, r"read: expected features\['a'\] of shape \(2, 1, 3\)"),
        (lambda k: {"a": np.full((k, 3), np.nan)}, ValueError, r"features\['a'\]: expected finite values"),
        (lambda k: None, TypeError, r"read\(rows\): expected a dict of arrays, got None"),
    ],
)
def test_errors_when_it_is_read(later, error, message) -> None:
    data = MultimodalDataset.from_reader(lambda rows: {"a": np.ones((1, 3))} if len(rows) == 1 else later(2), HERE)
    with pytest.raises(error, match=message):
        data[[1, 2]]


def mapped(folder: Path, x: np.ndarray, mode: str = "r") -> np.ndarray:
    path = folder / f"{len(list(folder.iterdir()))}.npy"
    np.save(path, x)
    return np.load(path, mmap_mode=mode)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_mapped_arrays_are_streamed_and_mean_what_arrays_mean(tmp_path: Path, mode: str, monkeypatch) -> None:
    monkeypatch.setattr("mmlib._streams.PIECE", 700)  # several pieces, of unequal length
    given = arrays()
    given["voice"][[4, 11]] = np.nan
    given["face"][7, 2:4] = np.nan
    whole = MultimodalDataset.from_arrays(given, TARGET, ids=IDS, **OPTIONS)
    files = {name: mapped(tmp_path, x, mode) for name, x in given.items()}
    files["text"] = given["text"]  # one of them in memory
    if mode == "c":
        files["scan"][3] = 5.0  # what the file does not hold
        given["scan"][3] = 5.0
        whole = MultimodalDataset.from_arrays(given, TARGET, ids=IDS, **OPTIONS)
    streamed = MultimodalDataset.from_arrays(files, TARGET, ids=IDS, **OPTIONS)
    assert streamed.streamed
    assert not streamed.data.features["text"].is_meta
    assert same(streamed[:], whole.data)
    part = lambda d: d.subset([30, 4, 7, 3]).drop(present=["face", "scan", "voice"], keep_complete=True)
    assert same(part(streamed)[[1, 2, 3]], part(whole)[[1, 2, 3]])
    views = {**files, "scan": files["scan"][::-1][::-1], "face": np.asarray(files["face"])}
    assert same(MultimodalDataset.from_arrays(views, TARGET, ids=IDS, **OPTIONS)[:], whole.data)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "sample 33 has NaN values"),
        (np.inf, "expected finite values, got infinite ones, the first in sample 33"),
    ],
)
def test_mapped_arrays_are_checked(tmp_path: Path, value: float, message: str, monkeypatch) -> None:
    monkeypatch.setattr("mmlib._streams.PIECE", 700)
    x = arrays()["voice"]
    x[33, 2] = value
    with pytest.raises(ValueError, match=rf"features\['voice'\]: {message}"):
        MultimodalDataset.from_arrays({"voice": mapped(tmp_path, x)})


def test_rows_come_from_the_file_that_was_mapped(tmp_path: Path) -> None:
    x, target = arrays()["face"], np.arange(N) % 3
    np.save(tmp_path / "x.npy", x)
    whole = np.load(tmp_path / "x.npy", mmap_mode="r")
    for given, expected in ((whole, x), (whole[10:], x[10:]), (whole[::2], x[::2]), (whole[:, 1:], x[:, 1:])):
        streamed = MultimodalDataset.from_arrays({"face": given}, target[: len(given)])
        assert torch.equal(streamed[[3, 0, 3]].features["face"], torch.from_numpy(expected[[3, 0, 3]]))
    streamed = MultimodalDataset.from_arrays({"face": whole}, target)
    np.save(tmp_path / "other.npy", x + 1)
    (tmp_path / "other.npy").replace(tmp_path / "x.npy")  # the mapping still holds the file that it was made of
    assert torch.equal(streamed[[5]].features["face"], torch.from_numpy(x[[5]]))
    streamed = MultimodalDataset.from_arrays({"face": np.load(tmp_path / "x.npy", mmap_mode="r")}, target)
    with (tmp_path / "x.npy").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match=r"features\['face'\]: its file ends in row 30, which was there before"):
        streamed[[30]]


NEEDS = r"""
    import re, sys
    from pathlib import Path
    import numpy as np
    import torch
    from mmlib import MultimodalDataset
    from mmlib.backbones import GenericBackbone
    from mmlib.baselines import JointTraining
    from mmlib.training import TrainConfig, fit

    # not ru_maxrss, which a process has from the one that started it
    peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    n, T, D = 2000, 40, 1000  # 160 kB a sample
    y = np.arange(n) % 2
    tiny = MultimodalDataset.from_arrays({"big": np.zeros((8, T, D), "float32")}, y[:8])
    config = TrainConfig(epochs=1, batch_size=64, device="cpu", loader="stream", select="last")
    method = JointTraining(GenericBackbone.for_data(tiny, width=2))
    fit(method, tiny, tiny, config)  # what libraries, the model and one small batch need
    before = peak()
    if sys.argv[1] == "batch":  # one step on one batch
        batch = MultimodalDataset.from_arrays({"big": torch.ones(64, T, D)}, y[:64]).data
        sum(method.train()(batch).losses.values()).backward()
    else:
        if sys.argv[1] == "file":
            data = MultimodalDataset.from_arrays({"big": np.memmap(sys.argv[2], np.float32, "r", shape=(n, T, D))}, y)
        else:
            read = lambda rows: {"big": torch.ones(len(rows), T, D)}
            data = MultimodalDataset.from_reader(read, np.ones((n, 1), bool), None, y)
        fit(method, data.subset(range(1600)), data.subset(range(1600, n)), config)
    print(peak() - before)
    """


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process's memory was at most")
@pytest.mark.parametrize("how", ["file", "reader"])
def test_memory_stays_below_two_batches_and_the_model(tmp_path: Path, how: str) -> None:
    """320 MB in a sparse file: what training needs above a training on eight samples, each in a process of its own.

    Below a batch above one step on one batch, which is the model's need and a batch. glibc keeps freed memory of this
    size unless it is told otherwise; how much differs between runs.
    """
    path = tmp_path / "big.bin"
    with path.open("wb") as file:
        file.truncate(4 * 2000 * 40 * 1000)

    def needed(how: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(NEEDS), how, str(path)],
            capture_output=True, text=True, cwd=ROOT, timeout=300,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    batch = 4 * 64 * 40 * 1000 / 2**20
    one, found = needed("batch"), needed(how)
    path.unlink()
    assert batch < one < 3 * batch, one
    assert found < one + batch, (found, one)


@pytest.mark.parametrize("name", ["MCE", "BALM", "DREAM", "DEAR"])
def test_methods_train_on_streamed_data_as_in_memory(name: str) -> None:
    x = {m: torch.randn(30, t, 3, generator=torch.Generator().manual_seed(t)).numpy() for m, t in (("a", 6), ("b", 5))}
    target, once = np.arange(30) % 3, TrainConfig(**{**vars(STREAM), "epochs": 1, "select": "last"})
    read = lambda rows: {m: v[rows] for m, v in x.items()}
    found = []
    for data in (
        MultimodalDataset.from_arrays(x, target),
        MultimodalDataset.from_reader(read, np.ones((30, 2), bool), None, target),
    ):
        torch.manual_seed(0)
        if name == "DREAM":
            method = DREAM.for_data(data, Table3Evaluator.for_data(data).eval(), width=8, heads=2)
        elif name == "DEAR":
            method = DEAR.for_data(data, width=8, heads=2, head_width=4, hidden=8)
        else:
            backbone = GenericBackbone.for_data(data, width=8)
            method = BALM.for_data(data, backbone) if name == "BALM" else MCE.for_data(data, backbone, None, once)
        fit(method, data, config=once, train_plan=MissingPlan("lnln", 0.3) if name == "DEAR" else None)
        found.append(predict(method, data))
    assert torch.equal(*found)


def test_a_text_encoder_takes_streamed_ids() -> None:
    ids = np.random.default_rng(0).integers(1, 20, (12, 6))
    x = np.random.default_rng(1).normal(size=(12, 4, 3))
    read = lambda rows: {"text": ids[rows], "audio": x[rows]}
    data = MultimodalDataset.from_reader(read, np.ones((12, 2), bool), None, np.arange(12) % 3, tokens={"text": 20})

    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(20, 4)
            self.config = type("Config", (), {"vocab_size": 20, "hidden_size": 4, "max_position_embeddings": 6})()

        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"last_hidden_state": self.table(input_ids)})()

    method = DEAR.for_data(data, Words(), width=8, heads=2, head_width=4, hidden=8)
    assert predict(method, data).shape == (12, 3)
