"""The runs behind the DREAM chapter's tables: ``python -m book.studies.dream TABLE... [--data-root FOLDER]``.

Each function gives a table's cells: a label per axis -> the configs of that cell, one a seed. The command fills
``book/results/dream-TABLE.csv`` with what is not there yet; the chapter reads the results of the same configs. Within a
table all methods share masks, seeds, steps, batch size and learning rate. DREAM is 32 wide here, not 200, and so is
CubeMLP: at the paper's width a step takes over a second on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from book.support import experiments, results
from book.support.stored import Stored
from book.support.sweep import RESULTS, UNEQUAL, Cells, Config, Sweep
from mmlib import MultimodalDataset, backbones, data
from mmlib.missing import MissingPlan

SEEDS = (0, 1, 2, 3, 4)
WIDTH: Config = {"width": 32, "heads": 4}
TRAIN: Config = {"epochs": 12, "batch_size": 64, "lr": 3e-3}
ON_DIGITS: Config = {**TRAIN, "epochs": 36}  # twelve are enough on synthetic and MOSI, but not there: table `longer`
DATA: dict[str, Config] = {
    "digits": {"data": "digits"},
    "mfeat": {"data": "mfeat"},
    "synthetic": {"data": "synthetic", "data_options": {**UNEQUAL, "sizes": [1000, 300, 1000]}},
    "mosi": {"data": "mosi", "data_options": {"max_frames": 16}, "train": {**TRAIN, "lr": 1e-3}},
    "avmnist": {"data": "avmnist", "data_options": {"scaling": "train"}},
}
METHODS: dict[str, Config] = {
    "CubeMLP": {"method": "JointTraining", "backbone": "CubeMLPBackbone", "backbone_options": {"width": 32}},
    "evaluator alone": {"method": "JointTraining", "backbone": "Table3Evaluator"},
    "modality dropout": {
        "method": "JointTraining",
        "backbone": "Table3Evaluator",
        "method_options": {"modality_dropout": 0.5},
    },
    "DREAM": {"method": "DREAM", "backbone": "Table3Evaluator", "method_options": WIDTH},
}
SOME_MISSING: Config = {"kind": "bernoulli", "rates": 0.3}  # in training, per sample and modality
ETAS = (0.3, 0.6, 0.9)
FRAME_RATES = (0.0, 0.3, 0.6, 0.9)
DETECTION_RATES = (0.1, 0.3, 0.5, 0.7)
NETS = {
    "table3": "Table3Evaluator",
    "corrkd": "CorrKDEvaluator",
    "selfmm": "SelfMMEvaluator",
    "mlp": "MLPEvaluator",
}
# Figures 4 and 5: what is changed of DREAM
PARTS: dict[str, Config] = {
    "DREAM": {},
    "w/o dynamic enhancement": {"enhance": "all"},
    "w/o MMFM": {"masked_fusion": False},
}
EVALUATORS: dict[str, Config] = {
    "Self-MM": {"evaluator": "SelfMMEvaluator"},
    "insufficiently trained": {"evaluator_epochs": 2},
    "MLP": {"evaluator": "MLPEvaluator"},
}


def _config(source: str, method: str, seed: int, options: Config | None = None, **changes: Any) -> Config:
    made: Config = {"train": TRAIN, **DATA[source], **METHODS[method], "seed": seed, "profile": "book"}
    if options:
        made["method_options"] = {**made.get("method_options", {}), **options}
    return {**made, "train_plan": SOME_MISSING, "conditions": "subsets", **changes}


def _table1(source: str) -> Cells:
    return {(name,): [_config(source, name, seed) for seed in SEEDS] for name in METHODS}


def table1_synthetic() -> Cells:
    """Table 1 on synthetic, modalities missing at .3 in training, tested on the seven subsets: (method,)."""
    return _table1("synthetic")


def table1_mosi() -> Cells:
    """The same on CMU-MOSI with public features: (method,)."""
    return _table1("mosi")


def _mixed(source: str, etas: tuple[float, ...], **changes: Any) -> Cells:
    """Appendix A.4: modalities and frames are missing in a fraction eta of the samples, in training and in testing."""
    cells: Cells = {}
    for eta in etas:
        plan = {"kind": "heterogeneous", "rates": eta}
        here: Config = {"train_plan": plan, "conditions": {"mixed": plan}, **changes}
        for name in ("CubeMLP", "evaluator alone"):
            cells[name, str(eta)] = [_config(source, name, seed, **here) for seed in SEEDS[:3]]
        for name, options in {**PARTS, **EVALUATORS}.items():
            cells[name, str(eta)] = [_config(source, "DREAM", seed, options, **here) for seed in SEEDS[:3]]
    return cells


def mixed_digits() -> Cells:
    """Figures 4 and 5 on digits: (what, eta)."""
    return _mixed("digits", ETAS, train=ON_DIGITS)


def mixed_synthetic() -> Cells:
    """Figures 4 and 5 on synthetic: (what, eta)."""
    return _mixed("synthetic", ETAS[::2])


def _frames(source: str) -> Cells:
    cells: Cells = {}
    for rate in FRAME_RATES:
        plan = {"kind": "frames", "rates": rate, "allow_empty": True}
        for name in ("CubeMLP", "evaluator alone", "DREAM"):
            cells[name, str(rate)] = [
                _config(source, name, seed, train_plan=plan, conditions={"frames": plan}) for seed in SEEDS[:3]
            ]
    return cells


def fig3_avmnist() -> Cells:
    """Figure 3 on AV-MNIST, frames missing at the same rate in training and testing: (method, rate)."""
    return _frames("avmnist")


def fig3_synthetic() -> Cells:
    """Figure 3 on synthetic: (method, rate)."""
    return _frames("synthetic")


def _longer(source: str, methods: tuple[str, ...]) -> Cells:
    train = {**TRAIN, **DATA[source].get("train", {})}
    return {
        (name, str(epochs)): [_config(source, name, seed, train={**train, "epochs": epochs}) for seed in SEEDS[:3]]
        for epochs in (train["epochs"], 3 * train["epochs"])
        for name in methods
    }


def longer() -> Cells:
    """Are twelve epochs enough? The same as Table 1 on digits, with three times as many: (method, epochs)."""
    return _longer("digits", ("CubeMLP", "evaluator alone", "DREAM"))


def longer_synthetic() -> Cells:
    """Table 1 on synthetic with three times the epochs: (method, epochs)."""
    return _longer("synthetic", tuple(METHODS))


def longer_mosi() -> Cells:
    """Table 1 on CMU-MOSI with three times the epochs: (method, epochs)."""
    return _longer("mosi", tuple(METHODS))


def interpretations() -> Cells:
    """What the paper does not say, one change at a time on digits: (what,)."""
    changes: dict[str, Config] = {
        "paper": {},
        "no distillation": {"lambda_distill": 0.0},
        "lambda = 1": {"lambda_distill": 1.0},
        "w + log(PSS + 1)": {"mask_mode": "add_log"},
        "PAS clipped": {"pas_target": "clipped"},
        "Eq. 12 on w'": {"distill_on": "masked"},
        "linear w, LN with parameters": {"preset": "text"},
        "repeats not tied": {"tie_enhance": False},
        "sequential targets": {"enhance_order": "sequential"},
        "Z along features": {"concat": "feature"},
        "no enhancement": {"enhance": "none"},
        "majority from nothing": {"empty": "majority"},
        "evaluator with modality dropout": {"evaluator_dropout": 0.5},
        "D = 1": {"repeats": 1},
    }
    cells: Cells = {
        (what,): [_config("digits", "DREAM", seed, options, train=ON_DIGITS) for seed in SEEDS[:3]]
        for what, options in changes.items()
    }
    plans = {"nothing missing in training": None, "A.4 in training": {"kind": "heterogeneous", "rates": 0.6}}
    for what, plan in plans.items():
        cells[what,] = [_config("digits", "DREAM", seed, train_plan=plan, train=ON_DIGITS) for seed in SEEDS[:3]]
    return cells


def interpretations_synthetic() -> Cells:
    """How a score becomes a prediction, on synthetic: (what,)."""
    cells: Cells = {("paper",): [_config("synthetic", "DREAM", seed) for seed in SEEDS[:3]]}
    for how in ("sign_gt", "round7"):
        cells[how,] = [_config("synthetic", "DREAM", seed, {"discretize": how}) for seed in SEEDS[:3]]
    return cells


NO_SCORES: Config = {"enhance": "all", "masked_fusion": False}


def _inexact(source: str, orders: tuple[int, ...], **changes: Any) -> Cells:
    """Scores from some orders of arrival, every order, or none at all: (orders,)."""
    options: dict[str, Config] = {"all": {}, **{str(n): {"permutations": n} for n in orders}, "no scores": NO_SCORES}
    return {
        (what,): [_config(source, "DREAM", seed, option, **changes) for seed in SEEDS[:3]]
        for what, option in options.items()
    }


SIX_SETS: dict[str, list[str]] = {  # what the nets of six views are tested on; all 63 subsets would be slow
    "one view": ["fou"],
    "two views": ["kar", "mor"],
    "three views": ["fou", "zer", "mor"],
    "six views": ["fou", "fac", "kar", "pix", "zer", "mor"],
}


def inexact_mfeat() -> Cells:
    """Monte-Carlo scores with the six views of mfeat: (orders,)."""
    return _inexact("mfeat", (1, 4), conditions=SIX_SETS, train={**TRAIN, "epochs": 6})


def inexact_digits() -> Cells:
    """Monte-Carlo scores with the three views of digits: (orders,)."""
    return _inexact("digits", (1, 2), train=ON_DIGITS)


# --- fair trials: every method at its best of a printed grid ----------------------------------------------------------

TUNING_SEEDS = (100, 101)  # the grids' own: all of a grid, then its finalists; no table is made of them
FINALISTS = 2  # of each method
ANY_SUBSET: Config = {"kind": "bernoulli", "rates": 0.5}  # every non-empty subset equally often: what a table reports
DROPOUTS = (0.0, 0.3, 0.5)
AS_TRAINED: Config = {"as in training": SOME_MISSING}
OWN_NET: Config = {"enhance": "none", "masked_fusion": False}  # DREAM's network with the task loss alone
# DREAM and its network have as many epochs as the evaluator that they are made with; the evaluator alone has both
EPOCHS = {"digits": 36}


def _tuned(source: str, method: str, options: Config, seed: int, train: Config) -> Config:
    train = {**TRAIN, **DATA[source].get("train", {}), **train}
    given = {k: v for k, v in options.items() if k != "modality_dropout" or v}
    made = {k: v for k, v in METHODS[method].items() if k != "method_options"}
    if method == "DREAM":
        given = {**WIDTH, **given}
        if dropout := given.get("modality_dropout"):
            given["evaluator_dropout"] = dropout
    config = {"train": TRAIN, **DATA[source], **made, **({"method_options": given} if given else {})}
    return {
        **config, "seed": seed, "profile": "book", "train_plan": SOME_MISSING, "train": train,
        "conditions": ["subsets", AS_TRAINED],
    }  # fmt: skip


def grid(source: str) -> dict[tuple[str, ...], Callable[[int], Config]]:
    """What is tried of each method: (method, options in words) -> the config of a seed."""
    found: dict[tuple[str, ...], Callable[[int], Config]] = {}

    def add(name: str, words: str, method: str, options: Config, rounds: int = 1, **train: Any) -> None:
        train = {"epochs": rounds * EPOCHS[source], **train}
        found[name, words] = lambda seed: _tuned(source, method, options, seed, train)

    base = {**TRAIN, **DATA[source].get("train", {})}["lr"]
    for rate in DROPOUTS:
        for words, lr in (("", base), (", a third of lr", round(base / 3, 6))):
            options = {"modality_dropout": rate}
            add("evaluator alone", f"dropout {rate}{words}", "evaluator alone", options, 2, lr=lr)
        for given in ("linear", "encodings") if rate < DROPOUTS[-1] else ("encodings",):
            reads: Config = {} if given == "linear" else {"input": given}
            net = {**OWN_NET, **reads, "modality_dropout": rate}
            add("DREAM's net alone", f"dropout {rate}, {given}", "DREAM", net)
            whole = {**reads, "modality_dropout": rate, "lambda_distill": 1.0}
            add("DREAM", f"dropout {rate}, {given}, lambda 1", "DREAM", whole)
            if rate == DROPOUTS[1] and reads:
                add("DREAM", f"dropout {rate}, {given}, lambda 0.1", "DREAM", {**reads, "modality_dropout": rate})
    return found


def _grid(source: str, folder: Path = RESULTS) -> Cells:
    first, second = TUNING_SEEDS
    cells: Cells = {label: [make(first)] for label, make in grid(source).items()}
    for label in _finalists(source, cells, folder):
        cells[label] = [*cells[label], _final(source, label, second)]
    return cells


def _final(source: str, label: tuple[str, ...], seed: int) -> Config:
    """A run whose epoch, and which among finalists, is chosen by the mean over subsets."""
    return {**grid(source)[label](seed), "valid_plan": ANY_SUBSET}


def _finalists(source: str, cells: Cells, folder: Path) -> list[tuple[str, ...]]:
    """Each method's best few by the first seed, on a validation split with gaps as in training; none before it ran."""
    table = Stored(path(f"grid_{source}", folder), cells, command(f"grid_{source}"))
    left = [label for label in cells if table.scores(label, "valid")]
    found: list[tuple[str, ...]] = []
    if len(left) < len(cells):
        return found
    for name in dict.fromkeys(name for name, _ in cells):
        for _ in range(FINALISTS):
            found.append(table.best(label for label in left if label[0] == name and label not in found))
    return found


