"""The runs behind the DEAR chapter's tables: ``python -m book.studies.dear TABLE... [--data-root FOLDER]``.

Each function gives a table's cells: a label per axis -> the configs of that cell, one a seed. The command fills
``book/results/dear-TABLE.csv`` with what is not there yet; the chapter reads the rows of the same configs. All runs
follow LNLN's protocol (`protocol`): missing rates drawn per sample and modality in training, selection on validation
at a rate of one half, tests at ten constant rates. Within a table all methods share masks, seeds, steps, batch size,
schedule and learning rate. DEAR is 32 wide here, not 128.

DEAR has two recipes (`RECIPES`, a config's entry "recipe"). The tables ``main_*`` are of the main one, LNLN's token
encoders; the others are of the one that was swept first, Eq. 5's projections pooled over frames.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from book.support import experiments, results
from book.support.sweep import UNEQUAL, Cells, Config, Sweep
from mmlib import MultimodalDataset, data, metrics, missing
from mmlib.missing import MissingPlan

SEEDS = (0, 1, 2, 3, 4)
RATES = tuple(f"r={r / 10}" for r in range(10))
TEST_SEED = 1111  # the public code's: all runs and methods meet the same test masks
SIGMAS = (0.0, 0.5, 1.0, 2.0)  # of the noise on vision, Table 11
WIDTH: Config = {"width": 32, "heads": 4, "head_width": 8, "hidden": 32}
TRAIN: Config = {
    "epochs": 30,
    "batch_size": 128,
    "lr": 1e-2,
    "optimizer": "adamw",
    "weight_decay": 1e-4,
    "schedule": "linear-warmup-cosine",
}
DATA: dict[str, Config] = {
    "synthetic": {
        "data": "synthetic",
        "data_options": {**UNEQUAL, "sizes": [1000, 300, 600]},
        "train": TRAIN,
    },
    # stored token features, of which a dropped one leaves its trace in the others; vision is missing by nature in 54 %
    # of train and 81 % of test
    "mosi": {
        "data": "mosi",
        "data_options": {"max_frames": 24},
        "train": {**TRAIN, "epochs": 20, "lr": 3e-3},
        "keep_ends": ["language"],
    },
    "mosi text and audio": {
        "data": "mosi",
        "data_options": {"max_frames": 24, "modalities": ["language", "audio"]},
        "train": {**TRAIN, "epochs": 20, "lr": 3e-3},
        "keep_ends": ["language"],
    },
}
# DEAR's options below those of a config. "swept", where a config names none: LN on the text too, e_m a mean over
# features; "tokens": LNLN's encoders, with which alone Table 8's number of parameters is met
RECIPES: dict[str, Config] = {"swept": {"error": "mean", "normed": "all"}, "tokens": {"preset": "table8"}}
ENCODER = "text-encoder"  # the `transformers` checkpoint below the data root
# token ids, [UNK] for what is dropped, encoded again by a frozen pre-trained encoder; masks of training drawn once
IDS: Config = {
    "data": "mosi",
    "data_options": {"max_frames": 24, "modalities": ["language", "audio"], "text": "ids"},
    "train": DATA["mosi text and audio"]["train"],
    "text_encoder": ENCODER,
}
TASK_ALONE: Config = {"lambda1": 0.0, "lambda2": 0.0, "alpha": 0.0, "sure": False, "streams": "single"}
METHODS: dict[str, Config] = {
    "joint training": {"method": "JointTraining", "backbone_options": {"width": 32}},
    "modality dropout": {
        "method": "JointTraining",
        "backbone_options": {"width": 32},
        "method_options": {"modality_dropout": 0.3},
    },
    "DEAR's net, task loss": {
        "method": "DEAR",
        "method_options": {**WIDTH, **TASK_ALONE},
    },
    "DEAR": {"method": "DEAR", "method_options": WIDTH},
}
# Tables 3 and 10, section C.6
ABLATIONS: dict[str, Config] = {
    "w/o L_uni": {"lambda1": 0.0},
    "w/o L_joint": {"lambda2": 0.0},
    "w/o HDCR": {"alignment": "mse"},
    "w/o SURE": {"sure": False},
    "w/o SS": {"streams": "robust"},
    "w/o RS": {"streams": "synergistic"},
}
PAIRS: dict[str, Config] = {
    "w/o HDCR+SURE": {"alignment": "mse", "sure": False},
    "w/o HDCR+DS": {"alignment": "mse", "streams": "single"},
    "w/o SURE+DS": {"sure": False, "streams": "single"},
}
QUERIES: dict[str, Config] = {  # Table 14
    "Audio as Query": {"query": "audio"},
    "Visual as Query": {"query": "vision"},
    "Concat+SelfAttn": {"fusion": "self"},
    "Gated Fusion": {"fusion": "gated"},
}
WEIGHTS: dict[str, Config] = {  # Table 6: lambda1, lambda2, alpha, beta
    "0.2, 0.8, 0.7, 0.2": {"lambda1": 0.2, "lambda2": 0.8, "alpha": 0.7, "beta": 0.2},
    "0.4, 0.6, 0.6, 0.1": {"lambda1": 0.4, "lambda2": 0.6, "alpha": 0.6, "beta": 0.1},
    "0.5, 0.5, 0.5, 0.4": {"lambda1": 0.5, "lambda2": 0.5, "alpha": 0.5, "beta": 0.4},
}
DEPTHS: dict[str, Config] = {"4 layers": {"layers": 4}, "6 layers": {"layers": 6}}  # Table 7
INTERPRETATIONS: dict[str, Config] = {
    "streams read encoded features": {"stream_input": "encoded"},
    "raw features aligned": {"space": "raw"},
    "256 tokens aligned": {"samples": "subsampled"},
    "joint term three times": {"joint_sum": "literal"},
    "e summed": {"error": "sum"},
    "gradient through e": {"error_grad": True},
    "e over the variance": {"error_scale": "variance"},
    "layer norm in Eq. 6": {"norm": "layer"},
    "tau learned": {"learn_tau": True},
    "tau = 0.1": {"tau": 0.1},
    "log w added to the scores": {"k_scale": "logbias"},
    "query's features added": {"residual": True},
    "absolute errors": {"main": "l1"},
    "streams in L_aux": {"aux": "all"},
}
RATES_TRIED = (1e-3, 3e-3, 1e-2, 3e-2)

# The main recipe: DEAR, its own net, and joint training as wide as the others and at as many parameters (106 thousand)
MAIN: dict[str, Config] = {
    "joint training": {"method": "JointTraining", "backbone_options": {"width": 32}},
    "joint training, equal parameters": {"method": "JointTraining", "backbone_options": {"width": 62}},
    "DEAR's net, task loss": {
        "method": "DEAR",
        "recipe": "tokens",
        "method_options": {**WIDTH, **TASK_ALONE},
    },
    "DEAR": {"method": "DEAR", "recipe": "tokens", "method_options": {**WIDTH, "error": "mean"}},
}
FIXED = "lr .003"  # one recipe for all
GRID: dict[str, tuple[float, float]] = {  # learning rate, modality dropout: the same for every method
    FIXED: (3e-3, 0.0),
    "lr .01": (1e-2, 0.0),
    "lr .003, modality dropout .3": (3e-3, 0.3),
}
MAIN_PARTS: dict[str, Config] = {
    "w/o SURE": {"sure": False},
    "w/o DS": {"streams": "single"},
    "w/o HDCR": {"alignment": "mse"},
}
MAIN_CHOICES: dict[str, Config] = {
    "one Transformer over all": {"hdcr": "joint"},
    "text's values in y_syn": {"residual": True},
    "no text layers": {"text_layers": 0},
    "LN on audio and vision": {"normed": "others"},
}
MAIN_RELIABILITY: dict[str, Config] = {
    "e as printed, tau 10": {"error": "token_norm", "tau": 10.0},
    "e as printed, tau 10, z detached": {"error": "token_norm", "tau": 10.0, "detach_descriptors": True},
    "e as printed, tau 1": {"error": "token_norm"},
    "e a mean, tau 1": {"error": "mean"},
}


def _config(source: str, method: str, seed: int, options: Config | None = None, **changes: Any) -> Config:
    made: Config = {**DATA[source], **METHODS[method], "seed": seed, "profile": "book"}
    if options:
        made["method_options"] = {**made.get("method_options", {}), **options}
    return {**made, "protocol": "lnln", "conditions": "rates and subsets", **changes}


def _main(name: str, cell: str, seed: int, options: Config | None = None, conditions: str = "rates") -> Config:
    """A run of the main recipe on synthetic at a point of the grid."""
    lr, dropout = GRID[cell]
    made = {**DATA["synthetic"], **MAIN[name], "seed": seed, "profile": "book", "protocol": "lnln"}
    made["method_options"] = {
        **made.get("method_options", {}),
        **({"modality_dropout": dropout} if dropout else {}),
        **(options or {}),
    }
    return {**made, "train": {**TRAIN, "lr": lr}, "conditions": conditions}


# --- tables -----------------------------------------------------------------------------------------------------------


def main_synthetic() -> Cells:
    """Table 1 on synthetic at the main recipe, one setting for all: (method,)."""
    return {(name,): [_main(name, FIXED, seed) for seed in SEEDS] for name in MAIN}


def main_grid() -> Cells:
    """The same, each method's settings to be chosen by validation: (method, point of the grid)."""
    return {(name, cell): [_main(name, cell, seed) for seed in SEEDS] for name in MAIN for cell in GRID}


