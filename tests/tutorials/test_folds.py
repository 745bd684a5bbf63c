"""The penalties of ridge and logistic regression: scikit-learn and a direct search are the oracles."""

import folds
import logistic
import numpy as np
import pytest
import ridge
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge

import bilevel as bl


def fewer_features(data: folds.Split, p: int) -> folds.Split:
    return folds.Split(data.X[:, :p], data.target, data.X_test[:, :p], data.target_test, data.masks)


def lower_solution(data: folds.Split, loss: folds.Loss, x: torch.Tensor) -> torch.Tensor:
    problem = folds.cross_validation(data, loss)
    zeros = torch.zeros(folds.FOLDS, data.X.shape[1] + 1, dtype=torch.float64)
    return bl.hypergradient(problem, x, zeros, bl.Implicit()).y


def test_lower_level_of_ridge_is_scikit_learn_on_each_fold() -> None:
    data = ridge.load(0)
    x = torch.linspace(-5.0, 1.0, 10, dtype=torch.float64)
    models = lower_solution(data, ridge.squared_error, x)
    for k in range(folds.FOLDS):
        rest = ~data.masks[:, k]
        X, target = folds.weighted(data.X[rest], x), data.target[rest].numpy()
        model = Ridge(alpha=len(X)).fit(X, target)
        np.testing.assert_allclose(
            models[k, :-1], model.coef_ * np.exp(-0.5 * x.numpy()), rtol=1e-6
        )
        assert models[k, -1].item() == pytest.approx(model.intercept_, rel=1e-6)


def test_lower_level_of_logistic_regression_is_scikit_learn_on_each_fold() -> None:
    data = fewer_features(logistic.load(0), 6)
    x = torch.linspace(-6.0, -2.0, 6, dtype=torch.float64)
    models = lower_solution(data, logistic.logistic_loss, x)
    rest = ~data.masks[:, 0]
    X, target = folds.weighted(data.X[rest], x), data.target[rest].numpy()
    model = LogisticRegression(C=0.5 / len(X), tol=1e-10, max_iter=10_000).fit(X, target)
    np.testing.assert_allclose(models[0, :-1], model.coef_[0] * np.exp(-0.5 * x.numpy()), rtol=1e-4)


@pytest.mark.parametrize("name", list(folds.SOLVERS))
def test_penalties_are_those_of_a_direct_search_over_closed_form_fits(name: str) -> None:
    data = fewer_features(ridge.load(0), 3)
    found = folds.search(data, ridge.squared_error, folds.SOLVERS[name])

    def validation(x: np.ndarray) -> float:
        losses = []
        for k in range(folds.FOLDS):
            out = data.masks[:, k]
            X = folds.weighted(data.X, torch.as_tensor(x))
            model = Ridge(alpha=int((~out).sum())).fit(X[~out], data.target[~out].numpy())
            losses.append(((model.predict(X[out]) - data.target[out].numpy()) ** 2).mean())
        return float(np.mean(losses))

    bounds = [(folds.LOW, folds.HIGH)] * 3
    starts = ([-3.0, -3.0, -3.0], [0.0, 0.0, 0.0], [-6.0, 0.0, -6.0])
    best = min(minimize(validation, s, bounds=bounds).fun for s in starts)
    assert validation(found.x.numpy()) == pytest.approx(best, rel=1e-5)
    assert folds.validation(data, ridge.squared_error, found.x) == pytest.approx(best, rel=1e-3)


def test_shared_penalty_is_one_point_of_the_search() -> None:
    data = ridge.load(0)
    shared, implicit = ridge.one_for_all(data), ridge.one_a_feature(data, folds.SOLVERS["Implicit"])
    assert len(set(shared.penalties.tolist())) == 1
    assert implicit.validation < shared.validation  # ten penalties fit the folds better than one


def test_errors_of_logistic_regression_are_a_share() -> None:
    fit = logistic.one_for_all(fewer_features(logistic.load(0), 4))
    assert 0.0 < fit.errors < 0.2
    assert 0.0 < fit.test < 0.5


def test_table_and_drawing_show_all_methods() -> None:
    fit = folds.Fit(torch.full((10,), 0.1), 0.5, 0.6, 0.1, 1.0)
    better = folds.Fit(torch.full((10,), 0.2), 0.4, 0.5, 0.1, 1.0)
    text = folds.table([{"a": fit, "b": better}, {"a": fit, "b": better}], "a")
    assert "-0.1000 ± 0.0000   2/2  10.00%" in text
    drawings = (ridge.drawing, logistic.drawing)
    methods = {"RidgeCV": fit, "ASBLO": fit, "Implicit": better}
    for drawing in drawings:
        (axes,) = drawing(methods).axes
        assert [line.get_label() for line in axes.lines] == list(methods)
        np.testing.assert_array_equal(axes.lines[-1].get_ydata(), better.penalties)
