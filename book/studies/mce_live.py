"""What the two pages on MCE train while they are read: the vicious cycle, and three networks under watch.

Everything follows a page's set-up (its parameters), and every network starts from the same seed.
"""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from mmlib import MultimodalBatch, MultimodalDataset, coalitions, data, missing
from mmlib.backbones import AVMNISTBackbone, AVMNISTConfig, GenericBackbone
from mmlib.backbones.mmin import MMINBackbone, MMINConfig
from mmlib.baselines import JointTraining
from mmlib.methods.mce import MCE, UpperBounds
from mmlib.training import TrainConfig, fit

__all__ = ["TASK_ALONE", "Capability", "Factors", "Gradients", "Problem", "copies_of", "cost", "fused_quality"]
__all__ += ["growth", "loss_weights", "mask_ignored", "step_ratios"]

# MCE without its parts: the backbone with the reconstruction module and the task loss
TASK_ALONE = {
    "lambda_single": 0.0,
    "lambda_sub": 0.0,
    "lambda_aux": 0.0,
    "rate_factor": False,
    "state_factor": False,
}


def loss_weights(weights: list[float]) -> dict[str, float]:
    """Options of `MCE` from the three weights of Eq. 14."""
    return dict(zip(("lambda_single", "lambda_sub", "lambda_aux"), weights, strict=True))


class Gradients:
    """A callback: the norm of each encoder's gradient in every step."""

    def __init__(self) -> None:
        self.norms: list[list[float]] = []

    def on_backward(self, state: Any) -> None:
        encoders = state.method.backbone.encoders.values()
        self.norms.append([torch.stack([p.grad.norm() for p in e.parameters()]).norm().item() for e in encoders])


