"""Execute the chapters, build the book: ``python -m book.support.build COMMAND``.

Commands: execute, html, refresh [FILE...], figures, status. ``execute`` and ``html`` work on copies under ``_build/``
and never touch a tracked file. ``refresh`` rewrites the outputs that are committed, ``figures`` the pictures in
``book/_static``.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

from book.support import downloads
from mmlib.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "_build" / "book-src"
FACTS = ROOT / "book" / "results" / "chapters.json"
STATUS, SPEED, COMPARE = (ROOT / "book" / f"{page}.md" for page in ("status", "speed", "how-we-compare"))
BENCHMARKS = ROOT / "tests" / "benchmarks" / "results"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
VERSIONS = ("torch", "numpy", "scikit-learn", "matplotlib")
STAMP = "fingerprint.txt"  # what the copies were made of
COPIED = {".md", ".ipynb", ".bib", ".csv", ".py", ".png", ".svg", ".css", ".js"}
REDIRECT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Learning with missing modalities</title>
<link rel="icon" href="data:,"><meta http-equiv="refresh" content="0; url={page}"></head>
<body><a href="{page}">Learning with missing modalities</a></body></html>
"""


# ------------------------------------------------------------------ notebooks


def chapters() -> list[Path]:
    """The committed chapters, in the order of the table of contents; those that it does not name come last."""
    found = sorted((ROOT / "book").rglob("*.ipynb"))
    found = [p for p in found if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts)]
    named = contents()
    place = {name: i for i, name in enumerate(named)}
    return sorted(found, key=lambda p: (place.get(_name(p), len(named)), _name(p)))


def contents(root: Path = ROOT) -> list[str]:
    """The pages that ``_toc.yml`` names, such as ``book/intro``, in their order."""
    import yaml

    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    pages = [page for part in toc["parts"] for page in part["chapters"]]
    return [toc["root"]] + [one["file"] for page in pages for one in (page, *page.get("sections", ()))]


