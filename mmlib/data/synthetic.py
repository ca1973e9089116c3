"""Sequences whose every bit of information is known, with the exact Bayes predictor.

Each sample tosses fair coins. A *shared* bit is written into every modality, a *unique* bit into one; two further
bits, one in each of two modalities, matter only through whether they are equal (the *XOR*): either modality alone
says nothing about it. A bit of modality m is written as +1 or -1 into one column of every k-th frame, and Gaussian
noise of standard deviation sigma_m is added everywhere. With s_c = +1 or -1 for the shared bits, the unique bits and
the XOR (+1 where its bits differ), the score is

    y = sum_c w_c s_c,   sum_c |w_c| = 3,   so y lies in [-3, 3];

in the classification task, y is cut into classes of nearly equal probability. Given what is observed, a bit's log
odds are 2 / sigma_m^2 times the sum of the cells in which it is written, and the components s_c are independent; from
these two facts `bayes` computes the posterior of y, for any pattern of missing modalities and frames. What is missing
must not depend on the values themselves (not MNAR).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset
from ..checks import Array, Either, Flag, Is, Maybe, Named, Number, OneOf, Several, Text, Whole, check_all, check_known
from ._readers import SEED, SIZES, fingerprint

__all__ = ["Truth", "bayes", "bayes_score", "bayes_scores", "bit_log_odds", "load", "score_posterior", "truth"]

_FRAMES, _WIDTHS = (8, 12, 6), (6, 4, 5)  # defaults, repeated when there are more modalities
_MAX_COMPONENTS = 12  # the posterior of y sums over 2 to this power sign patterns


@dataclass(frozen=True)
class Truth:
    """How the data were made: all that the Bayes predictor needs besides the observed values.

    modalities, frames, widths, noise : per modality its name, T, D and sigma
    bits : the names of the fair coins, in the order of ``extras["bits"]``
    carried : per modality the places in ``bits`` of those it carries, in the order in which they are written
    components : the names of what the score adds up: bits, and "xor"
    weights : one per component
    xor : the two places in ``bits`` whose difference is the component "xor", or None
    values, class_of : the distinct values of y, ascending, and the class of each (None in regression)
    """

    modalities: tuple[str, ...]
    frames: tuple[int, ...]
    widths: tuple[int, ...]
    noise: tuple[float, ...]
    bits: tuple[str, ...]
    carried: tuple[tuple[int, ...], ...]
    components: tuple[str, ...]
    weights: tuple[float, ...]
    xor: tuple[int, int] | None
    values: tuple[float, ...]
    class_of: tuple[int, ...] | None

    @property
    def carriers(self) -> dict[str, tuple[str, ...]]:
        """Per component the modalities that say something about it; the XOR needs both of its own."""
        by_bit = {
            name: tuple(m for m, places in zip(self.modalities, self.carried, strict=True) if i in places)
            for i, name in enumerate(self.bits)
        }
        if self.xor is not None:
            first, second = (self.bits[i] for i in self.xor)
            by_bit["xor"] = by_bit[first] + by_bit[second]
        return {c: by_bit[c] for c in self.components}

    def cells(self, modality: str) -> np.ndarray:
        """bool [bits, T, D]: where each bit is written in ``modality``."""
        m = self.modalities.index(modality)
        frames, width, places = self.frames[m], self.widths[m], self.carried[m]
        cells = np.zeros((len(self.bits), frames, width), dtype=bool)
        stride = min(len(places), frames)
        for i, bit in enumerate(places):
            cells[bit, i % stride :: stride, i % width] = True
        return cells


OPTIONS = {
    "modalities": Several(Text, 2),
    "task": OneOf("classification", "regression"),
    "classes": Whole(2),
    "shared": Whole(0),
    "xor": Maybe(Several(Text, 2, 2)),
    "weights": Maybe(Named(Number(), 0)),
    "varied_lengths": Flag(),
    "sizes": SIZES,
    "split_seed": SEED,
}


def load(
    modalities: Sequence[str] = ("language", "audio", "vision"),
    task: str = "classification",
    classes: int = 4,
    shared: int = 1,
    unique: int | Mapping[str, int] = 1,
    xor: Sequence[str] | None = ("audio", "vision"),
    noise: float | Mapping[str, float] = 1.0,
    frames: int | Mapping[str, int] | None = None,
    widths: int | Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
    varied_lengths: bool = False,
    sizes: Sequence[int] = (2000, 500, 2000),
    split_seed: int = 0,
) -> dict[str, MultimodalDataset]:
    """Three independent samples of the same world.

    modalities : at least two names
    task : "regression", y in [-3, 3], or "classification", y cut into ``classes`` classes
    shared, unique : number of bits in all modalities, and in one alone (an integer for all, or one for each)
    xor : the two modalities whose hidden bits make the XOR, or None. The default is the last two of ``modalities``
        where these are not the standard three
    noise : sigma, for all modalities or for each; > 0
    frames, widths : T and D, for all modalities or for each; by default 8, 12, 6 and 6, 4, 5
    weights : relative weight of components ("shared_0", "language_0", "xor", ...), default 1; 0 makes a distractor.
        They are scaled so that their absolute values add to 3
    varied_lengths : sequences of T / 2 to T frames, the rest is padding
    sizes : samples of train, valid and test
    split_seed : the seed of all that is random

    ``info["truth"]`` says how the data were made (see `truth`), ``extras["bits"]`` int64 [n, bits] holds the coins.
    Raises ValueError naming the argument.
    """
    check_all(OPTIONS, locals())
    made = _design(modalities, task, classes, shared, unique, xor, noise, frames, widths, weights)
    info = {
        "name": "synthetic",
        "task": task,
        "outputs": classes if task == "classification" else 1,
        "classes": [f"class {k}" for k in range(classes)] if task == "classification" else None,
        "source": "generated: mmlib.data.synthetic",
        "licence": "none needed",
        "units": {m: "amplitude; a bit is written as +1 or -1" for m in made.modalities},
        "truth": asdict(made),
    }
    cells = {m: made.cells(m) for m in made.modalities}
    splits = {}
    for k, (split, n) in enumerate(zip(("train", "valid", "test"), sizes, strict=True)):
        generator = np.random.default_rng([split_seed, k])
        bits = generator.integers(0, 2, (n, len(made.bits)))
        features, lengths = {}, {}
        for m, sigma in zip(made.modalities, made.noise, strict=True):
            shape = cells[m].shape[1:]
            x = sigma * generator.standard_normal((n, *shape))
            x += np.tensordot(2.0 * bits - 1.0, cells[m].astype(float), 1)
            features[m] = x.astype(np.float32)
            if varied_lengths:
                lengths[m] = generator.integers((shape[0] + 1) // 2, shape[0] + 1, n)
        score = _signs(made, bits) @ np.array(made.weights)
        target: np.ndarray = score.astype(np.float32)
        if made.class_of is not None:
            target = np.array(made.class_of)[_nearest(made, score)]
        dataset = MultimodalDataset.from_arrays(
            features,
            target,
            lengths=lengths or None,
            ids=[f"synthetic/{split_seed}/{split}/{i}" for i in range(n)],
            classes=classes if task == "classification" else None,
            info={**info, "split": split, "split_seed": split_seed},
        )
        dataset.data = dataset.data.replace(extras={"bits": torch.as_tensor(bits)})
        dataset.info["fingerprint"] = fingerprint(dataset)
        splits[split] = dataset
    return splits


def truth(dataset: MultimodalDataset | Mapping[str, Any]) -> Truth:
    """How a split was made, from its ``info``; ValueError for data of another source."""
    info = dataset.info if isinstance(dataset, MultimodalDataset) else dataset
    Is("a MultimodalDataset, or the info of one", Mapping)("dataset", info)
    if "components" not in info.get("truth", ()):
        raise ValueError(f"dataset: expected synthetic data, got {info.get('name')!r}, whose truth nobody knows")
    return Truth(**{key: _tuples(value) for key, value in info["truth"].items()})


def bit_log_odds(made: Truth, data: MultimodalBatch | MultimodalDataset) -> Tensor:
    """log P(bit = 1 | observed) - log P(bit = 0 | observed), float64 [n, bits]; 0 for a bit nothing is seen of."""
    Is("a Truth", Truth)("made", made)
    Either(DATASET, BATCH)("data", data)
    batch = data.data if isinstance(data, MultimodalDataset) else data
    check_known("data", batch.modalities, made.modalities)
    odds = torch.zeros(len(batch), len(made.bits), dtype=torch.float64, device=batch.device)
    for m, x in batch.features.items():
        sigma = made.noise[made.modalities.index(m)]
        seen = torch.where(batch.observed[m][..., None], x, 0).to(torch.float64)
        cells = torch.as_tensor(made.cells(m), device=x.device).to(torch.float64)
        odds += 2 / sigma**2 * torch.einsum("ntd,btd->nb", seen, cells)
    return odds


def score_posterior(made: Truth, log_odds: Tensor) -> Tensor:
    """P(y = made.values[k] | observed), float64 [n, values], from the bits' log odds [n, bits]."""
    Is("a Truth", Truth)("made", made)
    if Array("float", "[n, bits]")("log_odds", log_odds).shape[1] != len(made.bits):
        raise ValueError(f"log_odds: expected [n, {len(made.bits)}], got {tuple(log_odds.shape)}")
    tilt = torch.tanh(log_odds.to(torch.float64) / 2)  # E[s] of every bit
    columns = [
        -tilt[:, made.xor[0]] * tilt[:, made.xor[1]] if name == "xor" and made.xor else tilt[:, made.bits.index(name)]
        for name in made.components
    ]
    plus = (1 + torch.stack(columns, -1)) / 2
    patterns, place = _patterns(made)
    signs = torch.as_tensor(patterns > 0, device=plus.device)
    result = torch.zeros(len(plus), len(made.values), dtype=torch.float64, device=plus.device)
    rows = max(1, (1 << 22) // len(patterns))
    for start in range(0, len(plus), rows):  # blocks of samples: 2^components columns may be many
        p = plus[start : start + rows]
        joint = torch.ones(len(p), len(patterns), dtype=torch.float64, device=p.device)
        for c in range(p.shape[1]):
            joint *= torch.where(signs[:, c], p[:, c, None], 1 - p[:, c, None])
        result[start : start + rows].index_add_(1, torch.as_tensor(place, device=p.device), joint)
    return result


def bayes(dataset: MultimodalDataset, loss: str | None = None) -> Tensor:
    """The best prediction from what is observed, in the form that models give: float64 [n, K].

    Classification: log posterior probabilities of the classes, whose argmax no predictor beats in accuracy.
    Regression: [n, 1], the posterior median for ``loss="mae"`` (the default), the posterior mean for ``loss="mse"``.
    """
    made = truth(DATASET("dataset", dataset))
    Maybe(Text)("loss", loss)
    return _decide(made, score_posterior(made, bit_log_odds(made, dataset)), loss)


def bayes_score(
    made: Truth | MultimodalDataset,
    modalities: Sequence[str] | None = None,
    metric: str | None = None,
    samples: int = 200_000,
    seed: int = 0,
) -> tuple[float, float]:
    """(score, standard error) of the Bayes predictor that sees all frames of these modalities, all by default.

    metric : "accuracy" (classification), "mae" or "mse" (regression). The loss is averaged over simulated log odds
        (which are Gaussian given the bit) *after* taking its posterior expectation, so that the standard error is that
        of the numerical average alone: no real sample enters. An empty list gives the score of knowing nothing.
    """
    Either(Is("a Truth", Truth), DATASET)("made", made)
    Maybe(Several(Text))("modalities", modalities)
    Maybe(Text)("metric", metric)
    Whole(1)("samples", samples)
    SEED("seed", seed)
    made = made if isinstance(made, Truth) else truth(made)
    known = set(made.modalities if modalities is None else modalities)
    check_known("modalities", known, made.modalities)
    allowed = ("mae", "mse") if made.class_of is None else ("accuracy",)
    metric = allowed[0] if metric is None else metric
    if metric not in allowed:
        raise ValueError(f"metric: expected one of {allowed}, got {metric!r}")
    information = np.zeros(len(made.bits))  # per bit: number of cells over sigma squared
    for m, sigma in zip(made.modalities, made.noise, strict=True):
        if m in known:
            information += made.cells(m).sum((1, 2)) / sigma**2
    generator = np.random.default_rng(seed)
    values = torch.tensor(made.values, dtype=torch.float64)
    total = total_square = 0.0
    for start in range(0, samples, 20_000):
        n = min(20_000, samples - start)
        signs = 2.0 * generator.integers(0, 2, (n, len(made.bits))) - 1
        # the log odds are 2 (information s + sqrt(information) z): the sum of the bit's cells is sufficient
        odds = 2 * (information * signs + np.sqrt(information) * generator.standard_normal(signs.shape))
        posterior = score_posterior(made, torch.as_tensor(odds))
        decision = _decide(made, posterior, metric)
        if metric == "accuracy":
            gain = decision.exp().amax(-1)
        else:
            error = decision - values
            gain = (posterior * (error.abs() if metric == "mae" else error.square())).sum(-1)
        total += float(gain.sum())
        total_square += float(gain.square().sum())
    mean = total / samples
    return mean, float(np.sqrt(max(total_square / samples - mean**2, 0.0) / samples))


def bayes_scores(
    dataset: MultimodalDataset, metric: str | None = None, samples: int = 200_000, seed: int = 0
) -> dict[tuple[str, ...], float]:
    """`bayes_score` of every subset of the modalities, the empty one included: the game whose Shapley value is true.

    The keys keep the order of the modalities; 2^M entries.
    """
    made = truth(dataset)
    subsets = [s for k in range(len(made.modalities) + 1) for s in combinations(made.modalities, k)]
    return {s: bayes_score(made, s, metric, samples, seed)[0] for s in subsets}


# -- building blocks ---------------------------------------------------------------------------------------------------


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _each(what: str, value: Any, names: Sequence[str], kind: type, low: float) -> tuple[Any, ...]:
    """One value per modality, from one for all or a mapping."""
    if isinstance(value, Mapping):
        if set(value) != set(names):
            raise ValueError(f"{what}: expected a value for each of {list(names)}, got {sorted(value)}")
        values = [value[m] for m in names]
    else:
        values = [value] * len(names)
    for v in values:
        (Whole if kind is int else Number)(low)(what, v)
    return tuple(kind(v) for v in values)


def _design(
    modalities: Sequence[str],
    task: str,
    classes: int,
    shared: int,
    unique: int | Mapping[str, int],
    xor: Sequence[str] | None,
    noise: float | Mapping[str, float],
    frames: int | Mapping[str, int] | None,
    widths: int | Mapping[str, int] | None,
    weights: Mapping[str, float] | None,
) -> Truth:
    """The checked arguments of `load` as a Truth."""
    names = tuple(modalities)
    if len(set(names)) < len(names):
        raise ValueError(f"modalities: expected at least two different names, got {modalities!r}")
    cycle = lambda values: {m: values[i % len(values)] for i, m in enumerate(names)}
    T = _each("frames", cycle(_FRAMES) if frames is None else frames, names, int, 1)
    D = _each("widths", cycle(_WIDTHS) if widths is None else widths, names, int, 1)
    sigma = _each("noise", noise, names, float, 1e-3)
    own = _each("unique", unique, names, int, 0)
    if xor is not None and tuple(xor) == ("audio", "vision") and not set(xor) <= set(names):
        xor = names[-2:]
    if xor is not None and (len(set(xor)) < 2 or not set(xor) <= set(names)):
        raise ValueError(f"xor: expected two of {list(names)} or None, got {xor!r}")

    bits = [f"shared_{i}" for i in range(shared)]
    carried: dict[str, list[int]] = {m: list(range(shared)) for m in names}
    for m, count in zip(names, own, strict=True):
        carried[m] += range(len(bits), len(bits) + count)
        bits += [f"{m}_{i}" for i in range(count)]
    components = list(bits)
    pair = None
    if xor is not None:
        pair = (len(bits), len(bits) + 1)
        for m, place in zip(xor, pair, strict=True):
            carried[m].append(place)
            bits.append(f"xor_{m}")
        components.append("xor")
    if not 1 <= len(components) <= _MAX_COMPONENTS:
        raise ValueError(
            f"shared, unique, xor: expected 1 to {_MAX_COMPONENTS} components of the score, got {len(components)}"
        )
    if len(set(bits)) < len(bits):
        raise ValueError(f"modalities: these names clash with the names of bits: {list(names)}")
    relative = {c: 1.0 for c in components}
    if unknown := set(weights or {}) - set(components):
        raise ValueError(f"weights: unknown components {sorted(unknown)}; known are {components}")
    relative.update({c: float(w) for c, w in (weights or {}).items()})
    size = sum(abs(w) for w in relative.values())
    if not 0 < size < float("inf"):
        raise ValueError(f"weights: expected finite weights, not all zero, got {weights!r}")

    facts: dict[str, Any] = {
        "modalities": names,
        "frames": T,
        "widths": D,
        "noise": sigma,
        "bits": tuple(bits),
        "carried": tuple(tuple(carried[m]) for m in names),
        "components": tuple(components),
        "weights": tuple(3 * w / size for w in relative.values()),
        "xor": pair,
    }
    made = Truth(**facts, values=(), class_of=None)
    for m, places in carried.items():
        if places and made.cells(m).sum(0).max() > 1:
            k = names.index(m)
            raise ValueError(
                f"frames, widths: {m!r} has {T[k]} frames of width {D[k]}, too few for its {len(places)} bits; give it "
                f"as many frames, or as large a width, as it has bits"
            )
    signs = _all_signs(len(components))
    values, counts = np.unique(np.round(signs @ np.array(made.weights), 9), return_counts=True)
    class_of = None
    if task == "classification":
        if not 2 <= classes <= len(values):
            raise ValueError(f"classes: expected 2 to {len(values)}, the score's distinct values, got {classes}")
        class_of = _cut(counts / counts.sum(), classes)
    return Truth(**facts, values=tuple(float(v) for v in values), class_of=class_of)


def _cut(shares: np.ndarray, classes: int) -> tuple[int, ...]:
    """The class of each of the ascending values, none empty: the cut with the least sum of squared probabilities."""
    ends = np.concatenate([[0.0], np.cumsum(shares)])
    cost = (ends[None, :] - ends[:, None]) ** 2  # [from, to] of one class
    cost[np.tril_indices(len(ends))] = np.inf
    best, origins = cost[0], []
    for _ in range(classes - 1):  # dynamic programming over the last class's first value
        total = best[:, None] + cost
        origins.append(np.round(total, 12).argmin(0))
        best = total.min(0)
    borders = [len(shares)]
    for origin in reversed(origins):
        borders.append(int(origin[borders[-1]]))
    return tuple(int(k) for k in np.searchsorted(sorted(borders)[:-1], np.arange(len(shares)), side="right"))


def _all_signs(n: int) -> np.ndarray:
    """All sign patterns of n components, float64 [2^n, n]."""
    return 2.0 * ((np.arange(1 << n)[:, None] >> np.arange(n)) & 1) - 1


def _signs(made: Truth, bits: np.ndarray) -> np.ndarray:
    """The components' signs [n, components] for bits [n, bits]."""
    signs = 2.0 * bits - 1
    columns = [
        -signs[:, made.xor[0]] * signs[:, made.xor[1]]
        if name == "xor" and made.xor
        else signs[:, made.bits.index(name)]
        for name in made.components
    ]
    return np.stack(columns, -1)


def _nearest(made: Truth, score: np.ndarray) -> np.ndarray:
    """The place in ``made.values`` of each score [n], int64 [n]."""
    values = np.array(made.values)
    return np.searchsorted((values[1:] + values[:-1]) / 2, score)


@lru_cache(maxsize=16)
def _patterns(made: Truth) -> tuple[np.ndarray, np.ndarray]:
    """All sign patterns of the components, and the place of each one's score in ``made.values``."""
    signs = _all_signs(len(made.components))
    return signs, _nearest(made, signs @ np.array(made.weights))


def _decide(made: Truth, posterior: Tensor, loss: str | None) -> Tensor:
    """Class log probabilities [n, K], or the mean or median [n, 1], of a posterior over ``made.values``."""
    if made.class_of is not None:
        if loss not in (None, "accuracy"):
            raise ValueError(f"loss: expected None for classification, got {loss!r}")
        classes = torch.tensor(made.class_of, device=posterior.device)
        result = posterior.new_zeros(len(posterior), int(classes.max()) + 1)
        return result.index_add_(1, classes, posterior).clamp_min(1e-300).log()
    values = torch.tensor(made.values, dtype=posterior.dtype, device=posterior.device)
    if loss == "mse":
        return (posterior @ values)[:, None]
    if loss not in (None, "mae"):
        raise ValueError(f"loss: expected 'mae' or 'mse', got {loss!r}")
    # the lower median: the first value at which half of the probability is reached
    half = posterior.cumsum(-1) >= (0.5 - 1e-12) * posterior.sum(-1, keepdim=True)
    return values[half.to(torch.int8).argmax(-1)][:, None]