class Factors:
    """A callback: the factors of every step, and what they came from."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epoch: list[int] = []

    def on_step(self, state: Any) -> None:
        self.steps.append({k: v.cpu().clone() for k, v in state.method.last.items()})
        self.epoch.append(state.epoch)

    def table(self, key: str) -> Tensor:
        """[steps, M] of one entry of ``method.last``."""
        return torch.stack([s[key] for s in self.steps])

    def by_epoch(self, key: str) -> Tensor:
        """Its mean over the steps of each epoch, [epochs, M]."""
        epoch, values = torch.tensor(self.epoch), self.table(key)
        return torch.stack([values[epoch == e].mean(0) for e in epoch.unique()])

    def gap(self) -> tuple[Tensor, Tensor]:
        """Of every step, sum N_m B_m and sum U_m - sum phi_m, [steps] each."""
        left = (self.table("state_factor") * self.table("counts")).sum(1)
        return left, self.table("upper").sum(1) - self.table("shapley").sum(1)


class Problem:
    """A page's data set with what is missing in it, and the networks that are trained on it.

    setup : the page's, with rates, epochs, lr, width and weights among its own parameters
    """

    def __init__(self, setup: Any):
        self.setup, self.seed = setup, setup.seeds[0]
        self.splits = data.load(setup.dataset, root=setup.data_root)
        self.names = self.splits["train"].modalities
        self.rates = dict(zip(self.names, itertools.cycle(setup.rates), strict=False))
        plan = missing.MissingPlan("exact_count", rates=self.rates, seed=self.seed)
        self.train, self.valid = (plan.draw(self.splits[k]).apply(self.splits[k]) for k in ("train", "valid"))
        self.test = self.splits["test"][:].to(setup.device)
        self.config = TrainConfig(epochs=setup.epochs, lr=setup.lr, seed=self.seed, device=setup.device)
        steps = setup.epochs * -(-len(self.train) // self.config.batch_size)
        self.same_steps = TrainConfig(steps=steps, lr=setup.lr, seed=self.seed, device=setup.device)
        self.half = TrainConfig(epochs=max(setup.epochs // 2, 1), lr=setup.lr, seed=self.seed, device=setup.device)

    @property
    def rare(self) -> str:
        """The modality that misses most."""
        return max(self.names, key=lambda m: self.rates[m])

    def backbone(self, split: MultimodalDataset | None = None) -> GenericBackbone:
        """The network, always with the same initial weights."""
        torch.manual_seed(self.seed)
        return GenericBackbone.for_data(self.train if split is None else split, width=self.setup.width)

    def train_alone(self, name: str, config: TrainConfig, complete: bool = False) -> GenericBackbone:
        """A network of one modality, trained on the samples that have it (complete: as if nothing were missing)."""
        source = self.splits if complete else {"train": self.train, "valid": self.valid}
        own = {k: _having(source[k], name) for k in ("train", "valid")}
        net = self.backbone(own["train"])
        fit(JointTraining(net), own["train"], own["valid"], config)
        return net

    def accuracy(self, net: nn.Module, name: str) -> float:
        """Of a network of one modality, on the complete test data."""
        batch = self.test.select([name])
        return (net.eval()(batch).argmax(-1) == batch.target).float().mean().item()

    @cached_property
    def alone(self) -> dict[str, GenericBackbone]:
        """A network of each modality alone, with as many updates as the joint one."""
        return {name: self.train_alone(name, self.same_steps) for name in self.names}

    @cached_property
    def upper(self) -> UpperBounds:
        """What these get right of the training samples."""
        return UpperBounds.from_models(self.alone, self.train)

    def cross_fitted(self, folds: int = 3) -> UpperBounds:
        """Bounds of training samples by networks that have not seen them."""
        return UpperBounds.trained(self.backbone(), self.train, self.valid, self.config, folds=folds)

    def cycle(self) -> tuple[pd.DataFrame, Tensor]:
        """One network of everything beside one of each modality; and the joint one's accuracy by coalition."""
        watch, joint = Gradients(), self.backbone()
        fit(JointTraining(joint), self.train, self.valid, self.config, callbacks=[watch])
        right = coalitions.subset_values(joint, self.test).mean(0).cpu()
        table = {
            "training samples": self.train.present.sum(0).tolist(),
            "gradient": np.mean(watch.norms, axis=0),
            "in the joint network": [right[1 << m].item() for m in range(len(self.names))],
            "its own network": [self.accuracy(self.alone[m], m) for m in self.names],
            "Shapley value": coalitions.shapley_values(right).tolist(),
        }
        return pd.DataFrame(table, index=list(self.names)), right

    def mce(self, bounds: UpperBounds | None = None, split: MultimodalDataset | None = None, **options: Any) -> MCE:
        """MCE on the network; the bounds are those of `upper` unless they are given or not needed."""
        if options.get("state_factor", True) and bounds is None:
            bounds = self.upper
        return MCE(self.backbone(split), bounds, hidden=2 * self.setup.width, **options)

    def variants(self) -> dict[str, dict[str, Any]]:
        """The three networks under watch: their options."""
        terms = loss_weights(self.setup.weights)
        return {"baseline": TASK_ALONE, "MCE without B": {**terms, "state_factor": False}, "MCE": terms}

    def watched(self, capability: bool = False) -> dict[str, Watched]:
        """The three networks, trained on the same samples in the same order, and what was seen of them."""
        found = {}
        for name, options in self.variants().items():
            model, factors = self.mce(**options), Factors()
            probes = Capability(self) if capability else None
            history = fit(
                model, self.train, self.valid, self.config, callbacks=[factors, *([probes] if probes else [])]
            )
            found[name] = Watched(model.to(self.setup.device), history, factors, probes)
        return found

    def by_subset(self, found: dict[str, Watched]) -> pd.DataFrame:
        """Test accuracy of each network from every subset of the modalities, and the mean."""
        M = len(self.names)
        table = pd.DataFrame(
            {k: coalitions.subset_values(w.model.evaluator, self.test).mean(0)[1:].cpu() for k, w in found.items()}
        )
        table.index = [" + ".join(self.names[m] for m in range(M) if k >> m & 1) for k in range(1, 2**M)]
        table.loc["mean"] = table.mean()
        return table


class Watched:
    """A network, its history, the factors of its steps, and the probes of its epochs where they were asked for."""

    def __init__(self, model: MCE, history: Any, factors: Factors, probes: Capability | None):
        self.model, self.history, self.factors, self.probes = model, history, factors, probes


def _having(split: MultimodalDataset, name: str) -> MultimodalDataset:
    own = split.select([name])
    return own.subset(own.present[:, 0].nonzero()[:, 0])


def copies_of(split: MultimodalDataset, count: int) -> MultimodalDataset:
    """A data set whose modalities are all the same: everything there is, ``count`` times."""
    x = torch.cat([split.data.features[m].flatten(1) for m in split.modalities], 1)
    arrays = {f"copy {k + 1}": x for k in range(count)}
    return MultimodalDataset.from_arrays(arrays, split.target, ids=split.ids, classes=split.info["outputs"])


# ------------------------------------------------------------------ capability


