"""MMGCN, MM-DFN and GCNet: slow versions written from the equations, and padding that never matters."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmlib import MultimodalBatch, MultimodalDataset, data
from mmlib.backbones import (
    GCNetBackbone,
    GCNetConfig,
    MMDFNBackbone,
    MMDFNConfig,
    MMGCNBackbone,
    MMGCNConfig,
)
from mmlib.backbones.dialogue import run_packed
from mmlib.backbones.mmgcn import dialogue_graph, propagate
from mmlib.baselines import JointTraining
from mmlib.coalitions import coalition_logits, coalition_masks, shapley_values, subset_values
from mmlib.layers import scoring
from mmlib.missing import MissingPlan
from mmlib.training import TrainConfig, fit, predict

WIDTHS = {"audio": 5, "language": 7, "vision": 4}
SMALL = {
    "mmgcn": {"width": 8, "hidden": 6},
    "mmdfn": {"width": 8, "hidden": 6, "layers": 3},
    "gcnet": {"width": 4, "hidden": 3},
}
NETS = {
    "mmgcn": (MMGCNBackbone, MMGCNConfig),
    "mmdfn": (MMDFNBackbone, MMDFNConfig),
    "gcnet": (GCNetBackbone, GCNetConfig),
}
EVERY = pytest.mark.parametrize("net", list(NETS))


def make(net, widths=WIDTHS, outputs=4, **options):
    torch.manual_seed(1)
    kind, config = NETS[net]
    return kind(config(input_widths=widths, outputs=outputs, **{**SMALL[net], **options})).double().eval()


def make_batch(lengths=(5, 1, 3), widths=WIDTHS, seed=0, missing=True, speakers=2, outputs=4, extra=0):
    g = torch.Generator().manual_seed(seed)
    B, U = len(lengths), max(lengths) + extra
    real = torch.arange(U) < torch.tensor(lengths)[:, None]
    features = {m: torch.randn(B, U, 1, d, generator=g, dtype=torch.float64) for m, d in widths.items()}
    present = real[..., None] & (torch.rand(B, U, len(widths), generator=g) < (0.6 if missing else 2))
    if missing:
        present[0, 0] = False  # an utterance with every modality missing
    speaker = torch.randint(0, speakers, (B, U), generator=g) * real
    batch = MultimodalBatch(
        features,
        torch.ones_like(present),
        torch.randint(0, outputs, (B, U), generator=g) * real,
        valid={m: real[..., None].clone() for m in widths},
        ids=torch.arange(B),
        extras={"utterance": real, "speaker": speaker},
    )
    return batch.drop(present=present)


# --- the equations, again --------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def recurrent(weights: dict[str, np.ndarray], prefix: str, rows: list[np.ndarray], kind: str) -> list[np.ndarray]:
    """Two layers in two directions over one sequence, step by step."""
    for layer in (0, 1):
        outs = []
        for way in ("", "_reverse"):
            w_x, w_h = weights[f"{prefix}weight_ih_l{layer}{way}"], weights[f"{prefix}weight_hh_l{layer}{way}"]
            b_x, b_h = weights[f"{prefix}bias_ih_l{layer}{way}"], weights[f"{prefix}bias_hh_l{layer}{way}"]
            d = w_h.shape[1]
            h, c, found = np.zeros(d), np.zeros(d), []
            for x in rows if not way else rows[::-1]:
                a, r = w_x @ x + b_x, w_h @ h + b_h
                if kind == "lstm":
                    i, f, g, o = (a + r).reshape(4, d)
                    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                    h = sigmoid(o) * np.tanh(c)
                else:
                    (ar, az, an), (rr, rz, rn) = a.reshape(3, d), r.reshape(3, d)
                    n = np.tanh(an + sigmoid(ar + rr) * rn)
                    z = sigmoid(az + rz)
                    h = (1 - z) * n + z * h
                found.append(h)
            outs.append(found if not way else found[::-1])
        rows = [np.concatenate(pair) for pair in zip(*outs, strict=True)]
    return rows


def numbers(model) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


def utterances(batch, b):
    """Per modality the vectors of dialogue b, its speakers, and which modality is there."""
    n = int(batch.extras["utterance"][b].sum())
    x = {m: [f[b, u, 0].numpy() for u in range(n)] for m, f in batch.features.items()}
    return x, batch.extras["speaker"][b, :n].tolist(), batch.present[b, :n].numpy()


def big_adjacency(nodes: list[list[np.ndarray]], cross_weight=1.0) -> np.ndarray:
    """[M n, M n] of one dialogue, nodes[m][u], edge by edge."""
    M, n = len(nodes), len(nodes[0])
    A = np.zeros((M * n, M * n))

    def similar(x, y):
        lengths = math.sqrt(x @ x) * math.sqrt(y @ y)
        cosine = x @ y / lengths if lengths > 0 else 0.0
        return 1 - math.acos(0.99999 * max(min(cosine, 1.0), -1.0)) / math.pi

    for m in range(M):
        for k in range(M):
            for i in range(n):
                for j in range(n):
                    if m == k:
                        A[m * n + i, k * n + j] = similar(nodes[m][i], nodes[k][j])
                    elif i == j:
                        A[m * n + i, k * n + j] = cross_weight * similar(nodes[m][i], nodes[k][j])
    D = np.diag(A.sum(1) ** -0.5)
    return D @ A @ D


def slow_graph_net(model, batch, b) -> np.ndarray:
    """MMGCN and MM-DFN, [n, K] of one dialogue."""
    w, c, names = numbers(model), model.config, batch.modalities
    x, speakers, there = utterances(batch, b)
    n, M = len(speakers), len(names)
    nodes = []
    for m, name in enumerate(names):
        linear = [w[f"encoders.{name}.linear.weight"] @ row + w[f"encoders.{name}.linear.bias"] for row in x[name]]
        kind = "gru" if isinstance(model, MMDFNBackbone) else "lstm"
        h = recurrent(w, f"encoders.{name}.rnn.", linear, kind) if name == "language" else list(linear)
        if isinstance(model, MMDFNBackbone):
            weight = {"audio": 3.0, "vision": 0.0, "language": 1.0}[name] if c.party is None else c.party.get(name, 0)
            for s in set(speakers) if weight else ():
                places = [u for u in range(n) if speakers[u] == s]
                said = recurrent(w, "party.", [linear[u] for u in places], "gru")
                for u, row in zip(places, said, strict=True):
                    h[u] = h[u] + weight * row
        if not c.encode_absent:
            h = [row if there[u, m] else np.zeros_like(row) for u, row in enumerate(h)]
        if c.embedded is None or name in c.embedded:
            h = [row + w["speaker_embedding.weight"][s] for row, s in zip(h, speakers, strict=True)]
        nodes.append(h)
    A = big_adjacency(nodes, getattr(c, "cross_weight", 1.0))
    X = np.array([row for h in nodes for row in h])
    start = np.maximum(X @ w["graph_net.first.weight"].T + w["graph_net.first.bias"], 0)
    H, memory, cell = start, np.zeros_like(start), np.zeros_like(start)
    for layer in range(c.layers):
        before = H
        if getattr(c, "reasoning", False):
            gates = H @ w["graph_net.memory.weight_ih"].T + w["graph_net.memory.bias_ih"]
            gates = gates + memory @ w["graph_net.memory.weight_hh"].T + w["graph_net.memory.bias_hh"]
            i, f, g, o = np.split(gates, 4, 1)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            memory = H = sigmoid(o) * np.tanh(cell)
        theta = math.log(c.lamda / (layer + 1) + 1)
        g = A @ H
        mixed = np.concatenate([g, start], 1) @ w[f"graph_net.layers.{layer}.weight"].T
        H = np.maximum(theta * mixed + (1 - theta) * ((1 - c.alpha) * g + c.alpha * start), 0)
        if getattr(c, "reasoning", False):
            H = H + before
    R = np.concatenate([X, H], 1)
    z = np.concatenate([R[m * n : (m + 1) * n] for m in range(M)], 1)
    return np.maximum(z, 0) @ w["decoder.2.weight"].T + w["decoder.2.bias"]


def slow_gcnet(model, batch, b) -> np.ndarray:
    """GCNet, [n, K] of one dialogue, edge by edge."""
    w, c, names = numbers(model), model.config, batch.modalities
    x, speakers, there = utterances(batch, b)
    n = len(speakers)
    rows = []
    for u in range(n):
        parts = []
        for m, name in enumerate(names):
            row = x[name][u]
            if c.front is not None:
                row = w[f"encoders.{name}.weight"] @ row + w[f"encoders.{name}.bias"]
                row = row if c.encode_absent or there[u, m] else np.zeros_like(row)
            parts.append(row)
        rows.append(np.concatenate(parts))
    states = recurrent(w, "rnn.", rows, "lstm")
    total = 0
    for branch in ("times", "pairs"):
        at = lambda name, branch=branch: w[f"{branch}.{name}"]

        def heard(i):
            return [j for j in range(n) if (c.past == -1 or j >= i - c.past) and (c.future == -1 or j <= i + c.future)]

        def kind(i, j, branch=branch):
            if branch == "times":
                return 0 if j < i else 1 if j == i else 2
            return c.speakers * speakers[i] + speakers[j]

        out = []
        for i in range(n):
            h = at("relations.root.weight") @ states[i] + at("relations.root.bias")
            for r in range(len(at("relations.weight"))):
                some = [states[j] for j in heard(i) if kind(i, j) == r]
                if some:
                    h = h + np.mean(some, 0) @ at("relations.weight")[r]
            out.append(h)
        again = []
        for i in range(n):
            around = np.sum([out[j] for j in heard(i)], 0)
            again.append(at("neighbours.weight") @ around + at("neighbours.bias") + at("own.weight") @ out[i])
        both = [np.concatenate(pair) for pair in zip(states, again, strict=True)]
        both = recurrent(w, f"{branch}.rnn.", both, "lstm")
        if c.attention:
            looked = []
            for t in both:
                score = np.tanh([(at("query.weight") @ t + at("query.bias")) @ m for m in both])
                share = np.exp(score) / np.exp(score).sum()
                looked.append(sum(s * m for s, m in zip(share, both, strict=True)))
            both = looked
        total = total + np.maximum(np.array(both) @ at("out.weight").T + at("out.bias"), 0)
    return total @ w["decoder.weight"].T + w["decoder.bias"]


VARIANTS = {
    "mmgcn": [
        {},
        {"encode_absent": False},
        {"embedded": ("language",)},
        {"embedded": ()},
        {"layers": 7, "alpha": 0.3, "lamda": 1.2},
    ],
    "mmdfn": [
        {},
        {"encode_absent": False},
        {"reasoning": True},
        {"cross_weight": 0.4},
        {"party": {"vision": 2.0}},
        {"embedded": ("language",), "speakers": 3},
        {"party": {}},
    ],
    "gcnet": [
        {},
        {"attention": True},
        {"past": 1, "future": 3},
        {"past": -1, "future": 0},
        {"past": 0, "future": -1},
        {"front": 6},
        {"front": 6, "encode_absent": False},
        {"speakers": 3},
    ],
}


@pytest.mark.parametrize(("net", "options"), [(net, options) for net in VARIANTS for options in VARIANTS[net]])
@pytest.mark.parametrize("missing", [False, True])
def test_equals_the_slow_version(net, options, missing):
    model, batch = make(net, **options), make_batch((5, 1, 3, 2), missing=missing, speakers=options.get("speakers", 2))
    logits = model(batch).detach()
    slow = slow_gcnet if net == "gcnet" else slow_graph_net
    for b in range(4):
        expected = slow(model, batch, b)
        np.testing.assert_allclose(logits[b, : len(expected)], expected, atol=1e-9, rtol=0)


@pytest.mark.slow
@EVERY
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_equals_the_slow_version_on_any_dialogues(net, seed, lengths):
    model, batch = make(net), make_batch(tuple(lengths), seed=seed)
    slow = slow_gcnet if net == "gcnet" else slow_graph_net
    logits = model(batch).detach()
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(logits[b, :n], slow(model, batch, b), atol=1e-9, rtol=0)


# --- the graph -------------------------------------------------------------------------------------------------------


def dense(graph, n):
    """The blocks of one dialogue as [M n, M n]."""
    same, cross = (part[0].numpy() for part in graph)
    M = len(same)
    A = np.zeros((M * n, M * n))
    for m in range(M):
        A[m * n : (m + 1) * n, m * n : (m + 1) * n] = same[m, :n, :n]
        for k in range(M):
            for u in range(n):
                A[m * n + u, k * n + u] += cross[u, m, k]
    return A


@pytest.mark.parametrize("M", [1, 2, 3, 6])
def test_graph_equals_the_dense_one(M):
    g = torch.Generator().manual_seed(M)
    nodes = torch.randn(1, M, 6, 5, generator=g, dtype=torch.float64)
    real = torch.tensor([[True] * 4 + [False] * 2])
    graph = dialogue_graph(nodes, real, 0.7)
    expected = big_adjacency([[nodes[0, m, u].numpy() for u in range(4)] for m in range(M)], 0.7)
    np.testing.assert_allclose(dense(graph, 4), expected, atol=1e-12)
    h = torch.randn(1, M, 6, 3, generator=g, dtype=torch.float64) * real[:, None, :, None]
    product = expected @ h[0, :, :4].reshape(M * 4, 3).numpy()
    np.testing.assert_allclose(propagate(graph, h)[0, :, :4].reshape(M * 4, 3), product, atol=1e-12)
    assert not graph[0][..., 4:].any()
    assert not graph[0][..., 4:, :].any()
    assert not graph[1][:, 4:].any()


def test_weights_by_hand():
    one = torch.ones(1, 1, 1, 3, dtype=torch.float64)
    same, _ = dialogue_graph(one, torch.ones(1, 1, dtype=torch.bool))
    assert float(same) == pytest.approx(1)  # a node alone, normalised
    assert 1 - math.acos(0.99999) / math.pi == pytest.approx(0.998576, abs=1e-6)
    # two modalities of one utterance at a right angle: weights 0.998576 within, 0.5 between
    nodes = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]], dtype=torch.float64)
    same, cross = dialogue_graph(nodes, torch.ones(1, 1, dtype=torch.bool))
    own = 1 - math.acos(0.99999) / math.pi
    torch.testing.assert_close(same.flatten(), torch.full((2,), own / (own + 0.5), dtype=torch.float64))
    torch.testing.assert_close(cross[0, 0], torch.tensor([[0, 1], [1, 0]]).double() * 0.5 / (own + 0.5))


def test_nodes_of_zeros_are_defined():
    nodes = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    nodes[0, 0, 1] = 1.0
    nodes.requires_grad_()
    real = torch.ones(1, 3, dtype=torch.bool)
    same, cross = dialogue_graph(nodes, real)
    expected = big_adjacency([[nodes[0, m, u].detach().numpy() for u in range(3)] for m in range(2)])
    np.testing.assert_allclose(dense((same.detach(), cross.detach()), 3), expected, atol=1e-12)
    assert same[0, 1, 0, 0].item() == pytest.approx(0.5 / (3 * 0.5 + 0.5))
    (same.sum() + cross.square().sum()).backward()
    assert bool(torch.isfinite(nodes.grad).all())
    assert not nodes.grad[0, 1].any()
    # a model without biases and embeddings meets them wherever something is missing
    model = make("mmgcn", embedded=(), encode_absent=False).train()
    logits = model(make_batch())
    logits.square().mean().backward()
    assert bool(torch.isfinite(logits).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_similarity_has_the_gradient_of_finite_differences():
    nodes = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    real = torch.tensor([[True, True, True], [True, True, False]])
    # off the diagonal, where a node meets itself and the arccosine is steep
    f = lambda x: torch.cat([part.flatten() for part in dialogue_graph(x, real)])
    assert torch.autograd.gradcheck(f, (nodes,), eps=1e-6, atol=1e-4)


def test_packed_nets_see_the_kept_steps_alone():
    torch.manual_seed(0)
    net = nn.GRU(3, 4, 2, batch_first=True, bidirectional=True).double()
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    keep = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1] * 6]).bool()
    h = run_packed(net, x, keep)
    for b in range(4):
        assert not h[b][~keep[b]].any()
        if keep[b].any():
            torch.testing.assert_close(h[b][keep[b]], net(x[b][keep[b]][None])[0][0])


@pytest.mark.parametrize("net", ["mmgcn", "mmdfn"])
def test_padded_nets_as_the_release_has_them_see_the_padding(net):
    """The same net over zeros of the inputs, so that the way back begins there; nothing else of the network changes."""
    options = {"party": {}} if net == "mmdfn" else {}
    packed, batch = make(net, **options), make_batch((5, 1, 3))
    padded = make(net, packed=False, **options)
    padded.load_state_dict(packed.state_dict())
    encoder, real = padded.encoders["language"], batch.extras["utterance"]
    expected = encoder.rnn(encoder.linear(padded.vectors(batch)["language"]))[0]
    ours, alone = (model.encode(batch)["language"] for model in (padded, packed))
    assert torch.equal(ours, torch.where(real[..., None], expected, 0))
    torch.testing.assert_close(ours[0], alone[0], atol=1e-10, rtol=0)  # it fills the batch
    assert (ours[1, 0] - alone[1, 0]).abs().max() > 1e-3
    longer = padded.encode(pad(batch, 4, rubbish=True))["language"]
    assert (longer[0, :5] - ours[0]).abs().max() > 1e-3
    assert torch.equal(padded.encode(batch)["audio"], packed.encode(batch)["audio"])


# --- padding, order, batches -----------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("encode_absent", [True, False])
def test_padding_and_neighbours_change_nothing(net, encode_absent):
    options = {"front": 5} if net == "gcnet" else {}
    model, batch = make(net, encode_absent=encode_absent, **options), make_batch((5, 1, 3))
    together = model(batch)
    for b, n in enumerate((5, 1, 3)):
        alone = make_row(batch, b, n)
        torch.testing.assert_close(model(alone)[0], together[b, :n], atol=1e-10, rtol=0)
        assert alone.shape == (1, n)
    longer = pad(batch, 4, rubbish=True)
    logits = model(longer)
    real = batch.extras["utterance"]
    torch.testing.assert_close(logits[:, :5][real], together[real], atol=1e-10, rtol=0)
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.RNNBase)):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.0)
    real = longer.extras["utterance"]
    nn.functional.cross_entropy(model(longer)[real], longer.target[real]).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(bool(torch.isfinite(g).all()) for g in grads)


def make_row(batch, b, n):
    row = batch[b : b + 1]
    cut = lambda tensors: {k: x[:, :n] for k, x in tensors.items()}
    return MultimodalBatch(
        cut(row.features),
        row.present[:, :n],
        row.target[:, :n],
        cut(row.valid),
        cut(row.observed),
        extras=cut(row.extras),
    )


def pad(batch, more, rubbish):
    """The batch with ``more`` utterances of padding, NaN and speakers from nowhere in them, at the end."""
    grow = lambda x, value: torch.cat([x, x.new_full((x.shape[0], more, *x.shape[2:]), value)], 1)
    return MultimodalBatch(
        {m: grow(x, math.nan if rubbish else 0) for m, x in batch.features.items()},
        grow(batch.present, False),
        grow(batch.target, 0),
        {m: grow(x, False) for m, x in batch.valid.items()},
        {m: grow(x, False) for m, x in batch.observed.items()},
        ids=batch.ids,
        extras={"utterance": grow(batch.extras["utterance"], False), "speaker": grow(batch.extras["speaker"], 77)},
    )


@EVERY
def test_what_stands_at_absent_places_does_not_matter(net):
    model, batch = make(net), make_batch()
    dirty = {
        m: torch.where(batch.present[..., i, None, None], x, torch.nan)
        for i, (m, x) in enumerate(batch.features.items())
    }
    torch.testing.assert_close(model(batch.replace(features=dirty)), model(batch))


@EVERY
def test_dialogues_with_gaps_are_read_past_them(net):
    """Padding in the middle: the utterances around it are neighbours in the recurrent nets."""
    if net == "gcnet":
        pytest.skip("GCNet's window counts places")
    model, batch = make(net), make_batch((3, 3))
    spread = torch.tensor([0, 2, 5])
    wide = pad(batch, 4, rubbish=False)
    put = lambda x: torch.zeros_like(x).index_copy(1, spread, x[:, :3])
    gappy = MultimodalBatch(
        {m: put(x) for m, x in wide.features.items()},
        put(wide.present),
        put(wide.target),
        {m: put(x) for m, x in wide.valid.items()},
        {m: put(x) for m, x in wide.observed.items()},
        extras={k: put(x) for k, x in wide.extras.items()},
    )
    torch.testing.assert_close(model(gappy)[:, spread], model(batch), atol=1e-10, rtol=0)


@EVERY
def test_one_utterance_and_nothing_at_all(net):
    model = make(net)
    batch = make_batch((1, 1))
    empty = batch.drop(present=torch.zeros(3, dtype=torch.bool))
    for b in (batch, empty):
        assert model(b).shape == (2, 1, 4)
        assert bool(torch.isfinite(model(b)).all())
    nobody = batch.replace(extras={**batch.extras, "utterance": torch.zeros(2, 1, dtype=torch.bool)})
    assert bool(torch.isfinite(model(nobody)).all())
    plain = make_batch((3, 3), missing=False)
    one = plain.replace(extras={"speaker": torch.zeros_like(plain.extras["speaker"])})
    torch.testing.assert_close(model(plain.replace(extras={})), model(one))  # everything real, one speaker


@EVERY
def test_frames_are_averaged(net):
    model, batch = make(net), make_batch(missing=False)
    features, valid = {}, {}
    for m, x in batch.features.items():
        up = torch.randn_like(x)
        features[m] = torch.cat([x + up, x - up, torch.full_like(x, torch.nan)], 2)
        v = batch.valid[m]
        valid[m] = torch.cat([v, v, torch.zeros_like(v)], 2)
    longer = MultimodalBatch(features, batch.present, valid=valid, extras=batch.extras)
    torch.testing.assert_close(model(longer), model(batch), atol=1e-10, rtol=0)


class Tally(TorchDispatchMode):
    """The elements of all tensors that are made, and of the largest."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.total += x.numel()
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.slow
@EVERY
def test_memory_is_linear_in_dialogues(net):
    model, counts = make(net).train(), {}
    for B in (4, 8, 16):
        batch = make_batch((20,) * B)
        with Tally() as tally:
            model(batch).sum().backward()
        counts[B] = tally
        # never the (3 U B)^2 of the whole batch's graph
        assert tally.largest <= max(3 * B * 20 * 20, 4 * B * 20 * 20, 3 * B * 20 * 40)
    assert counts[8].total < 2.05 * counts[4].total
    assert counts[16].total < 2.05 * counts[8].total


