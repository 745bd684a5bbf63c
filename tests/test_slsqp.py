import math

import pytest
import torch
from torch import Tensor

from bilevel.estimators import _slsqp
from bilevel.estimators._numpy import clipped


def test_each_vector_keeps_its_dtype() -> None:
    def outputs(x: Tensor, y: Tensor) -> Tensor:
        assert (x.dtype, y.dtype) == (torch.float32, torch.float64)
        return torch.cat([((x - 1.0) ** 2 + (y - 2.0) ** 2), x + y - 1.0])

    found = _slsqp.minimize(outputs, [torch.zeros(1), torch.zeros(1).double()], 1)
    x, y = found.vectors  # the point of x + y = 1 nearest to (1, 2)
    assert (x.dtype, y.dtype) == (torch.float32, torch.float64)
    assert (float(x), float(y)) == pytest.approx((0.0, 1.0), abs=1e-6)


def test_values_and_slopes_that_are_not_finite_turn_the_search_back() -> None:
    def outputs(y: Tensor) -> Tensor:  # sqrt is NaN below zero, where the first step leads
        return torch.cat([(y - 0.01) ** 2, y.sqrt() - 0.2])

    found = _slsqp.minimize(outputs, [torch.tensor([4.0], dtype=torch.float64)], 0)
    assert not found.ran_away
    assert float(found.vectors[0]) == pytest.approx(0.04, abs=1e-6)


def test_what_scipy_is_told_is_finite() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 2.0], requires_grad=True)
    assert clipped(values).tolist() == [0.0, 1e30, -1e30, 2.0]
