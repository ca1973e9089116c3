"""Backbones: any number of modalities of any shape; what is absent or padding changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from backbones.runs import check_trains
from torch import nn

from mmlib import MultimodalBatch, MultimodalDataset
from mmlib.backbones import AVMNISTBackbone, AVMNISTConfig, Backbone, GenericBackbone, GenericConfig
from mmlib.backbones.base import pretrain
from mmlib.layers import MLP, masked_mean
from mmlib.training import TrainConfig

SHAPES = {
    2: {"sound": (9, 5), "image": (3, 8, 6)},
    3: {"words": (7,), "sound": (11, 4), "vector": (1, 6)},
    6: {"seq": (8, 3), "short": (2, 4), "vector": (1, 5), "image": (1, 5, 4), "volume": (2, 3, 4, 3), "words": (6,)},
}
EVERY = pytest.mark.parametrize("M", [2, 3, 6])


def make_batch(M: int, B: int = 6, seed: int = 0, lead: tuple[int, ...] = (), missing: bool = True) -> MultimodalBatch:
    g = torch.Generator().manual_seed(seed)
    N = (B, *lead)
    features, valid = {}, {}
    for name, shape in SHAPES[M].items():
        if len(shape) == 1:
            features[name] = torch.randint(4, 20, (*N, *shape), generator=g)
        else:
            features[name] = torch.randn(*N, *shape, generator=g)
        if len(shape) == 1 or (len(shape) == 2 and shape[0] > 1):
            valid[name] = torch.arange(shape[0]) < torch.randint(1, shape[0] + 1, (*N, 1), generator=g)
    present = torch.rand(*N, M, generator=g) < 0.7 if missing else torch.ones(*N, M, dtype=torch.bool)
    present[0] = True
    if missing:
        present[-1] = False
    target = torch.randint(0, 4, N, generator=g)
    fill = {"words": 3} if "words" in features else {}
    return MultimodalBatch(features, torch.ones_like(present), target, valid, fill=fill).drop(present=present)


def make_model(M: int, **options) -> GenericBackbone:
    torch.manual_seed(1)
    options.setdefault("width", 8)
    return GenericBackbone(GenericConfig(SHAPES[M], outputs=4, vocabulary=20, **options)).eval()


@EVERY
def test_encode_fuse_decode_and_forward_agree(M):
    model, batch = make_model(M), make_batch(M)
    h = model.encode(batch)
    assert list(h) == list(SHAPES[M])
    assert all(x.shape == (6, 8) for x in h.values())
    logits = model.decode(model.fuse(h, batch.present, batch))
    assert logits.shape == (6, 4)
    torch.testing.assert_close(model(batch), logits)
    assert model.independent_encoders
    assert model.modalities == tuple(SHAPES[M])


@EVERY
def test_one_row_alone_gives_the_same(M):
    model, batch = make_model(M), make_batch(M)
    together = model(batch)
    for b in range(len(batch)):
        torch.testing.assert_close(model(batch[b : b + 1])[0], together[b], atol=1e-5, rtol=0)


@EVERY
def test_dialogues_are_encoded_by_utterance(M):
    model, batch = make_model(M), make_batch(M, B=3, lead=(4,))
    logits = model(batch)
    assert logits.shape == (3, 4, 4)
    flat = MultimodalBatch(
        {name: x.flatten(0, 1) for name, x in batch.features.items()},
        batch.present.flatten(0, 1),
        valid={name: x.flatten(0, 1) for name, x in batch.valid.items()},
        fill=batch.fill,
    )
    torch.testing.assert_close(model(flat), logits.flatten(0, 1), atol=1e-5, rtol=0)


@EVERY
def test_longer_padding_changes_nothing(M):
    model, batch = make_model(M), make_batch(M)
    features, valid = dict(batch.features), dict(batch.valid)
    for name, shape in SHAPES[M].items():
        if len(shape) == 1 or (len(shape) == 2 and shape[0] > 1):
            x = features[name]
            rubbish = torch.full((len(batch), 5, *x.shape[2:]), 7, dtype=x.dtype)
            if x.is_floating_point():
                rubbish = rubbish * torch.nan
            features[name] = torch.cat([x, rubbish], 1)
            valid[name] = torch.cat([valid[name], torch.zeros(len(batch), 5, dtype=torch.bool)], 1)
    longer = MultimodalBatch(features, batch.present, batch.target, valid, fill=batch.fill)
    torch.testing.assert_close(model(longer), model(batch), atol=1e-5, rtol=0)
    nn.functional.cross_entropy(model.train()(longer), batch.target).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@EVERY
def test_absent_rows_encode_to_zeros_whatever_stands_there(M):
    for encode_absent in (False, True):
        model, batch = make_model(M, encode_absent=encode_absent), make_batch(M)
        rubbish = {}
        for m, (name, x) in enumerate(batch.features.items()):
            gone = ~batch.present[:, m].reshape(-1, *[1] * (x.ndim - 1))
            rubbish[name] = torch.where(gone, torch.nan, x) if x.is_floating_point() else x
        dirty = MultimodalBatch(rubbish, batch.present, batch.target, batch.valid, fill=batch.fill)
        torch.testing.assert_close(model(dirty), model(batch))
        if not encode_absent:
            for m, h in enumerate(model.encode(dirty).values()):
                assert bool((h[~batch.present[:, m]] == 0).all())
        nn.functional.cross_entropy(model.train()(dirty), batch.target).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads
        assert all(torch.isfinite(g).all() for g in grads)


@EVERY
def test_fully_masked_rows_encode_to_zeros(M):
    model, batch = make_model(M), make_batch(M, missing=False)
    valid = {name: v.clone() for name, v in batch.valid.items()}
    for v in valid.values():
        v[2] = False
    masked = MultimodalBatch(batch.features, batch.present, batch.target, valid, fill=batch.fill)
    for h in model.encode(masked).values():
        assert torch.isfinite(h).all()
        assert bool((h[2] == 0).all())
    nn.functional.cross_entropy(model.train()(masked), batch.target).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@EVERY
def test_a_modality_absent_in_the_whole_batch(M):
    model, batch = make_model(M), make_batch(M)
    keep = torch.ones(M, dtype=torch.bool)
    keep[0] = False
    dropped = batch.drop(present=keep.expand(len(batch), M))
    h = model.encode(dropped)[next(iter(SHAPES[M]))]
    assert h.shape == (6, 8)
    assert bool((h == 0).all())
    nothing = model(batch.drop(present=torch.zeros_like(batch.present)))
    torch.testing.assert_close(nothing, nothing[:1].expand_as(nothing))


class Normed(Backbone):
    """An encoder with batch statistics and a frozen part."""

    def __init__(self, encode_absent: bool = False):
        super().__init__(encode_absent)
        self.encoders["a"] = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.encoders["b"] = nn.Linear(2, 4)

    def encode_modality(self, name, x, valid):
        return self.encoders[name](x[:, 0])

    def fuse(self, h, present, batch):
        return h["a"] + h["b"]

    def decode(self, z):
        return z


def test_batch_statistics_never_see_placeholders():
    g = torch.Generator().manual_seed(0)
    x = {"a": 5 + torch.randn(8, 1, 3, generator=g), "b": torch.randn(8, 1, 2, generator=g)}
    present = torch.ones(8, 2, dtype=torch.bool)
    present[3:, 0] = False
    batch = MultimodalBatch(x, torch.ones_like(present)).drop(present=present)
    torch.manual_seed(0)
    model = Normed().train()
    alone = copy.deepcopy(model)
    model(batch)
    alone(batch[:3])
    torch.testing.assert_close(model.encoders["a"][1].running_mean, alone.encoders["a"][1].running_mean)
    released = Normed(encode_absent=True).train()
    released.load_state_dict(alone.state_dict())
    before = released.encoders["a"][1].running_mean.clone()
    released(batch)
    assert int(released.encoders["a"][1].num_batches_tracked) == 2
    model.encoders["a"][1].reset_running_stats()
    model(batch)
    assert not torch.allclose(released.encoders["a"][1].running_mean - before, model.encoders["a"][1].running_mean)


def test_probing_an_absent_modality_leaves_modes_and_statistics_alone():
    model = Normed().train()
    model.encoders["b"].eval()  # frozen
    batch = MultimodalBatch(
        {"a": torch.zeros(2, 1, 3), "b": torch.ones(2, 1, 2)}, torch.tensor([[False, True], [False, True]])
    )
    model(batch)
    assert model.training
    assert model.encoders["a"].training
    assert not model.encoders["b"].training
    assert int(model.encoders["a"][1].num_batches_tracked) == 0


@EVERY
def test_double_precision_and_state_round_trip(M):
    model, batch = make_model(M), make_batch(M)
    double = copy.deepcopy(model).double()
    wide = batch.replace(
        features={name: x.double() if x.is_floating_point() else x for name, x in batch.features.items()}
    )
    assert double(wide).dtype == torch.float64
    torch.testing.assert_close(double(wide).float(), model(batch), atol=1e-4, rtol=0)
    torch.manual_seed(99)
    other = GenericBackbone(model.config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(batch), model(batch))


@pytest.mark.slow
@EVERY
def test_trains(M):
    check_trains(make_model(M).train(), make_batch(M, B=16))


def test_for_data_reads_shapes_and_outputs():
    data = MultimodalDataset.from_arrays(
        {"seq": [[[1.0, 2.0]] * 3, None], "vec": torch.randn(2, 4)}, [0, 2], classes=5
    )  # fmt: skip
    model = GenericBackbone.for_data(data, width=8)
    assert model.config.feature_shapes == {"seq": (3, 2), "vec": (1, 4)}
    assert model(data[:]).shape == (2, 5)


def test_config_errors():
    good = {"a": (3, 2)}
    for bad in (
        {"feature_shapes": {}, "outputs": 2},
        {"feature_shapes": good, "outputs": 0},
        {"feature_shapes": good, "outputs": 2, "width": 0},
        {"feature_shapes": good, "outputs": 2, "vocabulary": 0},
        {"feature_shapes": good, "outputs": 2, "dropout": 1.0},
    ):
        with pytest.raises(ValueError, match=":"):
            GenericConfig(**bad)
    with pytest.raises(ValueError, match="feature_shapes\\['a'\\]"):
        GenericBackbone(GenericConfig({"a": (1, 2, 3, 4, 5)}, 2))
    for modalities in ((), ("video",), ("image", "image")):
        with pytest.raises(ValueError, match="modalities"):
            AVMNISTConfig(modalities=modalities)


def test_input_errors():
    model, batch = make_model(2), make_batch(2)
    with pytest.raises(ValueError, match="expected the modalities"):
        model(batch.select(["image", "sound"]))
    with pytest.raises(ValueError, match="features\\['sound'\\]: expected samples of shape"):
        model(batch.replace(features={**batch.features, "sound": torch.zeros(6, 9, 4)}))
    net = AVMNISTBackbone()
    wrong = MultimodalBatch(
        {"image": torch.zeros(1, 1, 20, 28), "audio": torch.zeros(1, 1, 20, 20)}, torch.ones(1, 2, dtype=torch.bool)
    )
    with pytest.raises(ValueError, match="features\\['image'\\]"):
        net(wrong)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_avmnist_parameter_counts():
    net = AVMNISTBackbone(AVMNISTConfig(released_heads=True))
    image, audio = net.encoders["image"], net.encoders["audio"]
    assert count(image.conv) + count(image.head) == 6_872
    assert count(image.align) == 51_520
    assert count(audio) == 67_254
    assert count(net.decoder) == 41_674
    assert count(net) == 6_872 + 51_520 + 67_254 + 41_674
    own = AVMNISTBackbone()
    assert count(net) - count(own) == (160 * 32 + 32 + 330) + (320 * 160 + 160 + 160 * 32 + 32 + 330)
    assert count(AVMNISTBackbone(AVMNISTConfig(modalities=("audio",))).decoder) == 320 * 64 + 64 + 650


def test_avmnist_runs_with_parts_missing():
    torch.manual_seed(0)
    net = AVMNISTBackbone().eval()
    present = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    batch = MultimodalBatch(
        {"image": torch.randn(4, 1, 28, 28), "audio": torch.randn(4, 1, 20, 20)}, torch.ones_like(present)
    )
    logits = net(batch.drop(present=present))
    assert logits.shape == (4, 10)
    assert torch.isfinite(logits).all()
    h = net.encode(batch.drop(present=present))
    assert h["image"].shape == h["audio"].shape == (4, 320)
    assert bool((h["audio"][1] == 0).all())
    net.train()(batch[:1].drop(present=torch.tensor([[True, False]])))  # a batch of one
    assert int(net.encoders["audio"].conv[1].num_batches_tracked) == 0


def test_layers():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [torch.nan, torch.nan]]])
    assert masked_mean(x, torch.tensor([[True, True, False]])).tolist() == [[2.0, 3.0]]
    assert masked_mean(x, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0.0, 0.0]]
    assert [type(layer).__name__ for layer in MLP([2, 3, 4], 0.5)] == ["Linear", "ReLU", "Dropout", "Linear"]


def _toy(n: int = 40, seed: int = 0, shift: float = 1.0) -> MultimodalDataset:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    return MultimodalDataset.from_arrays({"a": torch.randn(n, 4, generator=g) + shift * y[:, None]}, y, classes=3)


def _net(data: MultimodalDataset, dropout: float = 0.0) -> GenericBackbone:
    torch.manual_seed(1)
    return GenericBackbone.for_data(data, width=8, dropout=dropout)


def test_pretraining_is_adam_on_the_task_loss():
    data = _toy()
    config = TrainConfig(steps=5, batch_size=8, accumulation=2, lr=0.01, weight_decay=0.1, clip=0.5, device="cpu")
    ours, by_hand = _net(data), _net(data)
    pretrain(ours, data, None, config)
    assert not any(part.training for part in ours.modules())
    optimizer, order = torch.optim.Adam(by_hand.parameters(), 0.01, weight_decay=0.1), torch.Generator().manual_seed(0)
    for rows in [*torch.randperm(40, generator=order).split(16), *torch.randperm(40, generator=order).split(16)][:5]:
        loss = nn.functional.cross_entropy(by_hand(data[rows]), data.target[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
    for a, b in zip(ours.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_pretraining_keeps_the_epoch_with_the_smallest_loss_on_validation():
    train, valid = _toy(), _toy(seed=1, shift=0.3)  # on which the loss rises again
    loss = lambda net: nn.functional.cross_entropy(net(valid[:]), valid.target).item()
    losses = []
    for epochs in range(1, 9):
        net = _net(train, dropout=0.3)
        pretrain(net, train, valid, TrainConfig(epochs=epochs, lr=0.03, select="last", device="cpu"))
        losses.append(loss(net))
    assert min(losses) < losses[-1]
    net = _net(train, dropout=0.3)
    pretrain(net, train, valid, TrainConfig(epochs=8, lr=0.03, device="cpu"))
    assert loss(net) == pytest.approx(min(losses), abs=1e-6)


def test_pretraining_leaves_the_callers_random_state_and_has_the_loops_defaults():
    before = torch.get_rng_state()
    first, second = _net(_toy(), 0.5), _net(_toy(), 0.5)
    torch.set_rng_state(before)
    pretrain(first, _toy(), None, TrainConfig(device="cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    pretrain(second, _toy())
    if not torch.cuda.is_available():
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        (TrainConfig(schedule="cosine"), ValueError, "config: expected .* got schedule='cosine'"),
        (TrainConfig(optimizer="sgd"), ValueError, "config: expected .* got optimizer='sgd'"),
        ({"epochs": 2}, TypeError, "config: expected None or how to train, such as a TrainConfig"),
    ],
)
def test_pretraining_refuses_what_it_cannot_do(config, error, said):
    with pytest.raises(error, match=said):
        pretrain(_net(_toy()), _toy(), None, config)


def test_pretraining_needs_a_target_and_a_finite_loss():
    net = _net(_toy())
    unlabelled = MultimodalDataset(_toy().data.replace(target=None), _toy().info)
    with pytest.raises(ValueError, match="train, valid: expected splits with a target"):
        pretrain(net, unlabelled)
    with torch.no_grad():
        next(net.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="a lower lr may help"):
        pretrain(net, _toy())
