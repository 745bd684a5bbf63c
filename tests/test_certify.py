import math

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel._oracle import Oracle
from bilevel.estimators._screen import low_points

X, Y = torch.tensor([0.5], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)


def problem(lower: object = None, **options: object) -> bl.BilevelProblem:
    return bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.0 * x.sum(),
        lower or (lambda x, y, data: ((y - 2.0 * x) ** 2).sum()),  # pyright: ignore[reportArgumentType]
        **options,  # pyright: ignore[reportArgumentType]
    )


def test_right_answer_is_certified() -> None:
    good = bl.certify(problem(), X, Y)
    assert good.value_gap == pytest.approx(0.0, abs=1e-15)
    assert good.hypergradient == pytest.approx(0.0, abs=1e-12)
    assert good.lower_gradient == pytest.approx(0.0, abs=1e-12)
    assert good.lower_curvature == pytest.approx(2.0)
    assert good.deeper_basin == 0.0


def test_wrong_y_shows_as_a_value_gap() -> None:
    bad = bl.certify(problem(), X, Y + 3.0)
    assert bad.value_gap == pytest.approx(9.0)
    assert bad.lower_gradient == pytest.approx(6.0)


def test_wrong_x_shows_as_a_hypergradient() -> None:
    bad = bl.certify(problem(), X + 1.0, Y + 2.0)  # F(x) = (2x - 1)^2 at x = 1.5
    assert bad.value_gap == pytest.approx(0.0, abs=1e-12)
    assert bad.hypergradient == pytest.approx(8.0)


def test_wrong_basin_is_found() -> None:
    def tilted(x: Tensor, y: Tensor, data: object) -> Tensor:
        return ((y**2 - 1.0) ** 2 + 0.5 * y).sum() + 0.0 * x.sum()

    shallow = bl.certify(problem(tilted), X, torch.tensor([0.9304], dtype=torch.float64))
    assert shallow.deeper_basin == pytest.approx(0.998, abs=1e-3)
    assert shallow.value_gap == pytest.approx(0.998, abs=1e-3)
    deep = bl.certify(problem(tilted), X, torch.tensor([-1.0575], dtype=torch.float64))
    assert deep.deeper_basin == 0.0


def test_solve_warns_of_a_deeper_basin() -> None:
    def tilted(x: Tensor, y: Tensor, data: object) -> Tensor:
        return ((y**2 - 1.0) ** 2 + 0.5 * y).sum() + 0.0 * x.sum()

    descent = bl.HypergradientDescent(bl.Implicit())
    with pytest.warns(bl.BilevelWarning, match="locally at best"):
        bl.solve(problem(tilted, domain=bl.Box(0.0, 1.0)), descent, X, Y, max_steps=5, throw=False)


def test_bound_holds_the_hypergradient() -> None:
    held = bl.certify(problem(domain=bl.Box(1.5, 2.0)), X + 1.0, Y + 2.0)
    assert held.hypergradient == 0.0
    assert held.domain_violation == 0.0
    assert bl.certify(problem(domain=bl.Box(1.5, 2.0)), X, Y).domain_violation == 1.0


def test_violations_are_measured() -> None:
    constrained = problem(
        upper_constraint=lambda x, y, data: x - 0.1,
        lower_constraint=lambda x, y, data: torch.cat([y - 0.25, -y]),
    )
    found = bl.certify(constrained, X, Y)
    assert found.upper_violation == pytest.approx(0.4)
    assert found.lower_violation == pytest.approx(0.75)


def test_singular_lower_hessian_leaves_no_hypergradient() -> None:
    flat = problem(lambda x, y, data: (y.sum() - 2.0 * x.sum()) ** 2)
    found = bl.certify(flat, X, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert found.hypergradient is None
    assert any("singular" in sentence for sentence in found.problems)  # y = x would be better


def test_unbounded_lower_problem_has_an_infinite_gap() -> None:
    concave = problem(lambda x, y, data: -((y - x) ** 2).sum())
    assert bl.certify(concave, X, Y).value_gap == math.inf


def test_point_where_f_is_nan_is_not_certified() -> None:
    root = problem(lambda x, y, data: (y - x).sqrt().sum())
    found = bl.certify(root, X, Y - 3.0)
    assert math.isnan(found.value_gap)
    assert found.hypergradient is None
    assert found.lower_curvature is None


def test_certificate_prints_its_numbers_and_assumptions() -> None:
    text = str(bl.certify(problem(), X, Y))
    assert "value gap" in text
    assert "assumed: the lower minimum" in text


def test_a_kink_of_f_is_no_fault_of_y_and_is_told() -> None:
    """f = (y - 1)^2 + 3 |y| is solved by y = 0, where torch's gradient is -2."""
    kinked = problem(lambda x, y, data: ((y - 2.0 * x) ** 2 + 3.0 * y.abs()).sum())
    right = bl.certify(kinked, X, torch.zeros_like(Y))
    assert right.is_trusted
    assert any("f has a kink at y" in sentence for sentence in right.tested)
    assert not bl.certify(kinked, X, Y).is_trusted


MIXED = pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)


