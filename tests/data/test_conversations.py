"""Generated conversations and their Bayes predictor, against enumeration written from the definition, and models."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from mmlib import data
from mmlib.data import conversations as conv

STATED = {"utterance": 0.68, "past": 0.79, "dialogue": 0.84}
ALONE = {"language": 0.76, "audio": 0.63, "vision": 0.50}


def correct(d, logits) -> tuple[float, float]:
    """Accuracy over real utterances, and its standard error over dialogues."""
    real = d.data.extras["utterance"]
    right = ((logits.argmax(-1) == d.target) & real).sum(-1).double()
    counts = real.sum(-1).double()
    mean = right.sum() / counts.sum()
    return float(mean), float((right - mean * counts).square().sum().sqrt() / counts.sum())


def enumerate_posteriors(made: conv.Truth, d, b: int, context: str) -> np.ndarray:
    """[U, K] by summing over every sequence of emotions of one dialogue."""
    n, K = int(d.data.extras["utterance"][b].sum()), len(made.prior)
    speakers = d.data.extras["speaker"][b].tolist()
    density = np.ones((n, K))
    for u, k in itertools.product(range(n), range(K)):
        for m, name in enumerate(d.modalities):
            if d.present[b, u, m]:
                mean = [made.strength[m] * p for p in made.prototypes[made.modalities.index(name)][k]]
                x = d.data.features[name][b, u, 0].tolist()
                density[u, k] *= math.exp(-0.5 * sum((a - c) ** 2 for a, c in zip(x, mean, strict=True)))
    if context == "utterance":
        weights = density * np.array(made.prior)
        return weights / weights.sum(1, keepdims=True)
    found = np.zeros((n, K))
    for u in range(n):
        last = u + 1 if context == "past" else n
        for path in itertools.product(range(K), repeat=last):
            p, state = 1.0, {0: None, 1: None}
            for t, k in enumerate(path):
                own, other = state[speakers[t]], state[1 - speakers[t]]
                chance, left = 0.0, 1.0
                for said, share in ((own, made.inertia), (other, made.influence)):
                    if said is not None:
                        chance, left = chance + share * (said == k), left - share
                p *= (chance + left * made.prior[k]) * density[t, k]
                state[speakers[t]] = k
            found[u, path[u]] += p
    return found / found.sum(1, keepdims=True)


# --- the world -------------------------------------------------------------------------------------------------------


def test_shapes_and_facts():
    splits = data.load("conversations")
    assert [len(d) for d in splits.values()] == [120, 30, 120]
    d = splits["train"]
    assert d.modalities == ("audio", "language", "vision")
    assert d.feature_shapes == {"audio": (1, 12), "language": (1, 16), "vision": (1, 8)}
    assert d.data.shape == (120, 24)
    assert d.target.shape == (120, 24)
    assert d.info["outputs"] == 6
    assert len(d.info["classes"]) == 6
    real = d.data.extras["utterance"]
    lengths = real.sum(-1)
    assert 6 <= int(lengths.min()) < int(lengths.max()) <= 24
    assert torch.equal(real, torch.arange(24) < lengths[:, None])
    assert torch.equal(d.present, real[..., None].expand(-1, -1, 3))
    for x in d.data.features.values():
        assert bool((x[~real] == 0).all())
    assert bool((d.target[~real] == 0).all())
    assert set(d.data.extras["speaker"][real].tolist()) == {0, 1}
    assert d.info["utterances"] == int(real.sum())
    json.dumps(d.info)
    assert conv.truth(json.loads(json.dumps(d.info))) == conv.truth(d)


def test_seeds():
    options = {"sizes": (5, 5, 5)}
    one, same, other = (data.load("conversations", split_seed=s, **options) for s in (0, 0, 1))
    for split in one:
        assert one[split].info["fingerprint"] == same[split].info["fingerprint"] == data.fingerprint(one[split])
        assert one[split].info["fingerprint"] != other[split].info["fingerprint"]
    assert len({i for d in one.values() for i in d.ids.tolist()}) == 15
    longer = data.load("conversations", sizes=(5, 9, 5))  # a split does not depend on the others' sizes
    assert longer["test"].info["fingerprint"] == one["test"].info["fingerprint"]


@pytest.mark.slow
def test_frequencies_follow_the_definition():
    d = data.load("conversations", sizes=(4000, 2, 2))["train"]
    made = conv.truth(d)
    real, speaker, y = d.data.extras["utterance"], d.data.extras["speaker"], d.target
    for u in (0, 3, 20):  # every place has the prior
        some = y[real[:, u], u]
        share = torch.bincount(some, minlength=6) / len(some)
        assert (share - torch.tensor(made.prior)).abs().max() < 4 * 0.5 / math.sqrt(len(some))
    pair = real[:, 1:]
    turned = (speaker[:, 1:] != speaker[:, :-1])[pair].double()
    assert abs(float(turned.mean()) - made.turn) < 4 * 0.5 / math.sqrt(len(turned))
    counts, hits = {}, {}
    for b in range(1500):
        last = {0: 6, 1: 6}
        for u in range(int(real[b].sum())):
            s = int(speaker[b, u])
            key = (last[s] == 6, last[1 - s] == 6, last[s] == last[1 - s])
            counts[key] = counts.get(key, 0) + 1
            hits[key] = hits.get(key, 0) + (int(y[b, u]) == last[s])
            last[s] = int(y[b, u])
    prior = np.array(made.prior)
    again = float((prior**2).sum())
    both = hits[False, False, True] / counts[False, False, True]
    # equal last emotions: weighted by how often each is shared, between the smallest and the largest prior
    assert made.inertia + made.influence + 0.2 * prior.min() < both < made.inertia + made.influence + 0.2 * prior.max()
    alone = hits[False, True, False] / counts[False, True, False]
    expected = made.inertia + (1 - made.inertia) * again
    assert abs(alone - expected) < 4 * 0.5 / math.sqrt(counts[False, True, False])


def test_transition_rows():
    made = conv._design(None, None, (0.5, 0.3, 0.2), 0.4, 0.3, 0.5, (1, 2), 0)
    table = made.transition()
    np.testing.assert_allclose(table.sum(-1), 1)
    np.testing.assert_allclose(table[3, 3], [0.5, 0.3, 0.2])
    np.testing.assert_allclose(table[0, 3], [0.4 + 0.6 * 0.5, 0.6 * 0.3, 0.6 * 0.2])
    np.testing.assert_allclose(table[3, 1], [0.7 * 0.5, 0.3 + 0.7 * 0.3, 0.7 * 0.2])
    np.testing.assert_allclose(table[2, 1], [0.3 * 0.5, 0.3 + 0.3 * 0.3, 0.4 + 0.3 * 0.2])
    np.testing.assert_allclose(table[1, 1], [0.3 * 0.5, 0.7 + 0.3 * 0.3, 0.3 * 0.2])
    for m in made.modalities:
        gram = made.means(m) @ made.means(m).T
        np.testing.assert_allclose(gram, np.eye(3) * made.strength[made.modalities.index(m)] ** 2, atol=1e-12)


# --- the Bayes predictor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", conv.CONTEXTS)
@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    inertia=st.floats(0, 0.6),
    influence=st.floats(0, 0.4),
    turn=st.sampled_from([0.0, 0.4, 1.0]),
    missing=st.booleans(),
)
def test_posteriors_equal_enumeration(context, seed, inertia, influence, turn, missing):
    d = data.load(
        "conversations", prior=(0.5, 0.3, 0.2), inertia=inertia, influence=influence, turn=turn, lengths=(1, 5),
        sizes=(2, 1, 1), split_seed=seed,
    )["train"]  # fmt: skip
    if missing:
        d = d.drop(present=torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(seed)) < 0.5)
    found = conv.bayes(d, context).exp().numpy()
    assert found.shape == (2, 5, 3)
    for b in range(2):
        n = int(d.data.extras["utterance"][b].sum())
        np.testing.assert_allclose(found[b, :n], enumerate_posteriors(conv.truth(d), d, b, context), atol=1e-9)
        np.testing.assert_allclose(found[b, n:], np.broadcast_to([0.5, 0.3, 0.2], (5 - n, 3)))


@pytest.fixture(scope="module")
def world():
    return data.load("conversations", sizes=(400, 2, 1000))


@pytest.mark.slow
@pytest.mark.parametrize("context", conv.CONTEXTS)
def test_the_stated_score_is_reached(world, context):
    stated, spread = conv.bayes_score(world["test"], context=context, samples=4000)
    assert spread < 0.002
    assert stated == pytest.approx(STATED[context], abs=0.01)
    worlds = [data.load("conversations", sizes=(1, 1, 1000), split_seed=seed)["test"] for seed in range(5)]
    means, errors = zip(*(correct(d, conv.bayes(d, context)) for d in worlds), strict=True)
    assert abs(np.mean(means) - stated) < 2 * math.hypot(np.linalg.norm(errors) / 5, spread)


@pytest.mark.slow
def test_context_helps_and_modalities_are_ordered(world):
    scores = {c: conv.bayes_score(world["test"], context=c)[0] for c in conv.CONTEXTS}
    assert scores["past"] > scores["utterance"] + 0.08
    assert scores["dialogue"] > scores["past"] + 0.04
    alone = conv.bayes_scores(world["test"], samples=600)
    assert len(alone) == 8
    for m, stated in ALONE.items():
        assert alone[(m,)] == pytest.approx(stated, abs=0.02)
    assert alone["language",] > alone["audio",] + 0.08 > alone["vision",] + 0.16
    assert alone[()] == pytest.approx(0.24)
    for some, value in alone.items():  # more modalities never hurt
        for more, higher in alone.items():
            assert not set(some) < set(more) or higher > value
    single = data.load("conversations", strength={"language": math.sqrt(0.9**2 + 1.3**2 + 0.6**2)}, sizes=(1, 1, 1))
    assert conv.bayes_score(single["test"])[0] == pytest.approx(scores["dialogue"], abs=0.005)  # one says it all


def rows(d, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Real utterances with their neighbours' features and whether the same person speaks; zeros beyond the ends."""
    x = torch.cat([f[:, :, 0] for f in d.data.features.values()], -1)
    real, speaker = d.data.extras["utterance"], d.data.extras["speaker"]
    parts = []
    for shift in range(-window, window + 1):
        moved, same = torch.zeros_like(x), torch.zeros(real.shape)
        U = x.shape[1]
        to, of = slice(max(shift, 0), U + min(shift, 0)), slice(max(-shift, 0), U - max(shift, 0))
        there = (real[:, of] & real[:, to])[..., None]
        alike = speaker[:, of] == speaker[:, to]
        moved[:, to] = torch.where(there, x[:, of], 0)
        same[:, to] = torch.where(there[..., 0], alike * 2.0 - 1, 0)
        parts += [moved, same[..., None], moved * same[..., None]]
    return torch.cat(parts, -1)[real].numpy(), d.target[real].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logistic", "logistic, neighbours", "forest, neighbours", "net, neighbours"])