def main_parts() -> Cells:
    """Tables 3 and 10 on synthetic at the main recipe: (what,)."""
    changes = {"DEAR": {}, **MAIN_PARTS}
    return {(n,): [_main("DEAR", FIXED, seed, options) for seed in SEEDS] for n, options in changes.items()}


def main_choices() -> Cells:
    """What the paper leaves open at the main recipe, one change at a time: (what,)."""
    changes = {"DEAR": {}, **MAIN_CHOICES}
    return {(n,): [_main("DEAR", FIXED, seed, options) for seed in SEEDS[:3]] for n, options in changes.items()}


def main_reliability() -> Cells:
    """What DEAR thinks of each test sample at the main recipe, by e, tau and where Eq. 7's gradient ends: (what,)."""
    made = lambda options, seed: _main("DEAR", FIXED, seed, options, "reliability")
    return {(name,): [made(options, seed) for seed in SEEDS] for name, options in MAIN_RELIABILITY.items()}


def _synthetic(
    name: str, options: Config | None = None, seeds: tuple[int, ...] = SEEDS[:3], **changes: Any
) -> list[Config]:
    return [_config("synthetic", name, seed, options, **changes) for seed in seeds]


def table1_synthetic() -> Cells:
    """Tables 1, 4 and 15 on synthetic: ten rates and seven subsets: (method,)."""
    return {(name,): _synthetic(name, seeds=SEEDS) for name in METHODS}


