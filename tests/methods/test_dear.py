"""DEAR against its equations, written as loops in `dear_loop`."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmlib import DEAR
from mmlib.batch import MultimodalBatch, MultimodalDataset
from mmlib.layers import TransformerLayer
from mmlib.losses import mmd
from mmlib.methods.dear import DEARConfig, SynergisticAttention, reliability_weights, weight_entropy
from mmlib.metrics import msa_scores
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, load, predict, random_state, save
from tests.methods.dear_loop import SMALL, Loop, compare, make, make_batch

LAMBDAS = {"lambda1": 0.3, "lambda2": 0.7, "alpha": 0.8, "beta": 0.3}
PRESETS = ("paper", "table8")
OPTIONS = [
    {},
    {"alignment": "sinkhorn"},
    {"tau": 0.5},
    {"query": "audio"},
    {"streams": "robust"},
    {"streams": "synergistic"},
    {"streams": "single"},
    {"sure": False},
    {"sure": False, "streams": "single"},
    {"layers": 1},
]


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default")
def test_forward_losses_and_diagnosis_against_the_loop(options, natural):
    compare(natural, **options)


@pytest.mark.parametrize("M", [2, 4])
@pytest.mark.parametrize("classes", [0, 3])
def test_other_numbers_of_modalities_and_classes(M, classes):
    batch = make_batch(M=M, classes=classes)
    model = make(batch)
    out, ref = model(batch), Loop(model, batch)
    assert out.logits.shape == (6, 3 if classes else 1)
    np.testing.assert_allclose(out.logits.detach(), ref.out["y"], rtol=1e-7, atol=1e-9)
    for name, value in ref.losses.items():
        assert out.losses[name].item() == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_one_value_frames_are_not_normalised_away():
    batch = make_batch(shapes={"a": (3, 1), "b": (2, 4)}, M=2)
    model = make(batch)
    np.testing.assert_allclose(model(batch).logits.detach(), Loop(model, batch).out["y"], rtol=1e-7, atol=1e-9)
    assert len(set(model.diagnose(batch).weights[:, 0].tolist())) == len(batch)
    assert model.query == "a"  # no text: the first


def test_the_text_goes_without_the_norm_of_equation_5():
    model = make(make_batch())
    kinds = {m: type(model.encoder[m].norm) for m in model.modalities}
    assert kinds == {"language": nn.Identity, "audio": nn.LayerNorm, "vision": nn.LayerNorm}


@pytest.mark.parametrize("frames", [1, 3])
def test_the_synergistic_stream_has_no_values_of_the_text(frames):
    """Eq. 9: the text asks, the others answer. With one key all attention is on it, so noise for text changes nothing.

    As on CMU-MOSI here, where audio has one frame: H_syn is that frame's value, whatever the text says.
    """
    g = torch.Generator().manual_seed(0)
    draw = lambda T: torch.randn(5, T, 6, generator=g, dtype=torch.float64)
    h = {"language": draw(4), "audio": draw(frames)}
    valid = {m: torch.ones(x.shape[:2], dtype=torch.bool) for m, x in h.items()}
    pair = SynergisticAttention("language", ("language", "audio"), 6).double()
    w = {m: torch.rand(5, generator=g, dtype=torch.float64) for m in h}
    before, after = pair(h, valid, w), pair({**h, "language": draw(4)}, valid, w)
    change = (before - after).abs().max().item()
    assert (change == 0) == (frames == 1)
    if frames == 1:
        value = (w["audio"][:, None, None] * pair.W_V(h["audio"])).expand_as(before)
        torch.testing.assert_close(before, value, rtol=0, atol=0)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_weights_and_entropy_by_hand():
    w = reliability_weights(torch.tensor([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(w, [0.6652, 0.2447, 0.0900], atol=5e-5)
    assert weight_entropy(w).item() == pytest.approx(0.8324, abs=5e-5)
    assert weight_entropy(torch.full((3,), 1 / 3)).item() == pytest.approx(1.0986, abs=5e-5)
    assert weight_entropy(torch.tensor([1.0, 0, 0])).item() == 0


@pytest.mark.slow
def test_a_weight_that_underflows_leaves_finite_gradients() -> None:
    d = torch.tensor([[0.5, 400.0, 1.0], [300.0, 0.0, 900.0]], requires_grad=True)
    w = reliability_weights(d)
    assert bool((w == 0).any())
    weight_entropy(w).sum().backward()
    assert d.grad is not None
    assert bool(torch.isfinite(d.grad).all())
    p = w[0, [0, 2]].detach()  # what is left are two weights: dH/dd = w (log w + H) by hand
    slope = p * (p.log() - (p * p.log()).sum())
    torch.testing.assert_close(d.grad[0], torch.tensor([slope[0], 0, slope[1]]))
    assert d.grad[1].tolist() == [0, 0, 0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 10), min_size=2, max_size=6), st.floats(0.5, 20), st.integers(0, 5), st.floats(0.01, 10))
def test_weights_fall_in_difficulty(d, tau, place, more):
    before = torch.tensor(d, dtype=torch.float64)
    after = before.clone()
    after[place % len(d)] += more
    a, b = reliability_weights(before, tau), reliability_weights(after, tau)
    assert a.sum().item() == pytest.approx(1)
    assert b[place % len(d)] < a[place % len(d)]
    others = torch.arange(len(d)) != place % len(d)
    assert (b[others] >= a[others]).all()
    assert a.argmax() == before.argmin() or a.max() == a[before.argmin()]
    assert 0 <= weight_entropy(a) <= math.log(len(d)) + 1e-12


# --- each part counts -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_loss_term_is_there_weighted_and_reaches_parameters():
    batch = make_batch()
    base = make(batch)(batch).losses
    assert list(base) == ["task", "aux", "unimodal", "joint", "calibration"]
    for weight, term in zip(LAMBDAS, ("unimodal", "joint", "aux", "calibration"), strict=True):
        doubled = make(batch, **{weight: 2 * LAMBDAS[weight]})(batch).losses
        for name in base:
            torch.testing.assert_close(doubled[name], base[name] * (2 if name == term else 1))
        assert term not in make(batch, **{weight: 0.0})(batch).losses
    reached = {
        "task": ["encoder", "hdcr", "difficulty", "unimodal", "fusion", "synergistic", "gate"],
        "aux": ["encoder", "hdcr", "unimodal"],
        "unimodal": ["encoder", "hdcr"],
        "joint": ["encoder", "hdcr"],
        "calibration": ["encoder", "difficulty"],
    }
    for term, parts in reached.items():
        model = make(batch)
        model(batch).losses[term].backward()
        got = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert got == set(parts), term


def test_no_gradient_reaches_the_originals():
    batch = make_batch()
    x = batch.complete.features["audio"].clone().requires_grad_()
    complete = batch.complete.replace(features={**batch.complete.features, "audio": x})
    sum(make(batch)(batch.replace(complete=complete)).losses.values()).backward()
    assert x.grad is None


def test_gradcheck_of_the_objective():
    batch = make_batch(n=3, M=2, drop=False)
    model = make(batch, layers=1)
    x = batch.features["audio"].clone().requires_grad_()

    def objective(x):
        return model(batch.replace(features={**batch.features, "audio": x})).losses["task"]

    assert torch.autograd.gradcheck(objective, (x,), eps=1e-6, atol=1e-5)


def test_what_is_missing_by_nature_has_no_part_in_alignment_and_calibration():
    batch = make_batch(natural=True)
    model = make(batch)
    out = model(batch).losses
    complete = batch.complete
    junk = {m: x.clone() for m, x in complete.features.items()}
    for i, m in enumerate(junk):
        junk[m][~complete.present[:, i]] = 1e3
    other = model(batch.replace(complete=complete.replace(features=junk))).losses
    for name, value in out.items():
        torch.testing.assert_close(other[name], value)
    # One sample is no distribution: the term is 0, and said to be.
    alone = complete.present.clone()
    alone[1:, 1] = False
    few = batch.replace(complete=complete.replace(present=alone, observed={}))
    model.skipped.zero_()
    with_audio = model(few).losses
    assert model.skipped.tolist() == [0, 1, 0, 1]
    assert with_audio["joint"] == 0
    assert with_audio["unimodal"] > 0
    nothing = batch.replace(complete=complete.replace(present=torch.zeros_like(alone), observed={}))
    losses = model(nothing).losses
    assert losses["unimodal"] == losses["joint"] == losses["calibration"] == 0
    assert sum(losses.values()).isfinite()


@pytest.mark.slow
def test_skipped_terms_are_in_the_history():
    data = MultimodalDataset(make_batch(n=8, dtype=torch.float32, drop=False))
    present = torch.ones(8, 3, dtype=torch.bool)
    present[:, 2] = False
    present[0, 2] = True
    history = fit(
        make(data.data), data.drop(present), None, TrainConfig(epochs=2, batch_size=4, select="last", device="cpu")
    )
    assert [row["skipped_vision"] for row in history.epochs] == [2, 2]
    assert [row["skipped_joint"] for row in history.epochs] == [2, 2]
    assert "skipped_audio" not in history.epochs[0]


def test_dropout_is_for_training():
    batch = make_batch()
    model = make(batch, dropout=0.5)
    assert not torch.equal(model(batch).logits, model(batch).logits)
    model.eval()
    assert torch.equal(model(batch).logits, model(batch).logits)
    torch.testing.assert_close(model.diagnose(batch).prediction, model(batch).logits)


# --- what it may see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_predictions_need_neither_presence_nor_what_was_dropped(preset):
    batch = make_batch()
    model = make(batch, preset=preset, train=False)
    expected = model(batch).logits
    shuffled = batch.present[torch.randperm(6, generator=torch.Generator().manual_seed(0))].logical_not()
    blind = batch.replace(
        present=shuffled, observed={m: torch.zeros_like(v) for m, v in batch.valid.items()}, complete=None, target=None
    )
    torch.testing.assert_close(model(blind).logits, expected, rtol=0, atol=0)
    assert model(batch).losses == {}
    assert model.diagnose(blind).error is None
    # In training, only the complete samples' own presence is read.
    model.train()
    torch.manual_seed(0)
    a = model(batch).losses
    torch.manual_seed(0)
    b = model(blind.replace(complete=batch.complete, target=batch.target)).losses
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_and_the_company_of_a_sample_change_nothing(preset):
    batch = make_batch()
    model = make(batch, preset=preset, train=False)
    expected = model(batch).logits
    torch.testing.assert_close(torch.cat([model(batch[i]).logits for i in range(6)]), expected)
    junk = {m: torch.where(batch.valid[m][..., None], x, 99.0) for m, x in batch.features.items()}
    torch.testing.assert_close(model(batch.replace(features=junk)).logits, expected)


def test_shorter_sequences_than_it_was_made_for():
    batch = make_batch()
    model = make(batch, train=False)
    shorter = batch.drop().replace(complete=None)
    keep = {m: int(v.sum(1).max()) for m, v in batch.valid.items()}
    cut = MultimodalBatch(
        {m: x[:, : keep[m]] for m, x in shorter.features.items()},
        shorter.present,
        valid={m: v[:, : keep[m]] for m, v in shorter.valid.items()},
    )
    torch.testing.assert_close(model(cut).logits, model(batch).logits)


def test_a_sample_of_nothing_and_images():
    shapes = {"image": (1, 4, 3), "sound": (5, 2)}
    batch = MultimodalBatch(
        {m: torch.randn(3, *s) for m, s in shapes.items()}, torch.ones(3, 2, dtype=torch.bool), torch.randn(3)
    )
    valid = {"image": torch.ones(3, 4, dtype=torch.bool), "sound": torch.zeros(3, 5, dtype=torch.bool)}
    batch = batch.replace(valid=valid, observed={})
    model = make(batch)
    assert all(loss.isfinite() for loss in model(batch).losses.values())
    assert model.eval()(batch).logits.isfinite().all()


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_the_layer_has_lnlns_parameters():
    assert sum(p.numel() for p in TransformerLayer(128, 8, 64).parameters()) == 296_320


@pytest.mark.slow
def test_parameters_with_bert_base():
    """Table 8 says 114 M with BERT; 112 M as printed, 114.0 M with LNLN's encoders. No weights are made."""
    transformers = pytest.importorskip("transformers", reason="BERT's configuration is in transformers")
    shapes = {"language": (50,), "audio": (375, 5), "vision": (500, 20)}
    count = lambda part: sum(p.numel() for p in part.parameters())
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
        assert count(bert) == 109_482_240
        models = {r: DEAR(bert, preset=r, feature_shapes=shapes) for r in PRESETS}
    assert count(models["paper"]) == 111_664_570 - 2 * 768  # the text, BERT's, has no norm of Eq. 5
    assert count(models["table8"]) == 114_043_784
    assert 4.0e6 < count(models["table8"]) - count(bert) < 5.0e6
    parts = {name: count(part) for name, part in models["table8"].named_children()}
    assert parts["encoder"] == 2_004_352 + 593_664  # LNLN's three and two more layers for text
    assert parts["hdcr"] == 1_780_992
    assert parts["difficulty"] == 49_667


