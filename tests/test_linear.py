import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel._errors import StructureError
from bilevel.linear import CG, GMRES, MINRES, Dense, LinearSolver, Neumann, Nystrom
from bilevel.linear._base import Product

SOLVERS = [
    CG(),
    Dense(),
    Neumann(max_steps=2000),
    MINRES(),
    GMRES(),
    Nystrom(rank=3),
]


def spd(n: int, condition: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    spectrum = torch.logspace(0, math.log10(condition), n, dtype=torch.float64)
    return ((basis * spectrum) @ basis.T).to(dtype)


def rhs(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(v: Tensor, exact: Tensor) -> float:
    return float((v - exact).norm() / exact.norm())


class Counted:
    """A product that counts its calls."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.calls = matrix, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix @ v


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e4])
@pytest.mark.parametrize("n", [1, 5, 50])
@pytest.mark.parametrize("seed", range(3))
def test_cg_agrees_with_a_direct_solve(n: int, condition: float, seed: int) -> None:
    A, b = spd(n, condition, seed), rhs(n, seed + 10)
    assert error(CG().solve(lambda v: A @ v, b), torch.linalg.solve(A, b)) < 1e-9


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6])
def test_dense_agrees_with_a_direct_solve(condition: float) -> None:
    A, b = spd(20, condition), rhs(20)
    solution = Dense().solve(lambda v: A @ v, b)
    assert error(solution, torch.linalg.solve(A, b)) < 1e-15 * condition * 100


def test_neumann_converges_at_its_rate() -> None:
    A, b = spd(20, 10.0), rhs(20)
    exact = torch.linalg.solve(A, b)
    assert error(Neumann(max_steps=400).solve(lambda v: A @ v, b), exact) < 1e-11
    short = error(Neumann(max_steps=20).solve(lambda v: A @ v, b), exact)
    assert 1e-4 < short < 0.9**20 * 2


def test_neumann_is_the_series() -> None:
    A, b = spd(6, 10.0), rhs(6)
    series, term = torch.zeros(6).double(), 0.05 * b
    for _ in range(7):
        series, term = series + term, term - 0.05 * (A @ term)
    solution = Neumann(max_steps=7, step_size=0.05).solve(lambda v: A @ v, b)
    torch.testing.assert_close(solution, series, rtol=1e-13, atol=0.0)


def test_neumann_with_too_large_a_step_returns_its_best_iterate() -> None:
    A, b = spd(6, 10.0), rhs(6)
    v = Neumann(max_steps=100, step_size=10.0).solve(lambda v: A @ v, b)
    assert float((b - A @ v).norm()) <= float(b.norm())


@given(n=st.integers(1, 30), condition=st.floats(1.0, 1e3), seed=st.integers(0, 1000))
def test_cg_solves_any_positive_definite_system(n: int, condition: float, seed: int) -> None:
    A, b = spd(n, condition, seed), rhs(n, seed + 1)
    assert float((b - A @ CG().solve(lambda v: A @ v, b)).norm() / b.norm()) < 1e-11


def test_cg_returns_the_last_iterate_not_the_one_before() -> None:
    A, b = torch.diag(torch.tensor([1.0, 2.0, 3.0]).double()), torch.ones(3).double()
    solution = CG(rtol=1e-8, max_steps=3).solve(lambda v: A @ v, b)
    assert error(solution, torch.linalg.solve(A, b)) < 1e-14


def test_cg_takes_one_product_a_step_and_one_to_check_a_tight_tolerance() -> None:
    b = torch.ones(3).double()
    for rtol, calls in ((1e-6, 3), (1e-12, 4)):
        product = Counted(torch.diag(torch.tensor([1.0, 2.0, 3.0]).double()))
        CG(rtol=rtol).solve(product, b)
        assert product.calls == calls


def test_cg_warm_start_at_the_solution_costs_one_product() -> None:
    A, b = spd(10, 10.0), rhs(10)
    product = Counted(A)
    exact = torch.linalg.solve(A, b)
    assert torch.equal(CG().solve(product, b, v0=exact), exact)
    assert product.calls == 1


def test_cg_warm_start_near_the_solution_is_cheaper() -> None:
    A, b = spd(50, 1e3), rhs(50)
    exact = torch.linalg.solve(A, b)
    cold, warm = Counted(A), Counted(A)
    CG(rtol=1e-6).solve(cold, b)
    solution = CG(rtol=1e-6).solve(warm, b, v0=exact * (1 + 1e-6))
    assert warm.calls < 0.5 * cold.calls
    assert error(solution, exact) < 1e-5


def test_cg_ends_at_rounding_on_an_ill_conditioned_system() -> None:
    product = Counted(spd(50, 1e6))
    b = rhs(50)
    v = CG(max_steps=5000).solve(product, b)
    assert product.calls < 5000
    assert float((b - product.matrix @ v).norm() / b.norm()) < 1e-9


@pytest.mark.parametrize("max_steps", [1, 2, 3, 17])
def test_cg_never_exceeds_its_products(max_steps: int) -> None:
    product = Counted(spd(50, 1e4))
    CG(max_steps=max_steps).solve(product, rhs(50))
    CG(max_steps=max_steps).solve(product, rhs(50), v0=rhs(50, 3))
    assert product.calls <= 2 * max_steps


def test_cg_uses_the_products_that_it_may_until_it_is_done() -> None:
    A, b = spd(50, 1e6), rhs(50)
    product = Counted(A)
    CG(max_steps=5000).solve(product, b)
    total = product.calls
    for start in (None, rhs(50, 3)):
        for max_steps in (1, 2, 7, *range(total - 12, total + 1)):
            product = Counted(A)
            CG(max_steps=max_steps).solve(product, b, v0=start)
            assert product.calls == max_steps


def test_cg_uses_ten_products_an_unknown_at_most_by_default() -> None:
    generator = torch.Generator().manual_seed(0)
    calls = 0

    def unsteady(v: Tensor) -> Tensor:  # another matrix each time: no residual becomes small
        nonlocal calls
        calls += 1
        return (1.0 + 100.0 * torch.rand(4, dtype=torch.float64, generator=generator)) * v

    CG().solve(unsteady, rhs(4))
    assert calls == 40


def test_cg_may_end_with_its_last_product_without_a_check() -> None:
    b = torch.ones(3).double()
    for max_steps in (2, 3, 4, 5):
        product = Counted(torch.diag(torch.tensor([1.0, 2.0, 3.0]).double()))
        CG(max_steps=max_steps).solve(product, b)
        assert product.calls == min(max_steps, 4)


def test_cg_stops_at_the_absolute_tolerance() -> None:
    A, b = spd(50, 100.0), rhs(50)
    for tolerance in (1.0, 1e-2, 1e-4):
        relative, absolute = Counted(A), Counted(A)
        expected = CG(rtol=tolerance / float(b.norm())).solve(relative, b)
        found = CG(rtol=0.0, atol=tolerance).solve(absolute, b)
        assert absolute.calls == relative.calls
        assert torch.equal(found, expected)
        assert float((b - A @ found).norm()) <= tolerance * (1.0 + 1e-9)


def test_cg_without_tolerances_ends_at_rounding() -> None:
    A, b = spd(50, 10.0), rhs(50)
    product = Counted(A)
    found = CG(rtol=0.0).solve(product, b)
    assert error(found, torch.linalg.solve(A, b)) < 1e-14
    assert product.calls < 100  # of 500


def test_cg_at_a_start_that_meets_the_tolerance_takes_no_step() -> None:
    b = torch.tensor([3.0, 4.0]).double()
    product = Counted(spd(2, 10.0))
    assert torch.equal(CG(rtol=1.0).solve(product, b), torch.zeros(2).double())
    assert product.calls == 0


@pytest.mark.parametrize("rtol", [0.0, 1e-12, 1e-6])
def test_cg_takes_the_same_steps_in_every_unit_of_the_right_hand_side(rtol: float) -> None:
    A, b = spd(20, 1e3), rhs(20)
    plain = Counted(A)
    expected = CG(rtol=rtol).solve(plain, b)
    for unit in (2.0**-40, 2.0**40):  # powers of two: no rounding of their own
        scaled = Counted(A)
        assert torch.equal(CG(rtol=rtol).solve(scaled, unit * b), unit * expected)
        assert scaled.calls == plain.calls


@pytest.mark.parametrize("seed", range(6))
def test_cg_returns_the_best_of_the_iterates_that_it_has_measured(seed: int) -> None:
    """In float32 on an ill-conditioned system the measured residuals go up and down at the end."""
    A, b = spd(40, 1e5, seed, torch.float32), rhs(40, seed + 5).float()
    residuals: list[float] = []

    def recorded(v: Tensor) -> Tensor:
        image = A @ v
        residuals.append(float((b - image).norm()))
        return image

    solution = CG(max_steps=4000).solve(recorded, b)
    assert len(residuals) < 4000
    assert float((b - A @ solution).norm()) == min(residuals)


def test_cg_goes_on_from_a_measured_residual_while_that_halves_it() -> None:
    """The recursion first claims convergence at a residual of 1.3e-10; from the measured one it comes further."""
    A, b = spd(50, 1e6, 2), rhs(50, 7)
    v = CG(max_steps=5000).solve(lambda u: A @ u, b)
    assert float((b - A @ v).norm() / b.norm()) < 6.5e-11


def test_cg_along_a_direction_without_curvature_stays() -> None:
    A = torch.diag(torch.tensor([4.0, 1.0, 0.0]).double())
    v = CG().solve(lambda u: A @ u, torch.tensor([0.0, 0.0, 5.0]).double())
    assert torch.equal(v, torch.zeros(3).double())


def test_cg_says_its_name_and_the_rule() -> None:
    with pytest.raises(ValueError, match="rtol") as caught:
        CG(rtol=-1.0)
    assert str(caught.value) == (
        "`CG(rtol=...)` must be a finite number >= 0. Got rtol=-1.0. Pass e.g. 1e-8."
    )


def test_cg_stops_at_negative_curvature_with_a_finite_iterate() -> None:
    A = torch.diag(torch.tensor([4.0, 1.0, -2.0]).double())
    b = torch.ones(3).double()
    v = CG().solve(lambda u: A @ u, b)
    assert torch.isfinite(v).all()
    assert float((b - A @ v).norm()) > 1e-3  # which is how the caller learns of it


def test_cg_on_a_singular_consistent_system_gives_the_solution_of_least_norm() -> None:
    A = torch.diag(torch.tensor([4.0, 1.0, 0.0]).double())
    solution = CG().solve(lambda u: A @ u, torch.tensor([4.0, 3.0, 0.0]).double())
    assert solution.tolist() == pytest.approx([1.0, 3.0, 0.0], abs=1e-14)


def test_dense_on_a_singular_system_gives_the_least_squares_solution_of_least_norm() -> None:
    A = torch.diag(torch.tensor([4.0, 1.0, 0.0]).double())
    solution = Dense().solve(lambda u: A @ u, torch.tensor([4.0, 3.0, 5.0]).double())
    assert solution.tolist() == pytest.approx([1.0, 3.0, 0.0], abs=1e-13)


def test_dense_solves_what_is_not_symmetric() -> None:
    A, b = torch.tensor([[0.0, 2.0], [-1.0, 1.0]]).double(), torch.tensor([2.0, 3.0]).double()
    assert Dense().solve(lambda u: A @ u, b).tolist() == pytest.approx([-2.0, 1.0])


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_zero_right_hand_side_gives_zero(solver: LinearSolver) -> None:
    A = spd(4, 10.0)
    assert torch.equal(solver.solve(lambda v: A @ v, torch.zeros(4).double()), torch.zeros(4))


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_nan_is_passed_on(solver: LinearSolver) -> None:
    A = spd(3, 10.0)
    b = torch.tensor([1.0, math.nan, 2.0]).double()
    assert torch.isnan(solver.solve(lambda v: A @ v, b)).any()


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_tree_gives_the_answer_of_the_vector(solver: LinearSolver) -> None:
    A, b = spd(6, 10.0), rhs(6)

    def matvec(tree: dict) -> dict:
        image = A @ torch.cat([tree["a"].reshape(-1), tree["b"][0]])
        return {"a": image[:4].reshape(2, 2), "b": [image[4:]]}

    tree = {"a": b[:4].reshape(2, 2), "b": [b[4:]]}
    before = b.clone()
    solution = solver.solve(matvec, tree, v0=tree)
    vector = torch.cat([solution["a"].reshape(-1), solution["b"][0]])
    assert error(vector, torch.linalg.solve(A, b)) < 1e-10
    assert torch.equal(b, before)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)]
)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_lower_precisions_reach_their_own_rounding(
    solver: LinearSolver, dtype: torch.dtype, tolerance: float
) -> None:
    A, b = spd(8, 5.0, dtype=dtype), rhs(8).to(dtype)
    solution = solver.solve(lambda v: A @ v, b)
    assert solution.dtype == dtype
    assert error(solution.double(), torch.linalg.solve(A.double(), b.double())) < tolerance


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_answer_carries_no_graph(solver: LinearSolver) -> None:
    A, b = spd(3, 10.0).requires_grad_(), rhs(3).requires_grad_()
    assert not solver.solve(lambda v: A @ v, b).requires_grad


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_product_of_another_size_says_the_rule(solver: LinearSolver) -> None:
    with pytest.raises(StructureError, match=r"must be like `b`, which has 3 entries\. Got 2"):
        solver.solve(lambda v: v[:2], rhs(3))


def test_start_of_another_shape_says_the_rule() -> None:
    with pytest.raises(StructureError, match=r"`v0` must have shape \(3,\)"):
        CG().solve(lambda v: v, rhs(3), v0=rhs(2))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: CG(rtol=-1.0), "rtol"),
        (lambda: CG(atol=math.nan), "atol"),
        (lambda: CG(max_steps=0), "max_steps"),
        (lambda: MINRES(rtol=-1.0), "rtol"),
        (lambda: MINRES(max_steps=0), "max_steps"),
        (lambda: GMRES(rtol=math.nan), "rtol"),
        (lambda: GMRES(restart=0), "restart"),
        (lambda: Nystrom(rank=0), "rank"),
        (lambda: Nystrom(rho=0.0), "rho"),
        (lambda: Neumann(max_steps=0), "max_steps"),
        (lambda: Neumann(step_size=0.0), "step_size"),
        (lambda: Neumann(rtol=math.inf), "rtol"),
    ],
)
def test_parameter_out_of_range_says_the_rule(make: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=\.\.\.\)` must be .* Got {name}="):
        make()


def indefinite(n: int, condition: float, seed: int = 0) -> Tensor:
    """Symmetric, with eigenvalues of both signs between 1 and the condition number."""
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))[0]
    signs = torch.ones(n).double()
    signs[::3] = -1.0
    spectrum = signs * torch.logspace(0, math.log10(condition), n, dtype=torch.float64)
    matrix = (basis.double() * spectrum) @ basis.double().T
    return 0.5 * (matrix + matrix.T)


@pytest.mark.parametrize("solver", [MINRES(), GMRES()], ids=str)
@pytest.mark.parametrize("condition", [10.0, 1e3])
@pytest.mark.parametrize("n", [2, 7, 50, 120])
def test_indefinite_systems_are_solved_where_cg_stops(
    solver: LinearSolver, condition: float, n: int
) -> None:
    for seed in range(3):
        A, b = indefinite(n, condition, seed), rhs(n, seed)
        exact = torch.linalg.solve(A, b)
        assert error(solver.solve(lambda v, A=A: A @ v, b), exact) < 1e-13 * condition * 10
    assert error(CG().solve(lambda v: A @ v, b), exact) > 1e-3


@given(n=st.integers(1, 30), condition=st.floats(1.0, 1e3), seed=st.integers(0, 1000))
def test_minres_solves_any_symmetric_invertible_system(n: int, condition: float, seed: int) -> None:
    A, b = indefinite(n, condition, seed), rhs(n, seed + 1)
    assert float((b - A @ MINRES().solve(lambda v: A @ v, b)).norm() / b.norm()) < 1e-11


@given(n=st.integers(1, 30), seed=st.integers(0, 1000))
def test_gmres_solves_any_invertible_system(n: int, seed: int) -> None:
    A = spd(n, 50.0, seed) @ torch.linalg.qr(rhs(n * n, seed).reshape(n, n))[0]
    b = rhs(n, seed + 1)
    assert float((b - A @ GMRES().solve(lambda v: A @ v, b)).norm() / b.norm()) < 1e-11


@pytest.mark.parametrize("solver", [MINRES, GMRES])
def test_residual_is_the_smallest_of_the_krylov_space(solver: type) -> None:
    """The oracle: least squares over b, A b, ..., A^(k-1) b."""
    A, b = indefinite(12, 20.0), rhs(12)
    for k in (1, 2, 5, 8):
        powers = [b]
        for _ in range(k - 1):
            powers.append(A @ powers[-1] / powers[-1].norm())
        K = torch.linalg.qr(torch.stack(powers, dim=1))[0]
        best = K @ torch.linalg.lstsq(A @ K, b[:, None]).solution[:, 0]
        found = solver(max_steps=k).solve(lambda v: A @ v, b)
        torch.testing.assert_close(found, best, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [MINRES(), GMRES()], ids=str)
def test_singular_system_ends_finite_and_near_the_least_squares_residual(
    solver: LinearSolver,
) -> None:
    A = torch.diag(torch.tensor([4.0, -1.0, 0.0]).double())
    consistent = solver.solve(lambda u: A @ u, torch.tensor([4.0, 3.0, 0.0]).double())
    assert consistent.tolist() == pytest.approx([1.0, -3.0, 0.0], abs=1e-13)
    b = torch.tensor([4.0, 3.0, 5.0]).double()
    v = solver.solve(lambda u: A @ u, b)
    assert torch.isfinite(v).all()
    assert float((b - A @ v).norm()) == pytest.approx(5.0, rel=1e-6)
    zero = solver.solve(lambda u: 0.0 * u, b)
    assert torch.equal(zero, torch.zeros(3).double())


def test_gmres_restarts() -> None:
    A, b = spd(40, 30.0), rhs(40)
    v = GMRES(restart=12, max_steps=2000).solve(lambda u: A @ u, b)
    assert error(v, torch.linalg.solve(A, b)) < 1e-10


@pytest.mark.parametrize("solver", [MINRES, GMRES, Nystrom])
@pytest.mark.parametrize("max_steps", [1, 2, 3, 17])
def test_new_solvers_never_exceed_their_products(solver: type, max_steps: int) -> None:
    product = Counted(spd(50, 1e4))
    method = solver(max_steps=max_steps)
    method.solve(product, rhs(50))
    method.solve(product, rhs(50), v0=rhs(50, 3))
    assert product.calls <= 2 * max_steps + (2 * 20 if solver is Nystrom else 0)


@pytest.mark.parametrize("solver", [MINRES, GMRES])
def test_warm_start_at_the_solution_costs_one_product(solver: type) -> None:
    A, b = indefinite(10, 10.0), rhs(10)
    product, exact = Counted(A), torch.linalg.solve(A, b)
    assert error(solver(rtol=1e-10).solve(product, b, v0=exact), exact) == 0.0
    assert product.calls == 1


def test_nystrom_of_a_low_rank_matrix_is_its_regularized_inverse() -> None:
    basis = torch.linalg.qr(rhs(200).reshape(40, 5))[0]
    A = (basis * torch.tensor([100.0, 50.0, 20.0, 5.0, 1.0]).double()) @ basis.T
    b, rho = rhs(40), 0.1
    product = Counted(A)
    v = Nystrom(rank=8, rho=rho).solve(product, b)
    exact = torch.linalg.solve(A + rho * torch.eye(40).double(), b)
    assert error(v, exact) < 1e-10
    assert product.calls == 8


def test_nystrom_preconditioner_needs_a_fraction_of_the_products_of_cg() -> None:
    n = 100
    basis = torch.linalg.qr(rhs(n * n).reshape(n, n))[0]
    spectrum = 1.0 + 1e6 / torch.arange(1, n + 1).double() ** 4
    A, b = (basis * spectrum) @ basis.T, rhs(n)
    plain, preconditioned = Counted(A), Counted(A)
    CG(rtol=1e-8).solve(plain, b)
    v = Nystrom(rank=20, rtol=1e-8).solve(preconditioned, b)
    assert preconditioned.calls < 0.7 * plain.calls
    assert error(v, torch.linalg.solve(A, b)) < 1e-6


@given(n=st.integers(1, 30), condition=st.floats(1.0, 1e3), seed=st.integers(0, 1000))
def test_nystrom_solves_any_positive_definite_system(n: int, condition: float, seed: int) -> None:
    A, b = spd(n, condition, seed), rhs(n, seed + 1)
    v = Nystrom(rank=5).solve(lambda u: A @ u, b)
    assert float((b - A @ v).norm() / b.norm()) < 1e-11


def test_nystrom_on_an_indefinite_system_is_finite_and_unsolved() -> None:
    A, b = indefinite(20, 10.0), rhs(20)
    v = Nystrom(rank=5).solve(lambda u: A @ u, b)
    assert torch.isfinite(v).all()
    assert float((b - A @ v).norm() / b.norm()) > 1e-3


def test_nystrom_draws_the_same_numbers_and_leaves_the_global_ones() -> None:
    A, b = spd(20, 1e3), rhs(20)
    before = torch.random.get_rng_state()
    first = Nystrom(rank=4, rho=1.0).solve(lambda u: A @ u, b)
    assert torch.equal(first, Nystrom(rank=4, rho=1.0).solve(lambda u: A @ u, b))
    assert torch.equal(before, torch.random.get_rng_state())


class Waits(TorchDispatchMode):
    """Counts the numbers that are fetched one by one, for each of which an accelerator would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_gmres_waits_for_the_device_as_often_in_a_late_step_as_in_an_early_one() -> None:
    n = 60
    A, b = spd(n, 1e3), rhs(n)
    product = Counted(A)
    with Waits() as waits:
        v = GMRES().solve(product, b)
    assert error(v, torch.linalg.solve(A, b)) < 1e-8
    assert product.calls > 40
    assert waits.count <= 4 * product.calls  # 30 a step on average, if each entry were fetched


def test_nystrom_has_no_seed_of_its_own() -> None:
    with pytest.raises(TypeError, match="seed"):
        Nystrom(seed=1)  # pyright: ignore[reportCallIssue]


def test_dense_takes_columns_that_are_there_at_once() -> None:
    A, b = spd(6, 10.0), rhs(6)
    counted = Counted(A)
    product = Product(counted, lambda: A, counted)
    found = Dense().solve(product, b)
    torch.testing.assert_close(found, torch.linalg.solve(A, b))
    assert counted.calls == 0
    CG().solve(product, b)
    assert counted.calls > 0


def test_cg_checks_a_tight_tolerance_by_the_product_that_is_kept() -> None:
    A, b = spd(6, 10.0), rhs(6)
    measured: list[torch.Tensor] = []

    def measure(v: torch.Tensor) -> torch.Tensor:
        measured.append(v)
        return A @ v

    CG(rtol=1e-3).solve(Product(lambda v: A @ v, None, measure), b)
    assert measured == []
    found = CG(rtol=1e-10).solve(Product(lambda v: A @ v, None, measure), b)
    assert measured[-1] is found


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_product_that_is_zero_leaves_a_finite_answer(solver: LinearSolver) -> None:
    v = solver.solve(lambda v: 0.0 * v, torch.tensor([1.0, 2.0]).double())
    assert torch.equal(v, torch.zeros(2).double())


def test_gmres_stops_before_a_product_that_is_not_finite() -> None:
    b = torch.tensor([1.0, 2.0]).double()
    assert torch.equal(GMRES().solve(lambda v: math.inf * v, b), torch.zeros_like(b))


@pytest.mark.parametrize(
    ("factor", "b"),
    [(1.0, torch.tensor([1.6e308], dtype=torch.float64)), (1e-39, torch.full((2,), 1e-20))],
)
def test_cg_raises_nothing_at_the_ends_of_the_range(factor: float, b: torch.Tensor) -> None:
    CG().solve(lambda v: v * factor, b)


@pytest.mark.parametrize("unit", [2.0**-90, 2.0**90])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_right_hand_side_in_another_unit_changes_no_digit(
    solver: LinearSolver, unit: float
) -> None:
    """Its squares leave the range of float32."""
    A, b = spd(6, 10.0).float(), rhs(6).float()
    found = solver.solve(lambda v: A @ v, unit * b)
    torch.testing.assert_close(found / unit, solver.solve(lambda v: A @ v, b), rtol=1e-5, atol=0.0)