def chosen(source: str, folder: Path = RESULTS) -> dict[str, tuple[str, ...]]:
    """Each method's best finalist, by the second seed on a validation split with all subsets in it."""
    last = {label: runs[1:] for label, runs in _grid(source, folder).items() if len(runs) == len(TUNING_SEEDS)}
    table = Stored(path(f"grid_{source}", folder), last, command(f"grid_{source}"))
    mine = {name: [label for label in last if label[0] == name] for name, _ in last}
    return {
        name: table.best(some) for name, some in mine.items() if all(table.scores(label, "valid") for label in some)
    }


def grid_digits() -> Cells:
    """What is tried of each method on digits: (method, options)."""
    return _grid("digits")


def tuned_digits() -> Cells:
    """Each method at its best of the grid on digits, and the evaluator with twice the updates: (method,)."""
    cells = {(name,): [_final("digits", label, seed) for seed in SEEDS] for name, label in chosen("digits").items()}
    longer = [
        {**c, "train": {**c["train"], "epochs": 4 * EPOCHS["digits"]}} for c in cells.get(("evaluator alone",), [])
    ]
    return {**cells, ("evaluator, twice as long",): longer} if longer else cells


def fixed_digits() -> Cells:
    """The same methods at one recipe for all: (method,)."""
    given: dict[str, tuple[str, Config | None]] = {
        "evaluator alone": ("evaluator alone", None),
        "DREAM's net alone": ("DREAM", OWN_NET),
        "DREAM": ("DREAM", None),
    }
    return {
        (name,): [_config("digits", method, seed, options, train=ON_DIGITS) for seed in SEEDS]
        for name, (method, options) in given.items()
    }


