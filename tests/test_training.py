"""The loop: its numbers against NumPy, resuming to the bit, several processes, failures that lose nothing."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_processes import two_processes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmlib import MultimodalBatch, MultimodalDataset, Output
from mmlib.backbones import GenericBackbone
from mmlib.baselines import JointTraining
from mmlib.checkpoint import _write
from mmlib.losses import task_loss
from mmlib.missing import MissingPlan
from mmlib.training import (
    TrainConfig,
    fit,
    load,
    predict,
    random_state,
    save,
    validation_scores,
)

ROOT = Path(__file__).resolve().parent.parent
SGD = lambda parameters: torch.optim.SGD(parameters, lr=0.1)


def toy(n: int = 80, seed: int = 0, regression: bool = False) -> MultimodalDataset:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    a = rng.normal(size=(n, 6)) + 2 * np.eye(6)[y]
    b = rng.normal(size=(n, 5, 4)) + np.eye(4)[y][:, None]
    target = (y - 1 + 0.1 * rng.normal(size=n)).astype("float32") if regression else y
    return MultimodalDataset.from_arrays({"a": a.astype("float32"), "b": b.astype("float32")}, target)


class Linear(nn.Module):
    """Logits W a + c: small enough to be trained by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def forward(self, batch: MultimodalBatch) -> Output:
        logits = self.net(batch.features["a"][:, 0])
        return Output(logits, {"task": task_loss(logits, batch.target)} if batch.target is not None else {})


def joint(data: MultimodalDataset, dropout: float = 0.3, seed: int = 0) -> JointTraining:
    with random_state(seed):
        return JointTraining(GenericBackbone.for_data(data, width=8, dropout=dropout), dropout)


def weights(method: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in method.parameters()])


class Recorder:
    def __init__(self) -> None:
        self.ids: dict[int, list[list[int]]] = {}
        self.present: dict[int, torch.Tensor] = {}
        self.gradients: list[torch.Tensor] = []
        self.events: list[str] = []

    def on_start(self, state):
        self.events.append("start")

    def on_epoch_start(self, state):
        self.events.append("epoch_start")
        self.present[state.epoch] = state.train.present.clone()

    def on_batch(self, state):
        self.events.append("batch")
        self.ids.setdefault(state.epoch, []).append(state.batch.ids.tolist())

    def on_backward(self, state):
        self.events.append("backward")
        self.gradients.append(torch.cat([p.grad.flatten() for p in state.method.parameters() if p.grad is not None]))

    def on_step(self, state):
        self.events.append("step")

    def on_epoch_end(self, state):
        self.events.append("epoch_end")

    def on_end(self, state):
        self.events.append("end")


# The numbers


@pytest.mark.parametrize(("batch_size", "accumulation"), [(80, 1), (32, 1), (12, 3)])
def test_training_equals_gradient_descent_by_hand(batch_size: int, accumulation: int) -> None:
    data, method, seen = toy(), Linear(), Recorder()
    config = TrainConfig(
        epochs=3, batch_size=batch_size, accumulation=accumulation, optimizer=SGD, select="last", device="cpu"
    )
    history = fit(method, data, config=config, callbacks=[seen])

    x = data.data.features["a"][:, 0].double().numpy()
    y = data.target.numpy()
    w, c = np.zeros((3, 6)), np.zeros(3)
    for epoch in range(1, 4):
        total = 0.0
        order = [i for ids in seen.ids[epoch] for i in ids]
        for start in range(0, 80, batch_size * accumulation):
            rows = order[start : start + batch_size * accumulation]
            gw, gc = np.zeros_like(w), np.zeros_like(c)
            for i in rows:
                logits = w @ x[i] + c
                p = np.exp(logits) / np.exp(logits).sum()
                total += -math.log(p[y[i]])
                gw += np.outer(p - np.eye(3)[y[i]], x[i]) / len(rows)
                gc += (p - np.eye(3)[y[i]]) / len(rows)
            w -= 0.1 * gw
            c -= 0.1 * gc
        row = history.epochs[epoch - 1]
        assert row["train_task"] == pytest.approx(total / 80, rel=1e-5)
        assert row["train_loss"] == row["train_task"]
        assert row["epoch"] == epoch
    np.testing.assert_allclose(method.net.weight.detach().numpy(), w, atol=1e-5)
    np.testing.assert_allclose(method.net.bias.detach().numpy(), c, atol=1e-5)
    assert history.best_epoch is None
    assert list(history.frame()["step"]) == [math.ceil(80 / (batch_size * accumulation)) * e for e in (1, 2, 3)]


