"""MCE against its equations, written here as loops over samples and subsets that import nothing under test."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmlib.backbones import AVMNISTBackbone, Backbone, GenericBackbone, GenericConfig
from mmlib.baselines import JointTraining
from mmlib.batch import MultimodalBatch, MultimodalDataset
from mmlib.methods.mce import (
    MCE,
    READINGS,
    MCEConfig,
    ReconstructionModule,
    UpperBounds,
    learning_state_factor,
    missing_rate_factor,
    prediction_value,
    released_shapley,
)
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, load, predict, random_state, save

SHAPES = {"a": (3, 2), "b": (1, 4), "c": (2, 3), "d": (1, 2)}


def _present(n: int, M: int, seed: int = 0) -> torch.Tensor:
    present = torch.rand(n, M, generator=torch.Generator().manual_seed(seed)) < 0.6
    present[torch.arange(n), torch.arange(n) % M] = True
    return present


def _batch(M: int = 3, n: int = 9, regression: bool = False, seed: int = 0, present=None) -> MultimodalBatch:
    g = torch.Generator().manual_seed(seed)
    names = list(SHAPES)[:M]
    target = torch.randn(n, generator=g) if regression else torch.randint(0, 3, (n,), generator=g)
    batch = MultimodalBatch(
        {m: torch.randn(n, *SHAPES[m], generator=g) for m in names},
        torch.ones(n, M, dtype=torch.bool),
        target=target,
        ids=torch.arange(100, 100 + n),
    )
    return batch.drop(present=_present(n, M, seed) if present is None else present)


def _mce(batch: MultimodalBatch, seed: int = 0, dropout: float = 0.0, **options) -> MCE:
    """A model whose training pass is deterministic, with random weights in every part."""
    torch.manual_seed(seed)
    regression = batch.target.is_floating_point()
    names = batch.modalities
    backbone = GenericBackbone(
        GenericConfig({m: SHAPES[m] for m in names}, 1 if regression else 3, width=8, dropout=dropout)
    )
    table = (torch.rand(len(batch), len(names)) < 0.7).float()
    upper = UpperBounds(table, batch.ids, names) if options.get("state_factor", True) else None
    options = {"attention_heads": 2, "hidden": 16, "dropout": dropout, **options}
    model = MCE(backbone, upper, present=batch.present, **options)
    with torch.no_grad():
        model.reconstruction.position.normal_()
    return model.train()


class Reference:
    """Section 3 of the paper, one sample and one subset at a time."""

    def __init__(self, model: MCE, batch: MultimodalBatch, tolerance: float = 0.5):
        self.model, self.tolerance = model, tolerance
        self.names = list(batch.modalities)
        self.M, self.n = len(self.names), len(batch)
        self.present = batch.present.numpy()
        self.y = batch.target
        with torch.no_grad():
            self.h = [[model.backbone.encode(batch[i])[m][0] for m in self.names] for i in range(self.n)]
        self.has = [tuple(m for m in range(self.M) if self.present[i, m]) for i in range(self.n)]

    def rebuilt(self, features, subset):
        stacked = torch.stack([features[m] if m in subset else torch.zeros_like(features[m]) for m in range(self.M)])
        return self.model.reconstruction(stacked[None])[0]

    def logits(self, rebuilt):
        return self.model.backbone.decoder(rebuilt.flatten()[None])[0]  # the generic fusion is a concatenation

    def loss(self, logits, i):
        if self.y.is_floating_point():
            return (logits[0] - self.y[i]).abs().item()
        return (torch.logsumexp(logits, 0) - logits[self.y[i]]).item()

    def right(self, logits, i):
        if self.y.is_floating_point():
            return float(abs(float(logits[0]) - float(self.y[i])) <= self.tolerance)
        return float(int(logits.argmax()) == int(self.y[i]))

    def subsets(self, members):
        for size in range(1, len(members) + 1):
            yield from itertools.combinations(members, size)

    @torch.no_grad()
    def run(self):
        said = {(i, s): self.rebuilt(self.h[i], s) for i in range(self.n) for s in self.subsets(self.has[i])}
        logits = {key: self.logits(x) for key, x in said.items()}
        count = self.present.sum(0)
        A = self.n / count
        A = A / A.mean()
        # Eq. 5
        phi = np.zeros(self.M)
        for i in range(self.n):
            k = len(self.has[i])
            value = {s: self.right(logits[i, s], i) for s in self.subsets(self.has[i])} | {(): 0.0}
            for m in self.has[i]:
                rest = [x for x in self.has[i] if x != m]
                for s in [(), *self.subsets(rest)]:
                    weight = math.factorial(len(s)) * math.factorial(k - len(s) - 1) / math.factorial(k)
                    phi[m] += weight * (value[tuple(sorted((*s, m)))] - value[s])
        table = {int(i): row for i, row in zip(self.model.upper.ids, self.model.upper.table.numpy(), strict=True)}
        U = np.array([sum(table[100 + i][m] for i in range(self.n) if self.present[i, m]) for m in range(self.M)])
        B = np.array([max(U[m] - phi[m], 0) / count[m] if count[m] else 0.0 for m in range(self.M)])
        full = [self.has[i] for i in range(self.n)]
        task = np.mean([self.loss(logits[i, full[i]], i) for i in range(self.n)])
        single = 0.0
        for m, name in enumerate(self.names):
            each = [
                self.loss(self.model.heads[name](self.h[i][m][None])[0], i) for i in range(self.n) if self.present[i, m]
            ]
            single += A[m] * B[m] * (np.mean(each) if each else 0.0)
        batch_subsets = sorted({s for i in range(self.n) for s in self.subsets(self.has[i])})
        sub, aux = 0.0, 0.0
        for s in batch_subsets:
            feasible = [i for i in range(self.n) if set(s) <= set(self.has[i])]
            sub += np.mean([self.loss(logits[i, s], i) for i in feasible])
            total = 0.0
            for i in feasible:
                gone = [m for m in self.has[i] if m not in s]
                gaps = [A[m] * B[m] * float(torch.linalg.norm(said[i, s][m] - self.h[i][m])) for m in gone]
                total += sum(gaps) / len(gaps) if gaps else 0.0
            aux += total / len(feasible)
        k = len(batch_subsets)
        return {"task": task, "single": single, "subset": sub / k, "completion": aux / k}, A, B, phi, U


@pytest.mark.slow
@pytest.mark.parametrize("M", [2, 3, 4])
@pytest.mark.parametrize("regression", [False, True])
def test_every_loss_and_factor_is_its_equation(M, regression):
    batch = _batch(M, 12, regression, seed=M)
    model = _mce(batch).double()
    batch = batch._map(lambda x: x.double() if x.is_floating_point() else x)
    expected, A, B, phi, U = Reference(model, batch).run()
    out = model(batch)
    assert {k: v.item() for k, v in out.losses.items()} == pytest.approx(expected, abs=1e-6)
    last = model.last
    for name, value in (("rate_factor", A), ("state_factor", B), ("shapley", phi), ("upper", U)):
        np.testing.assert_allclose(last[name].numpy(), value, atol=1e-6, err_msg=name)
    assert B.max() > 0  # else the two weighted losses say nothing
    np.testing.assert_array_equal(last["counts"].numpy(), batch.present.sum(0).numpy())


@pytest.mark.slow
def test_the_weights_of_the_objective():
    batch = _batch()
    base = _mce(batch)(batch).losses
    losses = _mce(batch, lambda_single=2.0, lambda_sub=3.0, lambda_aux=0.5)(batch).losses
    for name, factor in (("task", 1.0), ("single", 2.0), ("subset", 3.0), ("completion", 0.5)):
        assert losses[name].item() == pytest.approx(factor * base[name].item(), rel=1e-5)
    assert set(_mce(batch, lambda_single=0, lambda_sub=0, lambda_aux=0)(batch).losses) == {"task"}


@pytest.mark.slow
def test_each_term_reaches_its_parts_and_the_factors_carry_no_gradient():
    batch = _batch(n=24)
    parts = {
        "task": ("encoders", "reconstruction", "decoder"),
        "single": ("encoders", "heads"),
        "subset": ("encoders", "reconstruction", "decoder"),
        "completion": ("encoders", "reconstruction"),
    }
    for term, touched in parts.items():
        model = _mce(batch)
        model(batch).losses[term].backward()
        moved = {
            part: any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
            for part, module in {
                "encoders": model.backbone.encoders,
                "decoder": model.backbone.decoder,
                "reconstruction": model.reconstruction,
                "heads": model.heads,
            }.items()
        }
        assert {part for part, yes in moved.items() if yes} == set(touched), term
        assert not any(p.requires_grad for p in (model.rates, model.last_values))


def test_the_target_of_completion_is_held_still():
    """sg(h_m): completion moves an encoder only through the subsets it is part of."""
    batch = _batch(2, 10, present=torch.ones(10, 2, dtype=torch.bool))
    model = _mce(batch)
    model.upper.table.fill_(1.0)
    h = model.evaluator.encode(batch)
    leaf = {m: x.detach().requires_grad_() for m, x in h.items()}
    pairs = model._pairs(batch.present)
    weights = torch.tensor([1.0, 0.0])  # only "a" is rebuilt
    _, completed, _, first = model._predict(batch, leaf, batch.present, pairs)
    model._completion_loss(leaf, completed, first, pairs, weights).backward()
    assert leaf["a"].grad is None or not leaf["a"].grad.any()
    assert leaf["b"].grad.any()


# --- the factors ---


def test_rate_factor_of_the_papers_examples():
    present = torch.zeros(10, 4, dtype=torch.bool)
    for m, count in enumerate((10, 8, 5, 2)):  # Fig. 2
        present[:count, m] = True
    factor = missing_rate_factor(present)
    np.testing.assert_allclose(factor * np.mean([1, 1.25, 2, 5]), [1, 1.25, 2, 5], rtol=1e-6)
    present = torch.zeros(10, 3, dtype=torch.bool)
    for m, count in enumerate((8, 5, 2)):
        present[:count, m] = True
    np.testing.assert_allclose(missing_rate_factor(present), [0.4545, 0.7273, 1.8182], atol=5e-5)
    with pytest.raises(ValueError, match="modalities \\[1\\]"):
        missing_rate_factor(torch.tensor([[True, False]]))
    with pytest.raises(TypeError, match="bool"):
        missing_rate_factor(torch.ones(3, 2))
    with pytest.raises(ValueError, match="at least one sample"):
        missing_rate_factor(torch.ones(0, 2, dtype=torch.bool))


def test_learning_state_factor_of_table_6():
    present = torch.zeros(128, 3, dtype=torch.bool)
    for m, count in enumerate((101, 65, 20)):
        present[:count, m] = True
    early = learning_state_factor(torch.tensor([91.0, 26, 12]), torch.tensor([23.6667, 11.6667, 4.0]), present)
    np.testing.assert_allclose(early, [0.6667, 0.2205, 0.4], atol=5e-5)
    present[:] = False
    for m, count in enumerate((105, 79, 25)):
        present[:count, m] = True
    U, phi = torch.tensor([91.0, 29, 8]), torch.tensor([59.6667, 34.6667, 10.6667])
    np.testing.assert_allclose(learning_state_factor(U, phi, present), [0.2984, 0, 0], atol=5e-5)
    kept = learning_state_factor(U, phi, present, mask=False)
    np.testing.assert_allclose(kept, [0.2984, -0.0717, -0.1067], atol=5e-5)
    nobody = torch.zeros(4, 3, dtype=torch.bool)
    assert not learning_state_factor(U, phi, nobody, mask=False).any()
    with pytest.raises(ValueError, match="upper, shapley, present"):
        learning_state_factor(U[:2], phi, present)


def test_released_shapley_reverses_the_order():
    from mmlib.coalitions import shapley_values

    counts = torch.tensor([0.0, 5, 3, 6, 1, 5, 4, 8])  # c_0 = 5, c_1 = 3, c_01 = 6, c_2 = 1, c_02 = 5, c_12 = 4, all 8
    np.testing.assert_allclose(shapley_values(counts), [4.1667, 2.6667, 1.1667], atol=5e-5)
    np.testing.assert_allclose(released_shapley(counts), [2.8333, 3.3333, 3.8333], atol=5e-5)
    np.testing.assert_allclose(released_shapley(counts, 7), [0.7667, 0.5714, 0.3762], atol=5e-5)
    two = torch.tensor([0.0, 5, 3, 7])
    np.testing.assert_allclose(shapley_values(two), [4.5, 2.5])
    np.testing.assert_allclose(released_shapley(two, 3), [2, 1.6667], atol=5e-5)
    with pytest.raises(ValueError, match="players"):
        released_shapley(counts, 2)


@pytest.mark.slow
@given(st.lists(st.floats(0, 100), min_size=8, max_size=8))
@settings(deadline=None, max_examples=25)
def test_released_shapley_of_three_by_hand(c):
    c[0] = 0.0
    v = torch.tensor(c, dtype=torch.float64)
    for i, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        pair = [c[(1 << i) | (1 << j)] for j in others]
        expected = c[1 << i] / 3 + sum(p - c[1 << i] for p in pair) / 6 + (c[7] - c[1 << i]) / 3
        assert released_shapley(v)[i].item() == pytest.approx(expected, abs=1e-6)


def test_redundant_modalities_keep_an_incentive():
    """Sec. 3.4 says that the gap closes. If each of M modalities alone is right, phi = 1/M and B = (M - 1)/M."""
    from mmlib.coalitions import shapley_values

    for M in (2, 3, 5):
        v = torch.ones(2**M)
        v[0] = 0
        present = torch.ones(1, M, dtype=torch.bool)
        factor = learning_state_factor(torch.ones(M), shapley_values(v), present)
        np.testing.assert_allclose(factor, (M - 1) / M, rtol=1e-5)


# --- values ---


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


class Segmenter(Backbone):
    """The smallest segmentation net: images [n, 1, 4, 4] -> [n, width, 4, 4], the mean, and a 1 x 1 convolution."""

    def __init__(self, names=("a", "b"), classes: int = 3, width: int = 8):
        super().__init__()
        self.width, self.classes = width, classes
        for name in names:
            self.encoders[name] = nn.Conv2d(1, width, 3, padding=1)
        self.decoder = self.make_decoder(width)

    def make_decoder(self, width):
        return nn.Conv2d(width, self.classes, 1)

    def encode_modality(self, name, x, valid):
        return self.encoders[name](x)

    def fuse(self, h, present, batch):
        weight = present.float()[:, :, None, None, None]
        return (torch.stack(list(h.values()), 1) * weight).sum(1) / weight.sum(1).clamp_min(1)

    def decode(self, z):
        return self.decoder(z)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 3])
def test_segmentation_trains(classes):
    torch.manual_seed(0)
    image = torch.randn(16, 1, 4, 4)
    target = (image[:, 0] > 0).long() + ((image[:, 0] > 1).long() if classes > 1 else 0)
    batch = MultimodalBatch(
        {"a": image, "b": -image}, torch.ones(16, 2, dtype=torch.bool), target=target, ids=torch.arange(16)
    ).drop(present=_present(16, 2))
    upper = UpperBounds(torch.full((16, 2), 0.9), batch.ids, ("a", "b"))
    model = MCE(Segmenter(classes=classes), upper, attention_heads=2, hidden=16, present=batch.present).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    start = None
    for _ in range(60):
        optimizer.zero_grad()
        losses = model(batch).losses
        sum(losses.values()).backward()
        optimizer.step()
        start = start or losses["task"].item()
    assert set(losses) == {"task", "single", "subset", "completion"}
    assert losses["task"].item() < 0.7 * start
    assert prediction_value(model.eval()(batch).logits, target).mean() > 0.6
    assert 0 <= model.last["shapley"].sum() <= 16
    wrong = batch.replace(target=target[:, :2])
    with pytest.raises(ValueError, match="logits: expected"):
        model.train()(wrong)


# --- readings: every row of the list of deviations, both values ---


def test_readings_are_known_options():
    for options in READINGS.values():
        MCEConfig(**options)


def test_released_values_by_hand():
    """With the release's subset loss and Shapley formula, from the counts of each subset's feasible samples."""
    batch = _batch(3, 10, seed=5)
    model = _mce(batch, shapley="released", subset_loss="strict", rate_norm="none").double()
    batch = batch._map(lambda x: x.double() if x.is_floating_point() else x)
    ref = Reference(model, batch)
    with torch.no_grad():
        logits = {(i, s): ref.logits(ref.rebuilt(ref.h[i], s)) for i in range(ref.n) for s in ref.subsets(ref.has[i])}
    c = np.zeros(8)
    for (i, s), said in logits.items():
        c[sum(1 << m for m in s)] += ref.right(said, i)
    phi = []
    for i in range(3):
        total = c[1 << i] / 3
        for code in range(8):
            size = bin(code).count("1")
            if code >> i & 1 and size >= 2:
                weight = math.factorial(size - 1) * math.factorial(3 - size) / math.factorial(3)
                total += weight * (c[code] - c[1 << i])
        phi.append(total)
    strict = 0.0
    for i in range(ref.n):
        own = [ref.loss(logits[i, s], i) for s in ref.subsets(ref.has[i]) if s != ref.has[i]]
        strict += sum(own) / (2 ** len(ref.has[i]) - 1) / ref.n
    out = model(batch)
    np.testing.assert_allclose(model.last["shapley"].numpy(), phi, atol=1e-6)
    np.testing.assert_allclose(model.last["rate_factor"].numpy(), ref.n / ref.present.sum(0))
    assert out.losses["subset"].item() == pytest.approx(strict, abs=1e-6)


def test_released_two_passes_single_and_completion_by_hand():
    batch = _batch(3, 10, seed=7)
    options = {"subset_features": "reconstructed", "single_loss": "released", "completion_loss": "released"}
    model = _mce(batch, **options).double()
    batch = batch._map(lambda x: x.double() if x.is_floating_point() else x)
    ref = Reference(model, batch)
    with torch.no_grad():
        first = [ref.rebuilt(ref.h[i], ref.has[i]) for i in range(ref.n)]
        strict = {
            (i, s): ref.rebuilt(list(first[i]), s)
            for i in range(ref.n)
            for s in ref.subsets(ref.has[i])
            if s != ref.has[i]
        }
    out = model(batch)
    w = (model.last["rate_factor"] * model.last["state_factor"]).numpy()
    single = 0.0
    for m, name in enumerate(ref.names):
        each = [
            ref.loss(model.heads[name](first[i][m][None])[0], i) if ref.present[i, m] else math.log(3)
            for i in range(ref.n)
        ]
        single += w[m] * np.mean(each)
    assert out.losses["single"].item() == pytest.approx(single, abs=1e-6)

    def completion(only_last: bool) -> float:
        total = 0.0
        for i in range(ref.n):
            own = [s for s in ref.subsets(ref.has[i]) if s != ref.has[i]]
            if only_last:
                own = sorted(own, key=lambda s: sum(1 << m for m in s))[-1:]
            for s in own:
                gaps = [w[m] * float((strict[i, s][m] - first[i][m]).abs().mean()) for m in ref.has[i] if m not in s]
                total += sum(gaps) / (2 ** len(ref.has[i]) - 1) / ref.n
        return total

    assert out.losses["completion"].item() == pytest.approx(completion(False), abs=1e-6)
    last = _mce(batch, **{**options, "completion_loss": "released_last"}).double()
    assert last(batch).losses["completion"].item() == pytest.approx(completion(True), abs=1e-6)
    # the full set's prediction is the first pass, not completed twice
    with torch.no_grad():
        expected = [ref.loss(ref.logits(first[i]), i) for i in range(ref.n)]
    assert out.losses["task"].item() == pytest.approx(np.mean(expected), abs=1e-6)


def test_columns_slip_changes_what_the_losses_count_not_the_prediction():
    batch = _batch(3, 10, seed=3)
    straight, slipped = _mce(batch), _mce(batch, columns=(0, 2, 1))
    a, b = straight(batch), slipped(batch)
    torch.testing.assert_close(a.logits, b.logits)
    counts = batch.present.sum(0)
    assert slipped.last["counts"].tolist() == counts[[0, 2, 1]].tolist()
    np.testing.assert_allclose(slipped.rates, straight.rates[[0, 2, 1]])
    with pytest.raises(ValueError, match="columns"):
        _mce(batch, columns=(0, 1))


def test_other_options_do_what_they_say():
    batch = _batch(3, 12, seed=2)
    base = _mce(batch)
    base(batch)
    n = base.last["counts"]
    per_batch = _mce(batch, state_norm=False)
    per_batch(batch)
    torch.testing.assert_close(per_batch.last["state_factor"], base.last["state_factor"] * n)
    unmasked = _mce(batch, mask_negative=False)
    unmasked.upper.table.zero_()
    unmasked(batch)
    assert (unmasked.last["state_factor"] <= 0).all()
    assert (unmasked.last["state_factor"] < 0).any()
    current = _mce(batch, upper_source="current")
    current(batch)
    with torch.no_grad():
        heads = [
            int(((current.heads[m](x).argmax(-1) == batch.target) & batch.present[:, k]).sum())
            for k, (m, x) in enumerate(current.backbone.encode(batch).items())
        ]
    assert current.last["upper"].tolist() == heads
    held = _mce(batch, train_position=False)
    assert not held.reconstruction.position.requires_grad
    assert base.reconstruction.position.requires_grad
    without = _mce(batch, rate_factor=False, state_factor=False)
    without(batch)
    assert without.last["rate_factor"].tolist() == without.last["state_factor"].tolist() == [1, 1, 1]


def test_values_from_a_pass_of_their_own():
    batch = _batch(3, 40, seed=1)
    shared, own = _mce(batch, dropout=0.5), _mce(batch, dropout=0.5, value_pass="eval")
    seen = set()
    for _ in range(5):
        own(batch)
        seen.add(tuple(own.last["shapley"].tolist()))
    assert len(seen) == 1  # no dropout in it
    assert own.training
    assert all(part.training for part in own.modules())
    spread = set()
    for _ in range(5):
        shared(batch)
        spread.add(tuple(shared.last["shapley"].tolist()))
    assert len(spread) > 1
    plain = _mce(batch)
    plain(batch)
    torch.testing.assert_close(plain.last["shapley"], _last_of(_mce(batch, value_pass="eval"), batch)["shapley"])


def _last_of(model, batch):
    model(batch)
    return model.last


def test_samples_with_nothing():
    present = _present(10, 3)
    present[4] = False
    batch = _batch(3, 10, present=present)
    excluded, kept = _mce(batch), _mce(batch, all_missing="keep")
    a, b = excluded(batch), kept(batch)
    assert a.logits.shape == (10, 3)
    others = torch.arange(10) != 4
    without = _mce(batch)(batch[others])
    assert a.losses["task"].item() == pytest.approx(without.losses["task"].item(), rel=1e-5)
    each = nn.functional.cross_entropy(b.logits, batch.target)
    assert b.losses["task"].item() == pytest.approx(each.item(), rel=1e-5)
    for name in ("single", "subset", "completion"):
        torch.testing.assert_close(a.losses[name], b.losses[name])
    nothing = _batch(3, 4, present=torch.zeros(4, 3, dtype=torch.bool))
    losses = excluded(nothing.replace(ids=batch.ids[:4])).losses
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()


def test_a_modality_absent_from_the_batch():
    present = _present(8, 3)
    present[:, 1] = False
    present[:, 0] = True
    batch = _batch(3, 8, present=present)
    whole = _batch(3, 8)
    model = _mce(whole)
    losses = model(batch).losses
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert model.last["state_factor"][1] == 0
    assert model.last["shapley"][1].abs() < 1e-6


# --- sampled coalitions and permutations ---


@pytest.mark.slow
def test_drawn_coalitions_leave_the_means_unbiased():
    batch = _batch(3, 12, seed=4)
    full = _mce(batch, state_factor=False)(batch).losses
    drawn = _mce(batch, state_factor=False, subsets=2)
    draws = {"subset": [], "completion": []}
    with torch.no_grad():
        for _ in range(400):
            losses = drawn(batch).losses
            assert losses["task"].item() == pytest.approx(full["task"].item(), rel=1e-5)
            for name in draws:
                draws[name].append(losses[name].item())
    for name, values in draws.items():
        error = np.std(values) / np.sqrt(len(values))
        assert error > 0
        assert abs(np.mean(values) - full[name].item()) < 4 * error, name
    everything = _mce(batch, state_factor=False, subsets=7)(batch).losses
    for name in full:
        assert everything[name].item() == pytest.approx(full[name].item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"permutations": 40}, {"subsets": 2}, {"lambda_sub": 0, "lambda_aux": 0, "permutations": 2}]
)
def test_monte_carlo_values_are_unbiased(options):
    batch = _batch(3, 12, seed=4)
    exact = _last_of(_mce(batch), batch)["shapley"].numpy()
    model = _mce(batch, **options)
    with torch.no_grad():
        draws = np.array([_last_of(model, batch)["shapley"].numpy().copy() for _ in range(200)])
    error = draws.std(0) / np.sqrt(len(draws)) + 1e-6
    assert (np.abs(draws.mean(0) - exact) < 4.5 * error).all()
    np.testing.assert_allclose(draws.sum(1), exact.sum(), atol=1e-4)  # efficiency, in every draw


def test_released_formula_needs_all_coalitions():
    with pytest.raises(ValueError, match="every coalition"):
        MCEConfig(shapley="released", permutations=3)
    with pytest.raises(ValueError, match="Eqs. 11 and 13"):
        MCEConfig(subset_loss="strict", subsets=3)


# --- the modules ---


def test_reconstruction_module_by_hand():
    torch.manual_seed(0)
    module = ReconstructionModule(3, 8, heads=2, hidden=16, dropout=0.0).double().eval()
    with torch.no_grad():
        module.position.normal_()
    h = torch.randn(4, 3, 8, dtype=torch.float64)
    x = h + module.position
    norm = lambda x, layer: nn.functional.layer_norm(x, (8,), layer.weight, layer.bias)
    qkv = norm(x, module.norm_attention) @ module.qkv.weight.T
    mixed = torch.zeros_like(x)
    for n in range(4):
        for head in range(2):
            q, k, v = (qkv[n, :, 8 * i + 4 * head : 8 * i + 4 * head + 4] for i in range(3))
            weights = torch.softmax(q @ k.T / 2, -1)
            mixed[n, :, 4 * head : 4 * head + 4] = weights @ v
    x = x + module.out(mixed)
    first, last = module.feed_forward[0], module.feed_forward[3]
    x = x + last(nn.functional.gelu(first(norm(x, module.norm_hidden))))
    torch.testing.assert_close(module(h), x)
    with pytest.raises(ValueError, match="divisor"):
        ReconstructionModule(3, 10, heads=4)
    with pytest.raises(ValueError, match="h: expected"):
        module(h[:, :2])


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_avmnist_model():
    from mmlib.backbones import AVMNISTConfig

    model = MCE(AVMNISTBackbone(AVMNISTConfig(released_heads=True)), state_factor=False)
    assert _count(model) == 1_278_252
    image, audio = model.backbone.encoders["image"], model.backbone.encoders["audio"]
    assert _count(image) - _count(image.align) == 6_872
    assert _count(audio) == 67_254
    assert _count(model.reconstruction) - model.reconstruction.position.numel() == 1_067_904
    assert [_count(head) for head in model.heads.values()] == [21_194, 21_194]


def test_completed_backbone_serves_the_coalition_engine():
    from mmlib.coalitions import coalition_logits, coalition_masks, scoring

    batch = _batch(3, 8)
    model = _mce(batch)
    masks = coalition_masks(3)
    with scoring(model):
        table = coalition_logits(model.evaluator, batch, masks)
        for k, mask in enumerate(masks):
            there = (batch.present & mask).any(-1)
            one = model(batch.drop(present=mask)).logits
            torch.testing.assert_close(table[k][there], one[there])


# --- bounds ---


def _data(n=60, M=3, seed=0) -> dict[str, MultimodalDataset]:
    g = torch.Generator().manual_seed(seed)
    splits = {}
    for split in ("train", "valid", "test"):
        y = torch.randint(0, 3, (n,), generator=g)
        features = {
            m: (torch.randn(n, *SHAPES[m], generator=g) + y.reshape(-1, 1, 1)).numpy() for m in list(SHAPES)[:M]
        }
        splits[split] = MultimodalDataset.from_arrays(
            features,
            y.numpy(),
            ids=[f"{split}{i}" for i in range(n)],
            classes=3,
            info={"name": "toy", "task": "classification", "outputs": 3},
        )
    return splits


def test_upper_bounds_are_what_the_models_get_right():
    train = MissingPlan("bernoulli", 0.4).draw(_data()["train"]).apply(_data()["train"])
    models = {m: JointTraining(GenericBackbone.for_data(train.select([m]), width=8)) for m in train.modalities}
    for model in models.values():
        model.train()
    upper = UpperBounds.from_models(models, train, batch_size=7)
    assert all(model.training for model in models.values())
    for m, name in enumerate(train.modalities):
        models[name].eval()
        for i in range(0, len(train), 9):
            expected = 0.0
            if train.present[i, m]:
                logits = models[name](train.data.select([name])[i]).logits[0]
                expected = float(logits.argmax() == train.data.target[i])
            assert upper(train.ids[i : i + 1])[0, m].item() == expected
    assert 0 < upper.table.mean() < 1
    with pytest.raises(ValueError, match="models: expected one for each"):
        UpperBounds.from_models({"a": models["a"]}, train)


class Spy(GenericBackbone):
    """Notes which modality is encoded, and how many samples of it."""

    seen: list

    def encode_modality(self, name, x, valid):
        self.seen.append((name, len(x), self.training))
        return super().encode_modality(name, x, valid)


@pytest.mark.slow
def test_for_data_trains_the_frozen_models():
    plan = MissingPlan("bernoulli", {"a": 0.2, "b": 0.5, "c": 0.8})
    splits = {k: plan.draw(v).apply(v) for k, v in _data().items()}
    train, valid = splits["train"], splits["valid"]
    torch.manual_seed(0)
    backbone = Spy.for_data(train, width=8, dropout=0.0)
    Spy.seen = []
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    config = TrainConfig(epochs=12, batch_size=16, lr=0.01, device="cpu")
    method = MCE.for_data(backbone, train, valid, config, hidden=16, attention_heads=2, lambda_sub=2.0)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items()), "only copies were trained"
    assert method.config.lambda_sub == 2.0
    for m, name in enumerate(train.modalities):
        trained = sum(n for seen, n, training in Spy.seen if training and seen == name)
        assert trained == 12 * int(train.present[:, m].sum()), "on the samples that have it alone"
    table = method.upper(train.ids)
    assert not table[~train.present].any()
    right = table.sum(0) / train.present.sum(0)
    assert right.mean() > 0.6, right  # three classes, a third by chance
    assert torch.equal(method.rates, missing_rate_factor(train.present))
    fit(method, train, valid, config)
    assert (predict(method, valid).argmax(-1) == valid.target).double().mean() > 0.6


def test_for_data_on_scores_with_heads_of_ones_own():
    data = _data()["train"]
    scores = MultimodalDataset(data.data.replace(target=data.target.float()), {**data.info, "task": "regression"})
    backbone = GenericBackbone(GenericConfig(data.feature_shapes, 1, width=8, dropout=0.0))
    heads = {m: nn.Linear(8, 1) for m in data.modalities}
    with torch.no_grad():
        for head in heads.values():
            head.bias.fill_(5.0)
    untrained = TrainConfig(steps=1, lr=1e-9, device="cpu")
    near = lambda tolerance: MCE.for_data(backbone, scores, None, untrained, heads=heads, tolerance=tolerance)
    assert not near(1.0).upper.table.any()  # 5 is more than 1 from 0, 1 and 2
    assert near(9.0).upper.table.all()
    assert all((head.bias == 5).all() for head in heads.values())


def test_for_data_without_bounds_trains_nothing_and_names_what_is_wrong():
    train = _data()["train"]
    backbone = GenericBackbone.for_data(train, width=8)
    fail = TrainConfig(schedule="cosine")  # which the first stage refuses
    assert MCE.for_data(backbone, train, None, fail, state_factor=False).upper is None
    assert MCE.for_data(backbone, train, None, fail, upper_source="current").upper is None
    with pytest.raises(ValueError, match="config: expected the optimizer"):
        MCE.for_data(backbone, train, None, fail)
    with pytest.raises(ValueError, match="train: expected every modality in some sample, 'b' is in none"):
        MCE.for_data(backbone, train.drop(present=torch.tensor([True, False, True])), None, TrainConfig(epochs=1))
    with pytest.raises(TypeError, match="backbone: expected a Backbone"):
        MCE.for_data(JointTraining(backbone), train)
    with pytest.raises(TypeError, match="config: expected None or how to train"):
        MCE.for_data(backbone, train, None, MCEConfig())
    with pytest.raises(ValueError, match="options: unknown"):
        MCE.for_data(backbone, train, None, state_factor=False, lambda_subset=1.0)


def test_bounds_that_do_not_fit():
    batch = _batch()
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="table: expected"):
        UpperBounds(torch.zeros(3, 2), ids, ("a",))
    with pytest.raises(ValueError, match="different ids"):
        UpperBounds(torch.zeros(3, 1), torch.tensor([1, 1, 2]), ("a",))
    with pytest.raises(ValueError, match="values in"):
        UpperBounds(torch.full((3, 1), 1.5), ids, ("a",))
    backbone = GenericBackbone(GenericConfig({m: SHAPES[m] for m in batch.modalities}, 3, width=8))
    with pytest.raises(ValueError, match="upper: expected UpperBounds"):
        MCE(backbone)
    with pytest.raises(ValueError, match="upper: expected bounds of"):
        MCE(backbone, UpperBounds(torch.zeros(3, 3), ids, ("a", "c", "b")))
    with pytest.raises(ValueError, match="heads: expected one for each"):
        MCE(backbone, state_factor=False, heads={"a": nn.Linear(8, 3)})
    with pytest.raises(ValueError, match="options: unknown"):
        MCE(backbone, state_factor=False, lambda_subset=1.0)
    with pytest.raises(ValueError, match="reading"):
        MCE(backbone, state_factor=False, reading="official")
    with pytest.raises(ValueError, match="permutations: expected None or an integer of at least 1, got 0"):
        MCE(backbone, state_factor=False, permutations=0)
    wrong = {m: nn.Linear(9, 3) for m in batch.modalities}
    model = MCE(backbone, state_factor=False, heads=wrong, present=batch.present)
    with pytest.raises(ValueError, match="heads\\['a'\\]: expected a decoder"):
        model.train()(batch)
    model = MCE(backbone, state_factor=False)
    with pytest.raises(ValueError, match="present: A is not known"):
        model.train()(batch)
    with pytest.raises(ValueError, match="ids"):
        _mce(batch)(batch.replace(ids=None))


def test_samples_without_bounds_are_found_before_training():
    splits = _data()
    train = splits["train"]
    upper = UpperBounds(torch.zeros(len(train), 3), splits["valid"].ids, train.modalities)
    model = MCE(GenericBackbone.for_data(train, width=8), upper, attention_heads=2)
    with pytest.raises(ValueError, match="60 of 60 training samples have no upper bound"):
        fit(model, train, config=TrainConfig(epochs=1, select="last", device="cpu"))


# --- training ---


@pytest.mark.slow
def test_training_resumes_to_the_bit_and_predicts_with_parts_missing(tmp_path):
    splits = _data()
    plan = MissingPlan("exact_count", [0.2, 0.5, 0.8], seed=1)
    train = plan.draw(splits["train"]).apply(splits["train"])
    table = (torch.rand(len(train), 3, generator=torch.Generator().manual_seed(0)) < 0.8).float()

    def make():
        with random_state(3):
            backbone = GenericBackbone.for_data(train, width=8)
            return MCE(backbone, UpperBounds(table, train.ids, train.modalities), attention_heads=2, hidden=16)

    config = TrainConfig(epochs=4, batch_size=16, device="cpu", seed=3)
    straight = make()
    fit(straight, train, splits["valid"], config)

    file = tmp_path / "run.pt"
    broken = make()
    with pytest.raises(KeyboardInterrupt):
        fit(broken, train, splits["valid"], config, checkpoint=file, hooks=[_StopAtBatch(3)])
    resumed = make()
    fit(resumed, train, splits["valid"], config, checkpoint=file, hooks=[_StopAtBatch(99)])
    for name, x in straight.state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name]), name

    save(resumed, tmp_path / "model.pt")
    other = make()
    load(other, tmp_path / "model.pt")
    only = torch.tensor([True, False, False])
    logits = predict(other, splits["test"], present=only)
    assert logits.shape == (60, 3)
    assert torch.equal(logits, predict(resumed, splits["test"], present=only))
    assert not torch.equal(logits, predict(other, splits["test"]))


class _StopAtBatch:
    """Interrupts in the third epoch, after two were checkpointed."""

    def __init__(self, epoch: int):
        self._epoch = epoch

    def on_batch(self, state):
        if state.epoch == self._epoch:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_the_runner_trains_mce_with_its_bounds():
    from book.support.experiments import subsets, train_and_score

    config = {
        "data": "digits",
        "method": "mce",
        "method_options": {"hidden": 32},
        "backbone_options": {"width": 32},
        "train_plan": {"kind": "exact_count", "rates": [0.2, 0.5, 0.8]},
        "test": "subsets",
        "train": {"epochs": 8},
    }
    rows = {row["test"]: row["value"] for row in train_and_score(config)}
    assert set(rows) == {"valid", *subsets(["left", "right", "projection"])}
    assert rows["left+right+projection"] > 0.5
    again = {row["test"]: row["value"] for row in train_and_score(config)}  # with the bounds kept from before
    assert again == rows
    complete = {**config, "method_options": {"hidden": 32, "upper_bounds": "complete"}}
    other = {row["test"]: row["value"] for row in train_and_score(complete)}
    assert other != rows
    steps = {**config, "method_options": {"hidden": 32, "upper_bounds": "steps"}}
    longer = {row["test"]: row["value"] for row in train_and_score(steps)}
    assert longer not in (rows, other)
    with pytest.raises(ValueError, match="upper_bounds"):
        train_and_score({**config, "method_options": {"upper_bounds": "none"}})
