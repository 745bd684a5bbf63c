from itertools import pairwise

import pytest
import torch
from blocks import ChannelAttention, SelfAttention
from local_statistics import local_statistics
from model import EchoIR, EchoIRConfig, pad
from tiles import cut, restore
from torch import nn
from whole_image import measured

CPU = torch.device("cpu")
TINY = EchoIRConfig(width=8, blocks=(1, 1), heads=(1, 2), final_blocks=1, unshuffle=2)


@pytest.fixture
def net():
    """A network whose residual is as large as the image, so that a difference is not lost in it."""
    torch.manual_seed(0)
    net = EchoIR(TINY).eval()
    net.reconstruction.weight.data *= 10
    return net


def two_sided(height, width):
    """Dark and smooth on the left, bright and rough on the right: each half has its own statistics."""
    torch.manual_seed(1)
    x = torch.linspace(0, 1, width) > 0.5
    return 0.2 + x * (0.4 + 0.3 * torch.randn(3, height, width))


def rms(image):
    return float(image.square().mean().sqrt())


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("overlap", [0, 9, 20])
def test_cuts_share_what_they_must_and_weigh_one(overlap, align):
    for size in range(1, 300):
        spans = cut(size, 40, overlap, align)
        assert spans[0].start == 0
        assert spans[-1].stop == size
        assert all(a.stop - b.start >= overlap for a, b in pairwise(spans))
        assert all(span.start % align == 0 and span.stop - span.start <= 40 for span in spans)
        assert [a.core[1] for a in spans[:-1]] == [b.core[0] for b in spans[1:]]
        total = torch.zeros(size)
        for span in spans:
            assert span.start <= span.core[0] < span.core[1] <= span.stop
            assert span.weight.min() >= 0
            total[span.start : span.stop] += span.weight
        torch.testing.assert_close(total, torch.ones(size))


@pytest.mark.parametrize("statistics", ["whole", "local", "tile"])
@pytest.mark.parametrize("size", [(40, 40), (101, 77), (33, 190)])
def test_tiles_of_nothing_are_the_image(size, statistics):
    image = torch.rand(3, *size)
    out = restore(nn.Identity(), image, device=CPU, tile=72, overlap=24, statistics=statistics)
    torch.testing.assert_close(out, image)


def test_tiles_of_a_local_network_equal_the_whole():
    torch.manual_seed(0)
    blur = nn.Conv2d(3, 3, 9, padding=4)
    image = torch.rand(3, 96, 80)  # sizes that need no padding, which would differ from the blur's
    whole = restore(blur, image, device=CPU)
    torch.testing.assert_close(restore(blur, image, device=CPU, tile=48, overlap=16), whole)


@pytest.mark.parametrize("literal", [False, True])
def test_tiles_with_the_image_s_statistics_equal_the_whole(literal):
    """A tile's interior, restored with the sums of the whole image, is that of the whole image."""
    torch.manual_seed(0)
    net = EchoIR(EchoIRConfig(**vars(TINY) | {"literal_scale": literal})).eval().double()
    image = two_sided(96, 128)[None].double()
    with torch.no_grad(), measured(net) as measure:
        whole, given = measure(image, torch.tensor([0, 96, 0, 128]))
        assert float(given.pixels) == 96 * 128
        torch.testing.assert_close(whole, net(image))
        tile, nothing = measure(image[..., 16:88, 32:112], None, given)
        own, _ = measure(image[..., 16:88, 32:112])
    assert nothing is None
    inside = ..., slice(28, -28), slice(28, -28)
    expected = whole[..., 16:88, 32:112][inside]
    # The network's arithmetic is float64, the sums are float32.
    torch.testing.assert_close(tile[inside], expected, rtol=1e-5, atol=1e-6)
    assert rms(own[inside] - expected) > 1e-3  # it is the statistics that do it


