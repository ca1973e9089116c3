"""What the graph of MMGCN costs per dialogue against one dense matrix for all of them: 16 dialogues of 50 utterances.

The dense version follows the releases: per dialogue and modality the cosines as the sum of an outer product
[D, U, U], written into one matrix [3 N, 3 N] of all N utterances, which two products with a diagonal matrix normalise;
every layer multiplies with that matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmlib import MultimodalBatch
from mmlib.backbones import GCNetBackbone, GCNetConfig, MMDFNBackbone, MMDFNConfig, MMGCNBackbone, MMGCNConfig
from mmlib.backbones.dialogue import real_utterances
from mmlib.backbones.mmgcn import dialogue_graph

U, D, WIDTHS = 50, 200, {"audio": 1582, "language": 1024, "vision": 342}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def dense_graph(nodes: Tensor) -> Tensor:
    """[3 N, 3 N] of all dialogues, from nodes [B, 3, U, D]."""
    B, M, n, _ = nodes.shape
    A = nodes.new_zeros(M * B * n, M * B * n)
    place = torch.arange(n, device=nodes.device)
    for b in range(B):
        unit = [x.T / torch.sqrt((x * x).sum(1)) for x in nodes[b]]  # [D, U]
        for m in range(M):
            for k in range(M):
                rows, columns = (m * B + b) * n, (k * B + b) * n
                if m == k:
                    cosine = (unit[m][:, :, None] @ unit[m][:, None, :]).sum(0)
                    A[rows : rows + n, columns : columns + n] = 1 - torch.acos(0.99999 * cosine) / math.pi
                else:
                    cosine = (unit[m] * unit[k]).sum(0)
                    A[rows + place, columns + place] = 1 - torch.acos(0.99999 * cosine) / math.pi
    scale = torch.diag(A.sum(1) ** -0.5)
    return scale @ A @ scale


def dense_forward(model: MMGCNBackbone, batch: MultimodalBatch) -> Tensor:
    """The model's logits through the dense graph."""
    nodes = model.nodes(model.encode(batch), batch.present, batch)
    B, M, n, _ = nodes.shape
    A, net = dense_graph(nodes), model.graph_net
    x = net.drop(nodes.transpose(0, 1).flatten(0, 2))
    start = torch.relu(net.first(x))
    h = net.drop(start)
    for number, layer in enumerate(net.layers, 1):
        theta = math.log(net.lamda / number + 1)
        g = A @ h
        h = theta * layer(torch.cat([g, start], -1)) + (1 - theta) * ((1 - net.alpha) * g + net.alpha * start)
        h = net.drop(torch.relu(h))
    z = torch.cat([x, h], -1).unflatten(0, (M, B, n))
    return model.decode(z.permute(1, 2, 0, 3).flatten(2))


def make(device: str, B: int = 16, kind: type = MMGCNBackbone) -> tuple[nn.Module, MultimodalBatch]:
    torch.manual_seed(0)
    batch = MultimodalBatch(
        {m: torch.randn(B, U, 1, d) for m, d in WIDTHS.items()},
        torch.ones(B, U, 3, dtype=torch.bool),
        torch.randint(0, 6, (B, U)),
        extras={"utterance": torch.ones(B, U, dtype=torch.bool), "speaker": torch.randint(0, 2, (B, U))},
    )
    batch = batch.drop(present=torch.rand(B, U, 3) < 0.5)
    model = kind({MMGCNBackbone: MMGCNConfig, MMDFNBackbone: MMDFNConfig, GCNetBackbone: GCNetConfig}[kind](WIDTHS))
    return model.to(device), batch.to(device)


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """What a forward pass keeps for its backward pass, in bytes: every storage once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(storages.values())


@pytest.mark.benchmark(group="dialogues, B = 16, U = 50")
@pytest.mark.parametrize("device", DEVICES)
def test_building_the_graph(benchmark, best, device):
    model, batch = make(device)
    with torch.no_grad():
        nodes = model.nodes(model.encode(batch), batch.present, batch)
        real = real_utterances(batch)
        ours, theirs = (lambda: dialogue_graph(nodes, real)), (lambda: dense_graph(nodes))
        same, cross = ours()
        A = theirs().unflatten(0, (3, 16, U)).unflatten(3, (3, 16, U))
        for b in (0, 15):
            for m in range(3):
                torch.testing.assert_close(same[b, m], A[m, b, :, m, b], atol=1e-5, rtol=0)
                for k in range(3):
                    if k != m:
                        diagonal = A[m, b, :, k, b].diagonal()
                        torch.testing.assert_close(cross[b, :, m, k], diagonal, atol=1e-5, rtol=0)
        benchmark(ours)
        fast, slow = best(ours, theirs, repeats=5)
    benchmark.extra_info["ratio"] = round(slow / fast, 1)
    print(f"\ngraph on {device}: {1000 * fast:.2f} ms against {1000 * slow:.0f} ms, {slow / fast:.1f} times")


@pytest.mark.benchmark(group="dialogues, B = 16, U = 50")
@pytest.mark.parametrize("device", DEVICES)
def test_mmgcn_forward_and_backward(benchmark, best, device):
    model, batch = make(device)
    model.eval()
    torch.testing.assert_close(model(batch), dense_forward(model, batch), atol=1e-4, rtol=1e-4)
    model.train()

    def step(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            nn.functional.cross_entropy(forward().flatten(0, 1), batch.target.flatten()).backward()

        return run

    ours, theirs = step(lambda: model(batch)), step(lambda: dense_forward(model, batch))
    benchmark(ours)
    fast, slow = best(ours, theirs, repeats=3)
    benchmark.extra_info["ratio"] = round(slow / fast, 1)
    print(f"\nMMGCN step on {device}: {1000 * fast:.1f} ms against {1000 * slow:.0f} ms, {slow / fast:.1f} times")


@pytest.mark.benchmark(group="dialogues, U = 50")
@pytest.mark.parametrize("kind", [MMGCNBackbone, MMDFNBackbone, GCNetBackbone])
def test_memory_by_dialogues(benchmark, kind):
    """What the forward pass keeps for 4, 8 and 16 dialogues; of MMGCN also through the dense graph."""
    found = {}
    for B in (4, 8, 16):
        model, batch = make("cpu", B, kind)
        found[B] = kept_bytes(lambda model=model, batch=batch: model(batch)) / 2**20
        benchmark.extra_info[f"mb_{B}"] = round(found[B], 1)
        if kind is MMGCNBackbone:
            dense = kept_bytes(lambda model=model, batch=batch: dense_forward(model, batch)) / 2**20
            benchmark.extra_info[f"dense_mb_{B}"] = round(dense, 1)
    benchmark(lambda: model(batch))
    assert found[16] - found[8] < 2.1 * (found[8] - found[4])  # linear, beside the weights
    print(f"\n{kind.__name__}: " + ", ".join(f"{B} dialogues {mb:.0f} MiB" for B, mb in found.items()))
