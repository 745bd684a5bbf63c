"""Cross-validation as a bi-level problem: the models of all folds share the penalties, one a feature."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import PredefinedSplit
from torch import Tensor

import bilevel as bl

Loss = Callable[[Tensor, Tensor], Tensor]
"""The loss of each prediction: predictions and targets, both (n, K), to (n, K)."""

FOLDS = 5
LOW, HIGH = (
    -9.0,
    4.0,
)  # of the logarithm of a penalty: from 1e-4, hardly any, to a coefficient of zero
START = -3.0  # where the penalty still pulls on a coefficient: far below, F is flat
SOLVERS: dict[str, bl.Solver] = {
    "ASBLO": bl.ASBLO(),
    "Implicit": bl.HypergradientDescent(bl.Implicit()),
}
MARKERS = ("--", "o", "x")  # of the shared penalty and of the solvers, in figures


@dataclass(frozen=True)
class Split:
    """Data for training and testing; the features are in units of the training data.

    Attributes:
        X: Features, shape (n, p).
        target: Targets, shape (n,).
        X_test: Features of the test data.
        target_test: Targets of the test data.
        masks: Which training samples each fold holds out, shape (n, FOLDS), one True a row.
    """

    X: Tensor
    target: Tensor
    X_test: Tensor
    target_test: Tensor
    masks: Tensor

    @property
    def folds(self) -> PredefinedSplit:
        """The folds in scikit-learn's words."""
        return PredefinedSplit(self.masks.int().argmax(1).numpy())

    @property
    def penalty_grid(self) -> np.ndarray:
        """A hundred penalties between the bounds, for a search over one that is shared."""
        return np.exp(np.linspace(LOW, HIGH, 100))

    @property
    def samples_of_a_fold(self) -> float:
        """How many samples the model of a fold is trained on, in the mean."""
        return len(self.X) * (1 - 1 / FOLDS)


@dataclass(frozen=True)
class Fit:
    """What a method found on a split.

    Attributes:
        penalties: One a feature, shape (p,).
        validation: Mean loss on the held-out folds.
        test: Loss on the test data.
        errors: Share of wrong predictions on the test data; NaN in a regression.
        seconds: Of the search.
    """

    penalties: Tensor
    validation: float
    test: float
    errors: float
    seconds: float


def split(data: tuple[np.ndarray, np.ndarray], training: int, seed: int) -> Split:
    """A random split of features and targets into `training` samples with folds, and the rest for the test."""
    generator = torch.Generator().manual_seed(seed)
    X, target = (torch.tensor(part, dtype=torch.float64) for part in data)
    order = torch.randperm(X.shape[0], generator=generator)
    train, test = order[:training], order[training:]
    X = (X - X[train].mean(0)) / X[train].std(0, correction=0)
    fold = torch.nn.functional.one_hot(torch.arange(training) % FOLDS, FOLDS).bool()
    return Split(X[train], target[train], X[test], target[test], fold)


def cross_validation(data: Split, loss: Loss) -> bl.BilevelProblem:
    r"""The problem of the penalties $e^{x_j}$ that cross-validation likes best.

    $$\min_x \frac1K \sum_k \mathrm{loss}_{\text{held out}}(y_k) \quad\text{subject to}\quad
    y_k = \arg\min_y \mathrm{loss}_{\text{rest}}(y) + \sum_j e^{x_j} y_j^2.$$

    The lower variable has the shape (K, p + 1): a linear model a row, its intercept in the last column.
    """

    def fold_losses(y: Tensor, mask: Tensor) -> Tensor:
        prediction = data.X @ y[:, :-1].T + y[:, -1]  # (n, K)
        losses = loss(prediction, data.target[:, None].expand_as(prediction))
        return (losses * mask).sum(0) / mask.sum(0)  # (K,)

    def upper(x: Tensor, y: Tensor, _: None) -> Tensor:
        return fold_losses(y, data.masks).mean()

    def lower(x: Tensor, y: Tensor, _: None) -> Tensor:
        return (fold_losses(y, ~data.masks) + y[:, :-1] ** 2 @ torch.exp(x)).sum()

    return bl.BilevelProblem(upper, lower, domain=bl.Box(LOW, HIGH))


def search(data: Split, loss: Loss, solver: bl.Solver) -> bl.Solution:
    """The penalties that `solver` finds."""
    p = data.X.shape[1]
    x0 = torch.full((p,), START, dtype=torch.float64)
    y0 = torch.zeros(FOLDS, p + 1, dtype=torch.float64)
    problem = cross_validation(data, loss)
    return bl.solve(
        problem, solver, x0, y0, max_steps=500, throw=False
    )  # a stalled run is judged too


def validation(data: Split, loss: Loss, x: Tensor) -> float:
    """The mean loss on the held-out folds with the penalties $e^x$, of models that are solved anew."""
    y0 = torch.zeros(FOLDS, data.X.shape[1] + 1, dtype=torch.float64)
    return bl.hypergradient(cross_validation(data, loss), x, y0, bl.Implicit()).value


def weighted(X: Tensor, x: Tensor) -> np.ndarray:
    """The features on which a penalty of one is the penalty $e^x$, so that scikit-learn fits the final model."""
    return (X * torch.exp(-0.5 * x)).numpy()


def table(found: Sequence[Mapping[str, Fit]], reference: str) -> str:
    """One row a method: means over the splits, and the mean difference from `reference` with its standard error."""
    lines = [
        f"{'':22} {'validation':>10} {'test':>7} {'minus ' + reference:>26} {'better':>7} {'errors':>7} {'s':>6}"
    ]
    for name in found[0]:
        rows = [fits[name] for fits in found]
        excess = [fits[name].test - fits[reference].test for fits in found]
        error = statistics.stdev(excess) / len(excess) ** 0.5
        errors = statistics.mean(r.errors for r in rows)
        wrong = "" if math.isnan(errors) else f"{errors:.2%}"
        lines.append(
            f"{name:22} {statistics.mean(r.validation for r in rows):10.4f} "
            f"{statistics.mean(r.test for r in rows):7.4f} "
            f"{statistics.mean(excess):+17.4f} ± {error:.4f} {sum(e < 0 for e in excess):3}/{len(excess)} "
            f"{wrong:>7} {statistics.median(r.seconds for r in rows):6.2f}"
        )
    return "\n".join(lines)
