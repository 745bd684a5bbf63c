"""The built site asks no other host for anything; a link that a reader follows may lead anywhere."""

import re
from html.parser import HTMLParser
from pathlib import Path

LOADED = {"src", "srcset", "href", "data", "poster", "action"}  # attributes that name an address
ELSEWHERE = re.compile(r"\s*(?:[a-z]+:)?//", re.IGNORECASE)
CSS_ADDRESS = re.compile(r"""(?:url\(|@import)\s*["']?([^"')\s;]+)""")
SCRIPT_ADDRESS = re.compile(r"""["'`](https?://[^"'`\s]+|//[a-z0-9-]+\.[a-z][^"'`\s]*)["'`]""")

# Addresses in the theme's own script, each with what a page needs to have for it to be asked.
DORMANT = {
    "https://unpkg.com/mermaid@11/dist/mermaid.min.js": 'class="mermaid"',
    "https://api.github.com/": 'data-md-component="source"',
    "https://${e}/api/v4/projects/": 'data-md-component="source"',
}
OLD_BROWSERS = "https://unpkg.com/resize-observer-polyfill"  # asked by those from before 2020
NAMES = ("http://www.w3.org/",)  # of XML, never asked


class Requests(HTMLParser):
    """The addresses that a browser asks for by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.inside = tag if tag in ("script", "style") else ""
        self.addresses += CSS_ADDRESS.findall(given.get("style", ""))
        if tag == "a" or (tag == "link" and given.get("rel") in ("canonical", "prev", "next")):
            return
        self.addresses += [given[name] for name in LOADED & given.keys()]

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.addresses += CSS_ADDRESS.findall(data)
        elif self.inside == "script":
            self.addresses += SCRIPT_ADDRESS.findall(data)


def asked(path: Path) -> list[str]:
    """The addresses on other hosts that a built file makes a browser ask for."""
    text = path.read_text("utf-8")
    if path.suffix == ".html":
        parser = Requests()
        parser.feed(text)
        found = parser.addresses
    elif path.suffix == ".css":
        found = CSS_ADDRESS.findall(text)
    else:
        found = SCRIPT_ADDRESS.findall(text)
    return [a for a in found if ELSEWHERE.match(a) and not a.startswith(NAMES)]


def test_no_file_asks_another_host(site: Path) -> None:
    files = [p for p in site.glob("**/*") if p.suffix in (".html", ".css", ".js", ".svg")]
    found = {(str(p.relative_to(site)), address) for p in files for address in asked(p)}
    asleep = {(name, a) for name, a in found if a.startswith((*DORMANT, OLD_BROWSERS))}
    assert found == asleep


def test_no_page_wakes_what_the_theme_could_ask(site: Path) -> None:
    for page in site.glob("**/*.html"):
        text = page.read_text("utf-8")
        for address, mark in DORMANT.items():
            assert mark not in text, f"{page.name} has {mark}, so a browser would ask {address}"


def test_requests_are_told_from_links(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<a href="https://a.org">link</a> <link rel="canonical" href="https://b.org">'
        '<script src="https://c.org/x.js"></script> <img srcset="//d.org/x.png 2x">'
        '<p style="background: url(https://e.org/x.png)">'
        "<script>fetch('https://f.org/x.json')</script><style>@import 'https://g.org';</style>"
        '<svg xmlns="http://www.w3.org/2000/svg"><image href="local.png"/></svg>'
    )
    hosts = [re.sub(r".*//(\w).org.*", r"\1", address) for address in asked(page)]
    assert hosts == ["c", "d", "e", "f", "g"]
