"""What the pages on BALM compare: a function a table of the evidence page, each gives the comparisons to be judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from book import paper_tables
from book.studies import balm as study
from book.support import results, tables, verdicts
from book.support.stored import Stored

__all__ = [
    "FAMILIES",
    "SUBSETS",
    "cost",
    "gains",
    "grids",
    "ladder_curves",
    "load",
    "paper",
    "printed_gains",
    "printed_parts",
    "rates_tried",
    "recovered",
    "rungs",
    "scores",
    "verdict",
    "wrong_before",
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
            metric="weighted_f1" if name.startswith("ladder") else "f1_non0" if name.endswith("mosi") else "accuracy",
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


def gains(metric: str = "Acc") -> pd.DataFrame:
    """The paper's +BALM minus its network, second-hand, in points: a row a (corpus, network), a column a setting."""
    found = {}
    for number, corpus in enumerate(CORPORA, 1):
        cells = paper_tables.read(f"balm-main-table{number}").set_index(["group", "row", "column"])["value"]
        cells = cells.xs(metric, level="column").unstack()
        for net in ("GCNet", "MMGCN", "MM-DFN"):
            found[corpus, net] = cells.loc[f"{net}+BALM"] - cells.loc[net]
    return pd.DataFrame(found).T


# --- Comparisons, ours first ------------------------------------------------------------------------------------------


def mean_of(pairs: list[verdicts.Comparison], label: str) -> verdicts.Comparison:
    """The mean of comparisons that share seeds and test samples, as one."""
    ours, theirs = [c.ours for c in pairs], [c.theirs for c in pairs]
    if any(x is None for x in ours):
        return dataclasses.replace(pairs[0], label=label, ours=None, theirs=None)
    return dataclasses.replace(pairs[0], label=label, ours=np.mean(ours, 0), theirs=np.mean(theirs, 0))


def settings(stored: Tables, name: str) -> list[verdicts.Comparison]:
    """BALM and its backbone in every setting of a data set."""
    where = dict.fromkeys(label[1] for label in stored[name].cells)
    return [stored[name].pair(w, ("+BALM", w), ("backbone", w), "same", group=DATA[name]) for w in where]


def central(stored: Tables) -> Iterator[verdicts.Comparison]:
    """Tables 1 and 2: BALM and its backbone, in every setting of four data sets, and on average over each."""
    for name in DATA:
        pairs = settings(stored, name)
        yield from [*pairs, mean_of(pairs, "mean of the settings")]


def averages(stored: Tables) -> list[verdicts.Comparison]:
    """The averages of `central` alone: a claim a data set."""
    pairs = [mean_of(settings(stored, name), DATA[name]) for name in DATA]
    words = {"accuracy": "accuracy", "f1_non0": "weighted F1 of the sign"}
    return [dataclasses.replace(pair, group=words[pair.metric]) for pair in pairs]


def ladder(stored: Tables) -> Iterator[verdicts.Comparison]:
    """The parts of BALM on MMGCN at the paper's width, each minus the plain network; the paper's is MMGCN's."""
    printed = float(gains("w-F1").loc[("IEMOCAP", "MMGCN"), B])
    for what in study.RUNGS:
        if what != "plain":
            gap = printed if what == "BALM" else None
            yield stored["ladder_conversations"].pair(what, (what,), ("plain",), "same", paper=gap)


def ladder_again(stored: Tables) -> Iterator[verdicts.Comparison]:
    """The ends of the ladder otherwise: without selection, against modality dropout, and what the release adds."""
    table = stored["ladder_conversations"]
    for what in study.ENDS[1:]:
        yield table.pair(what, (what,), ("plain",), "same, last epoch", group="minus plain, last epoch")
    for what in study.ENDS[2:]:
        yield table.pair(what, (what,), ("modality dropout",), "same", group="minus modality dropout")
    both = ("BALM as released",), ("BALM",)
    yield table.pair("noise and cosines of the release", *both, "same", group="BALM as released minus BALM", claim="")


def best_rates(stored: Tables, name: str) -> dict[tuple[str, str], str]:
    """(method, setting) -> the learning rate that is best on the validation split."""
    table, best = stored[name], {}
    for method, where, _ in table.cells:
        of = lambda rate, m=method, w=where: np.nan_to_num(table.mean((m, w, str(rate)), "valid").mean)
        best[method, where] = str(max(study.RATES_TRIED, key=of))
    return best