# --- sizes -----------------------------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def rnn(gates, width, hidden):  # two layers, two directions
    layer = lambda d: 2 * gates * hidden * (d + hidden + 2)
    return layer(width) + layer(2 * hidden)


@pytest.mark.slow
def test_parameter_counts():
    linear = {"audio": 1582 * 200 + 200, "language": 1024 * 200 + 200, "vision": 342 * 200 + 200}
    net = MMGCNBackbone()
    encoders = {**linear, "language": linear["language"] + rnn(4, 200, 100)}
    assert {m: count(e) for m, e in net.encoders.items()} == encoders
    assert encoders["language"] == 205_000 + 2 * 4 * 100 * (200 + 100 + 2) * 2
    graph = 200 * 100 + 100 + 4 * 200 * 100
    assert count(net.graph_net) == graph == 100_100
    assert count(net.decoder) == 900 * 6 + 6
    assert count(net) == sum(encoders.values()) + graph + 2 * 200 + 5406
    assert net.decoder[-1].weight.shape == (6, 900)
    net = MMDFNBackbone()
    gru = rnn(3, 200, 100)
    assert count(net.party) == gru
    assert count(net) == sum(linear.values()) + 2 * gru + 20_100 + 16 * 20_000 + 5406
    memory = MMDFNBackbone(MMDFNConfig(reasoning=True))
    assert count(memory) - count(net) == 4 * 100 * (100 + 100 + 2)
    net = GCNetBackbone()
    branch = lambda relations: (
        400 * 100 + 100 + relations * 400 * 100 + 2 * 100 * 100 + 100 + rnn(4, 500, 500) + 1000 * 500 + 500
    )
    assert count(net) == rnn(4, 2560, 200) + branch(3) + branch(4) + 500 * 6 + 6
    attention = GCNetBackbone(GCNetConfig(attention=True))
    assert count(attention) - count(net) == 2 * (1000 * 1000 + 1000)
    front = GCNetBackbone(GCNetConfig(front=200))
    assert count(front) == count(net) - rnn(4, 2560, 200) + rnn(4, 600, 200) + 2560 * 200 + 600