def table1_mosi() -> Cells:
    """The same on CMU-MOSI's text features and audio: (method,)."""
    return {(name,): [_config("mosi text and audio", name, seed) for seed in SEEDS] for name in METHODS}


def _paper(name: str) -> Cells:
    """The paper's settings as far as it and LNLN give them: BERT fine-tuned, 200 epochs, three seeds."""
    checkpoint = "bert-base-chinese" if name == "sims" else "bert-base-uncased"
    made: Config = {
        "data": name,
        "data_options": {"text": "ids", "aligned": False},
        "method": "DEAR",
        "recipe": "tokens",
        "method_options": {"text_encoder": checkpoint},
        "train": {**TRAIN, "epochs": 200, "batch_size": 64, "lr": 1e-4},
        "profile": "paper",
        "protocol": "lnln",
        "conditions": "rates and subsets",
    }
    return {("DEAR",): [{**made, "seed": seed} for seed in (1111, 1112, 1113)]}


def paper_mosi() -> Cells:
    """Tables 1, 4 and 15 on MOSI with the paper's features: (method,)."""
    return _paper("mosi")


def paper_mosei() -> Cells:
    """Tables 1, 4 and 16 on MOSEI: (method,)."""
    return _paper("mosei")


def paper_sims() -> Cells:
    """Tables 2 and 17 on SIMS: (method,)."""
    return _paper("sims")