def tuned(stored: Tables) -> Iterator[verdicts.Comparison]:
    """BALM against every other method, each at the learning rate that is best for it."""
    for name in ("tuning_conversations", "tuning_digits", "tuning_avmnist"):
        best = best_rates(stored, name)
        data = name.removeprefix("tuning_").replace("avmnist", "AV-MNIST")
        for method, where in best:
            if method != "+BALM":
                ours, theirs = ("+BALM", where, best["+BALM", where]), (method, where, best[method, where])
                several = len({w for _, w in best}) > 1
                label = f"{method}, {where}" if several else method
                yield stored[name].pair(label, ours, theirs, "same", group=data)


def longer(stored: Tables) -> Iterator[verdicts.Comparison]:
    """Three times as many epochs: against fewer, and BALM against its backbone."""
    table, short, long = stored["longer_conversations"], "24", "72"
    for where, config in ((B, "Config B"), (A, "Config A")):
        for m in ("backbone", "+BALM"):
            group = "72 against 24 epochs"
            yield table.pair(f"{m}, {config}", (m, where, long), (m, where, short), "same", group=group)
    for where, config in ((B, "Config B"), (A, "Config A")):
        ours, theirs = ("+BALM", where, long), ("backbone", where, long)
        yield table.pair(config, ours, theirs, "same", group="+BALM against the backbone, 72 epochs")


def calibration(stored: Tables) -> Iterator[verdicts.Comparison]:
    """Table 10: gates alone, tested on each subset of the modalities and on average; the paper's on IEMOCAP."""
    table, printed = stored["methods_conversations"], paper(10)["IEMOCAP"].unstack()
    for short, subset in [*SUBSETS.items(), ("Avg", "")]:
        gap = printed.loc[short, "+FCM Acc"] - printed.loc[short, "MMGCN Acc"]
        conditions: Any = subset or list(SUBSETS.values())
        yield table.pair(subset or "mean of the seven", ("+FCM", B), ("backbone", B), conditions, paper=float(gap))


def subsets(stored: Tables) -> Iterator[verdicts.Comparison]:
    """Tables 8 and 9: a network for each subset; the paper's differences are GCNet's on IEMOCAP."""
    table, printed = stored["subsets_conversations"], paper(8)
    for where in (A, C):
        for short, subset in SUBSETS.items():
            gap = printed[where, "GCNet+BALM", short] - printed[where, "GCNet", short]
            ours, theirs = ("+BALM", subset, where), ("backbone", subset, where)
            yield table.pair(subset, ours, theirs, group=f"rates {where}", paper=float(gap))


def shared(stored: Tables) -> Iterator[verdicts.Comparison]:
    """Tables 11 and 12: one missing rate for all modalities."""
    for rate in map(str, study.SHARED):
        yield stored["shared_conversations"].pair(f"rate {rate}", ("+BALM", rate), ("backbone", rate), "same")


def _of_paper(where: str) -> dict[str, float]:
    """The paper's +BALM minus its parts, MMGCN on IEMOCAP, in points."""
    whole, thirteen = recovered().loc[("IEMOCAP", "MMGCN+BALM"), where], paper(13)
    found = {m: whole - thirteen["IEMOCAP", where, f"+{m} Acc"] for m in ("BALM-D", "BALM-S")}
    return {**found, "BALM-M": whole - paper(14)["MMGCN+BALM-M", where, "Acc"]}


def parts(stored: Tables) -> Iterator[verdicts.Comparison]:
    """Tables 13 to 15: BALM against its parts and against squared error."""
    for where, config in ((B, "Config B"), (A, "Config A")):
        printed = _of_paper(where)
        for m in ("BALM-D", "BALM-S", "BALM-M"):
            options = {"group": config, "paper": float(printed[m])}
            yield stored["methods_conversations"].pair(m, ("+BALM", where), (m, where), "same", **options)


def rivals(stored: Tables) -> Iterator[verdicts.Comparison]:
    """BALM against methods that work at the same place."""
    for where, config in ((B, "Config B"), (A, "Config A")):
        for m in ("backbone", "+FCM", "CGGM", "OGM-GE", "modality dropout"):
            yield stored["methods_conversations"].pair(m, ("+BALM", where), (m, where), "same", group=config)


def backbones(stored: Tables) -> Iterator[verdicts.Comparison]:
    """Other networks on conversations."""
    for net, name in (("mmdfn", "MM-DFN"), ("gcnet", "GCNet")):
        for where, config in ((B, "Config B"), (A, "Config A")):
            ours, theirs = (net, "+BALM", where), (net, "backbone", where)
            group = "BALM minus its backbone, conversations"
            yield stored["backbones_conversations"].pair(f"{name}, {config}", ours, theirs, "same", group=group)


