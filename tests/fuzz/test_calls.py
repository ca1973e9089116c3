"""Bad calls of everything that is public: each ends in an error whose text names the argument, none inside torch.

`CASES` has a good call of every public function, class and method, which must pass, and the kind of each argument; the
kinds say what is put in an argument's place, one at a time. A new public name without a case fails here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmlib
from book.support import experiments, figures, results
from mmlib import (
    backbones,
    coalitions,
    data,
    files,
    gradients,
    layers,
    losses,
    metrics,
    missing,
    sklearn,
    statistics,
    training,
)
from mmlib.backbones import alone, base, completed, dialogue, mmgcn, selfmm
from mmlib.baselines import cggm, joint, mbt_sample, ogm_ge, pmr
from mmlib.batch import MultimodalBatch, MultimodalDataset, frame_axis, in_parts, per_frame, stable_ids
from mmlib.data import avmnist, conversations, iemocap, mfeat, mmsa, synthetic, text
from mmlib.data import dialogue as dialogue_files
from mmlib.methods import balm, dear, dream, mce
from mmlib.methods.released import balm as released_balm
from mmlib.methods.released import dear as other_dear
from mmlib.methods.released import dream as other_dream
from mmlib.methods.released import mce as released_mce
from mmlib.missing import MissingMask, MissingPlan
from mmlib.training import TrainConfig

torch.set_num_threads(1)
Kind = Callable[[Any], list[Any]]  # the good value -> bad ones


# --- what is put in an argument's place -------------------------------------------------------------------------------


def number(*out: Any) -> Kind:
    return lambda good: ["1", None, math.nan, [1.0], True, torch.ones(2), *out]


def whole(*out: Any) -> Kind:
    return lambda good: ["1", None, 1.5, True, [1], *out]


def flag(good: Any) -> list[Any]:
    return ["yes", None, 1, []]


def choice(good: Any) -> list[Any]:
    return ["no such choice", 3, None, ["a"]]


def word(good: Any) -> list[Any]:
    return [3, None, ["a"]]


def words(good: Any) -> list[Any]:
    return [3, None, [3], ["no such name"]]


def thing(good: Any) -> list[Any]:
    """Of some class."""
    return [None, "x", 3, {}, object(), torch.zeros(3, 2)]


def thing_but_tensor(good: Any) -> list[Any]:
    return thing(good)[:-1]


def function(good: Any) -> list[Any]:
    return [None, "x", 3, []]


def path(good: Any) -> list[Any]:
    return [None, 3, [], object()]


def by_name(good: Any) -> list[Any]:
    return [None, "x", 3, [1], {3: 3}]


def typed(good: torch.Tensor) -> list[Any]:
    """A tensor: other things, and tensors of other numbers."""
    kinds = [torch.zeros(good.shape, dtype=torch.complex64)]
    if good.is_floating_point():
        kinds += [good.long(), good > 0]
    elif good.dtype == torch.bool:
        kinds += [good.float(), good.long()]
    else:
        kinds += [good.float()]
    return [None, "x", 3, [[1, 2]], {}, good.detach().numpy(), *kinds]


def shaped(good: torch.Tensor) -> list[Any]:
    """A tensor whose shape must fit the others', or have a number of axes."""
    return [*typed(good), good[:-1], good.flatten()[0], good[None, None]]


def array(good: Any) -> list[Any]:
    """What NumPy can make an array of."""
    bad = [None, "x", {}, ["a", "b"], [], [1j, 1j], [[1, 2], [3]], object()]
    return bad + ([np.full(np.shape(good), np.nan)] if np.size(good) else [])


def rates(good: Any) -> list[Any]:
    return [None, "x", [], 1.5, [1.5] * 3, [math.nan] * 3, ["a"] * 3, [-0.1, 0.5, 0.5]]


# --- what good calls are made of --------------------------------------------------------------------------------------

G = torch.Generator().manual_seed(0)
R = lambda *shape: torch.randn(shape, generator=G)
B = lambda *shape: torch.rand(shape, generator=G) < 0.7
I = lambda high, *shape: torch.randint(high, shape, generator=G)  # noqa: E741
ONES = lambda *shape: torch.ones(shape, dtype=torch.bool)


@functools.cache
def splits() -> dict[str, MultimodalDataset]:
    return data.load("synthetic", sizes=(24, 12, 12), frames=4, widths=6)


@functools.cache
def talk() -> MultimodalDataset:
    return data.load("conversations", sizes=(6, 3, 3), lengths=(3, 5))["train"]


@functools.cache
def scores() -> MultimodalDataset:
    return data.load("synthetic", task="regression", sizes=(24, 12, 12), frames=4, widths=6)["train"]


def train() -> MultimodalDataset:
    return splits()["train"]


SHAPES = {"language": (4, 6), "audio": (4, 6), "vision": (4, 6)}
NAMES = tuple(SHAPES)


@functools.cache
def net() -> backbones.GenericBackbone:
    return backbones.GenericBackbone.for_data(train(), width=4)


@functools.cache
def bounds() -> alone.UpperBounds:
    return alone.UpperBounds(torch.rand(24, 3, generator=G), train().ids, NAMES)


@functools.cache
def judge() -> Any:
    return backbones.MLPEvaluator.for_data(train(), width=4).eval()


@functools.cache
def methods() -> dict[str, Any]:
    return {
        "joint": joint.JointTraining(net()),
        "mce": mce.MCE(net(), bounds(), attention_heads=2, hidden=4, present=train().present),
        "balm": balm.BALM(net(), SHAPES),
        "cggm": cggm.CGGM(net()),
        "ogm": ogm_ge.OGMGE(net()),
        "pmr": pmr.PMR(net(), 4),
        "mbt": mbt_sample.MBTSample(net()),
        "dear": dear.DEAR(feature_shapes=SHAPES, outputs=4, regression=False, width=8, heads=2, head_width=4, layers=1),
        "dream": dream.DREAM(judge(), feature_shapes=SHAPES, outputs=4, width=8, heads=2),
    }


@functools.cache
def other() -> other_dream.OtherDREAM:
    return dream.DREAM(judge(), feature_shapes=SHAPES, outputs=4, width=8, heads=2, empty="majority")


def batch() -> MultimodalBatch:
    return train()[:6]


def wrong_batches(good: Any) -> list[Any]:
    return [*thing(good), batch().select(["audio", "vision"]), batch().select(list(reversed(NAMES)))]


def wrong_data(good: Any) -> list[Any]:
    return [*thing(good), train().select(["audio", "vision"])]


@functools.cache
def mask() -> MissingMask:
    return MissingPlan("bernoulli", 0.3).draw(train())


SMALL = dict(feature_shapes=SHAPES, outputs=4)
DEAR = lambda **o: dear.DEARConfig(**SMALL, regression=False, width=8, heads=2, head_width=4, **o)
DREAM = lambda **o: dream.DREAMConfig(**SMALL, width=8, heads=2, **o)


# --- the cases: a good call and the kind of each argument -------------------------------------------------------------
# fmt: off
CASES: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], dict[str, Kind]]] = {}
FOLDER = Path()  # a temporary one, see `folder`


def case(name: str, call: Callable[..., Any], good: Callable[[], dict[str, Any]], /, **kinds: Kind) -> None:
    assert name not in CASES, name
    CASES[name] = (call, good, kinds)


P, L = typed, shaped
FIVE = whole(-5)
POSITIVE = whole(-5, 0)
SHARE = number(-0.5, 1.5, math.inf)
STRENGTH = number(-0.5, math.inf)

# losses
TARGET = lambda good: [None, "x", 3, [1, 2], I(3, 5, 1).float(), I(3, 4), I(3, 5) + 3, I(3, 5).int()]
case("losses.sample_losses", losses.sample_losses, lambda: dict(logits=R(5, 3), target=I(3, 5), lead=1),
     logits=L, target=TARGET, lead=whole(0, 2))
case("losses.task_loss", losses.task_loss, lambda: dict(logits=R(5, 3), target=I(3, 5), weight=torch.rand(5), lead=1),
     logits=L, target=TARGET, weight=lambda good: ["x", 3, [1.0], torch.rand(4), torch.rand(5, 1)], lead=whole(0, 2))
WEIGHT = lambda good: ["x", 3, [1.0], good[:-1], good[None]]
for f, more in ((losses.mmd, {"bandwidths": lambda good: ["x", 3, [], [0.0], [math.nan], ["a"], [-1.0]]}),
                (losses.sinkhorn, {"epsilon": number(0.0, -1.0, math.inf), "iterations": POSITIVE})):
    case(f"losses.{f.__name__}", f,
         lambda more=more: dict(x=R(5, 3), y=R(4, 3), x_weight=torch.rand(5), y_weight=torch.rand(4),
                                **({"bandwidths": [0.5]} if "bandwidths" in more else {"epsilon": 0.1,
                                "iterations": 3})),
         x=L, y=L, x_weight=WEIGHT, y_weight=WEIGHT, **more)

# layers and batch
case("layers.MLP", layers.MLP, lambda: dict(widths=[3, 4, 2], dropout=0.1),
     widths=lambda good: [None, "x", 3, [], [3], [3, 0], [3, "a"], [3, 2.5]], dropout=SHARE)
case("layers.as_frames", layers.as_frames, lambda: dict(x=R(2, 3, 4)), x=lambda good: [None, "x", 3, R(2)[0],
     good.tolist()])
case("layers.check_fits", layers.check_fits, lambda: dict(batch=batch(), feature_shapes=SHAPES), batch=wrong_batches,
     feature_shapes=lambda good: [])  # as a configuration has checked them
case("losses.check_target", losses.check_target, lambda: dict(target=torch.rand(3), regression=True),
     target=lambda good: [None, "x", 3, I(3, 5), R(3, 4)], regression=lambda good: [])
case("batch.in_parts", lambda data, batch_size: list(in_parts(data, batch_size)),
     lambda: dict(data=train(), batch_size=8), data=thing, batch_size=POSITIVE)
case("layers.frame_shapes", layers.frame_shapes, lambda: dict(feature_shapes=SHAPES),
     feature_shapes=lambda good: [*by_name(good), {"a": 3}, {"a": (3,)}, {"a": (0, 2)}, {"a": (1, 2, 3, 4, 5)},
     {"a": ("x",)}])
case("layers.masked_mean", layers.masked_mean, lambda: dict(x=R(2, 4, 3), mask=ONES(2, 4)),
     x=lambda good: [None, "x", 3, good.tolist(), good[:, :3]], mask=L)
case("layers.kept_modalities", layers.kept_modalities, lambda: dict(present=ONES(2, 3), rate=0.3),
     present=lambda good: [None, "x", 3, good.float(), good.tolist()], rate=SHARE)
case("layers.scoring", lambda modules: layers.scoring(modules).__enter__(), lambda: dict(modules=net()), modules=thing)
case("frame_axis", frame_axis, lambda: dict(x=R(2, 3, 4), lead=1),
     x=lambda good: [None, "x", 3, R(2)], lead=whole(-1, 0, 7))
case("per_frame", per_frame, lambda: dict(mask=ONES(2, 3), x=R(2, 3, 4)),
     mask=lambda good: [None, "x", 3, good.float(), ONES(2, 7), ONES(2)], x=lambda good: [None, "x", 3, R(2)])
case("batch.stable_ids", stable_ids, lambda: dict(names=["a", 3]), names=lambda good: [None, 3, 1.5])

# coalitions
TABLE = lambda good: [None, "x", 3, [1.0], good[..., :3], good[0, 0], torch.zeros(good.shape, dtype=torch.complex64)]
GAME = lambda masks: masks.sum(-1).float()
VALUE = lambda good: [*function(good), lambda masks: None, lambda masks: torch.zeros(1), lambda m: GAME(m) * math.nan]
case("coalitions.coalition_masks", coalitions.coalition_masks, lambda: dict(M=3, device="cpu"),
     M=whole(0, -1, 17), device=lambda good: [3, "no such device", []])
case("coalitions.cut_table", coalitions.cut_table, lambda: dict(table=I(3, 2, 8), kept=ONES(2, 3)),
     table=TABLE, kept=lambda good: [None, "x", 3, good.float(), good[:, :2], good[:1]])