class Capability:
    """A callback: after every epoch a linear probe of each encoder, and the accuracy over all subsets."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.everything = {k: problem.splits[k][:].to(problem.setup.device) for k in ("train", "valid")}
        self.probes: list[dict[str, dict[str, float]]] = []
        self.scores: list[float] = []

    def on_epoch_end(self, state: Any) -> None:
        with coalitions.scoring(state.method):
            self.probes.append({m: self.probe(state.method.backbone.encode, m) for m in self.problem.names})
            right = coalitions.subset_values(state.method.evaluator, self.problem.test)
            self.scores.append(right.mean(0)[1:].mean().item())

    @torch.no_grad()
    def probe(self, encode: Any, name: str, ridge: float = 1e-2) -> dict[str, float]:
        """Accuracy of ridge regression on this modality's frozen features, fitted where the training data have it."""
        problem, train = self.problem, self.everything["train"]
        there = problem.train.present[:, problem.names.index(name)].to(train.target.device)
        x = {
            "train": encode(train)[name][there],
            "valid": encode(self.everything["valid"])[name],
            "test": encode(problem.test)[name],
        }
        mean, scale = x["train"].mean(0), x["train"].std(0).clamp_min(1e-6)
        x = {k: torch.cat([(v - mean) / scale, torch.ones_like(v[:, :1])], 1) for k, v in x.items()}
        classes = nn.functional.one_hot(train.target[there], int(problem.test.target.max()) + 1).float()
        gram = x["train"].T @ x["train"] + ridge * len(classes) * torch.eye(x["train"].shape[1], device=there.device)
        solution = torch.linalg.solve(gram, x["train"].T @ classes)
        hits = lambda k, y: ((x[k] @ solution).argmax(1) == y).float().mean().item()
        return {"valid": hits("valid", self.everything["valid"].target), "test": hits("test", problem.test.target)}


@torch.no_grad()
def fused_quality(problem: Problem, model: MCE) -> dict[str, float]:
    """Table 7 of the fused features of all subsets of the test data.

    within: mean distance of a sample to its class mean; between: mean distance of two class means; consistency: mean
    cosine of a sample with its class mean.
    """
    net, M, found = model.evaluator.eval(), len(problem.names), []
    for mask in coalitions.coalition_masks(M, problem.test.device)[1:]:
        batch = problem.test.drop(present=mask)
        found.append(net.fuse(net.encode(batch), batch.present, batch).flatten(1))
    z, y = torch.cat(found), problem.test.target.repeat(2**M - 1)
    means = torch.stack([z[y == c].mean(0) for c in y.unique()])
    own = means[torch.searchsorted(y.unique(), y)]
    between, within = torch.pdist(means).mean().item(), (z - own).norm(dim=1).mean().item()
    cosine = nn.functional.cosine_similarity(z, own).mean().item()
    return {"within": within, "between": between, "ratio": within / between, "consistency": cosine}


@torch.no_grad()
def mask_ignored(problem: Problem, model: MCE) -> pd.DataFrame:
    """Accuracy from each modality alone, and as an evaluation has it that makes the zeros and passes the rest as well.

    The release's evaluation on AV-MNIST builds zeros for the sounds of "image only" and hands the model the sounds.
    """
    net, test = model.evaluator.eval(), problem.test
    right = lambda batch: (net(batch).argmax(-1) == test.target).float().mean().item()
    everything = right(test)
    rows = {m: (right(test.drop(present=[m])), everything) for m in problem.names}
    return pd.DataFrame(rows, index=["the others dropped", "mask ignored"]).T


# ------------------------------------------------------------------ cost

SHAPES = {"audio": (64, 130), "vision": (50, 342), "language": (22, 1024)}  # of the paper's IEMOCAP model
JOINT = "joint training"  # the network without the reconstruction module
STEPS: dict[str, dict[str, Any]] = {
    "baseline": TASK_ALONE,
    "MCE, exact": {},
    "MCE, 200 orders": {"permutations": 200},
    "MCE, 3 subsets a step": {"subsets": 3},
    JOINT: {},
}


def _batch(n: int) -> tuple[MultimodalBatch, UpperBounds]:
    """n samples of these shapes under setting a, and bounds for them."""
    g = torch.Generator().manual_seed(0)
    present = missing.exact_count_mask(n, (0.2, 0.5, 0.8), g)
    features = {m: torch.randn(n, *shape, generator=g) for m, shape in SHAPES.items()}
    batch = MultimodalBatch(features, present, torch.randint(4, (n,), generator=g), ids=torch.arange(n))
    return batch, UpperBounds((torch.rand(n, 3, generator=g) < 0.6).float(), torch.arange(n), tuple(SHAPES))


def _step(method: nn.Module, batch: MultimodalBatch) -> None:
    loss = sum(method(batch).losses.values())
    method.zero_grad()
    loss.backward()  # type: ignore[union-attr]


