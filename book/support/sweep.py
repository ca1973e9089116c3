"""The command line behind the stored tables of a chapter: ``python -m book.studies.CHAPTER TABLE...``.

A table is a function that gives its *cells*: a label per axis -> the configs of that cell, one a seed. The command
fills ``book/results/CHAPTER-TABLE.csv`` with what is not there yet; the chapter reads the rows of the same configs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from book.support import experiments

RESULTS = Path(__file__).resolve().parents[1] / "results"

Config = dict[str, Any]
Cells = dict[tuple[str, ...], list[Config]]

# The synthetic data of DREAM's and DEAR's tables: language is worth two fifths of the score and clean, vision is noisy;
# each knows one bit of its own, all share one
UNEQUAL: Config = {
    "task": "regression",
    "frames": {"language": 6, "audio": 8, "vision": 4},
    "noise": {"language": 1.0, "audio": 1.5, "vision": 2.0},
    "weights": {"language_0": 2.0},
    "xor": None,
}


@dataclass(frozen=True)
class Sweep:
    """The tables of a chapter, where their rows are, and what runs them."""

    chapter: str  # "mce": its runs are `book.studies.mce`
    tables: Mapping[str, Callable[[], Cells]]
    run: experiments.Run = experiments.train_and_score
    runners: Mapping[str, experiments.Run] = field(default_factory=dict)  # of tables with another one
    files: Mapping[str, str] = field(default_factory=dict)  # tables that share runs with another one share its file

    def path(self, table: str, results: Path = RESULTS) -> Path:
        """The results file of a table."""
        return results / f"{self.chapter}-{self.files.get(table, table).replace('_', '-')}.csv"

    def command(self, table: str) -> str:
        """What a reader types to fill a table."""
        return f"python -m book.studies.{self.chapter} {table} --data-root FOLDER"

    def configs(self, table: str, seeds: int | None = None) -> list[Config]:
        """The runs of a table, at most ``seeds`` of each cell, in the order in which they are worth having.

        Seed by seed, so that what an interruption leaves is a table with fewer seeds; within a seed, variants under one
        plan stand together, since a process keeps the frozen models that they share.
        """
        cells = list(self.tables[table]().values())
        most = max(map(len, cells)) if seeds is None else seeds
        found = [runs[k] for k in range(most) for runs in cells if k < len(runs)]
        return sorted(found, key=lambda config: (config["seed"], str(config.get("train_plan"))))

    def main(self, arguments: list[str] | None = None) -> None:
        """Fill the tables that ``arguments`` name, those of the command line where they are None."""
        parser = argparse.ArgumentParser(
            prog=f"python -m book.studies.{self.chapter}",
            description="Fill tables of results with what is not there yet.",
        )
        parser.add_argument("tables", nargs="+", choices=list(self.tables))
        parser.add_argument(
            "--data-root",
            default=os.environ.get("MMLIB_DATA"),
            help="the folder with mosi/, mnist/, fsdd/, mfeat/",
        )
        parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
        parser.add_argument("--seeds", type=int, default=None, help="only so many of each cell's seeds")
        parser.add_argument("--results", type=Path, default=RESULTS)
        given = parser.parse_args(arguments)
        for table in given.tables:
            place = {"data_root": given.data_root, "device": "cpu"}
            configs = [{**config, **place} for config in self.configs(table, given.seeds)]
            print(f"{table}: {len(configs)} runs", file=sys.stderr, flush=True)
            experiments.load_or_run(
                self.path(table, given.results),
                configs,
                self.runners.get(table, self.run),
                workers=given.workers,
                command=self.command(table),
                progress=True,
            )
