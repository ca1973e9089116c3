"""The book builds without a warning, and a browser shows it as a reader meets it: desktop, dark, phone, offline."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from book.support import build, downloads

# What sphinx-book-theme 1.x says of itself on every page.
THEME = ("THEBE_JS_URL", "Got invalid theme mode")
DESKTOP = {"viewport": {"width": 1360, "height": 900}}
DARK = {**DESKTOP, "color_scheme": "dark"}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True}
PAGES = [f"{page}.html" for page in build.contents()]
SHAPLEY = "book/foundations/shapley-values.html"


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book, built from the committed outputs; every warning is an error, every reference must resolve."""
    folder = tmp_path_factory.mktemp("book")
    return build.html(folder / "src", folder).parent


@pytest.fixture(scope="module")
def address(html: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no browser: continuous integration needs Chromium on the path")
        pytest.skip("no browser: install Chromium (Debian: apt-get install chromium) to run this")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=found, args=[*quiet, "--disable-sync"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, address: str, options: dict[str, Any]) -> Iterator[tuple[Any, list[str]]]:
    """A page, and the list into which goes whatever went wrong on it: console errors, failures, foreign requests."""
    context, wrong = browser.new_context(**options), []
    page = context.new_page()

    def heard(text: str) -> None:
        if not any(known in text for known in THEME):
            wrong.append(text)

    page.on("console", lambda m: heard(f"console: {m.text} ({m.location.get('url')})") if m.type == "error" else None)
    page.on("pageerror", lambda e: heard(f"error: {e}"))
    page.on("response", lambda r: heard(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on("requestfailed", lambda r: heard(f"failed: {r.url}"))
    page.on("request", lambda r: heard(f"leaves the book: {r.url}") if _foreign(r.url, address) else None)
    yield page, wrong
    context.close()


def _foreign(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:", "file:", "about:"))


def settle(page: Any) -> None:
    """Wait until MathJax, where the page has it, has set every equation."""
    page.wait_for_load_state("load")
    page.evaluate("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => null) : null")


def test_the_index_leads_to_the_first_page(html: Path, address: str, browser: Any) -> None:
    assert 'rel="icon"' in (html / "index.html").read_text(), "a browser would ask for /favicon.ico, which is not there"
    with opened(browser, address, DESKTOP) as (page, wrong):
        page.goto(f"{address}/index.html")
        page.wait_for_url("**/book/intro.html")
        assert page.locator("article h1").first.inner_text().strip("#\n ") == "Learning with missing modalities"
        assert not wrong


def test_clicking_through_the_navigation(address: str, browser: Any) -> None:
    with opened(browser, address, DESKTOP) as (page, wrong):
        page.goto(f"{address}/book/intro.html")
        page.locator("nav.bd-links a", has_text="Notation").click()
        page.wait_for_url("**/book/notation.html")
        page.locator("nav.bd-links a[href*='shapley-values']").click()
        page.wait_for_url(f"**/{SHAPLEY}")
        page.locator("a.right-next").click()
        page.wait_for_url("**/distances.html")
        assert not wrong


def test_searching_finds_a_word(address: str, browser: Any) -> None:
    with opened(browser, address, DESKTOP) as (page, wrong):
        page.goto(f"{address}/search.html?q=shapley")
        page.wait_for_selector("#search-results li a")
        found = page.locator("#search-results li a").evaluate_all("links => links.map(a => a.href)")
        assert any(SHAPLEY in link for link in found)
        assert not wrong


def test_the_search_box_opens(address: str, browser: Any) -> None:
    with opened(browser, address, DESKTOP) as (page, wrong):
        page.goto(f"{address}/book/intro.html")
        settle(page)
        page.locator(".bd-sidebar-primary .search-button-field").click()
        field = page.locator("dialog input[type=search], .search-button__search-container input[type=search]").first
        field.fill("modality")
        field.press("Enter")
        page.wait_for_url("**/search.html?q=modality*")
        page.wait_for_selector("#search-results li a")
        assert not wrong


@pytest.mark.parametrize("view", ["desktop and dark", "phone"])
def test_every_page_is_whole(view: str, address: str, browser: Any) -> None:
    problems = []
    with opened(browser, address, PHONE if view == "phone" else DESKTOP) as (page, wrong):
        for name in PAGES:
            page.goto(f"{address}/{name}")
            settle(page)
            found = missing(page) + misplaced(page, name)
            if view != "phone":
                page.emulate_media(color_scheme="dark")
                found += [f"in the dark: {what}" for what in [*bright(page), *misplaced(page, name)]]
                page.emulate_media(color_scheme="light")
            problems += [f"{name}: {what}" for what in [*found, *wrong]]
            wrong.clear()
    assert not problems, "\n".join(problems)


def missing(page: Any) -> list[str]:
    """What a page lacks in every view: set equations, pictures, their alternative texts."""
    body = page.evaluate("document.querySelector('article').innerText")
    found = ["an equation is not set"] if "\\(" in body or "$$" in body else []
    found += page.locator("mjx-merror").evaluate_all("errors => errors.map(e => e.innerText)")
    pictures = page.locator("article img").evaluate_all("all => all.map(i => [i.naturalWidth, i.alt, i.src])")
    found += [f"no picture at {src}" for width, _, src in pictures if not width]
    found += [f"no alternative text for {src}" for _, alt, src in pictures if not alt]
    nameless = page.locator("article .mm-picture svg:not([aria-label])").count()
    return found + ([f"{nameless} drawings without alternative text"] if nameless else [])


def misplaced(page: Any, name: str) -> list[str]:
    """What does not stand where it should: beyond the window, or below the first section."""
    found = []
    if page.evaluate("document.documentElement.scrollWidth > window.innerWidth + 1"):
        found.append("scrolls sideways")
    wide = page.locator(".mm-scroll").evaluate_all(
        "boxes => boxes.filter(b => b.getBoundingClientRect().right > innerWidth + 1).length"
    )
    found += [f"{wide} tables wider than the window"] if wide else []
    parts = {"foundations": [".mm-card"], "methods": (opening := [".mm-verdict", ".mm-card"]), "evidence": opening}
    for part in parts.get(name.split("/")[1], ()):
        places = "all => all.map(e => e.getBoundingClientRect().top)"
        tops, first = (page.locator(what).evaluate_all(places) for what in (part, "article h2"))
        if len(tops) != 1 or tops[0] >= first[0]:
            found.append(f"expected one {part} before the first section, got {tops} and {first[:1]}")
    return found


def bright(page: Any) -> list[str]:
    """What is not dark in the dark."""
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")  # the theme hears it a moment later
    grounds = page.locator(".output.text_html:has(.mm-table)").evaluate_all(
        "all => all.map(e => getComputedStyle(e).backgroundColor)"
    )
    return [f"a table stands on {ground}" for ground in set(grounds) - {"rgba(0, 0, 0, 0)"}]


def test_equations_are_set_and_figures_shown(address: str, browser: Any) -> None:
    with opened(browser, address, DESKTOP) as (page, wrong):
        page.goto(f"{address}/{SHAPLEY}")
        page.wait_for_selector("mjx-container mjx-math")
        settle(page)
        assert page.locator("mjx-container[display=true]").count() >= 3
        figure = page.locator("article .cell_output .mm-picture svg").first
        assert figure.evaluate("drawn => drawn.getBoundingClientRect().width") > 200
        assert not wrong


def brightness(page: Any, selector: str) -> float:
    """Of the background of the first match, 0 to 255."""
    colour = page.locator(selector).first.evaluate("e => getComputedStyle(e).backgroundColor")
    return sum(float(x) for x in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3


def test_pictures_turn_over_in_the_dark(address: str, browser: Any) -> None:
    with opened(browser, address, DARK) as (page, wrong):
        page.goto(f"{address}/book/intro.html")
        settle(page)
        assert brightness(page, "body") < 60
        with Image.open(io.BytesIO(page.locator("article figure img").first.screenshot())) as seen:
            shades = sorted(seen.convert("L").tobytes())
        assert shades[len(shades) // 2] < 60, "the ground"
        assert shades[-1] > 150, "the letters"
        assert not wrong


def test_one_switch_shows_all_code(address: str, browser: Any) -> None:
    with opened(browser, address, DESKTOP) as (page, wrong):
        page.goto(f"{address}/{SHAPLEY}")
        settle(page)
        plumbing, hidden = page.locator(".cell.mm-plumbing > .cell_input"), page.locator(".cell_input .hll")
        assert plumbing.count() > 3
        assert hidden.count() > 3
        switch = page.locator("button.mm-code-switch")
        assert switch.count() == 1
        assert not plumbing.first.is_visible()
        assert not hidden.first.is_visible()
        switch.click()
        assert plumbing.first.is_visible()
        assert hidden.first.is_visible()
        page.reload()
        settle(page)
        assert plumbing.first.is_visible(), "the choice is remembered"
        page.locator("button.mm-code-switch").click()
        assert not plumbing.first.is_visible()
        assert not wrong


def test_the_download_button_downloads_what_runs(address: str, browser: Any) -> None:
    with opened(browser, address, DESKTOP) as (page, wrong):
        page.goto(f"{address}/{SHAPLEY}")
        settle(page)
        page.locator(".dropdown-download-buttons > button").click()
        with page.expect_download() as download:
            page.locator(".btn-download-source-button").click()
        assert download.value.suggested_filename == "shapley-values.zip"
        with zipfile.ZipFile(download.value.path()) as archive:
            notebook = json.loads(archive.read(f"{downloads.FOLDER}/book/foundations/shapley-values.ipynb"))
        assert notebook["nbformat"] == 4
        assert page.url.endswith(SHAPLEY)
        assert not wrong


def test_the_book_opens_without_a_server(html: Path, address: str, browser: Any) -> None:
    with opened(browser, address, DESKTOP) as (page, wrong):
        page.goto((html / SHAPLEY).as_uri())
        page.wait_for_selector("mjx-container mjx-math")
        leaving = [w for w in wrong if "leaves the book" in w]
        assert not leaving
