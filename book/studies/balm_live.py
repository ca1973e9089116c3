"""What the pages on BALM train on their own: one data set under two settings, and BALM's presets on one backbone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from book.drawings.balm import PathLength, Watch
from book.studies import balm as study
from mmlib import BALM, MultimodalBatch, MultimodalDataset, backbones, coalitions, data, metrics, missing
from mmlib.baselines import JointTraining
from mmlib.gradients import EncoderGradients
from mmlib.training import History, TrainConfig, fit, predict, random_state

__all__ = ["Live", "Trained", "directions", "embedded", "ends", "paths", "signal", "together", "travelled"]


class Trained(NamedTuple):
    """A training: the method in eval mode, what its heads watched, the history."""

    method: BALM
    watch: Watch
    history: History


class Live:
    """A page's data set, masked as in the paper's Config B and Config A, and what is trained on it.

    setup : a page's parameters, with rates, other_rates, backbone, epochs, lr, rho and tau beside the common ones

    ``parts["B"]`` and ``parts["A"]`` are the splits, each under a mask of its own that stays for the whole run.
    """

    def __init__(self, setup: Any):
        self.setup = setup
        known = study.DATA.get(setup.dataset, {"data": setup.dataset})
        self.splits = data.load(known["data"], root=setup.data_root, **known.get("data_options", {}))
        self.names, self.seed = self.splits["train"].modalities, setup.seeds[0]
        self.dialogues = len(self.splits["train"].data.shape) == 2
        self.regression = self.splits["train"].info["task"] == "regression"
        self.config = TrainConfig(
            epochs=setup.epochs,
            batch_size=16 if self.dialogues else 64,
            lr=setup.lr,
            clip=2.0,
            seed=self.seed,
            device=setup.device,
        )
        self.parts = {"B": self.masked(setup.rates), "A": self.masked(setup.other_rates)}

    def masked(self, rates: Sequence[float]) -> dict[str, MultimodalDataset]:
        """All splits with parts missing at these rates, by the paper's Eq. 36."""
        plan = missing.MissingPlan("imbalanced", rates=tuple(rates)[: len(self.names)], seed=self.seed)
        return {name: plan.draw(split).apply(split) for name, split in self.splits.items()}

    def network(self, **own: Any) -> Any:
        """A new backbone, with options of its own: the page's on dialogues, else the generic one."""
        kind = self.setup.backbone if self.dialogues else "generic"
        options = {**study.BACKBONES.get(kind, {"width": 32}), **own}
        return getattr(backbones, study.NETS[kind]).for_data(self.splits["train"], **options)

    def train(self, preset: str, where: str, **options: Any) -> Trained:
        """A preset of BALM on a new backbone, in Config A or B."""
        strengths = {} if preset in ("monitor", "BALM-D") else {"tau": self.setup.tau}
        options = {"preset": preset, "rho": self.setup.rho, "measure": True, **strengths, **options}
        parts, watch = self.parts[where], Watch()
        with random_state(self.seed):
            method = BALM.for_data(parts["train"], self.network(), **options)
        history = fit(method, parts["train"], parts["valid"], self.config, callbacks=[watch])
        return Trained(method.eval(), watch, history)

    def padding(self) -> pd.DataFrame:
        """Packed recurrent nets and padded ones: test scores, and predictions that change without the padding."""
        test, rows = self.parts["B"]["test"], {}
        real, whole = self.real(test), test[:].to("cpu").replace(target=None)
        lengths = real.sum(1)
        for name, packed in (("packed", True), ("padded", False)):
            with random_state(self.seed):
                method = JointTraining(self.network(packed=packed))
            fit(method, self.parts["B"]["train"], self.parts["B"]["valid"], self.config)
            method.cpu().eval()
            with torch.no_grad():
                said, alone = method(whole).logits.argmax(-1), torch.zeros(real.shape, dtype=torch.int64)
                for length in lengths.unique().tolist():
                    some = lengths == length
                    alone[some, :length] = method(first_steps(whole[some], length)).logits.argmax(-1)
            changed = (said != alone)[real].float().mean().item()
            rows[name] = {"test": self.score(method, test), "predictions that change": changed}
        return pd.DataFrame(rows).T

    def real(self, split: MultimodalDataset) -> Tensor:
        """bool [*N]: what counts as a sample, which padding does not."""
        given = split.data.extras.get("utterance")
        return torch.ones(split.data.shape, dtype=torch.bool) if given is None else given.cpu()

    def missing_rates(self, where: str) -> list[float]:
        """The realised missing rate of each modality of the training split."""
        split = self.parts[where]["train"]
        rates: list[float] = (1 - split.present[self.real(split)].float().mean(0)).tolist()
        return rates

    def score(self, method: torch.nn.Module, split: MultimodalDataset) -> float:
        """Accuracy, or for scores the weighted F1 of their sign, over what is there."""
        counts = self.real(split) & split.present.cpu().any(-1)
        logits, y = predict(method, split)[counts], split.target.cpu()[counts]  # type: ignore[union-attr]
        if self.regression:
            return metrics.msa_scores(logits[:, 0], y)["f1_non0"]
        return float((logits.argmax(-1) == y).float().mean())

    def shapley(self, method: BALM) -> tuple[Tensor, float]:
        """Shapley values of the score on the complete test split [M], and that score; v(empty) is that of guessing."""
        split = self.splits["test"]
        y = split.target.cpu()[self.real(split)]  # type: ignore[union-attr]
        values = [0.5 if self.regression else y.bincount().max().item() / len(y)]
        for on in coalitions.coalition_masks(len(self.names))[1:]:
            values.append(self.score(method, split.drop(present=on.to(split.device))))
        return coalitions.shapley_values(torch.tensor(values, dtype=torch.float64)), values[-1]

    @torch.no_grad()
    def stages(self, method: BALM, name: str, points: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Input, encoding and fused features [n, ...] of the test samples that have a modality, and their classes."""
        split = self.parts["B"]["test"]
        method.cpu().eval()
        batch = split[:].to("cpu").replace(target=None)
        m = batch.index(name)
        batch = batch if method.calibration is None else method.calibration(batch)
        h = method.backbone.encode(batch)
        z = method.backbone.fuse(h, batch.present, batch)
        there = (batch.present[..., m] & self.real(split)).nonzero(as_tuple=True)
        keep = tuple(axis[:points] for axis in there)
        y = split.target.cpu()[keep]  # type: ignore[union-attr]
        parts = {"input": batch.features[name].flatten(len(batch.shape)), "encoding": h[name], "fused": z}
        return {k: x[keep].numpy() for k, x in parts.items()}, ((y > 0).long() if self.regression else y).numpy()


def first_steps(batch: MultimodalBatch, steps: int) -> MultimodalBatch:
    """The first utterances of every dialogue."""
    cut = lambda tensors: {name: x[:, :steps] for name, x in tensors.items()}
    return MultimodalBatch(
        cut(batch.features),
        batch.present[:, :steps],
        None,
        cut(batch.valid),
        cut(batch.observed),
        extras=cut(batch.extras),
    )


# --- What an optimizer leaves of a coefficient ------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=3e-3),
    "Adam, L2 decay": lambda groups: torch.optim.Adam(groups, lr=3e-3, weight_decay=1e-2),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=3e-3, weight_decay=1e-2),
}


def travelled(
    optimizer: str,
    steps: int,
    seed: int,
    mu: Tensor | None = None,
    rate: Tensor | None = None,
    clip: float | None = None,
) -> np.ndarray:
    """How far each encoder goes on digits: the lengths of all its updates, added up [M].

    mu : [steps, M], on the encoders' gradients; rate : [M], on their learning rates; clip : the largest gradient norm
    """
    digits = data.load("digits")["train"]
    plan = missing.MissingPlan("imbalanced", rates=(0.5, 0.7, 0.3), seed=seed)
    digits = plan.draw(digits).apply(digits)
    with random_state(seed):
        net = backbones.GenericBackbone.for_data(digits, width=16, dropout=0.0)
    encoders = dict(net.encoders.items())
    gradients, path = EncoderGradients(net, encoders), PathLength(encoders)
    make = OPTIMIZERS[optimizer]
    base = make([{"params": list(net.parameters())}]).defaults["lr"]
    own = [
        {"params": list(part.parameters()), "lr": base * float(1 if rate is None else rate[m])}
        for m, part in enumerate(encoders.values())
    ]
    taken = {id(p) for group in own for p in group["params"]}
    stepping = make([*own, {"params": [p for p in net.parameters() if id(p) not in taken]}])
    path()
    for step in range(steps):
        batch = digits[torch.randint(len(digits), (64,), generator=torch.Generator().manual_seed(step))]
        stepping.zero_grad()
        torch.nn.functional.cross_entropy(net(batch), batch.target).backward()
        if mu is not None:
            gradients.scale(mu[step % len(mu)])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        stepping.step()
        path()
    return np.array([path.length[m] for m in encoders])


def paths(recorded: Tensor, steps: int, seed: int) -> pd.DataFrame:
    """`travelled` relative to coefficients of 1, for constant and recorded mu, and for a real learning rate."""
    constant, rows = torch.tensor([4.0, 1.0, 0.25]), []
    recorded = recorded if recorded.shape[1] == 3 else recorded[:, [0, 1, 1]]
    changes: dict[str, dict[str, Any]] = {
        "mu = 4, 1, 1/4": {"mu": constant[None]},
        "learning rate × 4, 1, 1/4": {"rate": constant},
        "mu as recorded": {"mu": recorded},
    }
    for name in OPTIMIZERS:
        for clip in (None, 0.3):
            base = travelled(name, steps, seed, clip=clip)
            for what, change in changes.items():
                if "rate" in change and (clip or name not in ("SGD", "Adam")):
                    continue
                far = travelled(name, steps, seed, clip=clip, **change) / base
                lengths = {f"encoder {m + 1}": v for m, v in enumerate(far)}
                rows.append({"optimizer": name, "clipped at": clip or "–", "what": what, **lengths})
    return pd.DataFrame(rows)


def signal(watch: Watch, names: Sequence[str], rho: float) -> pd.DataFrame:
    """Is Delta learning or noise? Trend and jump of the KL a step; autocorrelations beside those of shuffled series."""
    from book.drawings.balm import autocorrelation, shuffled_band

    kl, change, mu = (watch.table(k)[1:] for k in ("discrepancy", "change", "mu"))
    bounded, rows, third = np.clip(mu, -5 * rho, 5 * rho), [], max(len(kl) // 3, 1)
    band = lambda x: "{:+.2f} to {:+.2f}".format(*shuffled_band(x))
    for m, name in enumerate(names):
        trend = (kl[:third, m].mean() - kl[-third:, m].mean()) / max(len(kl) - third, 1)
        rows.append(
            {
                "modality": name,
                "KL falls a step": trend,
                "KL changes a step": np.abs(change[:, m]).mean(),
                "lag 1 of Delta": autocorrelation(change[:, m]),
                "shuffled Delta": band(change[:, m]),
                "lag 1 of mu": autocorrelation(bounded[:, m]),
                "shuffled mu": band(bounded[:, m]),
                "mu < 0": (mu[:, m] < 0).mean(),
                "mu > rho": (mu[:, m] > rho).mean(),
            }
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def together(method: BALM, split: MultimodalDataset, sizes: Sequence[int], draws: int, seed: int) -> pd.DataFrame:
    """Do the Deltas of the modalities go together? Of a network that stands still, by samples (dialogues) a batch.

    Each draw is two mini-batches of different samples; Delta is the difference of their KL. The mean, smallest and
    largest correlation between two modalities, and how often a coefficient of Eq. 21 is negative or above rho.
    """
    method, batch = copy.deepcopy(method).cpu().eval(), split[:].to("cpu")
    plug, backbone = method.rebalancing, method.backbone
    assert plug is not None
    shown = batch if method.calibration is None else method.calibration(batch)
    h = backbone.encode(shown)
    logits, y, N = plug.flat(backbone.decode(backbone.fuse(h, shown.present, shown)), batch.target)
    real = batch.extras.get("utterance", torch.ones(N, dtype=torch.bool))
    kl = plug.discrepancies(logits, plug.heads(plug.encodings(h, N)), y).reshape(-1, *N) * real
    sums, counts = kl.reshape(len(kl), len(split), -1).sum(-1).numpy(), real.reshape(len(split), -1).sum(-1).numpy()
    rng, rows = np.random.default_rng(seed), {}
    for size in sizes:
        order = rng.permuted(np.tile(np.arange(len(split)), (draws, 1)), axis=1)
        places = order[:, : 2 * size].reshape(draws, 2, size).transpose(1, 0, 2)  # two batches that share nothing
        mean = sums[:, places].sum(-1) / counts[places].sum(-1)  # [M, 2, draws]
        change = mean[:, 0] - mean[:, 1]
        between = np.corrcoef(change)[np.triu_indices(len(change), 1)]
        mu = 1 - change / change.sum(0)  # over rho
        rows[str(size)] = {
            "mean correlation": between.mean(),
            "smallest": between.min(),
            "largest": between.max(),
            "mu < 0": (mu < 0).mean(),
            "mu > rho": (mu > 1).mean(),
        }
    return pd.DataFrame(rows).T


def ends(trained: dict[tuple[str, str], Trained], names: Sequence[str]) -> pd.DataFrame:
    """What the heads saw in the last third of every training, keys (name, config)."""
    rows = []
    for (name, where), run in trained.items():
        kl, cosine = (run.watch.table(k)[-max(len(run.watch.steps) // 3, 1) :] for k in ("discrepancy", "cosine"))
        gap = kl.mean(0)
        rows.append(
            {
                "config": where,
                "training": name,
                **{f"KL {m}": v for m, v in zip(names, gap, strict=True)},
                "widest KL gap": gap.max() - gap.min(),
                "mean |cosine|": np.abs(cosine).mean(),
                "learning balance": metrics.learning_balance(run.watch.table("rms_after")),
            }
        )
    return pd.DataFrame(rows).sort_values(["config", "training"]).reset_index(drop=True)


def embedded(
    world: Live, trained: dict[tuple[str, str], Trained], modality: str, points: int
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray, float]]:
    """t-SNE of the stages of backbone and BALM, Config B: (training, stage) -> points, classes, silhouette."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    found = {}
    for name in ("backbone", "+BALM"):
        stages, y = world.stages(trained[name, "B"].method, modality, points)
        for stage, x in stages.items():
            flat = TSNE(perplexity=min(20, len(x) // 4), max_iter=300, random_state=0, init="pca").fit_transform(x)
            found[name, stage] = flat, y, float(silhouette_score(x, y))
    return found


def directions(method: BALM, batch: Any, names: Sequence[str], seed: int) -> pd.DataFrame:
    """On one mini-batch: cosines of the output layers' weights and gradients, and what the release's noise leaves."""
    method = copy.deepcopy(method).cpu().train()
    plug, cosine = method.rebalancing, torch.nn.functional.cosine_similarity
    assert plug is not None
    losses, weight, heads = method(batch).losses, plug.output, plug.heads.weight
    of_task = torch.autograd.grad(losses["task"], weight, retain_graph=True)[0].flatten()
    of_heads = torch.autograd.grad(losses["unimodal"], heads, retain_graph=True)[0].flatten(1)
    method.zero_grad()
    losses["task"].backward()
    joined = lambda: [torch.cat([g.flatten().clone() for g in gs]) for gs in plug.encoders.gradients()]
    before = joined()
    with random_state(seed):
        plug.encoders.disturb(plug.encoders.spreads())
    noisy = [cosine(a, b, dim=0).item() for a, b in zip(before, joined(), strict=True)]
    return pd.DataFrame(
        {
            "cosine of weights": cosine(weight.flatten()[None], heads.flatten(1)).tolist(),
            "random weights": weight.numel() ** -0.5,
            "cosine of gradients": cosine(of_task[None], of_heads).tolist(),
            "gradient with noise": noisy,
        },
        index=list(names),
    )