# --- text -------------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A text encoder in small: embeddings, and every token sees the mean of the attended ones."""

    def __init__(self, vocabulary=20, width=4, longest=6, says=True):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(0.5)
        if says:
            self.config = SimpleNamespace(vocab_size=vocabulary, hidden_size=width, max_position_embeddings=longest)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        weight = attention_mask[..., None].to(x)
        seen = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return SimpleNamespace(last_hidden_state=self.dropout(x + seen))


def texts(n=6, longest=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (n,), generator=g)  # an empty text is its two ends
    lengths[0] = 2
    ids = torch.randint(5, 20, (n, longest), generator=g)
    valid = torch.arange(longest) < lengths[:, None]
    ids[:, 0] = 2
    ids[torch.arange(n), lengths - 1] = 3
    batch = MultimodalBatch(
        {"language": torch.where(valid, ids, 0), "audio": torch.randn(n, 2, 5, generator=g)},
        torch.ones(n, 2, dtype=torch.bool),
        torch.randn(n, generator=g),
        {"language": valid},
        ids=torch.arange(n),
        fill={"language": 1},
    )
    return MultimodalDataset(batch)


def test_text_is_read_with_unknown_words_in_place_of_dropped_ones():
    data = texts()
    encoder = Reader()
    model = make(data.data, text_encoder=encoder).eval()
    for p in encoder.parameters():
        nn.init.normal_(p)
    masked = data.drop(observed={"language": torch.zeros(6, 6, dtype=torch.bool)}, keep_complete=True).data
    inner = masked.features["language"][:, 1:-1]
    assert (masked.features["language"][:, 0] == 2).all()  # the ends stay
    assert (inner[data.data.valid["language"][:, 2:]] == 1).all()
    seen = []
    encoder.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(masked)
    torch.testing.assert_close(seen[0]["input_ids"], masked.features["language"])
    torch.testing.assert_close(seen[0]["attention_mask"].bool(), data.data.valid["language"])  # unknowns are attended
    # It is the model on the encoder's tokens.
    stored = masked.replace(
        features={
            "language": encoder(masked.features["language"], data.data.valid["language"].long()).last_hidden_state,
            "audio": masked.features["audio"],
        },
        fill={},
        complete=None,
        observed={},
    )
    twin = DEAR(feature_shapes={"language": (6, 4), "audio": (2, 5)}, **SMALL).eval()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("text_encoder")})
    torch.testing.assert_close(twin(stored).logits, model(masked).logits)


