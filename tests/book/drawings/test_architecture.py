"""The page on the architecture shows what the library is: its pictures come from its imports."""

from __future__ import annotations

import pytest

from book.drawings import architecture
from book.support import build, figures, vector


def test_every_part_of_the_library_has_its_box() -> None:
    parts = {p.stem if p.suffix == ".py" else p.name for p in architecture.LIBRARY.iterdir() if p.name[0] != "_"}
    assert parts - {"py.typed", "py"} == (set(architecture.PLACES) - {"released"}) | architecture.FLOOR


def test_no_import_goes_up() -> None:
    place = architecture.PLACES
    assert all(place[a][1] >= place[b][1] for a, b in architecture.imports())


def test_arrows_that_others_say_are_left_out() -> None:
    assert architecture.needed({("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")}) == {("a", "b"), ("b", "c"), ("a", "d")}


def test_the_map_of_the_chapters_has_every_chapter() -> None:
    found = {page.rpartition("/")[2] for page in build.contents() if page.split("/")[1] in ("foundations", "methods")}
    assert set(architecture.CHAPTERS) == found | {"evidence"}
    assert set(architecture.BEFORE) == found - {"missing-modalities"} | {"evidence"}


@pytest.mark.parametrize("name", ["layers", "path", "chapters"])
def test_the_committed_pictures_are_up_to_date(name: str) -> None:
    figures.use_style()
    drawn = vector.markup(getattr(architecture, name)(), "")
    stored = (build.ROOT / "book" / "_static" / f"{name}.svg").read_text(encoding="utf-8")
    assert stored == drawn, "run python -m book.support.build figures"