case("coalitions.shapley_weights", coalitions.shapley_weights, lambda: dict(M=3), M=whole(0, -1))
case("coalitions.shapley_values", coalitions.shapley_values, lambda: dict(v=R(2, 8)),
     v=lambda good: [*TABLE(good), good * math.nan, good * math.inf])
case("coalitions.prediction_shift_score", coalitions.prediction_shift_score, lambda: dict(predictions=I(3, 2, 8)),
     predictions=lambda good: [*TABLE(good), good.float()])
case("coalitions.prediction_accuracy_score", coalitions.prediction_accuracy_score,
     lambda: dict(predictions=I(3, 2, 8), target=I(3, 2)), predictions=TABLE,
     target=lambda good: [None, "x", 3, [1, 2], good.float() + 0.5, I(3, 5)])
ORDERS = lambda good: [None, "x", 3, good.float(), good.tolist(), good[0, 0]]
case("coalitions.arrival_codes", coalitions.arrival_codes,
     lambda: dict(orders=torch.tensor([[[0, 1, 2]], [[2, 1, 0]]]), present=ONES(2, 3)),
     orders=lambda good: [*ORDERS(good), good + 1, good * 0],
     present=lambda good: ["x", 3, good.float(), good[:, :2], good[:1]])
case("coalitions.arrival_credit", coalitions.arrival_credit,
     lambda: dict(gains=R(4, 1, 3), orders=torch.tensor([[2, 0, 1]])), gains=lambda good: [None, "x", 3, good.long()],
     orders=lambda good: [None, "x", 3, good.float(), good[:, :2], good[0], good[:0]])
case("coalitions.permutation_shapley", coalitions.permutation_shapley,
     lambda: dict(value=GAME, present=ONES(2, 3), orders=torch.tensor([[[0, 1, 2]], [[2, 1, 0]]])), value=VALUE,
     present=L,
     orders=lambda good: [*L(good), good + 1, good * 0])
case("coalitions.monte_carlo_shapley", coalitions.monte_carlo_shapley,
     lambda: dict(value=GAME, present=ONES(2, 3), permutations=3, generator=torch.Generator(), antithetic=True),
     value=VALUE, present=lambda good: [*P(good), good[0], good[None]], permutations=POSITIVE,
     generator=lambda good: ["x", 3, []], antithetic=flag)
case("coalitions.discrete_predictions", coalitions.discrete_predictions,
     lambda: dict(logits=R(4, 1), regression=True, how="round7", multilabel=False),
     logits=lambda good: [*P(good), R(4, 2), R(1)[0]], regression=flag, how=choice, multilabel=flag)
case("coalitions.accuracy_values", coalitions.accuracy_values,
     lambda: dict(logits=R(8, 5, 3), target=I(3, 5), masks=coalitions.coalition_masks(3), present=ONES(5, 3), empty=0.0,
                  tolerance=0.5),
     logits=L, target=lambda good: [None, "x", 3, [1], good[:-1], good.float()],
     masks=lambda good: ["x", 3, [True], good.float(), good[:-1], good[0]],
     present=lambda good: ["x", 3, [True], good.float(), good[:-1], good[:, :2]],
     empty=lambda good: ["x", [1.0], math.nan, True], tolerance=STRENGTH)
MASKS = lambda good: [*P(good), good[:, :2], good[0], good[:0], good[None, None]]
LEVEL = lambda good: ["x", 3, [], {"language": R(6, 4)}, {"a": 3}]
case("coalitions.coalition_logits", coalitions.coalition_logits,
     lambda: dict(model=net(), batch=batch(), masks=coalitions.coalition_masks(3), absent="zero_input",
     use_present=True,
                  max_rows=4, encodings=net().encode(batch())),
     model=thing, batch=wrong_batches, masks=MASKS, absent=choice, use_present=flag,
     max_rows=lambda good: ["1", 0, -1, 1.5], encodings=LEVEL)
case("coalitions.coalition_rows", coalitions.coalition_rows,
     lambda: dict(model=net(), batch=batch(), row=torch.tensor([0, 1]), members=ONES(2, 3), absent="zero_feature",
                  encodings=net().encode(batch())),
     model=thing, batch=wrong_batches, row=lambda good: [*L(good), good + 6, good - 9], members=L, absent=choice,
     encodings=LEVEL)
case("coalitions.subset_values", coalitions.subset_values,
     lambda: dict(model=net(), batch=batch(), empty=0.0, tolerance=0.5), model=thing,
     batch=lambda good: [*wrong_batches(good), batch().replace(target=None)], empty=lambda good: ["x", math.nan],
     tolerance=STRENGTH)
case("coalitions.subset_predictions", coalitions.subset_predictions,
     lambda: dict(model=net(), batch=batch(), regression=False, how="sign_ge", multilabel=False), model=thing,
     batch=wrong_batches, regression=flag, how=choice, multilabel=flag)

# metrics
CLASSES = lambda good: [*array(good), good[:-1], good + 0.5, good - 9]
PROBS = lambda good: [*array(good), good[:-1], good * 3, -good, good[:, :1]]
Y = lambda: np.array([0, 1, 2, 1])
Q = lambda: np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.3, 0.4, 0.3]])
case("metrics.sentiment_classes", metrics.sentiment_classes, lambda: dict(scores=[0.1, -2.0], convention="acc7"),
     scores=array, convention=choice)
case("metrics.weighted_f1", metrics.weighted_f1, lambda: dict(pred=Y(), target=Y()), pred=CLASSES, target=CLASSES)
case("metrics.msa_scores", metrics.msa_scores, lambda: dict(pred=Y() - 1.5, target=Y() - 1.0, scale="mosi"),
     pred=lambda good: [*array(good), good[:-1]], target=lambda good: [*array(good), good[:-1]], scale=choice)
case("metrics.classification_scores", metrics.classification_scores,
     lambda: dict(pred=Y(), target=Y(), classes=3, per_class=True), pred=CLASSES, target=CLASSES,
     classes=lambda good: ["3", 0, 2, 1.5, True], per_class=flag)
case("metrics.one_vs_rest_f1", metrics.one_vs_rest_f1, lambda: dict(pred=Y(), target=Y(), classes=3), pred=CLASSES,
     target=CLASSES, classes=lambda good: ["3", 0, 2, 1.5, True])
YES = lambda good: [*array(good), good[:-1], good[0], good.astype(int) * 3]
case("metrics.multilabel_scores", metrics.multilabel_scores,
     lambda: dict(pred=np.eye(3) - 0.5, target=np.eye(3, dtype=bool), threshold=0.1),
     pred=lambda good: [*array(good), good[:-1], good[0]], target=lambda good: [*YES(good), good + 0.5],
     threshold=number(math.inf))
case("metrics.auilc", metrics.auilc, lambda: dict(rates=[0.0, 0.5, 0.9], scores=[0.9, 0.8, 0.7], normalise=True),
     rates=lambda good: [*array(good), [0.5, 0.2, 0.9], [0.0, 0.5, 1.5], [0.1, 0.2]],
     scores=lambda good: [*array(good), [0.1, 0.2]], normalise=flag)
WORST = lambda good: [None, "x", 3, {}, {"a": "b"}, {"a": None}, {"a": [1.0], "b": [1.0, 2.0]}, {"a": {}}]
case("metrics.worst_pattern", metrics.worst_pattern, lambda: dict(scores={"a": 0.5, "b": 0.4}, higher_is_better=True),
     scores=lambda good: [*WORST(good), {"a": math.nan}], higher_is_better=flag)
case("metrics.pattern_average", metrics.pattern_average,
     lambda: dict(scores={"a": 0.5, "b": 0.4}, weights={"a": 1.0, "b": 2.0}), scores=WORST,
     weights=lambda good: ["x", 3, [], {}, {"a": 1.0}, {"a": -1.0, "b": 1.0}, {"a": "x", "b": 1}, {"a": 0, "b": 0}])
BINS = whole(0, -5)
for f in (metrics.reliability_bins, metrics.ece, metrics.calibration_scores):
    case(f"metrics.{f.__name__}", f, lambda: dict(probabilities=Q(), target=Y(), bins=5), probabilities=PROBS,
         target=CLASSES, bins=BINS)
for f in (metrics.brier, metrics.risk_coverage):
    case(f"metrics.{f.__name__}", f, lambda: dict(probabilities=Q(), target=Y()), probabilities=PROBS, target=CLASSES)
case("metrics.equity", metrics.equity, lambda: dict(shapley=Q(), present=Q() > 0, among="present"),
     shapley=lambda good: [*array(good), good[:, :1], good[0]], present=lambda good: ["x", 3, good[:-1], good * 1.0],
     among=choice)
case("metrics.learning_balance", metrics.learning_balance, lambda: dict(rms_gradients=Q()),
     rms_gradients=lambda good: [*array(good), -good, good[:, :1], good[0]])
case("metrics.t_interval", metrics.t_interval, lambda: dict(values=[0.1, 0.2, 0.4], level=0.9), values=array,
     level=number(0.0, 1.0, -1.0))

# missingness
N = dict(n=POSITIVE, rates=rates, generator=lambda good: ["x", 3, []])
for f in (missing.bernoulli_mask, missing.exact_count_mask, missing.imbalanced_mask):
    case(f"missing.{f.__name__}", f, lambda: dict(n=10, rates=[0.1, 0.5, 0.3], generator=torch.Generator()), **N)
LENGTHS = lambda good: [None, "x", 3, [1.5] * 3, [], good + 9, good - 9, good.float(), good[None, None], good > 0]
case("missing.frame_mask", missing.frame_mask,
     lambda: dict(lengths=torch.tensor([3, 5, 1]), max_len=5, rate=0.5, generator=torch.Generator(), keep_ends=True,
                  keep_one=True),
     lengths=LENGTHS, max_len=whole(0, 2, -3), rate=lambda good: [None, "x", 1.5, -0.1, math.nan, [0.5, 0.5], True, {}],
     generator=N["generator"], keep_ends=flag, keep_one=flag)
case("missing.heterogeneous_mask", missing.heterogeneous_mask,
     lambda: dict(lengths=torch.tensor([[3, 5], [2, 2]]), max_len=[3, 5], eta=0.5, generator=torch.Generator()),
     lengths=LENGTHS, max_len=lambda good: [None, "x", 1, [3], [3, 0], [3, "a"], 1.5], eta=SHARE,
     generator=N["generator"])
case("missing.lnln_protocol", missing.lnln_protocol,
     lambda: dict(seed=0, static_masks=False, rates=[0.0, 0.5], test_seed=1, keep_ends=("language",)), seed=whole(),
     static_masks=flag, rates=rates, test_seed=whole(), keep_ends=lambda good: [3, [3], {}])
case("missing.MissingMask", MissingMask,
     lambda: dict(present=ONES(4, 2), observed={"a": ONES(4, 3)}, ids=torch.arange(4), modalities=["a", "b"],
                  plan=MissingPlan("none"), epoch=1, available=ONES(4, 2), frames={"a": 12}, restored=0),
     present=L, observed=lambda good: ["x", 3, {"c": ONES(4, 3)}, {"a": ONES(3, 3)}, {"a": 3}, {"a": R(4, 3)}],
     ids=lambda good: [*L(good), good * 0, good.int()], modalities=lambda good: [None, "ab", 3, [], ["a"], [1, 2]],
     plan=lambda good: ["x", 3, {}], epoch=lambda good: ["1", -1, 1.5],
     available=lambda good: ["x", 3, [True], good.float(), good[:-1]],
     frames=lambda good: ["x", 3, {"a": -1}, {"a": "x"}], restored=FIVE)
case("missing.MissingMask.to", lambda device: mask().to(device), lambda: dict(device="cpu"),
     device=lambda good: [None, 3, "no such device"])
case("missing.MissingMask.rows", lambda ids: mask().rows(ids), lambda: dict(ids=train().ids),
     ids=lambda good: [*P(good), torch.tensor([1, 2])])
case("missing.MissingMask.apply", lambda dataset, keep_complete: mask().apply(dataset, keep_complete),
     lambda: dict(dataset=train(), keep_complete=True),
     dataset=lambda good: [*thing(good), splits()["valid"], train().data.replace(ids=None)], keep_complete=flag)