def test_text_encoder_is_fine_tuned_or_frozen():
    data = texts()
    masked = data.drop(observed={"language": torch.rand(6, 6) < 0.5}, keep_complete=True).data
    model = make(masked, text_encoder=Reader())
    sum(model(masked).losses.values()).backward()
    assert model.text_encoder.table.weight.grad.any()
    assert model.text_encoder.training
    model = make(masked, text_encoder=Reader(), freeze_text=True)
    assert not model.text_encoder.training
    sum(model(masked).losses.values()).backward()
    assert model.text_encoder.table.weight.grad is None
    assert model.train().training


def test_bad_texts_and_encoders():
    data = texts()
    shapes = {"language": (6,), "audio": (2, 5)}
    with pytest.raises(ValueError, match="text_encoder: expected one for the token ids"):
        DEAR.for_data(data, **SMALL)
    with pytest.raises(ValueError, match="text_encoder: none of"):
        DEAR(Reader(), feature_shapes={"a": (2, 3), "b": (2, 3)})
    with pytest.raises(ValueError, match="expected at most 5 tokens, which the text encoder reads, got 6"):
        DEAR.for_data(data, Reader(longest=5), **SMALL)
    with pytest.raises(ValueError, match=r"expected ids in \[0, 10\), the text encoder's vocabulary"):
        DEAR.for_data(data, Reader(vocabulary=10), **SMALL)
    with pytest.raises(ValueError, match="text_width: the text encoder's config says no hidden_size"):
        DEAR(Reader(says=False), feature_shapes=shapes)
    silent = DEAR(Reader(says=False), feature_shapes=shapes, text_width=4, **SMALL)
    assert silent.eval()(data.data).logits.shape == (6, 1)
    with pytest.raises(ValueError, match="text_encoder: expected tokens .*see text_width"):
        DEAR(Reader(says=False), feature_shapes=shapes, text_width=5, **SMALL)(data.data)
    model = DEAR.for_data(data, Reader(), **SMALL)
    bad = data.data.replace(features={**data.data.features, "language": data.data.features["language"] + 15})
    for part in (model.train(), model.eval()):
        with pytest.raises(ValueError, match=r"expected ids in \[0, 20\)"):
            part(bad)
    with pytest.raises(ValueError, match=r"expected ids in \[0, 20\)"):
        model.train()(data.data.replace(complete=bad))
    with pytest.raises(ValueError, match=r"expected ids in \[0, 20\)"):
        fit(model, MultimodalDataset(bad), None, TrainConfig(epochs=1, select="last", device="cpu"))


