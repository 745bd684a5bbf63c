import itertools

import pytest
import torch

import bilevel as bl

X, Y = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
PROBLEM = bl.BilevelProblem(
    lambda x, y, data: ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum(),
    lambda x, y, data: ((y - 2.0 * x) ** 2).sum(),
)
SGD = bl.optim.Torch(torch.optim.SGD, lr=0.05)
FIRST_ORDER = bl.ASBLO(value_optimizer=SGD, lower_optimizer=SGD, upper_optimizer=SGD)


def test_solution_holds_the_answer_and_its_quality() -> None:
    solution = bl.solve(PROBLEM, bl.ASBLO(), X, Y, max_steps=100)
    torch.testing.assert_close(solution.x, torch.full_like(X, 2.0 / 4.1), rtol=1e-4, atol=0.0)
    assert solution.status is bl.Status.CONVERGED
    assert solution.upper == pytest.approx(float(PROBLEM.upper(solution.x, solution.y, None)))
    assert solution.steps == solution.state.step
    assert solution.certificate is not None
    assert solution.certificate.value_gap < 1e-6
    for line in ("status", "F(x, y)", "value gap", "evaluations", "seconds"):
        assert line in str(solution)


def test_steps_run_out_without_an_error() -> None:
    solution = bl.solve(PROBLEM, bl.ASBLO(), X, Y, max_steps=1)
    assert solution.status is bl.Status.MAX_STEPS
    assert solution.steps == 1


def test_batches_run_out_without_an_error() -> None:
    solution = bl.solve(PROBLEM, FIRST_ORDER, X, Y, [None] * 4, max_steps=100)
    assert solution.status is bl.Status.MAX_STEPS
    assert solution.steps == 4
    assert solution.certificate is None


def test_no_more_batches_are_drawn_than_steps_are_taken() -> None:
    drawn = itertools.count()
    batches = (next(drawn) for _ in itertools.repeat(None))
    bl.solve(PROBLEM, FIRST_ORDER, X, Y, batches, max_steps=3)
    assert next(drawn) == 3


def test_each_level_gets_its_part_of_the_batch() -> None:
    seen = set[tuple[str, int]]()

    def upper(x: torch.Tensor, y: torch.Tensor, data: int) -> torch.Tensor:
        seen.add(("upper", data))
        return PROBLEM.upper(x, y, None)

    def lower(x: torch.Tensor, y: torch.Tensor, data: int) -> torch.Tensor:
        seen.add(("lower", data))
        return PROBLEM.lower(x, y, None)

    bl.solve(bl.BilevelProblem(upper, lower), FIRST_ORDER, X, Y, [bl.Batch(1, 2)], max_steps=1)
    assert seen == {("upper", 1), ("lower", 2)}


def test_callback_stops_the_run() -> None:
    steps: list[int] = []
    solution = bl.solve(
        PROBLEM,
        bl.ASBLO(),
        X,
        Y,
        max_steps=100,
        callback=lambda state: steps.append(state.step) or state.step == 2,
    )
    assert solution.status is bl.Status.STOPPED
    assert steps == [1, 2]


def test_callback_sees_the_last_state_too() -> None:
    seen = list[bl.Status]()
    bl.solve(
        PROBLEM, bl.ASBLO(), X, Y, max_steps=100, callback=lambda state: seen.append(state.status)
    )
    assert seen[-1] is bl.Status.CONVERGED


def test_error_of_a_callback_is_the_users_own() -> None:
    with pytest.raises(KeyError):
        bl.solve(PROBLEM, bl.ASBLO(), X, Y, max_steps=5, callback=lambda state: {}["missing"])


def test_unbounded_lower_problem_is_said() -> None:
    concave = bl.BilevelProblem(PROBLEM.upper, lambda x, y, data: -((y - x) ** 2).sum())
    with pytest.raises(bl.UnboundedError, match="decreases without bound"):
        bl.solve(concave, bl.ASBLO(), X, Y + 1.0, max_steps=5)
    quiet = bl.solve(concave, bl.ASBLO(), X, Y + 1.0, max_steps=5, throw=False)
    assert quiet.status is bl.Status.LOWER_UNBOUNDED
    assert quiet.certificate is None