case("missing.MissingMask.save", lambda path: mask().save(path), lambda: dict(path=FOLDER / "mask.pt"), path=path)
case("missing.MissingMask.load", MissingMask.load, lambda: dict(path=(mask().save(FOLDER / "m.pt"),
     FOLDER / "m.pt")[1]),
     path=lambda good: [*path(good), FOLDER / "none.pt", FOLDER])
case("missing.MissingPlan.from_dict", MissingPlan.from_dict, lambda: dict(settings={"kind": "none"}),
     settings=lambda good: [None, "x", 3, {"kin": "none"}, {"kind": "none", "rate": 3}])
PLAN = MissingPlan("bernoulli", 0.3)
case("missing.MissingPlan.draw", PLAN.draw, lambda: dict(dataset=train(), epoch=1, device="cpu"),
     dataset=lambda good: [*thing(good), train().data.replace(ids=None), MultimodalDataset(train()[[0, 0]])],
     epoch=lambda good: ["1", -1, 1.5, True], device=lambda good: [3, "no such device"])

# backbones
TALK = lambda good: [*thing(good), train()]
for cls, config in (
    (backbones.GenericBackbone, backbones.GenericConfig(**SMALL, width=4)),
    (backbones.AVMNISTBackbone, backbones.AVMNISTConfig()),
    (backbones.CubeMLPBackbone, backbones.CubeMLPConfig(**SMALL, width=4)),
    (backbones.Table3Evaluator, backbones.EvaluatorConfig(**SMALL, width=4)),
    (backbones.MLPEvaluator, backbones.EvaluatorConfig(**SMALL, width=4)),
    (backbones.CorrKDEvaluator, backbones.CorrKDConfig(**SMALL, width=4, heads=2)),
    (backbones.SelfMMEvaluator, backbones.SelfMMConfig(**SMALL, width=4, lstm=4, audio=4, text_width=4)),
    (backbones.GCNetBackbone, backbones.GCNetConfig({"a": 3}, width=4, hidden=4)),
    (backbones.MMGCNBackbone, backbones.MMGCNConfig({"a": 3}, width=4, hidden=4)),
    (backbones.MMDFNBackbone, backbones.MMDFNConfig({"a": 3}, width=4, hidden=4)),
    (backbones.MMINBackbone, backbones.MMINConfig({"a": 3}, width=4)),
):
    has_default = inspect.signature(cls).parameters["config"].default is None
    case(f"backbones.{cls.__name__}", cls, lambda config=config: dict(config=config),
         config=(lambda good: thing(good)[1:]) if has_default else thing)
case("backbones.AVMNISTBackbone.for_data", backbones.AVMNISTBackbone.for_data,
     lambda: dict(data=MultimodalDataset.from_arrays({"image": R(4, 1, 28, 28)}, torch.arange(4), classes=4)),
     data=thing)
for cls in (backbones.GenericBackbone, backbones.CubeMLPBackbone, backbones.MMINBackbone, backbones.MLPEvaluator):
    case(f"backbones.{cls.__name__}.for_data", cls.for_data, lambda: dict(data=train()), data=thing)
    case(f"backbones.{cls.__name__}()", lambda batch, cls=cls: cls.for_data(train(), width=4)(batch),
         lambda: dict(batch=batch()), batch=lambda good: [*wrong_batches(good), scores()[:3].replace(
             features={m: x[:3].double() for m, x in scores()[:3].features.items()})])
for cls in (backbones.GCNetBackbone, backbones.MMGCNBackbone, backbones.MMDFNBackbone):
    preset = {} if cls is backbones.GCNetBackbone else {"preset": choice}
    case(f"backbones.{cls.__name__}.for_data", cls.for_data,
         lambda preset=preset: dict(data=talk(), **({"preset": "balm"} if preset else {})), data=TALK, **preset)
    case(f"backbones.{cls.__name__}()", lambda batch, cls=cls: cls.for_data(talk(), width=4, hidden=4)(batch),
         lambda: dict(batch=talk()[:2]), batch=lambda good: [*thing(good), batch(), good.select(["audio", "vision"])])
case("backbones.Backbone", backbones.Backbone, lambda: dict(encode_absent=True), encode_absent=flag)
case("backbones.DialogueBackbone", backbones.DialogueBackbone,
     lambda: dict(input_widths={"a": 3}, speakers=2, encode_absent=True),
     input_widths=lambda good: [*by_name(good), {}, {"a": 0}, {"a": "x"}], speakers=POSITIVE, encode_absent=flag)
case("base.outputs_of", base.outputs_of, lambda: dict(data=train()),
     data=lambda good: [*thing(good), MultimodalDataset(batch().replace(target=None))])
ONCE = TrainConfig(epochs=1, device="cpu", select="last")
case("base.pretrain", base.pretrain, lambda: dict(model=net(), train=train(), valid=splits()["valid"], config=ONCE),
     model=thing, train=wrong_data, valid=lambda good: wrong_data(good)[1:], config=lambda good: ["x", 3, {}])
case("dialogue.real_utterances", dialogue.real_utterances, lambda: dict(batch=talk()[:2]), batch=thing)
case("dialogue.speaker_numbers", dialogue.speaker_numbers, lambda: dict(batch=talk()[:2], speakers=2), batch=thing,
     speakers=POSITIVE)
case("dialogue.run_packed", dialogue.run_packed,
     lambda: dict(rnn=torch.nn.GRU(3, 4, batch_first=True), x=R(2, 5, 3), keep=ONES(2, 5)), rnn=thing,
     x=lambda good: [*L(good), good[..., :2]], keep=L)
case("selfmm.unimodal_labels", selfmm.unimodal_labels,
     lambda: dict(target=R(4), fused=R(4, 3), single=R(4, 2), fused_centres=R(2, 3), single_centres=R(2, 2), scale=3.0),
     target=L, fused=L, single=L, fused_centres=L, single_centres=L, scale=number(0.0, -1.0, math.inf))
case("selfmm.SelfMMTraining", selfmm.SelfMMTraining,
     lambda: dict(backbone=backbones.SelfMMEvaluator.for_data(scores(), width=4), train=scores(), scale=3.0),
     backbone=thing, train=lambda good: [*thing(good), train()], scale=number(0.0, -1.0, math.inf))
GRAPH = dict(nodes=lambda good: [*L(good), good[..., 0]], real=L, cross_weight=STRENGTH)
case("mmgcn.dialogue_graph", mmgcn.dialogue_graph, lambda: dict(nodes=R(2, 3, 4, 5), real=ONES(2, 4), cross_weight=1.0),
     **GRAPH)
case("mmgcn.propagate", mmgcn.propagate,
     lambda: dict(graph=mmgcn.dialogue_graph(R(2, 3, 4, 5), ONES(2, 4)), h=R(2, 3, 4, 5)),
     graph=lambda good: [None, "x", 3, good[:1], (good[1], good[0])], h=L)
case("mmgcn.GCNII", mmgcn.GCNII,
     lambda: dict(width=4, hidden=4, layers=2, alpha=0.1, lamda=0.5, dropout=0.1, reasoning=True), width=POSITIVE,
     hidden=POSITIVE, layers=POSITIVE, alpha=SHARE, lamda=number(0.0, -1.0, math.inf), dropout=SHARE, reasoning=flag)

# methods
OPTIONAL = lambda kind: lambda good: [v for v in kind(good) if v is not None]
case("joint.JointTraining", joint.JointTraining, lambda: dict(backbone=net(), modality_dropout=0.1), backbone=thing,
     modality_dropout=SHARE)
case("mce.missing_rate_factor", mce.missing_rate_factor, lambda: dict(present=ONES(4, 3)),
     present=lambda good: [*P(good), good[0], good[:0], ~good])
case("coalitions.prediction_value", coalitions.prediction_value, lambda: dict(logits=R(5, 3), target=I(3, 5), kind=None,
     tolerance=0.5),
     logits=L, target=lambda good: [None, "x", 3, [1], good[:-1], good.float()], kind=lambda good: ["no such", 3, []],
     tolerance=STRENGTH)
case("released.mce.released_shapley", released_mce.released_shapley, lambda: dict(counts=R(2, 8), players=3),
     counts=lambda good: [*P(good), good[..., :3], good[0, 0]], players=lambda good: ["3", 0, 2, 1.5])
case("alone.UpperBounds", alone.UpperBounds, lambda: dict(table=torch.rand(4, 2), ids=torch.arange(4), modalities=("a",
     "b")),
     table=lambda good: [*L(good), good * 3, good * math.nan, -good], ids=lambda good: [*L(good), good * 0],
     modalities=lambda good: [None, "ab", 3, (), ("a",), (1, 2)])
MODELS = lambda good: [*by_name(good), {"audio": net()}, {**good, "audio": 3}]
case("alone.UpperBounds.from_models", alone.UpperBounds.from_models,
     lambda: dict(models={m: backbones.GenericBackbone.for_data(train().select([m]), width=4) for m in NAMES},
     data=train(),
                  value=None, tolerance=0.5, batch_size=8),
     models=MODELS, data=thing, value=lambda good: ["no such", 3], tolerance=STRENGTH, batch_size=POSITIVE)
HEADS = lambda good: ["x", 3, {"a": 3}, {"audio": net()}]
FOLDS = lambda good: ["2", 0, 1, 1.5, 10_000]
case("alone.UpperBounds.trained", alone.UpperBounds.trained,
     lambda: dict(backbone=net(), data=train(), valid=splits()["valid"], config=ONCE,
                  heads={m: net().make_decoder(4) for m in NAMES}, value=None, tolerance=0.5, folds=2),
     backbone=thing, data=wrong_data, valid=lambda good: wrong_data(good)[1:], config=lambda good: ["x", 3, {}],
     heads=HEADS, value=lambda good: ["no such", 3], tolerance=STRENGTH, folds=FOLDS)
case("alone.UpperBounds.check", lambda ids: bounds().check(ids), lambda: dict(ids=train().ids),
     ids=lambda good: [None, "x", 3, [1], torch.tensor([1, 2])])
case("mce.learning_state_factor", mce.learning_state_factor,
     lambda: dict(upper=R(3), shapley=R(3), present=ONES(4, 3), mask=True), upper=L, shapley=L,
     present=lambda good: [*P(good), good[:, :2], good[0, 0]], mask=flag)
case("mce.ReconstructionModule", mce.ReconstructionModule,
     lambda: dict(modalities=3, width=4, heads=2, hidden=4, dropout=0.1), modalities=POSITIVE, width=whole(0, -4, 3),
     heads=whole(0, 3), hidden=POSITIVE, dropout=SHARE)
case("completed.CompletedBackbone", completed.CompletedBackbone,
     lambda: dict(backbone=net(), reconstruction=mce.ReconstructionModule(3, 4, 2, 4)), backbone=thing,
     reconstruction=thing)
case("mce.MCE", mce.MCE,
     lambda: dict(backbone=net(), upper=bounds(), preset="paper",
                  heads={m: net().make_decoder(4) for m in NAMES}, present=train().present, attention_heads=2,
                  hidden=4),
     backbone=thing, upper=lambda good: ["x", 3, {}, R(3, 2)], preset=choice, heads=HEADS,
     present=lambda good: ["x", 3, [True], good.float(), good[:, :2], ~good], attention_heads=POSITIVE, hidden=POSITIVE)
case("mce.MCE.for_data", mce.MCE.for_data,
     lambda: dict(backbone=net(), data=train(), valid=splits()["valid"], config=ONCE, attention_heads=2, hidden=4),
     backbone=thing, data=wrong_data, valid=lambda good: wrong_data(good)[1:], config=lambda good: ["x", 3, {}],
     upper=lambda good: ["x", 3, {}, R(3, 2)], folds=FOLDS, attention_heads=POSITIVE, hidden=POSITIVE)
case("mce.MCE.observe", lambda present: methods()["mce"].observe(present), lambda: dict(present=ONES(4, 3)),
     present=lambda good: [*P(good), good[:, :2], ~good, good[0]])