def test_accumulation_is_a_larger_batch_and_every_sample_comes_once_an_epoch() -> None:
    data = toy(77)
    runs = []
    for batch_size, accumulation in ((32, 1), (8, 4)):
        method, seen = Linear(), Recorder()
        config = TrainConfig(epochs=2, batch_size=batch_size, accumulation=accumulation, optimizer="sgd", select="last")
        fit(method, data, config=config, callbacks=[seen])
        runs.append((weights(method), seen))
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-6, rtol=1e-5)
    for seen in (runs[0][1], runs[1][1]):
        orders = [[i for ids in seen.ids[e] for i in ids] for e in (1, 2)]
        assert all(sorted(order) == list(range(77)) for order in orders)
        assert orders[0] != orders[1]
    assert sum(runs[0][1].ids[1], []) == sum(runs[1][1].ids[1], [])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_and_resident_data_train_alike_to_the_bit(workers: int) -> None:
    data, valid = toy(), toy(30, 1)
    results = []
    for loader in ("resident", "stream"):
        method = joint(data)
        config = TrainConfig(epochs=2, batch_size=16, loader=loader, loader_workers=workers)
        history = fit(method, data, valid, config)
        results.append((weights(method), [r["train_loss"] for r in history.epochs]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.slow
def test_the_seed_decides_and_the_callers_random_state_is_left_alone() -> None:
    data = toy()
    config = TrainConfig(epochs=2, batch_size=16, select="last", seed=3)
    results = []
    for outer in (0, 1):
        method = joint(data)
        random.seed(outer)
        np.random.seed(outer)  # noqa: NPY002
        torch.manual_seed(outer)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        fit(method, data, config=config)
        assert random.getstate() == before[0]
        assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), before[2])
        results.append(weights(method))
    assert torch.equal(*results)
    other = joint(data)
    fit(other, data, config=TrainConfig(epochs=2, batch_size=16, select="last", seed=4))
    assert not torch.equal(weights(other), results[0])


@pytest.mark.slow
def test_it_learns_and_history_has_what_it_promises() -> None:
    data, valid = toy(200), toy(80, 1)
    method = joint(data)
    history = fit(method, data, valid, TrainConfig(epochs=15, lr=1e-2, schedule="cosine"))
    assert history.epochs[-1]["valid_accuracy"] > 0.85
    assert set(history.epochs[0]) == {
        *("epoch", "step", "lr", "seconds", "train_loss", "train_task", "valid_accuracy", "valid_loss")
    }
    assert history.seconds == pytest.approx(sum(r["seconds"] for r in history.epochs))
    assert not method.training
    target = valid.target
    assert (predict(method, valid).argmax(-1) == target).double().mean().item() == pytest.approx(
        history.epochs[history.best_epoch - 1]["valid_accuracy"]
    )


def test_scores_are_validated_by_their_mean_absolute_error() -> None:
    data, valid = toy(120, regression=True), toy(40, 1, regression=True)
    history = fit(joint(data), data, valid, TrainConfig(epochs=4, lr=1e-2))
    maes = [r["valid_mae"] for r in history.epochs]
    assert history.best_epoch == 1 + int(np.argmin(maes))


def test_validation_scores_by_hand() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [5.0, 0.0]]])
    batch = MultimodalBatch(
        {"a": torch.zeros(2, 2, 1, 1)},
        torch.ones(2, 2, 1, dtype=torch.bool),
        target=torch.tensor([[0, 0], [0, 0]]),
        extras={"utterance": torch.tensor([[True, True], [True, False]])},
    )
    found = validation_scores(logits, batch)
    assert found["accuracy"] == pytest.approx(1 / 3)
    each = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1)), math.log(1 + math.exp(3))]
    assert found["loss"] == pytest.approx(sum(each) / 3, rel=1e-6)
    assert found["weighted_f1"] == pytest.approx(0.5)  # precision 1, recall 1/3 of the one class there is
    scores = MultimodalBatch({"a": torch.zeros(2, 1, 1)}, torch.ones(2, 1, dtype=torch.bool), torch.tensor([1.0, -1.0]))
    assert validation_scores(torch.tensor([[0.5], [1.0]]), scores)["mae"] == pytest.approx(1.25)
    with pytest.raises(ValueError, match="valid: expected a split with a target"):
        validation_scores(logits, batch.replace(target=None))


