"""The runs behind the BALM chapter's tables: ``python -m book.studies.balm TABLE... [--data-root FOLDER]``.

Each function gives a table's cells: a label per axis -> the configs of that cell, one a seed. The command fills the
table's file in ``book/results`` with what is not there yet; the chapter reads the rows of the same configs. Within a
table all methods share masks, seeds, steps, batch size, learning rate and clipping. Backbones are narrow in most tables
(32, not 200) and dialogues short; the ladder has the paper's network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from book.support import experiments, results
from book.support.sweep import Cells, Config, Sweep
from mmlib import MultimodalBatch, MultimodalDataset
from mmlib.batch import Output

# The six settings of the main paper's Tables 1 and 2: missing rates of audio, language and vision
SETTINGS = {
    f"({', '.join(map(str, rates))})": rates
    for rates in ((0.3, 0.5, 0.7), (0.3, 0.7, 0.5), (0.5, 0.3, 0.7), (0.5, 0.7, 0.3), (0.7, 0.3, 0.5), (0.7, 0.5, 0.3))
}
CONFIG_A, CONFIG_B = "(0.5, 0.3, 0.7)", "(0.5, 0.7, 0.3)"  # Table 7's names
SHARED = (0.0, 0.3, 0.5, 0.7)
TWO = ((0.2, 0.8), (0.8, 0.2))  # of AV-MNIST's image and audio
SEEDS = (0, 1, 2, 3, 4)
RATES_TRIED = (1e-3, 3e-3, 1e-2, 3e-2)
TAUS, RHOS = (0.1, 0.4, 0.7, 1.0, 1.3), (1.0, 1.2, 1.4, 1.6, 1.8)  # Table 7; its corners and centre are run first
FEW_TAUS, FEW_RHOS = TAUS[::2], RHOS[::2]

STRENGTHS = {"conversations": {"rho": 1.4, "tau": 0.3}, "mosi": {"rho": 1.6, "tau": 0.4}}  # the scripts' for MMGCN
# short dialogues of the same world: a step costs half
CONVERSATIONS: Config = {"lengths": [4, 12], "sizes": [160, 40, 160]}
NETS = {"generic": "GenericBackbone", "mmgcn": "MMGCNBackbone", "mmdfn": "MMDFNBackbone", "gcnet": "GCNetBackbone"}
BACKBONES: dict[str, Config] = {  # their options
    "mmgcn": {"width": 32, "hidden": 32, "layers": 2, "dropout": 0.2},
    "mmdfn": {"width": 32, "hidden": 32, "layers": 4, "dropout": 0.2},
    "gcnet": {"width": 16, "hidden": 16, "front": 32, "dropout": 0.2},
}
TRAIN: dict[str, Config] = {
    "conversations": {"epochs": 24, "batch_size": 16, "lr": 1e-2, "weight_decay": 3e-5, "clip": 2.0},
    "mosi": {"epochs": 32, "batch_size": 8, "lr": 3e-3, "weight_decay": 3e-5, "clip": 2.0},
    "digits": {"epochs": 36, "batch_size": 64, "lr": 3e-3, "clip": 2.0},
    "avmnist": {"epochs": 36, "batch_size": 64, "lr": 3e-3, "clip": 2.0},
}
DATA: dict[str, Config] = {
    "conversations": {"data": "conversations", "data_options": CONVERSATIONS},
    "mosi": {"data": "dialogue", "data_options": {"corpus": "mosi"}},
    "digits": {"data": "digits"},
    "avmnist": {"data": "avmnist"},
}
METHODS: dict[str, Config] = {
    "backbone": {"method": "JointTraining"},
    "+BALM": {"method": "BALM"},
    "+FCM": {"method": "BALM", "method_options": {"preset": "+FCM"}},
    "BALM-D": {"method": "BALM", "method_options": {"preset": "BALM-D", "tau": 0.0}},
    "BALM-S": {"method": "BALM", "method_options": {"preset": "BALM-S"}},
    "BALM-M": {"method": "BALM", "method_options": {"preset": "BALM-M"}},
    "CGGM": {"method": "CGGM"},
    "OGM-GE": {"method": "OGMGE"},
    "modality dropout": {"method": "JointTraining", "method_options": {"modality_dropout": 0.3}},
}


def plan(rates: tuple[float, ...]) -> Config:
    """Eq. 36 with these rates."""
    return {"kind": "imbalanced", "rates": list(rates)}


def _config(
    source: str, method: str, rates: tuple[float, ...], seed: int, options: Config | None = None, **changes: Any
) -> Config:
    """One run: dialogues with MMGCN, other data with the generic backbone; tested under the rates of training, and on
    the seven subsets of what is there."""
    made: Config = {**DATA[source], **METHODS[method], "seed": seed, "profile": "book", "train": TRAIN[source]}
    if source in ("conversations", "mosi"):
        made |= {"backbone": NETS["mmgcn"], "backbone_options": BACKBONES["mmgcn"]}
    else:
        made |= {"backbone": "GenericBackbone", "backbone_options": {"width": 32}}
    strengths = STRENGTHS.get(source, {}) if made["method"] in ("BALM", "CGGM") else {}
    chosen = {**strengths, **made.get("method_options", {}), **(options or {})}
    if chosen:
        made["method_options"] = chosen
    return {**made, "train_plan": plan(rates), "conditions": [{"same": plan(rates)}, "subsets"], **changes}


def _settings(source: str, methods: tuple[str, ...], settings: Any = SETTINGS, seeds: Any = SEEDS) -> Cells:
    return {
        (name, setting): [_config(source, name, SETTINGS[setting], seed) for seed in seeds]
        for setting in settings
        for name in methods
    }


def settings_conversations() -> Cells:
    """The central table on conversations, MMGCN: (method, setting)."""
    return _settings("conversations", ("backbone", "+BALM"))


def settings_mosi() -> Cells:
    """The same on dialogues of CMU-MOSI with public features: (method, setting)."""
    return _settings("mosi", ("backbone", "+BALM"))


def methods_conversations() -> Cells:
    """Tables 10 and 13 to 15, and other methods, in two settings of the central table: (method, setting)."""
    return _settings("conversations", tuple(METHODS), (CONFIG_B, CONFIG_A))


def _tuning(source: str, methods: tuple[str, ...], rates: dict[str, tuple[float, ...]]) -> Cells:
    return {
        (name, setting, str(lr)): [
            _config(source, name, rates[setting], seed, train={**TRAIN[source], "lr": lr}) for seed in SEEDS[:3]
        ]
        for setting in rates
        for name in methods
        for lr in RATES_TRIED
    }


def tuning_conversations() -> Cells:
    """Four learning rates for all methods alike, one of them the other tables': (method, setting, rate)."""
    return _tuning("conversations", tuple(METHODS), {CONFIG_B: SETTINGS[CONFIG_B]})