case("balm.FeatureCalibration", balm.FeatureCalibration, lambda: dict(feature_shapes=SHAPES, width=4),
     feature_shapes=lambda good: [*by_name(good), {}, {"a": (3,)}, {"a": (0, 1)}], width=lambda good: ["4", 0, -1, 1.5])
case("balm.FeatureCalibration.gates", lambda batch: balm.FeatureCalibration(SHAPES).gates(batch),
     lambda: dict(batch=batch()), batch=wrong_batches)
case("balm.UnimodalHeads", balm.UnimodalHeads, lambda: dict(widths=[3, 4], hidden=4, outputs=2),
     widths=lambda good: [None, "x", 3, [], [0], ["a"]], hidden=POSITIVE, outputs=POSITIVE)
case("balm.discrepancies", balm.discrepancies,
     lambda: dict(fused=R(5, 3), unimodal=R(2, 5, 3), target=I(3, 5), kind="mse"), fused=L,
     unimodal=lambda good: [*P(good), good[:, :2], good[..., :2], good[0]],
     target=lambda good: [None, "x", 3, [1], good[:-1], good[None, None]], kind=choice)
case("balm.modulation_coefficients", balm.modulation_coefficients, lambda: dict(discrepancy=R(3), rho=1.3),
     discrepancy=lambda good: [*P(good), good[:1], good[None]], rho=number(0.0, -1.0, math.inf))
case("balm.spatial_modulation", balm.spatial_modulation,
     lambda: dict(fused=R(5), unimodal=R(2, 5), coefficients=R(2), form="cggm"), fused=L, unimodal=L, coefficients=L,
     form=choice)
ENCODERS = lambda good: ["x", 3, {"audio": net()}, {m: 3 for m in NAMES}, {m: torch.nn.Linear(2, 2) for m in NAMES}, {}]
case("gradients.EncoderGradients", gradients.EncoderGradients, lambda: dict(model=net(), encoders=dict(net().encoders)),
     model=thing, encoders=ENCODERS)
case("gradients.encoders_of", gradients.encoders_of, lambda: dict(backbone=net(), encoders=dict(net().encoders)),
     backbone=thing, encoders=lambda good: ["x", 3, {"audio": net()}, {m: 3 for m in ("a", "b")}, {}])
CRITERION = lambda good: ["x", 3, []]
case("balm.GradientRebalancing", balm.GradientRebalancing,
     lambda: dict(model=net(), encoders=dict(net().encoders), output=net().decoder[-1], widths=4, catch=False,
                  criterion=losses.sample_losses, preset="paper"),
     model=thing, encoders=ENCODERS, output=lambda good: [*thing(good), torch.nn.Linear(3, 4)],
     widths=lambda good: [None, "x", 0, {"audio": 4}, {m: 0 for m in NAMES}, 1.5], catch=flag, criterion=CRITERION,
     preset=choice)
case("balm.BALM", balm.BALM,
     lambda: dict(backbone=net(), feature_shapes=SHAPES, preset="paper", encoders=dict(net().encoders),
                  output=net().decoder[-1], widths=4, criterion=losses.sample_losses, rho=1.4),
     backbone=thing, feature_shapes=lambda good: ["x", 3, {"audio": (4, 6)}, {m: (0,) for m in NAMES}],
     preset=choice, encoders=ENCODERS, output=lambda good: ["x", 3, torch.nn.Linear(3, 4)],
     widths=lambda good: ["x", 0, {"audio": 4}, 1.5], criterion=CRITERION,
     rho=number(0.0, -1.0, math.inf))
case("balm.BALM.for_data", balm.BALM.for_data, lambda: dict(backbone=net(), data=train()), backbone=thing,
     data=wrong_data)
case("cggm.CGGM", cggm.CGGM, lambda: dict(backbone=net(), rho=1.3), backbone=thing, rho=number(0.0, -1.0, math.inf))
for name, kind in (("joint.JointTraining", joint.JointTraining), ("mbt_sample.MBTSample", mbt_sample.MBTSample),
                   ("ogm_ge.OGMGE", ogm_ge.OGMGE), ("pmr.PMR", pmr.PMR)):
    case(f"{name}.for_data", kind.for_data, lambda: dict(data=train(), backbone=net()), data=thing, backbone=thing)
case("ogm_ge.ogm_coefficients", ogm_ge.ogm_coefficients, lambda: dict(score=R(3).abs(), alpha=0.1),
     score=lambda good: [*P(good), good[:1], good[None]], alpha=STRENGTH)
PAIR = lambda good: ["x", 3, (1,), (3, 1), (1.5, 2), ("a", "b"), (-1, 2)]
case("ogm_ge.OGMGE", ogm_ge.OGMGE,
     lambda: dict(backbone=net(), alpha=0.1, noise=True, samples="present", kernels_only=False, active_epochs=(1, 2),
                  encoders=dict(net().encoders)),
     backbone=thing, alpha=STRENGTH, noise=flag, samples=choice, kernels_only=flag, active_epochs=PAIR,
     encoders=ENCODERS)
case("pmr.prototype_log_probabilities", pmr.prototype_log_probabilities,
     lambda: dict(h=R(5, 3), prototypes=R(4, 3), seen=ONES(4)),
     h=lambda good: [*P(good), good[:, :2], good[0]], prototypes=lambda good: [*P(good), good[:, :2], good[0]],
     seen=lambda good: [*P(good), good[:2]])
case("pmr.PMR", pmr.PMR,
     lambda: dict(backbone=net(), classes=4, alpha=1.0, momentum=0.2, fraction=1.0, coefficient="one", batch_size=8),
     backbone=thing, classes=whole(1, -2), alpha=STRENGTH, momentum=SHARE, fraction=number(0.0, 1.5),
     coefficient=choice, batch_size=POSITIVE)
case("pmr.PMR.update_prototypes", lambda data, samples: methods()["pmr"].update_prototypes(data, samples),
     lambda: dict(data=train(), samples=torch.arange(5)), data=wrong_data,
     samples=lambda good: ["x", 3, [1], good.float(), good + 99, good[None]])
case("mbt_sample.resampling_copies", mbt_sample.resampling_copies,
     lambda: dict(shapley=R(4, 3), present=ONES(4, 3), weak="each"), shapley=L, present=L, weak=choice)
case("mbt_sample.MBTSample", mbt_sample.MBTSample,
     lambda: dict(backbone=net(), warmup=1, weak="each", tolerance=0.5, batch_size=8), backbone=thing, warmup=FIVE,
     weak=choice,
     tolerance=STRENGTH, batch_size=POSITIVE)
for name in ("valuate", "resample"):
    case(f"mbt_sample.MBTSample.{name}", lambda data, name=name: getattr(methods()["mbt"], name)(data),
         lambda: dict(data=train()), data=lambda good: [*wrong_data(good), talk()])
case("dear.weight_entropy", dear.weight_entropy, lambda: dict(w=torch.rand(4, 3)), w=P)
case("layers.TransformerLayer", layers.TransformerLayer, lambda: dict(width=4, heads=2, head_width=4, dropout=0.1),
     width=POSITIVE, heads=POSITIVE, head_width=POSITIVE, dropout=SHARE)
case("dear.Projection", dear.Projection, lambda: dict(source=3, width=4, norm=True),
     source=POSITIVE, width=POSITIVE, norm=flag)
case("dear.Reconstruction", dear.Reconstruction, lambda: dict(config=DEAR(), frames=4, layers=1), config=thing,
     frames=POSITIVE, layers=FIVE)
case("dear.SynergisticAttention", dear.SynergisticAttention,
     lambda: dict(query="audio", modalities=("audio", "vision"), width=4), query=choice,
     modalities=lambda good: [None, "x", 3, (), (1, 2), ("vision",)], width=POSITIVE)
case("dear.DEAR", dear.DEAR, lambda: dict(text_encoder=None, preset="paper", feature_shapes=SHAPES, width=8, heads=2),
     text_encoder=lambda good: ["x", 3, net()], preset=choice, feature_shapes=by_name, width=POSITIVE, heads=POSITIVE)
case("dear.SummaryTokens", other_dear.SummaryTokens, lambda: dict(config=DEAR(), frames=4, source=3, norm=True),
     config=thing, frames=POSITIVE, source=POSITIVE, norm=flag)
case("dear.RawReconstruction", other_dear.RawReconstruction,
     lambda: dict(config=DEAR(), frames=4, layers=1, out=3), config=thing, frames=POSITIVE, layers=FIVE, out=POSITIVE)
case("dear.SelfAttention", other_dear.SelfAttention, lambda: dict(config=DEAR()), config=thing)
case("dear.LogBiasAttention", other_dear.LogBiasAttention,
     lambda: dict(query="audio", modalities=("audio", "vision"), width=4), query=choice,
     modalities=lambda good: [None, "x", 3, (), (1, 2), ("vision",)], width=POSITIVE)
case("dear.OtherDEAR", other_dear.OtherDEAR, lambda: dict(text_encoder=None, preset="table8", feature_shapes=SHAPES),
     text_encoder=lambda good: ["x", 3, net()], preset=choice, feature_shapes=by_name)
case("dear.GatedFusion", other_dear.GatedFusion, lambda: dict(modalities=("audio", "vision"), width=4),
     modalities=lambda good: [None, "x", 3, (), (1, 2), ("a",)], width=POSITIVE)
case("dear.DEAR.for_data", dear.DEAR.for_data, lambda: dict(data=train(), text_encoder=None, width=8, heads=2),
     data=lambda good: [*thing(good), talk(), train().select(["audio"])], text_encoder=lambda good: ["x", 3, net()],
     width=POSITIVE, heads=POSITIVE, valid=lambda good: [], config=lambda good: [])
case("dear.DEAR.diagnose", lambda data, batch_size: methods()["dear"].diagnose(data, batch_size),
     lambda: dict(data=train(), batch_size=8), data=wrong_data, batch_size=POSITIVE)
case("released.dream.permutation_coalitions", other_dream.permutation_coalitions,
     lambda: dict(orders=torch.tensor([[0, 1], [1, 0]])),
     orders=lambda good: [*L(good)[:-3], good[0], good + 7, good - 1])
case("released.dream.permutation_scores", other_dream.permutation_scores,
     lambda: dict(zip(("predictions", "path", "orders", "target"),
                      (I(2, 5, 4), torch.tensor([[0, 1, 3], [0, 2, 3]]), torch.tensor([[0, 1], [1, 0]]), I(2, 5)),
                      strict=True)),
     predictions=lambda good: [*P(good), good[:, :2], good[0, 0]], path=lambda good: [*P(good), good[:, :2], good + 7],
     orders=lambda good: [*P(good), good[:, :1], good[0]], target=lambda good: ["x", 3, [1], good[:-1], good.float()])
case("dream.CrossAttention", dream.CrossAttention, lambda: dict(config=DREAM(), parts=2), config=thing, parts=POSITIVE)
case("dream.CrossModalBlock", dream.CrossModalBlock, lambda: dict(target="audio", modalities=NAMES, config=DREAM()),
     target=choice, modalities=lambda good: [None, "x", 3, (), (1, 2), ("vision",)], config=thing)
SAME = lambda good: [*P(good), good[:-1], good[:, :2]]
case("dream.mask_weights", dream.mask_weights, lambda: dict(w=R(4, 3), pss=R(4, 3)), w=SAME, pss=SAME)
case("dream.distillation_loss", dream.distillation_loss, lambda: dict(w=R(4, 3), pas=R(4, 3)), w=SAME, pas=SAME)
case("released.dream.add_log_weights", other_dream.add_log_weights, lambda: dict(w=R(4, 3), pss=R(4, 3)), w=SAME,
     pss=SAME)
case("released.dream.clipped_distillation_loss", other_dream.clipped_distillation_loss,
     lambda: dict(w=R(4, 3), pas=R(4, 3)), w=SAME, pas=SAME)
case("released.dream.SideBySideAttention", other_dream.SideBySideAttention, lambda: dict(config=DREAM(), parts=2),
     config=thing, parts=POSITIVE)
case("dream.DREAM", dream.DREAM,
     lambda: dict(evaluator=judge(), preset="paper", feature_shapes=SHAPES, outputs=4, width=8, heads=2),
     evaluator=lambda good: [*thing(good), torch.nn.Linear(2, 2), backbones.MLPEvaluator.for_data(train())],
     preset=choice, feature_shapes=by_name, outputs=POSITIVE, width=whole(0, -8, 3), heads=whole(0, 3))
