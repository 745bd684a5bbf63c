"""The Lasso's penalty by its hypergradient, and the path of coefficients around it, on the diabetes data.

    python docs/tutorials/lasso_path.py           # a few seconds; writes lasso_path.svg

Most of the Lasso's coefficients are zero, and its objective has a kink there. So the condition that the gradient
vanishes, from which the implicit hypergradient usually follows, does not hold. What does hold is a fixed point,
the one of proximal gradient descent:

    y = prox(y - lr * gradient of the squared error,  lr * penalty),

and differentiating it gives the derivative of y: zero for the coefficients that are zero, a small linear system
for the others. The upper variable is the logarithm of the penalty, the features are the ten of the diabetes data
with their products.

`main` compares with scikit-learn: a grid of a hundred penalties along `lasso_path`.

Bertrand et al., Implicit differentiation of Lasso-type models for hyperparameter optimization (ICML 2020).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from plots import legend, panels, save
from sklearn.datasets import load_diabetes
from sklearn.linear_model import lasso_path
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor

import bilevel as bl

TRAINING, VALIDATION = 200, 120  # of 442 patients; the rest is for the test
SEX_SQUARED = 20  # a column that says what `sex` says, so that the Lasso would not be unique
GRID = 100  # penalties of scikit-learn's path
DEPTH = 1e-3  # the smallest penalty of the path over the largest
DRAWN = 6  # coefficients in color, the largest ones at the answer
DRAWN_DEPTH = 0.01  # as DEPTH, for the figure: at small penalties those of no use hide the others


@dataclass(frozen=True)
class Data:
    """Features (n, 64) and targets (n,), standardized on the training data."""

    X: Tensor
    target: Tensor
    X_validation: Tensor
    target_validation: Tensor
    X_test: Tensor
    target_test: Tensor

    @property
    def largest(self) -> float:
        """The penalty from which on all coefficients are zero."""
        return float((self.X.T @ self.target).abs().max()) / len(self.X)


def load(seed: int) -> Data:
    """A random split."""
    features, target = load_diabetes(return_X_y=True)
    products = PolynomialFeatures(2, include_bias=False).fit_transform(features)
    X = torch.tensor(np.delete(products, SEX_SQUARED, axis=1))
    t = torch.tensor(target)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    first, rest = order[:TRAINING], order[TRAINING:]
    X = (X - X[first].mean(0)) / X[first].std(0)
    t = (t - t[first].mean()) / t[first].std()
    second, third = rest[:VALIDATION], rest[VALIDATION:]
    return Data(X[first], t[first], X[second], t[second], X[third], t[third])


def validation_error(data: Data, y: Tensor) -> Tensor:
    """Mean squared error, 0-d."""
    return ((data.X_validation @ y - data.target_validation) ** 2).mean()


def squared_error(data: Data, y: Tensor) -> Tensor:
    """The smooth part of the Lasso, as scikit-learn scales it, 0-d."""
    return 0.5 * ((data.X @ y - data.target) ** 2).mean()


def lasso(data: Data) -> bl.BilevelProblem:
    """The problem; x is the logarithm of the penalty, shape (1,), y the coefficients, shape (64,)."""
    return bl.BilevelProblem(
        upper=lambda x, y, _: validation_error(data, y),
        lower=lambda x, y, _: squared_error(data, y) + (torch.exp(x) * y.abs()).sum(),
        domain=bl.Box(math.log(DEPTH * data.largest), math.log(data.largest)),
    )


def method(data: Data) -> bl.Implicit:
    """The implicit hypergradient of proximal gradient descent's fixed point."""
    curvature = float(torch.linalg.matrix_norm(data.X, 2)) ** 2 / len(data.X)
    step = bl.fixed_points.prox_gradient(
        lambda x, y, _: squared_error(data, y),
        lambda x, v, lr: bl.fixed_points.prox_l1(v, lr * torch.exp(x)),
        lr=1.0 / curvature,
    )
    return bl.Implicit(condition=bl.FixedPoint(step), tol=1e-10)


def search(data: Data, start: float = 0.1) -> bl.Solution:
    """The penalty of the least validation error, from `start` times the largest penalty."""
    x0 = torch.tensor([math.log(start * data.largest)], dtype=torch.float64)
    y0 = torch.zeros(data.X.shape[1], dtype=torch.float64)
    solver = bl.HypergradientDescent(method(data), rtol=1e-5)
    return bl.solve(lasso(data), solver, x0, y0, max_steps=100, throw=False)


def path(data: Data, count: int = GRID) -> tuple[Tensor, Tensor]:
    """scikit-learn's penalties, shape (count,), and coefficients, shape (64, count)."""
    penalties, coefficients, _ = lasso_path(
        data.X.numpy(), data.target.numpy(), eps=DEPTH, alphas=count, max_iter=100_000, tol=1e-8
    )
    return torch.tensor(penalties), torch.tensor(coefficients)


def drawing(data: Data, found: bl.Solution, penalties: Tensor, coefficients: Tensor) -> Figure:
    """The path of the coefficients, and the validation error along it."""
    largest = found.y.abs().argsort(descending=True)[:DRAWN]
    errors = [float(validation_error(data, y)) for y in coefficients.T]
    penalty = float(found.x.exp())
    figure, (left, right) = panels(2)
    seen = penalties >= DRAWN_DEPTH * data.largest
    left.plot(penalties[seen], coefficients[:, seen].T, color="lightgray", linewidth=0.8)
    left.plot(penalties[seen], coefficients[largest][:, seen].T)
    right.plot(penalties, errors, color="black", label="scikit-learn's path")
    right.plot(penalty, found.upper, "o", color="tab:red", label="hypergradient")
    left.axvline(penalty, color="tab:red", linestyle="--")
    left.set(title="Coefficients", ylabel="coefficient")
    right.set(title="Validation error", ylabel="mean squared error")
    for axes in (left, right):
        axes.set(xlabel="penalty", xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    legend(figure, columns=2)
    return figure


def main(output: Path = Path("lasso_path.svg")) -> None:
    """Compares the hypergradient's answer with scikit-learn's grid, and draws both."""
    data = load(seed=0)
    found = search(data)
    penalties, coefficients = path(data)
    errors = torch.stack([validation_error(data, y) for y in coefficients.T])
    best = int(errors.argmin())
    rows = {
        f"grid of {GRID}": (penalties[best], errors[best], coefficients[:, best]),
        "hypergradient": (found.x.exp(), found.upper, found.y),
    }
    print(f"{'':16} {'penalty':>9} {'validation':>10} {'test':>8} {'nonzero':>8}")
    for name, (penalty, error, y) in rows.items():
        test = ((data.X_test @ y - data.target_test) ** 2).mean()
        nonzero = int((y.abs() > 1e-8).sum())
        print(f"{name:16} {float(penalty):9.5f} {float(error):10.5f} {test:8.4f} {nonzero:8}")
    print(f"{found.status.name} after {found.steps} steps and {found.seconds:.2f} s")
    save(drawing(data, found, penalties, coefficients), output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
