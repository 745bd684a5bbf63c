import pytest
import torch
from model import EchoIR, EchoIRConfig
from objectives import both_losses, echo_loss, objectives, restoration_loss
from patches import Patches

TINY = EchoIRConfig(width=8, blocks=(1, 1, 1), heads=(1, 2, 4), final_blocks=1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return EchoIR(TINY)


@pytest.fixture
def patches():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 16, 16, generator=generator)
    return Patches(target + 0.1 * torch.randn(2, 3, 16, 16, generator=generator), target)


def test_upper_is_the_mean_error(net, patches):
    upper, _ = objectives("echo")
    expected = (net(patches.input) - patches.target).abs().mean()
    torch.testing.assert_close(upper(net, patches), expected)


@pytest.mark.parametrize(
    ("lower", "weights"), [("echo", (0, 1)), ("restoration", (1, 0)), ("both", (1, 0.1))]
)
def test_lower_is_what_its_name_says(net, patches, lower, weights):
    _, f = objectives(lower)
    restoration, echo = weights
    expected = restoration * restoration_loss(net, patches) + echo * echo_loss(net, patches)
    torch.testing.assert_close(f(net, patches), expected)
    assert f(net, patches).shape == (2,)


def test_echo_loss_of_one_patch_does_not_see_the_others(net, patches):
    swapped = Patches(patches.input.flip(0), patches.target.flip(0))
    torch.testing.assert_close(echo_loss(net, patches), echo_loss(net, swapped).flip(0))


def test_echo_loss_is_near_zero_for_what_upsampling_keeps(net):
    """Flat images have flat features away from the border, and averages keep constants."""
    flat = torch.full((1, 3, 64, 64), 0.5)
    textured = torch.rand(1, 3, 64, 64)
    for level in range(
        2
    ):  # a downsampler and a reduction that undo each other: channel i to channel i
        down, up = net.downsamplers[level], net.upsamplers[level].reduce
        for layer in (down, up):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        for i in range(8 * 2**level):
            down.weight.data[i, i, 1, 1] = 1.0
            up.weight.data[i, i] = 1.0
    with torch.no_grad():
        losses = [float(echo_loss(net, Patches(image, image))) for image in (flat, textured)]
    assert losses[0] < 0.1 * losses[1]


def test_lower_level_reaches_every_upsampler(net, patches):
    _, f = objectives("echo")
    slopes = torch.autograd.grad(f(net, patches).mean(), list(net.upsamplers.parameters()))
    assert all(s.abs().max() > 0 for s in slopes)


def test_bad_objectives():
    with pytest.raises(ValueError, match=r"one of echo, restoration, both\. Got 'neither'"):
        objectives("neither")
    with pytest.raises(ValueError, match=r"at least 0\. Got alpha=-1"):
        objectives("both", alpha=-1)


def test_both_losses_share_the_encoder(net, patches):
    """The same values and gradients as one by one, from one pass through the encoder instead of two."""
    parameters = list(net.parameters())
    passes = []
    net.shallow.register_forward_hook(lambda *_: passes.append(1))
    shared = both_losses(net, patches)
    assert len(passes) == 1
    for together, alone in zip(shared, (restoration_loss, echo_loss), strict=True):
        torch.testing.assert_close(together, alone(net, patches))
    first = torch.autograd.grad(sum(shared).mean(), parameters)
    alone = restoration_loss(net, patches) + echo_loss(net, patches)
    second = torch.autograd.grad(alone.mean(), parameters)
    torch.testing.assert_close(first, second)