def table1_mosi_ids() -> Cells:
    """The same with token ids, masked and encoded again: (method,)."""
    return {
        (name,): [{**_config("mosi", name, s), **IDS, "conditions": "rates"} for s in SEEDS[:3]] for name in METHODS
    }


def leak() -> Cells:
    """How much stored token features tell of their dropped neighbours: (rate,)."""
    return {
        (rate,): [{**IDS, "train": {}, "method": "leak", "conditions": rate, "seed": 0, "profile": "book"}]
        for rate in (RATES[1], RATES[5], RATES[9])
    }


def ablations_synthetic() -> Cells:
    """Tables 3, 10 and 12 on synthetic: (what,)."""
    changes = {"DEAR": {}, **ABLATIONS, **PAIRS}
    return {(name,): _synthetic("DEAR", options) for name, options in changes.items()}


def alternatives_synthetic() -> Cells:
    """Tables 9, 13 and 14 on synthetic: (what,)."""
    changes = {"DEAR": {}, "Sinkhorn": {"alignment": "sinkhorn"}, **QUERIES}
    cells = {(name,): _synthetic("DEAR", options) for name, options in changes.items()}
    names = ["language", "audio", "vision"]
    for gone, called in zip(names, ("language", "audio", "visual"), strict=True):
        cells[f"w/o {called}",] = _synthetic("DEAR", modalities=[m for m in names if m != gone])
    return cells


def ablations_mosi() -> Cells:
    """Tables 3 and 10 on CMU-MOSI, vision included where it is there: (what,)."""
    changes = {"DEAR": {}, **ABLATIONS}
    return {(name,): [_config("mosi", "DEAR", s, options) for s in SEEDS[:3]] for name, options in changes.items()}


def sensitivity_synthetic() -> Cells:
    """Tables 6 and 7 on synthetic: (what,)."""
    return {(n,): _synthetic("DEAR", options) for n, options in {"DEAR": {}, **WEIGHTS, **DEPTHS}.items()}


def interpretations() -> Cells:
    """What the paper does not say, one change at a time on synthetic: (what,)."""
    return {(n,): _synthetic("DEAR", options) for n, options in {"DEAR": {}, **INTERPRETATIONS}.items()}


def budget() -> Cells:
    """Three times the epochs, on synthetic: (method, epochs)."""
    epochs = TRAIN["epochs"]
    return {
        (name, str(n)): _synthetic(name, train={**TRAIN, "epochs": n}, conditions="half")
        for name in ("joint training", "DEAR")
        for n in (epochs, 3 * epochs)
    }


def tuning() -> Cells:
    """Four learning rates for all methods alike, one of them the other tables': (data, method, rate)."""
    cells: Cells = {}
    for source in ("synthetic", "mosi text and audio"):
        for name in METHODS:
            for lr in RATES_TRIED:
                settings = {**DATA[source]["train"], "lr": lr}
                cells[source, name, str(lr)] = [
                    _config(source, name, seed, train=settings, conditions="half") for seed in SEEDS[:3]
                ]
    return cells


def reliability() -> Cells:
    """What DEAR thinks of each test sample, at every rate and under noise: (what,)."""
    variants: dict[str, tuple[tuple[int, ...], Config]] = {
        "DEAR": (SEEDS, {}),
        "beta = 30": (SEEDS[:3], {"beta": 30.0}),
        "dropout": (SEEDS[:3], {"dropout": 0.2}),
        "e over the variance": (SEEDS[:3], {"error_scale": "variance"}),
    }
    return {
        (n,): _synthetic("DEAR", options, seeds, conditions="reliability") for n, (seeds, options) in variants.items()
    }


def selection() -> Cells:
    """What choosing epochs on test data adds to each metric: (method,)."""
    return {(name,): _synthetic(name, conditions="every epoch") for name in ("DEAR", "joint training")}


# --- runs -------------------------------------------------------------------------------------------------------------


def protocol(config: Config) -> dict[str, Any]:
    """LNLN's protocol for a run: ``train_plan``, ``valid_plan`` and the ten ``test`` plans of `train_and_score`."""
    common = {"kind": "lnln"}
    if "keep_ends" in config:
        common["keep_ends"] = config["keep_ends"]
    at = lambda rate: {**common, "rates": rate, "seed": TEST_SEED}
    tests = {name: at(float(name[2:])) for name in RATES}
    return {"train_plan": {**common, "resample": True}, "valid_plan": at(0.5), "conditions": tests}