def test_theta_of_the_first_layer():
    assert math.log(MMGCNConfig().lamda / 1 + 1) == pytest.approx(0.405465, abs=1e-6)


# --- coalitions ------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("encode_absent", [True, False])
@pytest.mark.parametrize("absent", ["zero_feature", "zero_input"])
def test_coalitions_equal_separate_passes(net, encode_absent, absent):
    options = {"front": 5} if net == "gcnet" else {}
    model, batch = make(net, encode_absent=encode_absent, **options), make_batch((4, 1, 3))
    assert model.independent_encoders is (not encode_absent)
    real = batch.extras["utterance"]
    masks = coalition_masks(3)
    for use_present in (True, False):
        with scoring(model):
            logits = coalition_logits(model, batch, masks, absent=absent, use_present=use_present)
            assert logits.shape == (8, 3, 4, 4)
            for S, mask in enumerate(masks):
                dropped = batch.drop(present=mask)
                if absent == "zero_input" and not encode_absent:  # the encodings of blanks, whoever is absent
                    told = dropped.replace(present=torch.ones_like(dropped.present))
                    blank = told.replace(features={m: torch.zeros_like(x) for m, x in told.features.items()})
                    h, empty = model.encode(batch), model.encode(blank)
                    here = dropped.present
                    h = {m: torch.where(here[..., i, None], h[m], empty[m]) for i, m in enumerate(h)}
                    expected = model.decode(model.fuse(h, told.present, told))
                else:
                    expected = model(dropped)
                # with use_present, what is left with nothing of a dialogue shares one prediction on nothing
                some = (batch.present & mask).flatten(1).any(1) | (not use_present)
                keep = real & some[:, None]
                torch.testing.assert_close(logits[S][keep], expected[keep], atol=1e-9, rtol=0)


