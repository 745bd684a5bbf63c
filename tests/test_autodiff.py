import pytest
import torch
from torch import Tensor, nn

from bilevel import _autodiff
from bilevel._autodiff import LinearizedGradient
from bilevel._errors import ObjectiveError


def quartic(x: Tensor, y: Tensor) -> Tensor:
    return (x**2).sum() * (y**3).sum() + torch.sin(y).sum() * x.sum()


def point(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (3, 4))
    return x.to(dtype), y.to(dtype)


def test_value_has_no_graph() -> None:
    x, y = point()
    value = _autodiff.value(quartic, x.requires_grad_(), y)
    assert not value.requires_grad
    torch.testing.assert_close(value, quartic(x, y).detach())


def test_gradients_match_central_differences() -> None:
    x, y = point()
    value, (grad_x, grad_y) = _autodiff.value_and_grad(quartic, x, y)
    torch.testing.assert_close(value, quartic(x, y))
    for grad, at, fun in (
        (grad_x, x, lambda v: quartic(v, y)),
        (grad_y, y, lambda v: quartic(x, v)),
    ):
        steps = 1e-5 * torch.eye(at.numel(), dtype=at.dtype)
        numeric = torch.stack([(fun(at + h) - fun(at - h)) / 2e-5 for h in steps])
        torch.testing.assert_close(grad, numeric, rtol=1e-8, atol=1e-8)


def test_gradients_of_trees_have_their_structure_and_zeros_where_unused() -> None:
    x = {"used": torch.ones(2), "unused": torch.ones(3)}
    y = [torch.ones(1)]
    _, (grad_x, grad_y) = _autodiff.value_and_grad(lambda x, y: (2.0 * x["used"]).sum(), x, y)
    assert grad_x["used"].tolist() == [2.0, 2.0]
    assert grad_x["unused"].tolist() == [0.0, 0.0, 0.0]
    assert grad_y[0].tolist() == [0.0]
    _, (zero,) = _autodiff.value_and_grad(lambda x: torch.tensor(1.0), x)
    assert zero["used"].tolist() == [0.0, 0.0]


def test_frozen_variables_get_no_gradient() -> None:
    x, y = point()
    value, grads = _autodiff.value_and_grad(lambda y, x: quartic(x, y), y, frozen=(x,))
    assert len(grads) == 1
    torch.testing.assert_close(value, quartic(x, y))


def test_variables_are_not_modified() -> None:
    x, y = point()
    _autodiff.value_and_grad(quartic, x, y)
    LinearizedGradient(quartic, x, y).hessian()
    assert not x.requires_grad
    assert not y.requires_grad
    assert x.grad is None


def test_gradient_under_no_grad_and_not_under_inference_mode() -> None:
    x, y = point()
    with torch.no_grad():
        _, (grad,) = _autodiff.value_and_grad(lambda v: quartic(v, y), x)
    assert float(grad.norm()) > 0.0
    with torch.inference_mode(), pytest.raises(ObjectiveError, match=r"outside `torch\.inference"):
        _autodiff.value_and_grad(lambda v: quartic(v, y), x)


def test_unused_leaves_are_named_by_index() -> None:
    x, y = [torch.ones(1), torch.ones(1)], torch.ones(1)
    assert _autodiff.unused_leaves(lambda x, y: x[1].sum(), x, y) == [[0], [0]]
    assert _autodiff.unused_leaves(lambda x, y: torch.tensor(1.0), x, y) == [[0, 1], [0]]


def test_second_derivatives_match_torch() -> None:
    x, y = point()
    linear = LinearizedGradient(quartic, x, y)
    hessian = torch.autograd.functional.hessian(lambda v: quartic(x, v), y)
    torch.testing.assert_close(linear.hessian(), hessian)
    v = torch.arange(4.0, dtype=torch.float64)
    torch.testing.assert_close(linear.hvp(v), hessian @ v)
    _, (_, grad_y) = _autodiff.value_and_grad(quartic, x, y)
    torch.testing.assert_close(linear.grad, grad_y)
    mixed = torch.autograd.functional.jacobian(
        lambda u: torch.autograd.functional.jacobian(lambda v: quartic(u, v), y, create_graph=True),
        x,
    )
    torch.testing.assert_close(linear.mixed_vjp(v), v @ mixed)