def mce(stored: Tables) -> Iterator[verdicts.Comparison]:
    """MCE's losses with BALM's gates and gradients, against each alone; digits."""
    for where, config in ((B, "Config B"), (A, "Config A")):
        for m in ("MCE", "+BALM"):
            label = f"against {m.removeprefix('+')}, {config}"
            options = {"claim": "", "group": "MCE with BALM minus one alone, digits"}
            yield stored["settings_digits"].pair(label, ("MCE +BALM", where), (m, where), "same", **options)


def constant(stored: Tables) -> Iterator[verdicts.Comparison]:
    """Eq. 21 against coefficients that are bounded, constant or absent; digits, by optimizer and clipping."""
    for name in study.OPTIMIZERS:
        for clip, words in (("free", "no clipping"), ("clip", f"clipped at {study.TIGHT}")):
            for what in study.WHAT_IS_LEFT:
                if what != "mu of Eq. 21":
                    ours, theirs = (name, "mu of Eq. 21", clip), (name, what, clip)
                    yield stored["optimizers_digits"].pair(what, ours, theirs, "same", group=f"{name}, {words}")


def interpretations(stored: Tables) -> Iterator[verdicts.Comparison]:
    """One step of BALM done differently, against the default; digits, Config B."""
    table = stored["interpretations_digits"]
    for (what,) in table.cells:
        if what != "paper":
            yield table.pair(what, (what,), ("paper",), "same", claim="")


def cost(stored: Tables) -> float:
    """The wall time of a training with BALM over that of its backbone, the median of the stored pairs."""
    ratios = []
    for name in ("settings_conversations", "settings_digits"):
        table = stored[name]
        seconds = results.load_results(table.path).drop_duplicates("config_hash").set_index("config_hash")["seconds"]
        for method, where in table.cells:
            if method == "+BALM":
                pairs = zip(table.keys["+BALM", where], table.keys["backbone", where], strict=True)
                ratios += [seconds[a] / seconds[b] for a, b in pairs if a in seconds and b in seconds]
    return float(np.median(ratios)) if ratios else float("nan")


def networks(stored: Tables) -> Iterator[verdicts.Comparison]:
    """Other networks, and MCE with BALM, as one family."""
    yield from backbones(stored)
    yield from mce(stored)


def budget(stored: Tables) -> Iterator[verdicts.Comparison]:
    """Learning rates and epochs as one family."""
    yield from tuned(stored)
    yield from longer(stored)


FAMILIES: dict[str, Callable[[Tables], Iterable[verdicts.Comparison]]] = {
    "ladder": ladder,
    "ladder_again": ladder_again,
    "averages": averages,
    "central": central,
    "subsets": subsets,
    "calibration": calibration,
    "shared": shared,
    "parts": parts,
    "rivals": rivals,
    "networks": networks,
    "budget": budget,
    "constant": constant,
    "interpretations": interpretations,
}


# --- What the pages show of them --------------------------------------------------------------------------------------


