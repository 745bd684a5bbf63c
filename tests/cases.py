"""All estimators and all solvers at the settings in which the tests run them, and oracles for problems.

A test is the product of these and of problems; a pair that cannot work is a strict `xfail` with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.optim import Torch
from bilevel.testing import problems

#: By name: the estimator, and how near its hypergradient comes to the closed form of a quadratic.
ESTIMATORS: dict[str, tuple[bl.Estimator, float]] = {
    "Implicit(Dense)": (bl.Implicit(bl.linear.Dense()), 1e-10),
    "Implicit(CG)": (bl.Implicit(bl.linear.CG()), 1e-8),
    "Implicit(Neumann)": (bl.Implicit(bl.linear.Neumann(500)), 1e-8),
    "Implicit(MINRES)": (bl.Implicit(bl.linear.MINRES()), 1e-8),
    "Implicit(GMRES)": (bl.Implicit(bl.linear.GMRES()), 1e-8),
    "Implicit(Nystrom)": (bl.Implicit(bl.linear.Nystrom(rank=4)), 1e-8),
    "Unrolled": (bl.Unrolled(100, lr=0.15), 1e-6),
    "Unrolled(truncate)": (bl.Unrolled(200, lr=0.15, truncate=120), 1e-6),
    "Unrolled(forward)": (bl.Unrolled(100, lr=0.15, mode="forward"), 1e-6),
    "TwoSided": (bl.TwoSided(1e3), 3e-5),  # 10 / lambda^2
    "ValueFunction": (bl.ValueFunction(), 1e-2),  # 1 / lambda
    "ValueFunction, theta given": (bl.ValueFunction(theta=1e-3), 1e-2),
}


def sgd(lr: float | bl.Schedule, **options: Any) -> Torch:
    return Torch(torch.optim.SGD, lr=lr, **options)


#: By name: the solver, and the batches that it needs (what is in them does not matter on the zoo).
SOLVERS: dict[str, tuple[bl.Solver, list[Any] | None]] = {
    "ASBLO": (bl.ASBLO(), None),
    "HypergradientDescent(Implicit)": (bl.HypergradientDescent(bl.Implicit()), None),
    "HypergradientDescent(Unrolled)": (
        bl.HypergradientDescent(bl.Unrolled(40, lr=0.15), rtol=1e-6),
        None,
    ),
    "HypergradientDescent(Implicit(MINRES))": (
        bl.HypergradientDescent(bl.Implicit(bl.linear.MINRES())),
        None,
    ),
    "HypergradientDescent(TwoSided)": (bl.HypergradientDescent(bl.TwoSided(1e3)), None),
    "HypergradientDescent(Implicit, SGD)": (
        bl.HypergradientDescent(bl.Implicit(), upper_optimizer=sgd(0.03, momentum=0.5)),
        [None] * 200,
    ),
    "F2SA": (bl.F2SA(), None),
    "F3SA": (
        bl.F2SA(
            inner_steps=3,
            momentum=0.9,
            penalty=bl.schedules.geometric(0.1, 1.06),
            upper_optimizer=sgd(0.03),
            lower_optimizer=sgd(0.4),
            value_optimizer=sgd(0.4),
        ),
        [None] * 150,
    ),
    "VPBGD": (bl.VPBGD(), None),
    "BOME": (bl.BOME(), None),
    "MEHA": (bl.MEHA(), None),
    "SOBA": (bl.SOBA(), None),
    "MA-SOBA": (
        bl.SOBA(momentum=0.5, upper_optimizer=sgd(0.01), lower_optimizer=sgd(0.3)),
        [None] * 200,
    ),
    "AmIGO": (bl.AmIGO(), None),
    "StocBiO": (bl.StocBiO(), None),
}

#: By name, of the loops that move x by one step of first order: the error on a well-conditioned quadratic, and after
#: how many steps. The value-function methods end with a bias of one over their last multiplier.
SINGLE_LOOPS: dict[str, tuple[float, int]] = {
    "F2SA": (3e-4, 200),
    "F3SA": (8e-3, 150),
    "VPBGD": (7e-2, 200),  # y takes one step where x does: large penalties take many
    "BOME": (7e-2, 200),  # as VPBGD
    "MEHA": (4e-2, 200),
    "SOBA": (1e-4, 200),
    "MA-SOBA": (1e-4, 200),
    "AmIGO": (1e-5, 100),
    "StocBiO": (1e-3, 100),  # its rtol
}

#: The zoo without the repeated starts and sizes: what a test can afford that is itself a product.
SMALL_ZOO = (
    problems.quadratic(),
    problems.ridge(),
    *problems.bda().cases()[:2],
    *problems.sine(2).cases()[:2],
    problems.pbgd_toy().cases()[0],
)


def names(cases: Any) -> list[str]:
    return [case.name for case in cases]


def lower_solution(problem: bl.BilevelProblem, like: Tensor) -> Callable[[Tensor], Tensor]:
    """y*(x) where f is a convex quadratic in y, by the normal equations and nothing of the library."""

    def solution(x: Tensor) -> Tensor:
        def lower(y: Tensor) -> Tensor:
            return problem.lower(x, y, None)

        hessian = torch.func.hessian(lower)(torch.zeros_like(like))
        slope = torch.func.grad(lower)(torch.zeros_like(like))
        return -torch.linalg.solve(hessian, slope)

    return solution


def reduced(problem: bl.BilevelProblem, like: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> F(x, y*(x)) where f is a convex quadratic in y."""
    solution = lower_solution(problem, like)
    return lambda x: problem.upper(x, solution(x), None)


def slope(fun: Callable[[Tensor], float], x: Tensor, direction: Tensor, h: float) -> float:
    """The derivative along a direction by fourth-order central differences."""
    ends = [fun(x + s * h * direction) for s in (-2, -1, 1, 2)]
    return (ends[0] - 8.0 * ends[1] + 8.0 * ends[2] - ends[3]) / (12.0 * h)
