"""The runs behind the MCE chapter's tables: ``python -m book.studies.mce TABLE... [--data-root FOLDER]``.

Each function gives a table's cells: a label per axis -> the configs of that cell, one a seed. The command fills
``book/results/mce-TABLE.csv`` with what is not there yet; the chapter reads the rows of the same configs. Budget and
settings are equal within a table: same backbone, masks, steps, learning rate and seeds for every method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from book.support.sweep import Cells, Config, Sweep

# The six settings of the paper's Tables 3 to 5: missing rates of the first, second and third modality
SETTINGS = {
    "a": (0.2, 0.5, 0.8),
    "b": (0.2, 0.8, 0.5),
    "c": (0.5, 0.2, 0.8),
    "d": (0.5, 0.8, 0.2),
    "e": (0.8, 0.2, 0.5),
    "f": (0.8, 0.5, 0.2),
}
# Table 2: which of A, B, single, subset and completion are on
ABLATIONS = {
    "a": "",
    "b": "single",
    "c": "sub",
    "d": "aux",
    "e": "single sub",
    "f": "single aux",
    "g": "sub aux",
    "h": "single sub aux",
    "i": "A single sub aux",
    "j": "B single sub aux",
    "k": "A B single",
    "l": "A B aux",
    "m": "A B single sub aux",
}
AUDIO_RATES = (10, 30, 50, 70, 100)  # per cent of the training pairs that keep their sound, Fig. 7
SEEDS = (0, 1, 2, 3, 4)
WEIGHTS = {"lambda_single": 1.0, "lambda_sub": 1.0, "lambda_aux": 1.0}


def ablation(parts: str) -> Config:
    """The options of MCE for a row of Table 2; row a is the backbone with the reconstruction module."""
    on = parts.split()
    return {
        "rate_factor": "A" in on,
        "state_factor": "B" in on,
        **{f"lambda_{term}": float(term in on) for term in ("single", "sub", "aux")},
    }


METHODS: dict[str, tuple[str, Config]] = {
    "joint training": ("JointTraining", {}),
    "modality dropout": ("JointTraining", {"modality_dropout": 0.5}),
    "PMR": ("PMR", {}),
    "MBT-Sample": ("MBTSample", {}),
    "MCE without B": ("MCE", {"state_factor": False}),
    "MCE": ("MCE", {}),
}


def _avmnist(**changes: Any) -> Config:
    """AV-MNIST: 600 steps; selection on validation pairs of which half keep their sound."""
    return {
        "data": "avmnist",
        "backbone": "AVMNISTBackbone",
        "valid_plan": {"kind": "bernoulli", "rates": {"audio": 0.5}},
        "conditions": {"image": ["image"], "image+audio": ["image", "audio"]},
        "train": {"epochs": 40, "batch_size": 64, "lr": 1e-3},
        "profile": "book",
        **changes,
    }


def _small(data: str, rates: tuple[float, ...], seed: int, method: str, options: Config, **changes: Any) -> Config:
    """digits or three views of mfeat: 40 epochs, tested on the seven subsets."""
    if method == "MCE":
        options = {"hidden": 256, **options}
    return {
        "data": data,
        **({"modalities": ["fou", "zer", "mor"]} if data == "mfeat" else {}),
        "method": method,
        "method_options": options,
        "train_plan": {"kind": "exact_count", "rates": list(rates)},
        "conditions": "subsets",
        "train": {"epochs": 40, "batch_size": 64, "lr": 1e-3},
        "seed": seed,
        "profile": "book",
        **changes,
    }


def fig7() -> Cells:
    """AV-MNIST, all images and a share of the sounds: (method, share); "image only" and "audio only" have one net."""
    cells: Cells = {}
    for share in AUDIO_RATES:
        for name in ("joint training", "modality dropout", "MBT-Sample", "MCE without B", "MCE"):
            method, options = METHODS[name]
            plan = {"kind": "per_class", "counts": {"audio": 90 * share // 100}}
            cells[name, str(share)] = [
                _avmnist(method=method, method_options=options, train_plan=plan, seed=seed) for seed in SEEDS
            ]
    only = {"modalities": ["image"], "valid_plan": None, "conditions": {"image": ["image"]}}
    cells["image only", "0"] = [_avmnist(**only, method="JointTraining", seed=seed) for seed in SEEDS]
    return cells


def fig7_power() -> Cells:
    """Figure 7 with power at 33 sounds a class: (method,); "audio only" is a net of the sounds alone.

    600 steps of 128 with step decay, tested on the 8,950 images that training has not.
    """
    power: Config = {
        "data_options": {"test_images": "all"},
        "train_plan": {"kind": "per_class", "counts": {"audio": 33}},
        "conditions": {"image": ["image"], "audio": ["audio"], "image+audio": ["image", "audio"]},
        "train": {"epochs": 75, "batch_size": 128, "lr": 1e-3, "schedule": "step"},
    }
    cells: Cells = {}
    for name in ("joint training", "modality dropout", "MCE"):
        method, options = METHODS[name]
        cells[name,] = [_avmnist(**power, method=method, method_options=options, seed=seed) for seed in SEEDS]
    only = {**power, "modalities": ["audio"], "valid_plan": None, "conditions": {"audio": ["audio"]}}
    cells["audio only",] = [_avmnist(**only, method="JointTraining", method_options={}, seed=seed) for seed in SEEDS]
    return cells


def table2_digits() -> Cells:
    """Table 2's thirteen rows on digits under setting a: (row,)."""
    return {
        (row,): [_small("digits", SETTINGS["a"], seed, "MCE", ablation(parts)) for seed in SEEDS]
        for row, parts in ABLATIONS.items()
    }


