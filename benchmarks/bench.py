"""Times a hypergradient from a cold start: solve the lower problem from zero, then differentiate.

    make bench        or        python benchmarks/bench.py

Each row is one method on one problem: the median of several runs on one thread, the relative error
against the closed form, and what was evaluated. `by hand` is what one would write without a library: gradient
descent with momentum, tuned to the known condition number, and conjugate gradients.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import bilevel as bl


@dataclass(frozen=True)
class Case:
    """A strongly convex quadratic with a known hypergradient; eigenvalues 1 to `condition`."""

    n: int
    condition: float

    def __str__(self) -> str:
        return f"quadratic, n = {self.n}, condition {self.condition:g}"

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.n, self.n, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(noise)[0]
        eigenvalues = torch.logspace(0, 1, self.n, base=self.condition, dtype=torch.float64)
        target = torch.randn(self.n, generator=generator, dtype=torch.float64)
        return (basis * eigenvalues) @ basis.T, eigenvalues, target


def by_hand(case: Case, hessian: Tensor, target: Tensor, x: Tensor) -> Tensor:
    root = case.condition**0.5
    step, momentum = (2 / (1 + root)) ** 2, ((root - 1) / (root + 1)) ** 2
    y, velocity = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(100_000):
        leaf = y.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(0.5 * leaf @ (hessian @ leaf) - leaf @ x, leaf)
        if grad.norm() < 1e-8:
            break
        velocity = momentum * velocity - step * grad
        y = y + velocity
    b = y - target
    v, residual = torch.zeros_like(b), b.clone()
    direction, square = residual.clone(), residual @ residual
    while square > 1e-16 * (b @ b):
        product = hessian @ direction
        alpha = square / (direction @ product)
        v, residual = v + alpha * direction, residual - alpha * product
        square, previous = residual @ residual, square
        direction = residual + square / previous * direction
    return v


def median_ms(run: Callable[[], object], runs: int = 5) -> float:
    run()  # the first one pays for caches
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    methods = {
        "Implicit(CG)": bl.Implicit(bl.linear.CG()),
        "Implicit(Dense)": bl.Implicit(bl.linear.Dense()),
        "ValueFunction": bl.ValueFunction(),
    }
    print(f"{'':36} {'method':16} {'ms':>8} {'rel. error':>10} {'gradients':>9} {'HVPs':>6}")
    for case in (Case(100, 100.0), Case(300, 100.0)):
        hessian, _, target = case.matrices()
        x, zero = torch.ones(case.n, dtype=torch.float64), torch.zeros(case.n, dtype=torch.float64)
        truth = torch.linalg.solve(hessian, torch.linalg.solve(hessian, x) - target)
        problem = bl.BilevelProblem(
            upper=lambda x, y, data, target=target: 0.5 * ((y - target) ** 2).sum(),
            lower=lambda x, y, data, hessian=hessian: 0.5 * y @ (hessian @ y) - y @ x,
        )

        def error(grad: Tensor, truth: Tensor = truth) -> float:
            return float((grad - truth).norm() / truth.norm())

        def hand(
            case: Case = case, h: Tensor = hessian, t: Tensor = target, x: Tensor = x
        ) -> Tensor:
            return by_hand(case, h, t, x)

        print(f"{case!s:36} {'by hand':16} {median_ms(hand):8.2f} {error(hand()):10.1e}")
        for name, method in methods.items():

            def run(
                method: bl.Estimator = method,
                problem: bl.BilevelProblem = problem,
                x: Tensor = x,
                zero: Tensor = zero,
            ) -> bl.Estimate:
                return bl.hypergradient(problem, x, zero, method=method)

            estimate = run()
            count = estimate.evaluations
            print(
                f"{'':36} {name:16} {median_ms(run):8.2f} {error(estimate.grad):10.1e} "
                f"{count.gradients:9} {count.hvp:6}"
            )


if __name__ == "__main__":
    main()