def test_second_derivatives_of_what_has_none_are_zero() -> None:
    x, y = point()
    for fun in (lambda x, y: y.sum(), lambda x, y: torch.tensor(1.0, dtype=torch.float64)):
        linear = LinearizedGradient(fun, x, y)
        assert torch.equal(linear.hessian(), torch.zeros(4, 4, dtype=torch.float64))
        assert torch.equal(linear.hvp(y), torch.zeros_like(y))
        assert torch.equal(linear.mixed_vjp(y), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_keep_the_dtype(dtype: torch.dtype) -> None:
    x, y = point(dtype)
    linear = LinearizedGradient(quartic, x, y)
    assert linear.hvp(y).dtype == linear.mixed_vjp(y).dtype == linear.grad.dtype == dtype


def test_products_work_under_autocast_with_a_norm_before_a_convolution() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 3))
    image = torch.randn(1, 2, 5, 5)

    def fun(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (net(image * y[0] + x[0]) ** 2).float().mean()

    linear = LinearizedGradient(fun, torch.ones(1), torch.ones(1))
    assert torch.isfinite(linear.hvp(torch.ones(1))).all()


def test_jacobian_of_a_vector_function() -> None:
    x, y = torch.tensor([2.0, 3.0]).double(), torch.tensor([0.5]).double()
    value, (in_x, in_y) = _autodiff.jacobian(lambda u, v: torch.cat([u * v, u[:1] ** 2]), x, y)
    torch.testing.assert_close(value, torch.tensor([1.0, 1.5, 4.0]).double())
    expected = torch.tensor([[0.5, 0.0], [0.0, 0.5], [4.0, 0.0]]).double()
    torch.testing.assert_close(in_x, expected)
    torch.testing.assert_close(in_y, torch.tensor([[2.0], [3.0], [0.0]]).double())
    value, (in_x, in_y) = _autodiff.jacobian(lambda u, v: v * torch.ones(3).double(), x, y)
    assert in_x.shape == (3, 2)
    assert not bool(in_x.any())
    torch.testing.assert_close(in_y, torch.ones(3, 1).double())


def test_both_products_come_from_one_pass_and_agree_with_each() -> None:
    x, y = point()
    v = torch.arange(4.0, dtype=torch.float64)
    linear = LinearizedGradient(quartic, x, y)
    mixed, product = linear.products(v)
    assert torch.equal(mixed, linear.mixed_vjp(v))
    assert torch.equal(product, linear.hvp(v))
    mixed, product = LinearizedGradient(lambda x, y: torch.tensor(1.0).double(), x, y).products(v)
    assert not mixed.any()
    assert not product.any()


def test_forward_mode_is_the_jacobian_of_the_gradient() -> None:
    x, y = point()
    along_x, along_y = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    grad, tangents = _autodiff.gradient_and_tangents(quartic, x, y, along_x, along_y)
    by_x, by_y = torch.autograd.functional.jacobian(
        lambda u, v: torch.autograd.functional.jacobian(
            lambda w: quartic(u, w), v, create_graph=True
        ),
        (x, y),
    )
    torch.testing.assert_close(grad, LinearizedGradient(quartic, x, y).grad)
    torch.testing.assert_close(tangents, along_x @ by_x.T + along_y @ by_y.T)


def test_derivatives_of_a_map_are_its_jacobian() -> None:
    x, y = point()

    def fun(u: Tensor, v: Tensor) -> Tensor:
        return torch.sin(v) * u.sum() + v.flip(0) ** 2

    by_x, by_y = torch.autograd.functional.jacobian(fun, (x, y))
    w = torch.arange(4.0, dtype=torch.float64)
    linear = _autodiff.LinearizedMap(fun, x, y)
    torch.testing.assert_close(linear.vjp(0, w), by_x.T @ w)
    torch.testing.assert_close(linear.vjp(1, w), by_y.T @ w)


def test_gradient_of_can_be_differentiated_again() -> None:
    x, y = point()
    hessian = torch.autograd.functional.jacobian(
        lambda v: _autodiff.gradient_of(lambda x, y, data: quartic(x, y) * data, x, v, 2.0), y
    )
    torch.testing.assert_close(hessian, 2.0 * LinearizedGradient(quartic, x, y).hessian())


def test_derivatives_are_those_of_torch_autograd_grad_bit_for_bit() -> None:
    def fun(x: Tensor, y: Tensor) -> Tensor:
        return (torch.sin(y) * x).sum() ** 2 + torch.nn.functional.softplus(y @ x)

    x, y, v = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    u, w = x.clone().requires_grad_(), y.clone().requires_grad_()
    exact = torch.autograd.grad(fun(u, w), (u, w), create_graph=True)
    products = torch.autograd.grad(exact[1], (u, w), v)
    value, grads = _autodiff.value_and_grad(fun, x, y)
    assert torch.equal(value, fun(x, y))
    assert all(map(torch.equal, grads, exact))
    linear = _autodiff.LinearizedGradient(fun, x, y)
    assert torch.equal(linear.grad, exact[1])
    assert all(map(torch.equal, linear.products(v), products))
    assert torch.equal(linear.hvp(v), products[1])
    assert torch.equal(linear.mixed_vjp(v), products[0])


def test_anomaly_mode_reports_no_error_where_there_is_none(
    recwarn: pytest.WarningsRecorder,
) -> None:
    x, y = point()
    with torch.autograd.set_detect_anomaly(True):
        hessian = LinearizedGradient(quartic, x, y).hessian()
    torch.testing.assert_close(hessian, LinearizedGradient(quartic, x, y).hessian())
    assert not [w for w in recwarn if "Error detected" in str(w.message)]
