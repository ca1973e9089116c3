"""The top of every page: the verdict in five lines, computed, and one card.

In the first cell after the set-up, tagged ``opening``; on the built page it stands before the parameters.

    page.opening(
        verdict={
            "supported": verdicts.sentence(row),
            "not supported": "...",
            "cost": f"{ratio:.1f} times a step of joint training",
            "use it when": "...",
        },
        venue="Pattern Recognition 2025", claim="...", needs="...", cost="...", minutes="1",
    )
"""

from __future__ import annotations

from collections.abc import Mapping

from book.support.tables import Table, _inline

__all__ = ["CARD", "opening"]

CARD = ("question", "venue", "claim", "needs", "data", "cost", "library", "minutes")
_LABELS = {"minutes": "This page", "needs": "You need"}


def opening(verdict: Mapping[str, str] | None = None, **card: str) -> Table:
    """The verdict, a line an entry (label: text; at most six), and the card with entries out of `CARD`, in that order.

    Text may hold `code` and **bold**. Method and evidence pages have a verdict, foundations a card alone. Raises
    ValueError for a longer verdict, another entry of the card, or one without ``needs`` or ``minutes``.
    """
    lines = dict(verdict or {})
    if len(lines) > 6:
        raise ValueError(f"verdict: expected at most six lines, got {len(lines)}")
    if unknown := sorted(set(card) - set(CARD)):
        raise ValueError(f"card: unknown entries {unknown}; known are {list(CARD)}")
    if missing := sorted({"needs", "minutes"} - set(card)):
        raise ValueError(f"card: {missing} are missing")
    facts = {_LABELS.get(k, k.capitalize()): card[k] for k in CARD if k in card}
    parts, text = [], []
    for kind, title, entries in (("mm-verdict", "Verdict", lines), ("mm-card", "Card", facts)):
        if entries:
            rows = "".join(f"<dt>{_inline(k)}</dt><dd>{_inline(v)}</dd>" for k, v in entries.items())
            parts.append(f'<aside class="{kind}" aria-label="{title}"><dl>{rows}</dl></aside>')
            text += [f"{title}:", *(f"  {k}: {v}" for k, v in entries.items())]
    return Table("".join(parts), "\n".join(text))
