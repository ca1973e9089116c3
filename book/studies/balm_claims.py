"""What the pages on BALM compare: a function a table of the evidence page, each gives the comparisons to be judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from book import paper_tables
from book.studies import balm as study
from book.support import results, verdicts
from book.support.stored import Stored

__all__ = [
    "SUBSETS",
    "averages",
    "backbones",
    "calibration",
    "central",
    "constant",
    "cost",
    "interpretations",
    "load",
    "longer",
    "mce",
    "paper",
    "parts",
    "recovered",
    "rivals",
    "shared",
    "subsets",
    "tuned",
]

Tables = dict[str, Stored]
B, A, C = study.CONFIG_B, study.CONFIG_A, "(0.7, 0.5, 0.3)"  # the last: of the paper's Tables 8 and 9
CORPORA = ("IEMOCAP", "CMU-MOSEI")
DATA = {
    "settings_conversations": "conversations",
    "settings_mosi": "MOSI (public features)",
    "settings_digits": "digits",
    "settings_avmnist": "AV-MNIST",
}
SUBSETS = {
    "A": "audio",
    "L": "language",
    "V": "vision",
    "AL": "audio+language",
    "AV": "audio+vision",
    "LV": "language+vision",
    "ALV": "audio+language+vision",
}


def load(results_dir: Path) -> Tables:
    """The stored runs of every table."""
    return {
        name: Stored(
            study.path(name, results_dir),
            make(),
            study.command(name),
            metric="f1_non0" if name.endswith("mosi") else "accuracy",
        )
        for name, make in study.TABLES.items()
    }


def paper(number: int) -> pd.Series:
    """A table of the paper by (group, row, column)."""
    found: pd.Series = paper_tables.read(f"balm-table{number}").set_index(["group", "row", "column"])["value"]
    return found


def recovered() -> pd.DataFrame:
    """The paper's accuracy of +BALM by (corpus, network) and setting: Tables 14 and 15 print BALM-M and its gap."""
    found = {}
    for number, corpus in zip((14, 15), CORPORA, strict=True):
        for net in ("GCNet", "MMGCN", "MMDFN"):
            values = paper(number)[f"{net}+BALM-M"].unstack()
            found[corpus, f"{net}+BALM"] = values["Acc"] - values["gap"]
    return pd.DataFrame(found).T


# --- Comparisons, ours first ------------------------------------------------------------------------------------------


def mean_of(pairs: list[verdicts.Comparison], label: str) -> verdicts.Comparison:
    """The mean of comparisons that share seeds and test samples, as one."""
    ours, theirs = [c.ours for c in pairs], [c.theirs for c in pairs]
    if any(x is None for x in ours):
        return dataclasses.replace(pairs[0], label=label, ours=None, theirs=None)
    return dataclasses.replace(pairs[0], label=label, ours=np.mean(ours, 0), theirs=np.mean(theirs, 0))


def settings(tables: Tables, name: str) -> list[verdicts.Comparison]:
    """BALM and its backbone in every setting of a data set."""
    where = dict.fromkeys(label[1] for label in tables[name].cells)
    return [tables[name].pair(w, ("+BALM", w), ("backbone", w), "same", group=DATA[name]) for w in where]


def central(tables: Tables) -> Iterator[verdicts.Comparison]:
    """Tables 1 and 2: BALM and its backbone, in every setting of four data sets, and on average over each."""
    for name in DATA:
        pairs = settings(tables, name)
        yield from [*pairs, mean_of(pairs, "mean of the settings")]


def averages(tables: Tables) -> list[verdicts.Comparison]:
    """The averages of `central` alone: a claim a data set."""
    return [mean_of(settings(tables, name), DATA[name]) for name in DATA]


def best_rates(tables: Tables, name: str) -> dict[tuple[str, str], str]:
    """(method, setting) -> the learning rate that is best on the validation split."""
    table, best = tables[name], {}
    for method, where, _ in table.cells:
        of = lambda rate, m=method, w=where: np.nan_to_num(table.mean((m, w, str(rate)), "valid").mean)
        best[method, where] = str(max(study.RATES_TRIED, key=of))
    return best


def tuned(tables: Tables) -> Iterator[verdicts.Comparison]:
    """BALM against every other method, each at the learning rate that is best for it."""
    for name in ("tuning_conversations", "tuning_digits", "tuning_avmnist"):
        best = best_rates(tables, name)
        data = name.removeprefix("tuning_").replace("avmnist", "AV-MNIST")
        for method, where in best:
            if method != "+BALM":
                ours, theirs = ("+BALM", where, best["+BALM", where]), (method, where, best[method, where])
                several = len({w for _, w in best}) > 1
                label = f"{method}, {where}" if several else method
                yield tables[name].pair(label, ours, theirs, "same", group=data)


def longer(tables: Tables) -> Iterator[verdicts.Comparison]:
    """Three times as many epochs: against fewer, and BALM against its backbone."""
    table, short, long = tables["longer_conversations"], "24", "72"
    for where, config in ((B, "Config B"), (A, "Config A")):
        for m in ("backbone", "+BALM"):
            yield table.pair(f"{m}, {config}", (m, where, long), (m, where, short), "same", group="72 against 24 epochs")
    for where, config in ((B, "Config B"), (A, "Config A")):
        ours, theirs = ("+BALM", where, long), ("backbone", where, long)
        yield table.pair(config, ours, theirs, "same", group="+BALM against the backbone, 72 epochs")


