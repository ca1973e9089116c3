"""The coalition engine against loops written from the definitions, worked examples, axioms and shapiq."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import shapiq
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmlib import MultimodalBatch, Output
from mmlib.backbones import Backbone, GenericBackbone, GenericConfig
from mmlib.coalitions import (
    accuracy_values,
    coalition_logits,
    coalition_masks,
    cut_table,
    discrete_predictions,
    monte_carlo_shapley,
    permutation_shapley,
    prediction_accuracy_score,
    prediction_shift_score,
    prediction_value,
    scoring,
    shapley_values,
    subset_predictions,
    subset_values,
)

# --- references, from the definitions ---------------------------------------------------------------------------------


def shapley_by_orders(v: np.ndarray) -> np.ndarray:
    """Average, over all orders of arrival, of what a player adds: v [2**M] -> [M]."""
    M = int(math.log2(len(v)))
    phi = np.zeros(M)
    orders = list(itertools.permutations(range(M)))
    for order in orders:
        code = 0
        for m in order:
            phi[m] += v[code | 1 << m] - v[code]
            code |= 1 << m
    return phi / len(orders)


def shapley_by_subsets(v: np.ndarray) -> np.ndarray:
    """The sum over subsets with factorial weights: v [2**M] -> [M]."""
    M = int(math.log2(len(v)))
    phi = np.zeros(M)
    for m in range(M):
        for code in range(2**M):
            if code >> m & 1:
                continue
            s = bin(code).count("1")
            weight = math.factorial(s) * math.factorial(M - s - 1) / math.factorial(M)
            phi[m] += weight * (v[code | 1 << m] - v[code])
    return phi


def shift_by_subsets(predictions: np.ndarray) -> np.ndarray:
    M = int(math.log2(len(predictions)))
    phi = np.zeros(M)
    for m in range(M):
        for code in range(2**M):
            if not code >> m & 1:
                s = bin(code).count("1")
                weight = math.factorial(s) * math.factorial(M - s - 1) / math.factorial(M)
                phi[m] += weight * (predictions[code | 1 << m] != predictions[code])
    return phi


def blanked(x: torch.Tensor, valid: torch.Tensor, fill: int) -> torch.Tensor:
    """One sample [1, ...] of one modality with nothing in it: zeros, or `fill` but for the two ends."""
    if x.is_floating_point():
        return torch.zeros_like(x)
    x = x.clone()
    for row, ok in zip(x.reshape(-1, x.shape[-1]), valid.reshape(-1, x.shape[-1]), strict=True):
        places = [t for t in range(len(ok)) if ok[t]]
        for t in places[1:-1]:
            row[t] = fill
    return x


def naive_logits(model, batch: MultimodalBatch, absent: str, use_present: bool) -> torch.Tensor:
    """One forward of one sample for one subset at a time -> [2**M, B, ...]."""
    M, names = len(batch.features), list(batch.features)
    table = []
    for code in range(2**M):
        row = []
        for b in range(batch.present.shape[0]):
            one = {name: x[b : b + 1] for name, x in batch.features.items()}
            valid = {name: x[b : b + 1] for name, x in batch.valid.items()}
            extras = {name: x[b : b + 1] for name, x in batch.extras.items()}
            there = batch.present[b : b + 1].clone()
            for m in range(M):
                if not code >> m & 1:
                    there[..., m] = False
            if use_present and not there.any():  # the prediction on nothing: no lengths, no extras
                valid = {name: torch.ones_like(x) for name, x in valid.items()}
                extras = {n: torch.ones_like(x) if x.dtype == torch.bool else x * 0 for n, x in extras.items()}
                for name, x in one.items():
                    if not x.is_floating_point():  # every row of the cases below begins with 1 and ends with 2
                        one[name] = torch.full_like(x, 3)
                        one[name][..., 0], one[name][..., -1] = 1, 2
            for m, name in enumerate(names):
                off = blanked(one[name], valid[name], 3)
                gone = ~there[..., m].reshape(there.shape[:-1] + (1,) * (off.ndim - there.ndim + 1))
                one[name] = torch.where(gone, off, one[name])
            told = torch.ones_like(there) if absent == "zero_input" else there
            seen = {
                n: v if absent == "zero_input" else v & told[..., m, None] for m, (n, v) in enumerate(valid.items())
            }
            rows = MultimodalBatch(one, told, None, valid, seen, fill=batch.fill, extras=extras)
            output = model(rows)
            row.append(output.logits if isinstance(output, tuple) else output)
        table.append(torch.cat(row))
    return torch.stack(table)


# --- models and batches -----------------------------------------------------------------------------------------------

SHAPES = {
    2: {"words": (7,), "image": (2, 6, 5)},
    3: {"a": (9, 5), "b": (4, 3), "c": (1, 6)},
    6: {"seq": (8, 3), "short": (2, 4), "vector": (1, 5), "image": (1, 5, 4), "volume": (1, 3, 4, 3), "words": (6,)},
}


def make_batch(M: int, B: int = 5, seed: int = 0, lead: tuple[int, ...] = (), missing: bool = True) -> MultimodalBatch:
    """Random values, lengths and presence; the first sample has everything, the last nothing."""
    g = torch.Generator().manual_seed(seed)
    N = (B, *lead)
    features, valid = {}, {}
    for name, shape in SHAPES[M].items():
        if len(shape) == 1 or (len(shape) == 2 and shape[0] > 1):
            lengths = torch.randint(2, shape[0] + 1, N, generator=g)
            valid[name] = torch.arange(shape[0]) < lengths[..., None]
        if len(shape) == 1:
            ids = torch.randint(4, 20, (*N, *shape), generator=g)
            ids[..., 0] = 1
            ids.scatter_(-1, lengths[..., None] - 1, 2)
            features[name] = ids
        else:
            features[name] = torch.randn(*N, *shape, generator=g, dtype=torch.float64)
    present = torch.rand(*N, M, generator=g) < 0.6 if missing else torch.ones(*N, M, dtype=torch.bool)
    present[0] = True
    if missing:
        present[-1] = False
    target = torch.randint(0, 4, N, generator=g)
    fill = {"words": 3} if "words" in features else {}
    batch = MultimodalBatch(features, torch.ones_like(present), target, valid, fill=fill)
    return batch.drop(present=present)


def make_model(M: int, seed: int = 0, **options) -> GenericBackbone:
    torch.manual_seed(seed)
    model = GenericBackbone(GenericConfig(SHAPES[M], outputs=4, width=6, vocabulary=20, **options))
    with torch.no_grad():  # an untrained net hardly looks at its input; this one does
        for p in model.parameters():
            p.mul_(2)
        model.decoder[-1].bias.zero_()
    return model.double().eval()


class Dialogue(Backbone):
    """Encodings of utterances, a recurrent fusion over them that reads speakers and the utterance mask."""

    def __init__(self, M: int):
        super().__init__()
        for name, shape in SHAPES[M].items():
            self.encoders[name] = nn.Linear(shape[-1], 5)
        self.context = nn.GRU(5 * M + 1, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def encode_modality(self, name, x, valid):
        return torch.tanh(self.encoders[name](x)).mul(valid[..., None]).sum(1)

    def fuse(self, h, present, batch):
        there = batch.extras["utterance"][..., None]
        z = torch.cat([*h.values(), batch.extras["speaker"][..., None].to(h["a"].dtype)], -1)
        return self.context(torch.where(there, z, 0))[0] + present.sum(-1, keepdim=True)

    def decode(self, z):
        return self.head(z)


class Whole(nn.Module):
    """The same model, but one whose encoders may not be run apart."""

    independent_encoders = False

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return Output(self.model(batch), {})


def dialogue_case() -> tuple[Dialogue, MultimodalBatch]:
    torch.manual_seed(3)
    batch = make_batch(3, B=3, seed=5, lead=(4,))
    utterance = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    speaker = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]])
    return Dialogue(3).double().eval(), batch.replace(extras={"utterance": utterance, "speaker": speaker})


BOTH = pytest.mark.parametrize("absent", ["zero_feature", "zero_input"])
PRESENT = pytest.mark.parametrize("use_present", [True, False])


# --- exact values -----------------------------------------------------------------------------------------------------


def test_coalition_masks_are_binary_expansions():
    assert coalition_masks(1).tolist() == [[False], [True]]
    expected = [[bool(k >> m & 1) for m in range(3)] for k in range(8)]
    assert coalition_masks(3).tolist() == expected
    assert coalition_masks(3).dtype == torch.bool


@pytest.mark.parametrize("M", [1, 2, 3, 5, 7])
def test_shapley_values_equal_the_loop_over_subsets_and_orders(M):
    v = np.random.default_rng(M).normal(size=(3, 2**M))
    got = shapley_values(torch.from_numpy(v)).numpy()
    np.testing.assert_allclose(got, [shapley_by_subsets(row) for row in v], atol=1e-12)
    if M <= 5:
        np.testing.assert_allclose(got, [shapley_by_orders(row) for row in v], atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_shapley_values_equal_shapiq(n):
    table = np.random.default_rng(n).normal(size=2**n)
    game = lambda rows: table[np.asarray(rows, dtype=bool) @ (1 << np.arange(n))]
    exact = shapiq.ExactComputer(game, n_players=n)(index="SV", order=1)
    expected = [exact[(m,)] for m in range(n)]
    np.testing.assert_allclose(shapley_values(torch.from_numpy(table)).numpy(), expected, atol=1e-9)


def test_shapley_values_of_sixteen_modalities():
    # v(S) = |S|^2: by symmetry every modality gets 256 / 16.
    v = coalition_masks(16).sum(-1).double() ** 2
    torch.testing.assert_close(shapley_values(v), torch.full((16,), 16.0, dtype=torch.float64))


def test_worked_example_of_counts():
    # {}: 0, {0}: 5, {1}: 3, {01}: 6, {2}: 1, {02}: 5, {12}: 4, {012}: 8
    v = torch.tensor([0, 5, 3, 6, 1, 5, 4, 8])
    torch.testing.assert_close(shapley_values(v), torch.tensor([25 / 6, 8 / 3, 7 / 6]))
    torch.testing.assert_close(shapley_values(torch.tensor([0.0, 5.0, 3.0, 7.0])), torch.tensor([4.5, 2.5]))


def test_worked_examples_of_prediction_scores():
    # order {}, 0, 1, 01, 2, 02, 12, 012
    first, second, third = [0, 1, 0, 1, 0, 1, 0, 1], [0, 1, 0, 1, 1, 1, 0, 1], [1] * 8
    predictions = torch.tensor([first, second, third])
    shift = torch.tensor([[1, 0, 0], [5 / 6, 1 / 6, 1 / 3], [0, 0, 0]])
    torch.testing.assert_close(prediction_shift_score(predictions), shift)
    accuracy = torch.tensor([[2, 0.5, 0.5], [11 / 6, 1 / 3, 5 / 6], [1, 1, 1]])
    torch.testing.assert_close(prediction_accuracy_score(predictions, torch.tensor(1)), accuracy)
    torch.testing.assert_close(prediction_accuracy_score(predictions, torch.ones(3).long()), accuracy)
    assert prediction_shift_score(predictions[2]).tolist() == [0, 0, 0]


@given(st.integers(1, 5), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_shapley_axioms(M, seed):
    rng = np.random.default_rng(seed)
    v, w = torch.from_numpy(rng.normal(size=(2, 2**M)))
    phi = shapley_values(v)
    torch.testing.assert_close(phi.sum(), v[-1] - v[0])  # efficiency
    torch.testing.assert_close(shapley_values(2 * v - 3 * w), 2 * phi - 3 * shapley_values(w))  # linearity
    masks = coalition_masks(M)
    order = torch.from_numpy(rng.permutation(M))  # renaming the modalities renames their values
    renamed = v[(masks.long() << order).sum(-1)]
    torch.testing.assert_close(shapley_values(renamed), phi[order])
    dummy = v[(torch.arange(2**M) & ~1)]  # modality 0 never counts
    torch.testing.assert_close(shapley_values(dummy)[0], torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)
    if M > 1:  # symmetry: 0 and 1 count alike
        swapped = masks.clone()
        swapped[:, [0, 1]] = masks[:, [1, 0]]
        alike = v + v[(swapped.long() << torch.arange(M)).sum(-1)]
        torch.testing.assert_close(shapley_values(alike)[0], shapley_values(alike)[1])


@given(st.integers(1, 5), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_prediction_scores_equal_their_definitions(M, seed):
    rng = np.random.default_rng(seed)
    predictions, target = rng.integers(0, 3, (4, 2**M)), rng.integers(0, 3, 4)
    shift = prediction_shift_score(torch.from_numpy(predictions)).double()
    np.testing.assert_allclose(shift.numpy(), [shift_by_subsets(row) for row in predictions], atol=1e-6)
    assert bool(((shift >= 0) & (shift <= 1 + 1e-6)).all())
    size = np.array([bin(k).count("1") for k in range(2**M)])
    expected = np.array([shapley_by_subsets(size * (row == y)) for row, y in zip(predictions, target, strict=True)])
    score = prediction_accuracy_score(torch.from_numpy(predictions), torch.from_numpy(target)).double()
    np.testing.assert_allclose(score.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(score.sum(-1).numpy(), M * (predictions[:, -1] == target), atol=1e-5)


@given(st.integers(2, 5), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_weights_over_available_modalities_equal_dummy_players(M, seed):
    """MCE Eq. 5 sums over subsets of M_n with |M_n| in the weights; padding the game with dummies changes nothing."""
    rng = np.random.default_rng(seed)
    available = [m for m in range(M) if rng.random() < 0.6] or [0]
    v = rng.normal(size=2 ** len(available))
    code = sum(1 << m for m in available)
    table = np.empty(2**M)
    for k in range(2**M):  # v of a coalition is v of its intersection with what is available
        inside = [i for i, m in enumerate(available) if k >> m & 1]
        table[k] = v[sum(1 << i for i in inside)]
    expected = np.zeros(M)
    expected[available] = shapley_by_subsets(v)
    np.testing.assert_allclose(shapley_values(torch.from_numpy(table)).numpy(), expected, atol=1e-12)
    assert code > 0


def test_redundant_modalities_share_equally():
    for M in (2, 3, 4):  # every non-empty coalition is right
        v = torch.ones(2**M)
        v[0] = 0
        torch.testing.assert_close(shapley_values(v), torch.full((M,), 1 / M))


@pytest.mark.slow
def test_compile_accepts_the_tensor_functions():
    compiled = lambda f: torch.compile(f, fullgraph=True, backend="eager")
    v = torch.randn(3, 8)
    torch.testing.assert_close(compiled(shapley_values)(v), shapley_values(v))
    p, y = torch.randint(0, 3, (3, 8)), torch.randint(0, 3, (3,))
    torch.testing.assert_close(compiled(prediction_shift_score)(p), prediction_shift_score(p))
    torch.testing.assert_close(compiled(prediction_accuracy_score)(p, y), prediction_accuracy_score(p, y))
    assert torch.equal(compiled(coalition_masks)(3), coalition_masks(3))
    logits, present = torch.randn(8, 5, 4), torch.rand(5, 3) < 0.5
    target = torch.randint(0, 4, (5,))
    got = compiled(accuracy_values)(logits, target, present=present)
    torch.testing.assert_close(got, accuracy_values(logits, target, present=present))


def test_errors_of_the_tensor_functions():
    for M in (0, 17, -1, 2.0):
        with pytest.raises(TypeError if M == 2.0 else ValueError, match="M: expected"):
            coalition_masks(M)
    with pytest.raises(ValueError, match="2\\*\\*M"):
        shapley_values(torch.zeros(3, 6))
    with pytest.raises(ValueError, match="2\\*\\*M"):
        shapley_values(torch.zeros(1))
    with pytest.raises(ValueError, match="at most 16 modalities, got 17"):
        shapley_values(torch.zeros(2**17))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="v: expected finite"):
            shapley_values(torch.tensor([0.0, bad]))
    with pytest.raises(TypeError, match="discrete_predictions"):
        prediction_shift_score(torch.zeros(4))
    with pytest.raises(ValueError, match="target: expected"):
        prediction_accuracy_score(torch.zeros(3, 4).long(), torch.zeros(2).long())


# --- Monte Carlo ------------------------------------------------------------------------------------------------------


def table_game(table: torch.Tensor, calls: list | None = None):
    """A value function bool [S, B, M] -> [S, B] that looks up table [B, 2**M]."""

    def value(masks):
        if calls is not None:
            calls.append(masks)
        code = (masks.long() << torch.arange(masks.shape[-1])).sum(-1)
        return table.gather(1, code.t()).t()

    return value


def cut(table: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """The same games where absent modalities are dummies."""
    code = (present.long() << torch.arange(present.shape[-1])).sum(-1, keepdim=True)
    return table.gather(1, torch.arange(table.shape[1]) & code)


def test_all_orders_are_exact():
    M, B = 4, 6
    g = torch.Generator().manual_seed(0)
    table, present = torch.randn(B, 2**M, generator=g, dtype=torch.float64), torch.rand(B, M, generator=g) < 0.7
    orders = torch.tensor(list(itertools.permutations(range(M)))).expand(B, -1, -1)
    got = permutation_shapley(table_game(table), present, orders)
    torch.testing.assert_close(got, shapley_values(cut(table, present)))
    assert bool((got[~present] == 0).all())


@pytest.mark.parametrize("antithetic", [False, True])
def test_monte_carlo_is_unbiased_and_efficient(antithetic):
    M, B, R = 4, 4000, 3
    g = torch.Generator().manual_seed(1)
    game = torch.randn(2**M, generator=g, dtype=torch.float64)
    present = torch.tensor([True, True, False, True]).expand(B, M)
    estimates = monte_carlo_shapley(table_game(game.expand(B, -1)), present, R, g, antithetic)
    exact = shapley_values(cut(game[None], present[:1]))[0]
    error = (estimates.mean(0) - exact).abs()
    assert bool((error <= 5 * estimates.std(0) / B**0.5 + 1e-12).all())
    full = game[0b1011] - game[0]
    torch.testing.assert_close(estimates.sum(-1), full.expand(B))
    assert bool((estimates[:, 2] == 0).all())


def test_monte_carlo_error_falls_with_permutations():
    g = torch.Generator().manual_seed(2)
    table = torch.randn(64, 2**5, generator=g, dtype=torch.float64)
    present, exact = torch.ones(64, 5, dtype=torch.bool), shapley_values(table)
    rms = [
        (monte_carlo_shapley(table_game(table), present, R, g) - exact).square().mean().sqrt() for R in (10, 160, 2560)
    ]
    for a, b in itertools.pairwise(rms):  # sixteen times the permutations, a quarter of the error
        assert 2.5 < a / b < 6.5


def test_monte_carlo_evaluates_distinct_coalitions_once():
    g = torch.Generator().manual_seed(3)
    for M, R in ((3, 200), (5, 4), (8, 7)):
        table, calls = torch.randn(9, 2**M, generator=g), []
        present = torch.rand(9, M, generator=g) < 0.7
        monte_carlo_shapley(table_game(table, calls), present, R, g)
        (masks,) = calls
        assert masks.dtype == torch.bool
        assert len(masks) <= min(2**M, R * (M - 1) + 2)
        codes = (masks.long() << torch.arange(M)).sum(-1)
        for b in range(9):
            real = codes[:, b][codes[:, b] > 0].tolist()
            assert len(real) == len(set(real))
            assert not bool((masks[:, b] & ~present[b]).any())


def test_monte_carlo_follows_its_generator_and_carries_gradients():
    table = torch.randn(2, 8, requires_grad=True)
    present = torch.ones(2, 3, dtype=torch.bool)
    draw = lambda: monte_carlo_shapley(table_game(table), present, 5, torch.Generator().manual_seed(4))
    torch.testing.assert_close(draw(), draw())
    draw().sum().backward()  # efficiency again: only the full and the empty coalition carry it
    expected = torch.zeros(2, 8)
    expected[:, -1], expected[:, 0] = 1, -1
    torch.testing.assert_close(table.grad, expected)


def test_errors_of_monte_carlo():
    present = torch.ones(2, 3, dtype=torch.bool)
    value = table_game(torch.zeros(2, 8))
    for permutations in (0, -1, 1.5):
        with pytest.raises(TypeError if permutations == 1.5 else ValueError, match="permutations"):
            monte_carlo_shapley(value, present, permutations)
    with pytest.raises(TypeError, match="present"):
        monte_carlo_shapley(value, present.float(), 3)
    with pytest.raises(ValueError, match="present"):
        monte_carlo_shapley(value, present[0], 3)
    with pytest.raises(ValueError, match="62"):
        monte_carlo_shapley(value, torch.ones(1, 63, dtype=torch.bool), 3)
    with pytest.raises(ValueError, match="value: expected a function"):
        monte_carlo_shapley(lambda masks: torch.zeros(2), present, 3)
    with pytest.raises(ValueError, match="value: expected finite"):
        monte_carlo_shapley(lambda masks: torch.full(masks.shape[:2], math.nan), present, 3)
    for orders in (torch.zeros(2, 4).long(), torch.zeros(2, 4, 3).long()):
        with pytest.raises(ValueError, match="orders"):
            permutation_shapley(value, present, orders)


# --- logits of every coalition ----------------------------------------------------------------------------------------


@pytest.mark.slow
@BOTH
@PRESENT
@pytest.mark.parametrize("M", [2, 3, 6])
def test_equals_the_naive_loop(M, absent, use_present):
    model, batch = make_model(M), make_batch(M, B=4 if M == 6 else 6)
    with torch.no_grad():
        got = coalition_logits(model, batch, coalition_masks(M), absent, use_present)
        expected = naive_logits(model, batch, absent, use_present)
    assert got.shape == (2**M, len(batch), 4)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@BOTH
@PRESENT
def test_equals_the_naive_loop_on_dialogues(absent, use_present):
    model, batch = dialogue_case()
    with torch.no_grad():
        got = coalition_logits(model, batch, coalition_masks(3), absent, use_present)
        expected = naive_logits(model, batch, absent, use_present)
    assert got.shape == (8, 3, 4, 4)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@BOTH
@PRESENT
@pytest.mark.parametrize("M", [2, 3])
def test_models_without_independent_encoders_give_the_same(M, absent, use_present):
    model, batch = make_model(M), make_batch(M)
    masks = coalition_masks(M)
    with torch.no_grad():
        expected = coalition_logits(model, batch, masks, absent, use_present)
        for max_rows in (None, 7):
            got = coalition_logits(Whole(model), batch, masks, absent, use_present, max_rows)
            torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
        model, batch = dialogue_case()
        expected = coalition_logits(model, batch, coalition_masks(3), absent, use_present)
        got = coalition_logits(Whole(model), batch, coalition_masks(3), absent, use_present)
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)


@BOTH
def test_absent_and_switched_off_are_the_same(absent):
    model, batch = make_model(3), make_batch(3, missing=False)
    masks = coalition_masks(3)
    for off in range(8):
        present = masks[off]
        dropped = batch.drop(present=present.expand(len(batch), 3))
        for use_present in (True, False):
            with torch.no_grad():
                missing = coalition_logits(model, dropped, masks[-1:], absent, use_present)
                switched = coalition_logits(model, batch, masks[off : off + 1], absent, use_present)
            torch.testing.assert_close(missing, switched, atol=1e-12, rtol=0)


@BOTH
def test_a_missing_modality_scores_zero_by_itself(absent):
    """Without telling the engine what is present, a missing modality still changes nothing."""
    model, batch = make_model(3), make_batch(3, B=8, seed=2)
    scores = prediction_shift_score(subset_predictions(model, batch, absent=absent, use_present=False))
    assert bool((scores[~batch.present] == 0).all())
    assert bool((scores > 0).any())
    values = shapley_values(subset_values(model, batch, absent=absent))
    torch.testing.assert_close(values[~batch.present], torch.zeros_like(values[~batch.present]), atol=1e-12, rtol=0)


@BOTH
def test_every_empty_coalition_takes_one_prediction(absent):
    for model, batch in ((make_model(2), make_batch(2, B=9)), (make_model(3), make_batch(3, B=9)), dialogue_case()):
        masks = coalition_masks(len(batch.modalities))
        with torch.no_grad():
            logits = coalition_logits(model, batch, masks, absent)
        nothing = logits[0, 0]
        for b in range(len(batch)):
            there = batch.present[b].reshape(-1, masks.shape[1]).any(0)
            for s, mask in enumerate(masks):
                if not (mask & there).any():
                    assert torch.equal(logits[s, b], nothing)


class Counting(GenericBackbone):
    """Counts the rows that each part sees."""

    def __init__(self, config):
        super().__init__(config)
        self.encoded, self.fused = {}, []

    def encode_modality(self, name, x, valid):
        self.encoded.setdefault(name, []).append(len(x))
        return super().encode_modality(name, x, valid)

    def fuse(self, h, present, batch):
        self.fused.append(len(present))
        return super().fuse(h, present, batch)


def test_encoders_run_once_and_coalitions_are_shared():
    shapes = {"a": (4, 3), "b": (1, 5), "c": (1, 2)}
    g = torch.Generator().manual_seed(0)
    features = {name: torch.randn(6, *shape, generator=g) for name, shape in shapes.items()}
    present = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1], [1, 1, 1]]).bool()
    batch = MultimodalBatch(features, torch.ones_like(present)).drop(present=present)
    counts = (4, 4, 3)
    distinct = 1 + sum(2**k - 1 for k in present.sum(-1).tolist())  # one for nothing
    for absent, fills in (("zero_feature", []), ("zero_input", [1])):
        model = Counting(GenericConfig(shapes, 3, width=4)).eval()
        coalition_logits(model, batch, coalition_masks(3), absent)
        assert model.fused == [distinct]
        assert model.encoded == {name: [k, *fills] for name, k in zip("abc", counts, strict=True)}
        model = Counting(GenericConfig(shapes, 3, width=4)).eval()
        coalition_logits(model, batch, coalition_masks(3), absent, use_present=False)
        assert model.fused == [48]
    model = Counting(GenericConfig(shapes, 3, width=4)).eval()
    coalition_logits(model, batch, coalition_masks(3), max_rows=5, encodings=model.encode(batch))
    assert sum(model.fused) == distinct
    assert max(model.fused) == 5
    assert all(len(runs) == 1 for runs in model.encoded.values())


def test_blanks_of_batch_statistics_are_not_shared():
    class Normed(Backbone):
        def __init__(self):
            super().__init__()
            self.encoders["a"] = nn.BatchNorm1d(3)
            self.head, self.rows = nn.Linear(3, 2), []

        def encode_modality(self, name, x, valid):
            self.rows.append(len(x))
            return self.encoders[name](x[:, 0])

        def fuse(self, h, present, batch):
            return h["a"]

        def decode(self, z):
            return self.head(z)

    batch = MultimodalBatch({"a": torch.randn(4, 1, 3)}, torch.ones(4, 1, dtype=torch.bool))
    model = Normed()
    coalition_logits(model.train(), batch, coalition_masks(1), "zero_input")
    coalition_logits(model.eval(), batch, coalition_masks(1), "zero_input")
    assert model.rows == [4, 5, 4, 1]
    seen = model.encoders["a"].num_batches_tracked.clone()
    coalition_logits(model.train(), batch, coalition_masks(1), "zero_feature")
    assert int(model.encoders["a"].num_batches_tracked - seen) == 1


@BOTH
@PRESENT
def test_gradients_equal_the_naive_loops(absent, use_present):
    model, batch = make_model(3), make_batch(3)
    weights = torch.randn(8, len(batch), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (coalition_logits(model, batch, coalition_masks(3), absent, use_present) * weights).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (naive_logits(model, batch, absent, use_present) * weights).sum().backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-9, rtol=0)


@BOTH
@PRESENT
def test_memory_cap_and_own_coalitions_change_nothing(absent, use_present):
    model, batch = make_model(6), make_batch(6)
    masks = coalition_masks(6)[torch.randperm(64, generator=torch.Generator().manual_seed(0))[:20]]
    with torch.no_grad():
        full = coalition_logits(model, batch, masks, absent, use_present)
        for max_rows in (1, 13, 10_000):
            got = coalition_logits(model, batch, masks, absent, use_present, max_rows)
            torch.testing.assert_close(got, full, atol=1e-12, rtol=0)
        own = torch.stack([masks.roll(b, 0) for b in range(len(batch))], 1)  # [S, B, M]
        got = coalition_logits(model, batch, own, absent, use_present)
        for b in range(len(batch)):
            torch.testing.assert_close(got[:, b], full[:, b].roll(b, 0), atol=1e-12, rtol=0)


def test_full_coalition_is_the_plain_prediction():
    model, batch = make_model(3), make_batch(3)
    with torch.no_grad():
        logits = coalition_logits(model, batch, coalition_masks(3))
        torch.testing.assert_close(logits[-1], model(batch), atol=1e-12, rtol=0)


def test_monte_carlo_on_a_model_reaches_the_exact_values():
    model, batch = make_model(6), make_batch(6, B=6, seed=4)
    value = lambda masks: accuracy_values(
        coalition_logits(model, batch, masks), batch.target, masks, batch.present
    ).t()  # fmt: skip
    with scoring(model):
        estimate = monte_carlo_shapley(value, batch.present, 800, torch.Generator().manual_seed(0))
    exact = shapley_values(subset_values(model, batch))
    torch.testing.assert_close(estimate, exact, atol=0.06, rtol=0)


# --- values and modes -------------------------------------------------------------------------------------------------


def test_accuracy_values_by_hand():
    logits = torch.tensor([[[2.0, 1.0]], [[0.0, 1.0]], [[3.0, 1.0]], [[1.0, 2.0]]])  # [4, 1, 2]
    target = torch.tensor([1])
    assert accuracy_values(logits, target).tolist() == [[0, 1, 0, 1]]
    assert accuracy_values(logits, target * 0).tolist() == [[0, 0, 1, 0]]  # nothing is worth 0, though it is right
    assert accuracy_values(logits, target * 0, empty=None).tolist() == [[1, 0, 1, 0]]
    present = torch.tensor([[True, False]])  # coalition {1} is empty here
    assert accuracy_values(logits, target * 0, present=present).tolist() == [[0, 0, 0, 0]]
    scores = torch.tensor([[0.0], [0.5], [1.4], [1.6]])[:, :, None]
    assert accuracy_values(scores, torch.tensor([1.0])).tolist() == [[0, 1, 1, 0]]
    assert accuracy_values(scores, torch.tensor([1.0]), tolerance=0.4).tolist() == [[0, 0, 1, 0]]
    one = torch.tensor([[-1.0], [0.5], [-0.5], [2.0]])[:, :, None]  # one logit for two classes, as `prediction_value`
    assert accuracy_values(one, torch.tensor([1])).tolist() == [[0, 1, 0, 1]]
    assert accuracy_values(one, torch.tensor([0]), empty=None).tolist() == [[1, 0, 1, 0]]
    for s in range(4):
        assert prediction_value(one[s], torch.tensor([1])).item() == float(one[s] > 0)
    with pytest.raises(ValueError, match="logits"):
        accuracy_values(logits, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="logits"):
        accuracy_values(logits, torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="present"):
        accuracy_values(logits, target, present=torch.ones(1, 3).bool())
    with pytest.raises(ValueError, match="masks"):
        accuracy_values(logits, target, masks=torch.ones(3, 2).bool())


def test_value_tables_of_dialogues_are_per_utterance():
    model, batch = dialogue_case()
    table = subset_values(model, batch)
    assert table.shape == (3, 4, 8)
    assert bool((table[..., 0] == 0).all())
    assert bool((table[-1] == 0).all())  # nothing is present in the last dialogue
    logits = naive_logits(model, batch, "zero_feature", True)
    right = (logits.argmax(-1) == batch.target).double().movedim(0, -1)
    torch.testing.assert_close(table[0, :, 1:], right[0, :, 1:])
    assert shapley_values(table).shape == (3, 4, 3)


def test_discrete_predictions():
    scores = torch.tensor([-3.6, -0.5, 0.0, 0.6, 9.0])[:, None]
    assert discrete_predictions(scores, True).tolist() == [0, 0, 1, 1, 1]
    assert discrete_predictions(scores, True, "sign_gt").tolist() == [0, 0, 0, 1, 1]
    assert discrete_predictions(scores, True, "round7").tolist() == [-3, 0, 0, 1, 3]
    assert discrete_predictions(torch.tensor([[1.0, 2.0], [3.0, 1.0]]), False).tolist() == [1, 0]
    with pytest.raises(ValueError, match="how"):
        discrete_predictions(scores, True, "other")
    with pytest.raises(ValueError, match="logits"):
        discrete_predictions(torch.zeros(2, 2), True)


def test_scoring_restores_every_mode():
    model = make_model(3, dropout=0.5).train()
    model.encoders["a"].eval()  # a frozen part
    modes = [part.training for part in model.modules()]
    batch = make_batch(3)
    first, second = subset_values(model, batch), subset_values(model, batch)
    assert torch.equal(first, second)  # no dropout
    assert [part.training for part in model.modules()] == modes
    subset_predictions(model, batch)
    assert [part.training for part in model.modules()] == modes
    with pytest.raises(ValueError, match="absent"):
        subset_predictions(model, batch, absent="off")
    assert [part.training for part in model.modules()] == modes
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError), scoring(model):
        raise RuntimeError
    assert [part.training for part in model.modules()] == modes
    with pytest.raises(ValueError, match="target"):
        subset_values(model, batch.replace(target=None))


def test_values_may_share_the_training_pass():
    model, batch = make_model(3, dropout=0.5).train(), make_batch(3)
    logits = coalition_logits(model, batch, coalition_masks(3))
    assert logits.requires_grad
    assert model.training
    table = accuracy_values(logits, batch.target, present=batch.present)
    assert not table.requires_grad
    torch.nn.functional.cross_entropy(logits[-1], batch.target).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_errors_of_coalition_logits():
    model, batch = make_model(3), make_batch(3)
    with pytest.raises(TypeError, match="masks: expected a tensor of bools"):
        coalition_logits(model, batch, coalition_masks(3).float())
    for bad in (coalition_masks(2), coalition_masks(3)[0], coalition_masks(3)[:0], torch.ones(8, 2, 3).bool()):
        with pytest.raises(ValueError, match="masks: expected"):
            coalition_logits(model, batch, bad)
    with pytest.raises(ValueError, match="absent: expected 'zero_feature' or 'zero_input', got 'mean'"):
        coalition_logits(model, batch, coalition_masks(3), absent="mean")
    with pytest.raises(ValueError, match="max_rows"):
        coalition_logits(model, batch, coalition_masks(3), max_rows=0)


def test_values_of_the_tasks():
    logits = torch.tensor([[2.0, 1], [0, 1]])
    assert prediction_value(logits, torch.tensor([0, 0])).tolist() == [1, 0]
    scores = torch.tensor([[1.0], [1.0], [1.0]])
    assert prediction_value(scores, torch.tensor([1.5, 1.51, 0.4])).tolist() == [1, 0, 0]
    assert prediction_value(scores, torch.tensor([1.5, 1.51, 0.4]), tolerance=1.0).tolist() == [1, 1, 1]
    said = torch.tensor([[0, 1, 1, 2]])  # against 0 1 2 2: class 1 dice 2/3, iou 1/2; class 2 the same
    logits = nn.functional.one_hot(said, 4).movedim(-1, 1).float()
    target = torch.tensor([[0, 1, 2, 2]])
    assert prediction_value(logits, target).item() == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)  # class 3: neither has it
    assert prediction_value(logits, target, "iou").item() == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert prediction_value(logits, target, "accuracy").item() == pytest.approx(3 / 4)
    binary = torch.tensor([[[1.0, 1, -1, -1]]])
    assert prediction_value(binary, torch.tensor([[1, 0, 0, 1]]), "iou").item() == pytest.approx(1 / 3)
    assert prediction_value(binary, torch.tensor([[1, 0, 0, 1]]), "dice").item() == pytest.approx(1 / 2)
    with pytest.raises(ValueError, match="'tolerance' expects float"):
        prediction_value(logits, target, "tolerance")
    with pytest.raises(ValueError, match="expects classes"):
        prediction_value(logits, target[:, :3], "dice")
    with pytest.raises(ValueError, match="segmentation target"):
        prediction_value(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), "dice")
    with pytest.raises(ValueError, match="'accuracy', 'tolerance'"):
        prediction_value(logits, target, "f1")


@given(seed=st.integers(0, 10_000), M=st.integers(1, 5), labels=st.integers(0, 2))
def test_a_cut_table_is_the_table_of_what_is_left(seed, M, labels):
    """Whatever the game: v'(S) = v(S and kept), looked up one by one; what was cut has PSS 0; cutting twice is once."""
    g = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 3, (4, *[2] * labels, 2**M), generator=g)
    kept = torch.rand(4, M, generator=g) < 0.6
    found = cut_table(table, kept)
    for b in range(4):
        left = sum(1 << m for m in range(M) if kept[b, m])
        for code in range(2**M):
            assert torch.equal(found[b, ..., code], table[b, ..., code & left])
    pss = prediction_shift_score(found)
    gone = ~kept.reshape(4, *[1] * labels, M).expand(pss.shape)
    assert (pss[gone] == 0).all()
    assert torch.equal(cut_table(found, kept), found)
    assert torch.equal(cut_table(table, torch.ones_like(kept)), table)


def test_a_cut_table_by_hand():
    #                      {}  a  b  ab
    table = torch.tensor([[0, 1, 2, 3]]).expand(3, -1)
    kept = torch.tensor([[True, False], [False, True], [False, False]])
    assert cut_table(table, kept).tolist() == [[0, 1, 0, 1], [0, 0, 2, 2], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"kept: expected bool \[\*N, 2\]"):
        cut_table(table, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="kept"):
        cut_table(table, kept.float())
