"""The Lasso's solution and hypergradient against scikit-learn's coordinate descent."""

import math

import lasso_path
import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

import bilevel as bl


@pytest.fixture(scope="module")
def data() -> lasso_path.Data:
    return lasso_path.load(seed=0)


def by_scikit_learn(data: lasso_path.Data, log_penalty: float) -> np.ndarray:
    model = Lasso(math.exp(log_penalty), fit_intercept=False, tol=1e-12, max_iter=1_000_000)
    return model.fit(data.X.numpy(), data.target.numpy()).coef_


@pytest.mark.parametrize("share", [0.3, 0.08])
def test_hypergradient_is_the_slope_of_scikit_learns_validation_error(
    data: lasso_path.Data, share: float
) -> None:
    x = torch.tensor([math.log(share * data.largest)], dtype=torch.float64)
    zeros = torch.zeros(data.X.shape[1], dtype=torch.float64)
    estimate = bl.hypergradient(lasso_path.lasso(data), x, zeros, lasso_path.method(data))
    np.testing.assert_allclose(estimate.y, by_scikit_learn(data, float(x)), atol=1e-6)

    def error(log_penalty: float) -> float:
        return float(
            lasso_path.validation_error(data, torch.tensor(by_scikit_learn(data, log_penalty)))
        )

    h = 1e-4
    slope = (error(float(x) + h) - error(float(x) - h)) / (2.0 * h)
    assert float(estimate.grad) == pytest.approx(slope, rel=1e-3)


def test_search_is_no_worse_than_the_grid(data: lasso_path.Data) -> None:
    found = lasso_path.search(data)
    penalties, coefficients = lasso_path.path(data, 40)
    grid = min(float(lasso_path.validation_error(data, y)) for y in coefficients.T)
    assert found.status is bl.Status.CONVERGED
    assert grid - 1e-3 < found.upper < grid + 1e-6
    left, right = lasso_path.drawing(data, found, penalties, coefficients).axes
    *colored, answer = left.lines[data.X.shape[1] :]
    assert len(colored) == lasso_path.DRAWN
    np.testing.assert_allclose(answer.get_xdata(), float(found.x.exp()))
    assert np.min(right.lines[0].get_ydata()) == pytest.approx(grid)
