"""The contenders for one hypergradient from a cold start, to a relative error that all must reach."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

import bilevel as bl
from speed import by_hand, ours
from speed.race import (
    FLOOR,
    OURS,
    PEERS,
    Contender,
    Result,
    Rules,
    Run,
    cold,
    race,
    rows,
    tuned,
)
from speed.work import Answer, Hypergradient, Work, relative_error

# Lower steps that are tried, a fifth more each time: the first number that is enough is timed.
CANDIDATES = [round(8 * 1.2**k) for k in range(28)]  # to 1,099
DIGITS = range(2, 10)  # of the norm of grad f, that a quasi-Newton method is tried to
CG, UNROLLED, NEUMANN = "momentum + CG", "momentum, unrolled", "momentum + Neumann"


def peer(name: str, method: str, work: Work, *numbers: Any) -> Any:
    """By another library, most often a `Hypergradient`; its module is imported only now: it may be missing, or fail."""
    module = importlib.import_module(f"peers.with_{PEERS[name]}")
    return getattr(module, method)(work, *numbers)


def contenders(work: Work, truth: Tensor, tolerance: float) -> list[Contender]:
    """By hand, the library and its peers, each with as many steps as it needs for `tolerance`."""
    products = 10 * truth.numel()

    def error(answer: Answer) -> float:
        return relative_error(answer.value, truth)

    def prepared(make: Callable[[int], Hypergradient], tries: Sequence[int]) -> Callable[[], Run]:
        def run_of(steps: int) -> Run:
            return partial(make(steps), work.x, work.y)

        return lambda: tuned(run_of, error, tolerance, tries)

    def in_jax(name: str, method: str, tries: Sequence[int]) -> Callable[[], Run]:
        """A program that is compiled once for all tries."""
        return lambda: prepared(peer(name, method, work, rtol, products), tries)()

    def steps(make: Callable[[int], Hypergradient]) -> Callable[[], Run]:
        return prepared(make, CANDIDATES)

    def once(method: bl.Estimator) -> Callable[[], Run]:
        return prepared(lambda _: ours.hypergradient(work, method), [0])

    rtol = 0.1 * tolerance  # of the linear system, and of Newton's method
    inexact = bl.Implicit(bl.linear.CG(rtol=rtol), tol=rtol)
    picked, graph = recommended(work, tolerance), recommended(work, tolerance, compile=True)
    in_one_graph = Contender(
        OURS,
        f"{_name(graph)}, compile=True, as recommended",
        prepared(lambda _: ours.compiled(work, graph), [0]),
    )

    return [
        Contender(FLOOR, CG, steps(lambda n: by_hand.implicit(work, n, rtol, products))),
        Contender(FLOOR, UNROLLED, steps(lambda n: by_hand.unrolled(work, n))),
        Contender(
            OURS,
            CG,
            steps(lambda n: ours.hypergradient(work, ours.implicit(work, n, rtol, products))),
        ),
        Contender(OURS, "Newton + CG, to the tolerance", once(inexact)),
        Contender(OURS, f"{_name(picked)}, as recommended", once(picked)),
        *([in_one_graph] if graph.compile else []),
        Contender(
            "TorchOpt", CG, steps(lambda n: peer("TorchOpt", "implicit", work, n, rtol, products))
        ),
        Contender("TorchOpt", UNROLLED, steps(lambda n: peer("TorchOpt", "unrolled", work, n))),
        # Where no test of the residual is relative or there at all: as many products as steps.
        Contender("Betty", CG, steps(lambda n: peer("Betty", "implicit", work, n, n))),
        Contender("Betty", NEUMANN, steps(lambda n: peer("Betty", "neumann", work, n, n))),
        Contender("BOAT", CG, steps(lambda n: peer("BOAT", "implicit", work, n, n))),
        Contender("BOAT", UNROLLED, steps(lambda n: peer("BOAT", "unrolled", work, n))),
        Contender("higher", UNROLLED, steps(lambda n: peer("higher", "unrolled", work, n))),
        Contender("JAX", CG, in_jax("JAX", "implicit", CANDIDATES)),
        Contender("JAXopt", "L-BFGS + CG", in_jax("JAXopt", "lbfgs", DIGITS)),
        *([Contender("JAXopt", "CG + CG", in_jax("JAXopt", "cg", [0]))] if work.quadratic else []),
    ]


def table(about: str, work: Work, truth: Tensor, tolerance: float, rules: Rules) -> str:
    """All contenders for one hypergradient, with the relative error of each and what compiling took."""

    def extra(_: Result, answer: Answer) -> list[str]:
        return [f"{relative_error(answer.value, truth):.0e}", cold(answer)]

    results = race(contenders(work, truth, tolerance), rules)
    columns = "error", "s to compile"
    return f"{about}, relative error at most {tolerance:.0e}\n\n{rows(results, extra, columns)}"


def recommended(work: Work, rtol: float, *, compile: bool = False) -> bl.Implicit:  # noqa: A002  # as of `recommend`
    """The estimator of the solver that `recommend` picks for a hypergradient that is to be so exact."""
    method = bl.recommend(work.problem, work.x, work.start, rtol=rtol, compile=compile).method
    if not isinstance(method, bl.HypergradientDescent):
        raise TypeError(f"a strongly convex problem was to be given a descent. Got {method}.")
    if not isinstance(method.estimator, bl.Implicit):
        raise TypeError(f"it was to be the implicit hypergradient. Got {method.estimator}.")
    return method.estimator


def _name(estimator: bl.Implicit) -> str:
    return f"Implicit({type(estimator.linear).__name__})"
