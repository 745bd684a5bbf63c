"""The package from outside: what importing it costs, and what others may use of it."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONSUMERS = sorted(
    path.relative_to(ROOT)
    for folder in ("examples", "benchmarks")
    for path in ROOT.glob(f"{folder}/**/*.py")
)


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_import_needs_only_the_dependencies() -> None:
    extras = ("PIL", "hypothesis", "pytest", "rich", "safetensors", "skimage", "sklearn", "tyro")
    loaded = run(f"import sys, bilevel; print(*(m for m in {extras!r} if m in sys.modules))")
    assert loaded == ""


def test_import_leaves_torch_as_it_is() -> None:
    settings = (
        "torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), "
        "torch.get_rng_state().sum().item()"
    )
    before, after = run(
        f"import torch; torch.manual_seed(0); print({settings}); import bilevel; print({settings})"
    ).splitlines()
    assert before == after


def test_version_is_that_of_the_project() -> None:
    assert importlib.metadata.version("bilevel") == PROJECT["version"]


def test_library_pins_no_dependency() -> None:
    assert not [d for d in PROJECT["dependencies"] if "==" in d or "<" in d]


def test_environment_is_pinned_to_public_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    for pin in pins:
        name, _, version = pin.partition("==")
        assert name, pin
        assert version.replace(".", "").isalnum(), pin  # no URL, no local suffix like +cpu


@pytest.mark.parametrize("path", CONSUMERS, ids=str)
def test_examples_and_benchmarks_use_public_names_only(path: Path) -> None:
    private: list[str] = []
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        private += [
            name
            for name in names
            if name.split(".")[0] in ("bilevel", "bl")
            and any(part.startswith("_") for part in name.split("."))
        ]
    assert not private