# --- in use -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_it_learns_and_comes_back_from_disk(preset, tmp_path):
    g = torch.Generator().manual_seed(0)
    score = torch.randn(96, generator=g)
    ramp = torch.tensor([1.0, 0.0, 0.0])  # beside constants: Eq. 5's normalisation hides what all features share
    noisy = lambda T, D: score[:, None, None] * ramp + ramp.flip(0) + 0.3 * torch.randn(96, T, D, generator=g)
    data = MultimodalDataset.from_arrays({"text": noisy(4, 3), "audio": noisy(2, 3)}, score)
    plan = MissingPlan("lnln", seed=1, resample=True)
    with random_state(0):
        model = DEAR.for_data(data, preset=preset, **{**SMALL, "width": 16, "hidden": 16})
    assert model.query == "text"
    config = TrainConfig(
        epochs=15, batch_size=16, lr=1e-2, device="cpu", optimizer="adamw", schedule="linear-warmup-cosine"
    )
    history = fit(model, data, data, config, train_plan=plan)
    assert {"train_task", "train_aux", "train_unimodal", "train_joint", "train_calibration"} <= set(history.epochs[0])
    assert history.epochs[-1]["valid_mae"] < 0.75 * history.epochs[0]["valid_mae"]
    save(model, tmp_path / "dear.pt")
    with random_state(1):
        again = DEAR.for_data(data, preset=preset, **{**SMALL, "width": 16, "hidden": 16})
    load(again, tmp_path / "dear.pt")
    present = torch.rand(96, 2, generator=g) < 0.5
    torch.testing.assert_close(predict(again, data, present=present), predict(model, data, present=present))


