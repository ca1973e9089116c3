"""A checkpoint belongs to its run: every method and backbone resumes to the bit, and no other setting of one passes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmlib import MultimodalDataset, Output, checkpoint
from mmlib import backbones as nets
from mmlib import data as sources
from mmlib.baselines import CGGM, OGMGE, PMR, JointTraining, MBTSample
from mmlib.losses import sample_losses
from mmlib.methods import BALM, DEAR, DREAM, MCE
from mmlib.methods.mce import UpperBounds
from mmlib.methods.released import OtherDREAM
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, load, random_state, save

Make = Callable[..., nn.Module]


def toy(n: int = 24, regression: bool = False) -> MultimodalDataset:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    features = {
        "text": (rng.normal(size=(n, 4, 6)) + y[:, None, None]).astype("float32"),
        "audio": (rng.normal(size=(n, 3, 5)) - y[:, None, None]).astype("float32"),
    }
    return MultimodalDataset.from_arrays(features, (y - 0.9).astype("float32") if regression else y)


DATA, SCORES = toy(), toy(regression=True)
TALK = sources.load("conversations", sizes=(6, 2, 2), lengths=(2, 4))["train"]
PICTURES = MultimodalDataset.from_arrays(
    {"image": torch.linspace(0, 1, 4704).reshape(6, 1, 28, 28), "audio": torch.ones(6, 1, 20, 20)},
    np.arange(6) % 3,
    classes=10,
)
generic = functools.partial(nets.GenericBackbone.for_data, DATA, width=8)


def upper() -> UpperBounds:
    table = np.random.default_rng(2).integers(0, 2, DATA.present.shape)
    return UpperBounds(torch.as_tensor(table).float(), DATA.ids, DATA.modalities)


def on(net: Make, data: MultimodalDataset) -> tuple[Make, MultimodalDataset]:
    return lambda **options: JointTraining(net(**options)), data


# What each method and backbone is made with here; the options are those of its constructor or configuration.
METHODS: dict[str, tuple[Make, MultimodalDataset]] = {
    "joint": (lambda **o: JointTraining(generic(), **{"modality_dropout": 0.3, **o}), DATA),
    "mce": (lambda **o: MCE(generic(), upper(), **{"attention_heads": 2, "hidden": 16, **o}), DATA),
    "dream": (lambda **o: DREAM.for_data(DATA, generic().eval(), **{"width": 8, "heads": 2, **o}), DATA),
    "other dream": (lambda **o: OtherDREAM.for_data(DATA, generic().eval(), **{"width": 8, "heads": 2, **o}), DATA),
    "dear": (
        lambda **o: DEAR.for_data(SCORES, **{"width": 8, "heads": 2, "head_width": 4, "hidden": 8, "layers": 1, **o}),
        SCORES,
    ),
    "dear, otherwise": (
        lambda **o: DEAR.for_data(
            SCORES, **{"residual": True, "width": 8, "heads": 2, "head_width": 4, "hidden": 8, "layers": 1, **o}
        ),
        SCORES,
    ),
    "balm": (lambda **o: BALM(generic(), **{"rho": 1.4, **o}), DATA),
    "cggm": (lambda **o: CGGM(generic(), **o), DATA),
    "ogm-ge": (lambda **o: OGMGE(generic(), **o), DATA),
    "pmr": (lambda **o: PMR(generic(), 3, **o), DATA),
    "mbt-sample": (lambda **o: MBTSample(generic(), **{"warmup": 1, **o}), DATA),
    "self-mm": (
        lambda **o: nets.SelfMMTraining(nets.SelfMMEvaluator.for_data(SCORES, lstm=4, width=8), SCORES, **o),
        SCORES,
    ),
}
NETS: dict[str, tuple[Make, MultimodalDataset]] = {
    "generic": on(generic, DATA),
    "mmin": on(lambda **o: nets.MMINBackbone.for_data(DATA, **{"width": 8, **o}), DATA),
    "cubemlp": on(lambda **o: nets.CubeMLPBackbone.for_data(DATA, **{"width": 8, **o}), DATA),
    "gcnet": on(lambda **o: nets.GCNetBackbone.for_data(TALK, **{"width": 4, "hidden": 4, **o}), TALK),
    "mmgcn": on(lambda **o: nets.MMGCNBackbone.for_data(TALK, **{"width": 8, "hidden": 4, "layers": 2, **o}), TALK),
    "mmdfn": on(lambda **o: nets.MMDFNBackbone.for_data(TALK, **{"width": 8, "hidden": 4, "layers": 2, **o}), TALK),
    "avmnist": on(lambda **o: nets.AVMNISTBackbone(nets.AVMNISTConfig(**o)), PICTURES),
    "table3": on(lambda **o: nets.Table3Evaluator.for_data(DATA, **{"width": 8, **o}), DATA),
    "corrkd": on(lambda **o: nets.CorrKDEvaluator.for_data(DATA, **{"width": 8, "heads": 2, **o}), DATA),
    "selfmm": on(lambda **o: nets.SelfMMEvaluator.for_data(SCORES, **{"lstm": 4, **o}), SCORES),
    "mlp": on(lambda **o: nets.MLPEvaluator.for_data(DATA, **{"width": 8, **o}), DATA),
}
ALL = {**METHODS, **NETS}
# What follows from the data, or is the same net with one modality name more.
GIVEN = {"feature_shapes", "input_widths", "outputs", "labels", "speakers", "modalities", "text_width", "regression"}
WORDS: dict[str, tuple[Any, ...]] = {
    "value": ("accuracy",),
    "value_pass": ("eval",),
    "shapley": ("released",),
    "rate_norm": ("none",),
    "upper_source": ("current",),
    "single_loss": ("released",),
    "subset_loss": ("strict",),
    "subset_features": ("reconstructed",),
    "completion_loss": ("released",),
    "all_missing": ("keep",),
    "columns": ((1, 0),),
    "discretize": ("sign_gt",),
    "empty": ("majority",),
    "enhance": ("all",),
    "enhance_order": ("sequential",),
    "concat": ("feature",),
    "mask_mode": ("add_log",),
    "pas_target": ("clipped",),
    "distill_on": ("masked",),
    "encoder": ("tokens", "gru"),
    "keys": ("available",),
    "space": ("raw",),
    "alignment": ("sinkhorn",),
    "samples": ("subsampled", "present"),
    "joint_sum": ("literal",),
    "norm": ("layer", "after"),
    "stream_input": ("encoded",),
    "hdcr": ("joint",),
    "normed": ("all",),
    "query": ("audio",),
    "fusion": ("self",),
    "k_scale": ("logbias",),
    "streams": ("robust",),
    "main": ("l1",),
    "aux": ("all",),
    "error": ("sum",),
    "error_scale": ("variance",),
    "loss": ("mse",),
    "discrepancy": ("mse",),
    "interval": ("epoch",),
    "mu_clip": ((0.0, 2.0),),
    "cos_on": ("grad",),
    "lmod": ("cggm", "abs"),
    "cosine_columns": ((1, 0),),
    "active_epochs": ((1, 1),),
    "coefficient": ("ratio",),
    "score": ("mean",),
    "weak": ("lowest",),
    "pool": ("concat",),
    "blocks": (((4, 2, 8),),),
    "context": (("audio",),),
    "embedded": (("audio",),),
    "party": ({"audio": 1.0},),
    "nets": ({"audio": "textcnn"},),
    "text": ("audio",),
}


def others(name: str, value: Any) -> Iterator[Any]:
    """Values to try in place of ``value``."""
    yield from WORDS.get(name, ())
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int) or value is None:
        yield from (1, 2, 3, 4, 8, 16, 64)
    if isinstance(value, float) or value is None:
        yield from (0.35, 1.7)


def fields(name: str, method: nn.Module) -> dict[str, Any]:
    """The options and their values: of the configuration, else of the constructor."""
    if name == "joint":
        return {"modality_dropout": method.modality_dropout}
    part = method.backbone if name in NETS else method
    if dataclasses.is_dataclass(config := getattr(part, "config", None)):
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in GIVEN}
    names = type(part).__init__.__kwdefaults__ or {"scale": None}
    return {k: getattr(part, k) for k in names if k != "encoders"}


def changed(make: Make, name: str, value: Any) -> nn.Module | None:
    """The method with another value of one option; None where no other one is known that the rest allows."""
    for other in others(name, value):
        if other == value and type(other) is type(value):
            continue
        try:
            return make(**{name: other})
        except (ValueError, TypeError):
            continue
    return None


def weights(method: nn.Module) -> torch.Tensor:
    return torch.cat([x.detach().double().flatten() for x in method.state_dict().values()])


def build(name: str, seed: int = 0) -> nn.Module:
    with random_state(seed):
        return ALL[name][0]()


PLAN = MissingPlan("bernoulli", rates=[0.3, 0.3], seed=1)


def train(name: str, method: nn.Module, epochs: int, path: Path | None = None, **settings: Any) -> Any:
    plan = PLAN if name in METHODS and name != "self-mm" else None
    config = TrainConfig(**{"epochs": epochs, "batch_size": 12, "select": "last", "device": "cpu", **settings})
    return fit(method, ALL[name][1], config=config, train_plan=plan, checkpoint=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_longer_run_goes_on_to_the_bit_and_no_other_option_does(name: str, tmp_path: Path) -> None:
    whole, first, path = build(name), build(name), tmp_path / "run.pt"
    options = fields(name, first)
    expected = train(name, whole, 3)
    train(name, first, 1, path)
    stored = path.read_bytes()
    unknown = []
    for option, value in options.items():
        other = changed(ALL[name][0], option, value)
        if other is None:
            unknown.append(option)
            continue
        with pytest.raises(ValueError, match=rf"run\.pt was written by another configuration \(.*\b{option}\b"):
            train(name, other, 1, path)
    # Of these the data and the net allow one value alone.
    assert set(unknown) <= {"vocabulary", "freeze_text", "input", "kernels_only"}
    assert path.read_bytes() == stored

    for again in [build(name, seed=7), first]:  # a new one, or the one that was trained
        path.write_bytes(stored)
        history = train(name, again, 3, path)
        torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0, equal_nan=True)
        assert [r["train_loss"] for r in history.epochs] == [r["train_loss"] for r in expected.epochs]


class Hook:
    """A setting, a counter, a private one."""

    def __init__(self, strength: float = 0.5):
        self.strength, self.calls, self._seen = strength, 0, 0

    def on_step(self, state: Any) -> None:
        self.calls += 1
        self._seen += 1


class Stack(nn.Module):
    """Parts of every kind that have settings."""

    def __init__(self, dropout: float = 0.0, act: Any = torch.tanh, sizes: tuple[int, ...] = (2, 3), note: Any = "a"):
        super().__init__()
        self.act, self.sizes, self.note = act, sizes, note
        self.table = torch.rand(3)  # what is not described
        self.net = nn.Sequential(nn.Dropout(dropout), nn.Linear(6, 3))

    def forward(self, batch: Any) -> Output:
        logits = self.net(self.act(batch.features["text"].mean(1)))
        return Output(logits, {} if batch.target is None else {"task": sample_losses(logits, batch.target).mean()})


def frozen(method: nn.Module) -> nn.Module:
    method.net[1].bias.requires_grad_(False)
    return method


@pytest.mark.parametrize(
    ("other", "hook", "message"),
    [
        (lambda: Stack(dropout=0.2), Hook, r"(net.0.p 0.0 there, 0.2 here)"),
        (lambda: Stack(act=torch.relu), Hook, r"(act '.*tanh' there, '.*relu' here)"),
        (lambda: Stack(sizes=(2, 4)), Hook, r"(sizes '\(2, 3\)' there, '\(2, 4\)' here)"),
        (lambda: Stack(note=float("nan")), Hook, r"(note 'a' there, 'nan' here)"),
        (
            lambda: Stack(note=nn.Identity()),
            Hook,
            r"(note 'a' there, 'Identity' here)",
        ),
        (lambda: frozen(Stack()), Hook, r"(net.1.bias.requires_grad nothing there, False here)"),
        (Stack, lambda: Hook(0.6), r"(callbacks[0].strength 0.5 there, 0.6 here)"),
        (lambda: Stack(0.1, torch.relu, (), "b"), lambda: Hook(0.6), r"(act .*, note .*, sizes .*, net.0.p .*"),
    ],
)
def test_a_part_with_another_setting_is_named(tmp_path: Path, other: Make, hook: Make, message: str) -> None:
    config = TrainConfig(epochs=1, select="last", batch_size=12)
    used = Hook()
    fit(method := Stack(), DATA, config=config, callbacks=[used], checkpoint=tmp_path / "run.pt")
    pattern = re.sub(r"(?<!\\)([()\[\]])", r"\\\1", message)
    with pytest.raises(ValueError, match=pattern):
        fit(other(), DATA, config=config, callbacks=[hook()], checkpoint=tmp_path / "run.pt")
    assert used.calls == 2  # what training itself changes is no setting
    fit(method, DATA, config=config, callbacks=[used], checkpoint=tmp_path / "run.pt")
    fit(Stack(), DATA, config=config, callbacks=[Hook()], checkpoint=tmp_path / "run.pt")


# A longer run


def scripted(*values: float) -> Any:
    left = list(values)
    return lambda logits, batch: {"accuracy": left.pop(0)}


@pytest.mark.parametrize("settings", [{"select": "best"}, {"select": "best", "patience": 2}, {"select": "last"}])
def test_the_best_epoch_and_the_patience_of_a_longer_run_are_those_of_one_run(tmp_path: Path, settings: Any) -> None:
    values = (0.5, 0.9, 0.7, 0.6, 0.95, 0.2)
    run = lambda method, epochs, *values, path=None: fit(
        method, DATA, DATA, TrainConfig(epochs=epochs, lr=0.1, **settings), metrics=scripted(*values), checkpoint=path
    )
    whole, path = Stack(), tmp_path / "run.pt"
    again = {k: v.clone() for k, v in whole.state_dict().items()}
    expected = run(whole, 6, *values)
    (first := Stack()).load_state_dict(again)
    run(first, 3, *values[:3], path=path)
    history = run(second := Stack(), 6, *values[3:], path=path)
    assert torch.equal(weights(second), weights(whole))
    assert history.best_epoch == expected.best_epoch == (2 if "patience" in settings else 5)
    assert [r["valid_accuracy"] for r in history.epochs] == [r["valid_accuracy"] for r in expected.epochs]
    assert run(Stack(), 9, path=path).epochs == history.epochs if "patience" in settings else True


def decay(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def halves(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, steps // 2, 0.5)


def test_a_schedule_that_needs_the_end_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    config = lambda schedule, epochs: TrainConfig(
        epochs=epochs, select="last", batch_size=12, schedule=schedule, optimizer="adamw"
    )
    for schedule in ("cosine", "linear-warmup-cosine", "onecycle", halves):
        fit(Stack(), DATA, config=config(schedule, 2), checkpoint=path)
        named = getattr(schedule, "__qualname__", schedule)
        with pytest.raises(
            ValueError, match=rf"run\.pt is of 4 optimizer steps and this run of 8, .*{named}.* number of"
        ):
            fit(Stack(), DATA, config=config(schedule, 4), checkpoint=path)
        path.unlink()

    whole = Stack()
    start = copy.deepcopy(whole)
    expected = fit(whole, DATA, config=config(decay, 4))
    fit(start, DATA, config=config(decay, 2), checkpoint=path)
    history = fit(again := Stack(), DATA, config=config(decay, 4), checkpoint=path)
    assert torch.equal(weights(again), weights(whole))
    assert [r["lr"] for r in history.epochs] == [r["lr"] for r in expected.epochs] == [1e-3, 5e-4, 2.5e-4, 2.5e-4]

    # Halved at step 8 of 16: the first two of 8 epochs know nothing of it, and the two of 4 neither.
    path.unlink()
    fit(whole := Stack(), DATA, config=config(halves, 8))

    class Stop:
        def on_epoch_end(self, state: Any) -> None:
            if state.epoch == 2 and state.config.epochs == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Stack(), DATA, config=config(halves, 6), checkpoint=path, callbacks=[Stop()])
    history = fit(Stack(), DATA, config=config(halves, 8), checkpoint=path, callbacks=[Stop()])
    assert [r["lr"] for r in history.epochs] == [1e-3] * 3 + [5e-4] * 4 + [2.5e-4]


def test_what_a_longer_run_cannot_go_on_from_is_said(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    config = lambda **budget: TrainConfig(select="last", batch_size=6, **budget)  # 4 steps an epoch
    fit(Stack(), DATA, config=config(steps=6), checkpoint=path)
    assert len(fit(Stack(), DATA, config=config(steps=6), checkpoint=path).epochs) == 2
    with pytest.raises(
        ValueError, match=r"run\.pt is of 6 optimizer steps and this run of 9, but it ended within epoch 2"
    ):
        fit(Stack(), DATA, config=config(steps=9), checkpoint=path)
    with pytest.raises(ValueError, match=r"is of 6 optimizer steps and this run of 4, fewer than the 6 it has taken"):
        fit(Stack(), DATA, config=config(epochs=1), checkpoint=path)
    path.unlink()
    fit(Stack(), DATA, config=config(epochs=2), checkpoint=path)  # the same number, said otherwise
    assert [r["step"] for r in fit(Stack(), DATA, config=config(steps=10), checkpoint=path).epochs] == [4, 8, 10]


# Damaged, foreign and incomplete files


def flipped(content: bytes, places: int) -> Iterator[bytes]:
    """Copies of a file with one bit changed each, at places all over it and in its last bytes."""
    rng = np.random.default_rng(0)
    at = {*rng.choice(len(content), places - 40, replace=False).tolist(), *range(len(content) - 20, len(content))}
    for place in [*sorted(at), *range(20)]:
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        yield bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weights", "checkpoint"])
def test_no_flipped_bit_passes(tmp_path: Path, kind: str) -> None:
    path, method = tmp_path / "a file.pt", Stack()
    config = TrainConfig(epochs=1, select="last", batch_size=12)
    if kind == "weights":
        save(method, path, note="x")
        read = lambda: load(method, path)
    else:
        fit(method, DATA, config=config, checkpoint=path)
        read = lambda: fit(method, DATA, config=config, checkpoint=path)
    whole = path.read_bytes()
    before = weights(method)
    for content in flipped(whole, 200 if kind == "weights" else 80):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^a file\.pt: expected a file written by mmlib .* checksum"):
            read()
    for content in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"x", whole[:-77], b"PK\x03\x04", whole[-77:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^a file\.pt: expected a file written by mmlib .* checksum"):
            read()
    assert torch.equal(weights(method), before)
    path.write_bytes(whole)
    read()


def rewritten(path: Path, **changes: Any) -> None:
    """The same file with other content, sealed again."""
    content = {k: v for k, v in torch.load(path, weights_only=True).items() if k not in ("format", "version")}
    kind = changes.pop("kind", "mmlib-checkpoint")
    checkpoint._write(path, kind, {k: v for k, v in {**content, **changes}.items() if v is not GONE})


GONE = object()


@pytest.mark.slow
def test_a_checkpoint_without_its_keys_or_with_other_types_names_file_and_key(tmp_path: Path) -> None:
    path, config = tmp_path / "run.pt", TrainConfig(epochs=2, select="last", batch_size=12, schedule="cosine")
    hook = Stored()
    resume = lambda: fit(Stack(), DATA, config=config, checkpoint=path, callbacks=[hook])
    resume()
    whole = path.read_bytes()
    keys = [k for k in torch.load(path, weights_only=True) if k not in ("format", "version")]
    assert len(keys) == 17
    for key in keys:
        for value, said in ((GONE, "is missing"), (b"x", "expected .*, got bytes"), (3j, "expected .*, got complex")):
            path.write_bytes(whole)
            rewritten(path, **{key: value})
            with pytest.raises(ValueError, match=rf"^run\.pt: '{key}':? {said}"):
                resume()
    for key, value in (
        ("optimizer", {"state": {}}),
        ("optimizer", {}),
        ("scheduler", {}),
        ("method", {"net.1.weight": torch.zeros(3, 6)}),
        ("method", {"net.1.weight": 1, "net.1.bias": 2}),
        ("callbacks", []),
        ("callbacks", [{"wrong": 1}]),
        ("best", {"epoch": 1}),
        ("random", []),
        ("random", [{"python": 1}]),
    ):
        path.write_bytes(whole)
        rewritten(path, **{key: value})
        with pytest.raises(ValueError, match=rf"^run\.pt: '{key}' does not fit this run \("):
            resume()
    for version in (1, 3, "2", None):
        path.write_bytes(whole)
        rewritten(path, version=version)
        with pytest.raises(ValueError, match=rf"^run\.pt: expected version 2, got {version!r}"):
            resume()
    path.write_bytes(whole)
    resume()


class Stored:
    """A hook with a state."""

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state["n"]


def test_weights_without_their_keys_or_with_other_types_name_file_and_key(tmp_path: Path) -> None:
    path, method = tmp_path / "w.pt", Stack()
    save(method, path)
    whole = path.read_bytes()
    for key in ("method", "weights", "facts"):
        for value, said in ((GONE, "is missing"), (3, "expected .*, got int"), (None, "expected .*, got NoneType")):
            path.write_bytes(whole)
            rewritten(path, kind="mmlib-weights", **{key: value})
            with pytest.raises(ValueError, match=rf"^w\.pt: '{key}':? {said}"):
                load(method, path)
    path.write_bytes(whole)
    rewritten(path, kind="mmlib-weights", weights={"net.1.weight": "no", "net.1.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"^w\.pt .*: 'net.1.weight' is str there, expected a tensor"):
        load(method, path)
    torch.save({"weights": {}}, path)  # of torch itself, or of an earlier version
    with pytest.raises(ValueError, match=r"^w\.pt: .* checksum at the end, which is not there; .* earlier version"):
        load(method, path)


def test_the_files_stay_archives_that_torch_and_zip_read(tmp_path: Path) -> None:
    save(method := Stack(), tmp_path / "w.pt", note="x")
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    assert content["facts"] == {"note": "x"}
    assert torch.equal(content["weights"]["net.1.weight"], method.net[1].weight)
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"mmlib-sha256:")
