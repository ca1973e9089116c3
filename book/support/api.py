"""Sphinx extension: the library's plain docstrings as reStructuredText, for the page `reference.md`.

The docstrings are written to be read in an editor: paragraphs, lists that start with ``*``, and lines "name : what"
whose continuation is indented. Sphinx would take the asterisks of shapes such as [*N, T, D] for emphasis and names
between single backticks for references.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from sphinx.util.inspect import stringify_signature

ITEM = re.compile(r"^([A-Za-z_][\w.\[\], *]*?) : (\S.*)$")
SPAN = re.compile(r"(``[^`]+``|`[^`]+`|\$[^$]+\$|:[a-z:]+:`[^`]+`)")
TYPE = re.compile(r"^(dict|list|tuple|bool|float|int\d*|str|Tensor)\b[^.;:,]*$")


def inline(text: str) -> str:
    """One line of prose: code between backticks as literals, everything else without meaning to docutils."""
    parts = SPAN.split(text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            words = re.split(r"((?<![\w*])\*\w[\w -]*\w\*(?![\w*]))", part)  # *emphasis* stays
            words[::2] = [re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", w) for w in words[::2]]
            parts[i] = "".join(words)
            # docutils wants a non-word character after the end of a literal
            if i and parts[i][:1].isalnum():
                parts[i] = "\\ " + parts[i]
        elif part.startswith("$"):
            parts[i] = f":math:`{part[1:-1]}`"
        elif part.startswith("`") and not part.startswith("``"):
            parts[i] = f"`{part}`"
    return "".join(parts)


def restructured(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText: parameters and lists as bullets, indented blocks after "::" kept."""
    out: list[str] = []
    literal_margin: int | None = None
    in_item = False
    for n, line in enumerate(lines):
        text, margin = line.strip(), len(line) - len(line.lstrip())
        if literal_margin is not None:
            if not text or margin > literal_margin:
                out.append(line)
                continue
            literal_margin = None
        if not text:
            out.append("")
            in_item = False
            continue
        if margin == 0 and (item := ITEM.match(text)):
            names = ", ".join(f"**{inline(n.strip())}**" for n in item[1].split(","))
            if out and out[-1]:
                out.append("")
            out.append(f"* {names}: {inline(item[2])}")
            if TYPE.match(item[2]) and n + 1 < len(lines) and lines[n + 1].startswith(" "):
                out[-1] += ";"
            in_item = True
        elif margin == 0 and (bullet := re.match(r"^([*-]) (.*)$", text)):
            if out and out[-1]:
                out.append("")
            out.append(f"* {inline(bullet[2])}")
            in_item = True
        elif margin and in_item:
            out.append("  " + inline(text))
        else:
            if in_item:
                out.append("")
                in_item = False
            out.append((" " * margin if literal_margin is not None else "") + inline(text))
        if text.endswith("::"):
            literal_margin = margin
    return out


def _docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = restructured(list(lines)) + [""]


def _signature(app: Any, what: str, name: str, obj: Any, options: Any, arguments: Any, returns: Any) -> Any:
    """Defaults that a dataclass makes by a factory, and Sphinx's marks for shortened names, say nothing to a reader."""

    def plain(text: str | None) -> str | None:
        for old, new in ((" = <factory>", " = ..."), ("~torch.Tensor", "Tensor"), ("torch._C.", "torch."), ("~", "")):
            text = text.replace(old, new) if text else text
        return re.sub(r"\b(collections\.abc|typing|mmlib\.missing(?=\.Data))\.", "", text) if text else text

    if what == "class" and arguments and arguments.startswith("(*args"):
        arguments = _own(obj)
    return plain(arguments), plain(returns)


def _own(kind: type) -> str:
    """What ``__init__`` takes, of a class whose ``__new__`` only picks a subclass (`mmlib.methods.MCE` and others)."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    own = [p for name, p in signature.parameters.items() if name != "self"]
    return stringify_signature(signature.replace(parameters=own, return_annotation=signature.empty))


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a named tuple are in its docstring."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
