"""Two processes train every method as one does: the parts of a mini-batch, its statistics, uneven and empty parts."""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmlib import MultimodalDataset
from mmlib import data as sources
from mmlib.backbones import GenericBackbone, MMGCNBackbone, SelfMMEvaluator, SelfMMTraining
from mmlib.baselines import CGGM, OGMGE, PMR, JointTraining, MBTSample
from mmlib.layers import SharedBatch, same_draw
from mmlib.methods import BALM, DEAR, DREAM, MCE
from mmlib.methods.mce import UpperBounds
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, random_state

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("text", "audio", "image")
PLAN = MissingPlan("imbalanced", rates=[0.2, 0.5, 0.7], seed=1)


def toy(n: int = 21, regression: bool = False) -> MultimodalDataset:
    """In mini-batches of 5 the last has one sample, so that the second process has none."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    features = {
        m: (rng.normal(size=(n, 2 + i, 4)) + np.eye(4)[y][:, None]).astype("float32") for i, m in enumerate(NAMES)
    }
    return MultimodalDataset.from_arrays(features, (y - 0.9).astype("float32") if regression else y)


DATA, SCORES = toy(), toy(regression=True)
LABELS = MultimodalDataset(
    DATA.data.replace(target=torch.stack([DATA.target > 0, DATA.target != 1], 1)),
    {**DATA.info, "task": "multilabel", "outputs": 2, "classes": None},
)
TALK = sources.load("conversations", sizes=(11, 2, 2), lengths=(2, 7))["train"]
net = functools.partial(GenericBackbone.for_data, DATA, width=8, dropout=0.0)
talk = functools.partial(MMGCNBackbone.for_data, TALK, width=8, hidden=4, layers=2, dropout=0.0)


def mce(data: MultimodalDataset = DATA, **options: Any) -> MCE:
    table = np.random.default_rng(2).integers(0, 2, DATA.present.shape)
    upper = UpperBounds(torch.as_tensor(table).float(), data.ids, data.modalities)
    backbone = GenericBackbone.for_data(data, width=8, dropout=0.0)
    return MCE(backbone, upper, **{"attention_heads": 2, "hidden": 16, "dropout": 0.0, **options})


def dear(**options: Any) -> DEAR:
    sizes = {"width": 8, "heads": 2, "head_width": 4, "hidden": 8, "layers": 1}
    return DEAR.for_data(SCORES, **{**sizes, **options})


def dream(**options: Any) -> DREAM:
    return DREAM.for_data(DATA, net().eval(), width=8, heads=2, dropout=0.0, **options)


# name -> method, data, accumulation
RUNS: dict[str, tuple[Callable[[], nn.Module], MultimodalDataset, int]] = {
    "joint": (lambda: JointTraining(net()), DATA, 1),
    "joint, dialogues": (lambda: JointTraining(talk()), TALK, 2),
    "mce": (mce, DATA, 1),
    "mce, accumulated": (mce, DATA, 2),
    "mce, released": (lambda: mce(preset="iemocap"), DATA, 1),
    "mce, eval": (lambda: mce(value_pass="eval", all_missing="keep"), DATA, 2),
    "mce, drawn": (lambda: mce(subsets=3, state_factor=False), DATA, 1),
    "mce, heads": (lambda: mce(upper_source="current", state_norm=False, mask_negative=False), DATA, 1),
    "mce, labels": (lambda: mce(LABELS), LABELS, 1),
    "dream": (dream, DATA, 1),
    "dream, text": (lambda: dream(preset="text", enhance="all", distill_on="masked"), DATA, 2),
    "dear": (dear, SCORES, 1),
    "dear, accumulated": (lambda: dear(error_grad=True, beta=1.0), SCORES, 2),
    "dear, tokens": (lambda: dear(samples="subsampled", token_samples=9), SCORES, 1),
    "dear, sinkhorn": (lambda: dear(alignment="sinkhorn", samples="subsampled", lambda1=1.0), SCORES, 1),
    "dear, variance": (lambda: dear(alignment="mse", error_scale="variance", beta=0.01), SCORES, 1),
    "balm": (lambda: BALM(net(), mu_clip=(0.0, 3.9)), DATA, 1),
    "balm, present": (lambda: BALM(net(), samples="present", mu_clip=(0.0, 3.9)), DATA, 2),
    "balm, dialogues": (lambda: BALM(talk(), TALK.feature_shapes, samples="present", mu_clip=(0.0, 3.9)), TALK, 1),
    "cggm": (lambda: CGGM(net()), DATA, 1),
    "ogm-ge": (lambda: OGMGE(net(), noise=False, alpha=0.8), DATA, 1),
    "ogm-ge, noise": (lambda: OGMGE(net(), alpha=0.8), DATA, 1),
    "ogm-ge, dialogues": (lambda: OGMGE(talk(), noise=False, samples="present"), TALK, 1),
    "pmr": (lambda: PMR(net(), 3), DATA, 1),
    "pmr, ratio": (lambda: PMR(net(), 3, coefficient="ratio", fraction=0.5), DATA, 2),
    "mbt-sample": (lambda: MBTSample(net(), warmup=1), DATA, 1),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], MultimodalDataset, int]] = {
    "self-mm": (lambda: SelfMMTraining(SelfMMEvaluator.for_data(SCORES, lstm=4, width=8), SCORES), SCORES, 1),
    "balm": (lambda: BALM(net(), cos_on="grad"), DATA, 1),
    "pmr": (lambda: PMR(talk(), TALK.info["outputs"]), TALK, 1),
}


class Lengths:
    """How many samples each epoch has, after the method has had its say."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_epoch_start(self, state: Any) -> None:
        self.found.append(len(state.train))


