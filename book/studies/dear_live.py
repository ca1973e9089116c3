"""What the method page on DEAR trains and looks at while it is read: data, a watch on a training, a second fit."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from book.studies import dear as study
from book.studies import dear_checks
from mmlib import DEAR, MultimodalDataset, data, losses, missing
from mmlib.layers import masked_mean, scoring
from mmlib.training import TrainConfig

__all__ = ["Live", "Watch", "descriptors", "mixing", "pull_on_difficulty", "refit", "reported", "says", "step_seconds"]


class Live:
    """The splits under LNLN's protocol, and how the page trains; of a page's set-up.

    train, valid : with the masks that training draws itself left out; token ids are dropped first and encoded then
    plan : of training; None where the masks are drawn once
    looks : part of the test split at three missing rates, with what was there before
    size : options of the networks
    """

    def __init__(self, setup: Any):
        self.seed, self.device = setup.seeds[0], setup.device
        own = setup.dataset == "synthetic"
        options = dict(study.DATA["synthetic"]["data_options"]) if own else {"max_frames": 24}
        self.reader = None
        if setup.text_encoder:
            from mmlib.data import text

            self.reader = text.load_encoder(_checkpoint(setup.text_encoder, setup.data_root))
            options["text"] = "ids"
        splits = data.load(setup.dataset, root=setup.data_root, **options)
        if splits["train"].info["task"] != "regression":
            raise ValueError(
                f"dataset: this page trains on scores, got {setup.dataset!r}; mmlib.methods.DEAR takes classes too"
            )
        self.names = splits["train"].modalities
        self.leaks = not own and self.reader is None  # a dropped word's vector is zeroed, its neighbours' saw it
        self.protocol, tests = missing.lnln_protocol(
            self.seed, static_masks=self.reader is not None, keep_ends=["language"] if self.leaks else None
        )
        self.plan = None if self.reader else self.protocol
        self.train = self._broken(splits["train"], self.protocol) if self.reader else splits["train"]
        self.valid = self._broken(splits["valid"], tests["r=0.5"])
        few = splits["test"].subset(torch.arange(min(300, len(splits["test"]))))
        self.looks = {rate: self._broken(few, tests[rate]) for rate in ("r=0.0", "r=0.5", "r=0.9")}
        self.size = {
            **study.RECIPES["swept"],
            "width": setup.width,
            "heads": 4,
            "head_width": 8,
            "hidden": 32,
            "tau": setup.tau,
        }
        self.config = TrainConfig(
            epochs=setup.epochs, batch_size=128, lr=setup.lr, optimizer="adamw", weight_decay=1e-4,
            schedule="linear-warmup-cosine", seed=self.seed, device=setup.device,
        )  # fmt: skip

    def _broken(self, split: MultimodalDataset, plan: Any) -> MultimodalDataset:
        masked = plan.draw(split, epoch=0 if plan.resample else None).apply(split, keep_complete=True)
        if self.reader is None:
            return masked
        from mmlib.data import text

        return text.encode(masked, self.reader)

    def masked(self, epoch: int) -> MultimodalDataset:
        """The training split as an epoch meets it."""
        if self.plan is None:
            return self.train
        return self.plan.draw(self.train, epoch=epoch).apply(self.train, keep_complete=True)


def _checkpoint(name: str, root: Path | None) -> str:
    folder = Path(name).expanduser()
    return next((str(p) for p in ((root or Path()) / folder, folder) if p.is_dir()), name)


class Watch:
    """A callback: after each epoch, how far features are from the complete ones, and the risks of both domains.

    rows : an epoch each; distances in units of the originals' own variance
    clouds : by epoch (originals, repaired) [n, sum of d], of the epochs in ``keep``
    """

    def __init__(self, live: Live, keep: Iterable[int]):
        self.whole, self.half, self.names = live.looks["r=0.0"], live.looks["r=0.5"], live.names
        self.keep, self.device = set(keep), live.device
        self.rows: list[dict[str, float]] = []
        self.clouds: dict[int, tuple[Tensor, Tensor]] = {}

    def on_epoch_end(self, state: Any) -> None:
        model = state.method
        told, source = model.diagnose(self.half), model.diagnose(self.whole)
        with scoring(model):
            seen = model.encode(self.half[:].to(self.device))
        kept = told.error.isfinite().all(-1)
        join = lambda parts: torch.cat([parts[m] for m in self.names], -1)[kept]
        X, repaired = join(told.original), join(told.reconstructed)
        H = join({m: masked_mean(seen.h[m], seen.valid[m]).cpu() for m in self.names})
        unit = X.var(0).sum().sqrt().clamp_min(1e-6)
        far = lambda z: losses.sinkhorn(z / unit, X / unit, epsilon=0.05).item()
        risk = lambda d, split: (d.prediction[:, 0] - split.target).abs().mean().item()
        self.rows.append(
            {
                "incomplete": far(H),
                "repaired": far(repaired),
                "MMD², incomplete": losses.mmd(X, H).item(),
                "MMD²": losses.mmd(X, repaired).item(),
                "error / variance": ((X - repaired) / unit).square().sum(1).mean().item(),
                "source risk": risk(source, self.whole),
                "target risk": risk(told, self.half),
            }
        )
        if state.epoch in self.keep:
            self.clouds[state.epoch] = (X, repaired)


def pull_on_difficulty(model: DEAR, split: MultimodalDataset, device: str) -> dict[str, float]:
    """The norm of each loss term's gradient at the last layer of the difficulty estimator."""
    found = {}
    last = list(model.difficulty.parameters())[-2:]
    for name, value in model.train()(split[:].to(device)).losses.items():
        grads = torch.autograd.grad(value, last, retain_graph=True, allow_unused=True)
        found[name] = math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))
    model.eval()
    return found


