"""Many problems at once against one after the other, and against closed forms."""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import sgd
from torch import Tensor

import bilevel as bl
from bilevel.linear import CG, Dense

K, NX, NY = 5, 3, 4


def quadratics(count: int = K) -> tuple[bl.BilevelProblem, dict[str, Tensor]]:
    """f = y'Ay/2 - y'Bx with eigenvalues of A from 1 to 3; F = |y - c|^2/2 + |x|^2/20."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q = torch.linalg.qr(draw(count, NY, NY))[0]
    A = q @ torch.diag(torch.linspace(1.0, 3.0, NY, dtype=torch.float64)) @ q.mT
    problem = bl.BilevelProblem(
        lambda x, y, d: 0.5 * ((y - d["c"]) ** 2).sum() + 0.05 * (x**2).sum(),
        lambda x, y, d: 0.5 * y @ (d["A"] @ y) - y @ (d["B"] @ x),
    )
    return problem, {"A": A, "B": draw(count, NY, NX), "c": draw(count, NY)}


def optimum(data: dict[str, Tensor]) -> Tensor:
    """By the normal equations of F(x, A^-1 B x)."""
    S = torch.linalg.solve(data["A"], data["B"])
    normal = S.mT @ S + 0.1 * torch.eye(NX, dtype=torch.float64)
    return torch.linalg.solve(normal, (S.mT @ data["c"][..., None])).squeeze(-1)


def one_by_one(
    problem: bl.BilevelProblem, solver: bl.Solver, x0: Tensor, y0: Tensor, data: Any, steps: int
) -> list[bl.Solution]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)
        return [
            bl.solve(
                problem,
                solver,
                x0[k],
                y0[k],
                [{name: part[k] for name, part in data.items()}] * steps,
                max_steps=steps,
            )
            for k in range(len(x0))
        ]


def starts(count: int = K) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, NX).double(), torch.zeros(count, NY).double()


SOLVERS = {
    "CG": bl.HypergradientDescent(
        bl.Implicit(CG(max_steps=8), sgd(0.5, max_steps=6)), upper_optimizer=sgd(0.05)
    ),
    "Dense, shortened": bl.HypergradientDescent(
        bl.Implicit(Dense(), sgd(0.5, max_steps=6)), upper_optimizer=sgd(0.05, max_norm=0.1)
    ),
    "Unrolled, Adam": bl.HypergradientDescent(
        bl.Unrolled(6, lr=0.5), upper_optimizer=bl.optim.Torch(torch.optim.Adam, lr=0.05)
    ),
    "Unrolled, momentum, schedule": bl.HypergradientDescent(
        bl.Unrolled(6, lr=0.5, truncate=3),
        upper_optimizer=sgd(bl.schedules.geometric(0.05, 0.9), momentum=0.5),
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_many_at_once_are_each_on_its_own(name: str) -> None:
    problem, data = quadratics()
    x0, y0 = starts()
    found = bl.solve_many(problem, SOLVERS[name], x0, y0, data, max_steps=7)
    single = one_by_one(problem, SOLVERS[name], x0, y0, data, 7)
    torch.testing.assert_close(found.x, torch.stack([s.x for s in single]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.y, torch.stack([s.y for s in single]), rtol=1e-10, atol=1e-12)
    for k, one in enumerate(single):
        assert float(found.upper[k]) == pytest.approx(one.upper, rel=1e-10)
        assert float(found.lower[k]) == pytest.approx(one.lower, rel=1e-10)
        assert (found.status[k], int(found.steps[k])) == (bl.Status.MAX_STEPS, 7)


def test_each_converges_to_its_closed_form_at_its_own_step() -> None:
    problem, data = quadratics()
    estimator = bl.Implicit(Dense(), sgd(0.5, max_steps=8), tol=1e-6)
    solver = bl.HypergradientDescent(estimator, upper_optimizer=sgd(0.05, momentum=0.8), rtol=1e-8)
    found = bl.solve_many(problem, solver, *starts(), data, max_steps=1000)
    assert set(found.status) == {bl.Status.CONVERGED}
    assert len(set(found.steps.tolist())) > 1
    torch.testing.assert_close(found.x, optimum(data), rtol=1e-6, atol=1e-6)
    assert "CONVERGED" in str(found)


def test_newton_steps_solve_the_lower_levels_of_all_at_once() -> None:
    problem, data = quadratics()
    estimator = bl.Implicit(Dense(), bl.optim.Newton(max_steps=2))
    solver = bl.HypergradientDescent(estimator, upper_optimizer=sgd(0.05, momentum=0.8), rtol=1e-8)
    found = bl.solve_many(problem, solver, *starts(), data, max_steps=1000)
    assert set(found.status) == {bl.Status.CONVERGED}
    torch.testing.assert_close(found.x, optimum(data), rtol=1e-6, atol=1e-6)


def test_newton_steps_of_many_know_of_each_how_they_ended() -> None:
    """In float32: at a minimum to the last digits, and at a saddle."""
    problem = bl.BilevelProblem(
        lambda x, y, d: ((y - x) ** 2).sum(),
        lambda x, y, d: torch.cosh(y[0]) + 0.5 * d * y[1] ** 2 + y[1] ** 4 + 0.0 * x.sum(),
    )
    solver = bl.HypergradientDescent(
        bl.Implicit(Dense(), bl.optim.Newton(max_steps=8)), upper_optimizer=sgd(0.4)
    )
    x0, y0 = torch.ones(2, 2), torch.tensor([[0.7, 0.0]]).expand(2, 2)
    found = bl.solve_many(problem, solver, x0, y0, torch.tensor([1.0, -1.0]), max_steps=100)
    assert found.status == (bl.Status.CONVERGED, bl.Status.LOWER_UNSOLVED)


def test_ridge_penalties_of_many_data_sets() -> None:
    """One l2 penalty a data set, against the loop of single solves; y is in closed form at every x."""
    generator = torch.Generator().manual_seed(2)
    train, valid = (torch.randn(K, 20, NY, dtype=torch.float64, generator=generator) for _ in "tv")
    w = torch.randn(K, NY, 1, dtype=torch.float64, generator=generator)
    noise = torch.randn(2, K, 20, 1, dtype=torch.float64, generator=generator)
    b, c = ((A @ w + e).squeeze(-1) for A, e in zip((train, valid), noise, strict=True))
    data = {"A": train, "b": b, "V": valid, "c": c}
    problem = bl.BilevelProblem(
        lambda x, y, d: 0.5 * (d["V"] @ y - d["c"]).square().mean(),
        lambda x, y, d: (
            0.5 * (d["A"] @ y - d["b"]).square().mean() + 0.5 * torch.exp(x).sum() * (y**2).sum()
        ),
    )
    x0, y0 = torch.full((K, 1), -1.0).double(), torch.zeros(K, NY).double()
    estimator = bl.Implicit(Dense(), sgd(0.4, max_steps=30), tol=0.0)
    solver = bl.HypergradientDescent(estimator, upper_optimizer=sgd(0.5))
    found = bl.solve_many(problem, solver, x0, y0, data, max_steps=10)
    single = one_by_one(problem, solver, x0, y0, data, 10)
    torch.testing.assert_close(found.x, torch.stack([s.x for s in single]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.y, torch.stack([s.y for s in single]), rtol=1e-8, atol=1e-10)
    assert bool(
        (found.upper < 0.5 * (valid @ y0[..., None] - c[..., None]).square().mean((1, 2))).all()
    )


def test_one_that_is_spoiled_stops_no_other() -> None:
    problem, data = quadratics()
    good = bl.solve_many(problem, SOLVERS["CG"], *starts(), data, max_steps=7)
    data["c"][2] = float("nan")
    found = bl.solve_many(problem, SOLVERS["CG"], *starts(), data, max_steps=7)
    assert found.status[2] is bl.Status.NONFINITE
    assert "nan" not in str(found)
    assert int(found.steps[2]) == 0
    assert bool(torch.isfinite(found.x).all())
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(found.x[rest], good.x[rest])


def test_trees_a_domain_and_a_batch_of_data() -> None:
    problem = bl.BilevelProblem(
        lambda x, y, d: ((y["w"] - d) ** 2).sum(),
        lambda x, y, _: ((y["w"] - x[0] - x[1]) ** 2).sum(),
        domain=bl.Box(0.0, 1.0),
    )
    x0 = (torch.zeros(3, 2).double(), torch.zeros(3).double())
    y0 = {"w": torch.zeros(3, 2).double()}
    target = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.5, 0.5]]).double()
    solver = bl.HypergradientDescent(bl.Unrolled(1, lr=0.5), upper_optimizer=sgd(0.1))
    found: Any = bl.solve_many(problem, solver, x0, y0, bl.Batch(upper=target), max_steps=300)
    assert found.x[0].shape == (3, 2)
    torch.testing.assert_close(
        found.x[0] + found.x[1][:, None], target.clamp(min=0.0), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("solver", "match"),
    [
        (bl.HypergradientDescent(bl.Unrolled(2)), "upper_optimizer=.*QuasiNewton"),
        (bl.HypergradientDescent(bl.TwoSided(1e3), upper_optimizer=sgd(0.1)), "TwoSided"),
        (bl.HypergradientDescent(bl.Implicit(), upper_optimizer=sgd(0.1)), r"CG\(max_steps=10\)"),
        (
            bl.HypergradientDescent(bl.Unrolled(2, compile=True), upper_optimizer=sgd(0.1)),
            "compile",
        ),
    ],
)
def test_solver_without_a_fixed_program_is_refused(solver: bl.Solver, match: str) -> None:
    problem, data = quadratics()
    with pytest.raises(ValueError, match=match):
        bl.solve_many(problem, solver, *starts(), data, max_steps=2)  # pyright: ignore


def test_leading_axes_must_agree() -> None:
    problem, data = quadratics()
    x0, y0 = starts()
    with pytest.raises(bl.StructureError, match=r"y0=.*5 as in x0. Got shape \(4, 4\)"):
        bl.solve_many(problem, SOLVERS["CG"], x0, y0[1:], data, max_steps=2)
    with pytest.raises(bl.StructureError, match=r"data=.*Got float"):
        bl.solve_many(problem, SOLVERS["CG"], x0, y0, {**data, "l": 1.0}, max_steps=2)


def test_what_is_no_problem_solver_or_count_is_refused() -> None:
    problem, data = quadratics()
    constrained = replace(problem, lower_constraint=lambda x, y, d: y)
    x0, y0 = starts()
    solver, many = SOLVERS["CG"], partial[Any](bl.solve_many, x0=x0, y0=y0, data=data)
    with pytest.raises(TypeError, match=r"problem, \.\.\.\).*Got function.*BilevelProblem"):
        many(quadratics, solver, max_steps=2)
    with pytest.raises(TypeError, match=r"solver=.*Got ASBLO.*HypergradientDescent"):
        many(problem, bl.ASBLO(), max_steps=2)
    with pytest.raises(ValueError, match=r"max_steps=.*at least 1. Got max_steps=0"):
        many(problem, solver, max_steps=0)
    with pytest.raises(ValueError, match=r"solve_many.*no.*lower_constraint"):
        many(constrained, solver, max_steps=2)