@EVERY
def test_the_whole_coalition_is_the_forward_pass(net):
    model, batch = make(net), make_batch()
    with scoring(model):
        everything = coalition_logits(model, batch, torch.ones(1, 3, dtype=torch.bool))[0]
        torch.testing.assert_close(everything, model.decode(model.fuse(model.encode(batch), batch.present, batch)))
        torch.testing.assert_close(everything, model(batch))
    phi = shapley_values(subset_values(model, batch))
    assert phi.shape == (3, 5, 3)


def test_gcnets_own_columns_and_states():
    model, batch = make("gcnet"), make_batch(missing=False)
    assert model.input_columns() == {"audio": slice(0, 5), "language": slice(5, 12), "vision": slice(12, 16)}
    assert model.modalities == tuple(WIDTHS)
    assert not len(model.encoders)
    alone = model.unimodal_states(batch)
    for m, (name, z) in enumerate(alone.items()):
        on = torch.arange(3) == m
        dropped = batch.drop(present=on)
        real = batch.extras["utterance"]
        torch.testing.assert_close(z, model.states(model.encode(dropped), dropped.present, real))
        z.sum().backward(retain_graph=True)
        grad = model.rnn.weight_ih_l0.grad
        for other, columns in model.input_columns().items():
            assert bool(grad[:, columns].any()) == (other == name)
        model.zero_grad()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talk():
    return data.load("conversations", sizes=(40, 10, 20), lengths=(1, 8))


