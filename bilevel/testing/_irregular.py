"""Test problems whose lower problem is not convex or has many solutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel._box import Box
from bilevel._problem import BilevelProblem
from bilevel.testing._case import ZooProblem, vector


def bda() -> ZooProblem:
    r"""A lower problem with many solutions, of which the upper level wants one.

    $$F = \tfrac12 (x - y_2)^2 + \tfrac12 (y_1 - 1)^2, \qquad f = \tfrac12 y_1^2 - x y_1, \qquad
    |x| \le 100.$$

    $S(x) = \{(x, t) : t \in \mathbb{R}\}$, and the optimum is $x = 1$, $y = (1, 1)$, $F = 0$. A
    method that differentiates one lower solution leaves $y_2$ at its start t and ends at
    $x = (1 + t) / 2$. At $x = 0$, $0 \in S(x)$: a barrier without slack has no interior there.

    Returns:
        The problem with three starts.

    Example:
        >>> bda().problem.upper(torch.tensor([0.5]), torch.tensor([0.5, 0.0]), None)  # unrolled
        tensor(0.2500)
    """

    def upper(x: Tensor, y: Tensor, data: None) -> Tensor:
        return 0.5 * (x[0] - y[1]) ** 2 + 0.5 * (y[0] - 1.0) ** 2

    def lower(x: Tensor, y: Tensor, data: None) -> Tensor:
        return 0.5 * y[0] ** 2 - x[0] * y[0]

    return ZooProblem(
        name="BDA",
        problem=BilevelProblem(upper, lower, domain=Box(-100.0, 100.0)),
        starts=tuple((vector(x), vector(0.0, t)) for x, t in ((0, 0), (3, 2), (-5, -1))),
        x_star=vector(1.0),
        y_star=vector(1.0, 1.0),
        upper_star=0.0,
        lower_star=-0.5,
        tolerance=1e-4,
        reason="x = 0 is the degenerate start, the others come from both sides",
        reference="counterexample of Liu et al., A Generic First-Order Algorithmic Framework for "
        "Bi-Level Programming Beyond Lower-Level Singleton, ICML 2020",
    )


def sine(n: int = 1) -> ZooProblem:
    r"""A lower problem with infinitely many solutions, in separate basins.

    $$F = (x - a)^2 + \|y - a - c\|^2, \qquad f = \sum_i \sin(x + y_i - c), \qquad a = c = 2.$$

    The lower solutions are $x + y_i - c = K$ with $K = -\pi/2 + 2 \pi k$. The best K is the one
    nearest to $2 a$, that is $3 \pi / 2$, and $x^* = ((1 - n) a + n K) / (1 + n)$,
    $y_i^* = K + c - x^*$, $F^* = n (K - 2 a)^2 / (1 + n)$, $f^* = -n$.

    Args:
        n: Number of lower variables.

    Returns:
        The problem with six starts, of which several lie in the basin of a worse K.

    Example:
        >>> round(sine(n=1).upper_star, 6), round(float(sine(n=2).x_star), 6)
        (0.253749, 2.474926)
    """
    a = c = 2.0
    K = 1.5 * math.pi

    def upper(x: Tensor, y: Tensor, data: None) -> Tensor:
        return (x[0] - a) ** 2 + ((y - a - c) ** 2).sum()

    def lower(x: Tensor, y: Tensor, data: None) -> Tensor:
        return torch.sin(x[0] + y - c).sum()

    starts = ((0, 0), (3, 3), (8, -3), (-4, 6), (5, 5), (-2, -2))
    x_star = ((1 - n) * a + n * K) / (1 + n)
    return ZooProblem(
        name=f"sine {n}",
        problem=BilevelProblem(upper, lower),
        starts=tuple((vector(x), vector(*[y] * n)) for x, y in starts),
        x_star=vector(x_star),
        y_star=vector(*[K + c - x_star] * n),
        upper_star=n * (K - 2 * a) ** 2 / (1 + n),
        lower_star=-float(n),
        tolerance=1e-3,
        reason="the optima of other basins are 3 or more away: any end this near is the global one",
        reference="Liu et al., Value-Function-based Sequential Minimization for Bi-level "
        "Optimization, IEEE TPAMI 2023, Eq. 20; the closed form follows from F on one basin",
    )


def pbgd_toy() -> ZooProblem:
    r"""A non-convex lower problem that satisfies the Polyak-Lojasiewicz inequality.

    $$F = \frac{\cos(4 y + 2)}{1 + e^{2 - 4 x}} + \tfrac12 \log((4 x - 2)^2 + 1), \qquad
    f = (x + y)^2 + x \sin^2(x + y), \qquad 0 \le x \le 3.$$

    The lower solution is $y^* = -x$, so the optima are those of $x \mapsto F(x, -x)$ on [0, 3].

    Returns:
        The problem with four starts; a solver may end in any of its three local optima.

    Example:
        >>> [round(float(x), 3) for x in (pbgd_toy().x_star, *pbgd_toy().local_optima)]
        [1.215, 0.382, 2.83]
    """

    def upper(x: Tensor, y: Tensor, data: None) -> Tensor:
        wave = torch.cos(4.0 * y[0] + 2.0) * torch.sigmoid(4.0 * x[0] - 2.0)
        return wave + 0.5 * torch.log((4.0 * x[0] - 2.0) ** 2 + 1.0)

    def lower(x: Tensor, y: Tensor, data: None) -> Tensor:
        return (x[0] + y[0]) ** 2 + x[0] * torch.sin(x[0] + y[0]) ** 2

    x_star = vector(1.2151454754759206)
    return ZooProblem(
        name="PBGD toy",
        problem=BilevelProblem(upper, lower, domain=Box(0.0, 3.0)),
        starts=tuple(
            (vector(x), vector(y)) for x, y in ((0.5, 0.0), (1.0, 1.0), (2.0, -1.0), (3.0, 3.0))
        ),
        x_star=x_star,
        y_star=-x_star,
        upper_star=float(upper(x_star, -x_star, None)),
        lower_star=0.0,
        local_optima=(vector(0.382360074766988), vector(2.829641800022212)),
        tolerance=1e-3,
        reason="any local optimum will do: no method here is global",
        reference="Shen and Chen, On Penalty-based Bilevel Gradient Descent Method, ICML 2023; "
        "optima from a grid of step 1e-5 on F(x, -x), refined by SciPy",
    )
