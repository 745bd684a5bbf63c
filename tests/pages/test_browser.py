"""The site as a browser shows it: desktop and phone, light and dark.

It needs the extra `browser` and a Chromium, for example Debian's: `apt-get install chromium`.
"""

import functools
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs the `browser` extra")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: one of {', '.join(NAMES)}"),
]

SIZES = {"desktop": (1280, 900), "phone": (360, 740)}
SCHEMES = {"default", "slate"}  # light and dark, in the theme's words

BROKEN = "() => [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"

SIDEWAYS = "document.documentElement.scrollWidth > document.documentElement.clientWidth"

# What sticks out to the right and is neither cut off nor in a box that scrolls.
OVERFLOW = """() => {
  const scrolls = e => e && e !== document.body &&
    (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
  return [...document.querySelectorAll(".md-content *")]
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !scrolls(e))
    .map(e => `<${e.tagName} class="${e.getAttribute("class")}"> ${e.textContent.slice(0, 60)}`);
}"""

# Text in figures whose contrast with the page is below 3 to 1, what WCAG asks of large text.
FAINT = """() => {
  const light = color => {
    const parts = color.match(/[0-9.]+/g).slice(0, 3).map(c => c / 255);
    const linear = parts.map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll(".md-content figure svg text")]
    .filter(text => !text.closest(".on-color"))
    .filter(text => {
      const own = light(getComputedStyle(text).fill);
      return (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05) < 3;
    })
    .map(text => text.textContent);
}"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Of a server of the built site on this machine."""
    handler = functools.partial(_Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox does not start for root.
        running = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@dataclass
class Visit:
    """A page, and what went wrong on it."""

    page: Any
    address: str
    wrong: list[str] = field(default_factory=list)
    pending: int = 0

    def __post_init__(self) -> None:
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("request", self._asked)
        self.page.on("requestfailed", self._failed)
        self.page.on("requestfinished", self._finished)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"console: {message.text}")

    def _asked(self, request: Any) -> None:
        self.pending += 1
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.wrong.append(f"another host: {request.url}")

    def _failed(self, request: Any) -> None:
        self.pending -= 1
        self.wrong.append(f"failed: {request.url} {request.failure}")

    def _finished(self, request: Any) -> None:
        self.pending -= 1
        status = request.response().status
        if status >= 400:
            self.wrong.append(f"status {status}: {request.url}")

    @property
    def scheme(self) -> str:
        return self.page.locator("body").get_attribute("data-md-color-scheme")

    def open(self, name: str) -> None:
        """Opens a page, and waits for all that it asks for."""
        self.page.goto(self.address + name)
        self.page.wait_for_timeout(50)  # the index of the search is asked for after the load
        while self.pending:
            self.page.wait_for_timeout(10)


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def visit(browser: Any, address: str, size: str) -> Iterator[Visit]:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        is_mobile=size == "phone",
        has_touch=size == "phone",
    )
    yield Visit(context.new_page(), address)
    context.close()


def test_every_page_is_whole(visit: Visit, site: Path) -> None:
    found: list[str] = []
    pages = sorted(str(path.relative_to(site)) for path in site.glob("**/*.html"))
    assert len(pages) > 20
    for name in pages:
        visit.open(name)
        first = visit.scheme
        found += [f"{name}, {first}: {what}" for what in seen_wrong(visit.page)]
        visit.page.locator("label.md-header__button[for^=__palette]:visible").click()
        assert {first, visit.scheme} == SCHEMES
        found += [f"{name}, {visit.scheme}: {what}" for what in seen_wrong(visit.page)]
        found += [f"{name}: {what}" for what in visit.wrong]
        visit.wrong.clear()
    assert not found, "\n".join(found)


def seen_wrong(page: Any) -> list[str]:
    """What is wrong with a page as it is shown now."""
    wrong = [f"formula: {text}" for text in page.locator(".katex-error").all_text_contents()]
    bare = page.locator(".arithmatex:not(:has(.katex))")
    wrong += [f"formula not set: {text}" for text in bare.all_text_contents()]
    wrong += [f"image: {source}" for source in page.evaluate(BROKEN)]
    wrong += [f"faint: {text}" for text in page.evaluate(FAINT)]
    wrong += [f"sticks out: {element}" for element in page.evaluate(OVERFLOW)]
    if page.evaluate(SIDEWAYS):
        wrong.append("the page scrolls sideways")
    return wrong


def test_theory_has_formulas(visit: Visit) -> None:
    visit.open("asblo.html")
    assert visit.page.locator(".katex").count() > 50


@pytest.mark.parametrize("word", ["ASBLO", "log_rational"])
def test_search_finds(visit: Visit, size: str, word: str) -> None:
    visit.open("index.html")
    if size == "phone":
        visit.page.locator("label.md-header__button[for=__search]").click()
    visit.page.locator("input.md-search__input").click()
    visit.page.keyboard.type(word)
    first = visit.page.locator(".md-search-result__item", has_text=word).first
    first.wait_for()
    first.locator("a").first.click()
    visit.page.locator(".md-content", has_text=word).wait_for()
    assert not visit.wrong


def test_slider_uncovers_the_restored_photograph(visit: Visit) -> None:
    visit.open("echoir.html")
    box = visit.page.locator(".before-after").first
    slider, restored = box.locator("input"), box.locator("img").nth(1)

    def cut() -> str:
        return restored.evaluate("image => getComputedStyle(image).clipPath")

    before = cut()
    assert "50%" in before
    slider.focus()
    visit.page.keyboard.press("Home")
    assert cut() in ("inset(0px)", "inset(0px 0px 0px 0%)")
    place = slider.bounding_box()
    visit.page.mouse.click(place["x"] + 0.8 * place["width"], place["y"] + place["height"] / 2)
    assert 70 < float(cut().split()[-1].rstrip("%)")) < 90