# Selection, budget, schedule


class Scripted:
    """Validation metrics by a script, one value an epoch."""

    def __init__(self, *values: float):
        self.values = list(values)

    def __call__(self, logits: torch.Tensor, batch: MultimodalBatch) -> dict[str, float]:
        return {"accuracy": self.values.pop(0)}


def kept_epoch(config: TrainConfig, *values: float) -> tuple[int, int | None, int]:
    """(epoch whose weights are kept, best epoch, epochs run)."""
    data = toy(20)
    at_end: list[torch.Tensor] = []

    class Keep:
        def on_epoch_end(self, state):
            at_end.append(weights(state.method))

    method = Linear()
    history = fit(method, data, toy(5, 1), config, callbacks=[Keep()], metrics=Scripted(*values))
    kept = [i + 1 for i, w in enumerate(at_end) if torch.equal(w, weights(method))]
    return kept[0], history.best_epoch, len(history.epochs)


def test_best_is_the_earliest_best_epoch_and_last_the_last() -> None:
    assert kept_epoch(TrainConfig(epochs=4), 0.2, 0.7, 0.7, 0.6) == (2, 2, 4)
    assert kept_epoch(TrainConfig(epochs=4, select="last"), 0.2, 0.7, 0.7, 0.6) == (4, 2, 4)
    assert kept_epoch(TrainConfig(epochs=3), math.nan, 0.1, math.nan) == (2, 2, 3)


def test_patience_counts_epochs_without_improvement() -> None:
    assert kept_epoch(TrainConfig(epochs=9, patience=2), 0.5, 0.6, 0.6, 0.5, 0.9) == (2, 2, 4)
    assert kept_epoch(TrainConfig(epochs=9, patience=1, select="last"), 0.5, 0.4, 0.9) == (2, 1, 2)


def test_an_unknown_monitor_lists_the_known_metrics() -> None:
    with pytest.raises(ValueError, match=r"monitor: expected one of the validation metrics \['accuracy', 'loss'\]"):
        fit(Linear(), toy(20), toy(5), TrainConfig(epochs=1, monitor="f1"))
    history = fit(Linear(), toy(20), toy(9), TrainConfig(epochs=2, monitor="loss"))
    assert history.best_epoch == 1 + int(np.argmin([r["valid_loss"] for r in history.epochs]))


def test_a_budget_of_steps_ends_within_an_epoch() -> None:
    seen = Recorder()
    history = fit(Linear(), toy(80), config=TrainConfig(steps=7, batch_size=16, select="last"), callbacks=[seen])
    assert [r["step"] for r in history.epochs] == [5, 7]
    assert [len(ids) for ids in seen.ids.values()] == [5, 2]


def rates(**settings: object) -> list[float]:
    found = []

    class Look:
        def on_backward(self, state):
            found.append(state.optimizer.param_groups[0]["lr"])

    fit(Linear(), toy(20), config=TrainConfig(steps=10, batch_size=10, select="last", **settings), callbacks=[Look()])
    return found


