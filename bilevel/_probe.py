"""What can be measured of a problem at a point before a method is chosen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilevel import _tree
from bilevel._oracle import Oracle
from bilevel._problem import BilevelProblem, constrains_lower
from bilevel._solution import Status
from bilevel.estimators._search import MEDIUM, LowerSolver, search
from bilevel.estimators._stationarity import DENSE

linalg: Any = torch.linalg  # its stubs are untyped
_PROBES = 20  # products with the Hessian above that
_OFF = 0.5  # relative error of a product with the Hessian that is no rounding
_JUMP = 0.9  # of the change of slope that is left over a tenth of the step: a smooth f keeps 0.1
_SINGULAR = 1e-8  # smallest over largest curvature of what counts as positive definite


class Probe:
    """What was measured at a point.

    Attributes:
        differentiable: Whether f can be differentiated twice.
        unique: Whether y*(x) seems to be a smooth function near x.
        why: Why it is not, or is not known to be.
        is_proven: Whether the whole spectrum says so, and not its ends by Lanczos' method.
        failure: Why the lower problem has no solution, or empty.
        kink: How f fails to be smooth at its minimum, or empty.
        term: What then states the lower problem as a fixed point.
        spectrum: All eigenvalues of the lower Hessian, shape (n,), where it was formed; else None.
        findings: The measurements, in sentences.
    """

    def __init__(self, problem: BilevelProblem, x: Tensor, y: Tensor, data: Any) -> None:
        self._oracle, self._x = Oracle(problem, data), x
        self.differentiable, self.unique, self.why, self.failure = True, True, "", ""
        self.kink, self.term = "", ""
        self.is_proven = True
        self.spectrum: Tensor | None = None
        self.findings: list[str] = []
        size = max(_tree.rms(y), 1e-2 * _tree.length(x), 1e-3)
        missing = self._second_order(y)
        if missing:
            self.differentiable = False
            self.kink = self._kink(y, size, holds_y=False)
            self.findings.append(self.kink or f"no second derivatives of f: {missing}")
            return
        if y.numel() <= MEDIUM:
            y = self._solve(y, data, size)
        if not (self.failure or self.kink):
            self._curvature(y, data, size)

    def _kink(self, y: Tensor, size: float, *, holds_y: bool) -> str:
        """Where the slopes of f on the two sides of y differ; empty where they do not, or with lower constraints.

        Their difference is the jump of the slope at a kink, whatever the step; of a smooth f it falls with the
        step. A kink `holds_y` where f rises on both sides: others may pass near a minimum by chance.
        """
        problem = self._oracle.problem
        if constrains_lower(problem):
            return ""
        eps = torch.finfo(y.dtype).eps
        step = max(1e-4, eps ** (1.0 / 3.0)) * size
        middle = float(self._oracle.lower(self._x, y))

        def rises(direction: Tensor, h: float) -> list[float]:
            ends = (float(self._oracle.lower(self._x, y + s * h * direction)) for s in (1.0, -1.0))
            return [(end - middle) / h for end in ends]

        count = min(y.numel(), DENSE)
        axes = [
            torch.eye(1, y.numel(), dtype=y.dtype, device=y.device)[0].roll(i) for i in range(count)
        ]
        noise = 1e3 * eps * max(abs(middle), size) / step
        found: dict[int, float] = {}
        for i, axis in enumerate(axes):
            near, far = rises(axis, step), rises(axis, 10.0 * step)
            jump = sum(near)
            is_held = min(near) > 0.05 * jump or not holds_y
            if is_held and jump > max(_JUMP * sum(far), noise):
                found[i] = jump
        if not found:
            return ""
        at_zero = all(abs(float(y[i])) < 1e-2 * step for i in found)
        self.term = "T = `fixed_points.prox_gradient(smooth, prox, lr)`, " + (
            "prox by `fixed_points.prox_l1`, as for the l1 term that f seems to have"
            if at_zero
            else "prox that of the term with the kink; where it has none in closed form, as a hinge loss, of its dual"
        )
        return (
            f"f has a kink along {len(found)} of {count} coordinates of y: "
            f"its slope jumps there by up to {max(found.values()):.3g}"
        )

    def _second_order(self, y: Tensor) -> str:
        """Why f cannot be differentiated twice; empty where it can.

        An operator that breaks the graph of its gradient may give zeros instead of an error: the product with
        the Hessian is compared with differences of the gradient.
        """
        direction = torch.cos(torch.arange(y.numel())).to(y)
        try:
            twice = self._oracle.linearized(self._x, y)
            product = twice.hvp(direction)
            twice.mixed_vjp(direction)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return str(error).splitlines()[0]
        h = torch.finfo(y.dtype).eps ** (1.0 / 3.0) * max(1.0, float(y.abs().max()))
        ends = [self._oracle.lower_grad_y(self._x, y + s * h * direction)[1] for s in (1.0, -1.0)]
        measured = (ends[0] - ends[1]) / (2.0 * h)
        size = _tree.length(measured)
        noise = torch.finfo(y.dtype).eps ** 0.5 * _tree.length(ends[0])
        if size > noise and _tree.length(product - measured) > _OFF * size:
            return f"the product with its Hessian is {_tree.length(product):.3g}, by differences {size:.3g}"
        return ""

    def _solve(self, y: Tensor, data: Any, size: float) -> Tensor:
        found = search(self._oracle, self._x, y, data, size, 1.0)
        status = found.lowest.status if found.nearest.status is Status.CONVERGED else None
        if status is Status.LOWER_UNBOUNDED or found.nearest.status is Status.LOWER_UNBOUNDED:
            self.failure = Status.LOWER_UNBOUNDED.value
        else:
            self.kink = self._kink(found.nearest.y, size, holds_y=True)
            if self.kink:
                self.findings.append(self.kink)
                return found.nearest.y
        if not self.failure and status is None:
            self.failure = f"no lower solution was found from y ({found.nearest.status.value})"
        limit = found.nearest.value + found.same
        apart = [
            _tree.rms(other.y - found.nearest.y)
            for other in found.minima[1:]
            if other.value <= limit
        ]
        far = max(apart, default=0.0)
        if far > 1e-2 * size:
            self.unique = False
            self.why = (
                f"another start finds a lower solution that is as good or better, {far:.3g} away"
            )
            self.findings.append(self.why)
        return found.nearest.y

    def _curvature(self, y: Tensor, data: Any, size: float) -> None:
        solver = LowerSolver(self._oracle, self._x, data, size)
        if solver.constrained and y.numel() > DENSE:
            self.unique = False
            self.why = f"its KKT matrix was not probed: {y.numel()} lower variables with constraints, above {DENSE}"
            self.findings.append(self.why)
            return
        if solver.constrained:
            point = solver.solve(y).point
            system = solver.kkt.system(point)
            weak = int(solver.kkt.weakly_active(point, 1e-3).sum())
            count = int(point.active.sum())
            self.findings.append(f"{count} lower constraint(s) active, {weak} weakly")
            if weak or not system.is_regular:
                self.unique = False
                self.why = (
                    f"{weak} lower constraint(s) are weakly active"
                    if weak
                    else "its KKT matrix is singular"
                )
            return
        low, high = self._extremes(y)
        self.is_proven = y.numel() <= DENSE
        verb = "is" if self.is_proven else "seems to be"
        way = (
            "exactly"
            if self.is_proven
            else "by Lanczos' method, whose ends lie inside the true ones"
        )
        self.findings.append(f"lower curvature {verb} from {low:.3g} to {high:.3g} ({way})")
        eps = max(_SINGULAR, 10.0 * torch.finfo(y.dtype).eps)
        if not low > eps * max(abs(high), abs(low)):
            self.unique = False
            self.why = "the lower Hessian is singular or indefinite"

    def _extremes(self, y: Tensor) -> tuple[float, float]:
        linear = self._oracle.linearized(self._x, y)
        if y.numel() <= DENSE:
            hessian = linear.hessian()
            if not _tree.is_finite(hessian):
                return math.nan, math.nan
            values = self.spectrum = linalg.eigvalsh(hessian)
            return float(values[0]), float(values[-1])
        generator = torch.Generator().manual_seed(0)
        v = _tree.normal_like(y, generator)
        basis, columns = [v / _tree.length(v)], list[Tensor]()
        for _ in range(_PROBES):  # all products are kept orthogonal: there are few
            columns.append(linear.hvp(basis[-1]))
            w = columns[-1]
            for _again in range(2):
                for q in basis:
                    w = w - (q @ w) * q
            length = _tree.length(w)
            if not length > 1e-10 * _tree.length(columns[-1]):
                break
            basis.append(w / length)
        Q = torch.stack(basis[: len(columns)])
        values = linalg.eigvalsh(Q @ torch.stack(columns).T)
        return float(values[0]), float(values[-1])