def readings_digits() -> Cells:
    """DREAM at its best recipe on digits, and other readings of it: (reading,)."""
    if "DREAM" not in (best := chosen("digits")):
        return {}
    tuned = [_final("digits", best["DREAM"], seed) for seed in SEEDS]
    changes: dict[str, Config] = {"as tuned": {}, "keys of what contributes": {"keys": "available"}}
    return {
        (what,): [{**config, "method_options": {**config["method_options"], **change}} for config in tuned]
        for what, change in changes.items()
    }


# --- runs that are no training of one method --------------------------------------------------------------------------


def detection() -> Cells:
    """Does PSS = 0 find what is missing? (data, evaluator)."""
    cells: Cells = {}
    for source in ("synthetic", "confounded", "digits", "mosi", "avmnist"):
        for name, evaluator in (("table3", NETS["table3"]), ("weak", NETS["table3"]), ("mlp", NETS["mlp"])):
            if name != "table3" and source != "digits":
                continue
            train = DATA.get(source, {}).get("train", TRAIN)
            train = {**train, "epochs": 2} if name == "weak" else train
            cells[source, name] = [
                {
                    "method": "detection",
                    "data": source,
                    "data_options": DATA.get(source, {}).get("data_options", {}),
                    "backbone": evaluator,
                    "train_plan": SOME_MISSING,
                    "rates": list(DETECTION_RATES),
                    "train": train,
                    "seed": seed,
                    "profile": "book",
                }
                for seed in SEEDS
            ]
    return cells