@MIXED
def test_x_and_y_of_different_dtypes_are_certified(dtypes: tuple[torch.dtype, ...]) -> None:
    x, y = X.to(dtypes[0]), Y.to(dtypes[1])
    for mixed in (
        problem(),
        problem(lambda x, y, data: ((y - 2.0 * x) ** 4).sum()),  # its Hessian is singular
        problem(
            domain=bl.Box(0.0, 0.5),
            upper_constraint=lambda x, y, data: x - y,
            upper_equality=lambda x, y, data: y - 2.0 * x,
        ),
        problem(
            lambda x, y, data: ((y - 4.0 * x) ** 2).sum(),
            lower_constraint=lambda x, y, data: y - 2.0 * x,
        ),
        problem(  # weakly active
            lower_constraint=lambda x, y, data: y - 2.0 * x,
        ),
    ):
        assert bl.certify(mixed, x, y).problems == ()
        assert bl.certify(mixed, x + 1.0, y + 3.0).problems != ()


@MIXED
def test_x_and_y_of_different_dtypes_are_solved(dtypes: tuple[torch.dtype, ...]) -> None:
    x, y = (X + 0.3).to(dtypes[0]), (Y - 0.4).to(dtypes[1])
    held = problem(
        lambda x, y, data: ((y - 4.0 * x) ** 2).sum(),
        lower_constraint=lambda x, y, data: y - 2.0 * x,
    )
    runs = [
        (problem(), bl.HypergradientDescent(bl.Implicit())),
        (held, bl.HypergradientDescent(bl.ImplicitKKT())),
    ]
    if dtypes[1] is torch.float64:
        runs.append((problem(), bl.ASBLO()))
    for mixed, solver in runs:
        found = bl.solve(mixed, solver, x, y, max_steps=300, throw=False)
        assert found.status is bl.Status.CONVERGED
        assert found.certificate is not None
        assert found.certificate.problems == ()
        assert (found.x.dtype, found.y.dtype) == dtypes
        assert float(found.x) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.gpu
def test_certificate_on_an_accelerator_is_that_of_the_cpu() -> None:
    device = torch.accelerator.current_accelerator()
    for one in (
        problem(),
        problem(domain=bl.Box(0.0, 0.5), upper_constraint=lambda x, y, data: x - y),
        problem(lambda x, y, data: ((y - 2.0 * x) ** 4).sum()),  # its Hessian is singular
        problem(
            lambda x, y, data: ((y - 4.0 * x) ** 2).sum(),
            lower_constraint=lambda x, y, data: y - 2.0 * x,
        ),
    ):
        for shift in (0.0, 1.0):
            here, there = (
                bl.certify(one, (X + shift).to(where), (Y + shift).to(where))
                for where in ("cpu", device)
            )
            assert here.is_trusted == there.is_trusted
            assert here.value_gap == pytest.approx(there.value_gap, abs=1e-9)


def test_certificate_counts_the_local_solves_that_were_made() -> None:
    # f is NaN for a negative y, where some of the starts lie
    root = problem(lambda x, y, data: (y.sqrt() - (2.0 * x).sqrt()).pow(2).sum())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(7, 1, generator=generator, dtype=torch.float64)
    radii = 2.0 ** torch.arange(-2.0, 5.0, dtype=torch.float64)
    skipped = int((Y + radii[:, None] * noise < 0.0).sum())
    assert 0 < skipped < 7
    low = low_points(Oracle(root), X, Y)
    assert len(low) >= 1
    text = bl.certify(root, X, Y).assumptions[0]
    assert f"the lowest of {9 - skipped + len(low)} local solves" in text


def toward(*target: float, **options: object) -> bl.BilevelProblem:
    """F = |y - target|^2 with y = x."""
    aim = torch.tensor(target, dtype=torch.float64)
    return bl.BilevelProblem(
        lambda x, y, data: ((y - aim) ** 2).sum(),
        lambda x, y, data: ((y - x) ** 2).sum(),
        **options,  # pyright: ignore[reportArgumentType]
    )


def to_ball(x: Tensor) -> Tensor:
    return x / max(1.0, float(x.norm()))


