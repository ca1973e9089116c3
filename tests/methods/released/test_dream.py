"""DREAM's other interpretations against the same loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.dream_loop import check_against_loop, check_gradients, make_batch, make_dream
from torch import nn

from mmlib import DREAM, MultimodalDataset
from mmlib.backbones import EvaluatorConfig, MLPEvaluator, Table3Evaluator
from mmlib.coalitions import prediction_accuracy_score, prediction_shift_score
from mmlib.methods.dream import mask_weights
from mmlib.methods.released.dream import (
    OtherDREAM,
    OtherDREAMConfig,
    add_log_weights,
    clipped_distillation_loss,
    permutation_coalitions,
    permutation_scores,
)

OPTIONS = [
    {"preset": "text"},
    {"enhance": "none"},
    {"repeats": 3, "tie_enhance": False},
    {"enhance_order": "sequential"},
    {"mask_mode": "add_log"},
    {"pas_target": "clipped"},
    {"distill_on": "masked"},
    {"mask_mode": "add_log", "masked_fusion": False},
    {"keys": "available"},
    {"keys": "available", "enhance_order": "sequential"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_losses_against_the_loop(options):
    batch = make_batch()
    model = make_dream(batch, **options)
    assert type(model) is OtherDREAM
    check_against_loop(model, batch)


@pytest.mark.parametrize("how", ["sign_gt", "round7"])
def test_how_scores_are_cut(how):
    batch = make_batch(kind="scores", n=9)
    check_against_loop(make_dream(batch, "scores", discretize=how), batch)
    far = batch.replace(target=batch.target + 9)
    if how == "round7":
        with pytest.raises(ValueError, match=r"\[-3.0, 3.0\]"):
            make_dream(batch, "scores", discretize=how)(far)


@pytest.mark.parametrize("options", [{"tie_enhance": False}, {"preset": "text"}, {"concat": "feature"}], ids=str)
def test_gradient_reaches_every_parameter_but_the_evaluator(options):
    batch = make_batch(n=12, ragged=False, equal=True)
    check_gradients(make_dream(batch, enhance="all", **options), batch)


@pytest.mark.parametrize(
    "wrong",
    [
        {"permutations": 0},
        {"discretize": "floor"},
        {"empty": "zero"},
        {"enhance": "some"},
        {"enhance_order": "random"},
        {"concat": "both"},
        {"mask_mode": "none"},
        {"pas_target": "hard"},
        {"distill_on": "both"},
        {"weight_hidden": 0},
    ],
    ids=str,
)
def test_bad_options(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OtherDREAMConfig(**{"feature_shapes": {"a": (4, 3)}, "outputs": 3, **wrong})
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_dream(make_batch(), **wrong)


def test_the_parameters_of_the_text():
    shapes = {"language": (50, 300), "audio": (50, 5), "vision": (50, 20)}
    evaluator = Table3Evaluator(EvaluatorConfig(shapes, 1)).eval()
    count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = DREAM(evaluator, preset="text", feature_shapes=shapes, outputs=1)
    assert count(text) == count(DREAM(evaluator, feature_shapes=shapes, outputs=1)) - 77_315 + 600 * 3 + 3 + 6 * 400


def test_added_logarithms_grow_with_the_score():
    w, pss = torch.ones(3), torch.tensor([1, 0, 0.5])
    torch.testing.assert_close(torch.softmax(add_log_weights(w, pss), -1), torch.tensor([2, 1, 1.5]) / 4.5)
    w, low, high = torch.tensor([-1.0, 0.0]), torch.zeros(2), torch.tensor([1.0, 0.0])
    weight = lambda mask, pss: torch.softmax(mask(w, pss), -1)[0]
    assert weight(add_log_weights, high) > weight(add_log_weights, low)
    assert weight(mask_weights, high) < weight(mask_weights, low)


@pytest.mark.parametrize("options", [{"permutations": 4}, {"empty": "majority"}], ids=str)
def test_precomputed_scores_equal_live_ones(options):
    data = MultimodalDataset(make_batch(n=25))
    live, stored = make_dream(data.data, **options), make_dream(data.data, **options)
    live.observe(data)
    stored.precompute(data, batch_size=7)
    a, b = live(data[:4]), stored(data[:4])
    assert torch.equal(a.logits, b.logits)
    assert all(torch.equal(a.losses[k], b.losses[k]) for k in a.losses)


def test_the_evaluators_encodings_as_input():
    data = MultimodalDataset(_single(make_batch(n=12)))
    net = Table3Evaluator.for_data(data, width=6).eval()
    model = make_dream(data.data, evaluator=net, input="encodings")
    assert model.project["a"].weight.shape == (8, 6, 1)
    x, seen = data.data.features["b"], data.data.valid["b"]
    frames = net.encode_frames("b", torch.where(seen[..., None], x, 0))
    expected = frames @ model.project["b"].weight[:, :, 0].T + model.position[: x.shape[1]]
    torch.testing.assert_close(model._embed(data.data)[0]["b"], expected)
    mean = (frames * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(net.encode(data.data)["b"], torch.where(seen.any(1)[:, None], mean, 0))
    sum(model(data.data).losses.values()).backward()
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match="input: 'encodings' expects an evaluator that encodes frames.*MLPEvaluator"):
        make_dream(data.data, evaluator=MLPEvaluator.for_data(data).eval(), input="encodings")


def _single(batch):
    return batch.replace(features={m: x.float() for m, x in batch.features.items()})


@pytest.mark.parametrize("other", [{"permutations": 2}, {"empty": "majority"}], ids=str)
def test_modality_dropout_needs_the_predictions_of_every_subset(other):
    with pytest.raises(ValueError, match="modality_dropout: expected 0 with permutations or empty='majority'"):
        make_dream(make_batch(), modality_dropout=0.3, **other)


def test_keys_side_by_side_need_equal_lengths():
    batch = make_batch(equal=True)
    check_against_loop(make_dream(batch, concat="feature"), batch)
    uneven = make_batch()
    with pytest.raises(ValueError, match="equal lengths"):
        make_dream(uneven, concat="feature")(uneven)


@pytest.mark.parametrize("kind", ["classes", "labels", "scores"])
def test_the_majority_may_stand_for_the_prediction_from_nothing(kind):
    batch = make_batch(kind=kind, n=9)
    model = make_dream(batch, kind, empty="majority")
    with pytest.raises(ValueError, match="majority"):
        model(batch)
    model.observe(batch)
    y = batch.target.numpy()
    y = (y >= 0).astype(int) if kind == "scores" else y
    columns = y.reshape(len(y), -1).T
    majority = tuple(int(np.bincount(c).argmax()) for c in columns)
    check_against_loop(model, batch, kind, majority=majority)


def test_clipped_pas():
    w = torch.zeros(2, 3)
    pas = torch.tensor([[-1.0, 3.0, 1.0], [-1.0, 0.0, -2.0]])
    expected = (0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25 * 3)) / 2  # the second row is uniform, as w is
    assert clipped_distillation_loss(w, pas).item() == pytest.approx(expected, abs=1e-6)


def test_the_majority_breaks_that():
    """What the data lack is not a dummy any more where the prediction from nothing is another than that from zeros."""
    batch = make_batch(n=30, seed=3)
    model = make_dream(batch, empty="majority")
    model.majority.fill_((int(model.evaluator(batch[:1].drop(present=torch.zeros(3).bool())).argmax()) + 1) % 3)
    assert (model.contributions(batch).pss[~batch.present] > 0).any()


# --- more than four modalities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_all_orders_give_the_exact_scores(M):
    g = torch.Generator().manual_seed(M)
    table = torch.randint(0, 3, (50, 2**M), generator=g)
    y = torch.randint(0, 3, (50,), generator=g)
    orders = torch.tensor(list(itertools.permutations(range(M))))
    masks, path = permutation_coalitions(orders)
    assert len(masks) == 2**M
    codes = (masks.long() << torch.arange(M)).sum(-1)
    found = permutation_scores(table[:, codes], path, orders, y)
    torch.testing.assert_close(found.pss, prediction_shift_score(table))
    torch.testing.assert_close(found.pas, prediction_accuracy_score(table, y))
    assert permutation_scores(table[:, codes], path, orders).pas is None


def test_one_order_by_hand():
    masks, path = permutation_coalitions(torch.tensor([[2, 0, 1]]))  # nothing, c, ac, abc
    assert masks[path[0]].tolist() == [[False] * 3, [False, False, True], [True, False, True], [True] * 3]
    predictions = torch.zeros(4, dtype=torch.int64)
    predictions[path[0]] = torch.tensor([0, 1, 1, 2])
    found = permutation_scores(predictions, path, torch.tensor([[2, 0, 1]]), torch.tensor(1))
    assert found.pss.tolist() == [0, 1, 1]
    assert found.pas.tolist() == [1, -2, 1]  # V along the way: 0, 1, 2, 0


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), M=st.integers(2, 6), K=st.integers(1, 7))
def test_drawn_orders_keep_what_is_exact(seed, M, K):
    g = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 2, (20, 2**M), generator=g)
    lone = seed % M
    without = torch.arange(2**M) & ~(1 << lone)
    table = table[:, without]  # modality `lone` changes nothing
    y = torch.randint(0, 2, (20,), generator=g)
    orders = torch.rand(K, M, generator=g).argsort(-1)
    masks, path = permutation_coalitions(orders)
    assert len(masks) <= min(K * (M - 1) + 2, 2**M)
    codes = (masks.long() << torch.arange(M)).sum(-1)
    found = permutation_scores(table[:, codes], path, orders, y)
    exact = prediction_shift_score(table)
    assert (found.pss[:, lone] == 0).all()
    assert (found.pss[exact == 0] == 0).all()
    torch.testing.assert_close(found.pas.sum(-1), M * (table[:, -1] == y).float(), atol=1e-5, rtol=0)


def test_drawn_orders_are_unbiased():
    g = torch.Generator().manual_seed(0)
    table, y = torch.randint(0, 3, (10, 32), generator=g), torch.randint(0, 3, (10,), generator=g)
    orders = torch.rand(4000, 5, generator=g).argsort(-1)
    masks, path = permutation_coalitions(orders)
    found = permutation_scores(table[:, (masks.long() << torch.arange(5)).sum(-1)], path, orders, y)
    assert (found.pss - prediction_shift_score(table)).abs().max() < 0.04  # 5 standard errors of a half
    assert (found.pas - prediction_accuracy_score(table, y)).abs().max() < 0.2


@pytest.mark.parametrize("kind", ["classes", "labels", "scores"])
def test_a_model_with_drawn_orders(kind):
    batch = make_batch(kind=kind, n=9)
    model = make_dream(batch, kind, permutations=6)
    exact = make_dream(batch, kind)
    again = make_dream(batch, kind, permutations=6)
    assert torch.equal(model.orders, again.orders)
    assert torch.equal(model.contributions(batch).pss, again.contributions(batch).pss)
    model.orders = torch.tensor(list(itertools.permutations(range(3))))
    for a, b in zip(model.contributions(batch), exact.contributions(batch), strict=True):
        torch.testing.assert_close(a, b)
    assert model(batch).losses.keys() == {"task", "distillation"}


@pytest.mark.slow
def test_more_modalities_than_any_table_holds():
    names = [f"m{i}" for i in range(20)]
    g = torch.Generator().manual_seed(0)
    data = MultimodalDataset.from_arrays({m: torch.randn(4, 2, generator=g) for m in names}, torch.arange(4) % 2)
    evaluator = MLPEvaluator.for_data(data, width=4).eval()
    model = DREAM.for_data(data, evaluator, width=4, heads=1, permutations=3, weight_hidden=4)
    assert model(data.data).logits.shape == (4, 2)
    with pytest.raises(ValueError, match="16"):
        DREAM.for_data(data, evaluator, width=4, heads=1).contributions(data.data)


@pytest.mark.parametrize(("R", "M"), [(1, 3), (3, 3), (7, 4), (24, 6), (100, 6)])
def test_scores_from_drawn_orders_are_to_the_bit_those_before_the_shared_engine(R, M):
    """The stored runs were made with a mean over gathered gains; the coalition engine adds them up in place."""
    g = torch.Generator().manual_seed(R)
    orders = torch.rand(R, M, generator=g).argsort(-1)
    predictions, target = torch.randint(0, 4, (50, 2**M), generator=g), torch.randint(0, 4, (50,), generator=g)
    arrived = nn.functional.one_hot(orders, M).cumsum(1)
    codes = nn.functional.pad((arrived << torch.arange(M)).sum(-1), (1, 0))
    along, arrival = predictions[:, codes], orders.argsort(-1).expand(50, -1, -1)
    right = (along == target[:, None, None]) * torch.arange(M + 1)
    pss, pas = (
        (x.float().gather(-1, arrival).mean(-2)) for x in (along[..., 1:] != along[..., :-1], right.diff(dim=-1))
    )
    masks, path = permutation_coalitions(orders)
    found = permutation_scores(predictions[:, (masks.long() << torch.arange(M)).sum(-1)], path, orders, target)
    assert torch.equal(found.pss, pss)
    assert torch.equal(found.pas, pas)
