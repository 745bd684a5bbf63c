import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel.barriers import Barrier, log_rational, relaxed

KAPPAS = st.floats(1e-100, 1.0)
METHODS = ("value", "derivative", "second_derivative")


def f64(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def piecewise(zeta: float, kappa: float, sigma: float) -> tuple[float, float, float]:
    """The table of the two branches, literally."""
    t = kappa / -zeta
    if t >= 1.0:
        return sigma * (1.5 + math.log(t)), sigma / -zeta, sigma / zeta**2
    return (
        sigma * (2 * t - 0.5 * t**2),
        sigma / kappa * t**2 * (2 - t),
        sigma / kappa**2 * t**3 * (4 - 3 * t),
    )


@given(kappa=KAPPAS, sigma=st.floats(1e-6, 1e6), offset=st.floats(0.0, 1e-14))
def test_value_and_two_derivatives_agree_across_minus_kappa(
    kappa: float, sigma: float, offset: float
) -> None:
    barrier = log_rational(kappa)
    near, far = f64(-kappa * (1.0 - offset)), f64(-kappa * (1.0 + offset))
    for order, method in enumerate(METHODS):
        jump = float(getattr(barrier, method)(near, sigma) - getattr(barrier, method)(far, sigma))
        assert abs(jump) <= 1e-12 * sigma / kappa**order


@given(kappa=st.floats(1e-3, 10.0), ratio=st.floats(1e-6, 1e6), sigma=st.floats(1e-3, 1e3))
def test_equals_the_two_branches(kappa: float, ratio: float, sigma: float) -> None:
    zeta = -kappa * ratio
    for method, expected in zip(METHODS, piecewise(zeta, kappa, sigma), strict=True):
        value = getattr(log_rational(kappa), method)(f64(zeta), sigma)
        assert float(value) == pytest.approx(expected, rel=1e-12, abs=0.0)


@given(kappa=st.floats(1e-3, 1.0), ratio=st.floats(0.05, 20.0))
def test_derivatives_match_central_differences(kappa: float, ratio: float) -> None:
    barrier, zeta = log_rational(kappa), -kappa * ratio
    step = 2e-5 * abs(zeta)
    if abs(zeta + kappa) < 2 * step:  # the third derivative jumps there
        return
    for lower, upper in (("value", "derivative"), ("derivative", "second_derivative")):
        ahead, behind = (getattr(barrier, lower)(f64(zeta + s)) for s in (step, -step))
        slope = float(ahead - behind) / (2 * step)
        assert slope == pytest.approx(float(getattr(barrier, upper)(f64(zeta))), rel=1e-8)


@pytest.mark.parametrize("barrier", [log_rational(0.3), relaxed(log_rational(0.3), 0.1)], ids=str)
def test_positive_increasing_convex(barrier: Barrier) -> None:
    zeta = -torch.logspace(6, -6, 4001, dtype=torch.float64)
    for method in METHODS:
        assert (getattr(barrier, method)(zeta) > 0.0).all()
    assert (barrier.value(zeta).diff() > 0.0).all()
    assert (barrier.derivative(zeta).diff() > 0.0).all()


def test_edges_are_infinite_zero_or_nan_and_never_a_wrong_number() -> None:
    edges = [-math.inf, -1e300, -1e-300, -0.0, 0.0, 1.0, math.inf, math.nan]
    zeta = torch.tensor(edges, dtype=torch.float64)
    for method in METHODS:
        value = getattr(log_rational(), method)(zeta)
        assert value[0] == 0.0
        assert torch.isfinite(value[1])
        assert torch.isinf(value[3:7]).all()
        assert torch.isnan(value[7])
    assert torch.isfinite(log_rational().value(zeta[2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_keeps_shape_and_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    zeta = -torch.rand(shape).add(0.1).to(dtype)
    for barrier in (log_rational(0.5), relaxed(log_rational(0.5), torch.tensor(0.2))):
        for method in METHODS:
            value = getattr(barrier, method)(zeta, 0.7)
            assert value.shape == shape
            assert value.dtype == dtype


@given(
    kappa=st.floats(0.1, 1.0),
    start=st.floats(-3.0, -1e-7),
    step=st.floats(-1e-12, 1e-12),
    delta=st.none() | st.floats(1e-3, 1.0),
)
def test_small_difference_keeps_its_digits(
    kappa: float, start: float, step: float, delta: float | None
) -> None:
    barrier = log_rational(kappa) if delta is None else relaxed(log_rational(kappa), delta)
    zeta0 = f64(start)
    zeta1 = f64(start + step * abs(start))
    exact_step = zeta1 - zeta0  # to the last digit, by Sterbenz
    expected = barrier.derivative(zeta0) * exact_step
    assert float(barrier.difference(zeta1, zeta0)) == pytest.approx(float(expected), rel=1e-11)


@given(kappa=st.floats(0.1, 1.0), first=st.floats(-5.0, -1e-3), second=st.floats(-5.0, -1e-3))
def test_large_difference_is_the_subtraction(kappa: float, first: float, second: float) -> None:
    for barrier in (log_rational(kappa), relaxed(log_rational(kappa), 0.05)):
        subtraction = barrier.value(f64(first), 2.0) - barrier.value(f64(second), 2.0)
        difference = barrier.difference(f64(first), f64(second), 2.0)
        assert float(difference) == pytest.approx(float(subtraction), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("outside", [0.0, 0.1, 3.0])
def test_difference_to_a_point_outside_is_infinite(outside: float) -> None:
    assert float(log_rational().difference(f64(outside), f64(-0.1))) == math.inf


@given(delta=st.floats(0.01, 1.0), first=st.floats(-2.0, 2.0), second=st.floats(-2.0, 2.0))
def test_relaxed_difference_is_the_subtraction_on_both_sides_of_its_edge(
    delta: float, first: float, second: float
) -> None:
    barrier = relaxed(log_rational(0.3), delta)
    subtraction = barrier.value(f64(first), 0.5) - barrier.value(f64(second), 0.5)
    difference = barrier.difference(f64(first), f64(second), 0.5)
    scale = 1e-13 * max(float(barrier.value(f64(z), 0.5)) for z in (first, second))
    assert float(difference) == pytest.approx(float(subtraction), rel=1e-9, abs=scale)


@pytest.mark.parametrize("barrier", [log_rational(0.3), relaxed(log_rational(0.3), 0.1)], ids=str)
def test_weight_is_one_where_it_is_left_out_and_scales_everything(barrier: Barrier) -> None:
    zeta = torch.tensor([-2.0, -0.3, -0.2, -0.01], dtype=torch.float64)
    for method in METHODS:
        function = getattr(barrier, method)
        torch.testing.assert_close(function(zeta), function(zeta, 4.0) / 4.0, rtol=1e-15, atol=0.0)
    back = zeta.flip(0)
    torch.testing.assert_close(
        barrier.difference(zeta, back),
        barrier.difference(zeta, back, 4.0) / 4.0,
        rtol=1e-15,
        atol=0.0,
    )


@given(delta=st.floats(1e-3, 1.0), zeta=st.floats(-1.0, 1.0))
def test_relaxed_is_the_taylor_polynomial_beyond_its_edge(delta: float, zeta: float) -> None:
    barrier, edge = log_rational(0.3), f64(-delta)
    value, slope, curvature = (float(getattr(barrier, m)(edge, 0.5)) for m in METHODS)
    beyond, soft = zeta + delta, relaxed(barrier, delta)
    if beyond <= 0.0:
        for method in METHODS:
            inside = getattr(barrier, method)(f64(zeta), 0.5)
            assert torch.equal(getattr(soft, method)(f64(zeta), 0.5), inside)
        return
    expected = (
        value + slope * beyond + 0.5 * curvature * beyond**2,
        slope + curvature * beyond,
        curvature,
    )
    for method, number in zip(METHODS, expected, strict=True):
        assert float(getattr(soft, method)(f64(zeta), 0.5)) == pytest.approx(number, rel=1e-12)


def test_gradient_through_the_value_is_the_derivative() -> None:
    zeta = torch.tensor([-3.0, -0.5, -1e-3], dtype=torch.float64, requires_grad=True)
    barrier = log_rational(0.7)
    (grad,) = torch.autograd.grad(barrier.value(zeta, 0.1).sum(), zeta)
    torch.testing.assert_close(grad, barrier.derivative(zeta.detach(), 0.1), rtol=1e-12, atol=0.0)


def test_gradient_through_the_value_of_a_point_outside_is_zero_and_not_nan() -> None:
    zeta = torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(log_rational(0.7).value(zeta).sum(), zeta)
    assert grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("number", [0.0, -1.0, math.inf, math.nan])
def test_number_out_of_range_says_the_rule(number: float) -> None:
    with pytest.raises(ValueError, match="kappa") as caught:
        log_rational(number)
    assert str(caught.value) == (
        f"`log_rational(kappa=...)` must be a finite number > 0. Got kappa={number}. "
        "Pass the distance from the bound at which the logarithm takes over, e.g. 1.0."
    )
    with pytest.raises(ValueError, match="delta") as caught:
        relaxed(log_rational(), number)
    assert str(caught.value) == (
        f"`relaxed(delta=...)` must be a finite number > 0. Got delta={number}. "
        "Pass a part of the known slack, e.g. 0.1 of it."
    )


def test_what_is_relaxed_must_be_a_barrier() -> None:
    with pytest.raises(TypeError) as caught:
        relaxed(torch.log, 0.1)  # pyright: ignore[reportArgumentType]
    assert str(caught.value) == (
        "`relaxed(barrier=...)` must be an instance of `Barrier`. "
        "Got builtin_function_or_method. Pass e.g. `log_rational()`."
    )


def test_barriers_of_equal_numbers_are_equal_and_print_them() -> None:
    assert log_rational(0.5) == log_rational(0.5)
    assert log_rational() == log_rational(1.0)
    assert (
        str(relaxed(log_rational(0.5), 0.1)) == "Relaxed(barrier=LogRational(kappa=0.5), delta=0.1)"
    )
