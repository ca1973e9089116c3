"""Other interpretations of DEAR against the loops of `dear_loop`."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from mmlib import DEAR
from mmlib.methods.dear import Compared
from mmlib.methods.released.dear import OtherDEAR
from tests.methods.dear_loop import SHAPES, compare, make, make_batch

OPTIONS = [
    {"stream_input": "encoded"},
    {"space": "raw"},
    {"alignment": "mse"},
    {"alignment": "mse", "space": "raw"},
    {"alignment": "mse", "sure": False, "streams": "single"},
    {"samples": "subsampled", "token_samples": 10**6},
    {"joint_sum": "literal"},
    {"norm": "layer"},
    {"tau": 2.0, "learn_tau": True},
    {"query": "vision", "k_scale": "logbias"},
    {"residual": True},
    {"fusion": "self"},
    {"fusion": "gated"},
    {"main": "l1"},
    {"aux": "all"},
    {"aux": "all", "streams": "robust"},
    {"error": "sum"},
    {"error_scale": "variance"},
    {"preset": "table8"},
    {"encoder": "tokens", "query": "audio"},
    {"encoder": "tokens", "normed": "all", "text_layers": 0},
    {"normed": "all"},
    {"normed": "none"},
    {"hdcr": "joint"},
    {"hdcr": "joint", "space": "raw"},
    {"hdcr": "joint", "preset": "table8"},
    {"error": "mean"},
    {"error": "mean", "error_scale": "variance"},
    {"detach_descriptors": True},
]


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_forward_losses_and_diagnosis_against_the_loop(options, natural):
    compare(natural, **options)


def test_a_scaled_key_is_flat_attention_and_a_bias_is_none():
    """Eq. 9 with w = 0 for one modality: its keys score 0, they are not switched off."""
    batch = make_batch(drop=False)
    h = {m: torch.randn(6, T, 6, dtype=torch.float64) * 5 for m, (T, _) in list(SHAPES.items())[:3]}
    valid = {m: torch.ones(x.shape[:2], dtype=torch.bool) for m, x in h.items()}
    w = {"language": torch.zeros(6).double(), "audio": torch.zeros(6).double(), "vision": torch.ones(6).double()}
    printed, biased = make(batch).fusion, make(batch, k_scale="logbias").fusion
    alone = torch.softmax(
        biased.W_Q(h["language"]) @ biased.W_K(h["vision"]).transpose(1, 2) / math.sqrt(6), -1
    ) @ biased.W_V(h["vision"])
    torch.testing.assert_close(biased(h, valid, w), alone)
    assert not torch.allclose(printed(h, valid, w), alone)


def test_subsampled_tokens():
    batch = make_batch(n=12)
    model = make(batch, samples="subsampled", token_samples=8)
    torch.manual_seed(0)
    a = model(batch).losses["joint"]
    torch.manual_seed(0)
    assert model(batch).losses["joint"] == a
    assert model(batch).losses["joint"] != a
    assert a > 0


def test_running_variance_scales_the_diagnosis():
    batch = make_batch()
    plain, scaled = make(batch), make(batch, error_scale="variance")
    scaled(batch)
    assert (scaled.variance != 1).all()
    torch.testing.assert_close(scaled.diagnose(batch).error, plain.diagnose(batch).error / scaled.variance)
    before = scaled.variance.clone()
    none = batch.complete.replace(present=torch.zeros(6, 3, dtype=torch.bool), observed={})
    scaled(batch.replace(complete=none))
    torch.testing.assert_close(scaled.variance, before)  # nothing seen, nothing learnt


def test_the_error_teaches_the_reconstruction_too():
    batch = make_batch()

    def gradient(**options):
        model = make(batch, **options)
        model(batch).losses["calibration"].backward()
        return dict(model.named_parameters())["hdcr.audio.layers.1.out.weight"].grad

    assert gradient() is None
    assert gradient(error_grad=True).any()


@pytest.mark.parametrize(("error", "expected"), [("token_norm", 5.0), ("mean", 2.5), ("sum", 10.0)])
def test_three_sizes_of_an_error_by_hand(error, expected):
    """Two frames of two features, apart by (1, 2) and (2, 1), beside one that does not count: 5, 5 / 2 and 5 + 5."""
    model = make(make_batch(M=2), error=error)
    x = torch.tensor([[[1.0, 2.0], [2.0, 1.0], [7.0, 7.0]]])
    frames, rows = torch.tensor([[True, True, False]]), torch.ones(1, 2, dtype=torch.bool)
    both = Compared(*({m: y for m in model.modalities} for y in (x, torch.zeros_like(x), frames)), rows)
    assert model.error(both, both).tolist() == [[expected, expected]]


@pytest.mark.parametrize("detached", [False, True])
def test_a_detached_descriptor_teaches_the_estimator_alone(detached):
    batch = make_batch()
    model = make(batch, detach_descriptors=detached)
    model(batch).losses["calibration"].backward()
    assert model.difficulty[0].weight.grad.any()
    touched = [p.grad is not None and bool(p.grad.any()) for p in model.encoder.parameters()]
    assert any(touched) != detached


def test_one_transformer_lets_the_modalities_repair_each_other():
    batch = make_batch(drop=False)
    other = batch.replace(features={**batch.features, "audio": batch.features["audio"] + 1})
    for hdcr, apart in (("each", False), ("joint", True)):
        model = make(batch, hdcr=hdcr, train=False, normed="none")
        before, after = (model.reconstruct(model.encode(b))[0]["vision"] for b in (batch, other))
        assert torch.equal(before, after) != apart


def test_modality_dropout_is_that_of_joint_training_and_keeps_the_originals():
    batch = make_batch(n=64)
    shown = []
    model = make(batch, modality_dropout=0.5)
    model.encode = lambda b, encode=model.encode: (shown.append(b), encode(b))[1]
    torch.manual_seed(1)
    model(batch)
    masked, whole = shown[0], shown[1]
    torch.manual_seed(1)
    keep = batch.present & (torch.rand(64, 3) >= 0.5)
    expected = torch.where(keep.any(-1, keepdim=True), keep, batch.present)
    assert torch.equal(masked.present, expected)
    assert whole is batch.complete
    shown.clear()
    model.eval()(batch)
    assert torch.equal(shown[0].present, batch.present)
    unbroken = make_batch(drop=False)
    assert make(unbroken, modality_dropout=0.5)(unbroken).losses["unimodal"] > 0  # X is what it was before


def test_options_choose_the_class():
    """`DEAR` takes every option; what its own file has stays in its own file."""
    shapes = {"a": (2, 3), "b": (1, 2)}
    for options in ({}, {"alignment": "sinkhorn", "sure": False, "query": "b"}):
        assert type(DEAR(feature_shapes=shapes, **options)) is DEAR
    for options in ({"space": "raw"}, {"alignment": "mse"}, {"preset": "table8"}):
        made = DEAR(feature_shapes=shapes, **options)
        assert type(made) is OtherDEAR
        assert type(copy.deepcopy(made)) is OtherDEAR


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "raw", "encoder": "tokens"}, "space: 'raw' features have a frame each"),
        ({"modality_dropout": 1.0}, "modality_dropout: expected"),
        ({"text_layers": -1}, "text_layers: expected"),
        ({"space": "raw", "samples": "subsampled"}, "samples: expected 'mean'"),
        *(
            ({name: "wild"}, f"{name}: expected ")
            for name in (
                "encoder", "space", "alignment", "samples", "joint_sum", "norm", "stream_input", "fusion", "k_scale",
                "main", "aux", "error", "error_scale", "hdcr", "normed",
            )
        ),
    ],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DEAR(**{"feature_shapes": {"a": (2, 3), "b": (1, 2)}, **options})
