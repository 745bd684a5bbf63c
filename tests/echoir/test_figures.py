import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from model import EchoIR, EchoIRConfig
from PIL import Image
from scenes import save, scene
from weights import save_weights

pytest.importorskip("matplotlib", reason="of the extra `plot`")

from comparison_figures import Comparison, draw_differences, most_detailed
from figures import Arguments, main
from training_figures import draw_training, draw_widths
from weight_figure import calls, draw_weights, strongest_edge

TINY = EchoIRConfig(width=8, blocks=(1, 1, 1), heads=(1, 1, 2), final_blocks=1, unshuffle=2)


def log(path):
    rows = [
        {"step": 10 * i, "seconds": float(i), "upper": 1 / i, "psnr": 20.0 + i} for i in (1, 2, 3)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    """A finished run of two methods."""
    for seed, method in enumerate(("asblo", "single-level")):
        torch.manual_seed(seed)
        log(tmp_path / "run" / method / "metrics.jsonl")
        about = {"task": "denoise", "sigma": 25.0}
        save_weights(tmp_path / "run" / method / "weights.safetensors", EchoIR(TINY), about)
    return tmp_path / "run"


def comparison(height=48, width=64):
    torch.manual_seed(0)
    target = torch.from_numpy(scene(np.random.default_rng(0), height, width)).permute(2, 0, 1) / 255
    noisy = target + 0.1 * torch.randn_like(target)
    return Comparison("p", target, noisy, {"asblo": 0.5 * (target + noisy)})


def test_one_command_draws_all(run, tmp_path, capsys):
    for i in range(2):
        save(tmp_path / "data" / f"{i}.png", scene(np.random.default_rng(i), 48, 64))
    main(Arguments(run, data=tmp_path / "data", name="1.png", box=16, device="cpu"))
    printed = capsys.readouterr().out.split("\n")[:-1]
    names = ["crops", "differences", "training", "widths", "weights"]
    assert printed == [str(run / "figures" / f"{name}.png") for name in names]
    for path in printed:
        with Image.open(path) as image:
            assert np.array(image).std() > 10  # not empty


def test_what_cannot_be_drawn(run, tmp_path):
    with pytest.raises(ValueError, match="no method has weights"):
        main(Arguments(tmp_path / "absent"))
    save(tmp_path / "data" / "a.png", scene(np.random.default_rng(0), 48, 64))
    options = {"data": tmp_path / "data", "device": "cpu", "box": 16}
    with pytest.raises(ValueError, match=r"must be one of a\.png\. Got 'b'"):
        main(Arguments(run, name="b", **options))
    with pytest.raises(ValueError, match=r"one of \[0, 1\]\. Got 2\. Use 0"):
        main(Arguments(run, level=2, **options))
    with pytest.raises(ValueError, match=r"`--box` must be above 0.* Got 0\."):
        main(Arguments(run, **options | {"box": 0}))
    with pytest.raises(ValueError, match=r"within \(48, 64\). Got \(48, 0\)"):
        main(Arguments(run, pixel=(48, 0), **options))


def test_differences_share_one_scale():
    figure = draw_differences([comparison(), replace(comparison(), name="q")])
    maps = [image for axis in figure.axes for image in axis.images if image.get_array().ndim == 2]
    assert len(maps) == 4
    assert len({image.get_clim() for image in maps}) == 1


def test_curves_are_the_logged_numbers(run):
    figure = draw_training({m: run / m / "metrics.jsonl" for m in ("asblo", "single-level")})
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["asblo", "single-level"]
    np.testing.assert_array_equal(lines[0].get_xydata(), [[1, 21], [2, 22], [3, 23]])
    assert not figure.axes[3].lines  # no value gap was logged


def test_widths_are_the_learned_ones():
    torch.manual_seed(0)
    net = EchoIR(TINY)
    net.upsamplers[1].log_spatial.data.fill_(np.log(0.8))
    figure = draw_widths({"asblo": net})
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.5, 0.8], rtol=1e-6)


@pytest.mark.parametrize("combine", ["sum", "product"])
@pytest.mark.parametrize("level", [0, 1])
def test_weights_of_a_pixel_make_its_value(combine, level):
    """What the figure shows is what the network does: the weighted mean of the values is the output."""
    torch.manual_seed(0)
    net = EchoIR(replace(TINY, combine=combine))
    net.upsamplers[level].log_range.data.fill_(-5.0)  # so narrow that the guide matters
    seen = {}
    hook = net.upsamplers[level].register_forward_hook(lambda *a: seen.setdefault("out", a[2]))
    image = comparison().input
    call = calls(net, image)[level]
    hook.remove()
    for pixel in ((0, 0), (5, 2), (11, 15)):
        weights = call.weights(pixel)
        assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
        y, x = weights.nonzero().T
        assert (y - pixel[0] // 2).abs().max() <= 1
        assert (x - pixel[1] // 2).abs().max() <= 1
        mixed = (call.value[0] * weights).sum((1, 2))
        torch.testing.assert_close(mixed, seen["out"][0, :, *pixel], rtol=1e-4, atol=1e-5)


def test_kernels_alone_are_their_formulas():
    torch.manual_seed(0)
    net = EchoIR(TINY)
    call = calls(net, comparison().input)[0]
    near = call.weights((8, 8), g=False)[3:6, 3:6]
    axis = torch.exp(-((torch.arange(-1, 2) + 0.25) ** 2) / (2 * 0.5**2))
    torch.testing.assert_close(near, axis[:, None] * axis / (axis[:, None] * axis).sum())
    flat = call.weights((8, 8), f=False)[3:6, 3:6]
    guide = call.guide[0, :, 6:12, 6:12].unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4))
    apart = (guide - call.guide[0, :, 8, 8][:, None, None]) ** 2
    torch.testing.assert_close(flat, (-apart.mean(0) / 2).flatten().softmax(0).view(3, 3))


def test_weights_are_drawn_at_the_image_s_corner():
    torch.manual_seed(0)
    figure = draw_weights(EchoIR(TINY), "asblo", comparison(), 0, (0, 0))
    assert figure.axes[1].images[0].get_array().shape == (2, 2)


def test_places_are_where_the_detail_is():
    image = torch.zeros(3, 60, 80)
    image[:, 30:40, 50:60] = torch.rand(3, 10, 10)
    top, left = most_detailed(image, 16)
    assert 24 <= top <= 30
    assert 44 <= left <= 50
    assert strongest_edge((torch.arange(80) >= 41).expand(3, 60, 80).float())[1] in (40, 41)