def confounded(seed: int = 0, sizes: tuple[int, int, int] = (1000, 300, 1000)) -> dict[str, MultimodalDataset]:
    """Four modalities whose use is known: language and audio each know a bit of the class; *echo* is language again
    with more noise, so that given language it adds nothing; *useless* is noise alone."""
    options = {"modalities": ["language", "audio"], "shared": 0, "xor": None, "classes": 3, "sizes": sizes}
    splits = data.load("synthetic", split_seed=seed, frames=6, widths=5, **options)
    made = {}
    for k, (name, split) in enumerate(splits.items()):
        g = torch.Generator().manual_seed(1000 * seed + k)
        x = {m: split.data.features[m] for m in split.modalities}
        noise = lambda g=g, x=x: torch.randn(x["language"].shape, generator=g)
        features = {**x, "echo": x["language"] + noise(), "useless": noise()}
        made[name] = MultimodalDataset.from_arrays(
            features, split.target, ids=split.ids, classes=3, info={**split.info, "name": "confounded"}
        )
    return made


def load(config: Config) -> dict[str, MultimodalDataset]:
    """The splits of a config, its own data set included."""
    if config["data"] == "confounded":
        return confounded()
    return data.load(config["data"], config.get("data_root"), **config.get("data_options", {}))


def trained_evaluator(config: Config, splits: dict[str, MultimodalDataset]) -> Any:
    """The config's evaluator in eval mode, trained on what its plan leaves; that training split; that valid split."""
    from mmlib.baselines import JointTraining
    from mmlib.training import TrainConfig, fit, random_state

    plan = MissingPlan.from_dict({"seed": config["seed"], **config["train_plan"]})
    train, valid = (plan.draw(splits[k]).apply(splits[k]) for k in ("train", "valid"))
    settings = TrainConfig(seed=config["seed"], device="cpu", **config["train"])
    with random_state(config["seed"]):
        net = getattr(backbones, config["backbone"]).for_data(train)
    fit(JointTraining(net), train, valid, settings)
    return net.eval(), train, valid