def verdict(judged: dict[str, pd.DataFrame], stored: Tables) -> dict[str, str]:
    """The top of both pages; ``judged`` has at least ladder, averages, calibration, parts and constant."""
    wide = judged["ladder"].set_index("label")
    alone = judged["calibration"].iloc[-1]
    free = judged["constant"][judged["constant"]["group"].str.contains("no clipping")]
    by_data = {row["label"]: f"{row['label']} {verdicts.sentence(row)}" for _, row in judged["averages"].iterrows()}
    narrow, generic = (
        "; ".join(by_data[DATA[f"settings_{name}"]] for name in names)
        for names in (("conversations", "mosi"), ("digits", "avmnist"))
    )
    least, most = sorted(f"{-x:.0f}" for x in (free["effect"].min(), free["effect"].max()))
    print_low, print_high = gains().mean(axis=1).agg(["min", "max"])
    means = judged["averages"].set_index("label").loc[[DATA["settings_conversations"], DATA["settings_mosi"]]]
    see = [f"{wide.loc['BALM', 'detectable']:.1f}", f"{means['detectable'].min():.1f}"]
    return {
        "MMGCN with BALM": f"on our analogue at the paper's width, weighted F1, Config B: "
        f"{verdicts.sentence(wide.loc['BALM'])}; as released {verdicts.sentence(wide.loc['BALM as released'])}. In the "
        f"last {LATE} of {study.WIDE_TRAIN['epochs']} epochs validation changed by {100 * rise(stored, 'BALM'):+.1f} "
        f"points with BALM, {100 * rise(stored, 'plain'):+.1f} without. At width 32, mean of six settings: {narrow}. "
        "The claim is that BALM is better",
        "the paper's gains": f"{print_low:+.1f} to {print_high:+.1f} points of accuracy by network, mean of six "
        f"settings (second-hand). Ours with MMGCN do not find one below {see[0]} (the ladder) or {see[1]} points "
        "(means of settings) four times in five: no improvement shown here does not say that there is none",
        "its parts": f"the gates alone {verdicts.sentence(wide.loc['+FCM'])} (width 200), {verdicts.sentence(alone)} "
        f"(width 32); the other parts {verdicts.tally(judged['ladder'][judged['ladder']['label'].isin(PARTS)])}; BALM "
        f"against its halves and squared error {verdicts.tally(judged['parts'])}",
        "on networks that are not the paper's": f"generic ones: {generic}. On digits the coefficients without clipping "
        f"cost {least} to {most} points ({verdicts.tally(free)}); clipping bounds the loss",
        "cost": f"{cost(stored):.2f} times the training time of the backbone; nothing when the network is used, "
        "but for the gates",
        "use it when": "a comparison on your own validation data is in its favour; clip after `rebalance`, bound the "
        "coefficients, and try the gates and modality dropout first",
    }


PARTS = ("noise alone", "mu alone", "mu in [0, 3 rho] alone", "L_mod alone")


LATE = 5  # epochs


def rise(stored: Tables, what: str) -> float:
    """How much validation still rises on the ladder: its mean over the last epochs minus that over those before."""
    curve = stored["ladder_conversations"].curves((what,))["curve of validation"].mean(0)
    return float(curve[-LATE:].mean() - curve[-2 * LATE : -LATE].mean())


def rungs(stored: Tables) -> tables.Table:
    """The ladder's scores, of the chosen epoch and of the last one, and whether training had ended."""
    table = stored["ladder_conversations"]
    names = {"validation": "valid", "test": "same", "test, last epoch": "same, last epoch"}
    found: dict[str, dict[str, Any]] = {}
    for (what,) in table.cells:
        found[what] = {k: table.mean((what,), condition) for k, condition in names.items()}
        found[what][f"validation, last {LATE} epochs minus {LATE} before"] = rise(stored, what)
    caption = "Weighted F1, MMGCN at width 200 on conversations, Config B"
    return tables.show(pd.DataFrame(found).T, caption, source="stored", formats=".1%", fold=True)


def ladder_curves(stored: Tables) -> dict[str, dict[str, np.ndarray]]:
    """The curves of the ends of the ladder, by method; the training loss of BALM is that of its task and its heads."""
    return {what: stored["ladder_conversations"].curves((what,)) for what in study.ENDS}


def printed_gains(judged: dict[str, pd.DataFrame]) -> tables.Table:
    """The paper's gains of accuracy, and below them what differences the designs of this page find."""
    printed = gains()
    frame = pd.DataFrame(
        {
            "mean of six settings": printed.mean(axis=1),
            "smallest": printed.min(axis=1),
            "largest": printed.max(axis=1),
            "settings below its network": (printed < 0).sum(axis=1).astype(str),
        }
    )
    frame.index = [", ".join(label) for label in frame.index]
    sizes = {
        "settings of conversations": judged["central"].query("group == 'conversations'"),
        "their mean": judged["averages"].query("label == 'conversations'"),
        "settings of MOSI": judged["central"].query("group == @DATA['settings_mosi']"),
        "the ladder (weighted F1)": judged["ladder"],
    }
    ours = pd.DataFrame({k: x["detectable"].agg(["min", "median", "max"]) for k, x in sizes.items()}).T
    ours.columns = ["smallest", "median", "largest"]
    below = f"{int((printed < 0).sum().sum())} of {printed.size} cells are below the network without BALM."
    return tables.both(
        tables.show(
            frame, "The paper's +BALM minus its network, points of accuracy", source="paper", formats="+.2f", note=below
        ),
        tables.show(ours, "The difference that our MMGCN runs find four times in five", source="stored", formats=".1f"),
    )