case("dream.DREAM.for_data", dream.DREAM.for_data,
     lambda: dict(evaluator=backbones.MLPEvaluator.for_data(train(), width=4), data=train(), valid=splits()["valid"],
                  config=ONCE, width=8, heads=2),
     evaluator=lambda good: [*thing(good), torch.nn.Linear(2, 2)], data=wrong_data,
     valid=lambda good: wrong_data(good)[1:], config=lambda good: ["x", 3, {}], width=whole(0, -8, 3), heads=whole(0,
     3))
for name in ("weights", "contributions"):
    case(f"dream.DREAM.{name}", getattr(dream.DREAM, name),
         lambda: {"self": methods()["dream"], "batch": batch()}, batch=wrong_batches)
case("released.dream.OtherDREAM", other_dream.OtherDREAM,
     lambda: dict(evaluator=judge(), preset="text", feature_shapes=SHAPES, outputs=4, width=8, heads=2),
     evaluator=thing, preset=choice, feature_shapes=by_name, outputs=POSITIVE)
case("released.dream.OtherDREAM.observe", lambda data: other().observe(data), lambda: dict(data=train()),
     data=lambda good: [*thing(good), scores()])
case("released.dream.OtherDREAM.precompute",
     lambda data, batch_size: other().precompute(data, batch_size),
     lambda: dict(data=train(), batch_size=8), data=wrong_data, batch_size=POSITIVE)
case("dream.DREAM.precompute", lambda data, batch_size: methods()["dream"].precompute(data, batch_size),
     lambda: dict(data=train(), batch_size=8), data=wrong_data, batch_size=POSITIVE)
for name in ("joint", "mce", "balm", "cggm", "ogm", "pmr", "mbt", "dear", "dream"):
    for mode in (True, False):
        case(f"methods.{name}({'train' if mode else 'eval'})",
             lambda batch, name=name, mode=mode: methods()[name].train(mode)(batch), lambda: dict(batch=batch()),
             batch=wrong_batches)

# training
case("training.random_state", lambda seed: training.random_state(seed).__enter__(), lambda: dict(seed=0), seed=FIVE)
case("training.fit", training.fit,
     lambda: dict(method=joint.JointTraining(net()), train=train(), valid=splits()["valid"], config=ONCE,
                  train_plan=PLAN, callbacks=[], checkpoint=None, metrics=lambda logits, batch: {"accuracy": 0.5}),
     method=lambda good: [*thing(good), joint.JointTraining(backbones.GenericBackbone.for_data(talk()))],
     train=wrong_data,
     valid=lambda good: wrong_data(good)[1:], config=thing, train_plan=lambda good: ["x", 3, {}],
     callbacks=lambda good: [None, "x", 3], checkpoint=lambda good: [3, [], object()], metrics=lambda good: ["x", 3,
     {}])
PRESENT = lambda good: ["x", 3, [True], {"a": 3}, [["x"]], torch.ones(3), ONES(5, 3), ["no such name"]]
case("predict", training.predict,
     lambda: dict(method=methods()["joint"], dataset=train(), present=[True, False, True], batch_size=8, device="cpu",
                  like=train()),
     method=thing,
     dataset=lambda good: [*thing(good), talk()], present=PRESENT, batch_size=POSITIVE, device=lambda good: [3,
     "no such device", []],
     like=lambda good: ["x", 3, {}])
case("training.validation_scores", training.validation_scores,
     lambda: dict(logits=net()(batch()), batch=batch()), logits=lambda good: [*L(good)],
     batch=lambda good: [*thing(good), batch().replace(target=None)])
case("checkpoint.save", training.save, lambda: dict(method=net(), path=FOLDER / "net.pt", epochs=3), method=thing,
     path=path,
     epochs=lambda good: [object(), net(), {1, 2}])
case("checkpoint.load", training.load, lambda: dict(method=net(), path=(training.save(net(), FOLDER / "n.pt"),
     FOLDER / "n.pt")[1]),
     method=lambda good: [*thing(good), torch.nn.Linear(2, 3)], path=lambda good: [*path(good), FOLDER / "none.pt",
     FOLDER])

# batches and data sets
MASKS_BY_NAME = lambda good: ["x", 3, {"no such name": ONES(6, 4)}, {"audio": 3}, {"audio": R(6, 4)}, {"audio": ONES(5,
     4)}]
case("batch.MultimodalBatch", MultimodalBatch,
     lambda: dict(features={"audio": R(6, 4, 3), "text": I(9, 6, 5)}, present=ONES(6, 2), target=I(3, 6),
                  valid={"audio": ONES(6, 4)}, observed={"audio": ONES(6, 4)}, complete=batch(), ids=torch.arange(6),
                  fill={"text": 1}, extras={"speaker": torch.arange(6)}),
     features=lambda good: [*by_name(good), {}, {"audio": 3}, {"a": R(6), "b": R(6)}, {"a": R(5, 4, 3), "b": R(6, 4,
     3)},
                            {"a": ONES(6, 4), "b": R(6, 4)}],
     present=lambda good: [*P(good), good[:-1], good[:, :1], good[0]],
     target=lambda good: ["x", 3, [1], good[:-1], good[0], good.numpy()], valid=MASKS_BY_NAME, observed=MASKS_BY_NAME,
     complete=lambda good: ["x", 3, train(), batch()[:3]], ids=lambda good: ["x", 3, [1], good[:-1], good[0]],
     fill=lambda good: ["x", 3, {"no such name": 3}, {"text": "x"}, {"text": 1.5}],
     extras=lambda good: ["x", 3, {"speaker": good["speaker"][:-1]}, {"speaker": 3}])
for owner in (batch, train):
    kind = {batch: "MultimodalBatch", train: "MultimodalDataset"}[owner]
    case(f"batch.{kind}.to", lambda device, owner=owner: owner().to(device), lambda: dict(device="cpu"),
         device=lambda good: [None, 3, "no such device"])
    case(f"batch.{kind}.select", lambda modalities, owner=owner: owner().select(modalities),
    lambda: dict(modalities=["audio"]),
         modalities=lambda good: [None, "audio", 3, [3], ["no such name"], ["audio", "audio"], []])
    case(f"batch.{kind}.drop",
         lambda present, observed, keep_complete, owner=owner: owner().drop(present, observed, keep_complete),
         lambda owner=owner: dict(present=ONES(3), observed={"audio": ONES(len(owner()), 4)}, keep_complete=True),
         present=lambda good: ["x", 3, [True], good.float(), good[:-1]],
         observed=lambda good: ["x", 3, {"no such name": ONES(6, 4)}, {"audio": 3}, {"audio": R(6, 4)},
         {"audio": ONES(1, 4)}],
         keep_complete=flag)
for name, kinds in (("index", dict(modality=choice)), ("blank", dict(modality=choice))):
    case(f"batch.MultimodalBatch.{name}", getattr(MultimodalBatch, name), lambda: dict(self=batch(), modality="audio"),
    **kinds)
case("batch.MultimodalBatch.replace", lambda target: batch().replace(target=target), lambda: dict(target=I(3, 6)),
     target=lambda good: ["x", 3, [1], good[:-1]])
case("batch.MultimodalBatch.check_values", lambda classes: batch().check_values(classes), lambda: dict(classes=4),
     classes=lambda good: ["4", 0, 1.5, -1])
case("batch.MultimodalBatch[]", lambda rows: batch()[rows], lambda: dict(rows=[0, 1]),
     rows=lambda good: [None, "x", 1.5, ["a"], [99], torch.tensor([99]), ONES(3), 99])
case("batch.MultimodalDataset", MultimodalDataset,
     lambda: dict(data=batch(), info={"name": "a"}, names=[str(i) for i in range(6)], reader=None),
     reader=lambda good: ["x", 3, OWN()], data=lambda good: [*thing(good),
     good[:0]],
     info=lambda good: ["x", 3, [1]], names=lambda good: ["abcdef", 3, ["a"]])
case("batch.MultimodalDataset.subset", lambda rows: train().subset(rows), lambda: dict(rows=[0, 1]),
     rows=lambda good: [None, "x", 1.5, ["a"], [99], [], ONES(3), ONES(24, 2), [1.5], torch.tensor([[0, 1]])])
case("batch.MultimodalDataset.collate", MultimodalDataset.collate, lambda: dict(batch=batch()), batch=thing)

# sources
MADE = lambda: synthetic.truth(train())
SPOKEN = lambda: conversations.truth(talk())
EACH = lambda good: ["x", [1], {"audio": 1}, {m: "x" for m in NAMES}, {m: -1 for m in NAMES}]
SIZES = lambda good: [None, "abc", 3, [1, 2], [0, 1, 1], ["a", 1, 1], [1.5, 2, 2]]
case("data.load", data.load, lambda: dict(name="digits", root=None, split_seed=0), name=choice,
     root=lambda good: [3, [], object()], split_seed=FIVE)
case("data.options", data.options, lambda: dict(name="digits"), name=choice)
case("data.fingerprint", data.fingerprint, lambda: dict(dataset=batch()), dataset=thing)
case("data.digits.load", data.digits.load, lambda: dict(split_seed=0, valid=0.2, test=0.2, standardised=True),
     split_seed=FIVE, valid=number(0.0, 1.0, -1.0, 0.9), test=number(0.0, 1.0, -1.0, 0.9), standardised=flag)
case("data.synthetic.load", synthetic.load,
     lambda: dict(modalities=NAMES, task="classification", classes=4, shared=1, unique=1, xor=("audio", "vision"),
     noise=1.0,
                  frames=4, widths=6, weights={"xor": 2.0}, varied_lengths=True, sizes=(6, 6, 6), split_seed=0),
     modalities=lambda good: [None, "ab", 3, ["a"], ["a", "a"], [1, 2]], task=choice, classes=whole(0, 1, 999),
     shared=FIVE,
     unique=lambda good: ["x", None, *EACH(good), 1.5, -1], xor=lambda good: ["ab", 3, ["a", "b"], ["audio"], [1, 2]],
     noise=lambda good: ["x", None, *EACH(good), 0.0, -1.0, math.nan], frames=lambda good: [*EACH(good), 0, 1.5],
     widths=lambda good: [*EACH(good), 0, 1.5],
     weights=lambda good: ["x", 3, {"no such": 1.0}, {"xor": "x"}, {"xor": math.nan}, {"xor": math.inf}],
     varied_lengths=flag, sizes=SIZES, split_seed=FIVE)
case("data.synthetic.truth", synthetic.truth, lambda: dict(dataset=train()), dataset=lambda good: [*thing(good),
     talk()])
case("data.synthetic.bayes", synthetic.bayes, lambda: dict(dataset=scores(), loss="mse"),
     dataset=lambda good: [*thing(good), talk()], loss=lambda good: ["no such", 3, []])
case("data.synthetic.bit_log_odds", synthetic.bit_log_odds, lambda: dict(made=MADE(), data=train()), made=thing,
     data=lambda good: [*thing(good), MultimodalDataset.from_arrays({"c": R(3, 2)})])
case("data.synthetic.score_posterior", synthetic.score_posterior,
     lambda: dict(made=MADE(), log_odds=synthetic.bit_log_odds(MADE(), train())), made=thing,
     log_odds=lambda good: [None, "x", 3, [1], good[:, :2], good[0]])
SCORED = dict(metric=lambda good: ["no such", 3, []], samples=POSITIVE, seed=FIVE)
case("data.synthetic.bayes_score", synthetic.bayes_score,
     lambda: dict(made=train(), modalities=["audio"], metric="accuracy", samples=9, seed=0),
     made=lambda good: [*thing(good), talk()], modalities=lambda good: ["x", 3, [3], ["no such name"]], **SCORED)
case("data.synthetic.bayes_scores", synthetic.bayes_scores, lambda: dict(dataset=train(), metric="accuracy", samples=9,
     seed=0),
     dataset=lambda good: [*thing(good), talk()], **SCORED)
