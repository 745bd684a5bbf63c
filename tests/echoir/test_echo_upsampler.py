import pytest
import torch
from echo_upsampler import EchoUpsampler, upsample, upsample_reference

KERNELS = pytest.mark.parametrize("combine", ["sum", "product"])
RADII = pytest.mark.parametrize("radius", [1, 2])


def inputs(h, w, *, channels=3, guides=4, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    value, guide = normal(2, channels, h, w), scale * normal(2, guides, 2 * h, 2 * w)
    widths = torch.tensor([0.5, 0.7], dtype=torch.float64)
    return [t.requires_grad_() for t in (value, guide, *widths.unbind())]


@KERNELS
@RADII
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 8), (9, 7)])
def test_fast_form_equals_the_equations(combine, radius, size):
    arguments = inputs(*size)
    fast = upsample(*arguments, radius=radius, combine=combine)
    slow = upsample_reference(*arguments, radius=radius, combine=combine)
    assert (fast - slow).abs().max() < 1e-12
    cotangent = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad(fast, arguments, cotangent),
        torch.autograd.grad(slow, arguments, cotangent),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-12


@KERNELS
def test_gradients_of_first_and_second_order(combine):
    arguments = inputs(3, 5, channels=2, guides=2)

    def f(*tensors):
        return upsample(*tensors, combine=combine)

    assert torch.autograd.gradcheck(f, arguments)
    assert torch.autograd.gradgradcheck(f, arguments)


@KERNELS
def test_second_order_under_func(combine):
    tensors = tuple(t.detach() for t in inputs(3, 5))

    def hvp_norm(function):
        def loss(arguments):
            return function(*arguments, combine=combine).square().sum()

        def slope(arguments):
            return sum(g.square().sum() for g in torch.func.grad(loss)(arguments))

        return torch.func.grad(slope)(tensors)

    for a, b in zip(hvp_norm(upsample), hvp_norm(upsample_reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@KERNELS
@RADII
def test_constants_are_preserved(combine, radius):
    _, guide, spatial, range_ = inputs(5, 6)
    flat = torch.full((2, 3, 5, 6), 0.7, dtype=torch.float64)
    out = upsample(flat, guide, spatial, range_, radius=radius, combine=combine)
    assert (out - 0.7).abs().max() < 1e-14


@KERNELS
def test_finite_where_no_guides_are_alike(combine):
    value, guide, spatial, range_ = inputs(5, 6, scale=50.0)
    out = upsample(value, guide, spatial, range_, combine=combine)
    assert out.isfinite().all()
    assert all(
        g.isfinite().all() for g in torch.autograd.grad(out.sum(), (value, guide, spatial, range_))
    )


def test_narrow_spatial_kernel_keeps_a_positive_sum():
    value, guide, _, range_ = inputs(5, 6, scale=50.0)
    out = upsample(value, guide, torch.tensor(1e-6, dtype=torch.float64), range_)
    assert out.isfinite().all()


def test_edge_of_the_guide_is_restored():
    """An edge off the coarse grid: bilinear upsampling blurs it, the echo puts it back."""
    fine = torch.zeros(1, 1, 16, 16)
    fine[..., 7:] = 1.0
    coarse = torch.nn.functional.avg_pool2d(fine, 2)
    sharp = upsample(coarse, fine, torch.tensor(0.5), torch.tensor(0.1), combine="product")
    blurred = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")
    assert (sharp - fine).abs().mean() < 0.5 * (blurred - fine).abs().mean()


def test_under_autocast():
    upsampler = EchoUpsampler(8, 4)
    x, echo = torch.randn(1, 8, 6, 5), torch.randn(1, 4, 12, 10)
    with torch.autocast("cpu", torch.bfloat16):
        out = upsampler(x, echo)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), upsampler(x, echo), rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() for p in upsampler.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 7}, "even and positive. Got channels=7"),
        ({"radius": 0}, "from 1 to 4. Got radius=0"),
        ({"combine": "mean"}, "Got combine='mean'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EchoUpsampler(**({"channels": 8, "echo_channels": 4} | arguments))


def test_guide_of_wrong_size():
    with pytest.raises(ValueError, match="twice the height and width"):
        EchoUpsampler(8, 4)(torch.zeros(1, 8, 3, 3), torch.zeros(1, 4, 6, 7))