def test_nan_keeps_the_last_finite_variables() -> None:
    calls = itertools.count()

    def breaking(x: torch.Tensor, y: torch.Tensor, data: object) -> torch.Tensor:
        return PROBLEM.upper(x, y, data) * (float("nan") if next(calls) > 20 else 1.0)

    problem = bl.BilevelProblem(breaking, PROBLEM.lower)
    with pytest.raises(bl.NonFiniteError, match="at step"):
        bl.solve(problem, FIRST_ORDER, X, Y, [None] * 100, max_steps=100)
    calls = itertools.count()
    quiet = bl.solve(problem, FIRST_ORDER, X, Y, [None] * 100, max_steps=100, throw=False)
    assert quiet.status is bl.Status.NONFINITE
    assert bool(torch.isfinite(quiet.x).all())
    assert bool(torch.isfinite(quiet.y).all())


def test_state_goes_on_where_the_run_stopped() -> None:
    whole = list(itertools.islice(bl.iterate(PROBLEM, bl.ASBLO(), X, Y), 8))
    rest = list(itertools.islice(bl.iterate(PROBLEM, bl.ASBLO(), state=whole[2]), 5))
    for before, after in zip(whole[3:], rest, strict=True):
        assert torch.equal(before.x, after.x)
        assert torch.equal(before.y, after.y)
        assert before.evaluations == after.evaluations


def test_unbounded_upper_problem_is_said() -> None:
    falling = bl.BilevelProblem(lambda x, y, data: y.sum() + x.sum(), PROBLEM.lower)
    for solver in (bl.ASBLO(), bl.HypergradientDescent(bl.Implicit())):
        with pytest.raises(bl.UnboundedError, match="upper value decreases without bound"):
            bl.solve(falling, solver, X, Y, max_steps=100)


def test_variables_that_require_gradients_are_only_read() -> None:
    x0, y0 = X.clone().requires_grad_(), Y.clone().requires_grad_()
    solution = bl.solve(PROBLEM, bl.ASBLO(), x0, y0, max_steps=100)
    assert not solution.x.requires_grad
    assert x0.grad is None
    torch.testing.assert_close(x0.detach(), X)


def test_unsolved_lower_problem_is_not_called_converged() -> None:
    steep = bl.BilevelProblem(
        PROBLEM.upper,
        lambda x, y, data: ((y - x).cosh() + 0.3 * (y - x) ** 4 + 0.1 * y**2).sum(),
    )
    hasty = bl.ASBLO(minimizer=bl.optim.Newton(max_steps=2))
    solution = bl.solve(steep, hasty, X, Y, max_steps=60, throw=False)
    assert "KKT" in solution.message  # which found what the path did not
    assert solution.certificate is not None
    assert solution.certificate.is_trusted
    hasty = bl.ASBLO(minimizer=bl.optim.Newton(max_steps=2), pessimistic=True)  # has no such form
    solution = bl.solve(steep, hasty, X, Y, max_steps=60, throw=False)
    assert solution.status is not bl.Status.CONVERGED


def test_constraints_that_would_be_ignored_are_refused() -> None:
    bound = bl.BilevelProblem(
        PROBLEM.upper, PROBLEM.lower, lower_constraint=lambda x, y, data: y + 5.0
    )
    with pytest.raises(ValueError, match=r"HypergradientDescent.*lower_constraint"):
        bl.solve(bound, bl.HypergradientDescent(bl.Implicit()), X, Y, max_steps=5)
    with pytest.raises(ValueError, match=r"hypergradient.*lower_constraint"):
        bl.hypergradient(bound, X, Y, method=bl.Implicit())


def test_state_of_a_solution_goes_on() -> None:
    solution = bl.solve(PROBLEM, bl.ASBLO(), X, Y, max_steps=3)
    state = next(bl.iterate(PROBLEM, bl.ASBLO(), state=solution.state))
    assert state.step == 4


def test_start_outside_the_domain_is_projected() -> None:
    rising = bl.BilevelProblem(
        lambda x, y, data: ((y - 20.0) ** 2).sum(), PROBLEM.lower, domain=bl.Box(0.0, 1.0)
    )
    for solver in (bl.ASBLO(), bl.HypergradientDescent(bl.Implicit())):
        solution = bl.solve(rising, solver, X + 5.0, Y, max_steps=50)
        torch.testing.assert_close(solution.x, torch.ones_like(X))


def test_solution_on_batches_prints_no_certificate() -> None:
    found = bl.solve(PROBLEM, FIRST_ORDER, X, Y, [None] * 3, max_steps=5)
    assert found.certificate is None
    assert "certificate" not in str(found)
    assert "value gap" not in str(found)
    assert "steps        3" in str(found)