def options(config: Config) -> Config:
    """The options of a config's method: of DEAR, those of its recipe first."""
    recipe = RECIPES[config.get("recipe", "swept")] if config["method"] == "DEAR" else {}
    return {**recipe, **config.get("method_options", {})}


def expand(config: Config) -> Config:
    """The config as `experiments.train_and_score` reads it."""
    made = {**config, **protocol(config), "method_options": options(config)}
    if config["conditions"] == "rates and subsets":
        made["conditions"] = [made["conditions"], "subsets"]
    elif config["conditions"] == "half":
        made["conditions"] = {"r=0.5": made["conditions"]["r=0.5"]}
    for name in ("protocol", "keep_ends", "recipe"):
        made.pop(name, None)
    return made


SCORED = ("rates and subsets", "rates", "half")  # the entries "conditions" that `score` reads
KEPT = ("acc7", "f1_non0", "mae", "corr")  # of the eight scores, where a table is no headline


def score(config: Config) -> results.Results:
    """`experiments.train_and_score` under the protocol; predictions in half precision."""
    rows = experiments.train_and_score(expand(config))
    headline = config["profile"] == "paper" or config.get("method_options", {}) in ({}, WIDTH)
    kept = [row for row in rows if headline or row["metric"] in KEPT]
    smaller = {
        k: v.astype(np.float16) if v.dtype == np.float32 and k != "target" else v for k, v in rows.predictions.items()
    }
    return results.Results(kept, {} if config["conditions"] == "half" else smaller)


Splits = dict[str, MultimodalDataset]


def conditions(config: Config) -> tuple[Splits, MultimodalDataset, Splits]:
    """The splits, validation as it is selected on, and the test split at each rate with what was there before."""
    splits = data.load(config["data"], config.get("data_root"), **config["data_options"])
    asked = protocol(config)
    draw = lambda plan, split: MissingPlan.from_dict(plan).draw(split).apply(split, keep_complete=True)
    tests = {name: draw(plan, splits["test"]) for name, plan in asked["conditions"].items()}
    return splits, draw(asked["valid_plan"], splits["valid"]), tests


@functools.lru_cache(maxsize=1)
def encoded(root: str | None, checkpoint: str, options: str) -> tuple[MultimodalDataset, MultimodalDataset, Splits]:
    """Train, validation and tests of MOSI with ids masked first and encoded then; training is masked once."""
    from mmlib.data import text

    encoder = text.load_encoder(Path(root or "") / checkpoint)
    splits, valid, tests = conditions({"data": "mosi", "data_root": root, "data_options": json.loads(options)})
    static = missing.lnln_protocol(static_masks=True)[0]
    train = static.draw(splits["train"]).apply(splits["train"], keep_complete=True)
    again = lambda split: text.encode(split, encoder)
    return again(train), again(valid), {name: again(split) for name, split in tests.items()}


def _encoded(config: Config) -> tuple[MultimodalDataset, MultimodalDataset, Splits]:
    return encoded(config.get("data_root"), config["text_encoder"], json.dumps(config["data_options"]))


def build(config: Config, split: MultimodalDataset) -> Any:
    """The config's method for data like these."""
    from mmlib.backbones import GenericBackbone

    kind = experiments.method_class(config["method"])
    backbone = None if config["method"] == "DEAR" else GenericBackbone.for_data(split, **config["backbone_options"])
    return kind.for_data(split, backbone, **options(config))


def train(config: Config, callbacks: tuple[Any, ...] = ()) -> tuple[Any, Any, Splits]:
    """(trained method, its history, the test split at each rate)."""
    from mmlib.training import TrainConfig, fit, random_state

    settings = TrainConfig(seed=config["seed"], device="cpu", **config["train"])
    if "text_encoder" in config:
        split, valid, tests = _encoded(config)
        plan = None
    else:
        splits, valid, tests = conditions(config)
        split, plan = splits["train"], MissingPlan.from_dict({"seed": config["seed"], **protocol(config)["train_plan"]})
    with random_state(config["seed"]):
        method = build(config, split)
        history = fit(method, split, valid, settings, train_plan=plan, callbacks=callbacks)
    return method, history, tests


