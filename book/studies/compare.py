"""The runs behind "How we compare": ``python -m book.studies.compare TABLE... [--data-root FOLDER]``.

``floors``: what a constant and a linear probe reach on each data set, which every table of the book has to beat.
``intervals``: how often the intervals of `mmlib.statistics` hold the truth in simulated experiments, and how wide they
are. The page shows both through `table`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from book.support import results
from book.support.sweep import UNEQUAL, Cells, Config, Sweep
from mmlib import MultimodalDataset, data, metrics, statistics

# The data of the book's tables, by the words of the page
DATA: dict[str, Config] = {
    "digits": {"data": "digits"},
    "synthetic, three sequences": {"data": "synthetic", "data_options": {**UNEQUAL, "sizes": [1000, 300, 600]}},
    "conversations": {"data": "conversations", "data_options": {"lengths": [4, 12], "sizes": [160, 40, 160]}},
    "AV-MNIST": {"data": "avmnist", "data_options": {"scaling": "train"}},
    "mfeat": {"data": "mfeat"},
    "MOSI (public features)": {"data": "mosi", "data_options": {"max_frames": 24}},
    "MOSI dialogues (public features)": {"data": "dialogue", "data_options": {"corpus": "mosi"}},
}
STRENGTHS = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)  # of the penalty, the best on validation

SEEDS, SAMPLES, WORLDS = (3, 5, 10), 150, 2000
DESIGNS: dict[str, tuple[float, float, float]] = {  # standard deviations of seeds, of samples and of the rest
    "samples alone": (0.0, 1.0, 0.3),
    "samples, few from seeds": (0.05, 1.0, 0.5),
    "seeds and samples": (0.1, 0.3, 1.0),
    "seeds above all": (0.3, 1.0, 1.0),
}
SIMULATED: Config = {"method": "paired_interval", "data": "simulated", "seed": 0, "profile": "book"}


# --- floors ----------------------------------------------------------------------------------------------------------


def floors() -> Cells:
    """A constant, and linear probes of each modality and of all: (data set, what)."""
    return {
        (name, method): [
            {"data_options": {}, **given, "method": method, "backbone": "linear", "seed": 0, "profile": "book"}
        ]
        for name, given in DATA.items()
        for method in ("constant", "pooled probe")
    }


def pooled(split: MultimodalDataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A modality's features [n, D] of the real samples, the mean over the frames that are there, and which have it.

    A modality that a sample lacks, and images, are as they are: zeros, and all their pixels.
    """
    x, batch = split.data.features[name], split.data
    if x.ndim - len(batch.shape) == 2:  # frames: [*N, T, D]
        seen = batch.observed[name][..., None].to(x.dtype)
        x = (x * seen).sum(-2) / seen.sum(-2).clamp(min=1)
    real = batch.extras.get("utterance", torch.ones(batch.shape, dtype=torch.bool))
    there = batch.present[..., split.modalities.index(name)]
    return x[real].flatten(1).double().numpy(), there[real].numpy()


def targets(split: MultimodalDataset) -> np.ndarray:
    assert split.target is not None
    real = split.data.extras.get("utterance", torch.ones(split.data.shape, dtype=torch.bool))
    return split.target[real].numpy()


def run_floors(config: Config) -> results.Results:
    """The scores of one kind of floor: a condition each modality alone, "all" for all of them.

    Of samples without a modality the probe of it alone sees zeros, and its test leaves them out.
    """
    splits = data.load(config["data"], config.get("data_root"), **config["data_options"])
    y = {key: targets(split) for key, split in splits.items()}
    alone = {m: {key: pooled(split, m) for key, split in splits.items()} for m in splits["train"].modalities}
    rows, kept = results.Results(), {"target": y["test"]}
    common = {k: config[k] for k in ("method", "data", "backbone", "seed", "profile")}
    common |= {"data_hash": splits["test"].info["fingerprint"][:12], "mask_hash": "-"}
    chosen = {"all": list(alone)} if config["method"] == "constant" else {**{m: [m] for m in alone}, "all": list(alone)}
    for condition, names in chosen.items():
        x = {key: np.hstack([alone[m][key][0] for m in names]) for key in splits}
        there = np.any([alone[m]["test"][1] for m in names], axis=0)
        guess = constant(y["train"], len(there)) if config["method"] == "constant" else probed(x, y)
        kept[condition] = np.where(there, guess, np.nan if guess.dtype.kind == "f" else -1)
        scores = scored(kept[condition][there], y["test"][there], splits["test"].info.get("scale", "mosi"))
        rows += [{**common, "condition": condition, "metric": k, "value": v, "n": int(there.sum())} for k, v in scores]
    rows.predictions = kept
    return rows


def constant(train: np.ndarray, n: int) -> np.ndarray:
    """The most frequent class or the median score of ``train``, n times."""
    if train.dtype.kind == "f":
        return np.full(n, np.median(train))
    classes, counts = np.unique(train, return_counts=True)
    return np.full(n, classes[counts.argmax()])