def calibration(tables: Tables) -> Iterator[verdicts.Comparison]:
    """Table 10: gates alone, tested on each subset of the modalities and on average; the paper's on IEMOCAP."""
    table, printed = tables["methods_conversations"], paper(10)["IEMOCAP"].unstack()
    for short, subset in [*SUBSETS.items(), ("Avg", "")]:
        gap = printed.loc[short, "+FCM Acc"] - printed.loc[short, "MMGCN Acc"]
        conditions: Any = subset or list(SUBSETS.values())
        yield table.pair(subset or "mean of the seven", ("+FCM", B), ("backbone", B), conditions, paper=float(gap))


def subsets(tables: Tables) -> Iterator[verdicts.Comparison]:
    """Tables 8 and 9: a network for each subset; the paper's differences are GCNet's on IEMOCAP."""
    table, printed = tables["subsets_conversations"], paper(8)
    for where in (A, C):
        for short, subset in SUBSETS.items():
            gap = printed[where, "GCNet+BALM", short] - printed[where, "GCNet", short]
            ours, theirs = ("+BALM", subset, where), ("backbone", subset, where)
            yield table.pair(subset, ours, theirs, group=f"rates {where}", paper=float(gap))


def shared(tables: Tables) -> Iterator[verdicts.Comparison]:
    """Tables 11 and 12: one missing rate for all modalities."""
    for rate in map(str, study.SHARED):
        yield tables["shared_conversations"].pair(f"rate {rate}", ("+BALM", rate), ("backbone", rate), "same")


def _of_paper(where: str) -> dict[str, float]:
    """The paper's +BALM minus its parts, MMGCN on IEMOCAP, in points."""
    whole, thirteen = recovered().loc[("IEMOCAP", "MMGCN+BALM"), where], paper(13)
    found = {m: whole - thirteen["IEMOCAP", where, f"+{m} Acc"] for m in ("BALM-D", "BALM-S")}
    return {**found, "BALM-M": whole - paper(14)["MMGCN+BALM-M", where, "Acc"]}


def parts(tables: Tables) -> Iterator[verdicts.Comparison]:
    """Tables 13 to 15: BALM against its parts and against squared error."""
    for where, config in ((B, "Config B"), (A, "Config A")):
        printed = _of_paper(where)
        for m in ("BALM-D", "BALM-S", "BALM-M"):
            options = {"group": config, "paper": float(printed[m])}
            yield tables["methods_conversations"].pair(m, ("+BALM", where), (m, where), "same", **options)


def rivals(tables: Tables) -> Iterator[verdicts.Comparison]:
    """BALM against methods that work at the same place."""
    for where, config in ((B, "Config B"), (A, "Config A")):
        for m in ("backbone", "+FCM", "CGGM", "OGM-GE", "modality dropout"):
            yield tables["methods_conversations"].pair(m, ("+BALM", where), (m, where), "same", group=config)


def backbones(tables: Tables) -> Iterator[verdicts.Comparison]:
    """Other networks on conversations."""
    for net, name in (("mmdfn", "MM-DFN"), ("gcnet", "GCNet")):
        for where, config in ((B, "Config B"), (A, "Config A")):
            ours, theirs = (net, "+BALM", where), (net, "backbone", where)
            yield tables["backbones_conversations"].pair(f"{name}, {config}", ours, theirs, "same")


def mce(tables: Tables) -> Iterator[verdicts.Comparison]:
    """MCE's losses with BALM's gates and gradients, against each alone; digits."""
    for where, config in ((B, "Config B"), (A, "Config A")):
        for m in ("MCE", "+BALM"):
            label = f"both against {m.removeprefix('+')}, {config}"
            yield tables["settings_digits"].pair(label, ("MCE +BALM", where), (m, where), "same", claim="")


def constant(tables: Tables) -> Iterator[verdicts.Comparison]:
    """Eq. 21 against coefficients that are bounded, constant or absent; digits, each optimizer with and without clip."""
    for name in study.OPTIMIZERS:
        for clip, words in (("free", "no clipping"), ("clip", f"clipped at {study.TIGHT}")):
            for what in study.WHAT_IS_LEFT:
                if what != "mu of Eq. 21":
                    ours, theirs = (name, "mu of Eq. 21", clip), (name, what, clip)
                    yield tables["optimizers_digits"].pair(what, ours, theirs, "same", group=f"{name}, {words}")


def interpretations(tables: Tables) -> Iterator[verdicts.Comparison]:
    """One step of BALM done differently, against the default; digits, Config B."""
    table = tables["interpretations_digits"]
    for (what,) in table.cells:
        if what != "paper":
            yield table.pair(what, (what,), ("paper",), "same", claim="")


def cost(tables: Tables) -> float:
    """The wall time of a training with BALM over that of its backbone, the median of the stored pairs."""
    ratios = []
    for name in ("settings_conversations", "settings_digits"):
        table = tables[name]
        stored = results.load_results(table.path).drop_duplicates("config_hash").set_index("config_hash")["seconds"]
        for method, where in table.cells:
            if method == "+BALM":
                pairs = zip(table.keys["+BALM", where], table.keys["backbone", where], strict=True)
                ratios += [stored[a] / stored[b] for a, b in pairs if a in stored and b in stored]
    return float(np.median(ratios)) if ratios else float("nan")
