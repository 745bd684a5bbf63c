"""The documentation is true: its Python runs, its reference is complete, its links lead somewhere.

The blocks of a page run in order and share their names, as a reader would type them. A block that
cannot run here says so to the reader in its first line: `# not run: REASON`.
"""

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import bilevel
import bilevel.testing
from bilevel.testing.problems import zoo

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    if path.name != "CHANGELOG.md"
)
DRAW = ("examples/echoir", "docs/tutorials", "docs/figures")  # as in docs/hooks.py
BLOCK = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
EXEMPT = re.compile(r"# not run: \S+")


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start("code")) + 1, match["code"])
        for match in BLOCK.finditer(text)
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=str)
def test_python_of_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in DRAW:
        monkeypatch.syspath_prepend(ROOT / folder)
    names: dict[str, object] = {"__name__": "__main__"}
    for line, code in python_blocks(page):
        if EXEMPT.match(code):
            continue
        padded = "\n" * (line - 1) + code  # a traceback then shows the line of the page
        exec(compile(padded, str(ROOT / page), "exec"), names)


def public_names(module: ModuleType) -> list[str]:
    """The full names of what a package exports, itself and by its public modules."""
    found: list[str] = []
    for name in module.__all__:
        item = getattr(module, name)
        if isinstance(item, ModuleType):
            found += public_names(item)
        else:
            found.append(f"{module.__name__}.{name}")
    return found


PUBLIC = [*public_names(bilevel), *public_names(bilevel.testing)]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_stands_in_reference(name: str) -> None:
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/reference").glob("*.md"))
    assert re.search(rf"^::: {re.escape(name)}$", pages, re.MULTILINE), (
        f"`{name}` is public and has no `::: {name}` on a line of its own in docs/reference/."
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_docstring(name: str) -> None:
    item: object = bilevel
    for part in name.split(".")[1:]:
        item = getattr(item, part)
    if inspect.isclass(item) or inspect.isfunction(item):  # an alias of a type has none
        assert inspect.getdoc(item), f"`{name}` is public and has no docstring."


def first_cells(page: str) -> str:
    """The first column of all tables of a page."""
    lines = (ROOT / page).read_text("utf-8").splitlines()
    return "\n".join(line.split("|")[1] for line in lines if line.startswith("|"))


ERRORS = [
    name
    for module in (bilevel, bilevel.testing)
    for name in module.__all__
    if inspect.isclass(kind := getattr(module, name)) and issubclass(kind, Exception)
]


@pytest.mark.parametrize("name", [*bilevel.Status.__members__, *ERRORS])
def test_status_and_error_has_its_cause_and_cure(name: str) -> None:
    assert f"`{name}`" in first_cells("docs/when-it-goes-wrong.md"), (
        f"`{name}` has no row in a table of docs/when-it-goes-wrong.md."
    )


def test_zoo_page_has_a_row_for_each_problem() -> None:
    page = (ROOT / "docs/zoo.md").read_text(encoding="utf-8")
    for case in zoo():
        name = case.name.split(" from ")[0]
        assert f"| {name} " in page, f"no row for {name}: run `make zoo`"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_of_page_lead_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (ROOT / page.parent / target).exists(), f"{page} links to {target}: no such file"
