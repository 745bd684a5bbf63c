"""How good an answer is, by means that no solver uses on its way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem, ravel, split_data
from bilevel._solution import Certificate, Status
from bilevel._types import Objective, Tree
from bilevel.estimators import Implicit
from bilevel.estimators._basins import STARTS, explore
from bilevel.linear import CG, Dense
from bilevel.optim import Newton

_DENSE = 256  # largest y whose Hessian is formed
linalg: Any = torch.linalg  # its stubs are untyped
_SINGULAR = 1e-10  # smallest eigenvalue, over the largest, of an invertible Hessian


def certify(problem: BilevelProblem, x: Tree, y: Tree, data: Any = None) -> Certificate:
    r"""How good (x, y) is as an answer: value gap, stationarity, violations, and what was assumed.

    The lower problem is solved again, by Newton's method from y and from seven points around it, so that a y
    in the wrong basin shows as a value gap wherever one of them finds a deeper one. The hypergradient is the
    implicit one, at the solution found from y.

    Args:
        problem: The problem.
        x: Upper variable.
        y: Lower variable.
        data: A `Batch`, or what both objectives get as their third argument.

    Returns:
        The certificate.

    Raises:
        StructureError: `x` or `y` is no tree of floating tensors.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: ((y - x) ** 2).sum(),
        ... )
        >>> good = bl.certify(problem, torch.ones(1), torch.ones(1))
        >>> good.value_gap, good.hypergradient
        (0.0, 0.0)
        >>> bl.certify(
        ...     problem, torch.ones(1), torch.full((1,), 3.0)
        ... ).value_gap  # a wrong y is caught
        4.0
    """
    _tree.check_variable(x, "x")
    _tree.check_variable(y, "y")
    flat, (u, v), _, _ = ravel(problem, _tree.detach(x), _tree.detach(y))
    oracle = Oracle(flat, data)
    value, _, grad = oracle.lower_grad(u, v)
    basins = explore(oracle, u, v, Newton(), seed=0)
    assumptions = [f"the lower minimum is the lowest of {STARTS} local solves"]
    curvature, invertible = None, True
    if v.numel() <= _DENSE:
        hessian = oracle.linearized(u, v).hessian()
        invertible = _tree.is_finite(hessian)
        if invertible:
            eigenvalues: Tensor = linalg.eigvalsh(hessian)
            curvature = float(eigenvalues[0])
            invertible = curvature > _SINGULAR * float(eigenvalues[-1])
    else:
        assumptions.append(
            f"the lower Hessian is positive definite (not tested above {_DENSE} variables)"
        )
    hypergradient = None
    spent = oracle.evaluations
    if invertible:
        linear = Dense() if v.numel() <= _DENSE else CG()
        estimate = Implicit(linear, error_bound=False).estimate(flat, u, v, data)
        spent = spent + estimate.evaluations
        if estimate.status is Status.CONVERGED:
            moved = u - estimate.grad
            moved = flat.domain(moved) if flat.domain is not None else moved
            hypergradient = _tree.length(u - moved)
    else:
        assumptions.append(
            "F cannot be lowered by another lower solution: "
            "the lower Hessian is singular, indefinite or not finite here"
        )
    outside = 0.0 if flat.domain is None else _tree.length(u - flat.domain(u))
    parts = split_data(data)
    return Certificate(
        value_gap=_positive(float(value) - min(basins.nearest, basins.lowest)),
        deeper_basin=max(0.0, basins.nearest - basins.lowest),
        lower_gradient=_tree.length(grad),
        hypergradient=hypergradient,
        upper_violation=_violation(problem.upper_constraint, x, y, parts.upper),
        lower_violation=_violation(problem.lower_constraint, x, y, parts.lower),
        domain_violation=outside,
        lower_curvature=curvature,
        assumptions=tuple(assumptions),
        evaluations=spent,
    )


def _violation(constraint: Objective | None, x: Tree, y: Tree, data: Any) -> float:
    if constraint is None:
        return 0.0
    with torch.no_grad():
        return _positive(float(constraint(x, y, data).max()))


def _positive(value: float) -> float:
    """`value` or 0; a NaN stays one."""
    return 0.0 if value < 0.0 else value
