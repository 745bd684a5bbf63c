"""The contract of solvers and estimators as checks, for those of one's own."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._checkpoint import load_state, save_state
from bilevel._iterate import iterate
from bilevel._problem import BilevelProblem
from bilevel._solution import State, Status
from bilevel._types import Tree
from bilevel.estimators import Estimator, hypergradient
from bilevel.solvers import Solver
from bilevel.testing import _contract
from bilevel.testing._case import ZooProblem
from bilevel.testing._contract import ContractError, require, same
from bilevel.testing._regular import quadratic, ridge

__all__ = ["ContractError", "check_hypergradient_estimator", "check_solver"]


def check_solver(
    solver: Solver,
    *,
    problems: Sequence[ZooProblem] | None = None,
    max_steps: int = 1000,
    batches: Sequence[Any] | None = None,
) -> None:
    """Check that a solver keeps the contract of `Solver`, and solves problems with known answers.

    Checked are: the distance to each answer; that x0, y0, the global random state and the states of the past
    stay as they are; that a saved state goes on bit for bit, from every step; that the evaluations in the state
    are those that happened; nested trees and float32 in the place of a float64 tensor; and that NaN in an
    objective ends the run with a `Status`, a message and the last finite variables.

    Args:
        solver: The solver.
        problems: What it should solve, each to its own tolerance; `quadratic()` and `ridge()` if left out.
        max_steps: Upper steps at most for each.
        batches: The data of each step, for a solver that needs batches. The problems of the zoo ignore what
            is in them.

    Raises:
        ContractError: A rule is broken; the message says which.

    Example:
        >>> import bilevel as bl
        >>> check_solver(bl.HypergradientDescent(bl.Implicit()))
    """
    check = _SolverCheck(solver, max_steps, batches)
    problems = (quadratic(), ridge()) if problems is None else problems
    for case in problems:
        states = check.run(case.problem, case.x0, case.y0)
        check.solved(case, states[-1], states[-1].x)
        check.resumes(case.problem, states)
    case = problems[0]
    check.counts(case)
    x0, y0 = _contract.halves(case.x0), _contract.halves(case.y0)
    last = check.run(_contract.over_halves(case.problem), x0, y0)[-1]
    _tree.check_like(last.x, x0, "State.x")
    _tree.check_like(last.y, y0, "State.y")
    check.solved(case, last, _contract.whole(last.x), "over nested trees")
    x0, y0 = case.x0.float(), case.y0.float()
    last = check.run(_contract.in_float32(case.problem), x0, y0)[-1]
    _tree.check_like(last.x, x0, "State.x")
    check.solved(case, last, last.x.double(), "in float32", max(1e-2, case.tolerance))
    for level, calls in itertools.product(("upper", "lower"), (1, 5)):
        broken = _contract.breaking(case.problem, level, calls)
        check.failed(level, check.run(broken, case.x0, case.y0)[-1])


def check_hypergradient_estimator(
    estimator: Estimator, *, rtol: float = 1e-6, problems: Sequence[ZooProblem] | None = None
) -> None:
    """Check that an estimator keeps the contract of `Estimator`, and that its gradient is one.

    Checked are: the closed form of a quadratic problem; central differences of `Estimate.value`, of which
    `Estimate.grad` must be the gradient; a start from the memory of another point; that nothing that is passed
    in changes; that the evaluations are those that happened; nested trees and float32 in the place of a float64
    tensor; and that NaN in an objective gives a `Status`.

    Args:
        estimator: The estimator.
        rtol: Largest relative distance to the closed form: rounding, or the bias of the method.
        problems: Where central differences are taken; `quadratic()` and `ridge()` if left out.

    Raises:
        ContractError: A rule is broken; the message says which.

    Example:
        >>> import bilevel as bl
        >>> check_hypergradient_estimator(bl.Implicit())
        >>> check_hypergradient_estimator(bl.Unrolled(max_steps=3))
        Traceback (most recent call last):
        ...
        bilevel.testing._contract.ContractError: `Unrolled` must agree with the closed form ...
    """
    name, case = type(estimator).__name__, quadratic()
    x, y = _contract.away(case)
    exact = _contract.exact_hypergradient(case, x)
    estimate = hypergradient(case.problem, x, y, estimator)
    _agrees(name, "", estimate.grad, exact, rtol)
    require(
        estimate.status is Status.CONVERGED and "lower_residual" in estimate.info,
        f"`{name}` must report CONVERGED and its `lower_residual`",
        f"{estimate.status.name} and {sorted(estimate.info)}",
        "Set `Estimate.status` and `Estimate.info`.",
    )
    for other in (quadratic(), ridge()) if problems is None else problems:
        _is_gradient_of_value(name, estimator, other)
    _has_no_side_effects(name, estimator, case, rtol)
    trees = _contract.halves(x), _contract.halves(y)
    nested = hypergradient(_contract.over_halves(case.problem), *trees, estimator)
    _tree.check_like(nested.grad, trees[0], "Estimate.grad")
    _agrees(name, "over nested trees ", _contract.whole(nested.grad), exact, rtol)
    single = estimator.estimate(_contract.in_float32(case.problem), x.float(), y.float())
    _tree.check_like(single.grad, x.float(), "Estimate.grad")
    _agrees(name, "in float32 ", single.grad.double(), exact, max(1e-2, rtol))
    for level in ("upper", "lower"):
        broken = estimator.estimate(_contract.breaking(case.problem, level, 0), x, y)
        require(
            broken.status.is_failure,
            f"`{name}` must not report success where the {level} objective is NaN",
            broken.status.name,
            "Return `Status.NONFINITE`.",
        )


class _SolverCheck:
    """A solver and how it is run."""

    def __init__(self, solver: Solver, max_steps: int, batches: Sequence[Any] | None) -> None:
        self.solver, self.max_steps, self.batches = solver, max_steps, batches
        self.name = type(solver).__name__

    def run(self, problem: BilevelProblem, x0: Tree, y0: Tree) -> list[State]:
        """All states of a run, of which nothing else may have changed."""
        before = copy.deepcopy((x0, y0)), torch.random.get_rng_state()
        states: list[State] = []
        copies: list[State] = []
        run = iterate(problem, self.solver, x0, y0, self.batches)
        for state in itertools.islice(run, self.max_steps):
            states.append(state)
            copies.append(copy.deepcopy(state))
        for what, unchanged in (
            ("x0 and y0", same((x0, y0), before[0])),
            ("the global random state", same(torch.random.get_rng_state(), before[1])),
            ("the states that it returned before", same(states, copies)),
        ):
            require(
                unchanged,
                f"`{self.name}` must leave {what} as it found them",
                "a change",
                "Copy before writing in place, and take a `torch.Generator`.",
            )
        return states

    def solved(
        self, case: ZooProblem, last: State, x: Tensor, how: str = "", tol: float | None = None
    ) -> None:
        error, bound = case.error(x), case.tolerance if tol is None else tol
        require(
            error <= bound and not last.status.is_failure,
            f"`{self.name}` must come within {bound} of the answer of {case.name} {how}".rstrip(),
            f"an error of {error:.3g} after {last.step} steps ({last.status.name}: {last.message})",
            "Check the hypergradient with `check_hypergradient`, or raise `max_steps`.",
        )

    def resumes(self, problem: BilevelProblem, states: Sequence[State]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state"
            for number, (state, expected) in enumerate(itertools.pairwise(states), start=1):
                save_state(path, state)
                rest = None if self.batches is None else self.batches[number:]
                found = next(iterate(problem, self.solver, batches=rest, state=load_state(path)))
                different = _contract.different_fields(found, expected)
                require(
                    not different,
                    f"`{self.name}` must go on from a saved state as if it had never stopped",
                    f"other {' and '.join(different)} in the step after step {state.step}",
                    "Keep all that changes in the `State`, and nothing in the solver.",
                )

    def counts(self, case: ZooProblem) -> None:
        calls = {"upper": 0, "lower": 0}
        problem = _contract.counted(case.problem, calls)
        stream = [None] * 5 if self.batches is None else self.batches[:5]
        full_batch = self.batches is None
        state = self.solver.init(problem, case.x0, case.y0, stream[0], full_batch=full_batch)
        for data in stream:
            state = self.solver.step(problem, state, data)
        _contract.require_counts(self.name, state.evaluations, calls)

    def failed(self, level: str, last: State) -> None:
        require(
            last.status.is_failure and last.message != "",
            f"`{self.name}` must end with a failure and a message where the {level} objective is NaN",
            f"{last.status.name} with the message {last.message!r}",
            "Return `Status.NONFINITE`, and say at which step.",
        )
        require(
            _tree.is_finite(last.x) and _tree.is_finite(last.y),
            f"`{self.name}` must keep the last finite variables",
            f"x = {last.x} and y = {last.y}",
            "Return the state before, with another status.",
        )


def _agrees(name: str, how: str, grad: Tensor, exact: Tensor, rtol: float) -> None:
    error = _contract.distance(grad, exact)
    require(
        error <= rtol,
        f"`{name}` must agree with the closed form of a quadratic problem {how}to {rtol}",
        f"a relative error of {error:.3g}",
        "Solve the lower problem further, or say with `rtol` how biased the method is.",
    )


def _is_gradient_of_value(name: str, estimator: Estimator, case: ZooProblem) -> None:
    x, y = _contract.away(case)
    estimate = estimator.estimate(case.problem, x, y)
    direction = torch.cos(torch.arange(x.numel()).to(x))
    h = 1e-3 / _tree.length(direction)
    ends = [
        estimator.estimate(case.problem, x + s * h * direction, y).value for s in (-2, -1, 1, 2)
    ]
    measured = (ends[0] - 8.0 * ends[1] + 8.0 * ends[2] - ends[3]) / (12.0 * h)
    claimed = float(estimate.grad @ direction)
    error = abs(claimed / measured - 1.0)
    require(
        error <= 1e-6,
        f"`{name}` must return the gradient of `Estimate.value` to 1e-6 ({case.name})",
        f"{claimed:.9g} for {measured:.9g} by central differences, off by {error:.3g}",
        "Solve the lower problem further, or mend the formula.",
    )


def _has_no_side_effects(name: str, estimator: Estimator, case: ZooProblem, rtol: float) -> None:
    x, y = _contract.away(case)
    memory = dict(estimator.estimate(case.problem, x, y).memory)
    before = copy.deepcopy((x, y, memory)), torch.random.get_rng_state()
    calls = {"upper": 0, "lower": 0}
    near = x + 0.01
    warm = estimator.estimate(_contract.counted(case.problem, calls), near, y, None, memory)
    _contract.require_counts(name, warm.evaluations, calls)
    require(
        same((x, y, memory), before[0]) and same(torch.random.get_rng_state(), before[1]),
        f"`{name}` must leave x, y, the memory and the global random state as it found them",
        "a change",
        "Copy before writing in place, and take a `torch.Generator`.",
    )
    exact = _contract.exact_hypergradient(case, near)
    _agrees(name, "from the memory of a point nearby ", warm.grad, exact, rtol)
