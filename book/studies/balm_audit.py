"""Sentences of BALM's supplement, each against the table it speaks of, and averages recomputed.

`audit` computes what `book/paper_tables/audit.csv` stores of BALM; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from book.studies.balm_claims import CORPORA, paper, recovered

__all__ = ["audit"]

Finding = tuple[str, str, str, str, str]  # item, printed, recomputed, severity, note
ROUNDING = 0.0101


def _judge(agrees: bool, severity: str = "minor") -> str:
    return "none" if agrees else severity


def _grid() -> Iterator[Finding]:
    """Appendix F.1 on Table 7, weighted F1 over tau and rho."""
    tables = {key: paper(7)[key].unstack() for key in ("A", "B")}
    inside = int(((tables["A"] >= 63) & (tables["A"] <= 64)).sum().sum())
    yield "F.1 on Table 7, Config A", "mostly 63 to 64", f"{inside} of 25 cells", _judge(inside > 12), ""
    best = {key: table.stack().idxmax() for key, table in tables.items()}
    agrees = all(0.2 < float(best[key][0]) <= 0.8 for key in "AB")
    found = ", ".join(best[key][0] for key in "AB")
    yield "Table 6 and 7, tau of the best cells", "in (0.2, 0.8]", found, _judge(agrees), "Config A, Config B"
    peaks = tables["B"].idxmax(axis=1)
    agrees = bool((peaks.astype(float) <= 1.4).all())
    yield (
        "F.1 on Table 7, Config B, higher rho",
        "always degrades",
        "best rho " + ", ".join(peaks),
        _judge(agrees, "major"),
        "by tau",
    )
    others = tables["A"].stack().drop(best["A"])
    spread = float(others.max() - others.min())
    yield "F.1 on Table 7, Config A, all but the best", "within about 2", f"{spread:.2f}", _judge(spread <= 2.25), ""


def _means(item: str, count: int, wrong: int) -> Finding:
    return item, f"{count} averages", f"{wrong} do not follow" if wrong else "all follow", _judge(not wrong), ""


def _averages(number: int, what: str) -> Iterator[Finding]:
    cells = paper(number).unstack()
    means = cells.drop("Average", level="group").groupby("row").mean()
    printed = cells.loc["Average"]
    wrong = int(((means - printed).abs() > ROUNDING).sum().sum())
    yield _means(f"Table {number}, averages of {what}", printed.size, wrong)
    gcnet = cells.drop("Average", level="group").swaplevel()
    worse = int((gcnet.loc["GCNet+BALM"] < gcnet.loc["GCNet"]).sum().sum())
    found = f"lower in {worse} of 42 cells"
    yield f"Table {number}, GCNet with BALM", "consistently higher", found, _judge(not worse, "major"), what
    a, b = (printed.loc[row, "V"] for row in ("GCNet", "GCNet+BALM"))
    item = f"Table {number}, GCNet with BALM, V alone, average"
    yield item, "higher", f"{a:.2f} to {b:.2f}", _judge(bool(b > a), "major"), what


def _calibration() -> Iterator[Finding]:
    """Table 10 and Appendix F.2."""
    table = paper(10).unstack("row")
    kept = table.drop(columns="Avg")
    wrong = int(((kept.mean(axis=1) - table["Avg"]).abs() > ROUNDING).sum())
    yield _means("Table 10, averages", len(table), wrong)
    pairs = [(c, s) for c in CORPORA for s in ("Acc", "w-F1")]
    lower = sum(int((kept.loc[(c, f"+FCM {s}")] < kept.loc[(c, f"MMGCN {s}")]).sum()) for c, s in pairs)
    found = f"lower in {lower} of 28 cells"
    yield "F.2 on Table 10, FCM", "consistent improvement", found, _judge(not lower, "major"), ""
    yield "Table 10, what was added", "+FCM (caption)", "+BALM (text)", "minor", "the two contradict each other"


def _shared() -> Iterator[Finding]:
    """Appendix F.3 on Table 11, accuracy by shared rate."""
    table = paper(11).unstack().loc[:, "Acc"].unstack()
    for net, start, end in (("Mi-CGA", "0.6", "0.7"), ("SDR-GNN", "0.5", "0.6"), ("GCNet", "0.5", "0.6")):
        fall = float(table.loc[net, start] - table.loc[net, end])
        item = f"F.3 on Table 11, {net}, from {start} to {end}"
        yield item, "loses over 3", f"{fall:.2f}", _judge(fall > 3), ""
    largest = float((-table.diff(axis=1).iloc[:, 1:]).loc[["MMGCN+BALM", "MMDFN+BALM"]].max().max())
    found = f"up to {largest:.2f}"
    yield "F.3 on Table 11, BALM loses a step", "only 1 to 2", found, _judge(largest <= 2.05, "major"), ""


def _parts() -> Iterator[Finding]:
    """Appendices F.4 and F.5 on Tables 13 to 15; Table 8 against the main table."""
    gap = pd.concat([paper(n).xs("gap", level="column") for n in (14, 15)])
    worse = int((gap > 0).sum())
    found = f"worse in {worse} of {len(gap)} cells"
    yield (
        "F.5 on Tables 14 and 15, KL against squared error",
        "consistently better",
        found,
        _judge(not worse, "major"),
        "",
    )
    whole, thirteen = recovered(), paper(13)
    ahead = sum(
        whole.loc[(c, "MMGCN+BALM"), w] > max(thirteen[c, w, f"+{part} Acc"] for part in ("BALM-D", "BALM-S"))
        for c in CORPORA
        for w in whole.columns
    )
    found = f"best of three in {ahead} of 12 settings"
    yield "F.4 on Table 13, BALM against both halves", "better overall", found, _judge(ahead > 6), ""
    alv = paper(8)
    common = [w for w in whole.columns if (w, "MMGCN+BALM", "ALV") in alv.index]
    differ = [w for w in common if abs(alv[w, "MMGCN+BALM", "ALV"] - whole.loc[("IEMOCAP", "MMGCN+BALM"), w]) > 0.011]
    found = f"{len(differ)} of {len(common)} settings differ"
    yield "Table 8, ALV, against the main table", "the same", found, _judge(not differ, "major"), "+BALM recovered"


def _words() -> Iterator[Finding]:
    total = int(paper(5).sort_index()["utterances", "CMU-MOSEI"].sum())
    yield "C.1, utterances of CMU-MOSEI", "22,856", f"{total:,}", _judge(total == 22_856), "Table 5"
    yield "Algorithm 1 and Appendix E, order of the rates", "(a, v, l)", "(A, L, V)", "minor", ""
    yield "Eq. 36 as printed", "a ratio", "0 for every subset", "major", "meant is 1 - r where e = 1, and r where not"
    yield "Eq. 33", "follows from Eq. 32", "does not", "minor", "the norm of a mean is not the mean of the norms"
    said = "Lemma 1 explains the backbones", "none minimises Eq. 29"
    yield "Lemma 1", *said, "minor", "it is about a sum of unimodal losses"


def audit() -> pd.DataFrame:
    """paper, item, printed, recomputed, severity ("none" agrees), note."""
    found: list[Finding] = [*_grid(), *_averages(8, "accuracy"), *_averages(9, "weighted F1"), *_calibration()]
    found += [*_shared(), *_parts(), *_words()]
    frame = pd.DataFrame(found, columns=["item", "printed", "recomputed", "severity", "note"])
    frame.insert(0, "paper", "BALM")
    return frame
