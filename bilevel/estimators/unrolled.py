"""The unrolled hypergradient: differentiate through the steps that solve the lower problem."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._errors import check_count, check_kind, check_number
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem
from bilevel._solution import Status
from bilevel._types import Tree
from bilevel.estimators import _compiled
from bilevel.estimators._base import FALLEN, Estimate, Estimator, failed
from bilevel.estimators._fused import FusedUnrolled
from bilevel.estimators._tape import Tape

_Differentiated = tuple[Tree, float, Tensor, float, float | None]


@dataclass(frozen=True)
class Unrolled(Estimator):
    r"""The gradient of $F(x, y_T(x))$, where $y_{t+1} = y_t - \alpha \nabla_y f(x, y_t)$ from the given y.

    It is the exact gradient of what T steps of gradient descent reach. Where the lower problem has many
    solutions, that is the solution the start leads to, whatever F would choose among them.

    Reverse mode goes back through the steps with a cotangent of y. It keeps the graphs of the last steps, as many as
    fit into `graph_memory`. Those of the others are built on the way back, as many at a time, from iterates that were
    kept: a second gradient for each of these steps, and a third for most of them where neither enough graphs nor
    enough iterates fit. Whatever T is, there are at most $2 \sqrt T$ such iterates, or as many as fit into
    `graph_memory` once more.

    Forward mode carries $dy_t/dx$, shape (n, m), along with the steps: it keeps nothing, and costs m products a
    step, so it is for a few upper variables.

    The status is LOWER_UNSOLVED where the gradient of f has not fallen to a hundredth of the first one seen: too
    few steps, or steps so long that they diverge. The number is still the exact gradient of the returned value, but
    with `truncate`: CONVERGED then speaks of y alone, and the hypergradient may be far off, by the norm of the part
    that was left out. `info["truncated"]` is the length of the cotangent of y at the cut, over that of F's gradient
    in y (in reverse mode): what is left there is not passed on, and the number is good where it is small.

    Attributes:
        max_steps: T, the number of steps, >= 1.
        lr: alpha, their length, > 0; below 2 over the largest eigenvalue of the lower Hessian.
        truncate: K >= 1: differentiate the last K steps only, and take $y_{T-K}$ for a constant. The error falls as
            $(1 - \alpha \lambda_{\min})^K$ where the lower problem is strongly convex. None for all steps.
        mode: `"reverse"`, or `"forward"` for few upper variables.
        compile: Whether `torch.compile` makes one graph of all steps and their adjoints: the same numbers many times
            faster where the problem is small, but the first call compiles it, for the longer the more steps
            there are. In reverse mode, and it keeps the graph of each step. What is compiled is kept with the
            problem, so make that once, and give what changes as data.
        graph_memory: Bytes for the graphs of the steps in reverse mode, and as many once more for iterates, >= 0: more
            is faster, up to the graphs of all steps, and 0 is the leanest. What graphs share, as the data, does not
            count, and nor does what Python and torch need for each of their tensors, a few hundred bytes. Without
            effect on `compile`, which keeps all.

    Raises:
        ValueError: A parameter is out of its range.
        TypeError: A parameter is of the wrong kind.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: 0.5 * ((y - 1.0) ** 2).sum(),
        ...     lower=lambda x, y, data: 0.5 * ((y - 3.0 * x) ** 2).sum(),
        ... )
        >>> estimate = bl.hypergradient(
        ...     problem, torch.ones(1), torch.zeros(1), method=bl.Unrolled(100, lr=0.5)
        ... )
        >>> round(estimate.grad.item(), 4)
        6.0

    References:
        Franceschi et al., Forward and reverse gradient-based hyperparameter optimization (ICML 2017), algorithms 1
        and 2; Shaban et al., Truncated back-propagation for bilevel optimization (AISTATS 2019), Eq. 5; Griewank and
        Walther, Evaluating derivatives (2008), chapter 12, for the recomputation.
    """

    max_steps: int = 100
    lr: float = 0.1
    truncate: int | None = None
    mode: Literal["reverse", "forward"] = "reverse"
    compile: bool = False
    graph_memory: int = 2**26

    def __post_init__(self) -> None:
        check_count("Unrolled", "max_steps", self.max_steps, "Raise it, e.g. to 100.")
        check_number("Unrolled", "lr", self.lr, "Use e.g. 0.1.")
        if self.truncate is not None:
            mend = "Give the number of last steps to differentiate, or leave it out for all."
            check_count("Unrolled", "truncate", self.truncate, mend)
        if self.mode not in ("reverse", "forward"):
            raise ValueError(
                f'`Unrolled(mode=...)` must be "reverse" or "forward". Got mode={self.mode!r}. '
                'Use "forward" for a few upper variables only.'
            )
        mend = "Give bytes, e.g. 2**30, or 0 for the least memory."
        check_count("Unrolled", "graph_memory", self.graph_memory, mend, least=0)
        check_kind("Unrolled(compile=...)", self.compile, bool, "Pass True or False.")
        if self.compile:
            _ = self.fused  # refuses forward mode now

    @property
    def _constant_steps(self) -> int:
        """T - K, the steps that are not differentiated."""
        return 0 if self.truncate is None else max(0, self.max_steps - self.truncate)

    @cached_property
    def fused(self) -> FusedUnrolled:
        """The same as one fixed program.

        Raises:
            ValueError: In forward mode.
        """
        if self.mode != "reverse":
            raise ValueError(
                '`Unrolled(mode=...)` must be "reverse" in a fixed program, as `compile=True` and `solve_many` need. '
                f"Got mode={self.mode!r}. Leave out one of them."
            )
        return FusedUnrolled(self.max_steps, self._constant_steps, self.lr)

    def precompiled(self, problem: BilevelProblem, x: Tree, y: Tree, data: Any) -> Estimate | None:
        """See `Estimator.precompiled`."""
        return _compiled.precompiled(self.fused, problem, x, y, data) if self.compile else None

    def estimate(
        self,
        problem: BilevelProblem,
        x: Tensor,
        y: Tensor,
        data: Any = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Estimate:
        """See `Estimator.estimate`."""
        if self.compile:
            return _compiled.estimate(self.fused, problem, x, y, data, memory)
        oracle = Oracle(problem, data)
        differentiate = self._reverse if self.mode == "reverse" else self._forward
        final, upper, grad, first, truncated = differentiate(oracle, x, y)
        lower, last = oracle.lower_grad_y(x, final)
        residual = _tree.length(last)
        finite = all(map(math.isfinite, (upper, float(lower), residual)))
        if not (finite and _tree.is_finite(grad)):
            return failed(oracle, x, y, Status.NONFINITE)
        eps = torch.finfo(x.dtype).eps
        scale = max(first, float((memory or {}).get("scale", 0.0)))
        has_fallen = residual <= FALLEN * scale and residual <= max(first, math.sqrt(eps) * scale)
        return Estimate(
            grad=grad,
            y=_tree.ravel(final)[0],
            value=upper,
            status=Status.CONVERGED if has_fallen else Status.LOWER_UNSOLVED,
            info={
                "upper": upper,
                "lower": float(lower),
                "lower_residual": residual,
                **({} if truncated is None else {"truncated": truncated}),
            },
            noise=eps * abs(upper),
            memory={"scale": scale},
            evaluations=oracle.evaluations,
        )

    def _reverse(self, oracle: Oracle, x: Tensor, y: Tree) -> _Differentiated:
        """y_T, F there, the hypergradient, the length of the first gradient of f, and what was cut off."""
        y = _as_tree(oracle.problem, y)
        first = None
        for _ in range(self._constant_steps):
            y, slope = oracle.descended(x, y, self.lr)
            first = _tree.length(slope) if first is None else first
        taped = self.max_steps - self._constant_steps
        tape = Tape(oracle, x, y, self.lr, taped, self.graph_memory)
        for _ in range(taped):
            tape.step()
        y, first = tape.y, tape.first if first is None else first
        if not self._constant_steps:
            upper, grad = tape.upper_grad()
            return y, float(upper), grad, first, None
        upper, grad, cotangent = oracle.upper_grad(x, y)
        of_x, left = tape.back(cotangent)
        truncated = _tree.length(left) / (_tree.length(cotangent) or 1.0)
        return y, float(upper), grad + of_x, first, truncated

    def _forward(self, oracle: Oracle, x: Tensor, y: Tensor) -> _Differentiated:
        """The same, with $dy_t/dx$ carried along: its transpose, shape (m, n)."""
        along_x = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        along_y = torch.zeros(x.numel(), y.numel(), dtype=y.dtype, device=y.device)
        first = 0.0
        for t in range(self.max_steps):
            if t < self._constant_steps:
                y, grad_y = oracle.descended(x, y, self.lr)
            else:
                grad_y, tangents = oracle.lower_tangents(x, y, along_x, along_y)
                y, along_y = y - self.lr * grad_y, along_y - self.lr * tangents
            first = _tree.length(grad_y) if t == 0 else first
        upper, upper_x, upper_y = oracle.upper_grad(x, y)
        return y, float(upper), upper_x + along_y @ upper_y, first, None


def _as_tree(problem: BilevelProblem, y: Tensor) -> Tree:
    """The vector y as the user's tree, so that no step splits and joins it; itself where that changes a dtype."""
    tree = problem.unravel[1](y) if problem.unravel else y
    return tree if all(leaf.dtype == y.dtype for leaf in _tree.leaves(tree)) else y