def run_ids(config: Config) -> results.Results:
    """A run of `table1_mosi_ids`: the rows of `score`."""
    from mmlib.training import predict

    start = time.perf_counter()
    method, history, tests = train(config)
    rows, kept = results.Results(), {"target": tests["r=0.0"].target.numpy()}
    common = {k: config[k] for k in ("method", "data", "seed", "profile")}
    common |= {"seconds": round(time.perf_counter() - start, 3), "device": "cpu, 1 thread"}
    for name, split in tests.items():
        said = predict(method, split)[:, 0].numpy()
        scores = metrics.msa_scores(said, kept["target"])
        rows += [{**common, "condition": name, "metric": k, "value": v, "n": len(split)} for k, v in scores.items()]
        kept[name] = said.astype(np.float16)
    rows.predictions = kept
    return rows


def run_leak(config: Config) -> results.Results:
    """A run of `leak`, on the test split at one rate."""
    from mmlib.data import text

    start = time.perf_counter()
    _, _, tests = conditions(config)
    encoder = text.load_encoder(Path(config.get("data_root") or "") / config["text_encoder"])
    found = text.leak(tests[config["conditions"]], encoder)
    common = {k: config[k] for k in ("method", "data", "seed", "profile")}
    common |= {
        "seconds": round(time.perf_counter() - start, 3),
        "device": "cpu, 1 thread",
        "n": found["tokens"],
        "condition": config["conditions"],
    }
    return results.Results({**common, "metric": k, "value": found[k]} for k in ("relative", "cosine"))


