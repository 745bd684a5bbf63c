"""Approximated Sequential Bi-Level Optimization, the flagship solver."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from bilevel._errors import StructureError, check_count, check_kind
from bilevel._problem import BilevelProblem, constrains_lower
from bilevel._solution import State
from bilevel._types import Schedule, Tree
from bilevel.barriers import log_rational
from bilevel.estimators import refuse_constraints
from bilevel.estimators.value_function import ValueFunction
from bilevel.optim._base import Minimizer
from bilevel.optim.newton import Newton
from bilevel.optim.quasi_newton import QuasiNewton
from bilevel.optim.torch import Torch
from bilevel.schedules import geometric, polynomial
from bilevel.solvers import _fields, _full_batch, _fused_loop, _sequential, _single_loop
from bilevel.solvers._base import Solver
from bilevel.solvers._loop_step import Form

# epsilon_k ~ sigma_k^2 balances the stages: lambda ~ sigma / epsilon grows as 1 / sigma does. The first
# slack is twice the range of f, so that F alone chooses the basin; mu |y|^2 stays a hundredth of it.
_STAGE_RATIO = 0.2
_SEQUENTIAL = {
    "mu": geometric(2e-2, _STAGE_RATIO**2),
    "sigma": geometric(1.0, _STAGE_RATIO),
    "epsilon": geometric(2.0, _STAGE_RATIO**2),
}
_SINGLE_LOOP = {
    "mu": polynomial(1e-2, 2.0, scale=100.0),
    "sigma": polynomial(1.0, 1.0, scale=100.0),
    "epsilon": polynomial(1.0, 2.0, scale=100.0),
}
_NEARBY = 3  # the first stage of a further start: its slack keeps y in the basin it starts in
_LATE_STAGE = 10  # by which a schedule of the full batch must have fallen


@dataclass(frozen=True)
class ASBLO(Solver):
    r"""Approximated Sequential Bi-Level Optimization.

    The lower problem is replaced by its value function and the constraint $f(x, y) \le v_k(x)$ by a barrier:

    $$v_k(x) = \min_z \{ f(x, z) + \tfrac{\mu_k}{2} |z|^2 \} + \varepsilon_k, \qquad
    \varphi_k(x) = \min_y \{ F(x, y) + P_{\sigma_k}(f(x, y) - v_k(x)) + \tfrac{\theta_k}{2} |y|^2 \},$$

    and $\varphi_k$ is minimized over x for schedules that fall to zero. Its gradient

    $$\nabla \varphi_k = \partial_x F(x, y) + \lambda [\partial_x f(x, y) - \partial_x f(x, z)],
    \qquad \lambda = P_{\sigma_k}'(f(x, y) - v_k(x)),$$

    needs first derivatives only, and f may have many minimizers.

    **Full batch** (no batches given): each $\varphi_k$ is minimized to a tolerance, z and y by Newton's
    method, x by a quasi-Newton method. The units of F and f are measured once, and the schedules speak in
    them: multiplying F or f by a positive number, or adding a constant, changes no iterate. The path starts where
    F is smallest over x and y together, so that F chooses the basin of the lower problem. It ends
    when the multipliers of two stages say that x is within `rtol`.

    **Mini-batches** (batches given): one loop. Each step moves z, y and x once, from three passes:
    f(x, z), f(x, y) and F(x, y).

    Attributes:
        mu: Schedule of the weight of $|z|^2/2$, in units of f over $|y|^2$. The argument of each
            schedule is the stage (full batch) or the step (mini-batches). None takes the mode's default.
        theta: Schedule of the weight of $|y|^2/2$, in units of F over $|y|^2$; None for
            $\theta = \lambda \mu$, with which the leading bias of $\mu$ cancels.
        sigma: Schedule of the weight of the barrier, in units of F.
        epsilon: Schedule of the slack, in units of f; > 0 where theta is None.
        kappa: Where the barrier turns from logarithmic to rational, in units of f, > 0.
        pessimistic: Let y maximize F over the lower solutions instead of minimizing it.
        rtol: Full batch: relative error of x and y at which the sequence ends, > 0.
        first_stage: Full batch: the stage to begin with, >= 0. From 0 the path starts where F is smallest over x
            and y together; from a later one, with its smaller slack, at x0 and in the basin of y0.
        minimizer: Full batch: finds z and y.
        optimizer: Full batch: takes the upper steps.
        value_steps: Mini-batches: steps on z in each upper step, >= 1.
        lower_steps: Mini-batches: steps on y in each upper step, >= 1.
        value_optimizer: Mini-batches: moves z.
        lower_optimizer: Mini-batches: moves y.
        upper_optimizer: Mini-batches: moves x.
        multiplier: Mini-batches: `"slack"` takes $\lambda = P'$ at the known slack $v - f(z)$, which
            no batch disturbs unless the averaged gap is negative; `"gap"` at the gap averaged over
            batches, by the relaxed barrier.
        max_multiplier: Mini-batches: largest $\lambda$, in units of F over f, > 0.
        compile: Mini-batches: whether `torch.compile` makes one graph of the whole step: the same numbers several
            times as fast on a small problem, once the first step has compiled it, which may take minutes. Takes
            SGD, Adam or AdamW. What is compiled is kept with the problem, so make that once, and give what changes
            as data; batches of the same shapes serve best, as others compile anew.

    Raises:
        ValueError: A parameter is out of its range, a schedule of the full batch does not fall, or the form is
            pessimistic and there are lower constraints; `compile` is given beside an optimizer that cannot be
            traced, or without batches.
        TypeError: A schedule or a part is of the wrong kind.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     upper=lambda x, y, data: 0.5 * (x - y[1]) ** 2 + 0.5 * (y[0] - 1.0) ** 2,
        ...     lower=lambda x, y, data: 0.5 * y[0] ** 2 - x * y[0],  # solved by (x, anything)
        ... )
        >>> x0, y0 = torch.tensor(3.0).double(), torch.tensor([0.0, 2.0]).double()
        >>> bl.solve(problem, bl.ASBLO(), x0, y0, max_steps=100).x
        tensor(1.0000, dtype=torch.float64)

    References:
        He and He, EchoIR (arXiv 2412.07225), section 3.3, Eqs. 7 to 16; Liu et al., A Value-Function-based
        Interior-point Method for Non-convex Bi-level Optimization (ICML 2021).

    Note:
        The slack `epsilon`, the choice of theta and the corrected Eq. 16 are ours, and so is the measuring of
        units: see "Theory" in the documentation.
    """

    mu: Schedule | None = None
    theta: Schedule | None = None
    sigma: Schedule | None = None
    epsilon: Schedule | None = None
    kappa: float = 1.0
    pessimistic: bool = False  # pyright: ignore[reportIncompatibleMethodOverride]  # as frozen
    rtol: float = 1e-5
    first_stage: int = 0
    minimizer: Minimizer = field(default_factory=Newton)
    optimizer: QuasiNewton = field(default_factory=QuasiNewton)
    value_steps: int = 1
    lower_steps: int = 1
    value_optimizer: Torch = field(default_factory=lambda: Torch(torch.optim.Adam, lr=1e-3))
    lower_optimizer: Torch = field(default_factory=lambda: Torch(torch.optim.Adam, lr=1e-3))
    upper_optimizer: Torch = field(default_factory=lambda: Torch(torch.optim.Adam, lr=1e-3))
    multiplier: Literal["slack", "gap"] = "slack"
    max_multiplier: float = 1e3
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("mu", "theta", "sigma", "epsilon"):
            _fields.check_schedule(self, name)
        for name in ("kappa", "rtol", "max_multiplier"):
            _fields.check_positive(self, name, "Leave it out for the default.")
        for name in ("value_steps", "lower_steps"):
            check_count("ASBLO", name, getattr(self, name), "Raise it, e.g. to 1.")
        check_kind("ASBLO(pessimistic=...)", self.pessimistic, bool, "Pass True or False.")
        check_count("ASBLO", "first_stage", self.first_stage, "Leave it out.", least=0)
        if self.multiplier not in ("slack", "gap"):
            raise ValueError(
                f'`ASBLO(multiplier=...)` must be "slack" or "gap". Got {self.multiplier!r}. '
                'Use "slack" unless batches are large.'
            )
        check_kind("ASBLO(minimizer=...)", self.minimizer, Minimizer, "Pass e.g. `Newton()`.")
        check_kind(
            "ASBLO(optimizer=...)",
            self.optimizer,
            QuasiNewton,
            "It steps on the full batch; `upper_optimizer` takes a `Torch` for batches.",
        )
        for name in _fields.OPTIMIZERS:
            if not isinstance(getattr(self, name), Torch):
                raise TypeError(
                    f"`ASBLO({name}=...)` must be a `bilevel.optim.Torch`. Got {type(getattr(self, name)).__name__}. "
                    "Wrap the class, e.g. `Torch(torch.optim.Adam, lr=1e-3)`."
                )

        check_kind("ASBLO(compile=...)", self.compile, bool, "Pass True or False.")
        if self.compile:
            _ = self._fused  # refuses now what cannot be traced

    def nearby(self) -> ASBLO:
        """See `Solver.nearby`."""
        return replace(self, first_stage=max(self.first_stage, _NEARBY))

    def init(
        self, problem: BilevelProblem, x0: Tree, y0: Tree, data: Any, *, full_batch: bool
    ) -> State:
        """See `Solver.init`."""
        if full_batch:
            if self.compile:
                raise ValueError(
                    "`ASBLO(compile=True)` must be given batches, whose step is one program. Got the full batch, where "
                    "Newton's method stops as its numbers tell it. Leave out `compile`, or pass "
                    "`batches=itertools.repeat(data)` for single steps on the whole data."
                )
            self._check_schedules_fall()
            if self.pessimistic and constrains_lower(problem):
                raise ValueError(
                    "`ASBLO(pessimistic=True)` must have a lower level without constraints. Got `lower_constraint` or "
                    "`lower_equality`. Put them into f as a penalty, or solve the optimistic form."
                )
            return _full_batch.init(self._sequence(), problem, x0, y0)
        refuse_constraints(problem, "ASBLO on batches")
        state = _single_loop.init(self._single_loop(), problem, x0, y0, data)
        return _fused_loop.started(self._fused, state) if self.compile else state

    def step(self, problem: BilevelProblem, state: State, data: Any) -> State:
        """See `Solver.step`."""
        if "path" in state.memory:
            return _full_batch.step(self._sequence(), problem, state)
        if self.compile != _fused_loop.is_fused(state):
            raise StructureError(
                "`iterate(state=...)` must go on with `ASBLO(compile=...)` as the state was made. "
                f"Got compile={self.compile}. Pass compile={not self.compile}, or start anew from its x and y."
            )
        if self.compile:
            return _fused_loop.step(self._single_loop(), self._fused, problem, state, data)
        return _single_loop.step(self._single_loop(), problem, state, data)

    def stage(
        self, k: int, lower: float = 1.0, upper: float = 1.0, square: float = 1.0
    ) -> ValueFunction:
        """The approximation number k as an estimator of its own.

        Args:
            k: Stage of the full-batch sequence, >= 0.
            lower: Unit of f.
            upper: Unit of F.
            square: Unit of |y|^2.

        Returns:
            The estimator; its value is phi_k and its gradient that of phi_k.
        """
        return ValueFunction(
            mu=(self.mu or _SEQUENTIAL["mu"])(k) * lower / square,
            epsilon=(self.epsilon or _SEQUENTIAL["epsilon"])(k) * lower,
            sigma=(self.sigma or _SEQUENTIAL["sigma"])(k) * upper,
            theta=None if self.theta is None else self.theta(k) * upper / square,
            barrier=log_rational(self.kappa * lower),
            pessimistic=self.pessimistic,
            minimizer=self.minimizer,
        )

    def _check_schedules_fall(self) -> None:
        """Raises where the limit of the sequence would not be the problem: a bias that stays."""
        for name in ("mu", "theta", "sigma", "epsilon"):
            schedule = getattr(self, name)
            if schedule is not None and schedule(_LATE_STAGE) >= schedule(0) != 0.0:
                raise ValueError(
                    f"`ASBLO({name}=...)` must fall to zero on the full batch. Got {schedule(0):.3g} at stage 0 "
                    f"and {schedule(_LATE_STAGE):.3g} at stage {_LATE_STAGE}. Use e.g. "
                    "`bilevel.schedules.geometric`, or `HypergradientDescent(ValueFunction(...))` for fixed parameters."
                )

    def _sequence(self) -> _sequential.Sequence:
        return _sequential.Sequence(
            stage=self.stage,
            epsilon=self.epsilon or _SEQUENTIAL["epsilon"],
            minimizer=self.minimizer,
            optimizer=self.optimizer,
            rtol=self.rtol,
            pessimistic=self.pessimistic,
            first_stage=self.first_stage,
        )

    @cached_property
    def _fused(self) -> _fused_loop.FusedLoop:
        return _fused_loop.fused(self._single_loop())

    def _single_loop(self) -> _single_loop.SingleLoop:
        return _single_loop.SingleLoop(
            form=Form(self.pessimistic, self.value_steps, self.lower_steps, self.multiplier),
            mu=self.mu or _SINGLE_LOOP["mu"],
            theta=self.theta,
            sigma=self.sigma or _SINGLE_LOOP["sigma"],
            epsilon=self.epsilon or _SINGLE_LOOP["epsilon"],
            kappa=self.kappa,
            max_multiplier=self.max_multiplier,
            optimizers={
                "z": self.value_optimizer,
                "y": self.lower_optimizer,
                "x": self.upper_optimizer,
            },
        )
