import bilevel as bl
from bilevel.testing.problems import quadratic, ridge


def test_implicit_on_ridge_does_not_stall_in_the_noise_of_the_lower_solve() -> None:
    case = ridge()
    solver = bl.HypergradientDescent(bl.Implicit())
    solution = bl.solve(case.problem, solver, case.x0, case.y0, max_steps=100)
    assert solution.status is bl.Status.CONVERGED
    assert case.error(solution.x) < 1e-7  # SciPy's answer, see the zoo


def test_unrolled_does_not_stall_on_the_value_of_another_start() -> None:
    case = quadratic()
    solver = bl.HypergradientDescent(bl.Unrolled(100, lr=0.1))
    solution = bl.solve(case.problem, solver, case.x0, case.y0, max_steps=100)
    assert solution.status is bl.Status.CONVERGED
    assert case.error(solution.x) < 1e-5