case("data.conversations.load", conversations.load,
     lambda: dict(strength={"a": 1.0, "b": 0.5}, widths=8, prior=[0.5, 0.5], inertia=0.5, influence=0.2, turn=0.7,
                  lengths=(3, 5), sizes=(2, 2, 2), split_seed=0),
     strength=lambda good: ["x", 3, {}, {"a": "x"}, {"a": -1.0}, {3: 1.0}, {"a": math.nan}],
     widths=lambda good: ["x", [1], 1, 1.5, {"a": 8}, {"a": "x", "b": 8}],
     prior=lambda good: [None, "ab", 3, [], [0.5, 0.6], [-0.5, 1.5], ["a", "b"], [math.nan, 1]],
     inertia=SHARE, influence=SHARE, turn=SHARE, lengths=lambda good: [None, "ab", 3, (3,), (5, 3), (0, 3), ("a", "b"),
     (1.5, 3)],
     sizes=SIZES, split_seed=FIVE)
case("data.conversations.truth", conversations.truth, lambda: dict(dataset=talk()), dataset=lambda good: [*thing(good),
     train()])
case("data.conversations.bayes", conversations.bayes, lambda: dict(dataset=talk(), context="past"),
     dataset=lambda good: [*thing(good), train()], context=choice)
case("data.conversations.log_likelihood", conversations.log_likelihood, lambda: dict(made=SPOKEN(), data=talk()),
     made=thing,
     data=lambda good: [*thing(good), MultimodalDataset.from_arrays({"c": R(3, 2)})])
TOLD = dict(context=choice, samples=POSITIVE, seed=FIVE)
case("data.conversations.bayes_score", conversations.bayes_score,
     lambda: dict(made=talk(), modalities=["audio"], context="past", samples=3, seed=0),
     made=lambda good: [*thing(good), train()], modalities=lambda good: ["x", 3, [3], ["no such name"]], **TOLD)
case("data.conversations.bayes_scores", conversations.bayes_scores,
     lambda: dict(dataset=talk(), context="past", samples=3, seed=0), dataset=lambda good: [*thing(good), train()],
     **TOLD)
ROOT = lambda good: [3, [], object()]
MODALITIES = lambda good: [None, 3, [], [3], ["no such name"], ["audio", "audio"]]
LIMITS = lambda good: ["x", 0, 1.5, {"no such name": 3}, {"audio": "x"}, [1]]
NO_FILES = {  # options are checked before files are looked for, so no files are needed
    "data.avmnist.load": (avmnist.load, dict(
        preset=choice, split_seed=FIVE, held_out=whole(0, 4, 999), image_order=choice, test_images=choice,
        scaling=choice, mark_padding=flag, every=POSITIVE, hop_length=POSITIVE, workers=lambda good: ["2", 0, 1.5],
        cache=flag, progress=lambda good: ["yes", 1, []])),
    "data.iemocap.load": (iemocap.load, dict(fold=whole(0), audio_norm=lambda good: ["no such", 3], max_frames=LIMITS)),
    "data.mfeat.load": (mfeat.load, dict(split_seed=FIVE, valid=number(0.0, 1.0), test=number(0.0, 1.0),
    standardised=flag)),
    "data.mmsa.load": (functools.partial(mmsa.load, "mosi"), dict(
        aligned=lambda good: ["yes", 1, []], text=choice, modalities=MODALITIES, standardised=flag, max_frames=LIMITS,
        unimodal=flag, drop=lambda good: ["no such", 3], nan=choice, strict=flag, unk=whole(-1))),
    "data.dialogue.load": (dialogue_files.load, dict(
        corpus=lambda good: ["no such", 3], modalities=MODALITIES, features=lambda good: ["x", 3, {"audio": 3}],
        standardised=flag, speakers=lambda good: [None, "MF", 3, [], ["M", "M"], [1, 2]], valid=number(0.0, 1.0, -1.0),
        session=lambda good: ["1", 0, 6, 1.5], split_seed=FIVE, nan=choice)),
    "data.mmsa.transcripts": (functools.partial(mmsa.transcripts, "mosi"), dict(aligned=lambda good: ["yes", 1, []])),
    "data.dialogue.transcripts": (dialogue_files.transcripts, dict(corpus=lambda good: ["no such", 3])),
}
case("data.mmsa.load(name)", lambda name: mmsa._source(name), lambda: dict(name="mosi"), name=choice)
case("data.avmnist.sound_for_first", avmnist.sound_for_first,
     lambda: dict(train=MultimodalDataset(MultimodalBatch(
         {"audio": R(30, 1, 2)}, ONES(30, 1), torch.arange(10).repeat_interleave(3),
         extras={"speaker": torch.arange(3).repeat(10), "take": torch.zeros(30, dtype=torch.int64)})), per_class=3),
     train=lambda good: [*thing(good), train()], per_class=whole(1, -3, 300))
case("data.avmnist.read_idx", avmnist.read_idx, lambda: dict(path=idx()), path=lambda good: [*path(good),
     FOLDER / "none.gz"])
case("data.safe_pickle_load", data.safe_pickle_load, lambda: dict(path=pickled(), encoding="latin1"),
     path=lambda good: [*path(good), FOLDER / "none.pkl"], encoding=lambda good: [3, "no such encoding", None])
TOKENS = lambda: MultimodalDataset.from_arrays({"language": I(8, 4, 5)}, [0, 1, 0, 1], tokens=["language"])


class Words:
    """As much of a tokenizer as is asked for before a text is read."""

    model_max_length, unk_token_id = 16, 1

    def __call__(self, texts: Any, **options: Any) -> Any:
        length = options.get("max_length", 2)
        ids = torch.ones(len(texts), length, dtype=torch.int64)
        return {"input_ids": ids,
        "attention_mask": ids} if options.get("return_tensors") else {"input_ids": ids.tolist()}


class Reader(torch.nn.Module):
    config = type("About", (), {"vocab_size": 9, "max_position_embeddings": 8, "hidden_size": 4})()

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return type("Said", (), {"last_hidden_state": self.embed(input_ids)})()


LENGTH = whole(0, 1, 99)
case("data.text.load_encoder", text.load_encoder, lambda: dict(checkpoint=FOLDER / "none"), checkpoint=path,
     download=flag)
case("data.text.load_tokenizer", text.load_tokenizer, lambda: dict(checkpoint=FOLDER / "none"), checkpoint=path,
     download=flag)
case("data.text.tokenise", text.tokenise, lambda: dict(texts=["a", None], checkpoint=Words(), max_length=4),
     texts=lambda good: [None, "x", 3, [], [3]], checkpoint=path, max_length=LENGTH)
case("data.text.with_ids", text.with_ids,
     lambda: dict(data=batch_set(), texts=["a"] * 6, checkpoint=Words(), modality="words", max_length=4),
     data=thing, texts=lambda good: [None, "x", 3, ["a"], {}], checkpoint=path, modality=word, max_length=LENGTH)
ENCODE = dict(data=lambda good: [*thing(good), train()], encoder=thing, modality=choice, batch_size=POSITIVE,
     cache=flag)
case("data.text.encode", text.encode,
     lambda: dict(data=TOKENS(), encoder=Reader(), modality="language", batch_size=2, cache=False), **ENCODE)
case("data.text.leak", text.leak,
     lambda: dict(data=TOKENS().drop(keep_complete=True), encoder=Reader(), modality="language", batch_size=2,
     cache=False),
     **ENCODE)


def batch_set() -> MultimodalDataset:
    return MultimodalDataset(batch(), {"outputs": 4}, [str(i) for i in range(6)])


def idx() -> Path:
    import gzip

    place = FOLDER / "labels.gz"
    place.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 3, 4])))
    return place


def pickled() -> Path:
    import pickle

    place = FOLDER / "plain.pkl"
    place.write_bytes(pickle.dumps({"a": [1, 2]}))
    return place


# what a user's own data become
OWN = lambda: dict(
    features={"audio": np.random.default_rng(0).normal(size=(6, 3)), "text": np.arange(12).reshape(6, 2)},
    target=[0, 1, 2, 0, 1, 2], present=np.ones((6, 2), bool), lengths={"text": [2, 1, 2, 2, 1, 2]}, ids=list("abcdef"),
    classes=3, tokens={"text": 20}, fill={"text": 1}, info={"name": "own"}, allow_empty=True)
case("batch.MultimodalDataset.from_arrays", MultimodalDataset.from_arrays, OWN,
     features=lambda good: [*by_name(good), {}, {"a.b": R(3, 2)}, {"train": R(3, 2)}, {"a": "x"}, {"a": 3}, {"a": ["x",
     "y"]},
                            {"a": [R(2, 2), R(2, 3)]}, {"audio": R(5, 3), "text": good["text"]},
                            {**good, "audio": good["audio"] * math.inf}, {**good, "text": good["text"] + 99}],
     target=lambda good: ["x", 3, good[:-1], [math.nan] * 6, [1j] * 6, {}, [7] * 6, [-1] * 6],
     present=lambda good: ["x", 3, good[:-1], good * 1.0, good[:, :1], [["x", "y"]] * 6],
     lengths=lambda good: ["x", 3, {"no such": [1] * 6}, {"text": [9] * 6}, {"text": [1.5] * 6}, {"text": [1]},
     {"text": "x"}],
     ids=lambda good: [3, ["a"], ["a"] * 6], classes=lambda good: [0, -1, 1.5, True, ["x"], {}, "ab"],
     tokens=lambda good: [3, ["no such"], {"no such": 3}, {"text": 0}, {"text": "x"}, {"text": 3}, None],
     fill=lambda good: ["x", 3, {"no such": 3}, {"text": -1}, {"text": 1.5}, {"text": 99}],
     info=lambda good: ["x", 3, [1]], allow_empty=flag)
ROWS = lambda rows: {"audio": R(6, 3)[rows], "text": I(20, 6, 4)[rows]}
case("batch.MultimodalDataset.from_reader", MultimodalDataset.from_reader,
     lambda: dict(read=ROWS, present=ONES(6, 2), ids=list("abcdef"), target=[0, 1, 2, 0, 1, 2],
                  lengths={"text": [4, 1, 2, 3, 4, 4]}, classes=3, tokens={"text": 20}, fill={"text": 1},
                  info={"name": "own"}),
     read=lambda good: [None, "x", 3, lambda rows: None, lambda rows: {}, lambda rows: {"audio": R(1, 3)},
                        lambda rows: {"a.b": R(1, 3), "text": I(20, 1, 4)}, lambda rows: {**good(rows), "audio": "x"},
                        lambda rows: {**good(rows), "audio": R(3, 3)}],
     present=lambda good: [None, "x", 3, good * 1.0, good[:, :1], good[0], ~good, good[:0]],
     ids=lambda good: [3, "x", ["a"], ["a"] * 6], target=lambda good: ["x", 3, good[:-1], [math.nan] * 6, {}, [7] * 6],
     lengths=lambda good: ["x", 3, {"no such": [1] * 6}, {"text": [1.5] * 6}, {"text": [-1] * 6}, {"text": [1]}],
     classes=lambda good: [0, -1, 1.5, True, ["x"], {}, "ab"],
     tokens=lambda good: [3, ["no such"], {"no such": 3}, {"text": 0}, {"text": "x"}, {"text": 3}, None],
     fill=lambda good: ["x", 3, {"no such": 3}, {"text": -1}, {"text": 1.5}, {"text": 99}],
     info=lambda good: ["x", 3, [1]])
FRAME = lambda: __import__("pandas").DataFrame({"a0": [0.1, 0.2, 0.3], "b0": [0.4, 0.5, 0.6], "y": [0, 1, 0]})
case("batch.MultimodalDataset.from_frame", MultimodalDataset.from_frame,
     lambda: dict(frame=FRAME(), columns={"a": ["a0"], "b": ["b0"]}, target="y"), frame=thing,
     columns=lambda good: [None, "x", 3, {"a": ["no such"]}, {"a": ["a0"], "b": ["a0"]}, {"a": "a0"}, {"a": 3}, {}],
     target=lambda good: [3, "no such", ["no such"], "a0"])
case("batch.MultimodalBatch.named", MultimodalBatch.named, lambda: dict(self=batch(), present=["audio"]),
     present=lambda good: [["no such name"]])
