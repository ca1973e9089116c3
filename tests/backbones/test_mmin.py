"""MMIN's nets: the published sizes, the equations written again, and padding that never matters."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from backbones.runs import check_trains
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmlib import MultimodalBatch, MultimodalDataset
from mmlib.backbones import MMINBackbone, MMINConfig
from mmlib.coalitions import coalition_logits, coalition_masks
from mmlib.layers import scoring

SIZES = {
    1: {"language": (7, 5)},
    2: {"audio": (9, 5), "language": (6, 4)},
    3: {"audio": (9, 5), "vision": (4, 6), "language": (7, 3)},
    6: {"audio": (9, 5), "vision": (4, 6), "language": (7, 3), "depth": (2, 4), "pose": (5, 2), "caption": (3, 3)},
}
EVERY = pytest.mark.parametrize("M", [1, 2, 3, 6])


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make_model(M: int, **options) -> MMINBackbone:
    torch.manual_seed(1)
    nets = {"caption": "textcnn"} if M == 6 else None
    return MMINBackbone(MMINConfig({m: d for m, (_, d) in SIZES[M].items()}, nets, width=8, **options)).eval()


def make_batch(M: int, B: int = 7, seed: int = 0, missing: bool = True, shuffled: bool = False) -> MultimodalBatch:
    g = torch.Generator().manual_seed(seed)
    features = {m: torch.randn(B, *shape, generator=g) for m, shape in SIZES[M].items()}
    valid = {}
    for m, (T, _) in SIZES[M].items():
        valid[m] = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
        if shuffled:
            valid[m] = valid[m].gather(1, torch.rand(B, T, generator=g).argsort(1))
    present = torch.rand(B, M, generator=g) < 0.6 if missing else torch.ones(B, M, dtype=torch.bool)
    present[0] = True
    if missing:
        present[-1] = False
    target = torch.randint(0, 4, (B,), generator=g)
    return MultimodalBatch(features, torch.ones_like(present), target, valid).drop(present=present)


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_parameter_counts_of_the_release():
    net = MMINBackbone(MMINConfig(batch_norm=False))
    assert net.modalities == ("audio", "vision", "language")
    assert {m: count(e) for m, e in net.encoders.items()} == {
        "audio": 4 * 128 * (130 + 128 + 2),
        "vision": 4 * 128 * (342 + 128 + 2),
        "language": 1024 * 128 * (3 + 4 + 5) + 3 * 128 + 3 * 128 * 128 + 128,
    }
    assert count(net.encoders["audio"]) == 133_120
    assert count(net.encoders["vision"]) == 241_664
    assert count(net.encoders["language"]) == 1_622_528
    assert net.width == 128
    assert count(net.decoder) == 66_308
    assert count(net.make_decoder(net.width)) == 33_540
    # with MCE's reconstruction module, its position vectors [1, 3, 128] and a head a modality: the whole of MCE
    assert count(net) + 592_640 + 3 * 128 + 3 * 33_540 == 2_757_264


def test_batch_normalisation_adds_its_scales_and_shifts():
    with_norm, without = MMINBackbone(), MMINBackbone(MMINConfig(batch_norm=False))
    assert count(with_norm) - count(without) == 2 * 2 * 128
    kinds = [type(layer).__name__ for layer in with_norm.decoder]
    assert kinds == ["Linear", "ReLU", "RowNorm", "Dropout", "Linear", "ReLU", "RowNorm", "Dropout", "Linear"]
    assert [type(layer).__name__ for layer in without.decoder].count("RowNorm") == 0
    assert with_norm.decoder[3].p == without.decoder[2].p == with_norm.encoders["language"].drop.p == 0.5


# --- the equations, in loops -----------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_lstm(parameters, x):
    """x [T, D] -> the largest hidden state [d], gates in the order i, f, g, o."""
    w, u, b, c = (parameters[f"lstm.{k}_l0"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    d = u.shape[1]
    h, cell = np.zeros(d), np.zeros(d)
    states = []
    for frame in x:
        gates = w @ frame + b + u @ h + c
        i, f, o = sigmoid(gates[:d]), sigmoid(gates[d : 2 * d]), sigmoid(gates[3 * d :])
        cell = f * cell + i * np.tanh(gates[2 * d : 3 * d])
        h = o * np.tanh(cell)
        states.append(h)
    return np.max(states, 0)


def reference_textcnn(parameters, x):
    """x [T, D] -> [d]."""
    if len(x) < 5:
        x = np.concatenate([x, np.zeros((5 - len(x), x.shape[1]))])
    tops = []
    for k, height in enumerate((3, 4, 5)):
        w, b = parameters[f"convs.{k}.weight"], parameters[f"convs.{k}.bias"]  # [d, D, height]
        windows = []
        for start in range(len(x) - height + 1):
            window = b.copy()
            for j in range(height):
                window = window + w[:, :, j] @ x[start + j]
            windows.append(np.maximum(window, 0))
        tops.append(np.max(windows, 0))
    return np.maximum(parameters["out.weight"] @ np.concatenate(tops) + parameters["out.bias"], 0)


@pytest.mark.parametrize("shuffled", [False, True])
@EVERY
def test_encodings_equal_the_loops(M, shuffled):
    model, batch = make_model(M).double(), make_batch(M, shuffled=shuffled)
    batch = batch.replace(features={m: x.double() for m, x in batch.features.items()})
    with torch.no_grad():
        h = model.encode(batch)
    for m, name in enumerate(model.modalities):
        parameters = {k: v.numpy() for k, v in model.encoders[name].state_dict().items()}
        reference = reference_textcnn if model.config.net(name) == "textcnn" else reference_lstm
        for b in range(len(batch)):
            if not batch.present[b, m]:
                assert bool((h[name][b] == 0).all())
                continue
            x = batch.features[name][b][batch.valid[name][b]].numpy()
            np.testing.assert_allclose(h[name][b].numpy(), reference(parameters, x), atol=1e-10)


def test_decoder_equals_the_equations():
    model, z = make_model(3), torch.randn(5, 24)
    for layer in model.decoder:
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    expected = z
    for k in (0, 4):
        norm = model.decoder[k + 2]
        expected = model.decoder[k](expected).clamp_min(0)
        expected = (expected - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(model.decode(z), model.decoder[8](expected))


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10_000),
    st.integers(0, 6),
    st.sampled_from(["behind", "before", "both"]),
    st.sampled_from([0.0, 3.0, torch.nan]),
)
def test_padding_changes_nothing(seed, extra, where, rubbish):
    model, batch = make_model(3), make_batch(3, seed=seed, missing=False)
    features, valid = {}, {}
    for name, x in batch.features.items():
        pad = torch.full((len(batch), extra, x.shape[-1]), rubbish)
        no = torch.zeros(len(batch), extra, dtype=torch.bool)
        before, behind = where in ("before", "both"), where in ("behind", "both")
        x = torch.where(batch.valid[name][..., None], x, rubbish)
        features[name] = torch.cat([pad] * before + [x] + [pad] * behind, 1)
        valid[name] = torch.cat([no] * before + [batch.valid[name]] + [no] * behind, 1)
    longer = MultimodalBatch(features, batch.present, batch.target, valid)
    torch.testing.assert_close(model(longer), model(batch), atol=1e-6, rtol=0)
    nn.functional.cross_entropy(model.train()(longer), batch.target).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padded_frames_would_have_won_the_maximum():
    """What the mask is for: the release lets the padding into the maximum, and that changes the encoding."""
    model, batch = make_model(3), make_batch(3, missing=False)
    everything = MultimodalBatch(batch.features, batch.present, batch.target)
    for name, h in model.encode(batch).items():
        assert not torch.allclose(h, model.encode(everything)[name])


@pytest.mark.parametrize("length", range(1, 7))
def test_text_shorter_than_the_filters(length):
    model = make_model(2)
    x = torch.randn(3, length, 4)
    alone = {"audio": torch.zeros(3, 1, 5), "language": x}
    padded = {"audio": torch.zeros(3, 1, 5), "language": nn.functional.pad(x, (0, 0, 0, 9 - length))}
    there = torch.ones(3, 2, dtype=torch.bool)
    valid = {"language": torch.arange(9).expand(3, 9) < length}
    short, long = MultimodalBatch(alone, there), MultimodalBatch(padded, there, valid=valid)
    torch.testing.assert_close(model.encode(short)["language"], model.encode(long)["language"])
    if length < 5:  # five frames of which the last are zeros are the same by definition
        five = MultimodalBatch({**alone, "language": nn.functional.pad(x, (0, 0, 0, 5 - length))}, there)
        torch.testing.assert_close(model.encode(short)["language"], model.encode(five)["language"])


def test_dropped_frames_are_frames_of_zeros():
    model, batch = make_model(3), make_batch(3, missing=False)
    keep = {"audio": torch.rand(7, 9, generator=torch.Generator().manual_seed(3)) < 0.5}
    dropped = batch.drop(observed=keep)
    assert not torch.allclose(model.encode(dropped)["audio"], model.encode(batch)["audio"])
    zeros = batch.replace(features={**batch.features, "audio": dropped.features["audio"]})
    rows = dropped.present[:, 0]
    torch.testing.assert_close(model.encode(dropped)["audio"][rows], model.encode(zeros)["audio"][rows])


# --- rows, modalities, coalitions ------------------------------------------------------------------------------------


@EVERY
def test_rows_are_independent(M):
    model, batch = make_model(M), make_batch(M)
    together = model(batch)
    for b in range(len(batch)):
        torch.testing.assert_close(model(batch[b : b + 1])[0], together[b], atol=1e-6, rtol=0)


@EVERY
def test_modalities_are_independent(M):
    model, batch = make_model(M), make_batch(M, missing=False)
    h = model.encode(batch)
    for name in model.modalities:
        changed = {m: x if m == name else torch.randn_like(x) for m, x in batch.features.items()}
        there = torch.zeros(M, dtype=torch.bool)
        there[batch.index(name)] = True
        other = batch.replace(features=changed).drop(present=there)
        torch.testing.assert_close(model.encode(other)[name], h[name])


@EVERY
def test_absent_rows_encode_to_zeros_whatever_stands_there(M):
    for encode_absent in (False, True):
        model, batch = make_model(M, encode_absent=encode_absent), make_batch(M)
        rubbish = {
            m: torch.where(batch.present[:, k, None, None], x, torch.nan)
            for k, (m, x) in enumerate(batch.features.items())
        }
        dirty = MultimodalBatch(rubbish, batch.present, batch.target, batch.valid)
        torch.testing.assert_close(model(dirty), model(batch))
        h = model.encode(dirty)
        for k, name in enumerate(model.modalities):
            assert bool((h[name][~batch.present[:, k]] == 0).all()) or encode_absent
        nothing = batch.drop(present=torch.zeros_like(batch.present))
        assert torch.isfinite(model(nothing)).all()


@EVERY
def test_rows_without_a_valid_frame(M):
    model, batch = make_model(M), make_batch(M, missing=False)
    valid = {m: v.clone() for m, v in batch.valid.items()}
    for v in valid.values():
        v[2] = False
    masked = MultimodalBatch(batch.features, batch.present, batch.target, valid)
    for h in model.encode(masked).values():
        assert torch.isfinite(h).all()
        assert bool((h[2] == 0).all())
    empty = MultimodalBatch(batch.features, batch.present, valid={m: torch.zeros_like(v) for m, v in valid.items()})
    assert all(bool((h == 0).all()) for h in model.encode(empty).values())
    nn.functional.cross_entropy(model.train()(masked), batch.target).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [False, True])
@EVERY
def test_the_coalition_engine_equals_the_naive_loop(M, batch_norm):
    model, batch = make_model(M, batch_norm=batch_norm).double(), make_batch(M)
    batch = batch.replace(features={m: x.double() for m, x in batch.features.items()})
    masks = coalition_masks(M)
    with scoring(model):
        fast = coalition_logits(model, batch, masks)
        for k, mask in enumerate(masks):
            torch.testing.assert_close(fast[k], model(batch.drop(present=mask)), atol=1e-10, rtol=0)


def test_dialogues_are_encoded_by_utterance():
    model, flat = make_model(3), make_batch(3, B=6)
    shape = lambda x: x.unflatten(0, (2, 3))
    batch = MultimodalBatch(
        {m: shape(x) for m, x in flat.features.items()},
        shape(flat.present),
        valid={m: shape(v) for m, v in flat.valid.items()},
    )
    torch.testing.assert_close(model(batch), shape(model(flat)))
    model.train()
    model.encoders["language"].drop.p = 0.0
    for layer in model.decoder:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    torch.testing.assert_close(copy.deepcopy(model)(batch), shape(model(flat)))  # one mean over all utterances


# --- training --------------------------------------------------------------------------------------------------------


@EVERY
def test_a_gradient_reaches_every_parameter(M):
    model, batch = make_model(M).train(), make_batch(M, B=32)
    nn.functional.cross_entropy(model(batch), batch.target).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert bool((p.grad != 0).any()), name


@pytest.mark.slow
@EVERY
def test_trains(M):
    check_trains(make_model(M, dropout=0.1).train(), make_batch(M, B=16))


def test_one_row_trains_with_the_running_statistics():
    model, batch = make_model(3, dropout=0.0), make_batch(3, missing=False)
    expected = model(batch[:1])
    torch.testing.assert_close(model.train()(batch[:1]), expected)
    norm = model.decoder[2]
    assert int(norm.num_batches_tracked) == 0
    assert model.make_decoder(8)(torch.zeros(0, 8)).shape == (0, 4)
    model(batch)
    assert int(norm.num_batches_tracked) == 1


def test_state_round_trip_and_determinism():
    model, batch = make_model(3), make_batch(3)
    torch.manual_seed(99)
    other = MMINBackbone(model.config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(batch), model(batch))
    torch.manual_seed(99)
    again = MMINBackbone(model.config)
    torch.manual_seed(99)
    same = MMINBackbone(model.config)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), same.parameters(), strict=True))


def test_for_data_reads_widths_and_outputs():
    data = MultimodalDataset.from_arrays(
        {"language": [torch.randn(3, 4), None], "vec": torch.randn(2, 5)}, [0, 2], classes=5
    )
    model = MMINBackbone.for_data(data, width=8, nets={"vec": "textcnn"})
    assert model.config.input_widths == {"language": 4, "vec": 5}
    assert [model.config.net(m) for m in model.modalities] == ["textcnn", "textcnn"]
    assert model(data[:]).shape == (2, 5)
    image = MultimodalDataset.from_arrays({"image": torch.randn(2, 1, 4, 4)}, [0, 1])
    with pytest.raises(
        ValueError, match=r"expected sequences \(T, D\) in every modality, got \{'image': \(1, 4, 4\)\}"
    ):
        MMINBackbone.for_data(image)


def test_every_subset_of_the_modalities():
    widths = MMINConfig().input_widths
    for size in (1, 2, 3):
        for names in itertools.combinations(widths, size):
            net = MMINBackbone(MMINConfig({m: widths[m] for m in names}, batch_norm=False))
            assert net.modalities == names
            assert count(net.decoder) == 33_540 + (size - 1) * 128 * 128


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"input_widths": {}}, "input_widths: expected a dict by names with at least 1"),
        ({"input_widths": {"a": 0}}, r"input_widths\['a'\]: expected an integer of at least 1, got 0"),
        ({"outputs": 0}, "outputs: expected an integer of at least 1"),
        ({"width": 0}, "width: expected an integer of at least 1"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\)"),
        ({"nets": {"langauge": "textcnn"}}, r"nets: unknown modalities \['langauge'\]; known are \['audio', 'vision'"),
        ({"nets": {"audio": "gru"}}, r"nets\['audio'\]: expected None or 'lstm' or 'textcnn', got 'gru'"),
    ],
)
def test_config_errors(options, match):
    with pytest.raises(ValueError, match=match):
        MMINConfig(**options)


def test_input_errors():
    model, batch = make_model(3), make_batch(3)
    with pytest.raises(ValueError, match="expected the modalities"):
        model(batch.select(["vision", "audio", "language"]))
    for bad in (torch.zeros(7, 9, 4), torch.zeros(7, 1, 9, 5), torch.zeros(7, 9, dtype=torch.int64)):
        wrong = MultimodalBatch({**batch.features, "audio": bad}, batch.present, batch.target)
        with pytest.raises(ValueError, match=r"features\['audio'\]: expected samples of shape \(T, 5\), got \("):
            model(wrong)