@pytest.mark.slow
@EVERY
def test_trains_with_masks_and_beats_guessing(net, talk):
    torch.manual_seed(0)
    sizes = {"gcnet": {"width": 16, "hidden": 8, "dropout": 0.1}, "mmdfn": {"layers": 4}}.get(net, {})
    if net != "gcnet":
        sizes = {"width": 32, "hidden": 16, "dropout": 0.1, **sizes}
    model = JointTraining(NETS[net][0].for_data(talk["train"], **sizes))
    plan = MissingPlan("imbalanced", rates={"audio": 0.5, "language": 0.3, "vision": 0.7}, seed=0)
    masked = {s: plan.draw(d).apply(d) for s, d in talk.items()}
    history = fit(model, talk["train"], masked["valid"], TrainConfig(epochs=12, batch_size=8, lr=3e-3), train_plan=plan)
    losses = [row["train_loss"] for row in history.epochs]
    assert losses[-1] < losses[0]
    logits = predict(model, masked["test"])
    real = masked["test"].data.extras["utterance"]
    accuracy = (logits.argmax(-1) == masked["test"].target)[real].float().mean()
    assert accuracy > 0.3  # guessing: 0.24


@EVERY
def test_padding_does_not_enter_the_loss(net):
    model = JointTraining(make(net))
    batch = make_batch((5, 2, 1))
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.RNNBase)):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.0)
    model.train()
    loss = model(batch).losses["task"]
    real = batch.extras["utterance"]
    each = [
        nn.functional.cross_entropy(model(batch).logits[b, u], batch.target[b, u]) for b, u in real.nonzero().tolist()
    ]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    longer = pad(batch, 3, rubbish=False)
    torch.testing.assert_close(model(longer).losses["task"], loss)
    scores = MultimodalBatch(
        batch.features, batch.present, batch.target.double(), batch.valid, batch.observed, extras=batch.extras
    )
    one = JointTraining(make(net, outputs=1)).train()
    assert one(scores).losses["task"].ndim == 0