def tuning_digits() -> Cells:
    """The same for the generic backbone on digits: (method, setting, rate)."""
    return _tuning("digits", ("backbone", "+BALM"), {CONFIG_B: SETTINGS[CONFIG_B]})


def tuning_avmnist() -> Cells:
    """The same on AV-MNIST: (method, setting, rate)."""
    return _tuning("avmnist", ("backbone", "+BALM"), {str(rates): rates for rates in TWO})


def longer_conversations() -> Cells:
    """Are 24 epochs enough? Three times as many, in two settings: (method, setting, epochs)."""
    train = TRAIN["conversations"]
    return {
        (name, setting, str(epochs)): [
            _config("conversations", name, SETTINGS[setting], seed, train={**train, "epochs": epochs})
            for seed in SEEDS[:3]
        ]
        for setting in (CONFIG_B, CONFIG_A)
        for name in ("backbone", "+BALM")
        for epochs in (train["epochs"], 3 * train["epochs"])
    }


def subsets_conversations() -> Cells:
    """Tables 8 and 9: a net for each subset of the modalities, trained and tested on it: (method, subset, setting).

    One modality alone cannot be missing, and has nothing to rebalance: +BALM is +FCM there."""
    names = ("audio", "language", "vision")
    cells: Cells = {}
    for setting in (CONFIG_A, "(0.7, 0.5, 0.3)"):  # two of the tables' settings
        for subset, modalities in experiments.subsets(names).items():
            rates = tuple(SETTINGS[setting][names.index(m)] for m in modalities)
            alone = len(modalities) == 1
            masks: Config = (
                {"train_plan": None, "conditions": "complete"} if alone else {"conditions": {"same": plan(rates)}}
            )
            for name in ("backbone", "+BALM"):
                given = "+FCM" if name == "+BALM" and alone else name
                cells[name, subset, setting] = [
                    _config("conversations", given, rates, seed, modalities=modalities, **masks) for seed in SEEDS[:3]
                ]
    return cells