def test_diagnosis_of_a_data_set():
    batch = make_batch(n=7, natural=True)
    model = make(batch, train=False)
    whole, parts = model.diagnose(MultimodalDataset(batch)), model.diagnose(batch, batch_size=2)
    for a, b in zip(whole[:9], parts[:9], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    for m in model.modalities:
        torch.testing.assert_close(whole.original[m], parts.original[m])
        assert whole.original[m].shape == whole.reconstructed[m].shape == (7, 6)
    assert torch.equal(whole.error.isnan(), ~batch.complete.present)
    # The training loss is a distance between just these vectors.
    model.train()
    there = batch.complete.present
    each = sum(
        mmd(whole.original[m][k], whole.reconstructed[m][k]) for m, k in zip(model.modalities, there.T, strict=True)
    )
    torch.testing.assert_close(0.3 * each, model(batch).losses["unimodal"])


@pytest.mark.slow
def test_one_sample_identical_samples_and_a_constant_prediction():
    batch = make_batch(n=1)
    model = make(batch)
    losses = model(batch).losses
    assert losses["unimodal"] == losses["joint"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    same = make_batch(n=1, drop=False)[[0, 0, 0, 0]]
    for alignment in ("mmd", "sinkhorn", "mse"):
        model = make(same, alignment=alignment)
        sum(model(same).losses.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    batch = make_batch()
    model = make(batch, train=False)
    for name, p in model.named_parameters():
        if name.startswith(("unimodal", "synergistic")):
            nn.init.zeros_(p)
    constant = model(batch).logits[:, 0]
    assert constant.unique().numel() == 1
    assert math.isnan(msa_scores(constant.detach().numpy(), batch.target.numpy())["corr"])  # undefined, and said so


def test_nan_is_found():
    batch = make_batch(dtype=torch.float32)
    batch.features["audio"][2, 0] = float("nan")
    assert batch.valid["audio"][2, 0]
    model = make(batch)
    assert model(batch).losses["task"].isnan()
    with pytest.raises(FloatingPointError, match="task"):
        fit(model, MultimodalDataset(batch), None, TrainConfig(epochs=1, select="last", device="cpu"))
    model = make(batch, train=False)
    for look in (model, model.diagnose):
        with pytest.raises(ValueError, match=r"the predictions of 1 samples are NaN or infinite, the first at \[2\]"):
            look(batch)


@pytest.mark.slow
@pytest.mark.parametrize("alignment", ["mmd", "sinkhorn", "mse"])
def test_mixed_precision_and_compilation(alignment):
    batch = make_batch(dtype=torch.float32)
    model = make(batch, alignment=alignment)
    expected = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(batch)
    for name, value in expected.losses.items():
        assert low.losses[name].item() == pytest.approx(value.item(), rel=0.2, abs=0.05), name
    compiled = torch.compile(lambda e: model.reconstruct(e), fullgraph=True, backend="eager")
    encoded = model.encode(batch)
    for m, hidden in compiled(encoded)[0].items():
        torch.testing.assert_close(hidden, model.reconstruct(encoded)[0][m])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_shapes": {"a": (2, 3)}}, "feature_shapes: expected at least two modalities"),
        ({"outputs": 2}, "outputs: expected 1 for regression"),
        ({"query": "touch"}, "query: expected"),
        ({"tau": 0.0}, "tau: expected a number above 0"),
        ({"lambda1": -0.1}, "lambda1: expected a number"),
        ({"beta": float("nan")}, "beta: expected a number"),
        ({"layers": 0}, "layers: expected an integer"),
        ({"dropout": 1.0}, "dropout: expected a number in"),
        ({"preset": "wild"}, "preset: expected \'.* or \'"),
        ({"lambda3": 1.0}, "options: unknown"),
        ({"alignment": "wild"}, "alignment: expected "),
        ({"streams": "wild"}, "streams: expected "),
    ],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DEAR(**{"feature_shapes": {"a": (2, 3), "b": (1, 2)}, **options})


def test_bad_batches():
    batch = make_batch()
    model = make(batch)
    with pytest.raises(ValueError, match="batch: expected the modalities"):
        model(batch.select(["audio", "language"]))
    wide = make_batch(shapes={"language": (4, 3), "audio": (2, 5), "vision": (3, 4)})
    with pytest.raises(ValueError, match=r"features\['vision'\]: expected float samples of shape \(3, 2\)"):
        model(wide)
    long = make_batch(shapes={"language": (9, 3), "audio": (2, 5), "vision": (3, 2)})
    with pytest.raises(ValueError, match=r"features\['language'\]: expected float samples"):
        model(long)
    with pytest.raises(ValueError, match=r"target: expected float scores \[B\]"):
        model(batch.replace(target=torch.zeros(6, dtype=torch.int64)))
    dialogue = MultimodalBatch({m: x[None] for m, x in batch.features.items()}, batch.present[None])
    with pytest.raises(ValueError, match="expected samples"):
        model(dialogue)


def test_configuration_is_frozen_and_reported():
    config = DEARConfig(feature_shapes={"a": (1, 2), "b": (1, 2)})
    assert (config.lambda1, config.lambda2, config.alpha, config.beta, config.layers) == (0.3, 0.7, 0.8, 0.3, 2)
    assert replace(config, tau=2.0).tau == 2.0
    with pytest.raises(AttributeError):
        config.tau = 3.0
