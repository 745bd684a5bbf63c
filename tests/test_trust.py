"""`certify` passes right answers, and flags a hundred wrong ones."""

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor

import bilevel as bl
from bilevel._problem import CONSTRAINTS
from bilevel.solvers._kkt_form import KKTForm
from bilevel.solvers._walls import Units
from bilevel.testing import problems
from bilevel.testing.problems import ZooProblem

Wrong = tuple[str, bl.BilevelProblem, Tensor, Tensor]
REGULAR = [
    problems.quadratic(5, 10, 10.0),
    problems.quadratic(5, 10, 1e3),
    problems.quadratic(20, 40, 10.0),
    problems.ridge(1),
    problems.ridge(20),
]


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def solved(case: ZooProblem, x: Tensor) -> Tensor:
    """y*(x) where f is a quadratic in y."""
    zero = torch.zeros_like(case.y_star)
    hessian = torch.func.hessian(lambda y: case.problem.lower(x, y, None))(zero)
    slope = torch.func.grad(lambda y: case.problem.lower(x, y, None))(zero)
    return -torch.linalg.solve(hessian, slope)


def tilted(a: float) -> bl.BilevelProblem:
    """A double well whose left side is the deeper one."""
    return bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum() + (x**2).sum(),
        lambda x, y, data: ((y**2 - 1.0) ** 2 + a * y).sum() + 0.0 * x.sum(),
    )


def well(a: float, side: float) -> Tensor:
    y = side
    for _ in range(50):  # Newton on 4 y^3 - 4 y + a
        y -= (4.0 * y**3 - 4.0 * y + a) / (12.0 * y**2 - 4.0)
    return vector(y)


def simplex() -> bl.BilevelProblem:
    """y is the point of the segment y1 + y2 = 1, y >= 0 nearest to (x, 0); F wants y1 = 0.8 and x <= 0.5."""
    return bl.BilevelProblem(
        lambda x, y, data: (y[0] - 0.8) ** 2 + 0.0 * x.sum(),
        lambda x, y, data: (y[0] - x[0]) ** 2 + y[1] ** 2,
        lower_constraint=lambda x, y, data: -y,
        lower_equality=lambda x, y, data: y.sum() - 1.0,
        upper_constraint=lambda x, y, data: x - 0.5,
    )


# y = ((1 + x) / 2, (1 - x) / 2): F falls up to x = 0.6, so that the upper constraint holds x at 0.5
SIMPLEX_ANSWER = vector(0.5), vector(0.75, 0.25)


def perturbed_x() -> Iterator[Wrong]:
    generator = torch.Generator().manual_seed(1)
    for case, size in itertools.product(REGULAR, (0.02, 0.1, 0.5, 2.0)):
        direction = torch.randn(case.x_star.shape, generator=generator, dtype=torch.float64)
        shift = size * max(1.0, float(case.x_star.norm())) * direction / direction.norm()
        x = case.x_star + shift
        yield f"{case.name}: x off by {size}", case.problem, x, solved(case, x)
    toy = problems.pbgd_toy()
    for x in (0.1, 0.7, 1.0, 1.5, 2.0, 2.5):
        yield f"PBGD toy: x = {x}", toy.problem, vector(x), vector(-x)


def perturbed_y() -> Iterator[Wrong]:
    generator = torch.Generator().manual_seed(2)
    for case, size in itertools.product(REGULAR, (0.02, 0.1, 1.0)):
        direction = torch.randn(case.y_star.shape, generator=generator, dtype=torch.float64)
        y = case.y_star + size * case.y_star.norm() * direction / direction.norm()
        yield f"{case.name}: y off by {size}", case.problem, case.x_star, y
    for n in (1, 2, 10):
        case = problems.sine(n)
        yield f"sine {n}: y off by 0.1", case.problem, case.x_star, case.y_star + 0.1


def wrong_basin() -> Iterator[Wrong]:
    for a in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2):
        yield f"double well {a}", tilted(a), vector(0.0), well(a, 1.0)


def not_optimistic() -> Iterator[Wrong]:
    bda = problems.bda().problem
    for t in (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 0.9, 0.97, 1.05, 1.2, 1.5, 2.0, 3.0, 5.0):
        x = (1.0 + t) / 2.0  # where differentiating one lower solution ends
        yield f"BDA t = {t}", bda, vector(x), vector(x, t)
    for n, k in itertools.product((1, 2), (-3, -2, -1, 3)):
        K = -math.pi / 2 + 2 * math.pi * k  # stationary along a branch that is not the best there
        x = ((1 - n) * 2 + n * K) / (1 + n)
        yield f"sine {n}, branch {k}", problems.sine(n).problem, vector(x), vector(*[K + 2 - x] * n)