def _operations(run: Any) -> float:
    """Floating-point operations of ``run()`` in 1e9; fused LSTMs would not be counted."""
    from torch.utils.flop_counter import FlopCounterMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
            run()
    return counter.get_total_flops() / 1e9


def _model(batch: MultimodalBatch, bounds: UpperBounds, name: str) -> nn.Module:
    """One of `STEPS` on the paper's network for the batch: of IEMOCAP with three modalities, of AV-MNIST with two."""
    torch.manual_seed(0)
    three, options = len(batch.modalities) == 3, STEPS[name]
    net = MMINBackbone(MMINConfig()) if three else AVMNISTBackbone(AVMNISTConfig())
    if name == JOINT:
        return JointTraining(net).train()
    bound = bounds if options.get("state_factor", True) else None
    return MCE(net, bound, present=batch.present, hidden=2048 if three else 1024, **options).train()


def step_ratios(n: int = 8) -> dict[str, tuple[float, float]]:
    """Operations of MCE's exact step over those of the same network's with f_rec, and of joint training without it.

    At the sizes of the paper's IEMOCAP and AV-MNIST models, the latter with a sound in one of three samples.
    """
    g = torch.Generator().manual_seed(0)
    features = {"image": torch.randn(n, 1, 28, 28, generator=g), "audio": torch.randn(n, 1, 20, 20, generator=g)}
    present = torch.ones(n, 2, dtype=torch.bool)
    present[:, 1] = torch.arange(n) % 3 == 0
    pairs = MultimodalBatch(features, present, torch.arange(n) % 10, ids=torch.arange(n))
    found = {}
    for name, batch, bounds in (
        ("IEMOCAP", *_batch(n)),
        ("AV-MNIST", pairs, UpperBounds(torch.ones(n, 2), torch.arange(n), pairs.modalities)),
    ):
        methods = {step: _model(batch, bounds, step) for step in ("MCE, exact", "baseline", JOINT)}
        mce, plain, joint = (_operations(lambda m=m, b=batch: _step(m, b)) for m in methods.values())
        found[name] = mce / plain, mce / joint
    return found


def cost(n: int, repeats: int) -> pd.DataFrame:
    """Best time and operations of a step of each of `STEPS` on a batch of n samples, and both over the baseline's."""
    batch, bounds = _batch(n)
    rows = []
    for name in STEPS:
        method = _model(batch, bounds, name)
        _step(method, batch)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            _step(method, batch)
            seconds.append(time.perf_counter() - start)
        operations = _operations(lambda method=method: _step(method, batch))
        rows.append({"step": name, "ms": 1000 * min(seconds), "GFLOPs": operations})
    table = pd.DataFrame(rows)
    for column in ("ms", "GFLOPs"):
        for other in ("baseline", JOINT):
            table[f"{column} / {other}"] = table[column] / table[column][table["step"] == other].iloc[0]
    return table


def growth(most: int, few: int = 4) -> pd.DataFrame:
    """Operations of a step over the baseline's for 2 to ``most`` modalities, on ``few`` samples.

    With an LSTM for each modality and with encoders that cost nothing; with all subsets and with seven drawn ones.
    """
    g = torch.Generator().manual_seed(0)
    sound, encoder = torch.randn(few, *SHAPES["audio"], generator=g), MMINBackbone(MMINConfig()).encoders["audio"]
    there = torch.ones(few, len(sound[0])).bool()
    lstm = _operations(lambda: copy.deepcopy(encoder)(sound, there).sum().backward())
    rows = []
    for players in range(2, most + 1):
        vectors = {f"m{k}": torch.randn(few, 2, generator=g) for k in range(players)}
        split = MultimodalDataset.from_arrays(vectors, torch.zeros(few).long(), classes=4)
        bounds = UpperBounds(torch.ones(few, players), split.ids, split.modalities)
        found = {}
        for name, options in (("baseline", TASK_ALONE), ("all", {}), ("drawn", {"subsets": 7})):
            bound = None if name == "baseline" else bounds
            net = GenericBackbone.for_data(split, width=128)
            method = MCE(net, bound, hidden=2048, present=split.present, **options).train()  # type: ignore[arg-type]
            found[name] = _operations(lambda method=method, split=split: _step(method, split[:]))
        ratio = lambda name, free, found=found: (found[name] + free) / (found["baseline"] + free)
        rows.append(
            {
                "M": players,
                "subsets": 2**players - 1,
                "all, LSTMs": ratio("all", players * lstm),
                "7 drawn, LSTMs": ratio("drawn", players * lstm),
                "all, free encoders": ratio("all", 0.0),
            }
        )
    return pd.DataFrame(rows)
