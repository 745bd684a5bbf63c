"""Test problems whose lower problem is strongly convex: what implicit differentiation is made for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel._autodiff import LinearizedGradient
from bilevel._problem import BilevelProblem
from bilevel.testing._case import ZooProblem, vector

linalg: Any = torch.linalg  # its stubs are untyped


def _spd(n: int, condition: float, generator: torch.Generator) -> Tensor:
    """A random symmetric matrix whose eigenvalues go from 1 to the condition number."""
    basis = linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    return (basis * torch.logspace(0.0, math.log10(condition), n, dtype=torch.float64)) @ basis.T


def quadratic(nx: int = 5, ny: int = 10, condition: float = 10.0, seed: int = 0) -> ZooProblem:
    r"""Two quadratics, the lower one strongly convex.

    $$F = \tfrac12 (y - d)^\top A (y - d) + b^\top x + \tfrac12 x^\top C x, \qquad
    f = \tfrac12 y^\top H y - y^\top (J x + e).$$

    With $M = H^{-1} J$ and $q = H^{-1} e$ the lower solution is $y^* = M x + q$, and
    $x^* = -(C + M^\top A M)^{-1} (b + M^\top A (q - d))$.

    Args:
        nx: Number of upper variables.
        ny: Number of lower variables.
        condition: Condition number of H, at least 1.
        seed: Of the generator that draws the matrices.

    Returns:
        The problem, with the closed form as its answer.

    Example:
        >>> case = quadratic(nx=3, ny=4)
        >>> abs(float(case.problem.upper(case.x_star, case.y_star, None)) - case.upper_star) < 1e-12
        True
    """
    generator = torch.Generator().manual_seed(seed)
    A, C, H = (_spd(*size, generator) for size in ((ny, 10.0), (nx, 10.0), (ny, condition)))
    J = torch.randn(ny, nx, dtype=torch.float64, generator=generator)
    b = torch.randn(nx, dtype=torch.float64, generator=generator)
    d, e = torch.randn(2, ny, dtype=torch.float64, generator=generator)

    def upper(x: Tensor, y: Tensor, data: None) -> Tensor:
        return 0.5 * (y - d) @ A @ (y - d) + b @ x + 0.5 * x @ C @ x

    def lower(x: Tensor, y: Tensor, data: None) -> Tensor:
        return 0.5 * y @ H @ y - y @ (J @ x + e)

    M, q = linalg.solve(H, J), linalg.solve(H, e)
    x_star = -linalg.solve(C + M.T @ A @ M, b + M.T @ A @ (q - d))
    y_star = M @ x_star + q
    return ZooProblem(
        name=f"quadratic {nx}x{ny}, condition {condition:g}",
        problem=BilevelProblem(upper, lower),
        starts=((torch.zeros_like(x_star), torch.zeros_like(y_star)),),
        x_star=x_star,
        y_star=y_star,
        upper_star=float(upper(x_star, y_star, None)),
        lower_star=float(lower(x_star, y_star, None)),
        tolerance=1e-4,
        relative=True,
        reason="the error of a value-function method is one over its last multiplier",
        reference="closed form of the stationarity of both levels",
    )


def ridge(n_weights: int = 1, seed: int = 0) -> ZooProblem:
    r"""The weights of ridge regression: one for all 20 coefficients, or one for each.

    $$F = \tfrac{1}{2 m} \|X_v y - t_v\|^2 + \tfrac{\rho}{2} \|x\|^2, \qquad
    f = \tfrac{1}{2 n} \|X y - t\|^2 + \tfrac12 \sum_i e^{x_i} y_i^2.$$

    The lower solution is $y^* = (X^\top X / n + \operatorname{diag} e^x)^{-1} X^\top t / n$. With
    one weight for each coefficient some optimal weights would be infinite: there $\rho = 0.01$,
    else 0.

    Args:
        n_weights: Number of upper variables, 1 or 20.
        seed: Of the generator that draws the regression.

    Returns:
        The problem; its answer is the minimum of the reduced closed form.

    Raises:
        ValueError: `n_weights` is neither 1 nor 20.

    Example:
        >>> case = ridge()
        >>> bool(case.problem.lower(case.x_star, case.y_star + 0.1, None) > case.lower_star)
        True
    """
    d, n, m = 20, 40, 200
    if n_weights not in (1, d):
        raise ValueError(
            f"`ridge(n_weights=...)` must be 1 or {d}. Got n_weights={n_weights}. "
            f"Pass 1 for one common weight, {d} for one a coefficient."
        )
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n + m, d, dtype=torch.float64, generator=generator)
    truth = torch.randn(d, dtype=torch.float64, generator=generator)
    noise = torch.randn(n + m, dtype=torch.float64, generator=generator)
    targets = inputs @ truth + noise
    X, X_v, t, t_v = inputs[:n], inputs[n:], targets[:n], targets[n:]
    rho = 0.0 if n_weights == 1 else 0.01

    def upper(x: Tensor, y: Tensor, data: None) -> Tensor:
        return 0.5 * ((X_v @ y - t_v) ** 2).mean() + 0.5 * rho * (x**2).sum()

    def lower(x: Tensor, y: Tensor, data: None) -> Tensor:
        return 0.5 * ((X @ y - t) ** 2).mean() + 0.5 * (x.exp() * y**2).sum()

    def solution(x: Tensor) -> Tensor:
        return linalg.solve(X.T @ X / n + torch.diag(x.exp().expand(d)), X.T @ t / n)

    x_star = _minimum(lambda x: upper(x, solution(x), None), n_weights)
    y_star = solution(x_star)
    return ZooProblem(
        name=f"ridge {n_weights}",
        problem=BilevelProblem(upper, lower),
        starts=((torch.zeros_like(x_star), torch.zeros_like(y_star)),),
        x_star=x_star,
        y_star=y_star,
        upper_star=float(upper(x_star, y_star, None)),
        lower_star=float(lower(x_star, y_star, None)),
        tolerance=1e-3,
        relative=n_weights > 1,
        reason="the reduced problem is flat: curvature 0.1 with one weight, from 0.009 with 20",
        reference="SciPy's trust-exact on the reduced problem, gradient below 1e-12",
    )


def _minimum(fun: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """The minimum of a function of n numbers, from zero."""
    import scipy.optimize  # pyright: ignore[reportMissingTypeStubs]

    def of_pair(_: Tensor, x: Tensor) -> Tensor:
        return fun(x)

    def derivatives(x: Any) -> LinearizedGradient:
        return LinearizedGradient(of_pair, vector(), torch.as_tensor(x))

    def value(x: Any) -> float:
        return float(derivatives(x).value)

    def gradient(x: Any) -> Any:
        return derivatives(x).grad.numpy()

    def hessian(x: Any) -> Any:
        return derivatives(x).hessian().numpy()

    optimize: Any = scipy.optimize
    options = {"gtol": 1e-12}
    result = optimize.minimize(
        value, [0.0] * n, jac=gradient, hess=hessian, method="trust-exact", options=options
    )
    return torch.as_tensor(result.x)