def train(make: Callable[[], nn.Module], data: MultimodalDataset, accumulation: int) -> dict[str, torch.Tensor]:
    with random_state(0):
        method = make()
    stored = lambda: {k: v for k, v in method.state_dict().items() if not k.endswith("ids")}
    flat = lambda: torch.cat([x.detach().double().flatten() for x in stored().values()]).nan_to_num()
    start = flat()
    sgd = functools.partial(torch.optim.SGD, lr=0.01)
    epochs = 2 if isinstance(method, PMR | MBTSample) else 1
    base = TrainConfig(optimizer=sgd, select="last", device="cpu", clip=1.0)
    config = dataclasses.replace(base, epochs=epochs, batch_size=5, accumulation=accumulation)
    history = fit(
        method, data, config=config, train_plan=PLAN if data is not TALK else None, callbacks=[seen := Lengths()]
    )
    terms = [v for row in history.epochs for k, v in row.items() if k.startswith(("train_", "skipped_"))]
    terms = torch.tensor(terms + seen.found, dtype=torch.float64)
    return {"start": start, "end": flat(), "terms": terms}


TWO = """
import sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
from {module} import parallel_run
found = parallel_run()
assert torch.distributed.get_world_size() == 2
torch.save(found, sys.argv[1])
torch.distributed.destroy_process_group()
"""


def two_processes(tmp_path: Path, module: str) -> list[dict[str, Any]]:
    """What parallel_run of the module gives in each of two processes that train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=str(Path(__file__).parent), root=str(ROOT), module=module))
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / f"{rank}.pt")],
            env={**os.environ, "OMP_NUM_THREADS": "1", **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in running:
            output, _ = process.communicate(timeout=400)
            assert process.returncode == 0, output
    finally:
        for process in running:
            process.kill()
    return [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]


def parallel_run() -> dict[str, Any]:
    found: dict[str, Any] = {name: train(*run) for name, run in RUNS.items()}
    if torch.distributed.is_initialized():
        for name, run in REFUSED.items():
            try:
                train(*run)
            except ValueError as error:
                found[f"refused {name}"] = str(error)
        found["rows"] = rows_and_gradient()
    return found


def rows_and_gradient() -> dict[str, torch.Tensor]:
    """Parts of 2 and 1 samples, or 1 and none: all rows in every process, and the gradient of this process's part."""
    rank, found = torch.distributed.get_rank(), {}
    for n in (3, 1):
        whole = torch.arange(2.0 * n).reshape(n, 2)
        x = (whole[rank::2] if rank < n else whole[:1]).requires_grad_()
        shared = SharedBatch(len(x), x, counts=rank < n)
        every = shared.rows(x)
        (every.square().sum() + 0 * x.sum()).backward()
        found[f"rows {n}"] = every.detach()
        found[f"gradient {n}"] = x.grad
        found[f"bool {n}"] = shared.rows(x.detach() > 2)
        found[f"sum {n}"] = shared.sum(x.sum(0))
        found[f"count {n}"] = shared.count(torch.tensor(float(len(x))))
    return found