def test_answer_on_the_edge_of_any_domain_is_stationary() -> None:
    edge = torch.tensor([1.0, 0.0], dtype=torch.float64)
    good = bl.certify(toward(2.0, 0.0, domain=to_ball), edge, edge)
    assert good.is_trusted
    assert good.hypergradient == 0.0
    beside = edge.flip(0)
    bad = bl.certify(toward(2.0, 0.0, domain=to_ball), beside, beside)
    assert "x is not stationary" in bad.verdict
    # y - 1 step along -(-4, 2) from (0, 1), back to the ball
    moved = to_ball(torch.tensor([4.0, -1.0], dtype=torch.float64))
    assert bad.hypergradient == pytest.approx(float((beside - moved).norm()))


def test_domain_and_upper_constraint_are_assumed_not_to_hold_x_together() -> None:
    edge = torch.tensor([1.0, 0.0], dtype=torch.float64)
    both = toward(2.0, 0.0, domain=to_ball, upper_constraint=lambda x, y, data: x[1:] - 0.5)
    found = bl.certify(both, edge, edge)
    assert found.is_trusted
    assert "the domain and the upper constraints do not hold x together" in found.assumptions


def test_hypergradient_along_an_active_upper_constraint_is_not_stationary() -> None:
    """F falls along the wall x1 = 1, whose multiplier takes the other half of the slope (-4, -2)."""
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    walled = toward(3.0, 1.0, upper_constraint=lambda x, y, data: x[:1] - 1.0)
    bad = bl.certify(walled, x, x)
    assert "x is not stationary" in bad.verdict
    assert bad.hypergradient == pytest.approx(2.0)
    best = torch.ones(2, dtype=torch.float64)
    good = bl.certify(walled, best, best)
    assert good.is_trusted
    assert good.hypergradient == pytest.approx(0.0, abs=1e-12)


def test_lower_solution_that_ends_within_a_step_of_x_leaves_no_verdict() -> None:
    """y = 1 / (1 - x) exists up to x = 1 alone."""
    curved = bl.BilevelProblem(
        lambda x, y, data: -x.sum() + 0.0 * y.sum(),
        lambda x, y, data: (0.5 * (1.0 - x) * y**2 - y).sum(),
    )
    x = torch.tensor([0.9995], dtype=torch.float64)
    found = bl.certify(curved, x, 1.0 / (1.0 - x))
    assert found.problems == ()
    assert "the lower problem has no smooth solution next to x" in found.verdict


def test_large_singular_lower_hessian_leaves_the_values_to_judge() -> None:
    """Only the sum of y is determined: conjugate gradients do not solve for the slope of F in y."""
    many = bl.BilevelProblem(
        lambda x, y, data: ((y - 1.0) ** 2).sum(),
        lambda x, y, data: (y.sum() - x.sum()) ** 2,
        upper_constraint=lambda x, y, data: y[:1] - 5.0,
    )
    found = bl.certify(many, X, torch.full((300,), 0.5 / 300.0, dtype=torch.float64))
    assert found.hypergradient is None
    assert "the linear system of the lower Hessian was not solved" in found.verdict


@pytest.mark.slow
def test_many_lower_variables_with_constraints_are_judged_by_values() -> None:
    large = toward(1.0, lower_constraint=lambda x, y, data: y.sum() - 1e3)
    one = torch.ones(1, dtype=torch.float64)
    found = bl.certify(large, one, one.expand(260).clone())
    assert found.is_trusted
    assert found.hypergradient is None
    assert "there are more than 256 lower variables" in found.tested[0]
    assert not bl.certify(large, 1.1 * one, (1.1 * one).expand(260).clone()).is_trusted


def test_well_beside_which_f_falls_without_bound_is_no_lower_solution() -> None:
    well = bl.BilevelProblem(
        lambda x, y, data: ((y - x) ** 2 + x**2).sum(),
        lambda x, y, data: (0.5 * y**2 - 0.25 * y**4).sum() + 0.0 * x.sum(),
    )
    zero = torch.zeros(1, dtype=torch.float64)
    found = bl.certify(well, zero, zero)
    assert "f falls without bound in y" in found.verdict
    assert found.value_gap == math.inf
    with pytest.raises(bl.UnboundedError, match="decreases without bound"):
        bl.solve(well, bl.ASBLO(), zero + 0.1, zero + 0.1, max_steps=50)


def test_certificate_of_a_wrong_answer_prints_what_is_wrong() -> None:
    said = str(bl.certify(problem(), X, Y + 3.0))
    assert "not to be trusted, 2 found" in said
    assert "wrong: y does not solve the lower problem: the value gap is 9" in said
    assert "wrong: y is 3 (root mean square) from the lower solution" in said