def test_nothing_exceeds_the_bayes_predictor(world, name):
    window = 2 if "neighbours" in name else 0
    x, y = rows(world["train"], window)
    model = {
        "l": LogisticRegression(max_iter=300, C=0.05),
        "f": RandomForestClassifier(30, min_samples_leaf=10, random_state=0, n_jobs=1),
        "n": MLPClassifier((32,), alpha=1.0, early_stopping=True, random_state=0),
    }[name[0]].fit(x, y)
    test, target = rows(world["test"], window)
    accuracy = float((model.predict(test) == target).mean())
    best, error = correct(world["test"], conv.bayes(world["test"], "dialogue" if window else "utterance"))
    assert accuracy < best + 3 * error
    if name == "logistic":
        assert accuracy > best - 0.03  # linear is the right form: the prototypes can be learned
    if name == "logistic, neighbours":
        assert accuracy > STATED["utterance"] + 0.03  # the context is there to be used


def test_nothing_observed_leaves_the_prior():
    d = data.load("conversations", sizes=(1, 1, 3))["test"]
    empty = d.drop(present=torch.zeros(3, dtype=torch.bool))
    for context in conv.CONTEXTS:
        p = conv.bayes(empty, context).exp()
        torch.testing.assert_close(p, torch.tensor(conv.truth(d).prior, dtype=torch.float64).expand_as(p))