def mixing(X: Tensor, R: Tensor) -> float:
    """How often a point's nearest neighbour is of the other cloud: one half if both are the same distribution."""
    z = torch.cat([X, R])
    nearest = torch.cdist(z, z).fill_diagonal_(torch.inf).argmin(1)
    return ((nearest >= len(X)) != (torch.arange(len(z)) >= len(X))).float().mean().item()


def says(model: DEAR, looks: Mapping[str, MultimodalDataset], names: Sequence[str]) -> pd.DataFrame:
    """Gate, entropy, weights, difficulties and errors of a network, means over samples by missing rate."""
    rows = []
    for rate, split in looks.items():
        told = model.diagnose(split)
        row = {"rate": rate[2:], "gate": told.gate.mean().item(), "H(w)": told.entropy.mean().item()}
        for i, m in enumerate(names):
            row[f"w {m}"] = told.weights[:, i].mean().item()
            row[f"d {m}"] = told.difficulty[:, i].mean().item()
            row[f"e {m}"] = told.error[:, i].nanmean().item()
        rows.append(row)
    return pd.DataFrame(rows).set_index("rate").T.rename_axis(None, axis=1)


def descriptors(model: DEAR, split: MultimodalDataset, device: str) -> tuple[Tensor, Tensor]:
    """z of Eq. 6 for all modalities, side by side [n, M d], and the true errors e [n, M]."""
    with scoring(model):
        seen = model.encode(split[:].to(device))
    z = [nn.functional.normalize(masked_mean(seen.h[m], seen.valid[m]).cpu(), dim=-1) for m in model.modalities]
    return torch.cat(z, -1), model.diagnose(split).error


def refit(model: DEAR, live: Live, rounds: int, rate: float = 3e-3) -> nn.Module:
    """A copy of the difficulty estimator, fitted to e of the frozen network under fresh masks of training (Eq. 12).

    A round is an epoch of the training that the page watches: the same samples, masks and batch size.
    """
    head = copy.deepcopy(model.difficulty).cpu()
    optimizer = torch.optim.Adam(head.parameters(), rate)
    for k in range(rounds):
        z, e = descriptors(model, live.masked(k + 1), live.device)
        for rows in torch.randperm(len(z), generator=torch.Generator().manual_seed(k)).split(live.config.batch_size):
            wrong = nn.functional.softplus(head(z[rows])) - e[rows]
            optimizer.zero_grad()
            torch.where(e[rows].isfinite(), wrong, 0).square().mean().backward()
            optimizer.step()
    return head


def reported(model: DEAR, heads: Mapping[str, nn.Module], live: Live) -> pd.DataFrame:
    """How each difficulty estimator's d goes with e and with the error of the prediction, on what is looked at."""
    parts = [descriptors(model, split, live.device) for split in live.looks.values()]
    z, e = (torch.cat(x).detach() for x in zip(*parts, strict=True))
    said = [(model.diagnose(s).prediction[:, 0] - s.target).abs() for s in live.looks.values()]
    wrong, columns = torch.cat(said).numpy(), {}
    for name, head in heads.items():
        with torch.no_grad():
            d = nn.functional.softplus(head(z))
        row = {}
        for i, m in enumerate(live.names):
            kept = e[:, i].isfinite()
            row[f"rank correlation, {m}"] = dear_checks.rank(d[:, i], e[:, i])
            row[f"explained, {m}"] = (1 - (e - d)[kept, i].square().mean() / e[kept, i].var()).item()
        curve = dear_checks.selective_risk(d.mean(-1).numpy(), wrong)
        half = len(curve.risk) // 2 - 1
        columns[name] = {**row, "error of all": curve.risk[-1], "error of the easier half": curve.risk[half]}
    return pd.DataFrame(columns)


def step_seconds(live: Live, alignment: str, steps: int) -> float:
    """The least seconds of a training step."""
    model = DEAR.for_data(live.train, alignment=alignment, **live.size).to(live.device).train()
    batch, found = live.masked(1)[:128].to(live.device), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        sum(model(batch).losses.values()).backward()
        found.append(time.perf_counter() - start)
    return min(found[1:])
