"""The evaluators and CubeMLP: printed sizes, what they read, and Self-MM's rule against a NumPy loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmlib import MultimodalBatch, MultimodalDataset
from mmlib.backbones import (
    CorrKDConfig,
    CorrKDEvaluator,
    CubeMLPBackbone,
    CubeMLPConfig,
    EvaluatorConfig,
    MLPEvaluator,
    SelfMMConfig,
    SelfMMEvaluator,
    SelfMMTraining,
    Table3Evaluator,
)
from mmlib.backbones.corrkd import sinusoids
from mmlib.backbones.selfmm import unimodal_labels
from mmlib.baselines import JointTraining
from mmlib.coalitions import coalition_logits, coalition_masks
from mmlib.training import TrainConfig, fit

NETS = [Table3Evaluator, CorrKDEvaluator, SelfMMEvaluator, MLPEvaluator, CubeMLPBackbone]
SHAPES = {"language": (6, 5), "audio": (9, 3), "vision": (1, 4)}


def _data(n=10, target="classes", seed=0, shapes=SHAPES):
    """Sequences with padding; some samples have no frame of a modality."""
    g = torch.Generator().manual_seed(seed)
    features = {m: torch.randn(n, *s, generator=g) for m, s in shapes.items()}
    lengths = {m: torch.randint(0, s[0] + 1, (n,), generator=g) for m, s in shapes.items() if len(s) == 2}
    lengths["language"].clamp_(min=1)
    y = {
        "classes": torch.arange(n) % 3,
        "labels": torch.randint(0, 2, (n, 4), generator=g),
        "scores": torch.randn(n, generator=g),
    }[target]
    return MultimodalDataset.from_arrays(features, y, lengths=lengths, classes=2 if target == "labels" else None)


def _count(module):
    return sum(p.numel() for p in module.parameters())


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audio", "vision", "outputs", "labels", "expected"),
    [(5, 20, 1, 0, 77_762), (74, 35, 1, 0, 93_890), (74, 35, 8, 4, 95_472)],
    ids=["mosi", "mosei", "iemocap"],
)
def test_the_parameters_of_table_3(audio, vision, outputs, labels, expected):
    shapes = {"language": (50, 300), "audio": (50, audio), "vision": (50, vision)}
    net = Table3Evaluator(EvaluatorConfig(shapes, outputs, labels))
    assert _count(net) == expected
    parts = {
        "convolutions": (sum(_count(e.conv) for e in net.encoders.values()), 192 * (300 + audio + vision) + 3 * 64),
        "their norms": (sum(_count(e.norm) for e in net.encoders.values()), 3 * 128),
        "trunk, first": (_count(net.decoder.trunk[0]), 12_352),
        "trunk, norm": (_count(net.decoder.trunk[1]), 128),
        "trunk, second": (_count(net.decoder.trunk[3]), 2_080),
        "head": (_count(net.decoder.out), 33 * outputs),
        "skip": (_count(net.decoder.skip), 193 * outputs),
    }
    for part, (found, wanted) in parts.items():
        assert found == wanted, part
    assert sum(wanted for _, wanted in parts.values()) == expected


def test_corrkd_has_another_slope():
    """120 for each input value, where Table 3 has 192."""
    small = CorrKDEvaluator(CorrKDConfig({"a": (4, 5), "b": (4, 7)}, 1))
    large = CorrKDEvaluator(CorrKDConfig({"a": (4, 6), "b": (4, 7)}, 1))
    assert _count(large) - _count(small) == 120
    assert small.width == 40
    assert small.encoders["a"].layers.layers[0].self_attn.num_heads == 10


def test_self_mm_sizes():
    net = SelfMMEvaluator(SelfMMConfig({"vision": (50, 20), "language": (50, 300), "audio": (50, 5)}, 1))
    assert net.widths == {"vision": 32, "language": 300, "audio": 16}
    assert [m.out_features for m in net.decoder if isinstance(m, torch.nn.Linear)] == [128, 128, 1]
    assert net.config.text_modality == "language"
    assert SelfMMConfig({"left": (2, 2), "right": (2, 2)}, 1).text_modality == "left"
    assert SelfMMConfig({"left": (2, 2), "right": (2, 2)}, 1, text="right").text_modality == "right"


def test_cubemlp_sizes():
    config = CubeMLPConfig({"a": (50, 5), "b": (20, 7), "c": (1, 2)}, 1)
    assert config.sizes == ((50, 3, 128), (50, 3, 128), (10, 3, 32))
    net = CubeMLPBackbone(config)
    kinds = [(m.axis, tuple(m.net[0].weight.shape), isinstance(m.past, torch.nn.Linear)) for m in net.mixing]
    assert kinds == [
        (1, (50, 50), False),
        (2, (3, 3), False),
        (3, (128, 128), False),
        (1, (10, 50), True),
        (2, (3, 3), False),
        (3, (32, 128), True),
    ]
    assert all(m.past.bias is None for m in net.mixing if isinstance(m.past, torch.nn.Linear))
    assert net.decoder.in_features == 32
    assert CubeMLPBackbone(CubeMLPConfig({"a": (4, 5)}, 2, blocks=[[3, 1, 6]], pool="concat")).decoder.in_features == 18


# --- what all of them do ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("target", ["classes", "labels", "scores"])
def test_trains_on_every_kind_of_target(net, target):
    torch.manual_seed(0)
    data = _data(12, target)
    method = JointTraining(net.for_data(data, dropout=0.0))
    history = fit(
        method,
        data,
        config=TrainConfig(epochs=40, lr=1e-2, select="last", device="cpu"),
    )
    assert history.epochs[-1]["train_loss"] < 0.6 * history.epochs[0]["train_loss"]
    expected = {"classes": (12, 3), "labels": (12, 2, 4), "scores": (12, 1)}[target]
    assert method(data.data).logits.shape == expected


@pytest.mark.parametrize("net", NETS)
def test_gradient_reaches_every_parameter(net):
    data = _data(16, shapes={**SHAPES, "vision": (4, 4)})  # an LSTM's state meets no weight in a single frame
    model = net.for_data(data, dropout=0.0)
    JointTraining(model).train()(data.data).losses["task"].backward()
    own = ("first.", "heads.")  # Self-MM's unimodal heads, which its own training uses
    for name, p in model.named_parameters():
        if net is SelfMMEvaluator and name.startswith(own):
            assert p.grad is None
        else:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0 or "in_proj" in name, name


@pytest.mark.parametrize("net", NETS)
def test_knows_nothing_of_what_is_missing(net):
    data = _data()
    model = net.for_data(data).eval()
    some = torch.rand(10, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    dropped = data.data.drop(present=some)
    told = dropped.replace(present=torch.ones_like(some), observed=dict(dropped.valid))
    torch.testing.assert_close(model(dropped), model(told))
    assert not torch.allclose(model(dropped), model(data.data))


@pytest.mark.parametrize("net", NETS)
def test_padding_does_not_matter(net):
    data = _data()
    model = net.for_data(data).eval()
    junk = {m: torch.where(data.data.valid[m][..., None], x, torch.nan) for m, x in data.data.features.items()}
    assert torch.equal(model(data.data.replace(features=junk)), model(data.data))
    if net is CubeMLPBackbone:
        return  # its cube has the padding in it
    longer = {m: torch.nn.functional.pad(x, (0, 0, 0, 3)) for m, x in data.data.features.items()}
    valid = {m: torch.nn.functional.pad(v, (0, 3)) for m, v in data.data.valid.items()}
    wider = MultimodalBatch(longer, data.present, data.target, valid)
    torch.testing.assert_close(model(wider), model(data.data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_the_engine_equals_a_forward_for_each_subset(net):
    data = _data()
    model = net.for_data(data).double().eval()
    batch = data.data.replace(features={m: x.double() for m, x in data.data.features.items()})
    masks = coalition_masks(3)
    with torch.no_grad():
        loop = torch.stack([model(batch.drop(present=S)) for S in masks])
        found = coalition_logits(
            model, batch.replace(present=torch.ones_like(batch.present)), masks, absent="zero_input", use_present=False
        )
    torch.testing.assert_close(found, loop, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_one_sample_and_one_modality(net):
    data = _data()
    model = net.for_data(data).train()
    assert torch.isfinite(model(data[0])).all()
    alone = data.select(["audio"])
    assert net.for_data(alone)(alone.data).shape == (10, 3)


@pytest.mark.parametrize("net", NETS)
def test_images(net):
    g = torch.Generator().manual_seed(0)
    data = MultimodalDataset.from_arrays(
        {"image": torch.randn(5, 2, 6, 4, generator=g), "volume": torch.randn(5, 1, 3, 2, 2, generator=g)},
        torch.arange(5) % 2,
    )
    assert net.for_data(data)(data.data).shape == (5, 2)


@pytest.mark.parametrize("net", NETS)
def test_bad_input(net):
    data = _data()
    model = net.for_data(data)
    with pytest.raises(ValueError, match="modalities"):
        model(data.data.select(["audio", "language"]))
    wrong = data.data.replace(features={**data.data.features, "audio": torch.randn(10, 9, 2)})
    with pytest.raises(ValueError, match=r"features\['audio'\]"):
        model(wrong)
    tokens = MultimodalDataset.from_arrays(
        {"text": torch.ones(3, 4, dtype=torch.int64)}, torch.arange(3), tokens=("text",)
    )
    with pytest.raises(ValueError, match="token ids"):
        net.for_data(tokens)
    with pytest.raises(ValueError, match="at least 1"):
        net.for_data(data, width=0)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (EvaluatorConfig, {"outputs": 0}),
        (EvaluatorConfig, {"outputs": 3, "labels": 2}),
        (EvaluatorConfig, {"dropout": 1.0}),
        (EvaluatorConfig, {"feature_shapes": {}}),
        (CorrKDConfig, {"heads": 7}),
        (CorrKDConfig, {"layers": 0}),
        (SelfMMConfig, {"text": "words"}),
        (CubeMLPConfig, {"outputs": 0}),
        (CubeMLPConfig, {"norm": "between"}),
        (CubeMLPConfig, {"pool": "max"}),
        (CubeMLPConfig, {"encoder": "lstm"}),
        (CubeMLPConfig, {"encoder": "gru", "width": 3}),
        (CubeMLPConfig, {"length": 3}),
        (CubeMLPConfig, {"blocks": ((4, 2),)}),
    ],
)
def test_bad_options(config, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) if len(wrong) == 1 else "outputs|width"):
        config(**{"feature_shapes": {"a": (4, 3)}, "outputs": 3, **wrong})


@pytest.mark.parametrize(
    "options", [{"norm": "after"}, {"pool": "concat"}, {"encoder": "gru"}, {"length": 12}], ids=str
)
def test_cubemlp_options(options):
    data = _data()
    net = CubeMLPBackbone.for_data(data, width=8, blocks=((9, 3, 8), (4, 2, 6)), **options).eval()
    assert net(data.data).shape == (10, 3)
    assert torch.isfinite(net(data[:1])).all()


def test_cubemlp_mixes_axes_as_written():
    torch.manual_seed(0)
    net = CubeMLPBackbone(CubeMLPConfig({"a": (3, 2), "b": (3, 2)}, 2, width=4, blocks=((2, 2, 3),))).double().eval()
    cube = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    x = cube[0].numpy()
    for axis, mixing in enumerate(net.mixing):
        p = {k: v.detach().numpy() for k, v in mixing.state_dict().items()}
        lines = np.moveaxis(x, axis, -1)
        new = np.empty((*lines.shape[:-1], len(p["net.0.weight"])))
        for place in np.ndindex(lines.shape[:-1]):
            line = lines[place]
            normed = (line - line.mean()) / np.sqrt(line.var() + 1e-5) * p["norm.weight"] + p["norm.bias"]
            hidden = p["net.0.weight"] @ normed + p["net.0.bias"]
            gelu = torch.nn.functional.gelu(torch.from_numpy(hidden)).numpy()
            past = p["past.weight"] @ line if "past.weight" in p else line
            new[place] = p["net.3.weight"] @ gelu + p["net.3.bias"] + past
        x = np.moveaxis(new, -1, axis)
    np.testing.assert_allclose(net.mixing(cube)[0].detach(), x, atol=1e-9)


def test_sinusoids():
    found = sinusoids(3, 4).numpy()
    for t in range(3):
        for k in range(2):
            assert found[t, 2 * k] == pytest.approx(np.sin(t / 10_000 ** (2 * k / 4)), abs=1e-6)
            assert found[t, 2 * k + 1] == pytest.approx(np.cos(t / 10_000 ** (2 * k / 4)), abs=1e-6)


def test_lstm_stops_at_the_last_valid_frame():
    net = SelfMMEvaluator(SelfMMConfig(SHAPES, 1)).eval()
    x = torch.randn(2, 9, 3)
    valid = torch.arange(9) < torch.tensor([[4], [9]])
    short = net.encoders["audio"](x[:1, :4], valid[:1, :4])
    torch.testing.assert_close(net.encoders["audio"](x, valid)[:1], short)


# --- Self-MM's pseudo-labels -----------------------------------------------------------------------------------------


def _label(y, f, s, f_centres, s_centres, scale):
    """The rule as the paper has it, for one sample."""

    def delta(x, centres):
        negative, positive = (np.sqrt(((x - c) ** 2).sum()) / np.sqrt(len(x)) for c in centres)
        return (negative - positive) / (positive + 1e-8)

    df, ds = delta(f, f_centres), delta(s, s_centres)
    return float(np.clip(0.5 * y * ds / (df + 1e-8) + 0.5 * (y + ds - df), -scale, scale))


def test_the_rule_against_a_loop():
    rng = np.random.default_rng(0)
    y, f, s = rng.normal(size=20), rng.normal(size=(20, 6)), rng.normal(size=(20, 3))
    fc, sc = rng.normal(size=(2, 6)), rng.normal(size=(2, 3))
    found = unimodal_labels(*(torch.from_numpy(x) for x in (y, f, s, fc, sc)), scale=1.5)
    expected = [_label(y[i], f[i], s[i], fc, sc, 1.5) for i in range(20)]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert (np.abs(expected) == 1.5).any()


def test_a_view_like_the_fused_one_keeps_its_label():
    g = torch.Generator().manual_seed(0)
    x, centres = torch.randn(8, 4, generator=g), torch.randn(2, 4, generator=g)
    y = torch.randn(8, generator=g).clamp(-3, 3)
    torch.testing.assert_close(unimodal_labels(y, x, x, centres, centres), y, atol=1e-5, rtol=1e-5)


def test_self_mm_training_follows_the_rule():
    """Three epochs of whole batches, with labels and centres kept by hand."""
    torch.manual_seed(0)
    data = _data(14, "scores")
    net = SelfMMEvaluator.for_data(data, dropout=0.0)
    method = SelfMMTraining(net, data).train()
    y, names = data.target.numpy(), list(data.modalities)
    own = np.repeat(y[:, None], 3, 1)
    centres = None
    for epoch in (1, 2, 3):
        method.on_epoch_start(type("State", (), {"epoch": epoch}))
        with torch.no_grad():
            for p in net.parameters():  # what an optimiser would do
                p.add_(0.05 * torch.randn_like(p))
            features, said = net.views(net.encode(data.data))
        x = {k: v.numpy().astype(float) for k, v in features.items()}
        losses = method(data.data).losses
        if epoch > 1:
            for m, name in enumerate(names):
                for i in range(14):
                    new = _label(y[i], x[""][i], x[name][i], centres[""], centres[name], 3.0)
                    own[i, m] = (epoch - 1) / (epoch + 1) * own[i, m] + 2 / (epoch + 1) * new
        for m, name in enumerate(names):
            weight = np.tanh(np.abs(own[:, m] - y))
            expected = (weight * np.abs(said[name][:, 0].numpy() - own[:, m])).mean()
            assert losses[f"task_{name}"].item() == pytest.approx(expected, abs=1e-4)
            assert (expected > 0) == (epoch > 1)
        assert losses["task"].item() == pytest.approx(np.abs(said[""][:, 0].numpy() - y).mean(), abs=1e-5)
        labels = {"": y, **{name: own[:, m] for m, name in enumerate(names)}}
        centres = {k: [x[k][labels[k] < 0].mean(0), x[k][labels[k] > 0].mean(0)] for k in x}
        np.testing.assert_allclose(method.labels.numpy(), own, atol=1e-4)


@pytest.mark.slow
def test_self_mm_trains_its_unimodal_heads():
    data = _data(30, "scores", shapes={**SHAPES, "vision": (4, 4)})
    net = SelfMMEvaluator.for_data(data)
    method = SelfMMTraining(net, data)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    history = fit(method, data, data, config=TrainConfig(epochs=4, batch_size=7, lr=1e-2, select="last", device="cpu"))
    assert all(not torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert history.epochs[0]["train_task_audio"] == 0
    assert history.epochs[3]["train_task_audio"] > 0
    assert torch.equal(method(data.data).logits, net(data.data))
    with pytest.raises(ValueError, match="samples of the training split"):
        method.train()(data.data.replace(ids=data.ids + 1))
    with pytest.raises(ValueError, match="expected ids"):
        method(data.data.replace(ids=None))
    with pytest.raises(ValueError, match="scores"):
        SelfMMTraining(net, _data())
