"""Sphinx extension: a built page tells the story, and one switch shows all code (book/_static/code.js).

The pages' code stays as it is. Here it is only marked, for the style sheet to hide until the switch is on:

- the input of cells tagged ``parameters``, ``opening``, ``hide-input`` or ``hide-cell`` (of the last the output too);
- in every other cell the lines that a reader of the story has no use for: asserts, calls whose output is what
  is shown (`SHOWN`), and blocks of nothing else. They are given the class of emphasised lines, ``hll``.

A figure gets its alternative text, and a picture of twice the density half its width. A shown source gets a link to the
reference. Marks for tools at the end of a line (noqa, fmt, type: ignore) are taken off. A cell tagged ``opening`` moves
in front of the parameters, below the title.
"""

from __future__ import annotations

import ast
import html
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from PIL import Image
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

__all__ = ["Story", "hidden_lines", "setup"]

PLUMBING = {"parameters", "opening", "hide-input", "hide-cell"}
SHOWN = {
    "chapter.source",
    "vector.svg",
    "tables.show",
    "tables.both",
    "tables.paper_and_ours",
    "verdicts.table",
    "forest.plot",
}
MARKS = re.compile(r"[ \t]*# (?:noqa|fmt|type: ignore|pragma)\b[^\n]*")


def hidden_lines(source: str) -> set[int]:
    """The lines (from 1) of a cell's ``source`` that the story leaves out; none of a cell that is not plain Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # magics
        return set()
    return {
        line
        for statement in _outermost(tree.body)
        for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
    }


def _outermost(body: list[ast.stmt]) -> list[ast.stmt]:
    found = []
    for statement in body:
        if _is_plumbing(statement):
            found.append(statement)
        elif isinstance(statement, (ast.If, ast.For, ast.With)):
            found += _outermost(statement.body)
            found += _outermost(getattr(statement, "orelse", []))
    return found


def _is_plumbing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assert):
        return True
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return ast.unparse(statement.value.func) in SHOWN
    if isinstance(statement, (ast.If, ast.For, ast.With)):
        return all(map(_is_plumbing, [*statement.body, *getattr(statement, "orelse", [])]))
    return False


def imported(sources: list[str]) -> dict[str, str]:
    """What the names of a page's imports stand for: ``from mmlib import losses`` makes losses -> mmlib.losses."""
    names: dict[str, str] = {}
    for source in sources:
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.asname: alias.name for alias in node.names if alias.asname}
    return names


def shown_things(source: str, names: dict[str, str]) -> list[str]:
    """The full names of the public things of the library whose source a cell shows."""
    found = []
    for node in ast.walk(ast.parse(source)) if "chapter.source" in source else ():
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "chapter.source" and node.args:
            head, _, rest = ast.unparse(node.args[0]).partition(".")
            try:
                thing = pkgutil.resolve_name(f"{names.get(head, head)}.{rest}".rstrip("."))
            except (ImportError, AttributeError, ValueError):
                continue
            module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
            public = getattr(sys.modules.get(module), "__all__", ())
            own = name.split(".")[-1]
            if module.startswith("mmlib.") and name.split(".")[0] in public and not own.startswith("_"):
                documented = name if thing.__doc__ else name.rpartition(".")[0]  # the reference leaves the others out
                found.append(f"{module}.{documented}".rstrip("."))
    return found


class Story(SphinxTransform):
    """Mark code and move the opening; see the module."""

    default_priority = 400

    def apply(self, **options: Any) -> None:
        cells = [n for n in self.document.findall(nodes.container) if n.get("nb_element") == "cell_code"]
        for cell in cells:
            tags = set(cell.get("cell_metadata", {}).get("tags", []))
            if tags & PLUMBING:
                cell["classes"].append("mm-plumbing-all" if "hide-cell" in tags else "mm-plumbing")
                cell.attributes.pop("hide_mode", None)
            for block in self._inputs(cell):
                self._mark(cell, block)
            self._describe(cell)
        names = imported([block.astext() for cell in cells for block in self._inputs(cell)])
        for cell in cells:
            self._refer(cell, names)
        self._move_opening(cells)

    @staticmethod
    def _inputs(cell: nodes.container) -> list[nodes.literal_block]:
        inputs = [n for n in cell.children if isinstance(n, nodes.container) and "cell_input" in n["classes"]]
        return [block for n in inputs for block in n.findall(nodes.literal_block)]

    @staticmethod
    def _mark(cell: nodes.container, block: nodes.literal_block) -> None:
        text = MARKS.sub("", block.rawsource or block.astext())
        block.rawsource = text
        block.children = []
        block += nodes.Text(text)
        hidden = hidden_lines(text)
        lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")}
        if hidden >= lines and "mm-plumbing" not in cell["classes"]:
            cell["classes"].append("mm-plumbing")
        elif hidden:
            block["highlight_args"] = {**block.get("highlight_args", {}), "hl_lines": sorted(hidden)}

    @staticmethod
    def _describe(cell: nodes.container) -> None:
        """The alternative text of an inline SVG; the width of a PNG that says 220 dots an inch."""
        alt = cell.get("cell_metadata", {}).get("mystnb", {}).get("image", {}).get("alt", "")
        for raw in cell.findall(nodes.raw):
            if alt and '<svg role="img" viewBox' in raw.astext():
                labelled = f'<svg role="img" aria-label="{html.escape(alt)}" viewBox'
                raw.children = [nodes.Text(raw.astext().replace('<svg role="img" viewBox', labelled))]
        for image in cell.findall(nodes.image):
            if image["uri"].endswith(".png") and Path(image["uri"]).exists():
                with Image.open(image["uri"]) as picture:
                    if picture.info.get("dpi", (0, 0))[0] > 200:
                        image["width"] = f"{picture.width // 2}px"

    def _refer(self, cell: nodes.container, names: dict[str, str]) -> None:
        """Below a shown source, where the reference has it."""
        things = [thing for block in self._inputs(cell) for thing in shown_things(block.astext(), names)]
        if not things:
            return
        paragraph = nodes.paragraph("", "In the reference: ", classes=["mm-reference"])
        for i, thing in enumerate(things):
            link = addnodes.pending_xref(
                "", nodes.literal("", thing), refdomain="py", reftype="obj", reftarget=thing, refexplicit=True
            )
            link["refdoc"] = self.env.docname
            paragraph += [nodes.Text(", "), link] if i else [link]
        cell += paragraph

    @staticmethod
    def _move_opening(cells: list[nodes.container]) -> None:
        tagged = {tag: c for c in cells for tag in c.get("cell_metadata", {}).get("tags", [])}
        opening, parameters = tagged.get("opening"), tagged.get("parameters")
        if opening is not None and parameters is not None and opening.parent is parameters.parent:
            parent = opening.parent
            parent.remove(opening)
            parent.insert(parent.index(parameters), opening)


def setup(app: Any) -> dict[str, bool]:
    app.add_transform(Story)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
