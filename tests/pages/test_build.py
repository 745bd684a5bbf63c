"""A page that uses a name which the library has not, or whose code fails, does not build."""

from pathlib import Path

import pytest
from building import ROOT, build

pytest.importorskip("mkdocs", reason="needs the `docs` extra")

PAGES = {
    "reference": "# Page\n\n::: bilevel.{name}\n",
    "code": '# Page\n\n```python exec="on"\nimport bilevel\nprint(bilevel.{name}.__name__)\n```\n',
}


def site_of(page: str, folder: Path) -> Path:
    """The configuration of a site of one page, with the plugins and extensions of the real one."""
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text(page, "utf-8")
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    start, end = settings.index("\nplugins:"), settings.index("\nextra_css:")
    config = folder / "mkdocs.yml"
    shared = settings[start:end].replace('["."]', f'["{ROOT}"]')
    shared = shared.replace("docs/example", f"{ROOT}/docs/example")
    config.write_text("site_name: one page\n" + shared, "utf-8")
    return config


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize(("name", "builds"), [("solve", True), ("no_such_name", False)])
def test_missing_name_stops_the_build(page: str, name: str, builds: bool, tmp_path: Path) -> None:
    run = build(site_of(page.format(name=name), tmp_path), tmp_path / "site")
    assert (run.returncode == 0) == builds, run.stderr
    assert builds or name in run.stderr