@EVERY
def test_every_parameter_learns(net):
    options = {"embedded": ("language",), "reasoning": True} if net == "mmdfn" else {}
    options = {"attention": True, "front": 5} if net == "gcnet" else options
    model, batch = make(net, **options).train(), make_batch((6, 4, 5), missing=False)
    model(batch).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@EVERY
def test_the_same_after_copy_and_state(net):
    model, batch = make(net), make_batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(batch), model(batch))
    decoder = model.make_decoder(11).double()
    assert decoder(torch.zeros(2, 11, dtype=torch.float64)).shape == (2, 4)


@EVERY
def test_half_precision_stays_finite(net):
    model, batch = make(net).float(), make_batch((6, 4, 5))
    batch = batch.replace(features={m: x.float() for m, x in batch.features.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch)
    logits.float().square().mean().backward()
    assert bool(torch.isfinite(logits).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.real
@EVERY
def test_on_real_mosi(net, real_data):
    path = real_data / "mosi" / "mosi_conversation.pkl"
    if not path.is_file():
        pytest.skip(f"no real data: {path} is not there")
    d = data.load("dialogue", path)["valid"]
    model = NETS[net][0].for_data(d, **SMALL[net])
    assert model.speakers == 1
    model = JointTraining(model).train()
    out = model(d[:4])
    assert out.logits.shape == (4, d.data.shape[1], 1)
    out.losses["task"].backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


# --- what is refused -------------------------------------------------------------------------------------------------


@EVERY
def test_bad_batches(net):
    model, batch = make(net), make_batch()
    with pytest.raises(ValueError, match=r"expected the modalities \['audio', 'language', 'vision'\], got"):
        model(batch.select(["language", "audio"]))
    wide = make_batch(widths={**WIDTHS, "language": 9})
    with pytest.raises(ValueError, match=r"features\['language'\]: expected \[B, U, T, 7\], got"):
        model(wide)
    flat = MultimodalBatch({m: x[:, 0] for m, x in batch.features.items()}, batch.present[:, 0])
    with pytest.raises(ValueError, match=r"batch: expected dialogues \[B, U\], got the leading shape \(3,\)"):
        model(flat)
    speaker = batch.extras["speaker"].clone()
    speaker[0, 1] = 2
    if net != "mmdfn" or model.party is not None:
        with pytest.raises(ValueError, match=r"extras\['speaker'\]: unknown speaker 2; expected 0 to 1"):
            model(batch.replace(extras={**batch.extras, "speaker": speaker}))
    with pytest.raises(ValueError, match=r"extras\['speaker'\]: expected int64 \(3, 5\), got"):
        model(batch.replace(extras={**batch.extras, "speaker": speaker.float()}))
    with pytest.raises(ValueError, match=r"extras\['utterance'\]: expected bool \(3, 5\), got"):
        model(batch.replace(extras={**batch.extras, "utterance": speaker}))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (MMGCNConfig, {"input_widths": {}}, "input_widths: expected a dict by names with at least 1"),
        (MMGCNConfig, {"input_widths": {"a": 0}}, r"input_widths\['a'\]: expected an integer of at least 1, got 0"),
        (MMGCNConfig, {"outputs": 0}, "outputs: expected an integer of at least 1, got 0"),
        (MMGCNConfig, {"width": 7}, "width: expected an even number, for two directions, got 7"),
        (MMGCNConfig, {"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        (MMGCNConfig, {"alpha": 2}, "alpha: expected a number in"),
        (MMGCNConfig, {"lamda": 0}, "lamda: expected a number above 0"),
        (MMGCNConfig, {"context": ("smell",)}, r"context: unknown modalities \['smell'\]"),
        (MMGCNConfig, {"embedded": ("smell",)}, r"embedded: unknown modalities \['smell'\]"),
        (MMDFNConfig, {"party": {"smell": 1.0}}, r"party: unknown modalities \['smell'\]"),
        (MMDFNConfig, {"cross_weight": -1}, "cross_weight: expected a number of at least 0, got -1"),
        (GCNetConfig, {"input_widths": {}}, "input_widths: expected a dict by names with at least 1"),
        (GCNetConfig, {"input_widths": {"a": 0}}, r"input_widths\['a'\]: expected an integer of at least 1"),
        (GCNetConfig, {"speakers": 0}, "speakers: expected an integer of at least 1, got 0"),
        (GCNetConfig, {"front": 0}, "front: expected None or an integer of at least 1, got 0"),
        (GCNetConfig, {"past": -2}, "past: expected an integer of at least -1, got -2"),
        (GCNetConfig, {"dropout": -0.1}, "dropout: expected a number in"),
    ],
)
def test_bad_configurations(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.slow
def test_presets_and_data(talk):
    for net in ("mmgcn", "mmdfn"):
        kind = NETS[net][0]
        with pytest.raises(ValueError, match=r"preset: expected 'balm' or 'original', got 'mine'"):
            kind.for_data(talk["train"], preset="mine")
        with pytest.raises(ValueError, match="data: expected dialogues"):
            kind.for_data(data.load("synthetic", sizes=(4, 4, 4))["train"])
    original = MMGCNBackbone.for_data(talk["train"], preset="original")
    assert (original.config.layers, original.config.embedded) == (64, ("language",))
    assert original.config.outputs == 6
    assert MMDFNBackbone.for_data(talk["train"], preset="original", layers=2).config.reasoning
    assert GCNetBackbone.for_data(talk["train"]).config.input_widths == {"audio": 12, "language": 16, "vision": 8}
    anonymous = MultimodalDataset(talk["train"].data, {"outputs": 6})
    assert GCNetBackbone.for_data(anonymous).speakers == 2
