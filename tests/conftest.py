"""What every test runs under: one torch thread, a fixed seed, a Hypothesis profile."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(  # a thousand times it matters only that an example fails
    "mutants", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate)
)
settings.register_profile("fuzz", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("ci")  # `make fuzz` names the other one on the command line


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test that draws numbers draws the same ones whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are traced, and their graphs run as they are."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run as they are."""
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that need an accelerator where there is none."""
    if torch.accelerator.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator, and torch sees none"))