def probed(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> np.ndarray:
    """The test predictions [n] of a linear model whose penalty is the best on validation."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = y["train"].dtype.kind == "f"
    best: tuple[float, Any] = (math.inf, None)
    for strength in STRENGTHS:
        model = Ridge(strength * len(y["train"])) if scores else LogisticRegression(C=1 / strength, max_iter=3000)
        model = make_pipeline(StandardScaler(), model).fit(x["train"], y["train"])
        guess = model.predict(x["valid"])
        error = np.abs(guess - y["valid"]).mean() if scores else (guess != y["valid"]).mean()
        if error < best[0]:
            best = float(error), model
    return best[1].predict(x["test"])


def scored(guess: np.ndarray, target: np.ndarray, scale: str) -> list[tuple[str, float]]:
    if target.dtype.kind == "f":
        return list(metrics.msa_scores(guess, target, scale=scale).items())
    found = metrics.classification_scores(guess, target)
    return [(name, found[name]) for name in ("accuracy", "weighted_f1")]


# --- intervals -------------------------------------------------------------------------------------------------------


def intervals() -> Cells:
    """Simulated experiments whose truth is known: (design, what skews, seeds)."""
    return {
        (design, skew, str(n)): [{**SIMULATED, "design": list(sizes), "skew": skew, "n": n}]
        for design, sizes in DESIGNS.items()
        for skew in ("normal", "skewed")
        for n in SEEDS
    }


def run_intervals(config: Config) -> list[dict[str, Any]]:
    """``coverage`` of 95 % intervals in `WORLDS` experiments, and their mean ``width`` over that of an oracle.

    The true difference is 0. A seed's variance is one of two, nine times apart; what a sample adds all seeds share; the
    oracle knows every variance. ``students`` is the coverage of Student's interval over seeds, which takes the test
    samples for all that there are.
    """
    n, (of_seeds, of_samples, rest) = config["n"], config["design"]
    rng = np.random.default_rng([config["seed"], n])
    skewed = config["skew"] == "skewed"
    draw = (lambda *shape: rng.exponential(1, shape) - 1) if skewed else (lambda *shape: rng.normal(0, 1, shape))
    held = np.zeros((WORLDS, 2), bool)
    width = np.zeros(WORLDS)
    for world in range(WORLDS):
        scale = rng.choice([0.5, 1.5], (n, 1))  # of the seeds; the mean square is 1.25
        d = of_seeds * scale * draw(n, 1) + of_samples * draw(1, SAMPLES) + rest * rng.normal(0, 1, (n, SAMPLES))
        found = [statistics.paired_interval(x, np.zeros_like(x)) for x in (d, d.mean(1))]
        held[world] = [one.low <= 0 <= one.high for one in found]
        width[world] = found[0].high - found[0].low
    oracle = 2 * 1.96 * math.sqrt(1.25 * of_seeds**2 / n + of_samples**2 / SAMPLES + rest**2 / (n * SAMPLES))
    values = {"coverage": held[:, 0].mean(), "students": held[:, 1].mean(), "width": width.mean() / oracle}
    common = {**SIMULATED, "condition": "simulated", "data_hash": "-", "mask_hash": "-"}
    return [{**common, "metric": k, "value": float(v), "n": WORLDS} for k, v in values.items()]


SWEEP = Sweep(
    "compare",
    {"floors": floors, "intervals": intervals},
    runners={"floors": run_floors, "intervals": run_intervals},
)
path, command, main = SWEEP.path, SWEEP.command, SWEEP.main


# --- what the page shows ---------------------------------------------------------------------------------------------


def tables() -> dict[str, str]:
    """What the page shows between its marks: name -> Markdown."""
    return {"floors": floors_table(), "intervals": intervals_table()}


def floors_table() -> str:
    """A line a data set and metric: a constant, the best modality alone, all modalities."""
    lines = ["| Data set | Metric | Test samples | Constant | Best modality alone | All modalities |"]
    lines += ["| :-- | :-- | --: | --: | --: | --: |"]
    for words in DATA:
        constant, probes = (_values("floors", (words, method)) for method in ("constant", "pooled probe"))
        kinds = ("mae", "f1_non0") if ("all", "mae") in probes else ("accuracy",)
        for metric in kinds:
            alone = {c: value for (c, m), (value, _) in probes.items() if m == metric and c != "all"}
            best = (min if metric == "mae" else max)(alone, key=lambda c: alone[c])
            (everything, n), (nothing, _) = probes["all", metric], constant["all", metric]
            show = (lambda x: f"{x:.3f}") if metric == "mae" else (lambda x: f"{100 * x:.1f}")
            name = {"mae": "MAE", "f1_non0": "weighted F1, sign"}.get(metric, metric)
            cells = [words, name, f"{n}", show(nothing), f"{show(alone[best])} ({best})", show(everything)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def intervals_table() -> str:
    """A line a design and number of seeds: coverage and width of the paired interval, coverage of Student's."""
    lines = ["| Differences come from | Seeds | Holds the truth | Width, times the oracle's | Student's over seeds |"]
    lines += ["| :-- | --: | --: | --: | --: |"]
    for design in DESIGNS:
        for n in SEEDS:
            both = [_values("intervals", (design, skew, str(n))) for skew in ("normal", "skewed")]
            show = lambda name, both=both: " / ".join(f"{found['simulated', name][0]:.3f}" for found in both)
            width = " / ".join(f"{found['simulated', 'width'][0]:.2f}" for found in both)
            lines.append(f"| {design} | {n} | {show('coverage')} | {width} | {show('students')} |")
    return "\n".join(lines)


def _values(table: str, label: tuple[str, ...]) -> dict[tuple[str, str], tuple[float, int]]:
    """(condition, metric) -> value and number of samples of a cell's run."""
    (config,) = SWEEP.tables[table]()[label]
    found = results.load_results(path(table))
    found = found[found["config_hash"] == results.config_hash(config)]
    columns = (found[name].tolist() for name in ("condition", "metric", "value", "n"))
    return {(where, metric): (value, int(n)) for where, metric, value, n in zip(*columns, strict=True)}


if __name__ == "__main__":
    main()