def shared_conversations() -> Cells:
    """Tables 11 and 12: one missing rate for all modalities: (method, rate)."""
    return {
        (name, str(rate)): [_config("conversations", name, (rate,) * 3, seed) for seed in SEEDS[:3]]
        for rate in SHARED
        for name in ("backbone", "+BALM")
    }


def _grid(taus: tuple[float, ...], rhos: tuple[float, ...]) -> Cells:
    return {
        (setting, str(tau), str(rho)): [
            _config("conversations", "+BALM", SETTINGS[setting], seed, {"tau": tau, "rho": rho}, conditions=same)
            for seed in SEEDS[:3]
        ]
        for setting, same in ((s, {"same": plan(SETTINGS[s])}) for s in (CONFIG_B, CONFIG_A))
        for tau in taus
        for rho in rhos
    }


def grid_conversations() -> Cells:
    """Table 7's corners, edges and centre: (setting, tau, rho)."""
    return _grid(FEW_TAUS, FEW_RHOS)


def fullgrid_conversations() -> Cells:
    """All of Table 7: (setting, tau, rho)."""
    return _grid(TAUS, RHOS)


def backbones_conversations() -> Cells:
    """MM-DFN, and GCNet with a linear map a modality in front, in two settings: (backbone, method, setting)."""
    own = {("gcnet", "+BALM"): {"widths": BACKBONES["gcnet"]["front"]}}
    return {
        (net, name, setting): [
            _config(
                "conversations", name, SETTINGS[setting], seed, own.get((net, name)), backbone=NETS[net],
                backbone_options=BACKBONES[net],
            )
            for seed in SEEDS[:3]
        ]
        for net in ("mmdfn", "gcnet")
        for setting in (CONFIG_B, CONFIG_A)
        for name in ("backbone", "+BALM")
    }  # fmt: skip


def settings_digits() -> Cells:
    """The generic backbone on digits; MCE, and both together, in two settings: (method, setting)."""
    cells = _settings("digits", ("backbone", "+BALM"), seeds=SEEDS[:3])
    both = {
        "MCE": {"method": "MCE", "method_options": {"hidden": 64, "attention_heads": 4, "state_factor": False}},
        "MCE +BALM": {"method": "mce+balm", "method_options": {"hidden": 64, "attention_heads": 4}},
    }
    for setting in (CONFIG_B, CONFIG_A):
        for name, method in both.items():
            cells[name, setting] = [
                {**_config("digits", "backbone", SETTINGS[setting], seed), **method} for seed in SEEDS[:3]
            ]
    return cells


def settings_avmnist() -> Cells:
    """The generic backbone on AV-MNIST, two modalities: (method, rates of image and audio)."""
    return {
        (name, str(rates)): [_config("avmnist", name, rates, seed) for seed in SEEDS[:3]]
        for rates in TWO
        for name in ("backbone", "+BALM")
    }


