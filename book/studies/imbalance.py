"""The runs behind the imbalance chapter: ``python -m book.studies.imbalance TABLE... [--data-root FOLDER]``.

Each function gives a table's cells: a label per axis -> the configs of that cell, one a seed. The command fills
``book/results/imbalance-TABLE.csv`` with what is not there yet; the chapter reads the rows of the same configs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from book.support import experiments, results, verdicts
from book.support.stored import Stored
from book.support.sweep import Cells, Config, Sweep
from mmlib.baselines import JointTraining
from mmlib.gradients import EncoderGradients

SHARED = (0.5, 0.5, 0.5)
SETTINGS = tuple(itertools.permutations((0.3, 0.5, 0.7)))  # the paper's six, of the same mean
REMEDY_RATES = (0.2, 0.5, 0.8)  # on digits the modality that is hardest to learn from is also the rarest
SEEDS = (0, 1, 2, 3, 4)


class Reweighted(JointTraining):
    """Joint training in which modality m is trained ``(mean rate of presence) / (its rate of presence)`` times as hard.

    where : "gradient" multiplies the gradient of its encoder, "rate" the learning rate of its encoder
    """

    def __init__(self, backbone: Any, where: str = "gradient"):
        super().__init__(backbone)
        if where not in ("gradient", "rate"):
            raise ValueError(f"where: expected 'gradient' or 'rate', got {where!r}")
        self.where, self.factors = where, torch.ones(len(backbone.modalities))
        self.gradients = EncoderGradients(backbone, dict(backbone.encoders.items()))

    def on_start(self, state: Any) -> None:
        there = state.train.present.flatten(0, -2).float().mean(0)
        self.factors = there.mean() / there
        if self.where == "rate":
            (group,) = state.optimizer.param_groups
            encoders = {id(p) for p in self.backbone.encoders.parameters()}
            group["params"] = [p for p in group["params"] if id(p) not in encoders]
            for encoder, factor in zip(self.backbone.encoders.values(), self.factors.tolist(), strict=True):
                own = {**group, "params": list(encoder.parameters()), "lr": factor * group["lr"]}
                state.optimizer.add_param_group(own)

    def on_backward(self, state: Any) -> None:
        if self.where == "gradient":
            self.gradients.scale(self.factors)


def run(config: Config) -> results.Results:
    """`experiments.train_and_score`, which knows `Reweighted` besides."""
    return experiments.train_and_score(config, {"Reweighted": Reweighted})


SGD = {"optimizer": "sgd", "lr": 0.05}
REMEDIES: dict[str, tuple[str, Config, Config]] = {  # method, its options, training
    "joint training": ("JointTraining", {}, {}),
    "gradients reweighted": ("Reweighted", {"where": "gradient"}, {}),
    "learning rates reweighted": ("Reweighted", {"where": "rate"}, {}),
    "modality dropout": ("JointTraining", {"modality_dropout": 0.5}, {}),
    "OGM-GE": ("OGMGE", {"alpha": 0.3}, {}),
    "joint training, SGD": ("JointTraining", {}, SGD),
    "gradients reweighted, SGD": ("Reweighted", {"where": "gradient"}, SGD),
}


def name_of(rates: tuple[float, ...]) -> str:
    """How a setting is called in tables, such as ".3 .5 .7"."""
    return " ".join(f"{r:g}".lstrip("0") for r in rates)


def _config(data: str, rates: tuple[float, ...], seed: int, method: str, options: Config, train: Config) -> Config:
    """digits or three views of mfeat, exact counts, 25 epochs, tested on the seven subsets and under its own rates."""
    plan = {"kind": "exact_count", "rates": list(rates)}
    return {
        "data": data,
        **({"modalities": ["fou", "zer", "mor"]} if data == "mfeat" else {}),
        "method": method,
        "method_options": options,
        "train_plan": plan,
        "conditions": ["subsets", {"own rates": plan}],
        "train": {"epochs": 25, "batch_size": 64, "lr": 1e-3, **train},
        "seed": seed,
        "profile": "book",
    }


def _shared(data: str) -> Cells:
    return {
        (name_of(rates),): [_config(data, rates, seed, "JointTraining", {}, {}) for seed in SEEDS]
        for rates in (SHARED, *SETTINGS)
    }


def shared_digits() -> Cells:
    """F.7 on digits: rate .5 for all against six settings of the same mean: (setting,)."""
    return _shared("digits")


def shared_mfeat() -> Cells:
    """The same on three views of mfeat, fou, zer and mor: (setting,)."""
    return _shared("mfeat")


def remedies_digits() -> Cells:
    """What helps, on digits: (remedy,)."""
    return {
        (remedy,): [_config("digits", REMEDY_RATES, seed, method, options, train) for seed in SEEDS]
        for remedy, (method, options, train) in REMEDIES.items()
    }


def shared_claims(table: Stored, modalities: Sequence[str], where: str) -> list[verdicts.Comparison]:
    """What the page claims of shared and unequal rates, from a table of `shared_digits` or `shared_mfeat`."""
    shared, unequal = [name_of(SHARED)], [name_of(rates) for rates in SETTINGS]
    at = lambda label, rate: modalities[label.split().index(rate)]  # the modality that is missing at this rate
    rare, common = (lambda label: [at(label, ".7")]), (lambda label: [at(label, ".3")])
    subsets, alone = list(experiments.subsets(modalities)), list(modalities)
    first, last = modalities[0], modalities[-1]
    keep_first, keep_last = ([s for s in unequal if at(s, ".3") == m] for m in (first, last))
    complete, own = subsets[-1:], ["own rates"]
    claims = {
        "shared > unequal: complete samples": (shared, complete, unequal, complete),
        "shared > unequal: mean of subsets": (shared, subsets, unequal, subsets),
        "shared > unequal: rarest modality alone": (shared, alone, unequal, rare),
        "unequal > shared: most present one alone": (unequal, common, shared, alone),
        "unequal > shared: under their own rates": (unequal, own, shared, own),
        f"{first} at .3 > {last} at .3: mean of subsets": (keep_first, subsets, keep_last, subsets),
        f"{first} at .3 > {last} at .3: own rates": (keep_first, own, keep_last, own),
    }
    return [
        verdicts.compare(words, _pooled(table, one, here), _pooled(table, two, there), group=where)
        for words, (one, here, two, there) in claims.items()
    ]


def _pooled(table: Stored, settings: Sequence[str], conditions: Any) -> np.ndarray | None:
    """How often each sample is right [seeds, samples], on average over settings, on which the conditions may depend."""
    seeds = []
    for k in range(len(SEEDS)):
        of = [table.right(table.keys[s,][k], conditions(s) if callable(conditions) else conditions) for s in settings]
        right = [x for x in of if x is not None]
        if len(right) < len(of):
            return None
        seeds.append(np.mean(right, axis=0))
    return np.stack(seeds)


TABLES: dict[str, Callable[[], Cells]] = {
    "shared_digits": shared_digits,
    "shared_mfeat": shared_mfeat,
    "remedies_digits": remedies_digits,
}
SWEEP = Sweep("imbalance", TABLES, run)
path, command, main = SWEEP.path, SWEEP.command, SWEEP.main


if __name__ == "__main__":
    main()
