"""Where the single loops start: the optimizers of their variables, the curvatures and the unit of the penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem, projected_by
from bilevel._solution import State, Status
from bilevel._types import Tree
from bilevel.estimators import refuse_constraints
from bilevel.optim.torch import Torch
from bilevel.solvers import _fields
from bilevel.solvers._base import Solver
from bilevel.solvers._curvature import probed, size

_ADAM = Torch(torch.optim.Adam, lr=1e-3)


class Movers(NamedTuple):
    """The optimizers that the user gave, None for the mode's own steps."""

    x: Torch | None
    y: Torch | None
    z: Torch | None

    @classmethod
    def of(cls, solver: Solver, *, full_batch: bool) -> Movers:
        """Those in the fields of a solver; batches, whose noise no curvature can be read from, need one each."""
        given = [getattr(solver, part, None) for part in _fields.OPTIMIZERS]
        return cls(*given) if full_batch else cls(*(part or _ADAM for part in given))


def init(
    solver: Solver,
    problem: BilevelProblem,
    x0: Tree,
    y0: Tree,
    data: Any,
    *,
    full_batch: bool,
    extra: Mapping[str, Any],
    allowed: tuple[str, ...] = (),
) -> State:
    """Measure curvatures and the unit of the penalty at the start: 5 gradients of f and 5 of F.

    `extra` is what the memory of the solver holds besides, and `allowed` names the constraints that it takes.

    The unit is the weight of f at which it holds y against F: with it, a penalty of 100 lets F move y by a
    hundredth of its size, whatever the units of F, f and y.
    """
    refuse_constraints(problem, type(solver).__name__, allowed)
    x, y = projected_by(problem.domain, _tree.detach(x0)), _tree.detach(y0)
    oracle = Oracle(problem, data)
    _, upper_x, upper_y = oracle.upper_grad(x, y)
    lower = probed(lambda v: oracle.lower_grad_y(x, v)[1], y)
    upper = probed(lambda v: oracle.upper_grad_y(x, v)[1], y)
    size_y = size(y)
    slopes = [_tree.length(upper_x), _tree.length(upper_y)]
    finite = all(map(math.isfinite, (*slopes, upper, lower)))
    optimizers = Movers.of(solver, full_batch=full_batch)._asdict()
    lower = lower or 1.0
    variables = {"x": x, "y": y, "z": y}
    return State(
        x=x,
        y=y,
        status=Status.RUNNING if finite else Status.NONFINITE,
        message="" if finite else f"{Status.NONFINITE.value} (at x0, y0)",
        memory={
            "full_batch": full_batch,
            "stage": 0,
            "unit": (slopes[1] / size_y + upper) / lower or 1.0,
            "curvature": {"upper": upper, "lower": lower, "hessian": lower},
            "before": {},
            "least": math.inf,
            "shorter": 1.0,
            "optimizers": {
                name: given.init(_tree.leaves(variables[name]))
                for name, given in optimizers.items()
                if given is not None
            },
            "steepest": math.hypot(*slopes),
            "reach": [size(x), size_y],
            **extra,
        },
        evaluations=oracle.evaluations,
    )