def test_schedules_by_hand() -> None:
    assert rates(lr=0.5) == [0.5] * 10
    cosine = [0.5 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]
    assert rates(lr=0.5, schedule="cosine") == pytest.approx(cosine)
    warm = [0.5 * k / 5 for k in range(1, 5)] + [0.5 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    assert rates(lr=0.5, schedule="linear-warmup-cosine", warmup=0.4) == pytest.approx(warm)
    one = rates(lr=0.5, schedule="onecycle")
    assert max(one) == pytest.approx(0.5, rel=0.05)
    assert one[0] == pytest.approx(0.02)
    assert one[-1] == pytest.approx(0.02 / 1e4)
    assert rates(lr=0.5, schedule="step") == pytest.approx([0.5] * 6 + [0.05] * 2 + [0.005] * 2)
    halving = lambda optimizer, steps: torch.optim.lr_scheduler.StepLR(optimizer, steps // 2, 0.5)
    assert rates(lr=0.5, schedule=halving) == [0.5] * 5 + [0.25] * 5


# Hooks


def test_hooks_are_called_in_order_once_per_step() -> None:
    seen = Recorder()
    fit(Linear(), toy(20), config=TrainConfig(epochs=1, batch_size=8, accumulation=2, select="last"), callbacks=[seen])
    assert seen.events == [
        *("start", "epoch_start", "batch", "batch", "backward", "step", "batch", "backward", "step"),
        *("epoch_end", "end"),
    ]


def test_a_hook_rules_the_gradient_and_clipping_comes_after_it() -> None:
    class Scale:
        def on_backward(self, state):
            for p in state.method.parameters():
                p.grad.fill_(1.0)

    method = Linear()
    config = TrainConfig(epochs=1, batch_size=80, optimizer=SGD, select="last", clip=2.0)
    fit(method, toy(80), config=config, callbacks=[Scale()])
    assert weights(method).norm().item() == pytest.approx(0.1 * 2.0, rel=1e-4)  # lr times the clipped norm


def test_a_hook_may_stop_and_change_the_batch_and_a_method_is_its_own_first_hook() -> None:
    class Own(Linear):
        def on_batch(self, state):
            state.batch = state.batch.replace(target=torch.zeros_like(state.batch.target))

        def on_epoch_end(self, state):
            state.stop = state.epoch == 2

    method = Own()
    history = fit(method, toy(), config=TrainConfig(epochs=9, lr=0.1, select="last"))
    assert len(history.epochs) == 2
    assert (predict(method, toy()).argmax(-1) == 0).double().mean() > 0.9


def test_no_step_waits_for_the_device() -> None:
    """No scalar is read between the first batch of an epoch and its last step."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Reads.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    class Watch:
        mode = None

        def on_epoch_start(self, state):
            self.mode = Reads()
            self.mode.__enter__()

        def on_step(self, state):
            if state.step % 5 == 0:
                self.mode.__exit__(None, None, None)

    data = toy(80)
    config = TrainConfig(epochs=2, batch_size=16, optimizer="sgd", select="last", clip=1.0, schedule="cosine")
    fit(joint(data, dropout=0.0), data, config=config, callbacks=[Watch()])
    assert Reads.count == 0


# Missing modalities in training


def test_the_training_split_misses_the_same_every_epoch_unless_it_is_resampled() -> None:
    data = toy()
    for resample in (False, True):
        seen = Recorder()
        plan = MissingPlan("bernoulli", rates=[0.5, 0.5], seed=1, resample=resample)
        config = TrainConfig(epochs=2, select="last")
        fit(joint(data), data, config=config, train_plan=plan, callbacks=[seen])
        expected = [plan.draw(data, epoch=e if resample else None).apply(data).present for e in (1, 2)]
        assert torch.equal(seen.present[1], expected[0])
        assert torch.equal(seen.present[2], expected[1])
        assert torch.equal(seen.present[1], seen.present[2]) is not resample


def test_a_method_that_needs_complete_data_gets_them_in_training_alone() -> None:
    data = toy()

    class Needs(Linear):
        needs_complete = True

        def forward(self, batch: MultimodalBatch) -> Output:
            assert (batch.complete is not None) is self.training
            assert (batch.target is not None) is self.training
            return super().forward(batch)

    plan = MissingPlan("bernoulli", rates=[0.5, 0.5])
    fit(Needs(), data, plan.draw(data).apply(data, keep_complete=True), TrainConfig(epochs=1), train_plan=plan)


# Checkpoints


class Interrupt:
    """Stops at a step, once; counts steps, with a state of its own."""

    def __init__(self, at: int | None):
        self._at, self.steps = at, 0

    def on_step(self, state):
        self.steps += 1
        if state.step == self._at:
            raise KeyboardInterrupt

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


SETTINGS = dict(epochs=4, batch_size=16, lr=1e-2, schedule="onecycle", seed=5, clip=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("at", [7, 13])
def test_an_interrupted_run_resumes_to_the_bit(tmp_path: Path, at: int) -> None:
    data, valid = toy(), toy(30, 1)
    plan = MissingPlan("bernoulli", rates=[0.4, 0.2], resample=True)
    config = TrainConfig(**SETTINGS)
    whole, counted = joint(data), Interrupt(None)
    expected = fit(whole, data, valid, config, train_plan=plan, callbacks=[counted])

    path = tmp_path / "run.pt"
    hook = Interrupt(at)
    with pytest.raises(KeyboardInterrupt):
        fit(joint(data), data, valid, config, train_plan=plan, callbacks=[hook], checkpoint=path)
    assert torch.load(path, weights_only=True)["epoch"] == at // 5
    torch.manual_seed(99)
    again, hook = joint(data, seed=123), Interrupt(None)  # other weights: they come from the checkpoint
    history = fit(again, data, valid, config, train_plan=plan, callbacks=[hook], checkpoint=path)

    assert torch.equal(weights(whole), weights(again))
    forget = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert forget(history.epochs) == forget(expected.epochs)
    assert history.best_epoch == expected.best_epoch
    assert hook.steps == counted.steps == 20

    done = joint(data, seed=7)  # a finished run is loaded, nothing is trained
    hook = Interrupt(1)
    finished = fit(done, data, valid, config, train_plan=plan, callbacks=[hook], checkpoint=path)
    assert torch.equal(weights(whole), weights(done))
    assert len(finished.epochs) == 4


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    config = TrainConfig(epochs=9, patience=1)
    for values in ((0.5, 0.4), ()):
        history = fit(
            Linear(), toy(20), toy(5, 1), config, metrics=Scripted(*values), checkpoint=tmp_path / "checkpoint.pt"
        )
        assert len(history.epochs) == 2
        assert history.best_epoch == 1


@pytest.mark.slow
def test_a_checkpoint_of_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    data, valid, path = toy(), toy(30, 1), tmp_path / "run.pt"
    config = TrainConfig(**SETTINGS)
    fit(joint(data), data, valid, TrainConfig(**SETTINGS), checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another configuration \(lr 0.01 there, 0.1 here\)"):
        fit(joint(data), data, valid, TrainConfig(**{**SETTINGS, "lr": 0.1}), checkpoint=path)
    with pytest.raises(ValueError, match=r"another configuration \(train '"):
        fit(joint(data), toy(seed=9), valid, config, checkpoint=path)
    plan = MissingPlan("bernoulli", rates=[0.4, 0.2])
    with pytest.raises(ValueError, match=r"train_plan None there"):
        fit(joint(data), data, valid, config, checkpoint=path, train_plan=plan)
    with pytest.raises(ValueError, match=r"method 'JointTraining' there, 'Linear' here"):
        fit(Linear(), data, valid, config, checkpoint=path)
    with pytest.raises(ValueError, match=r"callbacks '' there, 'Recorder' here"):
        fit(joint(data), data, valid, config, checkpoint=path, callbacks=[Recorder()])
    fit(joint(data), data, valid, TrainConfig(**SETTINGS, device="cpu", loader="stream"), checkpoint=path)
    assert path.read_bytes() == before


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["HOSTILE"]),))


def test_truncated_foreign_and_hostile_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, path = toy(), tmp_path / "run.pt"
    config = TrainConfig(epochs=1, select="last")
    resume = lambda: fit(Linear(), data, config=config, checkpoint=path)
    resume()
    whole = path.read_bytes()
    for part in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        with pytest.raises(ValueError, match=r"run\.pt: expected a file written by mmlib .* it is cut short"):
            resume()
        with pytest.raises(ValueError, match="it is cut short"):
            load(Linear(), path)
    marker = tmp_path / "marker"
    monkeypatch.setenv("HOSTILE", str(marker))
    for content in (pickle.dumps(Hostile(), protocol=2), b"accuracy,0.9\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="of another kind"):
            resume()
    torch.save(Hostile(), path)
    with pytest.raises(ValueError, match="of another kind"):
        load(Linear(), path)
    _write(path, "mmlib-weights", {"method": Hostile(), "weights": {}, "facts": {}})  # with its checksum
    with pytest.raises(ValueError, match="cannot be read"):
        load(Linear(), path)
    assert not marker.exists()
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"expected .*mmlib-weights.* got 'mmlib-checkpoint'"):
        load(Linear(), path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 4:  # a file and its folder, twice
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"run\.pt could not be written \(No space left on device\)") as error:
        fit(Linear(), toy(), config=TrainConfig(epochs=4, select="last"), checkpoint=path)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert torch.load(path, weights_only=True)["epoch"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    history = fit(Linear(), toy(), config=TrainConfig(epochs=4, select="last"), checkpoint=path)
    assert len(history.epochs) == 4


class Breaks(Linear):
    """A loss term of its own turns infinite at the third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, batch: MultimodalBatch) -> Output:
        output = super().forward(batch)
        if self.training:
            self.batches += 1
            bad = torch.where(self.batches == 7, torch.inf, 0.0) * self.net.weight.sum()
            return Output(output.logits, {**output.losses, "extra": bad})
        return output


def test_a_loss_that_is_not_finite_stops_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    config = TrainConfig(epochs=5, batch_size=16, select="last", lr=0.1)
    with pytest.raises(FloatingPointError, match=r"epoch 2, step 7: the loss term 'extra' is NaN or infinite"):
        fit(Breaks(), toy(80), config=config, checkpoint=path)
    assert torch.load(path, weights_only=True)["epoch"] == 1


def test_a_gradient_that_is_not_finite_is_found_though_the_loss_was(tmp_path: Path) -> None:
    class Root(Linear):
        def forward(self, batch: MultimodalBatch) -> Output:
            output = super().forward(batch)
            return Output(output.logits, {"root": (self.net.bias * 0).abs().sum().sqrt(), **output.losses})

    with pytest.raises(FloatingPointError, match=r"epoch 1, step 1: the weight 'net.bias' is NaN"):
        fit(Root(), toy(20), config=TrainConfig(epochs=1, select="last"))


# Precision, compilation, devices, processes


@pytest.mark.parametrize(
    "settings",
    [{"mixed_precision": "bf16"}, pytest.param({"compile": "eager"}, marks=pytest.mark.slow)],
    ids=["bf16", "compiled"],
)
def test_one_method_may_be_trained_again_in_another_way(settings: dict) -> None:
    data, valid = toy(), toy(30, 1)
    plain = joint(data)
    expected = fit(plain, data, valid, TrainConfig(epochs=2, lr=1e-2))
    method = joint(data)
    history = fit(method, data, valid, TrainConfig(epochs=2, lr=1e-2, **settings))
    loss = [r["train_loss"] for r in expected.epochs]
    assert [r["train_loss"] for r in history.epochs] == pytest.approx(
        loss, rel=0.02 if "compile" not in settings else 1e-5
    )
    assert not [k for k in method.__dict__ if k == "forward" or "accelerate" in k or "original" in k or "compile" in k]
    fit(method, data, valid, TrainConfig(epochs=1))
    assert predict(method, valid).dtype == torch.float32
    copied = copy.deepcopy(method)
    assert torch.equal(predict(copied, valid), predict(method, valid))


def test_accelerates_global_state_is_the_callers_afterwards() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    mine = Accelerator(cpu=True, mixed_precision="no")
    try:
        before = dict(AcceleratorState._shared_state)
        fit(Linear(), toy(20), config=TrainConfig(epochs=1, select="last", mixed_precision="bf16"))
        assert dict(AcceleratorState._shared_state) == before
        assert mine.mixed_precision == "no"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_said() -> None:
    with pytest.raises(ValueError, match="device: .* no CUDA device"):
        fit(Linear(), toy(20), config=TrainConfig(device="cuda", select="last"))
    with pytest.raises(ValueError, match="mixed_precision: fp16 needs a GPU"):
        fit(Linear(), toy(20), config=TrainConfig(mixed_precision="fp16", select="last"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_on_a_gpu(precision: str) -> None:
    data, valid = toy(200), toy(60, 1)
    method = joint(data)
    config = TrainConfig(epochs=10, lr=1e-2, device="cuda", mixed_precision=precision, clip=1.0)
    history = fit(method, data, valid, config)
    assert history.epochs[-1]["valid_accuracy"] > 0.8
    assert next(method.parameters()).is_cuda
    assert not predict(method, valid).is_cuda


def parallel_run() -> dict[str, dict[str, torch.Tensor]]:
    """What a group of processes must agree on with one process: even shards, uneven and empty ones, accumulation."""
    found = {}
    for name, n, accumulation in (("even", 40, 1), ("uneven", 41, 1), ("accumulated", 41, 2)):
        data, seen, method = toy(n), Recorder(), joint(toy(n), dropout=0.0)
        config = TrainConfig(epochs=2, batch_size=10, accumulation=accumulation, optimizer="sgd", lr=0.1, clip=1.0)
        history = fit(method, data, toy(20, 1), config, callbacks=[seen])
        rows = [[r["train_loss"], r["valid_loss"], r["valid_accuracy"]] for r in history.epochs]
        found[name] = {
            "gradients": torch.stack(seen.gradients),
            "weights": weights(method),
            "history": torch.tensor(rows, dtype=torch.float64),
        }
    return found


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    one = parallel_run()
    for two in two_processes(tmp_path, "test_training"):
        for name, expected in one.items():
            for what, value in expected.items():
                torch.testing.assert_close(two[name][what], value, atol=1e-5, rtol=1e-4)


# Trackers and progress


def test_trackers_by_name(tmp_path: Path) -> None:
    config = TrainConfig(epochs=2, select="last", trackers=("jsonl",), log_dir=str(tmp_path), optimizer=SGD)
    history = fit(Linear(), toy(20), config=config)
    lines = [json.loads(line) for line in (tmp_path / "mmlib.jsonl").read_text().splitlines()]
    assert lines[0]["config"]["batch_size"] == 64
    assert [line["epoch"] for line in lines[1:]] == [1, 2]
    assert lines[2]["train_task"] == history.epochs[1]["train_task"]


def test_a_tracker_object_is_started_and_finished_even_after_an_error() -> None:
    from accelerate.tracking import GeneralTracker

    class Memory(GeneralTracker):
        name, requires_logging_directory, tracker = "memory", False, None

        def __init__(self) -> None:
            super().__init__()
            self.logged: list[int] = []
            self.finished = False

        def log(self, values, step=None, **_):
            self.logged.append(step)

        def finish(self):
            self.finished = True

    tracker = Memory()
    fit(Linear(), toy(20), config=TrainConfig(epochs=2, select="last", trackers=(tracker,)))
    assert tracker.logged == [1, 2]
    broken = Memory()
    with pytest.raises(FloatingPointError):
        fit(Breaks(), toy(80), config=TrainConfig(epochs=5, batch_size=8, select="last", trackers=(broken,)))
    assert broken.finished


def test_unknown_and_uninstalled_trackers_are_named() -> None:
    from accelerate.tracking import get_available_trackers

    with pytest.raises(ValueError, match=r"trackers: expected 'jsonl' or one of .*'wandb'.* got 'wandbb'"):
        fit(Linear(), toy(20), config=TrainConfig(select="last", trackers=("wandbb",)))
    absent = sorted({"aim", "wandb", "mlflow"} - {str(t) for t in get_available_trackers()})
    if not absent:
        pytest.skip("every tracker is installed")
    with pytest.raises(ModuleNotFoundError, match=f"'{absent[0]}' is not installed; run `pip install"):
        fit(Linear(), toy(20), config=TrainConfig(select="last", trackers=(absent[0],)))


def test_progress_is_shown_on_request_alone(capfd: pytest.CaptureFixture[str]) -> None:
    fit(Linear(), toy(20), config=TrainConfig(epochs=1, select="last"))
    assert capfd.readouterr() == ("", "")
    fit(Linear(), toy(20), config=TrainConfig(epochs=1, select="last", progress=True))
    assert "1/1" in capfd.readouterr().err


# Predictions, weights


def test_predict_with_parts_missing() -> None:
    data = toy(30)
    method = joint(data)
    method.train()
    method.backbone.decoder.eval()
    whole = predict(method, data, batch_size=7)
    assert whole.shape == (30, 3)
    assert method.training
    assert not method.backbone.decoder.training
    torch.testing.assert_close(whole, predict(method, data.data))
    torch.testing.assert_close(predict(method, data[4]), whole[4:5])
    without = predict(method, data.drop(present=torch.tensor([True, False])))
    torch.testing.assert_close(predict(method, data, present=[True, False]), without)
    rows = torch.ones(30, 2, dtype=torch.bool)
    rows[:9, 1] = False
    mixed = predict(method, data, present=rows, batch_size=4)
    torch.testing.assert_close(mixed[:9], without[:9])
    torch.testing.assert_close(mixed[9:], whole[9:])
    assert not torch.allclose(mixed[:9], whole[:9])


def test_predict_takes_dialogues() -> None:
    x = torch.randn(4, 5, 1, 3)
    batch = MultimodalBatch({"a": x, "b": x.clone()}, torch.ones(4, 5, 2, dtype=torch.bool))
    method = JointTraining(GenericBackbone.for_data(MultimodalDataset(batch, {"outputs": 2, "name": "d"}), width=4))
    keep = torch.tensor([[True, False], [True, True], [False, True], [True, True]])
    found = predict(method, batch, present=keep)
    assert found.shape == (4, 5, 2)
    whole = predict(method, batch)
    torch.testing.assert_close(found[1], whole[1])
    torch.testing.assert_close(found[0], predict(method, batch, present=[True, False])[0])


def test_predict_refuses_what_does_not_fit() -> None:
    data = toy(10)
    with pytest.raises(ValueError, match=r"present: expected shape \(2,\) or \(10, 2\), got \(3,\)"):
        predict(Linear(), data, present=[True, False, True])
    with pytest.raises(TypeError, match="present: expected bool"):
        predict(Linear(), data, present=torch.ones(2))
    with pytest.raises(TypeError, match="dataset: expected a MultimodalDataset"):
        predict(Linear(), torch.zeros(3))
    with pytest.raises(ValueError, match="batch_size"):
        predict(Linear(), data, batch_size=0)


def test_weights_go_to_a_file_and_back(tmp_path: Path) -> None:
    data, path = toy(), tmp_path / "weights" / "joint.pt"
    method, other = joint(data), joint(data, seed=1)
    save(method, path, accuracy=0.9, modalities=["a", "b"])
    assert set(torch.load(path, weights_only=True)) == {"format", "version", "method", "weights", "facts"}
    assert load(other, path) == {"accuracy": 0.9, "modalities": ["a", "b"]}
    assert torch.equal(predict(method, data), predict(other, data))


def test_weights_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    data, path = toy(), tmp_path / "joint.pt"
    save(joint(data), path)
    wider = JointTraining(GenericBackbone.for_data(data, width=16))
    before = weights(wider)
    with pytest.raises(
        ValueError, match=r"'backbone.encoders.a.net.0.weight' has shape \(8, 6\) there, \(16, 6\) here"
    ):
        load(wider, path)
    assert torch.equal(weights(wider), before)
    with pytest.raises(
        ValueError, match=r"joint\.pt \(a JointTraining\) does not fit this method, a Linear: 'net.weight' is not"
    ):
        load(Linear(), path)
    save(Linear(), path)
    with pytest.raises(ValueError, match="the file has 'net.bias' besides"):
        load(nn.ModuleDict({"net": nn.Linear(6, 3, bias=False)}), path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        load(Linear(), tmp_path / "nothing.pt")
    with pytest.raises(TypeError, match="facts: expected numbers, strings"):
        save(Linear(), path, model=Linear())


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1, got 0"),
        ({"lr": 0.0}, "lr: expected a number above 0"),
        ({"lr": math.nan}, "lr: expected a number above 0"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"clip": 0.0}, "clip: expected None or a number above 0"),
        ({"patience": 0}, "patience: expected None or an integer"),
        ({"steps": 0}, "steps: expected None or an integer"),
        ({"select": "test"}, "select: expected 'best' or 'last', got 'test'"),
        ({"optimizer": "adamax"}, "optimizer: expected one of"),
        ({"schedule": "stairs"}, "schedule: expected None or one of"),
        ({"warmup": 1.0}, "warmup: expected a number in"),
        ({"device": "gpu"}, "device: expected one of auto, cpu, cuda"),
        ({"mixed_precision": "fp8"}, "mixed_precision: expected one of no, bf16, fp16"),
        ({"loader": "lazy"}, "loader: expected one of auto"),
        ({"seed": -1}, "seed: expected an integer in"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 2.5}, {"steps": True}, {"lr": "0.1"}, {"optimizer": 3}, {"compile": 1}, {"progress": "no"}],
)
def test_settings_of_another_type_are_named(settings: dict) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(settings))}: expected"):
        TrainConfig(**settings)


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(TypeError, match="trackers: expected a list or tuple"):
        TrainConfig(trackers="wandb")
    with pytest.raises(ValueError, match="valid: select='best' and patience need a validation split"):
        fit(Linear(), toy(20))
    frozen = Linear().requires_grad_(False)
    with pytest.raises(ValueError, match="method: expected at least one parameter that requires a gradient"):
        fit(frozen, toy(20), config=TrainConfig(select="last"))
    unlabelled = MultimodalDataset(toy(20).data.replace(target=None), {"outputs": 3})
    with pytest.raises(ValueError, match="expected loss terms in training, got none"):
        fit(Linear(), unlabelled, config=TrainConfig(select="last"))