OPTIMIZERS: dict[str, Config] = {
    "SGD": {"optimizer": "sgd", "lr": 2e-2},
    "Adam": {"optimizer": "adam"},
    "AdamW": {"optimizer": "adamw", "weight_decay": 1e-2},
}
WHAT_IS_LEFT: dict[str, tuple[str, Config]] = {  # how Eq. 22 is replaced; no calibration and no L_mod in any of them
    "backbone": ("backbone", {}),
    "mu of Eq. 21": ("+BALM", {"preset": "+GRM", "tau": 0.0}),
    "mu in [0, 3 rho]": ("+BALM", {"preset": "+GRM", "tau": 0.0, "mu_clip": [0.0, 3.9]}),
    "mu = 2 rho / 3": ("+BALM", {"preset": "+GRM", "tau": 0.0, "mu_constant": 2 * 1.3 / 3}),
}
TIGHT = 0.5  # a clipping norm that most steps exceed


def optimizers_digits() -> Cells:
    """What an optimizer leaves of Eq. 22, on digits: (optimizer, what, clip)."""
    return {
        (name, what, clip): [
            _config(
                "digits", method, SETTINGS[CONFIG_B], seed, options, conditions={"same": plan(SETTINGS[CONFIG_B])},
                train={**TRAIN["digits"], **optimizer, "clip": TIGHT if clip == "clip" else None},
            )
            for seed in SEEDS[:3]
        ]
        for name, optimizer in OPTIMIZERS.items()
        for clip in ("free", "clip")
        for what, (method, options) in WHAT_IS_LEFT.items()
    }  # fmt: skip


INTERPRETATIONS: dict[str, Config] = {
    "paper": {},
    "noise on the gradients": {"preset": "released"},
    "noise, mu = 1": {"preset": "released", "mu_constant": 1.0},
    "mu = 1": {"mu_constant": 1.0},
    "mu in [0, 3 rho]": {"mu_clip": [0.0, 3.9]},
    "moving average of KL": {"smoothing": 0.9},
    "mu once an epoch": {"interval": "epoch"},
    "heads on what is there": {"samples": "present"},
    "cosine of gradients": {"cos_on": "grad"},
    "CGGM's L_mod": {"lmod": "cggm"},
    "L_mod moves the heads": {"lmod_heads": True},
    "cosines of other modalities": {"cosine_columns": [2, 0, 1]},
}


def interpretations_digits() -> Cells:
    """What the paper does not say, one change at a time on digits: (what,)."""
    return {
        (what,): [
            _config("digits", "+BALM", SETTINGS[CONFIG_B], s, options, conditions={"same": plan(SETTINGS[CONFIG_B])})
            for s in SEEDS[:3]
        ]
        for what, options in INTERPRETATIONS.items()
    }


# --- The ladder: plain network, gates, and each of noise, mu and L_mod, at the paper's sizes --------------------------

WIDE: Config = {"width": 200, "hidden": 100, "layers": 4, "dropout": 0.4}
WIDE_TRAIN: Config = {
    "epochs": 28,  # the plain network's validation is flat from 12 on, BALM's still rises
    "batch_size": 16,
    "lr": 1e-3,
    "weight_decay": 3e-5,
    "clip": 2.0,
    "monitor": "weighted_f1",
}
RUNGS: dict[str, tuple[str, Config]] = {  # of Eq. 22 and L_mod, one alone, both, and both with noise
    "plain": ("JointTraining", {}),
    "modality dropout": ("JointTraining", {"modality_dropout": 0.3}),
    "+FCM": ("BALM", {"preset": "+FCM"}),  # mu = 1 without noise is the same
    "noise alone": ("BALM", {"mu_constant": 1.0, "tau": 0.0, "grad_noise": True}),
    "mu alone": ("BALM", {"preset": "BALM-D", "tau": 0.0}),
    "mu in [0, 3 rho] alone": ("BALM", {"mu_clip": [0.0, 4.2], "tau": 0.0}),
    "L_mod alone": ("BALM", {"preset": "BALM-S"}),
    "BALM": ("BALM", {}),
    "BALM as released": ("BALM", {"preset": "released"}),
}
ENDS = ("plain", "modality dropout", "BALM", "BALM as released")