def noisy(split: MultimodalDataset, name: str, sigma: float, seed: int = 0) -> MultimodalDataset:
    """The split with Gaussian noise on what is there of one modality, in units of that modality's own deviation."""
    batch = split.data
    x, seen = batch.features[name], batch.observed[name]
    scale = x[seen].std(0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * scale * sigma
    changed = batch.replace(features={**batch.features, name: torch.where(seen[..., None], x + noise, x)})
    return MultimodalDataset(changed, split.info, split.names)


PASSES = 10  # with dropout on, for the variance of predictions


def dropout_deviation(method: Any, split: MultimodalDataset, seed: int = 0) -> np.ndarray:
    """The standard deviation [n] of the predictions over `PASSES` passes with dropout on."""
    batch = split.data.replace(target=None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        method.train()
        found = torch.stack([method(batch).logits[:, 0] for _ in range(PASSES)])
    method.eval()
    return found.std(0).numpy()


def diagnose(method: Any, split: MultimodalDataset) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(means over the samples of a condition, per-sample arrays) of what DEAR says."""
    found = method.diagnose(split)
    target = split.target.numpy()
    said = found.prediction[:, 0].numpy()
    scores = metrics.msa_scores(said, target)
    means = {"gate": float(found.gate.mean()), "entropy": float(found.entropy.mean())}
    means |= {k: scores[k] for k in ("mae", "acc7")}
    arrays = {"w": found.weights.numpy(), "said": said}
    if found.difficulty is not None:
        arrays["d"] = found.difficulty.numpy()
    if found.error is not None:
        arrays["e"] = found.error.numpy()
    for what in set(arrays) - {"said"}:
        for i, m in enumerate(split.modalities):
            means[f"{what} {m}"] = float(np.nanmean(arrays[what][:, i]))
    return means, arrays


def run_reliability(config: Config) -> results.Results:
    """A run of `reliability`. Arrays: per condition the summary; d, e and predictions of every sample at every rate."""
    start = time.perf_counter()
    method, history, tests = train(config)
    whole = tests["r=0.0"]
    asked = {**tests, **{f"sigma={s}": noisy(whole, "vision", s) for s in SIGMAS}}
    means, arrays = {}, {}
    for name, split in asked.items():
        means[name], arrays[name] = diagnose(method, split)
    kept: dict[str, np.ndarray] = {"target": whole.target.numpy().astype(np.float16)}
    columns = sorted(next(iter(means.values())))
    kept["summary"] = np.array([[means[name][c] for c in columns] for name in asked], np.float32)
    kept["conditions"], kept["columns"] = np.array(list(asked)), np.array(columns)
    for what in ("d", "e", "w", "said"):
        if config["method_options"].get("dropout") and what != "said":
            continue
        kept[what] = np.stack([arrays[name][what] for name in RATES]).astype(np.float16)
    if config["method_options"].get("dropout"):
        kept["deviation"] = np.stack([dropout_deviation(method, tests[name]) for name in RATES]).astype(np.float16)
    common = {k: config[k] for k in ("method", "data", "seed", "profile")}
    common |= {"seconds": round(time.perf_counter() - start, 3), "device": "cpu, 1 thread", "n": len(whole)}
    rows = results.Results({**common, "condition": t, "metric": "mae", "value": means[t]["mae"]} for t in asked)
    rows.predictions = kept
    return rows


class EveryEpoch:
    """A callback: all scores of the test split, mean over the ten rates, after every epoch."""

    def __init__(self, tests: dict[str, MultimodalDataset]):
        self.tests = tests
        self.scores: list[dict[str, float]] = []

    def on_epoch_end(self, state: Any) -> None:
        from mmlib.training import predict

        found = [
            metrics.msa_scores(predict(state.method, s)[:, 0].numpy(), s.target.numpy()) for s in self.tests.values()
        ]
        state.method.train()
        self.scores.append({k: float(np.mean([one[k] for one in found])) for k in found[0]})


def run_selection(config: Config) -> results.Results:
    """A run of `selection`: each metric at the epoch that validation chooses, and at its own best epoch on test."""
    start = time.perf_counter()
    _, _, tests = conditions(config)
    watch = EveryEpoch(tests)
    _, history, _ = train(config, (watch,))
    chosen = watch.scores[history.best_epoch - 1]
    best = {k: (min if k == "mae" else max)(s[k] for s in watch.scores) for k in chosen}
    common = {k: config[k] for k in ("method", "data", "seed", "profile")}
    common |= {"seconds": round(time.perf_counter() - start, 3), "device": "cpu, 1 thread", "n": len(tests["r=0.0"])}
    rows = results.Results()
    for name, scores in (("chosen on validation", chosen), ("best on test", best)):
        rows += [{**common, "condition": name, "metric": k, "value": v} for k, v in scores.items()]
    return rows


TABLES: dict[str, Callable[[], Cells]] = {
    "main_synthetic": main_synthetic,
    "main_grid": main_grid,
    "main_parts": main_parts,
    "main_choices": main_choices,
    "main_reliability": main_reliability,
    "table1_synthetic": table1_synthetic,
    "reliability": reliability,
    "ablations_synthetic": ablations_synthetic,
    "tuning": tuning,
    "table1_mosi": table1_mosi,
    "leak": leak,
    "table1_mosi_ids": table1_mosi_ids,
    "alternatives_synthetic": alternatives_synthetic,
    "budget": budget,
    "selection": selection,
    "interpretations": interpretations,
    "ablations_mosi": ablations_mosi,
    "sensitivity_synthetic": sensitivity_synthetic,
    "paper_mosi": paper_mosi,
    "paper_mosei": paper_mosei,
    "paper_sims": paper_sims,
}
# Tables with cells in common share a file, so that these are run once
FILES = dict.fromkeys(
    ("table1_synthetic", "ablations_synthetic", "alternatives_synthetic", "sensitivity_synthetic", "interpretations"),
    "synthetic",
) | dict.fromkeys(("main_grid", "main_parts", "main_choices"), "main_synthetic")
RUNNERS: dict[str, Callable[[Config], results.Results]] = {
    "main_reliability": run_reliability,
    "reliability": run_reliability,
    "selection": run_selection,
    "table1_mosi_ids": run_ids,
    "leak": run_leak,
}
SWEEP = Sweep("dear", TABLES, score, RUNNERS, FILES)
path, command, main = SWEEP.path, SWEEP.command, SWEEP.main


if __name__ == "__main__":
    main()
