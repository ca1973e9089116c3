"""MCE's section 3 as loops over samples and subsets, and small batches and models to compare it on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from mmlib.backbones import GenericBackbone, GenericConfig
from mmlib.batch import MultimodalBatch, MultimodalDataset
from mmlib.methods.mce import MCE, UpperBounds

SHAPES = {"a": (3, 2), "b": (1, 4), "c": (2, 3), "d": (1, 2)}


def some_present(n: int, M: int, seed: int = 0) -> torch.Tensor:
    present = torch.rand(n, M, generator=torch.Generator().manual_seed(seed)) < 0.6
    present[torch.arange(n), torch.arange(n) % M] = True
    return present


def make_batch(M: int = 3, n: int = 9, regression: bool = False, seed: int = 0, present=None) -> MultimodalBatch:
    g = torch.Generator().manual_seed(seed)
    names = list(SHAPES)[:M]
    target = torch.randn(n, generator=g) if regression else torch.randint(0, 3, (n,), generator=g)
    batch = MultimodalBatch(
        {m: torch.randn(n, *SHAPES[m], generator=g) for m in names},
        torch.ones(n, M, dtype=torch.bool),
        target=target,
        ids=torch.arange(100, 100 + n),
    )
    return batch.drop(present=some_present(n, M, seed) if present is None else present)


def make_mce(
    batch: MultimodalBatch, seed: int = 0, dropout: float = 0.0, encode_absent: bool = False, **options
) -> MCE:
    """A model whose training pass is deterministic, with random weights in every part."""
    torch.manual_seed(seed)
    regression = batch.target.is_floating_point()
    names = batch.modalities
    backbone = GenericBackbone(
        GenericConfig(
            {m: SHAPES[m] for m in names},
            1 if regression else 3,
            width=8,
            dropout=dropout,
            encode_absent=encode_absent,
        )
    )
    table = (torch.rand(len(batch), len(names)) < 0.7).float()
    upper = UpperBounds(table, batch.ids, names) if options.get("state_factor", True) else None
    options = {"attention_heads": 2, "hidden": 16, "dropout": dropout, **options}
    model = MCE(backbone, upper, present=batch.present, **options)
    with torch.no_grad():
        model.reconstruction.position.normal_()
    return model.train()


class Reference:
    """Section 3 of the paper, one sample and one subset at a time."""

    def __init__(self, model: MCE, batch: MultimodalBatch, tolerance: float = 0.5):
        self.model, self.tolerance = model, tolerance
        self.names = list(batch.modalities)
        self.M, self.n = len(self.names), len(batch)
        self.present = batch.present.numpy()
        self.y = batch.target
        with torch.no_grad():
            self.h = [[model.backbone.encode(batch[i])[m][0] for m in self.names] for i in range(self.n)]
        self.has = [tuple(m for m in range(self.M) if self.present[i, m]) for i in range(self.n)]

    def rebuilt(self, features, subset):
        stacked = torch.stack([features[m] if m in subset else torch.zeros_like(features[m]) for m in range(self.M)])
        return self.model.reconstruction(stacked[None])[0]

    def logits(self, rebuilt):
        return self.model.backbone.decoder(rebuilt.flatten()[None])[0]  # the generic fusion is a concatenation

    def loss(self, logits, i):
        if self.y.is_floating_point():
            return (logits[0] - self.y[i]).abs().item()
        return (torch.logsumexp(logits, 0) - logits[self.y[i]]).item()

    def right(self, logits, i):
        if self.y.is_floating_point():
            return float(abs(float(logits[0]) - float(self.y[i])) <= self.tolerance)
        return float(int(logits.argmax()) == int(self.y[i]))

    def subsets(self, members):
        for size in range(1, len(members) + 1):
            yield from itertools.combinations(members, size)

    @torch.no_grad()
    def run(self):
        said = {(i, s): self.rebuilt(self.h[i], s) for i in range(self.n) for s in self.subsets(self.has[i])}
        logits = {key: self.logits(x) for key, x in said.items()}
        count = self.present.sum(0)
        A = self.n / count
        A = A / A.mean()
        # Eq. 5
        phi = np.zeros(self.M)
        for i in range(self.n):
            k = len(self.has[i])
            value = {s: self.right(logits[i, s], i) for s in self.subsets(self.has[i])} | {(): 0.0}
            for m in self.has[i]:
                rest = [x for x in self.has[i] if x != m]
                for s in [(), *self.subsets(rest)]:
                    weight = math.factorial(len(s)) * math.factorial(k - len(s) - 1) / math.factorial(k)
                    phi[m] += weight * (value[tuple(sorted((*s, m)))] - value[s])
        table = {int(i): row for i, row in zip(self.model.upper.ids, self.model.upper.table.numpy(), strict=True)}
        U = np.array([sum(table[100 + i][m] for i in range(self.n) if self.present[i, m]) for m in range(self.M)])
        B = np.array([max(U[m] - phi[m], 0) / count[m] if count[m] else 0.0 for m in range(self.M)])
        full = [self.has[i] for i in range(self.n)]
        task = np.mean([self.loss(logits[i, full[i]], i) for i in range(self.n)])
        single = 0.0
        for m, name in enumerate(self.names):
            each = [
                self.loss(self.model.heads[name](self.h[i][m][None])[0], i) for i in range(self.n) if self.present[i, m]
            ]
            single += A[m] * B[m] * (np.mean(each) if each else 0.0)
        batch_subsets = sorted({s for i in range(self.n) for s in self.subsets(self.has[i])})
        sub, aux = 0.0, 0.0
        for s in batch_subsets:
            feasible = [i for i in range(self.n) if set(s) <= set(self.has[i])]
            sub += np.mean([self.loss(logits[i, s], i) for i in feasible])
            total = 0.0
            for i in feasible:
                gone = [m for m in self.has[i] if m not in s]
                gaps = [A[m] * B[m] * float(torch.linalg.norm(said[i, s][m] - self.h[i][m])) for m in gone]
                total += sum(gaps) / len(gaps) if gaps else 0.0
            aux += total / len(feasible)
        k = len(batch_subsets)
        return {"task": task, "single": single, "subset": sub / k, "completion": aux / k}, A, B, phi, U


def last_of(model, batch):
    model(batch)
    return model.last


def make_splits(n=60, M=3, seed=0) -> dict[str, MultimodalDataset]:
    g = torch.Generator().manual_seed(seed)
    splits = {}
    for split in ("train", "valid", "test"):
        y = torch.randint(0, 3, (n,), generator=g)
        features = {
            m: (torch.randn(n, *SHAPES[m], generator=g) + y.reshape(-1, 1, 1)).numpy() for m in list(SHAPES)[:M]
        }
        splits[split] = MultimodalDataset.from_arrays(
            features,
            y.numpy(),
            ids=[f"{split}{i}" for i in range(n)],
            classes=3,
            info={"name": "toy", "task": "classification", "outputs": 3},
        )
    return splits