def pss_counts(dream: Any, split: MultimodalDataset) -> tuple[np.ndarray, np.ndarray]:
    """How often each value of PSS occurs: values [V], counts [M, 2, V] where it is there, where it is missing."""
    pss = torch.cat(
        [dream.contributions(split[i : i + 500].replace(target=None)).pss for i in range(0, len(split), 500)]
    )
    values, place = pss.double().mul(1e6).round().unique(return_inverse=True)
    missing = (~split.present).long()
    counts = torch.zeros(pss.shape[1], 2, len(values), dtype=torch.int64)
    for m in range(pss.shape[1]):
        counts[m].view(-1).index_add_(0, missing[:, m] * len(values) + place[:, m], torch.ones_like(place[:, m]))
    return (values / 1e6).numpy(), counts.numpy()


def run_detection(config: Config) -> results.Results:
    """A run of `detection`: PSS of the test split with modalities missing at each rate, beside the truth."""
    from mmlib.methods import DREAM

    start = time.perf_counter()
    splits = load(config)
    net, train, _ = trained_evaluator(config, splits)
    dream = DREAM.for_data(train, net, width=8, heads=1)
    rows, kept = results.Results(), {}
    for rate in config["rates"]:
        plan = MissingPlan("bernoulli", rates=rate, seed=config["seed"])
        split = plan.draw(splits["test"]).apply(splits["test"])
        values, counts = pss_counts(dream, split)
        kept[f"values {rate}"], kept[f"counts {rate}"] = values, counts
        found, missing = counts[:, :, values == 0].sum((0, 2)), counts.sum((0, 2))
        scores = {
            "precision": found[1] / max(found.sum(), 1),
            "recall": found[1] / max(missing[1], 1),
            "missing": missing[1] / missing.sum(),
        }
        rows += [
            {"condition": f"missing at {rate}", "metric": m, "value": float(v), "n": len(split)}
            for m, v in scores.items()
        ]
    for row in rows:
        row |= {k: config[k] for k in ("method", "data", "backbone", "seed", "profile")}
        row |= {"seconds": round(time.perf_counter() - start, 3), "device": "cpu, 1 thread"}
    rows.predictions = kept
    return rows