def relative(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> float:
    return ((a - b).norm() / scale.norm()).item()


@pytest.mark.slow
def test_two_processes_train_every_method_like_one(tmp_path: Path) -> None:
    one = parallel_run()
    first, second = two_processes(tmp_path, "test_processes")
    wrong = {}
    for name in RUNS:
        moved = one[name]["end"] - one[name]["start"]
        assert moved.norm() > 1e-4 * one[name]["end"].norm() > 0
        assert torch.equal(first[name]["start"], one[name]["start"])
        differences = {
            "weights": relative(first[name]["end"], one[name]["end"], one[name]["end"]),
            "moved": relative(first[name]["end"], one[name]["end"], moved),
            "between": relative(first[name]["end"], second[name]["end"], one[name]["end"]),
            "terms": relative(first[name]["terms"], one[name]["terms"], one[name]["terms"]),
        }
        wrong[name] = {"between": differences["between"]} if name == "ogm-ge, noise" else differences
    print(*[(k, {a: f"{b:.1e}" for a, b in v.items()}) for k, v in wrong.items()], sep="\n")
    limits = {"weights": 1e-5, "moved": 1e-4, "between": 0.0, "terms": 1e-5}
    assert not {k: v for k, v in wrong.items() if any(x > limits[a] for a, x in v.items())}

    assert "SelfMMTraining supports one process" in first["refused self-mm"]
    assert "cos_on: 'grad' supports one process" in first["refused balm"]
    assert "PMR runs dialogues in one process" in second["refused pmr"]
    assert one["mbt-sample"]["terms"][-1] > len(DATA)  # its second epoch has copies

    x = torch.arange(6.0).reshape(3, 2)
    for found, mine, part in ((first, x[::2], 2 / 3), (second, x[1::2], 1 / 3)):
        rows = found["rows"]
        assert torch.equal(rows["rows 3"], x)
        assert torch.equal(rows["bool 3"], x > 2)
        torch.testing.assert_close(rows["gradient 3"], 2 * mine / part)
        assert torch.equal(rows["sum 3"], x.sum(0))
        torch.testing.assert_close(rows["count 3"], torch.tensor(3 * part))
        assert torch.equal(rows["rows 1"], x[:1])
        assert rows["count 1"] == 1
    assert torch.equal(first["rows"]["gradient 1"], 2 * x[:1])
    assert not second["rows"]["gradient 1"].any()


def test_with_one_process_everything_is_given_back_as_it_is() -> None:
    x = torch.rand(3, 2, requires_grad=True)
    shared = SharedBatch(3, x)
    assert shared.rows(x) is x
    assert shared.sum(x) is x
    assert same_draw(x) is x
    assert shared.count(torch.tensor([0, 2])).tolist() == [1, 2]
    for arguments, error, message in (
        ((2.0, x), TypeError, "size: expected an integer"),
        ((torch.tensor(2.0), x), TypeError, "size: expected a tensor of integers"),
        ((-1, x), ValueError, "size: expected an integer of at least 0"),
        ((2, [1.0]), TypeError, "like: expected a tensor"),
        ((2, x, 1), TypeError, "counts: expected True or False"),
    ):
        with pytest.raises(error, match=message):
            SharedBatch(*arguments)
    for call, name in ((shared.sum, "x"), (shared.count, "n"), (shared.rows, "x"), (same_draw, "x")):
        with pytest.raises(TypeError, match=f"{name}: expected a tensor"):
            call([1.0])
