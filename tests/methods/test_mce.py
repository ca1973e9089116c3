"""MCE against its equations, written as loops over samples and subsets (``mce_loop.py``)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.mce_loop import SHAPES, Reference, last_of, make_batch, make_mce, make_splits, some_present
from torch import nn

from mmlib.backbones import AVMNISTBackbone, Backbone, GenericBackbone, GenericConfig
from mmlib.backbones.alone import fold_places
from mmlib.baselines import JointTraining
from mmlib.batch import MultimodalBatch, MultimodalDataset
from mmlib.methods.mce import (
    MCE,
    MCEConfig,
    ReconstructionModule,
    Step,
    UpperBounds,
    learning_state_factor,
    missing_rate_factor,
    prediction_value,
)
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, load, predict, random_state, save


@pytest.mark.slow
@pytest.mark.parametrize("M", [2, 3, 4])
@pytest.mark.parametrize("regression", [False, True])
def test_every_loss_and_factor_is_its_equation(M, regression):
    batch = make_batch(M, 12, regression, seed=M)
    model = make_mce(batch).double()
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
    batch = make_batch()
    base = make_mce(batch)(batch).losses
    losses = make_mce(batch, lambda_single=2.0, lambda_sub=3.0, lambda_aux=0.5)(batch).losses
    for name, factor in (("task", 1.0), ("single", 2.0), ("subset", 3.0), ("completion", 0.5)):
        assert losses[name].item() == pytest.approx(factor * base[name].item(), rel=1e-5)
    assert set(make_mce(batch, lambda_single=0, lambda_sub=0, lambda_aux=0)(batch).losses) == {"task"}


@pytest.mark.slow
def test_each_term_reaches_its_parts_and_the_factors_carry_no_gradient():
    batch = make_batch(n=24)
    parts = {
        "task": ("encoders", "reconstruction", "decoder"),
        "single": ("encoders", "heads"),
        "subset": ("encoders", "reconstruction", "decoder"),
        "completion": ("encoders", "reconstruction"),
    }
    for term, touched in parts.items():
        model = make_mce(batch)
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
    batch = make_batch(2, 10, present=torch.ones(10, 2, dtype=torch.bool))
    model = make_mce(batch)
    model.upper.table.fill_(1.0)
    h = model.evaluator.encode(batch)
    leaf = {m: x.detach().requires_grad_() for m, x in h.items()}
    pairs = model._pairs(batch.present, model.shared(batch))
    step = Step(batch, batch.target, batch.present, pairs, leaf, *model._pass(batch, leaf, pairs))
    model._completion_loss(step, torch.tensor([1.0, 0.0])).backward()  # only "a" is rebuilt
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
    ).drop(present=some_present(16, 2))
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


# --- batches ---


def test_samples_with_nothing():
    present = some_present(10, 3)
    present[4] = False
    batch = make_batch(3, 10, present=present)
    excluded, kept = make_mce(batch), make_mce(batch, all_missing="keep")
    a, b = excluded(batch), kept(batch)
    assert a.logits.shape == (10, 3)
    others = torch.arange(10) != 4
    without = make_mce(batch)(batch[others])
    assert a.losses["task"].item() == pytest.approx(without.losses["task"].item(), rel=1e-5)
    each = nn.functional.cross_entropy(b.logits, batch.target)
    assert b.losses["task"].item() == pytest.approx(each.item(), rel=1e-5)
    for name in ("single", "subset", "completion"):
        torch.testing.assert_close(a.losses[name], b.losses[name])
    nothing = make_batch(3, 4, present=torch.zeros(4, 3, dtype=torch.bool))
    losses = excluded(nothing.replace(ids=batch.ids[:4])).losses
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()


def test_a_modality_absent_from_the_batch():
    present = some_present(8, 3)
    present[:, 1] = False
    present[:, 0] = True
    batch = make_batch(3, 8, present=present)
    whole = make_batch(3, 8)
    model = make_mce(whole)
    losses = model(batch).losses
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert model.last["state_factor"][1] == 0
    assert model.last["shapley"][1].abs() < 1e-6


# --- sampled coalitions and permutations ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"permutations": 40}, {"subsets": 2}, {"lambda_sub": 0, "lambda_aux": 0, "permutations": 2}]
)
def test_monte_carlo_values_are_unbiased(options):
    batch = make_batch(3, 12, seed=4)
    exact = last_of(make_mce(batch), batch)["shapley"].numpy()
    model = make_mce(batch, **options)
    with torch.no_grad():
        draws = np.array([last_of(model, batch)["shapley"].numpy().copy() for _ in range(200)])
    error = draws.std(0) / np.sqrt(len(draws)) + 1e-6
    assert (np.abs(draws.mean(0) - exact) < 4.5 * error).all()
    np.testing.assert_allclose(draws.sum(1), exact.sum(), atol=1e-4)  # efficiency, in every draw


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

    batch = make_batch(3, 8)
    model = make_mce(batch)
    masks = coalition_masks(3)
    with scoring(model):
        table = coalition_logits(model.evaluator, batch, masks)
        for k, mask in enumerate(masks):
            there = (batch.present & mask).any(-1)
            one = model(batch.drop(present=mask)).logits
            torch.testing.assert_close(table[k][there], one[there])


# --- bounds ---


class Spy(GenericBackbone):
    """Notes which modality is encoded, and how many samples of it."""

    seen: list

    def encode_modality(self, name, x, valid):
        self.seen.append((name, len(x), self.training))
        return super().encode_modality(name, x, valid)


@pytest.mark.slow
def test_for_data_trains_the_frozen_models():
    plan = MissingPlan("bernoulli", {"a": 0.2, "b": 0.5, "c": 0.8})
    splits = {k: plan.draw(v).apply(v) for k, v in make_splits().items()}
    train, valid = splits["train"], splits["valid"]
    torch.manual_seed(0)
    backbone = Spy.for_data(train, width=8, dropout=0.0)
    Spy.seen = []
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    config = TrainConfig(epochs=12, batch_size=16, lr=0.01, device="cpu")
    method = MCE.for_data(train, backbone, valid, config, hidden=16, attention_heads=2, lambda_sub=2.0)
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


@given(st.integers(2, 5), st.integers(5, 40), st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_folds_value_every_sample_once_unseen(folds, n, seed):
    rows = torch.arange(3, 3 * n + 3, 3)
    parts = fold_places(rows, folds, seed)
    assert len(parts) == folds
    for learnt, valued in parts:
        assert not set(learnt.tolist()) & set(valued.tolist())
        assert sorted(learnt.tolist() + valued.tolist()) == rows.tolist()
        assert n // folds <= len(valued) <= -(-n // folds)
    assert sorted(x for _, valued in parts for x in valued.tolist()) == rows.tolist()
    ((learnt, valued),) = fold_places(rows, None)
    assert torch.equal(learnt, rows)
    assert torch.equal(valued, rows)


def test_bounds_of_samples_that_a_model_has_seen_say_nothing_and_cross_fitted_ones_do():
    """Targets that have nothing to do with the features can be learnt by heart, and not be foretold."""
    data = make_splits(n=90)["train"]
    g = torch.Generator().manual_seed(1)
    data = MultimodalDataset(data.data.replace(target=torch.randint(0, 3, (90,), generator=g)), data.info)
    data = data.drop(present=some_present(90, 3))
    backbone = GenericBackbone(GenericConfig(data.feature_shapes, 3, width=64, dropout=0.0))
    config = TrainConfig(epochs=150, batch_size=32, lr=3e-3, device="cpu")
    model = lambda folds: MCE.for_data(data, backbone, None, config, folds=folds)
    seen, unseen = ((m.upper.table.sum(0) / data.present.sum(0)).mean() for m in (model(None), model(3)))
    assert seen > 0.9
    assert abs(unseen - 1 / 3) < 0.15
    assert not model(3).upper(data.ids)[~data.present].any()
    with pytest.raises(ValueError, match="folds: expected at most the"):
        model(90)
    with pytest.raises(ValueError, match="folds: expected"):
        model(1)


def test_for_data_on_scores_with_heads_of_ones_own():
    data = make_splits()["train"]
    scores = MultimodalDataset(data.data.replace(target=data.target.float()), {**data.info, "task": "regression"})
    backbone = GenericBackbone(GenericConfig(data.feature_shapes, 1, width=8, dropout=0.0))
    heads = {m: nn.Linear(8, 1) for m in data.modalities}
    with torch.no_grad():
        for head in heads.values():
            head.bias.fill_(5.0)
    untrained = TrainConfig(steps=1, lr=1e-9, device="cpu")
    near = lambda tolerance: MCE.for_data(scores, backbone, None, untrained, heads=heads, tolerance=tolerance)
    assert not near(1.0).upper.table.any()  # 5 is more than 1 from 0, 1 and 2
    assert near(9.0).upper.table.all()
    assert all((head.bias == 5).all() for head in heads.values())


def test_for_data_without_bounds_trains_nothing_and_names_what_is_wrong():
    train = make_splits()["train"]
    backbone = GenericBackbone.for_data(train, width=8)
    fail = TrainConfig(schedule="cosine")  # which the first stage refuses
    assert MCE.for_data(train, backbone, None, fail, state_factor=False).upper is None
    assert MCE.for_data(train, backbone, None, fail, upper_source="current").upper is None
    with pytest.raises(ValueError, match="config: expected the optimizer"):
        MCE.for_data(train, backbone, None, fail)
    with pytest.raises(ValueError, match="data: expected every modality in some sample, 'b' is in none"):
        MCE.for_data(train.drop(present=torch.tensor([True, False, True])), backbone, None, TrainConfig(epochs=1))
    with pytest.raises(TypeError, match="backbone: expected a Backbone"):
        MCE.for_data(train, JointTraining(backbone))
    with pytest.raises(TypeError, match="config: expected None or how to train"):
        MCE.for_data(train, backbone, None, MCEConfig())
    with pytest.raises(ValueError, match="options: unknown"):
        MCE.for_data(train, backbone, None, state_factor=False, lambda_subset=1.0)


def test_bounds_that_do_not_fit():
    batch = make_batch()
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
    with pytest.raises(ValueError, match="preset"):
        MCE(backbone, state_factor=False, preset="official")
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
        make_mce(batch)(batch.replace(ids=None))


def test_samples_without_bounds_are_found_before_training():
    splits = make_splits()
    train = splits["train"]
    upper = UpperBounds(torch.zeros(len(train), 3), splits["valid"].ids, train.modalities)
    model = MCE(GenericBackbone.for_data(train, width=8), upper, attention_heads=2)
    with pytest.raises(ValueError, match="60 of 60 training samples have no upper bound"):
        fit(model, train, config=TrainConfig(epochs=1, select="last", device="cpu"))


# --- training ---


@pytest.mark.slow
def test_training_resumes_to_the_bit_and_predicts_with_parts_missing(tmp_path):
    splits = make_splits()
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
        fit(broken, train, splits["valid"], config, checkpoint=file, callbacks=[_StopAtBatch(3)])
    resumed = make()
    fit(resumed, train, splits["valid"], config, checkpoint=file, callbacks=[_StopAtBatch(99)])
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