def infeasible() -> Iterator[Wrong]:
    problem, (x, y) = simplex(), SIMPLEX_ANSWER
    for shift in (0.01, 0.03, 0.1):  # F is lower there
        yield f"upper constraint {shift}", problem, x + shift, y + vector(shift / 2, -shift / 2)
    for shift in (0.01, -0.05, 0.2):
        yield f"lower equality {shift}", problem, x, y + shift
    yield "lower constraint", problem, x, vector(1.2, -0.2)
    case = problems.pbgd_toy()
    for x_out in (-0.5, -0.1, 3.2):
        yield f"domain {x_out}", case.problem, vector(x_out), vector(-x_out)
    held = bl.BilevelProblem(
        case.problem.upper, case.problem.lower, upper_equality=lambda x, y, data: x - 1.0
    )
    yield "upper equality", held, case.x_star, case.y_star


def swapped_signs() -> Iterator[Wrong]:
    for case in REGULAR:
        yield f"{case.name}: -x", case.problem, -case.x_star, solved(case, -case.x_star)
        yield f"{case.name}: -y", case.problem, case.x_star, -case.y_star
    problem, (x, y) = simplex(), SIMPLEX_ANSWER
    yield "simplex: -x", problem, -x, y.flip(0)


WRONG = [
    *perturbed_x(),
    *perturbed_y(),
    *wrong_basin(),
    *not_optimistic(),
    *infeasible(),
    *swapped_signs(),
]


def test_hundred_wrong_answers_are_flagged() -> None:
    assert len(WRONG) == 100
    missed = [name for name, *point in WRONG if bl.certify(*point).is_trusted]
    assert missed == []


@pytest.mark.parametrize(
    "case",
    [*REGULAR, problems.bda(), *map(problems.sine, (1, 2, 10, 50)), problems.pbgd_toy()],
    ids=lambda case: case.name,
)
def test_right_answers_are_trusted(case: ZooProblem) -> None:
    assert bl.certify(case.problem, case.x_star, case.y_star).is_trusted
    for x in case.local_optima:
        assert bl.certify(case.problem, x, -x).is_trusted
    scaled = bl.BilevelProblem(
        lambda x, y, data: 1e4 * case.problem.upper(x, y, data) + 7.0,
        lambda x, y, data: 1e-4 * case.problem.lower(x, y, data) - 3.0,
        domain=case.problem.domain,
    )
    assert bl.certify(scaled, case.x_star, case.y_star).is_trusted


def test_right_answers_of_constrained_problems_are_trusted() -> None:
    found = bl.certify(simplex(), *SIMPLEX_ANSWER)
    assert found.problems == ()
    assert found.hypergradient == pytest.approx(0.0, abs=1e-10)
    assert found.value_gap == pytest.approx(0.0, abs=1e-12)
    for a in (0.1, 0.5):
        assert bl.certify(tilted(a), vector(0.0), well(a, -1.0)).problems == ()


def test_answers_of_asblo_are_trusted_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in (problems.quadratic(), problems.ridge(), problems.bda(), problems.sine(2)):
            found = bl.solve(case.problem, bl.ASBLO(), case.x0, case.y0, max_steps=1000)
            assert found.status is bl.Status.CONVERGED
            assert found.certificate is not None
            assert found.certificate.is_trusted


def test_kink_at_a_weakly_active_constraint_is_an_answer() -> None:
    kinked = bl.BilevelProblem(  # y = max(x, 0); F = 2 y - x = |x|
        lambda x, y, data: (2.0 * y - x).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        lower_constraint=lambda x, y, data: -y,
    )
    found = bl.certify(kinked, vector(0.0), vector(0.0))
    assert found.problems == ()
    assert found.hypergradient is None
    assert any("weakly active" in sentence for sentence in found.tested)
    assert not bl.certify(kinked, vector(-0.3), vector(0.0)).is_trusted
    assert not bl.certify(kinked, vector(0.3), vector(0.3)).is_trusted
    other = bl.BilevelProblem(
        lambda x, y, data: (0.5 * y - x).sum(),
        kinked.lower,
        lower_constraint=kinked.lower_constraint,
    )
    assert not bl.certify(other, vector(0.0), vector(0.0)).is_trusted  # F falls where y = x


