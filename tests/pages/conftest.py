"""The built documentation, once for all processes of a test run."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from building import ROOT, build
from filelock import FileLock  # torch needs it, so it is there

for part in ("docs/figures", "docs/tutorials", "examples/echoir"):  # as in docs/hooks.py
    sys.path.append(str(ROOT / part))

if not all(map(importlib.util.find_spec, ("matplotlib", "sklearn", "skimage", "tyro"))):
    collect_ignore = ["test_drawings.py"]  # they need the `docs` and the `example` extra


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    pytest.importorskip("mkdocs", reason="needs the `docs` extra")
    pytest.importorskip(
        "skimage", reason="needs the `example` extra: the pages restore a photograph"
    )
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(shared / "site.lock"):
        if not (shared / "site").exists():
            run = build(ROOT / "mkdocs.yml", shared / "unfinished")
            assert run.returncode == 0, run.stderr
            (shared / "unfinished").rename(shared / "site")
    return shared / "site"
