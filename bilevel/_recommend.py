"""Which method fits a problem, found by probing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bilevel import _tree
from bilevel._errors import check_kind, check_number
from bilevel._implicit_for import implicit_for
from bilevel._probe import Probe
from bilevel._problem import CONSTRAINTS, BilevelProblem, ravel
from bilevel._solution import table
from bilevel._types import Tree
from bilevel.estimators import Implicit, ImplicitKKT, check_problem
from bilevel.solvers import ASBLO, HypergradientDescent, Solver


@dataclass(frozen=True)
class Recommendation:
    """A method for a problem, and why; prints as a table.

    Attributes:
        method: The solver to pass to `solve`, or None where none of the library's can take the problem as it is stated;
            the reasons then say how to state it, if that is possible.
        reasons: What was measured and speaks for it, in sentences.
        refused: Names of methods that cannot work here, each with the reason.
    """

    method: Solver | None
    reasons: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        rows = [("method", "none, as it is stated" if self.method is None else _name(self.method))]
        rows += [("because", reason) for reason in self.reasons]
        rows += [("not", f"{name}: {reason}") for name, reason in self.refused]
        return table(rows)


def recommend(
    problem: BilevelProblem,
    x: Tree,
    y: Tree,
    data: Any = None,
    *,
    rtol: float | None = None,
    compile: bool = False,  # noqa: A002  # the word of the estimators
) -> Recommendation:
    """Name the solver that fits a problem, after probing it at (x, y).

    Probed are the sizes, the constraints, whether f can be differentiated twice, whether it has a kink at the lower
    solution found from y, its curvature there (all eigenvalues up to 256 variables, above that the extreme ones by
    Lanczos' method), and whether other starts find other lower solutions. Costs about as much as a certificate.

    Args:
        problem: The problem.
        x: Upper variable at which to probe.
        y: Where the lower solve starts.
        data: A `Batch`, or what both objectives get as their third argument.
        rtol: Relative error of a hypergradient that is good enough, > 0, e.g. 1e-3 for a loop of your own: the lower
            problem and the linear system are then solved to a tenth of it. None for as well as the numbers allow, as
            the line searches of `solve` and its certificate want it.
        compile: Whether compiling at the first call pays, as where thousands of hypergradients are wanted.
            Where the problem is small and smooth enough the method then is one compiled graph, with as many Newton
            steps as were needed from y.

    Returns:
        The recommendation.

    Raises:
        ValueError: `rtol` is out of its range.
        TypeError: `compile` is no bool.
        StructureError: `x` or `y` is no tree of floating tensors.
        ObjectiveError: An objective returns no scalar, or x or y is used by no objective.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: 0.5 * (x - y[1]) ** 2 + 0.5 * (y[0] - 1.0) ** 2,
        ...     lower=lambda x, y, data: 0.5 * y[0] ** 2 - x * y[0] + 0.0 * y[1],
        ... )
        >>> found = bl.recommend(problem, torch.tensor(3.0), torch.zeros(2))
        >>> type(found.method).__name__, [name for name, _ in found.refused]
        ('ASBLO', ['Implicit', 'Unrolled'])
    """
    if rtol is not None:
        check_number("recommend", "rtol", rtol, "Use e.g. 1e-3, or leave it out.")
    check_kind("recommend(compile=...)", compile, bool, "Pass True or False.")
    check_problem(problem, x, y, data)
    flat, (u, v), _, _ = ravel(problem, _tree.detach(x), _tree.detach(y))
    probe = Probe(flat, u, v, data)
    reasons = [f"{u.numel()} upper and {v.numel()} lower variables", *probe.findings]
    refused: list[tuple[str, str]] = []
    kinds = [kind for kind in CONSTRAINTS if getattr(problem, kind) is not None]
    of_lower = [kind for kind in kinds if kind.startswith("lower")]
    if probe.failure:
        reason = f"{probe.failure}. State a lower problem that has a solution"
        every = ("ASBLO", "Implicit", "ImplicitKKT", "Unrolled")
        return Recommendation(None, tuple(reasons), tuple((name, reason) for name in every))
    if probe.kink:
        reasons += [
            "state the minimum as a fixed point y = T(x, y), whose derivative exists where that of y*(x) does: "
            f"`HypergradientDescent(Implicit(condition=FixedPoint(T)))` with {probe.term}",
            "or smooth the kink, as Huber's loss does |y|, for `ASBLO()` or `MEHA()`, which need no unique solution",
        ]
        reason = "at a kink of f its gradient does not vanish, and says nothing of how y*(x) moves"
        every = ("ASBLO", "Implicit without a condition", "Unrolled")
        return Recommendation(None, tuple(reasons), tuple((name, reason) for name in every))
    implicit: Solver | None = None
    if not probe.differentiable:
        reason = (
            "f cannot be differentiated twice, which the linear system of the lower Hessian needs"
        )
        refused += [("Implicit", reason), ("Unrolled", reason)]
    elif not probe.unique:
        reason = f"y*(x) is not known to be a smooth function here: {probe.why}"
        refused += [("ImplicitKKT" if of_lower else "Implicit", reason), ("Unrolled", reason)]
    elif of_lower:
        refused += [(name, f"it would ignore {of_lower[0]}") for name in ("Implicit", "Unrolled")]
        implicit = HypergradientDescent(ImplicitKKT())
    else:
        estimator, why = implicit_for(flat, u, v, data, probe.spectrum, rtol, compile=compile)
        implicit = HypergradientDescent(estimator)
        reasons += why
    if implicit is not None and len(kinds) > len(of_lower):
        refused.append(
            (
                "HypergradientDescent",
                "it takes no upper constraints but a domain, and would ignore them",
            )
        )
        implicit = None
    if implicit is not None:
        verb = "is" if probe.is_proven else "seems"
        reasons.append(
            f"the lower solution {verb} locally unique, and then the implicit hypergradient is exact"
        )
        return Recommendation(implicit, tuple(reasons), tuple(refused))
    if kinds and data is not None:
        reason = f"it takes no {kinds[0]}; on the full batch, with the data inside the objectives, it does"
        refused.append(("ASBLO on batches", reason))
    reasons.append("the value function needs first derivatives only, and no unique lower solution")
    return Recommendation(ASBLO(), tuple(reasons), tuple(refused))


def _name(solver: Solver) -> str:
    if isinstance(solver, HypergradientDescent):
        inner = solver.estimator
        parts = ""
        if isinstance(inner, Implicit):
            parts = f"{type(inner.linear).__name__}()" + (", compile=True" if inner.compile else "")
        return f"HypergradientDescent({type(inner).__name__}({parts}))"
    return f"{type(solver).__name__}()"
