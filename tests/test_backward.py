"""Backward passes by torch's engine against `torch.autograd.grad`."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel import _backward

torch_grad = torch.autograd.grad


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


def scalar(x: Tensor, y: Tensor) -> Tensor:
    return (torch.sin(x) * y**3).sum()


@pytest.fixture(params=["engine", "without the engine"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "engine":
        monkeypatch.setattr(_backward, "engine", None)
    else:
        assert _backward.engine is not None


@pytest.mark.usefixtures("_way")
def test_first_and_second_derivatives_are_those_of_torch() -> None:
    x, y = inputs()
    first = _backward.grad(scalar(x, y), (x, y), create_graph=True)
    expected = torch_grad(scalar(x, y), (x, y), create_graph=True)
    assert all(map(torch.equal, first, expected))
    direction = torch.arange(3.0, dtype=torch.float64)
    second = _backward.grad(first[0], (x, y), direction, retain_graph=True)
    assert all(map(torch.equal, second, torch_grad(expected[0], (x, y), direction)))
    again = _backward.grad_of_one(first[0], y, direction)  # the graph was kept
    assert torch.equal(again, second[1])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        _backward.grad_of_one(first[0], y, direction)  # and now it was not


@pytest.mark.usefixtures("_way")
def test_inputs_that_are_ignored_get_zeros() -> None:
    x, y = inputs()
    assert _backward.backward(((x**2).sum(),), None, (y,)) == (None,)
    assert torch.equal(_backward.grad_of_one((x**2).sum(), y), torch.zeros_like(y))
    found = _backward.grad((x**2).sum(), (x, y))
    assert torch.equal(found[0], 2.0 * x)
    assert torch.equal(found[1], torch.zeros_like(y))
    constant = torch.ones(())
    assert torch.equal(_backward.grad_of_one(constant, y), torch.zeros_like(y))
    assert torch.equal(_backward.grad(constant, (y,))[0], torch.zeros_like(y))


@pytest.mark.usefixtures("_way")
def test_several_outputs_are_summed() -> None:
    x, y = inputs()
    cotangents = torch.ones_like(x), 2.0 * torch.ones_like(x)
    found = _backward.backward((x * y, x**2), cotangents, (x,))
    torch.testing.assert_close(found[0], (y + 4.0 * x).detach())


def test_modes_of_torch_see_the_call_that_they_know() -> None:
    class Watching(TorchFunctionMode):
        def __torch_function__(
            self, fun: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(fun)
            return fun(*args, **(kwargs or {}))

    seen: list[Any] = []
    x, y = inputs()
    with Watching():
        found = _backward.grad_of_one(scalar(x, y), x)
    assert torch_grad in seen
    assert torch.equal(found, torch_grad(scalar(x, y), x)[0])


def test_graph_is_recorded_whatever_the_caller_has_set() -> None:
    x, y = inputs()
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, _backward.recording():
            assert scalar(x, y).requires_grad
        assert torch.is_grad_enabled()