def mask() -> Cells:
    """What Eq. 10 does in trained models: (data,)."""
    return {
        (source,): [{**_config(source, "DREAM", seed), "method": "mask"} for seed in SEEDS[:3]]
        for source in ("digits", "synthetic")
    }


def mask_facts(w: torch.Tensor, pss: torch.Tensor) -> dict[str, float]:
    """What the mask of Eq. 10 does to weights w for scores PSS, [n, M] each."""
    from mmlib.methods.dream import mask_weights
    from mmlib.methods.released.dream import add_log_weights

    before, after = torch.softmax(w, -1), torch.softmax(mask_weights(w, pss), -1)
    added = torch.softmax(add_log_weights(w, pss), -1)
    zero = pss == 0
    mixed = zero.any(-1) & ~zero.all(-1)  # where some modality is enhanced and some is not
    fraction = lambda x: float(x.double().mean()) if x.numel() else float("nan")
    of_zero = lambda weights: (weights * zero).sum(-1)[mixed]
    return {
        "negative w": fraction(w < 0),
        "negative w, PSS above 0": fraction((w < 0)[~zero]),
        "mixed samples": fraction(mixed),
        "enhanced gain weight": fraction(of_zero(after) > of_zero(before) + 1e-7),
        "enhanced gain weight, add_log": fraction(of_zero(added) > of_zero(before) + 1e-7),
        "weight of the enhanced": fraction(of_zero(after)),
        "weight of the enhanced, softmax(w)": fraction(of_zero(before)),
        "weight of the enhanced, add_log": fraction(of_zero(added)),
    }


def run_mask(config: Config) -> results.Results:
    """A run of `mask`: the signs of w on the test split under the plan of training, and what becomes of the weights."""
    from mmlib.methods import DREAM
    from mmlib.training import TrainConfig, fit, random_state

    start = time.perf_counter()
    splits = load(config)
    net, train, valid = trained_evaluator(config, splits)
    with random_state(config["seed"]):
        dream = DREAM.for_data(train, net, **config["method_options"])
    dream.precompute(train)
    fit(dream, train, valid, TrainConfig(seed=config["seed"], device="cpu", **config["train"]))
    plan = MissingPlan.from_dict({"seed": config["seed"], **config["train_plan"]})
    test = plan.draw(splits["test"]).apply(splits["test"])
    w, pss = raw_weights(dream, test)
    common = {k: config[k] for k in ("method", "data", "backbone", "seed", "profile")}
    common |= {"seconds": round(time.perf_counter() - start, 3), "device": "cpu, 1 thread", "n": len(test)}
    return results.Results(
        {**common, "condition": "as in training", "metric": k, "value": v} for k, v in mask_facts(w, pss).items()
    )


