"""Print what pytest-benchmark measured, and store the ratios where asked: ``ratios.py RUN.json``.

A benchmark states how many times faster it is than its naive version in ``benchmark.extra_info["ratio"]``. With
BENCH_SAVE=1 the table is stored as ``results/DEVICE.json`` beside this file, DEVICE from BENCH_DEVICE; nothing in it
names the machine.
"""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "numpy", "pytest-benchmark")


def table(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a benchmark: its name and group, the median in milliseconds, and whatever it says of itself."""
    rows = []
    for one in run["benchmarks"]:
        extra = {k: v for k, v in one.get("extra_info", {}).items() if isinstance(v, (int, float, str, bool))}
        group = {"group": one["group"]} if one.get("group") else {}
        rows.append(
            {"benchmark": one["name"], **group, "median_ms": float(f"{1000 * one['stats']['median']:.4g}"), **extra}
        )
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    width = max([len(row["benchmark"]) for row in rows] + [9])
    lines = [f"{'benchmark':{width}}  {'median':>12}  {'ratio':>8}  more"]
    for row in rows:
        more = {k: v for k, v in row.items() if k not in ("benchmark", "group", "median_ms", "ratio")}
        ratio = f"{row['ratio']:.1f}x" if "ratio" in row else ""
        said = ", ".join(f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" for k, v in more.items())
        lines.append(f"{row['benchmark']:{width}}  {row['median_ms']:>9.3f} ms  {ratio:>8}  {said}")
    return "\n".join(lines)


def save(rows: list[dict[str, Any]], device: str, folder: Path) -> Path:
    """Store ``rows`` in ``folder/device.json``, in place of those of the same names; others stay.

    ValueError for a device whose name is no file name, or rows there that other versions measured.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]*", device):
        raise ValueError(f"BENCH_DEVICE: expected a name such as 'cpu' or 'NVIDIA H100', got {device!r}")
    path = folder / f"{device.lower().replace(' ', '-')}.json"
    versions = {name: metadata.version(name) for name in VERSIONS}
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"device": device, "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or None, "versions": versions}
    if path.exists():
        stored = json.loads(path.read_text())
        new = {row["benchmark"] for row in rows}
        kept = [row for row in stored.pop("benchmarks") if row["benchmark"] not in new]
        if kept and stored != facts:
            raise ValueError(f"{path.name}: expected rows of {facts}, got {stored}; run all benchmarks, or remove it")
        rows = [*kept, *rows]
    path.write_text(json.dumps({**facts, "benchmarks": rows}, indent=1) + "\n")
    return path


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    rows = table(json.loads(Path(arguments[0]).read_text()))
    print("\n" + text(rows))
    if os.environ.get("BENCH_SAVE") == "1":
        path = save(rows, os.environ.get("BENCH_DEVICE", ""), Path(__file__).parent / "results")
        print(f"stored in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    else:
        print('\nBENCH_SAVE=1 BENCH_DEVICE="..." make bench stores them in tests/benchmarks/results/.')


if __name__ == "__main__":
    main(sys.argv[1:])