def wrong_before(judged: dict[str, pd.DataFrame]) -> tables.Table:
    """What earlier editions of the page said, and what stands now."""
    wide, narrow = judged["ladder"].set_index("label"), judged["averages"].set_index("label")
    here = "; ".join(f"{what} {verdicts.effect(wide.loc[what])}" for what in ("BALM", "BALM as released"))
    generic = [verdicts.effect(narrow.loc[DATA[f"settings_{name}"]]) for name in ("digits", "avmnist")]
    printed = gains().mean(axis=1)
    rows = {
        "BALM is behind its backbone": f"an average that mixed networks: {generic[0]} on digits and {generic[1]} on "
        f"AV-MNIST are those of a generic network. MMGCN at the paper's width: {here}",
        "undecided, so no gain": f"the paper's mean gains are {printed.min():+.1f} to {printed.max():+.1f} points, the "
        f"smallest difference that the ladder finds {wide.loc['BALM', 'detectable']:.1f}: too few seeds and test "
        "samples either way",
        '"columns of the release"': "were (2, 0, 1) on the modalities of digits. The release pairs by name: audio's "
        "coefficient with the cosine of language, vision's with that of audio, language's with that of vision",
        '`preset="released"` was the release': "it was the noise alone; cosines by name and squared errors of scores "
        "belong to it, and one step from equal weights now equals the release's",
        "a fifth of the coefficients is negative": "if the changes of the modalities were independent. All are "
        "compared with one fused prediction, and they are not: the page on the method measures their correlations",
        "epochs chosen by accuracy": "and compared by it, where the paper and the release choose by weighted F1",
    }
    frame = pd.DataFrame({"said": list(rows), "stands": list(rows.values())})
    return tables.show(frame, "What this page said before, and what stands", source="stored", index=False)


def scores(
    stored: Tables, names: Iterable[str], methods: tuple[str, ...], caption: str, fold: bool = False
) -> tables.Table:
    """Mean scores over seeds under the rates of training: a row a setting, a column a method."""
    found = {}
    for name in names:
        for where in dict.fromkeys(label[1] for label in stored[name].cells):
            row = {m: stored[name].mean((m, where), "same") for m in methods if (m, where) in stored[name].cells}
            found[f"{DATA.get(name, 'conversations')}, {where}"] = row
    return tables.show(pd.DataFrame(found).T, caption, source="stored", formats=".1%", fold=fold)


def rates_tried(stored: Tables) -> tables.Table:
    """The validation scores at every learning rate."""
    found = {}
    for name in ("tuning_conversations", "tuning_digits", "tuning_avmnist"):
        table, data = stored[name], name.removeprefix("tuning_").replace("avmnist", "AV-MNIST")
        for method, where in dict.fromkeys(label[:2] for label in table.cells):
            row = {f"{lr:g}": table.mean((method, where, str(lr)), "valid") for lr in study.RATES_TRIED}
            found[f"{data}, {where}, {method}"] = row
    frame = pd.DataFrame(found).T
    caption = "Validation scores by learning rate, per cent"
    return tables.show(frame, caption, source="stored", formats=".1%", best="max", by="row", fold=True)


def printed_parts() -> pd.DataFrame:
    """Tables 13 to 15 for MMGCN, accuracy, with the recovered +BALM."""
    thirteen, rows = paper(13), {}
    for number, corpus in zip((14, 15), CORPORA, strict=True):
        for where in recovered().columns:
            row = {f"+{m}": thirteen[corpus, where, f"+{m} Acc"] for m in ("BALM-D", "BALM-S")}
            row["+BALM-M"] = paper(number)["MMGCN+BALM-M", where, "Acc"]
            rows[f"{corpus}, {where}"] = {**row, "+BALM": recovered().loc[(corpus, "MMGCN+BALM"), where]}
    return pd.DataFrame(rows).T


def grids(stored: Tables) -> dict[str, tuple[np.ndarray, list[str], list[str]]]:
    """Table 7 and ours: title -> scores over tau (rows) and rho (columns), and these."""
    printed, table = paper(7), stored["fullgrid_conversations"]
    taus, rhos = list(map(str, study.TAUS)), list(map(str, study.RHOS))
    found = {}
    for key in ("A", "B"):
        part = printed[key].unstack()
        found[f"paper, Config {key}"] = part.to_numpy(), list(part.index), list(part.columns)
    for key, where in (("A", A), ("B", B)):
        ours = [[100 * table.mean((where, t, r), "same").mean for r in rhos] for t in taus]
        found[f"conversations, Config {key}"] = np.array(ours), taus, rhos
    return found