def test_sums_of_cores_are_those_of_the_image():
    """Of what comes before the first pool: the later ones see what the tiles' own statistics made."""
    attention = SelfAttention(4, 2, bias=True, depthwise_qkv=False, literal_scale=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), attention)
    image = two_sided(32, 48)[None]
    with torch.no_grad(), measured(net) as measure:
        _, whole = measure(image, torch.tensor([0, 32, 0, 48]))
        _, left = measure(image[..., :30], torch.tensor([0, 32, 0, 20]))
        _, right = measure(image[..., 10:], torch.tensor([0, 32, 10, 38]))
    both = left + right
    assert both.pixels == whole.pixels == 32 * 48
    torch.testing.assert_close(both.sums, whole.sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(96, 200), (101, 203)])
def test_two_passes_come_close_to_the_whole(net, size):
    image = two_sided(*size)
    whole = restore(net, image, device=CPU)
    cuts = {"tile": 96, "overlap": 48}
    tiled = restore(net, image, device=CPU, **cuts)
    naive = restore(net, image, device=CPU, statistics="tile", **cuts)
    assert rms(naive - whole) > 0.01
    # An untrained network mixes all it sees; of a trained one not a tenth is left (README).
    assert rms(tiled - whole) < 0.5 * rms(naive - whole)


def test_tiles_in_bfloat16(net):
    image = two_sided(96, 200)
    options = {"device": CPU, "tile": 96, "overlap": 48}
    precise = restore(net, image, **options)
    assert rms(restore(net, image, amp=True, **options) - precise) < 0.05 * rms(precise)


def test_no_seam_is_seen(net):
    """The gradient across tile borders stands out from its surroundings no more than without tiles."""
    image = two_sided(96, 400)
    whole = restore(net, image, device=CPU)
    tiled = restore(net, image, device=CPU, tile=96, overlap=48)
    borders = [x for span in cut(400, 96, 48, 8) for x in (span.start, span.stop)][1:-1]

    def prominence(restored):
        slope = restored.diff(dim=2).abs().mean((0, 1))
        at = torch.stack([slope[b - 1] for b in borders]).mean()
        around = torch.stack([slope[b - 9 : b + 8] for b in borders]).mean()
        return at / around

    assert abs(prominence(tiled) / prominence(whole) - 1) < 0.01


def test_local_statistics_of_a_huge_window_are_global(net):
    image = two_sided(40, 56)
    with torch.no_grad(), local_statistics(net, 128, 8) as local:
        out = local(image[None])[0]
    torch.testing.assert_close(out, restore(net, image, device=CPU), rtol=1e-4, atol=1e-5)


def test_local_means_are_those_of_windows():
    attention = ChannelAttention(3)
    x = torch.randn(1, 3, 32, 40)
    with torch.no_grad(), local_statistics(nn.Sequential(attention), 16, 8) as local:
        out = local(x)[0]
        means = x[:, :, 2:19, 12:29].mean((2, 3))  # 16 and one, around (10, 20)
        scale = attention.reduce(nn.functional.gelu(attention.expand(means))).sigmoid()
    torch.testing.assert_close(out[:, 10, 20], x[0, :, 10, 20] * scale[0])


def test_local_tiles_share_their_windows(net):
    """Away from the borders of tiles, local statistics do not depend on how the image was cut."""
    image = two_sided(96, 400)
    whole = restore(net, image, device=CPU, statistics="local", window=16)
    cuts = {"tile": 160, "overlap": 80}
    tiled = restore(net, image, device=CPU, statistics="local", window=16, **cuts)
    assert whole.std() > 1
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-3)


def test_a_network_is_left_as_it_was(net):
    before = [type(module) for module in net.modules()]
    image = torch.rand(3, 40, 40)
    for statistics in ("whole", "local", "tile"):
        restore(net, image, device=CPU, tile=32, overlap=8, statistics=statistics, window=16)
    assert [type(module) for module in net.modules()] == before


def test_tiles_that_cannot_overlap():
    with pytest.raises(ValueError, match=r"at most half their size.* Got tile=16, overlap=9"):
        restore(nn.Identity(), torch.rand(3, 8, 8), device=CPU, tile=16, overlap=9)


def test_windows_that_cannot_be_halved(net):
    with pytest.raises(ValueError, match=r"multiple of 16.* Got window=40"):
        restore(net, pad(torch.rand(3, 40, 40), 8), device=CPU, statistics="local", window=40)