case("batch.MultimodalBatch.widened", MultimodalBatch.widened,
     lambda: dict(self=batch(), feature_shapes={**SHAPES, "more": (4, 6)}, fill={}),
     feature_shapes=lambda good: [*by_name(good), {"audio": (4, 6)}, {"audio": 3}], fill=lambda good: ["x", 3,
     {"audio": "x"}])
case("statistics.paired_interval", statistics.paired_interval, lambda: dict(ours=R(3, 4), theirs=R(3, 4), level=0.9),
     ours=lambda good: [*array(good), good[:-1], good[None]], theirs=lambda good: [*array(good), good[:-1]],
     level=number(0.0, 1.0, -1.0))
case("statistics.p_value", statistics.p_value, lambda: dict(ours=R(3, 4), theirs=R(3, 4)),
     ours=lambda good: [*array(good), good[:-1]], theirs=lambda good: [*array(good), good[:-1]])
case("statistics.equivalent", statistics.equivalent, lambda: dict(ours=R(3, 4), theirs=R(3, 4), band=0.1, level=0.9),
     ours=array, theirs=array, band=number(0.0, -1.0, math.inf), level=number(0.5, 1.0))
case("statistics.detectable", statistics.detectable,
     lambda: dict(ours=R(3, 4), theirs=R(3, 4), power=0.8, level=0.9), ours=array, theirs=array,
     power=number(0.5, 1.0), level=number(0.0, 1.0))
case("statistics.holm", statistics.holm, lambda: dict(p=[0.1, 0.2]),
     p=lambda good: [None, "x", {}, ["a"], [[0.1]], [1.5], [-0.1], [1j], [[0.1], [0.1, 0.2]]])
case("class_names", training.class_names,
     lambda: dict(logits=R(3, 2), info={"classes": ["a", "b"], "task": "classification"}),
     logits=lambda good: [*P(good), R(3, 5)],
     info=lambda good: [None, "x", 3, {}, {"classes": ["a"]}, {"classes": 3}])
case("layers.SharedBatch", layers.SharedBatch, lambda: dict(size=3, like=R(2), counts=True), size=FIVE,
     like=thing_but_tensor,
     counts=flag)
case("layers.same_draw", layers.same_draw, lambda: dict(x=R(2)), x=thing_but_tensor)
POINTS = lambda: {"a": np.random.default_rng(0).normal(size=(12, 2)), "b": np.random.default_rng(1).normal(size=(12,
     2))}
LEARNER = dict(
    method=lambda good: ["no such", 3, None], columns=lambda good: ["x", 3, []], method_options=lambda good: ["x", 3,
     {"no such": 1}],
    width=POSITIVE, dropout=SHARE, modality_dropout=SHARE, epochs=POSITIVE, batch_size=POSITIVE,
    lr=number(0.0, -1.0, math.inf), weight_decay=STRENGTH, validation_fraction=SHARE,
    patience=lambda good: ["x", 0, 1.5], random_state=lambda good: ["x", 1.5, -3], device=choice, verbose=flag)
for cls in (sklearn.MissingModalityClassifier, sklearn.MissingModalityRegressor):
    case(f"sklearn.{cls.__name__}",
         functools.wraps(cls.__init__)(lambda cls=cls, **options: cls(**options).fit(POINTS(), [0, 1] * 6)),
         lambda: dict(method="joint", columns=None, method_options={}, width=4, dropout=0.1, modality_dropout=0.1,
         epochs=1,
                      batch_size=8, lr=0.01, weight_decay=0.0, validation_fraction=0.3, patience=3, random_state=0,
                      device="cpu", verbose=False), **LEARNER)
    case(f"sklearn.{cls.__name__}.fit", lambda X, y, cls=cls: cls(width=4, epochs=1).fit(X, y),
         lambda: dict(X=POINTS(), y=[0, 1] * 6), X=lambda good: [None, "x", 3, {}, {"a": "x"}, {3: good["a"]}],
         y=lambda good: [None, "x", 3, [0, 1], [math.nan] * 12, [1j] * 12])
    for name in ("predict", "predict_proba")[: 2 if "Class" in cls.__name__ else 1]:
        case(f"sklearn.{cls.__name__}.{name}",
             lambda X, cls=cls, name=name: getattr(cls(width=4, epochs=1).fit(POINTS(), [0, 1] * 6), name)(X),
             lambda: dict(X=POINTS()), X=lambda good: [None, "x", 3, {}, {"no such": good["a"]}, {"a": good["a"][:,
             :1]}])


# experiments, files, figures
CONFIGS = lambda good: [None, "x", 3, [3], ["x"], [{3: 1}], [{"a": object()}], [{"a": math.nan}], [{"a": "/srv/x"}]]
RUN = lambda config: [{"metric": "accuracy", "value": 0.5, "n": 3}]
case("results.grid", results.grid, lambda: dict(a=[1, 2]))
case("results.config_hash", results.config_hash, lambda: dict(config={"a": 1}), config=lambda good: [
    None, "x", 3, [1], {3: 1}, {"a": object()}, {"a": math.nan}, {"a": "/srv/x"}])
case("experiments.load_or_run", experiments.load_or_run,
     lambda: dict(path=FOLDER / "r.csv", configs=[{"a": 1}], run=RUN, workers=1, backend="loky", client=None, threads=1,
                  experiment="e", command="c", progress=False),
     path=path, configs=CONFIGS, run=lambda good: ["x", 3, []], workers=POSITIVE, backend=choice, threads=POSITIVE,
     experiment=lambda good: [3, [], "a\nb"], command=lambda good: [3, None, [], "a\nb"], progress=flag)
case("results.load_results", results.load_results, lambda: dict(path=FOLDER / "r.csv", configs=[{"a": 1}]), path=path,
     configs=OPTIONAL(CONFIGS))
case("results.missing_runs", results.missing_runs, lambda: dict(path=FOLDER / "r.csv", configs=[{"a": 1}]),
     path=path,
     configs=CONFIGS)
case("results.not_run", results.not_run, lambda: dict(path=FOLDER / "r.csv", configs=[{"a": 1}], command="c"),
     path=path, configs=CONFIGS, command=word)
case("results.predictions", results.predictions, lambda: dict(path=stored(), config={"a": 3}), path=path,
     config=lambda good: [None, "x", 3, "../x", {3: 1}])
case("experiments.subsets", experiments.subsets, lambda: dict(modalities=["a", "b"]),
     modalities=lambda good: [None, "ab", 3, [], [1]])
TINY = dict(data="synthetic", data_options=dict(sizes=[24, 12, 12], frames=4, widths=6), train=dict(epochs=1,
     device="cpu"))
case("experiments.train_and_score", experiments.train_and_score, lambda: dict(config=TINY), config=lambda good: [
    None, "x", 3, {"no such": 1}, {**good, "method": "no such"}, {**good, "train": {"no such": 1}}, {**good,
    "train": 3}])
case("results.Results", results.Results, lambda: dict(rows=[{"metric": "a"}], predictions={"a": np.ones(3)}),
     rows=lambda good: [3, "x", [3]], predictions=lambda good: ["x", 3])
case("files.atomic_write", files.atomic_write, lambda: dict(path=FOLDER / "f", content=b"x", locked=True), path=path,
     content=lambda good: [None, "x", 3], locked=flag)
AX = lambda good: ["x", 3, []]
TITLE = lambda good: [3, None, []]
UNIT = lambda good: ["x", 3, []]
case("figures.use_style", figures.use_style, lambda: dict())
case("figures.figure", figures.figure, lambda: dict(size="normal", rows=1, columns=1), size=choice, rows=POSITIVE,
     columns=POSITIVE)
for name in ("colour", "marker"):
    case(f"figures.{name}", getattr(figures, name), lambda: dict(name="audio"), name=word)
NUMBERS = lambda good: [None, "x", ["a"], [1j], {}, object()]
case("figures.presence_grid", figures.presence_grid, lambda: dict(present=ONES(4, 2), modalities=["a", "b"],
     valid=ONES(4, 2)),
     present=lambda good: [None, "x", 3, good[0]], modalities=lambda good: [None, 3, ["a"], [1, 2]],
     valid=lambda good: ["x", 3, good[:-1]])
case("figures.bars", figures.bars,
     lambda: dict(scores={"a": [0.1, 0.2]}, groups=["x", "y"], intervals={"a": [(0.0, 0.2), (0.1, 0.3)]}),
     scores=lambda good: [None, "x", 3, {"a": [0.1]}, {"a": "xy"}, {"a": ["x", "y"]}], groups=lambda good: [None, 3,
     ["x"]],
     intervals=lambda good: ["x", 3, {"a": [(0.0, 0.2)]}, {"a": "x"}])
case("figures.band", figures.band, lambda: dict(x=[0, 1], mean=[0.1, 0.2], low=[0.0, 0.1], high=[0.2, 0.3], name="a"),
     x=lambda good: [*NUMBERS(good), [0]], mean=lambda good: [*NUMBERS(good), [0.1]],
     low=lambda good: ["x", ["a"], [0.1]], high=lambda good: ["x", ["a"], [0.1]], name=word)
case("figures.loss_curve", figures.loss_curve,
     lambda: dict(history=training.History([{"epoch": 1, "train_loss": 0.5}]), keys=["train_loss"]),
     history=lambda good: [None, "x", 3, [], training.History()], keys=lambda good: [3, ["no such"], [3]])
case("figures.heat_map", figures.heat_map, lambda: dict(values=[[0.1, 0.2]], rows=["a"], columns=["b", "c"]),
     values=lambda good: [*NUMBERS(good), [[0.1]]], rows=lambda good: [None, 3, ["a", "b"]],
     columns=lambda good: [None, 3, ["a"]])
case("figures.picture", figures.picture, lambda: dict(values=R(3, 4)), values=lambda good: [*NUMBERS(good), R(1, 1, 1,
     1, 1), R(2, 3, 4)])
case("figures.boxes", figures.boxes, lambda: dict(nodes={"a": (0, 0, "A"), "b": (1, 0, "B")}, arrows=[("a", "b")]),
     nodes=lambda good: [None, "x", 3, {}, {"a": 3}, {"a": ("x", 0)}],
     arrows=lambda good: ["x", 3, [("a", "no such")], [3]])
case("figures.reliability", figures.reliability,
     lambda: dict(confidence=[0.2, 0.8], accuracy=[0.1, 0.9], count=[3, 4], name="a", least=1),
     confidence=lambda good: [*NUMBERS(good), [0.2]], accuracy=lambda good: [*NUMBERS(good), [0.2]],
     count=lambda good: [*NUMBERS(good), [1]], name=word, least=FIVE)


def stored() -> Path:
    place = FOLDER / "stored.csv"
    if not place.exists():
        run = lambda config: results.Results(RUN(config), {"complete": np.ones(3)})
        experiments.load_or_run(place, [{"a": 3}], run)
    return place
# fmt: on


# --- configurations: the kind of a field follows from its type --------------------------------------------------------

CONFIGURATIONS: dict[type, dict[str, Any]] = {
    TrainConfig: {},
    MissingPlan: {"kind": "none"},
    missing.plan.Fixed: {"kind": "fixed", "present": ("a",)},
    missing.plan.Imbalanced: {"kind": "imbalanced", "rates": 0.3},
    missing.plan.ExactCount: {"kind": "exact_count", "rates": 0.3},
    missing.plan.Burst: {"kind": "burst", "rates": 0.3},
    missing.plan.PerClass: {"kind": "per_class", "counts": {"a": 1}},
    missing.plan.AtRandom: {"kind": "mar", "rates": 0.3, "on": "a"},
    mce.MCEConfig: {},
    released_mce.ReleasedMCEConfig: {},
    balm.BALMConfig: {},
    released_balm.ReleasedBALMConfig: {},
    dear.DEARConfig: {"feature_shapes": SHAPES},
    other_dear.OtherDEARConfig: {"feature_shapes": SHAPES},
    dream.DREAMConfig: {"feature_shapes": SHAPES, "outputs": 4},
    other_dream.OtherDREAMConfig: {"feature_shapes": SHAPES, "outputs": 4},
    **{
        kind: {} if "input_widths" in kind.__dataclass_fields__ else {"feature_shapes": SHAPES, "outputs": 4}
        for kind in (
            backbones.GenericConfig,
            backbones.CubeMLPConfig,
            backbones.EvaluatorConfig,
            backbones.CorrKDConfig,
            backbones.SelfMMConfig,
            backbones.GCNetConfig,
            backbones.MMGCNConfig,
            backbones.MMDFNConfig,
            backbones.MMINConfig,
        )
    },
    backbones.AVMNISTConfig: {},
}
ANY_SIGN = {"seed", "slope"}  # of plans
BY_TYPE: dict[str, list[Any]] = {
    "int": ["3", 2.5, True, math.nan, [3], torch.ones(1)],
    "float": ["0.1", True, math.nan, math.inf, [0.1], torch.ones(2)],
    "bool": ["yes", 1, 0, []],
    "str": ["no such choice", 3, []],
    "tuple": ["xy", 3, [object()], {"a": 1}],
    "Mapping": ["x", 3, [1], {3: 3}, {"no such name": object()}, {"no such name": -1}],
}


