"""Many small problems of the same shapes in one batch."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._autodiff import func
from bilevel._errors import StructureError, check_count, check_kind
from bilevel._problem import BilevelProblem, lower_value, ravel, split_data, upper_value
from bilevel._runs import Runs
from bilevel._solution import Evaluations, Status, table
from bilevel._types import Tree
from bilevel.estimators import Estimate, Implicit, Unrolled, check_problem, refuse_constraints
from bilevel.estimators._descent import Descent, descent
from bilevel.estimators._fused import Fused
from bilevel.optim import Torch
from bilevel.solvers import HypergradientDescent


@dataclass(frozen=True)
class Solutions:
    """The answers of K problems; prints as a table, with ranges over the numbers that are finite.

    Attributes:
        x: The upper variables, each leaf with a leading axis of K.
        y: The lower variables, likewise.
        status: How each run ended.
        upper: F(x, y) of each, shape (K,).
        lower: f(x, y) of each, shape (K,).
        hypergradient: Norm of the last hypergradient of each, shape (K,).
        steps: Upper steps of each, shape (K,).
        evaluations: Calls of the objectives for each problem that ran to the last step of all.
        seconds: Wall-clock time of all together.
    """

    x: Tree
    y: Tree
    status: tuple[Status, ...]
    upper: Tensor
    lower: Tensor
    hypergradient: Tensor
    steps: Tensor
    evaluations: Evaluations
    seconds: float

    def __str__(self) -> str:
        names = [status.name for status in self.status]
        rows = [(name, f"{names.count(name)} of {len(names)}") for name in dict.fromkeys(names)]
        for name in ("upper", "lower", "hypergradient", "steps"):
            part = getattr(self, name)
            part = part[torch.isfinite(part)]  # one failed problem hides no other
            span = (
                f"{float(part.min()):.6g} to {float(part.max()):.6g}" if len(part) else "not finite"
            )
            rows.append((name, span))
        return table([*rows, ("seconds", f"{self.seconds:.3g}")])


def solve_many(
    problem: BilevelProblem,
    solver: HypergradientDescent,
    x0: Tree,
    y0: Tree,
    data: Any = None,
    *,
    max_steps: int,
) -> Solutions:
    r"""Solve K problems that differ in their data or in their start alone, all at once.

    The hypergradient is mapped over the leading axis by `torch.func.vmap`, so that a step of all takes little longer
    than that of one as long as they are small. A problem stands still, and its answer with it, as soon as its step is
    at most `solver.rtol` of $\max(|x|, 10^{-3} \sqrt m)$, which `solve` does not test for such a solver, or as soon
    as its numbers are not finite; the run ends when all stand still. Nothing is certified: `certify` takes one problem.

    Args:
        problem: The two objectives of one problem, made of operations that `torch.func.vmap` can map.
        solver: A `HypergradientDescent` of a fixed number of operations: its estimator `Unrolled`, or `Implicit` with
            `linear.CG(max_steps=...)` or `linear.Dense()` and the `minimizer` `optim.Newton(max_steps=...)` or an
            `optim.Torch`; its `upper_optimizer` an `optim.Torch`; each `Torch` of SGD, Adam or AdamW.
        x0: Where the upper variables start, each leaf with a leading axis of K; not modified.
        y0: Where the lower variables start, likewise.
        data: A `Batch`, or what both objectives get as their third argument: None, or a tree of tensors with a
            leading axis of K. Each problem gets its own entry; what all share goes into the objectives.
        max_steps: Upper steps at most, >= 1.

    Returns:
        The answers. A failure is a status, and stops no other problem: CONVERGED, MAX_STEPS or NONFINITE, with the
        last finite variables; and where a problem converged whose last hypergradient is not to be trusted, that of
        the estimate. MAX_STEPS says only that x still moved, and nothing of the lower problem.

    Raises:
        StructureError: A leaf has no leading axis of the size of the others.
        ObjectiveError: See `solve`.
        TypeError: `problem` or `solver` is of another kind.
        ValueError: `max_steps` is below 1, the solver takes no fixed number of operations, or the problem has
            constraints.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((y - data) ** 2).sum(),
        ...     lower=lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
        ... )
        >>> solver = bl.HypergradientDescent(
        ...     bl.Unrolled(40, lr=0.25),
        ...     upper_optimizer=bl.optim.Torch(torch.optim.SGD, lr=0.1),
        ... )
        >>> zeros = torch.zeros(3, 1, dtype=torch.float64)
        >>> targets = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
        >>> found = bl.solve_many(problem, solver, zeros, zeros, targets, max_steps=100)
        >>> found.x.squeeze(1)
        tensor([0.5000, 1.0000, 2.0000], dtype=torch.float64)
        >>> [status.name for status in found.status]
        ['CONVERGED', 'CONVERGED', 'CONVERGED']
    """
    began = time.perf_counter()
    check_count("solve_many", "max_steps", max_steps, "Raise it, e.g. to 500.")
    mend = "Pass `BilevelProblem(upper, lower)`."
    check_kind("solve_many(problem, ...)", problem, BilevelProblem, mend)
    mend = "Pass e.g. `HypergradientDescent(Unrolled(20), upper_optimizer=...)`."
    check_kind("solve_many(solver=...)", solver, HypergradientDescent, mend)
    refuse_constraints(problem, "solve_many")
    fused, steps = _fixed(solver, max_steps)
    _check_axis(x0, y0, data)
    one_x, one_y, one_data = (_first(tree) for tree in (x0, y0, data))
    check_problem(problem, one_x, one_y, one_data)
    flat, _, unravel_x, unravel_y = ravel(problem, _tree.detach(one_x), _tree.detach(one_y))
    parts = split_data(data)
    mapped = tuple(_axes(part) for part in parts)
    evaluate = func.vmap(fused.program(flat), in_dims=(0, 0, 0, *mapped))
    project = func.vmap(flat.domain) if flat.domain is not None else _same
    x, y = func.vmap(_vector)(_tree.detach(x0)), func.vmap(_vector)(_tree.detach(y0))
    runs = Runs.at(project(x), y)
    for rule in steps.rules():
        found = evaluate(runs.x, runs.y, runs.warm, *parts)
        runs = runs.after(found, project(rule(runs.x, found[0])), solver.rtol)
        if not bool(runs.goes.any()):
            break

    values = [
        func.vmap(partial(fun, flat), in_dims=(0, 0, axes))(runs.x, runs.y, part)
        for fun, axes, part in zip((upper_value, lower_value), mapped, parts, strict=True)
    ]
    last = _estimates(fused, runs)
    cost = Evaluations(*(runs.steps * calls for calls in astuple(last[0].evaluations)))
    return Solutions(
        x=func.vmap(unravel_x)(runs.x),
        y=func.vmap(unravel_y)(runs.y),
        status=tuple(_status(runs, k, one.status) for k, one in enumerate(last)),
        upper=values[0],
        lower=values[1],
        hypergradient=runs.length,
        steps=runs.taken,
        evaluations=cost + Evaluations(upper=1, lower=1),
        seconds=time.perf_counter() - began,
    )


def _fixed(solver: HypergradientDescent, max_steps: int) -> tuple[Fused, Descent]:
    """The estimator and the upper optimizer as fixed programs."""
    estimator, optimizer = solver.estimator, solver.upper_optimizer
    if not isinstance(estimator, Implicit | Unrolled):
        raise ValueError(
            "`solve_many(solver=...)` must have an estimator that is one fixed program. "
            f"Got {type(estimator).__name__}. Use `Unrolled`, or `Implicit` with a fixed number of steps."
        )
    if estimator.compile:
        raise ValueError(
            "`solve_many(solver=...)` must have an estimator without `compile`, which is for one problem at a time. "
            "Got compile=True. Leave it out: all problems share the cost of each operation."
        )
    steps = descent("HypergradientDescent(upper_optimizer=...)", optimizer)
    rate = optimizer.rate if isinstance(optimizer, Torch) else float
    return estimator.fused, replace(steps, rates=tuple(rate(t) for t in range(max_steps)))


def _check_axis(x: Tree, y: Tree, data: Any) -> None:
    """Refuse trees whose leaves have no leading axis of one size, K."""
    _tree.check_variable(x, "x0")
    _tree.check_variable(y, "y0")
    count = (*_tree.leaves(x)[0].shape, 0)[0]
    for name, tree in (("x0", x), ("y0", y), ("data", data)):
        for leaf in _tree.leaves(tree):
            shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else None  # pyright: ignore[reportUnnecessaryIsInstance]
            if not shape or shape[0] != count or count == 0:
                raise StructureError(
                    f"Each leaf of `solve_many({name}=...)` must be a tensor with a leading axis, one entry a problem, "
                    f"{count} as in x0. Got {type(leaf).__name__ if shape is None else f'shape {shape}'}. "
                    "Stack the problems, e.g. with `torch.stack`; what all share goes into the objectives."
                )


def _estimates(fused: Fused, runs: Runs) -> list[Estimate]:
    """The last estimate of each run."""
    rows: Any = runs.numbers.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    scales: Any = runs.scale.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    found = zip(runs.x, runs.y, runs.warm, runs.numbers, strict=True)
    return [
        fused.estimate(one, numbers, True, {"scale": scale})
        for one, numbers, scale in zip(found, rows, scales, strict=True)
    ]


def _status(runs: Runs, k: int, of_estimate: Status) -> Status:
    """How run k ended; only where it converged is the last estimate asked."""
    if runs.converged[k]:
        return of_estimate
    return Status.MAX_STEPS if runs.goes[k] else Status.NONFINITE


def _first(tree: Tree) -> Tree:
    return _tree.unflatten_like(tree, [leaf[0] for leaf in _tree.leaves(tree)])


def _axes(data: Any) -> Any:
    """The mapped axis of each leaf."""
    return _tree.unflatten_like(data, [0] * len(_tree.leaves(data)))


def _vector(tree: Tree) -> Tensor:
    return _tree.ravel(tree)[0]


def _same(x: Tensor) -> Tensor:
    return x
