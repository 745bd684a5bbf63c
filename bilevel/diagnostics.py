"""Checks that tell a user when not to trust a hypergradient."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import check_kind
from bilevel._memory import LiveMemory as LiveMemory
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem, constrains_lower, ravel
from bilevel._solution import Status, table
from bilevel._types import Tree
from bilevel.estimators import Estimator, Implicit, check_problem, refuse_constraints
from bilevel.estimators._fixed_point import over_vectors
from bilevel.estimators._kkt import ConstrainedLower
from bilevel.estimators._lower import LowerObjective
from bilevel.fixed_points import FixedPoint
from bilevel.optim import Newton

_DIRECTIONS = 10  # along the axes up to this many upper variables, along random ones above
_STEPS = 7  # tried along each direction
_KINK = 1e-2  # relative difference of the slopes of the two sides that no smooth function has at these steps
_SOLVED = (
    1e-6  # of the lower gradient half a unit away: the residual of a lower problem that is solved
)
_TRUSTED = 1e-3  # relative error of a hypergradient that descends as the true one would


@dataclass(frozen=True)
class Report:
    """What `check_hypergradient` found; prints as a table.

    Attributes:
        error: Norm of the difference between the estimate and the central differences along the tested
            directions, relative to the latter.
        noise: What the central differences themselves are worth: their relative spread on the plateau.
        estimated: The derivatives that the estimate claims, one a direction.
        measured: The derivatives by central differences.
        steps: The step of the plateau of each direction.
        plateaus: How many neighboring steps agree with the plateau to 0.1 %, one number a direction: of seven,
            few mean that truncation or rounding leaves little room between them.
        kink: Largest difference between the slopes on the two sides of x, relative: F(x, y*(x)) has no gradient
            where it stays above the truncation error.
        status: How the estimate was made.
        verdict: The finding in words.
    """

    error: float
    noise: float
    estimated: tuple[float, ...]
    measured: tuple[float, ...]
    steps: tuple[float, ...]
    status: Status
    verdict: str
    plateaus: tuple[int, ...] = ()
    kink: float = 0.0

    @property
    def is_trusted(self) -> bool:
        """Whether the estimate agrees with the differences to 0.1 %, and these with themselves."""
        return (
            self.status is Status.CONVERGED
            and self.noise <= _TRUSTED
            and self.kink <= _KINK
            and self.error <= max(_TRUSTED, 2.0 * self.noise)
        )

    def __str__(self) -> str:
        return table(
            [
                ("verdict", self.verdict),
                ("relative error", f"{self.error:.3g}"),
                ("noise floor", f"{self.noise:.3g}"),
                ("directions", str(len(self.measured))),
                ("plateau", f"{min(self.plateaus, default=0)} of {_STEPS} steps at least agree"),
                ("estimate", f"{self.status.name}: {self.status.value}"),
            ]
        )


def check_hypergradient(
    problem: BilevelProblem, x: Tree, y: Tree, method: Estimator, data: Any = None
) -> Report:
    r"""Compare a hypergradient with central differences of the solved lower problem.

    Along each direction d, $(\Phi(x + h d) - \Phi(x - h d)) / 2h$ with $\Phi(x) = F(x, y^*(x))$ is measured for
    seven steps h around the cube root of the rounding error. Where two neighbors agree best is the plateau
    between truncation and rounding, and their difference is the noise floor. Where the slopes of the two sides of
    x differ at every step, there is a kink, and no gradient to compare with. Above ten upper variables the
    directions are random.

    The lower problem is solved by Newton's method, or by the fixed point of `Implicit(condition=...)` where the
    method has one. Where that does not solve it, as Newton's method does not at a kink of f, there is no check.

    Args:
        problem: The problem.
        x: Upper variable at which to check.
        y: Where the lower solves start.
        method: The estimator to check.
        data: A `Batch`, or what both objectives get as their third argument.

    Returns:
        The report.

    Raises:
        StructureError: `x` or `y` is no tree of floating tensors.
        ObjectiveError: An objective returns no scalar, or x or y is used by no objective.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: ((y - x.exp()) ** 2).sum(),
        ... )
        >>> x, y = torch.zeros(2).double(), torch.zeros(2).double()
        >>> bl.check_hypergradient(problem, x + 1.0, y, bl.Implicit()).is_trusted
        True
        >>> bl.check_hypergradient(problem, x + 1.0, y, bl.Unrolled(max_steps=2, lr=0.1)).is_trusted
        False
    """
    check_kind("check_hypergradient(method=...)", method, Estimator, "Pass e.g. `Implicit()`.")
    check_problem(problem, x, y, data)
    refuse_constraints(problem, "check_hypergradient", method.constraints)
    flat, (u, v), _, _ = ravel(problem, _tree.detach(x), _tree.detach(y))
    estimate = method.estimate(flat, u, v, data)
    lower = _Lower(flat, data, method.condition if isinstance(method, Implicit) else None, v)
    solved, status = lower.solve(u, v)
    if solved is None:
        message = "no check: the lower problem has no finite solution here"
        if status not in (Status.NONFINITE, Status.LOWER_UNBOUNDED):
            message = f"no check: the lower problem was not solved here: {status.value}"
        return Report(math.nan, math.inf, (), (), (), estimate.status, message)
    size = max(1.0, _tree.rms(u))
    measured: list[float] = []
    noises: list[float] = []
    steps: list[float] = []
    estimated: list[float] = []
    plateaus: list[int] = []
    kinks: list[float] = []
    here = lower.upper(u, solved)
    if not math.isfinite(here):
        message = "no check: F(x, y*(x)) is not finite here"
        return Report(math.nan, math.inf, (), (), (), estimate.status, message)
    for direction in _directions(u):
        derivative, noise, step, wide, kink = _plateau(lower, u, solved, direction, size, here)
        if not math.isfinite(noise):
            message = (
                "no check: the lower problem was not solved next to x, or F is not finite there"
            )
            return Report(math.nan, math.inf, (), (), (), estimate.status, message)
        plateaus.append(wide)
        kinks.append(kink)
        measured.append(derivative)
        noises.append(noise)
        steps.append(step)
        estimated.append(float(estimate.grad @ direction))
    reference = math.hypot(*measured) or 1.0
    error = math.hypot(*(a - b for a, b in zip(estimated, measured, strict=True))) / reference
    noise = math.hypot(*noises) / reference
    kink = math.hypot(*kinks) / reference
    verdict = _verdict(error, noise, kink, estimate.status)
    return Report(
        error,
        noise,
        tuple(estimated),
        tuple(measured),
        tuple(steps),
        estimate.status,
        verdict,
        tuple(plateaus),
        kink,
    )


class _Lower:
    """The lower problem as a function of x.

    Args:
        problem: The problem over vectors.
        data: Its data.
        condition: The fixed point that solves it, or None.
        y: A point in whose units the residual is judged.
    """

    def __init__(
        self, problem: BilevelProblem, data: Any, condition: FixedPoint | None, y: Tensor
    ) -> None:
        self._problem, self._data, self._condition = problem, data, condition
        self._oracle = Oracle(problem, data)
        self._size = max(_tree.rms(y), 1e-3)

    def upper(self, x: Tensor, y: Tensor) -> float:
        """F where the lower problem is solved from y; NaN where it is not."""
        solved, _ = self.solve(x, y)
        return math.nan if solved is None else float(self._oracle.upper(x, solved))

    def solve(self, x: Tensor, y: Tensor) -> tuple[Tensor | None, Status]:
        """The lower solution found from y, or None, and how the solve ended."""
        if self._condition is not None:
            step = over_vectors(self._condition, self._problem)
            reached = self._condition.solve(lambda v: self._oracle.mapped(step, x, v), y, 0.0)
            return (reached.y if reached.status is Status.CONVERGED else None), reached.status
        if constrains_lower(self._problem):
            point = ConstrainedLower(self._oracle, x, self._data, self._size).solve(y)
            return (point.y if point.status is Status.CONVERGED else None), point.status
        lower = LowerObjective(self._oracle, x)
        found = Newton().minimize(lower, lower.evaluate(y))
        status = found.status
        if status in (Status.STALLED, Status.MAX_STEPS):
            away = lower.evaluate(y + 0.5 * self._size)
            if found.residual <= _SOLVED * _tree.length(away.grad):
                status = Status.CONVERGED
        return (found.point.y if status is Status.CONVERGED else None), status


def _verdict(error: float, noise: float, kink: float, status: Status) -> str:
    if not noise <= _TRUSTED:
        return (
            f"no verdict: the differences agree with each other only to {noise:.2g}. F(x, y*(x)) is noisy or not "
            "differentiable here; use float64, a smoother objective, or another point"
        )
    if kink > _KINK:
        return (
            f"no verdict: the slopes on the two sides of x differ by {kink:.2g} at every step, so F(x, y*(x)) has a "
            "kink here and no gradient; take another point"
        )
    if error <= max(_TRUSTED, 2.0 * noise):
        if status is Status.CONVERGED:
            return f"trusted: agrees to {error:.2g}"
        return f"agrees to {error:.2g}, but the estimate itself says {status.name}"
    return (
        f"not to be trusted: off by {error:.2g} where the differences are good to {noise:.2g}. "
        "Solve the lower problem further, or choose a less biased method"
    )


def _directions(x: Tensor) -> list[Tensor]:
    m = x.numel()
    if m <= _DIRECTIONS:
        return list(torch.eye(m, dtype=x.dtype, device=x.device))
    generator = torch.Generator().manual_seed(0)  # the same directions at every call
    random = torch.randn(_DIRECTIONS, m, generator=generator, dtype=torch.float64).to(x)
    return [row / _tree.norm(row) for row in random]


def _plateau(
    lower: _Lower, x: Tensor, y: Tensor, direction: Tensor, size: float, here: float
) -> tuple[float, float, float, int, float]:
    """The slope along `direction` where two neighboring steps agree best, and how far it is one.

    Returns:
        The slope, the difference of the two, the step, how many steps agree, and the smallest difference between
        the slopes of the two sides.
    """
    # The best step for central differences is eps^(1/3): a decade and a half to either side holds it.
    best_step = torch.finfo(x.dtype).eps ** (1.0 / 3.0)
    steps = [size * best_step * 10.0 ** (0.5 * i) for i in range(3, 3 - _STEPS, -1)]
    slopes: list[float] = []
    sides: list[float] = []
    for h in steps:
        ends = [lower.upper(x + s * h * direction, y) for s in (1.0, -1.0)]
        slopes.append((ends[0] - ends[1]) / (2.0 * h))
        sides.append(abs(ends[0] - 2.0 * here + ends[1]) / h)
    spreads = [abs(a - b) for a, b in itertools.pairwise(slopes)]
    finite = [i for i, spread in enumerate(spreads) if math.isfinite(spread)]
    if not finite:
        return math.nan, math.inf, math.nan, 0, 0.0
    i = min(finite, key=lambda j: spreads[j])
    slope = slopes[i + 1]
    agreeing = sum(abs(other - slope) <= _TRUSTED * abs(slope) for other in slopes)
    kink = min(side for side in sides if math.isfinite(side))
    return slope, spreads[i], steps[i + 1], agreeing, kink