def bad_options(kind: type) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(kind):
        annotation = str(field.type).replace("dict[", "Mapping[")
        name = (kind.__name__, field.name)
        if field.name in ("rates", "then"):
            yield from (
                (field.name, value)
                for value in ("x", 3, -0.5, [], {"a": 2.0}, object())
                if not (isinstance(value, str) and issubclass(kind, missing.plan.Frames))
            )
            continue
        if field.name == "log_dir":
            yield from ((field.name, value) for value in (3, None, []))
            continue
        union = annotation.split(" | ")
        outer = {part.split("[")[0] for part in union}
        kinds = [t for t in BY_TYPE if t in outer]
        assert kinds, f"{name}: no bad values for the type {annotation}"
        # Of bool | str, float | tuple, str | Callable: what none of them is.
        values = list(BY_TYPE[kinds[0]]) if len(kinds) == 1 else [3.5j, object(), {"a": 1}]
        if "None" not in outer:
            values.append(None)
        if kinds == ["int"] and not (issubclass(kind, MissingPlan) and field.name in ANY_SIGN):
            values.append(-7)
        if kinds == ["float"] and not (issubclass(kind, MissingPlan) and field.name in ANY_SIGN):
            values.append(-7.0)
        if issubclass(kind, MissingPlan) and field.name in ("present", "keep_ends", "on"):  # of data not known yet
            values = [v for v in values if not isinstance(v, str)]
        if field.name in ("compile", "monitor"):
            values = [v for v in values if v != "no such choice"]
        if field.name == "trackers":
            values.remove(values[2])
        yield from ((field.name, value) for value in values)


# --- the test ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    global FOLDER
    import matplotlib

    matplotlib.use("Agg")
    FOLDER = tmp_path_factory.mktemp("calls")
    with training.random_state(0):
        yield
    import matplotlib.pyplot as plt

    plt.close("all")


LEARNED = {"X", "y"}  # what scikit-learn itself checks
PARTS = {"batch", "data", "dataset", "features", "feature_shapes", "ids", "target"}  # what a data set is made of


def all_calls() -> Iterator[tuple[str, set[str], Callable[[], Any], Any]]:
    """(case, names of which the error must have one, the call, what was put in an argument's place) of every bad call.

    One name, but where another value of the right type does not fit the other arguments: then theirs will do too.
    """
    for name, (call, good, kinds) in CASES.items():
        usual = good()
        for argument, kind in kinds.items():
            parameter = inspect.signature(call).parameters.get(argument)
            for bad in kind(usual.get(argument)):
                if bad is None and parameter is not None and parameter.default is None:
                    continue
                names = LEARNED if name.startswith("sklearn") and argument in LEARNED else {argument}
                if (
                    bad is not None
                    and names != LEARNED
                    and isinstance(bad, type(usual.get(argument)))
                    and not isinstance(bad, (int, str))
                ):
                    names |= set(usual) | (PARTS if isinstance(bad, (MultimodalBatch, MultimodalDataset)) else set())
                    if isinstance(bad, (Path, dict)):
                        names |= {bad.name} if isinstance(bad, Path) else {str(key) for key in bad}
                yield name, names, functools.partial(call, **{**usual, argument: bad}), bad
    for name, (call, kinds) in NO_FILES.items():
        for argument, kind in {"root": ROOT, **kinds}.items():
            default = inspect.signature(call).parameters[argument].default
            for bad in kind(None):
                if bad is None and default is None:
                    continue
                yield name, {argument}, functools.partial(call, **{"root": FOLDER, argument: bad}), bad
    for kind, usual in CONFIGURATIONS.items():
        for argument, bad in bad_options(kind):
            yield kind.__name__, {argument}, functools.partial(kind, **{**usual, argument: bad}), bad


def verdict(names: set[str], call: Callable[[], Any]) -> str:
    """ "", or what is wrong with how the call ended."""
    try:
        call()
    except (TypeError, ValueError, OSError) as error:
        text = str(error)
        if names == LEARNED:  # whose words are asked for by scikit-learn's checks of estimators
            return ""
        if not any(re.search(rf"\b{re.escape(name)}\b", text) for name in names):
            return f"without a name: {type(error).__name__}: {text}"
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        inside = "/mmlib/" in last or "/book/support/" in last or last == __file__ or isinstance(error, OSError)
        return "" if inside or text.startswith(tuple(names)) else f"from inside {Path(last).name}: {text}"
    except IndexError as error:  # what Python's own protocol asks of a[99]
        return "" if str(error).startswith("rows: ") else f"cryptic: IndexError: {error}"
    except Exception as error:
        return f"cryptic: {type(error).__name__}: {error}"
    return "silent"


NOT_CALLED = {  # public, and why there is no case
    "checks": "the checker itself, see tests/test_checks.py",
    "methods._presets": "a base of methods", "methods._data_checks": "checks",
    "methods._score_table": "what a method keeps",
    "Alone": "made by UpperBounds.trained", "values_alone": "a column of UpperBounds",
    "having": "a line of UpperBounds.trained", "fold_places": "a line of UpperBounds.trained",
    "ReleasedMCE": "called as MCE", "ShowsCompleted": "what the coalition engine sees of MCE",
    "Pairs": "what a training step of MCE makes of a batch", "Step": "a record",
    "Compared": "a record", "ReadsText": "a part of a method",
    "Contributions": "a record", "Diagnosis": "a record", "Encoded": "a record",
    "History": "a record", "Interval": "a record", "Output": "a record", "State": "a record", "Truth": "a record",
    "Evaluator": "its subclasses are called", "cache_folder": "no arguments", "names": "no arguments",
    "processes": "no arguments", "SharesBatches": "a part of a method", "Withheld": "a part of a method",
    "Plug": "called as GradientRebalancing", "Plugged": "a part of a method", "only_gradient": "a line of a loss",
    "reduce_sums": "a line of a step", "sample_mean": "a line of a loss", "frame_width": "of what as_frames takes",
    "parts_of": "called as BALM", "feature_shapes_of": "called as BALM",
    "ReleasedRebalancing": "called as GradientRebalancing", "ReleasedBALM": "called as BALM",
    "check_finite": "of predictions that a method made", "full": "of a tensor", "joined": "of results of batches",
    "reliability_weights": "printed whole on a page; one line of DEAR's own forward pass",
}  # fmt: skip
INTERNAL = {  # methods that a net, a method or the loop calls with what it made itself
    "align", "assess", "check", "compared", "descriptor", "distance", "encode_frames", "error",
    "frames_read", "losses", "make_fusion",
    "make_hdcr", "originals", "points", "read", "read_with", "reliability", "supervised", "task",
    "check_rates", "drop", "keeps", "realised",
     "complete", "decode", "disturb", "edges", "encode", "encode_dialogue", "encode_modality",
     "finish_epoch",
    "forward", "fuse", "fuse_completed", "give_back", "gradients", "hold", "in_context", "input_columns",
     "make_decoder",
    "make_encoder", "net", "nodes", "party_weight", "present_only", "rebalance", "reconstruct", "rms", "scale",
     "spreads",
    "states", "tau", "to_dict", "train", "unimodal_states", "vectors", "views", "with_speaker", "frame", "cells",
     "means",
    "advance", "average", "coefficients", "compare", "discrepancies", "gain", "mask", "modulation", "observed",
    "collect", "collected", "encodings", "flat", "remember",
    "transition", "check_numbers", "sum", "count", "rows", "shared",
}  # fmt: skip
FREE = {"ax", "cmap", "form", "label", "labels", "shade", "title", "xlabel", "ylabel", "chance", "colours", "hole"} | {
    "annotate", "non_blocking", "arrows", "best", "client", "frames", "height", "width", "high", "low", "self", "cls",
     "extras", "observed",
}  # fmt: skip  # of figures, which matplotlib reads; and what is no argument of a caller's


def public() -> Iterator[tuple[str, Any]]:
    """(the end of its address, object) of everything in an ``__all__``, and of the methods of what is a class."""
    seen: set[int] = set()
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(mmlib.__path__, "mmlib.")]
    for thing_ in (getattr(m, name) for m in modules for name in getattr(m, "__all__", ())):
        if not hasattr(thing_, "__qualname__") or not thing_.__module__.startswith("mmlib") or id(thing_) in seen:
            continue
        seen.add(id(thing_))
        where = thing_.__module__.removeprefix("mmlib.")
        if where in NOT_CALLED or thing_.__qualname__ in NOT_CALLED:
            continue
        yield f"{where}.{thing_.__qualname__}", thing_
        for name, member in vars(thing_).items() if inspect.isclass(thing_) else ():
            callable_ = inspect.isfunction(member) or isinstance(member, classmethod)
            if callable_ and not name.startswith(("_", "on_")) and name not in INTERNAL:
                yield f"{where}.{thing_.__qualname__}.{name}", getattr(thing_, name)


def test_everything_public_is_called() -> None:
    known = {**{name: kinds for name, (_, _, kinds) in CASES.items()}, **{n: k for n, (_, k) in NO_FILES.items()}}
    missing = []
    for address, thing_ in public():
        if thing_ in CONFIGURATIONS:
            continue
        parts = address.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts))]
        ends += [f"{parts[0]}.{end}" for end in ends]
        if not (name := next((end for end in ends if end in known), "")):
            missing.append(f"{address}: no case")
            continue
        free = FREE | ({"root", "name"} if name in NO_FILES else set())
        free |= {"valid", "config"} if name.endswith(".for_data") else set()  # of a first stage that not all have
        for argument, parameter in inspect.signature(thing_).parameters.items():
            named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if named and argument not in known[name] and argument not in free:
                missing.append(f"{address}: nothing bad for {argument}")
    assert not missing, "\n".join(missing)


def test_every_good_call_passes() -> None:
    failed = []
    for name, (call, good, _) in CASES.items():
        try:
            if name not in ("data.text.load_encoder", "data.text.load_tokenizer"):
                call(**good())
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    for kind, usual in CONFIGURATIONS.items():
        kind(**usual)
    assert not failed, "\n".join(failed)


def test_every_bad_call_is_an_error_that_names_the_argument() -> None:
    wrong, count = [], Counter[str]()
    for name, names, call, bad in all_calls():
        count["calls"] += 1
        if said := verdict(names, call):
            count[said.split(":")[0].split(" ")[0]] += 1
            shown = f"{type(bad).__name__} {tuple(bad.shape)}" if hasattr(bad, "shape") else f"{bad!r:.40}"
            wrong.append(f"{name}({' '.join(names)}={shown}): {said:.160}")
    assert count["calls"] >= 800
    assert not wrong, f"{dict(count)}\n" + "\n".join(wrong)


def test_bad_endings_are_told_apart() -> None:
    def nameless() -> None:
        raise ValueError("something is wrong")

    assert verdict({"x"}, lambda: None) == "silent"
    assert verdict({"x"}, nameless).startswith("without a name")
    assert verdict({"x"}, lambda: None.shape).startswith("cryptic: AttributeError")  # type: ignore[attr-defined]
    assert verdict({"x"}, lambda: torch.ones(2) @ torch.ones(3)).startswith("cryptic: RuntimeError")
    assert verdict({"wrong"}, nameless) == ""