def test_linear_lower_problem_with_many_solutions() -> None:
    flat = bl.BilevelProblem(  # S(x) is the segment y1 + y2 = 1 in the box; F wants (x, 1 - x), x = 0.3
        lambda x, y, data: (y[0] - x[0]) ** 2 + (x[0] - 0.3) ** 2,
        lambda x, y, data: -(y[0] + y[1]),
        lower_constraint=lambda x, y, data: torch.cat([-y, y.sum()[None] - 1.0]),
    )
    assert bl.certify(flat, vector(0.3), vector(0.3, 0.7)).problems == ()
    assert not bl.certify(flat, vector(0.3), vector(0.6, 0.4)).is_trusted
    assert not bl.certify(flat, vector(0.5), vector(0.5, 0.5)).is_trusted


def test_pessimistic_answer_is_judged_as_one() -> None:
    wells = bl.BilevelProblem(  # S(x) = {-1, 1}; the worse one for F is y = -1 at x = 0
        lambda x, y, data: ((y - 1.0) ** 2).sum() + (x**2).sum(),
        lambda x, y, data: ((y**2 - 1.0) ** 2).sum() + 0.0 * x.sum(),
    )
    best, worst = vector(1.0), vector(-1.0)
    assert bl.certify(wells, vector(0.0), best).is_trusted
    assert not bl.certify(wells, vector(0.0), worst).is_trusted
    assert bl.certify(wells, vector(0.0), worst, pessimistic=True).is_trusted
    assert not bl.certify(wells, vector(0.0), best, pessimistic=True).is_trusted


def test_large_lower_problem_says_what_it_did_not_test() -> None:
    n = 4000
    scale = torch.linspace(1.0, 3.0, n, dtype=torch.float64)
    large = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).mean() + 0.0 * x.sum(),
        lambda x, y, data: (scale * (y - x) ** 2).sum(),
    )
    good = bl.certify(large, vector(1.0), torch.ones(n, dtype=torch.float64))
    assert good.problems == ()
    assert any("not tested" in sentence for sentence in good.assumptions)
    assert not bl.certify(large, vector(1.5), torch.full((n,), 1.5).double()).is_trusted


def test_solve_says_where_status_and_certificate_disagree() -> None:
    bda = problems.bda()
    with pytest.warns(bl.BilevelWarning, match="not stationary along the lower solutions"):
        found = bl.solve(
            bda.problem,
            bl.HypergradientDescent(bl.Unrolled(60, lr=0.5), rtol=1e-6),
            bda.x0 + 0.3,
            bda.y0,
            max_steps=100,
        )
    assert found.status is bl.Status.CONVERGED
    assert "the certificate disagrees" in found.message
    assert "the certificate disagrees" in str(found)


def plus(problem: bl.BilevelProblem, constant: float) -> bl.BilevelProblem:
    return replace(problem, lower=lambda x, y, data: problem.lower(x, y, data) + constant)


@pytest.mark.parametrize("constant", [-1e7, 1e3, 1e7])
def test_verdict_is_invariant_to_a_constant_added_to_f(constant: float) -> None:
    raised = plus(tilted(0.02), constant)  # the left well is 0.04 deeper
    shallow = bl.certify(raised, vector(0.0), well(0.02, 1.0))
    assert any("from another start f falls lower" in sentence for sentence in shallow.problems)
    assert shallow.deeper_basin == pytest.approx(0.04, rel=1e-3)
    # the right well is the one that F wants, but no lower solution
    assert bl.certify(raised, vector(0.0), well(0.02, -1.0)).problems == ()
    wall: Any = {"lower_constraint": lambda x, y, data: -0.5 - y}
    walls = replace(raised, **wall)  # cut off at -0.5, so that the right well is the lower solution
    assert bl.certify(walls, vector(0.0), well(0.02, 1.0)).problems == ()
    assert not bl.certify(walls, vector(0.0), vector(-0.5)).is_trusted
    constrained = plus(simplex(), constant)
    assert bl.certify(constrained, *SIMPLEX_ANSWER).problems == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constrained_lower_minimum_of_zero_is_trusted(dtype: torch.dtype) -> None:
    """Other starts end at values of f that differ by rounding alone."""
    generator = torch.Generator().manual_seed(3)
    for n in (2, 5, 12):
        root = torch.randn(n, n, generator=generator, dtype=dtype)
        target = torch.rand(n, generator=generator, dtype=dtype) + 0.1
        A = root @ root.T + torch.eye(n, dtype=dtype)
        b, c = A @ target, 0.5 * target @ A @ target
        inside = bl.BilevelProblem(  # f is (y - t - x) A (y - t - x) / 2, multiplied out
            lambda x, y, data, t=target: ((y - t) ** 2).sum() + (x**2).sum(),
            lambda x, y, data, A=A, b=b, c=c: 0.5 * (y - x) @ A @ (y - x) - b @ (y - x) + c,
            lower_constraint=lambda x, y, data: torch.cat([-y, y - 3.0]),
        )
        found = bl.certify(inside, torch.zeros(1, dtype=dtype), target)
        assert found.problems == ()


