import torch

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


def test_pessimistic_estimator_makes_a_pessimistic_answer() -> None:
    wells = bl.BilevelProblem(  # S(x) = {-1, 1}; the worse one for F is y = -1
        lambda x, y, data: ((y - 1.0) ** 2).sum() + (x**2).sum(),
        lambda x, y, data: ((y**2 - 1.0) ** 2).sum() + 0.0 * x.sum(),
    )
    method = bl.ValueFunction(epsilon=1e-8, sigma=1e-4, pessimistic=True)
    solver = bl.HypergradientDescent(method)
    assert solver.pessimistic
    assert bl.ASBLO(pessimistic=True).pessimistic
    assert not bl.HypergradientDescent(bl.ValueFunction()).pessimistic
    assert not bl.HypergradientDescent(bl.Implicit()).pessimistic
    x0, y0 = torch.tensor([0.5]).double(), torch.tensor([-1.0]).double()
    found = bl.solve(wells, solver, x0, y0, max_steps=50)
    assert found.certificate is not None
    assert found.certificate.is_trusted
    assert not bl.certify(wells, found.x, found.y).is_trusted  # as the optimistic one it is wrong
    (run,) = bl.compare(wells, {"VF": solver}, x0, y0, budget=10**4).runs
    assert run.is_trusted