def table2_avmnist() -> Cells:
    """Rows a, h, i, j and m on AV-MNIST, images missing at .2 and sounds at .8: (row,)."""
    plan = {"kind": "exact_count", "rates": {"image": 0.2, "audio": 0.8}}
    return {
        (row,): [
            _avmnist(
                method="MCE", method_options=ablation(ABLATIONS[row]), train_plan=plan, conditions="subsets", seed=seed
            )
            for seed in SEEDS
        ]
        for row in "ahijm"
    }


def _table5(data: str, seeds: tuple[int, ...]) -> Cells:
    names = ("joint training", "modality dropout", "PMR", "MBT-Sample", "MCE")
    return {
        (name, setting): [_small(data, rates, seed, *METHODS[name]) for seed in seeds]
        for setting, rates in SETTINGS.items()
        for name in names
    }


def table5_digits() -> Cells:
    """Table 5's six settings on digits: (method, setting)."""
    return _table5("digits", SEEDS)


def table5_mfeat() -> Cells:
    """The same on three views of mfeat, fou, zer and mor: (method, setting)."""
    return _table5("mfeat", SEEDS[:3])


GRID = (0.01, 0.1, 1.0, 10.0)


def fig4() -> Cells:
    """One weight at a time on digits: (weight, value); the others stay 1."""
    return {
        (name, str(value)): [
            _small("digits", SETTINGS["a"], seed, "MCE", {**WEIGHTS, name: value}) for seed in SEEDS[:3]
        ]
        for name in WEIGHTS
        for value in GRID
    }


def fig5() -> Cells:
    """Pairs of weights on digits, the third stays 1: (weight, value, weight, value)."""
    names = list(WEIGHTS)
    return {
        (one, str(x), two, str(y)): [
            _small("digits", SETTINGS["a"], seed, "MCE", {**WEIGHTS, one: x, two: y}) for seed in SEEDS[:1]
        ]
        for one, two in ((names[0], names[1]), (names[0], names[2]), (names[1], names[2]))
        for x in GRID
        for y in GRID
    }


def interpretations() -> Cells:
    """What the paper does not say, one change at a time on digits under setting a: (what,)."""
    changes: dict[str, Config] = {
        "paper": {},
        "released Shapley": {"shapley": "released"},
        "column slip": {"columns": [0, 2, 1]},
        "A not normalised": {"rate_norm": "none"},
        "strict subset loss": {"subset_loss": "strict"},
        "completed twice": {"subset_features": "reconstructed"},
        "released completion": {"completion_loss": "released"},
        "released single loss": {"single_loss": "released"},
        "values in eval mode": {"value_pass": "eval"},
        "negative B kept": {"mask_negative": False},
        "U from the heads": {"upper_source": "current"},
        "U from complete data": {"upper_bounds": "complete"},
        "U trained for as many steps": {"upper_bounds": "steps"},
        "MC values, K = 100": {"permutations": 100},
        "3 coalitions a step": {"subsets": 3},
    }
    cells: Cells = {
        (what,): [_small("digits", SETTINGS["a"], seed, "MCE", options) for seed in SEEDS]
        for what, options in changes.items()
    }
    moving = {"kind": "exact_count", "rates": list(SETTINGS["a"]), "resample": True}
    cells["masks bound to position",] = [
        _small("digits", SETTINGS["a"], seed, "MCE", {}, train_plan=moving) for seed in SEEDS
    ]
    return cells


def releases() -> Cells:
    """The three releases whole, on digits under setting a: (what,)."""
    absent = {"backbone_options": {"encode_absent": True}}  # the encodings of zeros, but for nuScenes
    runs: dict[str, tuple[Config, Config]] = {
        "paper": ({}, {}),
        "the avmnist release": ({"preset": "avmnist"}, absent),
        "the iemocap release": ({"preset": "iemocap"}, absent),
        "the nuscenes release": ({"preset": "nuscenes"}, {}),
    }
    return {
        (what,): [_small("digits", SETTINGS["a"], seed, "MCE", options, **changes) for seed in SEEDS]
        for what, (options, changes) in runs.items()
    }


def equations() -> Cells:
    """Eq. 13 in the release's unit and a grid of its weight, Eqs. 9 and 13 after f_rec, cross-fitted U: (what,)."""
    runs: dict[str, Config] = {
        "paper": {},
        **{f"Eq. 13 over √d, weight {w:g}": {"completion_loss": "scaled", "lambda_aux": w} for w in GRID},
        "Eq. 9 after f_rec": {"single_loss": "completed"},
        "Eq. 13 after f_rec": {"completion_loss": "completed"},
        "U by cross-fitting": {"upper_bounds": "crossfit"},
    }
    return {
        (what,): [_small("digits", SETTINGS["a"], seed, "MCE", options) for seed in SEEDS]
        for what, options in runs.items()
    }


TABLES: dict[str, Callable[[], Cells]] = {
    "fig7": fig7,
    "fig7_power": fig7_power,
    "table2_digits": table2_digits,
    "table2_avmnist": table2_avmnist,
    "table5_digits": table5_digits,
    "table5_mfeat": table5_mfeat,
    "interpretations": interpretations,
    "releases": releases,
    "equations": equations,
    "fig4": fig4,
    "fig5": fig5,
}
SWEEP = Sweep("mce", TABLES, files={"releases": "interpretations", "equations": "interpretations"})
path, command, main = SWEEP.path, SWEEP.command, SWEEP.main


if __name__ == "__main__":
    main()
