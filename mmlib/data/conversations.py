"""Conversations of two speakers whose every probability is known, with the exact Bayes predictor.

In each utterance one of two people speaks; the next utterance is the other's with probability ``turn``. The emotion k
of an utterance follows the speaker's own last emotion i (inertia) and the other's last emotion j (influence):

    P(k | i, j) = inertia [k = i] + influence [k = j] + (1 - inertia - influence) prior_k,

where who has not spoken yet leaves his share to the prior, so that every utterance's emotion is distributed as the
prior. Modality m of an utterance is a vector x_m = strength_m p_mk + noise, with orthonormal prototypes p_mk and unit
Gaussian noise: modalities say the same thing unequally loudly. Who speaks is known, the emotions are hidden.

The two last emotions are a hidden Markov state. `bayes` computes the posterior of every utterance's emotion from what
is observed of the utterance alone, of it and the past (the forward algorithm), or of the whole dialogue (forward and
backward), for any pattern of missing modalities. What is missing must not depend on the values themselves (not MNAR).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset, stable_ids
from ..checks import Either, Is, Maybe, Named, Number, OneOf, Several, Text, Whole, check_all, check_known
from ._readers import SEED, SHARE, SIZES, fingerprint

__all__ = ["CONTEXTS", "Truth", "bayes", "bayes_score", "bayes_scores", "load", "log_likelihood", "truth"]

CONTEXTS = ("utterance", "past", "dialogue")
_NAMES = ("happy", "sad", "neutral", "angry", "excited", "frustrated")
_PRIOR = (0.09, 0.15, 0.23, 0.15, 0.14, 0.24)  # about as in IEMOCAP
_STRENGTH = {"audio": 0.9, "language": 1.3, "vision": 0.6}
_WIDTHS = {"audio": 12, "language": 16, "vision": 8}


@dataclass(frozen=True)
class Truth:
    """How the data were made: all that the Bayes predictor needs besides the observed values.

    modalities, strength : per modality its name and how loudly it speaks
    prototypes : per modality the orthonormal p_mk, [K, D]
    prior : per emotion, sums to 1
    inertia, influence, turn : probabilities, as in the module's equations
    lengths : the fewest and the most utterances of a dialogue; all numbers between are equally likely
    """

    modalities: tuple[str, ...]
    strength: tuple[float, ...]
    prototypes: tuple[tuple[tuple[float, ...], ...], ...]
    prior: tuple[float, ...]
    inertia: float
    influence: float
    turn: float
    lengths: tuple[int, int]

    def means(self, modality: str) -> np.ndarray:
        """float64 [K, D]: the mean of a modality given each emotion."""
        m = self.modalities.index(modality)
        return self.strength[m] * np.array(self.prototypes[m])

    def transition(self) -> np.ndarray:
        """float64 [K + 1, K + 1, K]: P(k | own last, other's last); the last index stands for "has not spoken yet"."""
        K = len(self.prior)
        table = np.zeros((K + 1, K + 1, K))
        for k in range(K):
            table[k, :, k] += self.inertia
            table[:, k, k] += self.influence
        return table + (1 - table.sum(-1, keepdims=True)) * np.array(self.prior)


CHANCE = Number(0, 1)
OPTIONS = {
    "strength": Maybe(Named(Number(0))),
    "prior": Several(SHARE, 2),
    "inertia": CHANCE,
    "influence": CHANCE,
    "turn": CHANCE,
    "lengths": Several(Whole(1), 2, 2),
    "sizes": SIZES,
    "split_seed": SEED,
}


def load(
    strength: Mapping[str, float] | None = None,
    widths: int | Mapping[str, int] | None = None,
    prior: Sequence[float] = _PRIOR,
    inertia: float = 0.55,
    influence: float = 0.25,
    turn: float = 0.7,
    lengths: Sequence[int] = (6, 24),
    sizes: Sequence[int] = (120, 30, 120),
    split_seed: int = 0,
) -> dict[str, MultimodalDataset]:
    """Three independent samples of the same world, dialogues padded to [B, U].

    strength : per modality how loudly it speaks, >= 0; default audio 0.9, language 1.3, vision 0.6. The names given
        here are the modalities, in this order
    widths : D, for all modalities or for each, at least the number of emotions; default 12, 16, 8
    prior : probability of each emotion; six by default, about as frequent as in IEMOCAP
    inertia, influence : probabilities that the own, and the other's, last emotion comes again; their sum is at most 1
    turn : probability that the other speaks next
    lengths : the fewest and the most utterances of a dialogue
    sizes : dialogues of train, valid and test
    split_seed : the seed of all that is random

    With the defaults the best accuracy is 0.68 from each utterance alone, 0.79 with its past and 0.84 with its
    dialogue; from the dialogue's language alone 0.76, its audio 0.63, its vision 0.50; guessing gives 0.24.

    Features are [B, U, 1, D], the target [B, U]; ``extras["utterance"]`` bool [B, U] says which utterances are real,
    ``extras["speaker"]`` int64 [B, U] who speaks. ``info["truth"]`` says how the data were made (see `truth`). Raises
    ValueError naming the argument.
    """
    check_all(OPTIONS, locals())
    made = _design(strength, widths, prior, inertia, influence, turn, lengths, split_seed)
    K = len(made.prior)
    info = {
        "name": "conversations",
        "task": "classification",
        "outputs": K,
        "classes": list(_NAMES) if len(_NAMES) == K else [f"class {k}" for k in range(K)],
        "source": "generated: mmlib.data.conversations",
        "licence": "none needed",
        "speakers": 2,
        "units": {m: "standard deviations of the noise" for m in made.modalities},
        "truth": asdict(made),
    }
    splits = {}
    for k, (split, n) in enumerate(zip(("train", "valid", "test"), sizes, strict=True)):
        data = _simulate(made, n, np.random.default_rng([split_seed, k]))
        names = [f"conversations/{split_seed}/{split}/{i}" for i in range(n)]
        dataset = MultimodalDataset(data.replace(ids=stable_ids(names)), dict(info), names)
        dataset.info.update(utterances=int(data.extras["utterance"].sum()), split=split, split_seed=split_seed)
        dataset.info["fingerprint"] = fingerprint(dataset)
        splits[split] = dataset
    return splits


def truth(dataset: MultimodalDataset | Mapping[str, Any]) -> Truth:
    """How a split was made, from its ``info``; ValueError for data of another source."""
    info = dataset.info if isinstance(dataset, MultimodalDataset) else dataset
    Is("a MultimodalDataset, or the info of one", Mapping)("dataset", info)
    if "prototypes" not in info.get("truth", ()):
        raise ValueError(f"dataset: expected generated conversations, got {info.get('name')!r}")
    return Truth(**{key: _tuples(value) for key, value in info["truth"].items()})


def log_likelihood(made: Truth, data: MultimodalBatch | MultimodalDataset) -> Tensor:
    """log p(what is observed of an utterance | emotion) up to a constant, float64 [B, U, K]; 0 where nothing is."""
    Is("a Truth", Truth)("made", made)
    Either(DATASET, BATCH)("data", data)
    batch = data.data if isinstance(data, MultimodalDataset) else data
    check_known("data", batch.modalities, made.modalities)
    total = torch.zeros(*batch.shape, len(made.prior), dtype=torch.float64, device=batch.device)
    for m, x in batch.features.items():
        means = torch.as_tensor(made.means(m), device=batch.device)
        fit = x[..., 0, :].to(torch.float64) @ means.T - means.square().sum(-1) / 2
        total += torch.where(batch.observed[m], fit, 0.0)
    return total


def bayes(dataset: MultimodalDataset, context: str = "dialogue") -> Tensor:
    """The best prediction from what is observed: log posterior probabilities float64 [B, U, K], in padding the prior's.

    No predictor beats its argmax in accuracy that sees the same "utterance" alone, the utterance and its "past", or the
    whole "dialogue".
    """
    made = truth(DATASET("dataset", dataset))
    OneOf(*CONTEXTS)("context", context)
    return _posterior(made, dataset.data, context).clamp_min(1e-300).log()


def bayes_score(
    made: Truth | MultimodalDataset,
    modalities: Sequence[str] | None = None,
    context: str = "dialogue",
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """(accuracy, standard error) of the Bayes predictor that sees these modalities, all by default.

    samples : simulated dialogues. An utterance counts with the posterior probability of the best guess instead of
        whether it was right, which has the same mean and less noise; the standard error is over dialogues. An empty
        list gives the score of knowing nothing but who speaks.
    """
    Either(Is("a Truth", Truth), DATASET)("made", made)
    Maybe(Several(Text))("modalities", modalities)
    OneOf(*CONTEXTS)("context", context)
    Whole(2)("samples", samples)
    SEED("seed", seed)
    made = made if isinstance(made, Truth) else truth(made)
    known = made.modalities if modalities is None else tuple(modalities)
    check_known("modalities", known, made.modalities)
    batch = _simulate(made, samples, np.random.default_rng([seed, 99]))
    batch = batch.drop(present=torch.tensor([m in known for m in made.modalities]))
    best = _posterior(made, batch, context).amax(-1)
    real = batch.extras["utterance"]
    counts = real.sum(-1).double()
    sums = torch.where(real, best, 0.0).sum(-1)
    mean = sums.sum() / counts.sum()
    spread = (sums - mean * counts).square().sum().sqrt() / counts.sum()
    return float(mean), float(spread)


def bayes_scores(
    dataset: MultimodalDataset, context: str = "dialogue", samples: int = 2000, seed: int = 0
) -> dict[tuple[str, ...], float]:
    """`bayes_score` of every subset of the modalities, the empty one included: the game whose Shapley value is true.

    The keys keep the order of the modalities; 2^M entries, from the same simulated dialogues.
    """
    made = truth(dataset)
    subsets = [s for k in range(len(made.modalities) + 1) for s in combinations(made.modalities, k)]
    return {s: bayes_score(made, s, context, samples, seed)[0] for s in subsets}


# -- building blocks ------------------------------------------------------------------------------------------------


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _design(
    strength: Mapping[str, float] | None,
    widths: int | Mapping[str, int] | None,
    prior: Sequence[float],
    inertia: float,
    influence: float,
    turn: float,
    lengths: Sequence[int],
    seed: int,
) -> Truth:
    """The checked arguments of `load` as a Truth."""
    loud = dict(_STRENGTH if strength is None else strength)
    if abs(sum(prior) - 1) > 1e-9:
        raise ValueError(f"prior: expected at least two probabilities that sum to 1, got {tuple(prior)}")
    if inertia + influence > 1:
        raise ValueError(f"inertia, influence: expected a sum of at most 1, got {inertia} + {influence}")
    if lengths[0] > lengths[1]:
        raise ValueError(f"lengths: expected the fewest and the most utterances, from 1, got {tuple(lengths)}")
    if isinstance(widths, Mapping):
        if set(widths) != set(loud):
            raise ValueError(f"widths: expected a value for each of {list(loud)}, got {sorted(widths)}")
        size = dict(widths)
    else:
        size = {m: _WIDTHS.get(m, 12) if widths is None else widths for m in loud}
    K = len(prior)
    generator = np.random.default_rng([seed, 3])
    prototypes = []
    for m, width in size.items():
        Whole(K)(f"widths[{m!r}]", width)  # at least the number of emotions
        axes, _ = np.linalg.qr(generator.standard_normal((width, K)))
        prototypes.append(_tuples(axes.T.tolist()))
    return Truth(
        tuple(loud),
        tuple(float(v) for v in loud.values()),
        tuple(prototypes),
        tuple(float(p) for p in prior),
        float(inertia),
        float(influence),
        float(turn),
        (int(lengths[0]), int(lengths[1])),
    )


def _simulate(made: Truth, n: int, generator: np.random.Generator) -> MultimodalBatch:
    """n dialogues, padded to the longest possible."""
    K, U = len(made.prior), made.lengths[1]
    length = generator.integers(made.lengths[0], U + 1, n)
    real = np.arange(U) < length[:, None]
    first = generator.integers(0, 2, (n, 1))
    changes = generator.random((n, U - 1)) < made.turn
    speaker = (np.concatenate([first, changes], 1).cumsum(1) % 2).astype(np.int64)
    table, last = made.transition().cumsum(-1), np.full((n, 2), K)
    draws, rows = generator.random((n, U)), np.arange(n)
    emotion = np.zeros((n, U), np.int64)
    for u in range(U):
        who = speaker[:, u]
        chances = table[last[rows, who], last[rows, 1 - who]]
        emotion[:, u] = (draws[:, u, None] >= chances[:, : K - 1]).sum(1)
        last[rows, who] = emotion[:, u]
    features = {}
    for m in made.modalities:
        means = made.means(m)
        x = means[emotion] + generator.standard_normal((n, U, means.shape[1]))
        features[m] = torch.from_numpy((x * real[..., None]).astype(np.float32))[:, :, None]
    there = torch.from_numpy(real)
    return MultimodalBatch(
        features,
        there[..., None].repeat(1, 1, len(features)),
        torch.from_numpy(emotion * real),
        valid={m: there[..., None].clone() for m in features},
        extras={"utterance": there, "speaker": torch.from_numpy(speaker * real)},
    )


def _posterior(made: Truth, batch: MultimodalBatch, context: str) -> Tensor:
    """P(emotion | what the context shows), float64 [B, U, K].

    The state is [own last, other's last] as the current speaker sees it; between utterances [speaker 0's, speaker 1's].
    """
    if context not in CONTEXTS:
        raise ValueError(f"context: expected one of {', '.join(map(repr, CONTEXTS))}, got {context!r}")
    fit = log_likelihood(made, batch)
    prior = torch.as_tensor(made.prior, dtype=torch.float64, device=fit.device)
    real = batch.extras["utterance"]
    if context == "utterance":
        alone = torch.softmax(fit + prior.log(), -1)
        return torch.where(real[..., None], alone, prior)
    (B, U), K = batch.shape, len(prior)
    likelihood = (fit - fit.amax(-1, keepdim=True)).exp()
    table = torch.as_tensor(made.transition(), device=fit.device)
    turned = batch.extras["speaker"] == 1
    mine = lambda state, u: torch.where(turned[:, u, None, None], state.transpose(1, 2), state)  # its own inverse
    state = fit.new_zeros(B, K + 1, K + 1)
    state[:, K, K] = 1
    before, ahead = [], []
    for u in range(U):
        own = mine(state, u)
        joint = torch.einsum("bij,ijk->bkj", own, table) * likelihood[:, u, :, None]
        joint = joint / joint.sum((1, 2), keepdim=True)
        before.append(own)
        ahead.append(joint.sum(-1))
        then = mine(torch.nn.functional.pad(joint, (0, 0, 0, 1)), u)  # the speaker has spoken: the last row is empty
        state = torch.where(real[:, u, None, None], then, state)
    if context == "past":
        return torch.where(real[..., None], torch.stack(ahead, 1), prior)
    future = torch.ones_like(state)
    found = []
    for u in reversed(range(U)):
        own = mine(future, u)[:, :K]
        weight = likelihood[:, u, :, None] * own  # [B, k, other]
        chance = (torch.einsum("bij,ijk->bkj", before[u], table) * weight).sum(-1)
        found.append(chance / chance.sum(-1, keepdim=True))
        past = mine(torch.einsum("bkj,ijk->bij", weight, table), u)
        past = past / past.amax((1, 2), keepdim=True)
        future = torch.where(real[:, u, None, None], past, future)
    return torch.where(real[..., None], torch.stack(found[::-1], 1), prior)
