"""DREAM against its equations, written as NumPy loops in `dream_loop`."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.dream_loop import SHAPES, Toy, check_against_loop, check_gradients, make_batch, make_dream
from torch import nn

from mmlib import DREAM, MultimodalBatch, MultimodalDataset
from mmlib.backbones import EvaluatorConfig, GenericBackbone, MLPEvaluator, SelfMMEvaluator, Table3Evaluator
from mmlib.baselines import JointTraining
from mmlib.coalitions import coalition_masks, prediction_shift_score
from mmlib.layers import kept_modalities
from mmlib.methods.dream import DREAMConfig, distillation_loss, mask_weights
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, load, predict, save

OPTIONS = [
    {},
    {"enhance": "all"},
    {"repeats": 1},
    {"masked_fusion": False},
    {"lambda_distill": 0.7},
    {"lambda_distill": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_losses_against_the_loop(options):
    batch = make_batch()
    ref = check_against_loop(make_dream(batch, **options), batch)
    assert (ref.pss == 0).any()
    assert (ref.pss > 0).any()


@pytest.mark.parametrize("M", [1, 2, 4])
def test_any_number_of_modalities(M):
    batch = make_batch(M, n=5, seed=M)
    check_against_loop(make_dream(batch), batch)


def test_scores_are_cut_and_trained_by_l1():
    batch = make_batch(kind="scores", n=9)
    check_against_loop(make_dream(batch, "scores"), batch)


def test_four_yes_or_no_labels():
    batch = make_batch(kind="labels")
    check_against_loop(make_dream(batch, "labels"), batch, "labels")


# --- worked examples -------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """An evaluator that says what a table says of the modalities that are not zero."""

    modalities = ("a", "b", "c")

    def __init__(self, table):
        super().__init__()
        self.register_buffer("predictions", torch.tensor(table))

    def forward(self, batch):
        code = sum((x.flatten(1) != 0).any(-1).long() << m for m, x in enumerate(batch.features.values()))
        return nn.functional.one_hot(self.predictions[code], 2).float()


#        {}, a, b, ab, c, ac, bc, abc
WORKED = [
    ([0, 1, 0, 1, 0, 1, 0, 1], (1, 0, 0), (2, 0.5, 0.5)),
    ([0, 1, 0, 1, 1, 1, 0, 1], (5 / 6, 1 / 6, 1 / 3), (11 / 6, 1 / 3, 5 / 6)),
    ([1] * 8, (0, 0, 0), (1, 1, 1)),
]


@pytest.mark.parametrize(("table", "pss", "pas"), WORKED)
def test_the_worked_shapley_examples(table, pss, pas):
    batch = MultimodalBatch(
        {m: torch.ones(1, 2, 1) for m in "abc"}, torch.ones(1, 3, dtype=torch.bool), torch.tensor([1])
    )
    model = DREAM(Table(table).eval(), feature_shapes=dict.fromkeys("abc", (2, 1)), outputs=2, width=8, heads=2)
    found = model.contributions(batch)
    np.testing.assert_allclose(found.pss[0], pss, atol=1e-6)
    np.testing.assert_allclose(found.pas[0], pas, atol=1e-6)
    w = torch.log_softmax(torch.tensor([[0.3, -0.2, 0.1]]), -1)
    q = np.exp(pas) / np.exp(pas).sum()
    assert distillation_loss(w, found.pas).item() == pytest.approx((q * (np.log(q) - w[0].numpy())).sum(), abs=1e-6)


def test_the_worked_fusion_weights():
    w, pss = torch.ones(3), torch.tensor([1, 0, 0.5])
    assert mask_weights(w, pss).tolist() == [2, 1, 1.5]
    found = torch.softmax(mask_weights(w, pss), -1)
    torch.testing.assert_close(found, torch.tensor([0.5065, 0.1863, 0.3072]), atol=5e-5, rtol=0)


def test_the_printed_mask_is_not_monotone():
    low = torch.softmax(mask_weights(torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 0.0])), -1)
    high = torch.softmax(mask_weights(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0])), -1)
    assert high[0] < low[0]


# --- Table 3 ---------------------------------------------------------------------------------------------------------


DATASETS = {"mosi": (5, 20, 1, 0), "mosei": (74, 35, 1, 0), "iemocap": (74, 35, 8, 4)}


def _count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "expected"), [("mosi", 3_054_116), ("mosei", 3_070_916), ("iemocap", 3_072_323)])
def test_the_parameters_of_table_3(name, expected):
    audio, vision, outputs, labels = DATASETS[name]
    shapes = {"language": (50, 300), "audio": (50, audio), "vision": (50, vision)}
    evaluator = Table3Evaluator(EvaluatorConfig(shapes, outputs, labels)).eval()
    model = DREAM(evaluator, feature_shapes=shapes, outputs=outputs, labels=labels, regression=outputs == 1)
    assert _count(model) == expected
    assert _count(model.evaluator) == 0
    parts = {
        "project": 200 * (300 + audio + vision),
        "position": 50 * 200,
        "enhancement": 9 * (160_800 + 400),
        "fusion": 9 * (160_800 + 400),
        "weigh": 77_315,
        "out": 201 * outputs,
    }
    assert sum(parts.values()) == expected
    for part, count in parts.items():
        found = getattr(model, part)
        assert (found.numel() if isinstance(found, nn.Parameter) else _count(found)) == count, part
    attention = model.fusion["language"].whole
    assert _count(attention.attention) == 160_800


# --- what DREAM may know ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_presence_is_not_read(training):
    batch = make_batch(n=8)
    model = make_dream(batch).train(training)
    g = torch.Generator().manual_seed(1)
    rows = torch.randperm(8, generator=g)
    noise = {m: torch.rand(v.shape, generator=g) < 0.5 for m, v in batch.observed.items()}
    other = batch.replace(present=batch.present[rows], observed=noise)
    for changed in (other, batch.replace(present=torch.zeros_like(batch.present))):
        a, b = model(batch), model(changed)
        assert torch.equal(a.logits, b.logits)
        assert a.losses.keys() == b.losses.keys()
        assert all(torch.equal(a.losses[k], b.losses[k]) for k in a.losses)
        assert torch.equal(model.contributions(batch).pss, model.contributions(changed).pss)


def test_padding_is_not_read():
    batch = make_batch(n=6)
    model = make_dream(batch).eval()
    junk = {m: torch.where(batch.valid[m][..., None], x, torch.nan) for m, x in batch.features.items()}
    assert torch.equal(model(batch.replace(features=junk)).logits, model(batch).logits)


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), M=st.integers(1, 4))
def test_a_missing_modality_never_shifts_the_prediction(seed, M):
    """It emerges: a missing modality is zeros, and leaving zeros out changes nothing."""
    batch = make_batch(M, n=6, seed=seed)
    found = make_dream(batch, seed=seed).contributions(batch)
    assert (found.pss[~batch.present] == 0).all()
    assert ((found.pss >= 0) & (found.pss <= 1 + 1e-6)).all()
    right = found.pas.sum(-1)  # M where everything together is right, 0 where it is wrong
    assert torch.isclose(right, torch.where(right > M / 2, float(M), 0.0), atol=1e-5).all()


def test_samples_without_anything():
    batch = make_batch(n=4).drop(present=torch.zeros(3, dtype=torch.bool))
    model = make_dream(batch)
    assert (model.contributions(batch).pss == 0).all()
    out = model(batch)
    sum(out.losses.values()).backward()
    assert torch.isfinite(out.logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    never = {m: torch.zeros_like(v) for m, v in batch.valid.items()}
    bare = MultimodalBatch(batch.features, batch.present, batch.target, never, ids=batch.ids)
    assert torch.isfinite(model(bare).logits).all()


def test_one_sample():
    batch = make_batch(n=5)
    model = make_dream(batch)
    alone = [model(batch[i]) for i in range(5)]
    torch.testing.assert_close(torch.cat([o.logits for o in alone]), model(batch).logits)
    loss = torch.stack([sum(o.losses.values()) for o in alone]).mean()
    torch.testing.assert_close(loss, sum(model(batch).losses.values()))


def test_images_and_vectors():
    g = torch.Generator().manual_seed(0)
    data = MultimodalDataset.from_arrays(
        {"image": torch.randn(6, 2, 5, 4, generator=g), "vector": torch.randn(6, 3, generator=g)},
        torch.arange(6) % 3,
    )
    model = DREAM.for_data(data, MLPEvaluator.for_data(data).eval(), width=8, heads=2)
    assert model.config.positions == 50
    assert model.project["image"].in_channels == 8  # 2 channels x 4 columns, rows are frames
    assert model(data.data).losses.keys() == {"task", "distillation"}
    long = DREAM.for_data(data, model.evaluator, width=8, heads=2, positions=5)
    taller = data.data.replace(features={**data.data.features, "image": torch.randn(6, 2, 7, 4)}, valid={}, observed={})
    with pytest.raises(ValueError, match="at most 5 frames"):
        long(taller)


# --- gradients -------------------------------------------------------------------------------------------------------


def test_gradient_reaches_every_parameter_but_the_evaluator():
    batch = make_batch(n=12, ragged=False, equal=True)
    check_gradients(make_dream(batch, enhance="all"), batch)


@pytest.mark.slow
def test_each_loss_term_does_its_own():
    batch = make_batch(n=12)
    model = make_dream(batch)
    grads = {}
    for term in ("task", "distillation"):
        model.zero_grad()
        model(batch).losses[term].backward()
        grads[term] = {k: p.grad for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "out.weight" in grads["task"]
    assert "out.weight" not in grads["distillation"]  # Eq. 12 is about w alone
    assert "weigh.3.weight" in grads["distillation"]
    before = model(batch).losses["distillation"].item()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        model(batch).losses["distillation"].backward()
        optimiser.step()
    assert model(batch).losses["distillation"].item() < before / 3


def test_masks_only_touch_what_contributes_nothing():
    """A sample with PSS > 0 everywhere goes past the enhancement."""
    batch = make_batch(n=40, ragged=False)
    model = make_dream(batch).eval()
    pss = model.contributions(batch).pss
    whole = (pss > 0).all(-1)
    assert whole.any()
    before = model(batch).logits
    with torch.no_grad():
        for p in model.enhancement.parameters():
            p.add_(1)
    after = model(batch).logits
    torch.testing.assert_close(before[whole], after[whole], rtol=0, atol=1e-12)
    assert (before[~whole] != after[~whole]).any(-1).all()


# --- the evaluator ---------------------------------------------------------------------------------------------------


def test_the_evaluator_stays_frozen_and_in_eval_mode():
    batch = make_batch()
    model = make_dream(batch)
    assert model.training
    assert not any(part.training for part in model.evaluator.modules())
    assert not any(p.requires_grad for p in model.evaluator.parameters())
    model.eval().train()
    assert not model.evaluator.training
    before = copy.deepcopy(model.evaluator.state_dict())
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    sum(model(batch).losses.values()).backward()
    optimiser.step()
    assert all(torch.equal(before[k], v) for k, v in model.evaluator.state_dict().items())


def test_dropout_and_batch_statistics_of_an_evaluator_do_not_matter():
    data = MultimodalDataset(_float(make_batch(n=10)))
    evaluator = GenericBackbone.for_data(data, width=8, dropout=0.5).eval()
    model = make_dream(data.data, evaluator=evaluator)
    assert torch.equal(model.contributions(data.data).pas, model.contributions(data.data).pas)


def _float(batch):
    y = batch.target.float() if batch.target.is_floating_point() else batch.target
    return batch.replace(features={m: x.float() for m, x in batch.features.items()}, target=y)


def test_evaluators_that_do_not_fit():
    batch = make_batch()
    shapes = {m: tuple(x.shape[1:]) for m, x in batch.features.items()}
    good = Toy(shapes, 3).double()
    with pytest.raises(ValueError, match="train mode"):
        make_dream(batch, evaluator=good.train())
    part = good.eval()
    part.encoders["b"].train()
    with pytest.raises(ValueError, match="train mode"):
        make_dream(batch, evaluator=part)
    fewer = Toy({m: shapes[m] for m in "ab"}, 3).eval()
    with pytest.raises(ValueError, match=r"modalities \['a', 'b', 'c'\], got \['a', 'b'\]"):
        make_dream(batch, evaluator=fewer)
    swapped = Toy({m: shapes[m] for m in "bac"}, 3).eval()
    with pytest.raises(ValueError, match="evaluator"):
        make_dream(batch, evaluator=swapped)
    with pytest.raises(ValueError, match=r"pass its \.backbone"):
        make_dream(batch, evaluator=JointTraining(good).eval())
    with pytest.raises(ValueError, match="says its modalities, got Linear"):
        make_dream(batch, evaluator=nn.Linear(1, 1).eval())
    with pytest.raises(ValueError, match=r"evaluator: expected logits \['B', 3\], got \['B', 2\]"):
        make_dream(batch, evaluator=Toy(shapes, 2).double().eval())(batch)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_batches():
    batch = make_batch(ragged=False)
    model = make_dream(batch)
    with pytest.raises(ValueError, match=r"modalities \['a', 'b', 'c'\], got \['a', 'c'\]"):
        model(batch.select(["a", "c"]))
    with pytest.raises(ValueError, match=r"features\['b'\]: expected float samples of shape \(2, 5\)"):
        model(batch.replace(features={**batch.features, "b": batch.features["b"][..., :3]}))
    nan = batch.features["a"].clone()
    nan[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"finite values.*1 samples.*\[2\]"):
        model(batch.replace(features={**batch.features, "a": nan}))
    with pytest.raises(ValueError, match=r"samples \[B\]"):
        model(batch._map(lambda x: x[:, None] if x.ndim else x))


def test_targets_outside_the_scale():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"in \[0, 2\], got values from"):
        make_dream(batch)(batch.replace(target=batch.target + 1))
    with pytest.raises(ValueError, match="classes"):
        make_dream(batch)(batch.replace(target=batch.target.double()))
    labels = make_batch(kind="labels")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        make_dream(labels, "labels")(labels.replace(target=labels.target + 1))
    with pytest.raises(ValueError, match="4 labels"):
        make_dream(labels, "labels")(labels.replace(target=labels.target[:, :3]))
    scores = make_batch(kind="scores")
    far = scores.replace(target=scores.target + 9)
    assert make_dream(scores, "scores")(far).losses
    with pytest.raises(ValueError, match="finite"):
        make_dream(scores, "scores")(scores.replace(target=scores.target * torch.nan))
    with pytest.raises(ValueError, match="float scores"):
        make_dream(scores, "scores")(scores.replace(target=scores.target.long()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"outputs": 0},
        {"heads": 3},
        {"repeats": 0},
        {"positions": 3},
        {"dropout": 1.0},
        {"modality_dropout": 1.0},
        {"lambda_distill": -1.0},
        {"weight_hidden": 0},
        {"feature_shapes": {}},
        {"feature_shapes": {"a": (7,)}},
        {"labels": 2},
        {"regression": True},
        {"enhance": "none"},
    ],
    ids=str,
)
def test_bad_options(wrong):
    given = {"feature_shapes": {"a": (4, 3)}, "outputs": 3, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong)) if "labels" not in wrong else "outputs"):
        DREAMConfig(**given)


def test_unknown_options_and_presets():
    batch = make_batch()
    with pytest.raises(ValueError, match="unknown.*lambda_distil'"):
        make_dream(batch, lambda_distil=1)
    with pytest.raises(ValueError, match=r"preset: expected 'paper' or 'text'"):
        make_dream(batch, preset="released")
    with pytest.raises(ValueError, match="enhance: expected"):
        make_dream(batch, enhance="some")
    assert DREAM.PRESETS["paper"] == {}


# --- scores of a training split, once --------------------------------------------------------------------------------


def test_precomputed_scores_equal_live_ones():
    data = MultimodalDataset(make_batch(n=25))
    live, stored = make_dream(data.data), make_dream(data.data)
    stored.precompute(data, batch_size=7)
    rows = torch.tensor([3, 24, 0, 11])
    batch = data[rows]
    a, b = live(batch), stored(batch)
    assert torch.equal(a.logits, b.logits)
    assert all(torch.equal(a.losses[k], b.losses[k]) for k in a.losses)
    stored.evaluator.forward = stored.evaluator.encode = None  # a training step does not ask it
    assert torch.equal(stored(batch).logits, a.logits)
    with pytest.raises(TypeError):
        stored.eval()(batch)  # in eval mode the scores are live


def test_precomputed_scores_are_checked():
    data = MultimodalDataset(make_batch(n=12))
    model = make_dream(data.data)
    model.precompute(data)
    state = lambda split: type("State", (), {"train": split})
    model.on_epoch_start(state(data))
    model.on_epoch_start(state(data.subset([5, 2, 7])))
    with pytest.raises(ValueError, match="12 training samples are not as they were"):
        model.on_epoch_start(state(data.drop(present=torch.tensor([False, False, False]))))
    one = data.data.features["a"].clone()
    row = int(data.data.valid["a"].sum(-1).argmax())
    one[row, 0, 0] += 1e-3
    with pytest.raises(ValueError, match="1 of 12 training samples are not as they were"):
        model.on_epoch_start(state(MultimodalDataset(data.data.replace(features={**data.data.features, "a": one}))))
    other = MultimodalDataset(data.data.replace(ids=data.ids + 6))
    with pytest.raises(ValueError, match="6 of 12 training samples have no precomputed"):
        model.on_epoch_start(state(other))
    with pytest.raises(ValueError, match="no precomputed"):
        model(other[:])
    with pytest.raises(ValueError, match="expected ids"):
        model(data.data.replace(ids=None))
    with pytest.raises(ValueError, match="some occur twice"):
        model.precompute(MultimodalDataset(data.data.replace(ids=data.ids * 0)))
    with pytest.raises(ValueError, match="modalities"):
        model.precompute(data.select(["a", "b"]))
    with pytest.raises(ValueError, match="target"):
        model.precompute(MultimodalDataset(data.data.replace(target=None)))


# --- in the loop -----------------------------------------------------------------------------------------------------


def _learnable(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    code = torch.eye(3)[y]
    features = {m: torch.randn(n, T, D, generator=g) * 0.5 for m, (T, D) in list(SHAPES.items())[:3]}
    for x in features.values():
        k = min(3, x.shape[-1])
        x[..., :k] += code[:, None, :k] * 2
    return MultimodalDataset.from_arrays(features, y)


# --- modality dropout ------------------------------------------------------------------------------------------------


def _as_dropped(model, batch, kept):
    """The losses of a training step on a batch that lost modalities, its scores computed anew."""
    rate = model.config.modality_dropout
    object.__setattr__(model.config, "modality_dropout", 0.0)
    try:
        table, model.table = model.table, type(model.table)()
        return model(batch.drop(present=kept))
    finally:
        model.table = table
        object.__setattr__(model.config, "modality_dropout", rate)


@pytest.mark.parametrize("kind", ["classes", "labels", "scores"])
@pytest.mark.parametrize("once", [False, True])
def test_dropped_samples_are_scored_as_the_evaluator_would_score_them(kind, once):
    data = MultimodalDataset(make_batch(kind=kind, n=40, seed=3))
    model = make_dream(data.data, kind, modality_dropout=0.5)
    if once:
        model.precompute(data, batch_size=7)
    torch.manual_seed(5)
    kept = kept_modalities(data.present, 0.5)
    assert (kept != data.present).any()
    torch.manual_seed(5)
    found, expected = model(data.data), _as_dropped(model, data.data, kept)
    assert torch.equal(found.logits, expected.logits)
    assert found.losses.keys() == expected.losses.keys()
    assert all(torch.equal(found.losses[k], expected.losses[k]) for k in found.losses)


def test_modality_dropout_asks_the_evaluator_once_a_step_and_never_in_eval_mode():
    batch = make_batch(n=9)
    model, plain = make_dream(batch, modality_dropout=0.5), make_dream(batch)
    calls = []
    model.evaluator.encoders["a"].register_forward_hook(lambda *_: calls.append(1))
    model(batch)
    once = len(calls)
    plain.evaluator.encoders["a"].register_forward_hook(lambda *_: calls.append(1))
    plain(batch)
    assert len(calls) == 2 * once
    assert torch.equal(model.eval()(batch).logits, plain.eval()(batch).logits)
    alone = batch.drop(present=torch.tensor([True, False, False]))
    kept = kept_modalities(alone.present, 0.9)
    assert torch.equal(kept, alone.present)  # what a sample has last, it keeps


def test_modality_dropout_follows_the_seed_and_belongs_to_a_checkpoint(tmp_path):
    data = _learnable(24)
    build = lambda rate: DREAM.for_data(
        data, MLPEvaluator.for_data(data).eval(), width=8, heads=2, dropout=0.0, modality_dropout=rate
    )
    config = TrainConfig(epochs=3, batch_size=8, select="last", device="cpu", seed=4)
    losses = []
    start = build(0.5).state_dict()
    for rate in (0.5, 0.5, 0.0):
        model = build(rate)
        model.load_state_dict(start)
        losses.append([e["train_loss"] for e in fit(model, data, config=config).epochs])
    assert losses[0] == losses[1] != losses[2]
    cut = build(0.5)
    cut.load_state_dict(start)
    fit(cut, data, config=replace(config, epochs=1), checkpoint=tmp_path / "run.ckpt")
    again = build(0.5)
    again.load_state_dict(start)
    found = fit(again, data, config=config, checkpoint=tmp_path / "run.ckpt")
    assert [e["train_loss"] for e in found.epochs] == losses[0]
    with pytest.raises(ValueError, match="modality_dropout"):
        fit(build(0.3), data, config=config, checkpoint=tmp_path / "run.ckpt")


@pytest.mark.slow
def test_fit_save_load_predict(tmp_path):
    plan = MissingPlan("bernoulli", rates=[0.3, 0.3, 0.3], seed=0)
    data = plan.draw(_learnable()).apply(_learnable())
    first = MLPEvaluator.for_data(data, width=16)
    fit(JointTraining(first), data, config=TrainConfig(epochs=15, lr=1e-2, select="last", device="cpu"))
    build = lambda evaluator: DREAM.for_data(data, evaluator, width=16, heads=2, weight_hidden=8, dropout=0.0)
    config = TrainConfig(epochs=12, lr=5e-3, select="last", device="cpu")
    live, stored = build(first.eval()), build(copy.deepcopy(first))
    stored.load_state_dict(live.state_dict())
    stored.precompute(data)
    fit(live, data, config=config)
    history = fit(stored, data, data, config=config)
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]
    assert {"train_task", "train_distillation", "valid_accuracy"} <= set(history.epochs[-1])
    assert (predict(live, data) - predict(stored, data)).abs().max() < 1e-5
    assert (predict(stored, data).argmax(-1) == data.target).double().mean() > 0.8
    save(stored, tmp_path / "dream.pt")
    fresh = build(MLPEvaluator.for_data(data, width=16).eval())
    load(fresh, tmp_path / "dream.pt")
    assert torch.equal(predict(fresh, data), predict(stored, data))
    other = predict(fresh, data, present=[True, False, False])
    assert not torch.equal(other, predict(fresh, data))
    resampled = MissingPlan("bernoulli", rates=[0.3, 0.3, 0.3], seed=1, resample=True)
    with pytest.raises(ValueError, match="resamples"):
        fit(stored, _learnable(), config=config, train_plan=resampled)


def test_for_data_trains_the_evaluator_where_it_is_told_how():
    data, config = _learnable(), TrainConfig(epochs=15, lr=1e-2, device="cpu")
    evaluator = MLPEvaluator.for_data(data, width=16)
    with pytest.raises(ValueError, match="evaluator: expected a trained one in eval mode"):
        DREAM.for_data(data, evaluator, width=8, heads=2)
    with pytest.raises(ValueError, match="pass its .backbone"):
        DREAM.for_data(data, JointTraining(evaluator), data, config, width=8, heads=2)
    model = DREAM.for_data(data, evaluator, data, config, width=8, heads=2)
    assert model.evaluator is evaluator
    assert not any(p.requires_grad for p in evaluator.parameters())
    assert (evaluator(data[:]).argmax(-1) == data.target).double().mean() > 0.8
    same = DREAM.for_data(data, evaluator, width=8, heads=2)  # a trained one stays as it is
    assert same.evaluator is evaluator


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_mixed_precision_does_not_touch_the_scores(precision):
    data = _learnable(12)
    model = DREAM.for_data(data, MLPEvaluator.for_data(data).eval(), width=8, heads=2)
    alone = model.contributions(data.data)
    config = TrainConfig(epochs=1, select="last", mixed_precision=precision, device="cpu")
    fit(model, data, config=config)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.contributions(data.data)
    assert torch.equal(alone.pss, inside.pss)
    assert torch.equal(alone.pas, inside.pas)


def test_every_subset_of_a_self_mm_evaluator_equals_a_forward_on_zeros():
    batch = _float(make_batch(kind="scores", n=6))
    shapes = {m: tuple(x.shape[1:]) for m, x in batch.features.items()}
    net = SelfMMEvaluator(SelfMMEvaluator.Config(shapes, 1)).eval()
    model = make_dream(batch, "scores", evaluator=net)
    predicted = torch.stack([net(batch.drop(present=S)) for S in coalition_masks(3)])[..., 0].detach() >= 0
    torch.testing.assert_close(model.contributions(batch).pss, prediction_shift_score(predicted.long().t()))