def test_branch_whose_linear_program_is_not_solved_is_not_called_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinked = bl.BilevelProblem(  # y = max(x, 0); F = 2 y - x = |x|
        lambda x, y, data: (2.0 * y - x).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        lower_constraint=lambda x, y, data: -y,
    )
    assert bl.certify(kinked, vector(0.0), vector(0.0)).tested != ()
    failed = scipy.optimize.OptimizeResult(status=4, x=None, fun=None)
    monkeypatch.setattr(scipy.optimize, "linprog", lambda *args, **options: failed)
    found = bl.certify(kinked, vector(0.0), vector(0.0))
    assert not any("to first order" in sentence for sentence in found.tested)
    assert any("along none of 2 directions" in sentence for sentence in found.tested)
    assert any("SciPy did not solve" in sentence for sentence in found.assumptions)


def test_linear_program_with_a_derivative_that_is_not_finite_is_told() -> None:
    infinite = bl.BilevelProblem(  # y = max(x, 0); the slope of F in x is infinite at 0
        lambda x, y, data: (2.0 * y + x.abs().sqrt()).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        lower_constraint=lambda x, y, data: -y,
    )
    found = bl.certify(infinite, vector(0.0), vector(0.0))
    assert any("SciPy did not solve" in sentence for sentence in found.assumptions)


def test_multipliers_that_scipy_does_not_fit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr(scipy.optimize, "nnls", fail)
    found = bl.certify(simplex(), *SIMPLEX_ANSWER)
    assert found.problems == ()
    assert found.hypergradient is None
    assert any("the lower gradient (SciPy" in sentence for sentence in found.assumptions)
    # the other test, which needs no multipliers, is the one that was made
    assert any("(SciPy did not fit" in sentence for sentence in found.tested)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_violation_of_a_constraint_that_is_nan_in_part_is_infinite(name: str) -> None:
    constraint: Any = {name: lambda x, y, data: torch.cat([x - 5.0, x * math.nan, -x])}
    problem = replace(simplex(), **constraint)
    form = KKTForm(problem, Units(1.0, 1.0, dict.fromkeys(CONSTRAINTS, vector(1.0))))
    assert form.violation(*SIMPLEX_ANSWER) == math.inf


def test_constraint_that_is_nan_was_called_converged() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        upper_equality=lambda x, y, data: torch.cat([x - 5.0, x * math.nan]),
    )
    found = bl.solve(problem, bl.ASBLO(), vector(0.0), vector(0.0), max_steps=100, throw=False)
    assert found.status.is_failure


@pytest.mark.parametrize(("frequency", "pull"), [(3.44, 0.1), (6.6202, 0.1815), (3.8646, 0.1028)])
def test_deeper_basin_of_a_wavy_lower_level_is_found_from_every_other(
    frequency: float, pull: float
) -> None:
    problem = bl.BilevelProblem(
        lambda x, y, data: (y - 1.0) ** 2 + x**2,
        lambda x, y, data: torch.sin(frequency * y) + pull * (y - x) ** 2,
    )
    grid = torch.linspace(-6.0, 6.0, 4801, dtype=torch.float64)
    heights = problem.lower(torch.tensor(0.0).double(), grid, None)
    inner = (heights[1:-1] < heights[:-2]) & (heights[1:-1] < heights[2:])
    minima = 1 + inner.nonzero()[:, 0]
    deepest = heights.min()
    wrong = [int(i) for i in minima if heights[i] > deepest + 1e-3]
    assert len(wrong) >= 2
    for i in wrong:
        found = bl.certify(problem, torch.tensor(0.0).double(), grid[i])
        assert found.value_gap == pytest.approx(float(heights[i] - deepest), abs=1e-3)
        assert not found.is_trusted


def test_branches_of_six_weakly_active_constraints_are_not_all_tried() -> None:
    """y = max(x, 0) at x = 0 in six variables, where F = |y + 1|^2 has its minimum."""
    projected = bl.BilevelProblem(
        lambda x, y, data: ((y + 1.0) ** 2).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        lower_constraint=lambda x, y, data: -y,
    )
    zero = torch.zeros(6).double()
    found = bl.certify(projected, zero, zero)
    assert found.problems == ()
    assert any("on the branches that were not tried" in line for line in found.assumptions)
    assert "6 lower constraint(s) are weakly active" in str(found)