def _rung(what: str, seed: int) -> Config:
    """MMGCN at the paper's width, selected by the metric that is reported, and scored at its last epoch too."""
    (method, options), masks = RUNGS[what], plan(SETTINGS[CONFIG_B])
    if method == "BALM":
        options = {**STRENGTHS["conversations"], **options}
    return {
        **DATA["conversations"], "method": method, "method_options": options, "seed": seed, "profile": "book",
        "backbone": NETS["mmgcn"], "backbone_options": WIDE, "train": WIDE_TRAIN, "train_plan": masks,
        "conditions": {"same": masks}, "last_epoch": True,
    }  # fmt: skip


def ladder_conversations() -> Cells:
    """MMGCN at width 200 with each of BALM's parts, Config B: (what,)."""
    return {(what,): [_rung(what, seed) for seed in SEEDS] for what in RUNGS}


# --- MCE's losses with BALM's gates and gradients ---------------------------------------------------------------------


class MCEWithBALM(torch.nn.Module):
    """MCE on calibrated inputs, with its encoders' gradients rebalanced; the encoders run once more, without gradient,
    for BALM's heads, since MCE's run on the rows that are there."""

    def __init__(self, backbone: Any, shapes: dict[str, tuple[int, ...]], rho: float, tau: float, **options: Any):
        super().__init__()
        from mmlib.methods import MCE
        from mmlib.methods.balm import FeatureCalibration, GradientRebalancing

        self.mce = MCE(backbone, state_factor=False, **options)
        self.calibration = FeatureCalibration(shapes)
        output = next(x for x in reversed(list(backbone.decoder.modules())) if isinstance(x, torch.nn.Linear))
        encoders = dict(backbone.encoders.items())
        self.rebalancing = GradientRebalancing(
            backbone, encoders, output, backbone.width, catch=False, rho=rho, tau=tau
        )

    @classmethod
    def for_data(
        cls, data: MultimodalDataset, backbone: Any = None, valid: Any = None, config: Any = None, **options: Any
    ) -> MCEWithBALM:
        """As every method's: with BALM's usual strengths."""
        return cls(backbone, data.feature_shapes, **{"rho": 1.3, "tau": 0.2, **options})

    def forward(self, batch: MultimodalBatch) -> Output:
        batch = self.calibration(batch)
        out = self.mce(batch)
        if not self.training or batch.target is None:
            return out
        with torch.no_grad():
            z = self.mce.backbone.encode(batch)
        return Output(out.logits, {**out.losses, **self.rebalancing(out.logits, batch.target, z, batch.present)})

    def on_epoch_start(self, state: Any) -> None:
        self.mce.on_epoch_start(state)

    def on_backward(self, state: Any) -> None:
        self.rebalancing.rebalance()


def run(config: Config) -> results.Results:
    """`experiments.train_and_score`, which knows "mce+balm" besides."""
    return experiments.train_and_score(config, {"mce+balm": MCEWithBALM})


TABLES: dict[str, Callable[[], Cells]] = {
    "ladder_conversations": ladder_conversations,
    "settings_conversations": settings_conversations,
    "settings_mosi": settings_mosi,
    "methods_conversations": methods_conversations,
    "tuning_conversations": tuning_conversations,
    "longer_conversations": longer_conversations,
    "optimizers_digits": optimizers_digits,
    "settings_digits": settings_digits,
    "shared_conversations": shared_conversations,
    "grid_conversations": grid_conversations,
    "interpretations_digits": interpretations_digits,
    "tuning_digits": tuning_digits,
    "settings_avmnist": settings_avmnist,
    "tuning_avmnist": tuning_avmnist,
    "backbones_conversations": backbones_conversations,
    "subsets_conversations": subsets_conversations,
    "fullgrid_conversations": fullgrid_conversations,
}
FILES = {  # tables that share runs with another one share its file
    "methods_conversations": "settings_conversations",
    "tuning_conversations": "settings_conversations",
    "longer_conversations": "settings_conversations",
    "tuning_digits": "settings_digits",
    "tuning_avmnist": "settings_avmnist",
    "fullgrid_conversations": "grid_conversations",
}
SWEEP = Sweep("balm", TABLES, run, files=FILES)
path, command, main = SWEEP.path, SWEEP.command, SWEEP.main


if __name__ == "__main__":
    main()