def test_one_utterance_and_one_speaker():
    d = data.load("conversations", lengths=(1, 1), sizes=(1, 1, 4))["test"]
    assert d.data.shape == (4, 1)
    first, *others = (conv.bayes(d, c) for c in conv.CONTEXTS)
    for other in others:
        torch.testing.assert_close(first, other)
    d = data.load("conversations", turn=0.0, sizes=(1, 1, 20))["test"]
    for speaker, real in zip(d.data.extras["speaker"], d.data.extras["utterance"], strict=True):
        assert len(set(speaker[real].tolist())) == 1


def test_fewer_modalities_in_the_data():
    d = data.load("conversations", sizes=(1, 1, 10))["test"]
    one = d.select(["language"])
    on = torch.tensor([m == "language" for m in d.modalities])
    torch.testing.assert_close(conv.bayes(one), conv.bayes(d.drop(present=on)))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": {}}, "strength: expected None or a dict by names with at least 1"),
        ({"strength": {"a": -1.0}}, r"strength\['a'\]: expected None or a number of at least 0"),
        ({"strength": {"a": math.nan}}, r"strength\['a'\]: expected None or a number of at least 0"),
        ({"prior": (1.0,)}, "prior: expected (a list or tuple of at least 2|at least two probabilities that sum to 1)"),
        ({"prior": (0.5, 0.4)}, "prior: expected at least two"),
        ({"inertia": 1.2}, r"inertia: expected a number in \[0, 1\], got 1.2"),
        ({"influence": -0.1}, "influence: expected a number in"),
        ({"turn": 2}, "turn: expected a number in"),
        ({"inertia": 0.7, "influence": 0.4}, "inertia, influence: expected a sum of at most 1"),
        ({"lengths": (0, 4)}, r"lengths(\[0\])?: expected (an integer of at least 1|the fewest and the most)"),
        ({"lengths": (5, 4)}, r"lengths(\[0\])?: expected (an integer of at least 1|the fewest and the most)"),
        ({"widths": 5}, r"widths\['audio'\]: expected an integer of at least 6, got 5"),
        ({"widths": {"audio": 8}}, "widths: expected a value for each of"),
        ({"sizes": (1, 0, 1)}, r"sizes(\[1\])?: expected (an integer of at least 1|a list or tuple of 3)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        data.load("conversations", **options)


def test_bad_questions():
    d = data.load("conversations", sizes=(1, 1, 1))["test"]
    with pytest.raises(ValueError, match="context: expected one of utterance, past, dialogue, got 'future'"):
        conv.bayes(d, "future")
    with pytest.raises(ValueError, match=r"modalities: unknown modalities \['smell'\]"):
        conv.bayes_score(d, ["smell"])
    with pytest.raises(ValueError, match="samples: expected an integer of at least 2, got 1"):
        conv.bayes_score(d, samples=1)
    with pytest.raises(ValueError, match="expected generated conversations, got 'synthetic'"):
        conv.truth(data.load("synthetic", sizes=(2, 2, 2))["test"])
    with pytest.raises(ValueError, match="expected generated conversations, got 'arrays'"):
        conv.truth({"name": "arrays"})
    named = {"smell" if m == "audio" else m: x for m, x in d.data.features.items()}
    renamed = d.data.replace(features=named, valid={}, observed={})
    with pytest.raises(ValueError, match=r"data: unknown modalities \['smell'\]"):
        conv.log_likelihood(conv.truth(d), renamed)
