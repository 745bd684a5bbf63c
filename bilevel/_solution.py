"""What a solver returns: the state of a run, its answer, and how good the answer is."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from bilevel._errors import (
    BilevelError,
    InfeasibleError,
    NonFiniteError,
    UnboundedError,
)
from bilevel._types import Tree


class Status(enum.Enum):
    """How a run stands; the value is the message.

    `RUNNING`, `CONVERGED`, `MAX_STEPS` and `STOPPED` are no failures. Each other status is one:
    `solve(..., throw=True)` raises its error.
    """

    RUNNING = "the run goes on"
    CONVERGED = "the tolerances are met"
    MAX_STEPS = "the number of steps, or the batches, ran out before the tolerances were met"
    STOPPED = "the callback asked to stop"
    STALLED = "no step makes progress any more, and the tolerances are not met"
    NONFINITE = (
        "an objective or a gradient became NaN or infinite; the variables are the last finite ones"
    )
    INFEASIBLE = "no feasible point was found"
    LOWER_UNBOUNDED = (
        "the lower objective decreases without bound in y, so the lower problem has no solution"
    )
    UPPER_UNBOUNDED = "the upper value decreases without bound in x, so the problem has no solution"
    LOWER_UNSOLVED = "the lower problem was not solved to its tolerance, so the hypergradient is not to be trusted"
    WEAKLY_ACTIVE = (
        "a lower constraint is active with a multiplier of zero, so y*(x) has a kink and the hypergradient "
        "holds on one side only"
    )
    LINEAR_UNSOLVED = "the linear system of the lower Hessian was not solved: singular, indefinite, or too few steps"

    @property
    def is_failure(self) -> bool:
        """Whether the run ended without an answer to be trusted."""
        return self not in (Status.RUNNING, Status.CONVERGED, Status.MAX_STEPS, Status.STOPPED)

    @property
    def cure(self) -> str:
        """What to change where a run ended like this; empty where it ended well."""
        return _CURES.get(self, "")

    def error(self, message: str) -> BilevelError:
        """The error that a failure becomes under `throw=True`."""
        kinds: dict[Status, type[BilevelError]] = {
            Status.NONFINITE: NonFiniteError,
            Status.INFEASIBLE: InfeasibleError,
            Status.LOWER_UNBOUNDED: UnboundedError,
            Status.UPPER_UNBOUNDED: UnboundedError,
        }
        return kinds.get(self, BilevelError)(f"{message}. {self.cure}")


_CURES = {
    Status.MAX_STEPS: "Raise `max_steps`, or pass more batches.",
    Status.STALLED: "Use float64, solve the lower problem closer, loosen `rtol`, or smooth the objectives.",
    Status.NONFINITE: "Start elsewhere, keep x where F and f are defined by a `domain`, or look for NaN in the data.",
    Status.INFEASIBLE: "Loosen the constraints, or start where they hold; without any, raise `epsilon`.",
    Status.LOWER_UNBOUNDED: "Add a term to f that grows with |y|, or constrain y.",
    Status.UPPER_UNBOUNDED: "Bound x by a `domain`, or add a term to F that grows with |x|.",
    Status.LOWER_UNSOLVED: "Give the minimizer more steps, or use float64 and a smooth f.",
    Status.WEAKLY_ACTIVE: "Move x off the kink, or judge the answer by `certify`, which tests both sides.",
    Status.LINEAR_UNSOLVED: "Use `linear.MINRES()` or `Dense()`, more steps, or `ASBLO()`, which needs no inverse.",
}


@dataclass(frozen=True)
class Evaluations:
    """How often the objectives were called. A gradient's own forward pass counts as a value too.

    Attributes:
        upper: Evaluations of F.
        lower: Evaluations of f.
        upper_grad: Backward passes through F.
        lower_grad: Backward passes through f.
        hvp: Products with a second derivative; a dense n x n Hessian counts n.

    Example:
        >>> Evaluations(upper=1, upper_grad=1) + Evaluations(upper=2)
        Evaluations(upper=3, lower=0, upper_grad=1, lower_grad=0, hvp=0)
    """

    upper: int = 0
    lower: int = 0
    upper_grad: int = 0
    lower_grad: int = 0
    hvp: int = 0

    def __add__(self, other: Evaluations) -> Evaluations:
        # Written out: a loop over the fields takes three times as long, and a step adds many.
        return Evaluations(
            self.upper + other.upper,
            self.lower + other.lower,
            self.upper_grad + other.upper_grad,
            self.lower_grad + other.lower_grad,
            self.hvp + other.hvp,
        )

    @property
    def gradients(self) -> int:
        """Backward passes through F and f together."""
        return self.upper_grad + self.lower_grad


@dataclass(frozen=True)
class State:
    """All there is of a run: saving it is a checkpoint, and going on from it equals never having stopped.

    Attributes:
        x: The upper variable.
        y: The lower variable.
        step: Number of upper steps done.
        status: `RUNNING` until the solver ends the run.
        metrics: What the solver measured in this step, floats or 0-d tensors by name.
        memory: What the solver carries to the next step: tensors and plain numbers, its own business.
        evaluations: Calls of the objectives since the start.
        message: Why the run ended, with the numbers; empty while it goes on.
        origin: The solver that made it and its mode, by which `iterate` knows whether it can go on from here.
        recoveries: How often a line search came back from an x at which a value or a gradient was not finite.
    """

    x: Tree
    y: Tree
    step: int = 0
    status: Status = Status.RUNNING
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    memory: Mapping[str, Any] = field(default_factory=dict[str, Any])
    evaluations: Evaluations = field(default_factory=Evaluations)
    message: str = ""
    origin: str = ""
    recoveries: int = 0


@dataclass(frozen=True)
class Certificate:
    """How good an answer is, found by means of its own and not by those of the solver.

    Attributes:
        value_gap: `f(x, y) - min f(x, .)`, zero where y solves the lower problem.
        deeper_basin: How much lower than the local minimum around y another local minimum of f was
            found, 0 where none was: y solves the lower problem locally at best where this is positive.
        lower_gradient: Norm of the gradient of f in y; with lower constraints, of the Lagrangian with the
            multipliers that fit best.
        hypergradient: Norm of the projected implicit hypergradient, of the Lagrangian where there are upper
            constraints, or None where y*(x) is not known to be smooth, so that there is no such gradient.
        upper_violation: Largest entry of `H(x, y)`, or 0.
        lower_violation: Largest entry of `h(x, y)`, or 0.
        domain_violation: Distance of x from its domain.
        lower_curvature: Smallest eigenvalue of the lower Hessian, along the active constraints where there are
            any, or None where it was not computed.
        assumptions: What was assumed and not tested, in sentences.
        evaluations: What the certificate itself cost.
        upper_equality_violation: Largest absolute entry of the upper equalities, or 0.
        lower_equality_violation: Largest absolute entry of the lower equalities, or 0.
        problems: What is wrong with the answer, in sentences with numbers and tolerances; empty where nothing
            was found.
        tested: What was tested and holds, in sentences.
        untested: Which tests that an answer must pass could not be made, in sentences with the reason.
    """

    value_gap: float
    deeper_basin: float
    lower_gradient: float
    hypergradient: float | None
    upper_violation: float
    lower_violation: float
    domain_violation: float
    lower_curvature: float | None
    assumptions: tuple[str, ...]
    evaluations: Evaluations
    upper_equality_violation: float = 0.0
    lower_equality_violation: float = 0.0
    problems: tuple[str, ...] = ()
    tested: tuple[str, ...] = ()
    untested: tuple[str, ...] = ()

    @property
    def is_trusted(self) -> bool:
        """Whether the tests that an answer must pass were made, and nothing was found that is wrong with it."""
        return not self.problems and not self.untested

    @property
    def verdict(self) -> str:
        """One of "trusted", "not tested: ..." and "wrong: ...", the last two with the reasons."""
        if self.problems:
            return f"wrong: {'; '.join(self.problems)}"
        if self.untested:
            return f"not tested: {'; '.join(self.untested)}"
        return "trusted"

    def __str__(self) -> str:
        words = ("assumptions", "evaluations", "problems", "tested", "untested")
        names = [f.name for f in fields(self) if f.name not in words]
        verdict = self.verdict
        if self.problems:
            verdict = f"not to be trusted, {len(self.problems)} found"
        rows = [("verdict", verdict)]
        rows += [(name.replace("_", " "), _show(getattr(self, name))) for name in names]
        sentences = [f"wrong: {sentence}" for sentence in self.problems]
        sentences += [f"not tested: {sentence}" for sentence in self.untested if self.problems]
        sentences += [f"tested: {sentence}" for sentence in self.tested]
        sentences += [f"assumed: {sentence}" for sentence in self.assumptions]
        return "\n".join([table(rows), *sentences])


@dataclass(frozen=True)
class Solution:
    """The answer of a run; prints as a table.

    Attributes:
        x: The upper variable.
        y: The lower variable.
        status: How the run ended.
        upper: F(x, y) at the answer, on the last batch.
        lower: f(x, y) at the answer, on the last batch.
        steps: Upper steps done.
        evaluations: Calls of the objectives by the solver.
        seconds: Wall-clock time of the run, without the certificate.
        certificate: How good the answer is, or None for a run on batches (`certify` makes one).
        state: The last state; `iterate(..., state=state)` goes on from it.
        message: Why the run ended, with the numbers.
        recoveries: How often a line search came back from an x at which a value or a gradient was not finite.
    """

    x: Tree
    y: Tree
    status: Status
    upper: float
    lower: float
    steps: int
    evaluations: Evaluations
    seconds: float
    certificate: Certificate | None
    state: State
    message: str = ""
    recoveries: int = 0

    def __str__(self) -> str:
        count = self.evaluations
        rows = [
            ("status", f"{self.status.name}: {self.message or self.status.value}"),
            ("F(x, y)", _show(self.upper)),
            ("f(x, y)", _show(self.lower)),
        ]
        if self.certificate is not None:
            rows += [
                ("value gap", _show(self.certificate.value_gap)),
                ("hypergradient norm", _show(self.certificate.hypergradient)),
                ("certificate", self.certificate.verdict),
            ]
        rows += [
            ("steps", str(self.steps)),
            (
                "evaluations",
                f"F {count.upper}, f {count.lower}, gradients {count.gradients}, HVPs {count.hvp}",
            ),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        if self.recoveries:
            rows.insert(1, ("recoveries", f"{self.recoveries}, from points without finite numbers"))
        return table(rows)


def _show(value: Tensor | float | None) -> str:
    return "not available" if value is None else f"{float(value):.6g}"


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns of text."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