def raw_weights(dream: Any, split: MultimodalDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """w of section 3.5 and PSS of every sample, [n, M] each, in eval mode."""
    found: list[torch.Tensor] = []
    handle = dream.weigh.register_forward_hook(lambda _module, _given, out: found.append(out.detach().cpu()))
    device = next(dream.parameters()).device
    try:
        dream.eval()
        with torch.no_grad():
            parts = [split[i : i + 500].replace(target=None).to(device) for i in range(0, len(split), 500)]
            pss = []
            for part in parts:
                pss.append(dream.contributions(part).pss.cpu())
                dream(part)
    finally:
        handle.remove()
    return torch.cat(found), torch.cat(pss)


COST_SIZES: dict[str, Config] = {
    # the paper's for CMU-MOSI: word-aligned, 50 frames; the evaluator of its Table 3
    "paper": {"shapes": {"language": [50, 300], "audio": [50, 5], "vision": [50, 20]}, "width": 200, "heads": 10},
    "small": {"shapes": {"language": [6, 6], "audio": [8, 4], "vision": [4, 5]}, "width": 32, "heads": 4},
}


def cost() -> Cells:
    """Seconds of a step and of a test batch: (size,)."""
    return {
        (size,): [
            {"method": "cost", **sizes, "batch": 32, "steps": 4, "seed": seed, "profile": "book"} for seed in (0,)
        ]
        for size, sizes in COST_SIZES.items()
    }


def timed(action: Callable[[], Any], repeats: int) -> float:
    """The least seconds of so many repetitions, after one that does not count."""
    action()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return min(found)


class _Count(torch.utils._python_dispatch.TorchDispatchMode):
    """How many operations are dispatched: on a GPU a small network takes as long as it takes to launch them."""

    total = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return call(*args, **(kwargs or {}))


def _cost_nets(shapes: dict[str, Any], width: int, heads: int, batch: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """Random sequences of these shapes with scores; an evaluator, a CubeMLP and a DREAM for them."""
    from mmlib.backbones import CubeMLPBackbone, Table3Evaluator
    from mmlib.methods import DREAM

    g = torch.Generator().manual_seed(seed)
    features = {m: torch.randn(batch, *shape, generator=g) for m, shape in shapes.items()}
    split = MultimodalDataset.from_arrays(features, torch.randn(batch, generator=g).clamp(-3, 3))
    split.info.update(task="regression", outputs=1)
    torch.manual_seed(seed)
    net, cube = Table3Evaluator.for_data(split), CubeMLPBackbone.for_data(split, width=min(width, 128))
    dream = DREAM.for_data(split, Table3Evaluator.for_data(split).eval(), width=width, heads=heads)
    return split, net, cube, dream


def operations(shapes: dict[str, Any], width: int, heads: int, batch: int, seed: int = 0) -> dict[str, dict[str, int]]:
    """How many operations testing a batch takes, and what they work with: DREAM, and the network that it consults."""
    split, _, _, dream = _cost_nets(shapes, width, heads, batch, seed)
    found = {}
    for name, net in (("DREAM", dream), ("evaluator", dream.evaluator)):
        with torch.no_grad(), _Count() as counter:
            net.eval()(split[:].replace(target=None))
        found[name] = {"operations": counter.total, "parameters": sum(p.numel() for p in net.parameters())}
    return found


def cost_seconds(
    shapes: dict[str, Any], width: int, heads: int, batch: int, steps: int, seed: int = 0
) -> dict[str, float]:
    """Seconds of each piece on random sequences of these shapes (regression), a batch each."""
    from mmlib.baselines import JointTraining

    split, net, cube, dream = _cost_nets(shapes, width, heads, batch, seed)
    one = split[:]
    unseen = one.replace(target=None)

    def step(method: torch.nn.Module) -> None:
        method.train()
        method.zero_grad()
        sum(method(one).losses.values()).backward()  # type: ignore[union-attr]

    def test(method: torch.nn.Module) -> None:
        method.eval()
        with torch.no_grad():
            method(unseen)

    def naive() -> None:
        with torch.no_grad():
            for mask_ in range(2 ** len(shapes)):
                on = torch.tensor([bool(mask_ >> m & 1) for m in range(len(shapes))])
                net.eval()(unseen.drop(present=on))

    plain, mixing = JointTraining(net), JointTraining(cube)
    live = timed(lambda: step(dream), steps)
    found = {
        "train, evaluator": timed(lambda: step(plain), steps),
        "train, CubeMLP": timed(lambda: step(mixing), steps),
        "train, DREAM, live scores": live,
        "test, evaluator": timed(lambda: test(plain), steps),
        "test, CubeMLP": timed(lambda: test(mixing), steps),
        "test, DREAM": timed(lambda: test(dream), steps),
        "scores": timed(lambda: dream.contributions(one), steps),
        "scores, 2^M forwards": timed(naive, steps),
    }
    dream.precompute(split)
    found["train, DREAM"] = timed(lambda: step(dream), steps)
    return found


def run_cost(config: Config) -> results.Results:
    """A run of `cost`: seconds are of the machine that it ran on; the chapter shows their ratios."""
    found = cost_seconds(*(config[k] for k in ("shapes", "width", "heads", "batch", "steps", "seed")))
    common = {"method": "cost", "data": "random", "seed": config["seed"], "profile": config["profile"]}
    common |= {"device": "cpu, 1 thread", "seconds": round(sum(found.values()), 3), "n": config["batch"]}
    return results.Results({**common, "condition": "-", "metric": k, "value": v} for k, v in found.items())


KEPT = ("accuracy", "f1_non0", "mae")  # of the eight scores of a regression


def score(config: Config) -> results.Results:
    """`experiments.train_and_score`, without the results of other metrics."""
    found = experiments.train_and_score(config)
    return results.Results([result for result in found if result["metric"] in KEPT], found.predictions)


TABLES: dict[str, Callable[[], Cells]] = {
    "detection": detection,
    "table1_synthetic": table1_synthetic,
    "table1_mosi": table1_mosi,
    "cost": cost,
    "mask": mask,
    "fig3_avmnist": fig3_avmnist,
    "longer": longer,
    "longer_synthetic": longer_synthetic,
    "longer_mosi": longer_mosi,
    "mixed_digits": mixed_digits,
    "interpretations": interpretations,
    "inexact_digits": inexact_digits,
    "inexact_mfeat": inexact_mfeat,
    "interpretations_synthetic": interpretations_synthetic,
    "grid_digits": grid_digits,
    "tuned_digits": tuned_digits,
    "fixed_digits": fixed_digits,
    "readings_digits": readings_digits,
    "fig3_synthetic": fig3_synthetic,
    "mixed_synthetic": mixed_synthetic,
}
RUNNERS: dict[str, Callable[[Config], results.Results]] = {
    "detection": run_detection,
    "mask": run_mask,
    "cost": run_cost,
}
FILES = {  # tables that share runs
    "longer_synthetic": "table1_synthetic",
    "longer_mosi": "table1_mosi",
    "fixed_digits": "longer",
    "readings_digits": "tuned_digits",
}
SWEEP = Sweep("dream", TABLES, score, RUNNERS, FILES)
path, command, main = SWEEP.path, SWEEP.command, SWEEP.main


if __name__ == "__main__":
    main()