def problems(notebook: Any) -> list[str]:
    """Why the executed ``notebook`` is not fit to commit: errors, injected cells, stderr, counts other than 1 to n."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for i, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        if added := {"papermill-error-cell-tag", "injected-parameters"} & set(tags):
            found.append(f"cell {i}: papermill added it ({', '.join(added)})")
        for output in cell.get("outputs", []):
            if output.output_type == "error" and "raises-exception" not in tags:
                found.append(f"cell {i}: {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {i}: it writes to stderr: {output.text.strip()[:200]!r}")
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"execution counts are {counts}, expected 1 to {len(code)}")
    if "papermill" in notebook.metadata:
        found.append("metadata.papermill is there")
    return found


def clean(notebook: Any) -> Any:
    """``notebook`` without what differs between runs and machines: times, papermill's notes, the kernel's version."""
    from book.support.story import PLUMBING

    for note in ("papermill", "widgets"):
        notebook.metadata.pop(note, None)
    notebook.metadata["kernelspec"] = dict(KERNEL)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [c for c in notebook.cells if c.cell_type != "code" or c.source.strip()]
    for cell in notebook.cells:
        for note in ("papermill", "execution", "collapsed", "scrolled", "ExecuteTime", "lines_to_next_cell"):
            cell.metadata.pop(note, None)
        if cell.metadata.get("tags") == []:
            cell.metadata.pop("tags")
        if PLUMBING & set(cell.metadata.get("tags", [])):
            cell.metadata["jupyter"] = {"source_hidden": True}  # JupyterLab collapses it, as the page does
    return notebook


def run(source: Path, target: Path, cwd: Path | None = None, timeout: int = 1800, **parameters: Any) -> float:
    """Execute the notebook ``source`` with papermill into ``target``; the minutes that it took.

    The kernel works in ``cwd`` (default: the folder of ``target``), finds the library, shows its pictures inline, and
    uses one thread, so that numbers agree between machines. A cell that fails raises papermill's
    PapermillExecutionError; the partial notebook stays at ``target``.
    """
    import papermill

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("MPLBACKEND", None)
    target.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    papermill.execute_notebook(
        source,
        target,
        parameters=parameters or None,
        kernel_name="python3",
        progress_bar=False,
        cwd=str(cwd or target.parent),
        execution_timeout=timeout,
        extra_arguments=["--log-level=ERROR"],  # of the kernel: no warnings about its own transport
    )
    return (time.perf_counter() - start) / 60


def _attempt(source: Path, target: Path) -> tuple[float, str]:
    """`run` for a worker process: the minutes, and what went wrong or nothing."""
    from papermill.exceptions import PapermillExecutionError

    try:
        return run(source, target), ""
    except PapermillExecutionError as error:
        return 0.0, f"cell [{error.exec_count}] raised {error.ename}: {error.evalue}\n\n{error.source.strip()}"
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {error}"


# ------------------------------------------------------------------ the book


def prepare(folder: Path = SOURCES) -> list[Path]:
    """Copy everything that the book is made of to ``folder``, emptied first; the copied chapters in reading order."""
    if missing := [p for p in contents() if not any((ROOT / f"{p}{end}").exists() for end in (".md", ".ipynb"))]:
        raise SystemExit(f"_toc.yml names pages that do not exist: {', '.join(missing)}")
    shutil.rmtree(folder, ignore_errors=True)
    for file in [ROOT / "_config.yml", ROOT / "_toc.yml", *sorted((ROOT / "book").rglob("*"))]:
        inside = file.relative_to(ROOT)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
        if file.is_file() and not hidden and file.suffix in COPIED | {".yml"}:
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / inside)
    (folder / STAMP).write_text(fingerprint())
    return [folder / p.relative_to(ROOT) for p in chapters() if _name(p) in contents()]


def fingerprint() -> str:
    """Of all that the copies are made of and run on: pages, chapters, what stands behind them, and the library."""
    files = [
        ROOT / "_config.yml",
        ROOT / "_toc.yml",
        *(p for top in ("book", "mmlib") for p in (ROOT / top).rglob("*")),
    ]
    found = hashlib.sha256()
    for file in sorted(files):
        if file.suffix in COPIED | {".yml"} and file.is_file():
            found.update(
                file.relative_to(ROOT).as_posix().encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest()
            )
    return found.hexdigest()


def stale(folder: Path = SOURCES) -> str:
    """Why the copies in ``folder`` are not what a book can be built from; empty where they are."""
    if not (folder / STAMP).exists():
        return "No executed copies"
    same = (folder / STAMP).read_text() == fingerprint()
    return "" if same else "Book or library changed since the chapters were executed"


def execute(copies: Sequence[Path], processes: int | None = None) -> None:
    """Execute the chapters ``copies`` in place with their default parameters; two at a time where there are two cores.

    Raises SystemExit with the failing cell and the path of the partial notebook.
    """
    processes = min(processes or 2, os.cpu_count() or 1, len(copies))
    print(f"Executing {len(copies)} chapters, {processes} at a time. A chapter takes about a minute.", flush=True)
    with ProcessPoolExecutor(processes) as pool:
        waiting = {}
        for copy in copies:
            partial = copy.with_suffix(".running.ipynb")
            waiting[pool.submit(_attempt, copy, partial)] = (copy, partial)
        for done, future in enumerate(as_completed(waiting), start=1):
            copy, partial = waiting[future]
            minutes, wrong = future.result()
            if wrong:
                pool.shutdown(wait=False, cancel_futures=True)
                kept = f"\n\nThe notebook up to there: {_short(partial)}" if partial.exists() else ""
                raise SystemExit(f"\n{copy.stem} failed: {wrong}{kept}")
            os.replace(partial, copy)
            print(f"[{done}/{len(copies)}] {copy.stem}: {60 * minutes:.0f} s", flush=True)


def html(sources: Path = SOURCES, output: Path = ROOT) -> Path:
    """Build ``sources`` into ``output/_build/html``; its index. Warnings are errors, every reference must resolve.

    Where there are no ``sources``, or book or library changed since `prepare` made them, they are made first, with
    the committed outputs.
    """
    if why := stale(sources):
        print(f"{why}: building from the committed outputs.", flush=True)
        prepare(sources)
    shutil.rmtree(output / "_build" / "html", ignore_errors=True)
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(sources)]
    built = subprocess.run(
        [*command, "--path-output", str(output), "-W", "-n", "--keep-going", "--all"], env=environment, cwd=ROOT
    )
    index = output / "_build" / "html" / "index.html"
    if built.returncode or not index.exists():
        raise SystemExit("The book did not build: the warnings above (marked WARNING or ERROR) are to be mended.")
    # Jupyter Book's own redirect names no icon, so that browsers ask the host for /favicon.ico; this one has an
    # empty icon, since it is left before another could be fetched.
    index.write_text(REDIRECT.format(page=f"{contents(sources)[0]}.html"))
    for page in contents(sources):
        if (notebook := sources / f"{page}.ipynb").exists():
            downloads.pack(notebook, f"{page}.ipynb", index.parent / "_downloads" / f"{page}.zip")
    return index


# ------------------------------------------------------------------ committed outputs


def refresh(files: Sequence[Path]) -> None:
    """Execute ``files`` with their default parameters, check and clean them, and write each back whole or not at all.

    Notes what a reader wants to know of the run in ``book/results/chapters.json`` and on the page of the status.
    """
    import nbformat

    for file in files:
        scratch = ROOT / "_build" / "refresh" / file.name
        source = scratch.with_suffix(".source.ipynb")
        print(f"{_short(file)} ...", flush=True)
        neat = [sys.executable, "-m", "ruff", "format", "--quiet", "--stdin-filename", str(file), "-"]
        formatted = subprocess.run(neat, cwd=ROOT, check=True, input=file.read_bytes(), stdout=subprocess.PIPE).stdout
        atomic_write(source, formatted)
        minutes = run(source, scratch, cwd=file.parent)
        notebook = clean(nbformat.read(scratch, as_version=4))
        if wrong := problems(notebook):
            raise SystemExit(
                f"{_short(file)} is not fit to commit:\n  " + "\n  ".join(wrong) + f"\nThe run: {_short(scratch)}"
            )
        nbformat.validate(notebook)
        atomic_write(file, (nbformat.writes(notebook) + "\n").encode())
        scratch.unlink()
        source.unlink()
        if file.resolve().is_relative_to(ROOT / "book"):
            _note(file, minutes)
        print(f"{_short(file)}: {60 * minutes:.0f} s, {file.stat().st_size / 1024:.0f} KiB", flush=True)
    write_status()


def _note(file: Path, minutes: float) -> None:
    import torch

    facts = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    facts[_name(file)] = {
        "minutes": max(0.1, round(minutes, 1)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        **{name: metadata.version(name).split("+")[0] for name in VERSIONS},
    }
    known = {_name(p) for p in chapters()}
    stored = {k: v for k, v in sorted(facts.items()) if k in known}
    atomic_write(FACTS, (json.dumps(stored, indent=1) + "\n").encode())


def status_table() -> str:
    """The chapters as a table: minutes, device and versions of the runs whose outputs are committed."""
    facts = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    rows = [
        "| Chapter | Minutes | Device | Python | " + " | ".join(VERSIONS) + " |",
        "| --- " * (4 + len(VERSIONS)) + "|",
    ]
    for chapter in chapters():
        if (name := _name(chapter)) in contents() and name in facts:
            fact = facts[name]
            values = [f"{{doc}}`{name.removeprefix('book/')}`", fact["minutes"], fact["device"], fact["python"]]
            rows.append("| " + " | ".join(str(v) for v in [*values, *(fact[v] for v in VERSIONS)]) + " |")
    return "\n".join(rows)


def coverage_table() -> str:
    """``coverage.csv`` as a table whose last column links to what is there."""
    with (ROOT / "book" / "coverage.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = ["| Paper | Item | What it shows | Status | Where |", "| --- " * 5 + "|"]
    for row in rows:
        page, _, label = row["page"].partition("#")
        link = (
            f"[{page.rpartition('/')[2].replace('-', ' ').capitalize()}](#{label})"
            if label
            else f"{{doc}}`{page}`"
            if page
            else ""
        )
        lines.append(f"| {row['paper']} | {row['item']} | {row['shows']} | {row['status']} | {link} |")
    return "\n".join(lines)


def speed_table() -> str:
    """What ``make bench`` has stored, a table a device: how much faster than a naive version, and what else it says."""
    parts = []
    for file in sorted(BENCHMARKS.glob("*.json")):
        run = json.loads(file.read_text())
        threads = f", {run['threads']} thread" + "s" * (run["threads"] > 1) if run["threads"] else ""
        version = run["versions"]["torch"].split("+")[0]
        lines = [f"### {run['device'].replace('cpu', 'CPU')}{threads}, torch {version}", ""]
        lines += ["| What | Median, ms | Times the naive version | More |", "| :-- | --: | --: | :-- |"]
        group = None
        for row in run["benchmarks"]:
            if row.get("group") and row["group"] != group:
                lines.append(f"| **{row['group']}** | | | |")
                group = row["group"]
            name, _, variant = row["benchmark"].removeprefix("test_").rstrip("]").partition("[")
            variants = [f"`{part}`" for part in variant.split("-") if part not in ("", "cpu", "cuda")]
            more = {k: v for k, v in row.items() if k not in ("benchmark", "group", "median_ms", "ratio")}
            said = "; ".join(f"{k.replace('_', ' ')} {_number(v)}" for k, v in more.items())
            cells = [
                ", ".join([name.replace("_", " "), *variants]),
                _number(row["median_ms"]),
                _number(row.get("ratio")),
            ]
            lines.append(f"| {' | '.join(cells)} | {said} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def write_status() -> None:
    """Put the tables that code makes between their marks on the pages status, speed and how we compare."""
    from book.studies import compare

    tables = {
        STATUS: {"coverage": coverage_table()},
        SPEED: {"chapters": status_table(), "speed": speed_table()},
        COMPARE: compare.tables(),
    }
    for path, parts in tables.items():
        if not path.exists():
            continue
        page = new = path.read_text(encoding="utf-8")
        for name, table in parts.items():
            head, _, rest = new.partition(f"<!-- {name}: begin -->")
            _, _, tail = rest.partition(f"<!-- {name}: end -->")
            new = f"{head}<!-- {name}: begin -->\n{table}\n<!-- {name}: end -->{tail}"
        if new != page:
            atomic_write(path, new.encode())


def figures() -> None:
    """Draw the pictures that pages and README show."""
    import matplotlib

    matplotlib.use("Agg")
    from book.drawings import architecture
    from book.support import overview, vector
    from book.support.figures import use_style

    static = ROOT / "book" / "_static"
    use_style()
    for name, draw in (
        ("layers", architecture.layers),
        ("path", architecture.path),
        ("chapters", architecture.chapters),
    ):
        atomic_write(static / f"{name}.svg", vector.markup(draw(), "").encode())
        print(_short(static / f"{name}.svg"))
    overview.draw(static / "overview.png")
    print(_short(static / "overview.png"))


def _name(path: Path) -> str:
    return path.resolve().relative_to(ROOT).with_suffix("").as_posix()


def _short(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m book.support.build", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("execute", help="copy the book to _build/book-src and execute the chapters there")
    commands.add_parser("html", help="build the copies into _build/html")
    one = commands.add_parser("refresh", help="rewrite the committed outputs of chapters (default: all)")
    one.add_argument("files", nargs="*", type=Path)
    commands.add_parser("figures", help="draw the pictures in book/_static")
    commands.add_parser("status", help="write the tables that code makes on pages again, as refresh does")
    given = parser.parse_args(arguments)
    if given.command == "execute":
        execute(prepare())
    elif given.command == "html":
        print(f"\nThe book is built. Open {html()}")
    elif given.command == "refresh":
        if missing := [str(f) for f in given.files if not f.exists()]:
            parser.error(f"no such file: {', '.join(missing)}")
        refresh([f.resolve() for f in given.files] or chapters())
    elif given.command == "figures":
        figures()
    else:
        write_status()


if __name__ == "__main__":
    main()
