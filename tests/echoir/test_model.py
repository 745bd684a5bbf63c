import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from model import ABLATIONS, PRESETS, EchoIR, EchoIRConfig, count
from scenes import EXAMPLE

# Ours exactly, then the paper's parameters (M) and FLOPs (G) and the tolerance of each.
COUNTS = {
    "pixel_shuffle": (33_072_999, 188.10, 33.43, 183.33, 0.05),
    "transposed_conv": (29_976_759, 173.60, 30.25, 178.69, 0.05),
    "echo": (29_944_345, 177.25, 30.28, 176.35, 0.01),
    "gdfn_only": (22_882_009, 177.23, 22.98, 176.31, 0.01),
    # The paper's FLOPs of the two MLP rows contradict its other rows: not reproduced.
    "no_ca_no_gdfn": (13_134_921, 100.27, 13.12, None, None),
    "ca_only": (20_197_257, 100.28, 20.42, None, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    parameters, gflops, paper_millions, paper_gflops, tolerance = COUNTS[name]
    counted = count(ABLATIONS[name])
    assert counted["parameters"] == parameters
    assert round(counted["flops"] / 1e9, 2) == gflops
    assert parameters / 1e6 == pytest.approx(paper_millions, rel=0.015)
    if paper_gflops is not None:
        assert counted["flops"] / 1e9 == pytest.approx(paper_gflops, rel=tolerance)


# The paper's network, part by part.
PARTS = {
    "shallow": 1_344,
    "encoders.0": 160_364,
    "downsamplers.0": 41_568,
    "encoders.1": 923_592,
    "downsamplers.1": 166_080,
    "encoders.2": 3_613_200,
    "downsamplers.2": 663_936,
    "middle": 19_063_344,
    "upsamplers.2": 270_272,
    "fuses.2": 73_920,
    "decoders.2": 3_613_200,
    "upsamplers.1": 67_745,
    "fuses.1": 18_528,
    "decoders.1": 923_592,
    "upsamplers.0": 16_977,
    "fuses.0": 4_656,
    "decoders.0": 160_364,
    "final": 160_364,
    "reconstruction": 1_299,
}


def test_counts_of_every_part():
    with torch.device("meta"):
        net = EchoIR(PRESETS["paper"])
    counted = {name: net.get_submodule(name) for name in PARTS}
    assert {k: sum(p.numel() for p in v.parameters()) for k, v in counted.items()} == PARTS
    assert sum(PARTS.values()) == COUNTS["echo"][0]  # nothing is left out


@pytest.mark.parametrize(
    ("name", "hidden"), [("echo", (127, 255, 510, 1021)), ("ca_only", (64, 128, 256, 512))]
)
def test_hidden_widths_of_the_feedforward(name, hidden):
    with torch.device("meta"):
        net = EchoIR(ABLATIONS[name])
    feedforwards = [stage[0].feedforward for stage in (*net.encoders, net.middle)]
    assert tuple(f.narrow.in_channels for f in feedforwards) == hidden


def test_counts_of_the_other_presets():
    assert count(PRESETS["restormer_wide"], 64)["parameters"] == 30_282_662
    assert count(PRESETS["small"], 64)["parameters"] == 882_361
    assert count(PRESETS["cpu"], 64)["parameters"] == 881_755
    assert count(PRESETS["cpu_deep"], 64)["parameters"] == 1_022_240
    assert count(PRESETS["cpu_deeper"], 64)["parameters"] == 1_134_628


def test_json_has_one_row_for_each_ablation():
    command = [sys.executable, EXAMPLE / "model.py", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert rows.keys() == COUNTS.keys()
    assert all(rows[name]["parameters"] == COUNTS[name][0] for name in COUNTS)


TINY = EchoIRConfig(width=8, blocks=(1, 1, 1), heads=(1, 2, 4), final_blocks=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"upsampler": "pixel_shuffle"},
        {"upsampler": "transposed_conv"},
        {"upsampler": "bilinear"},
        {"echo": "image", "unshuffle": 2},
        {"combine": "product", "radius": 2},
        {"skip": "add"},
        {"skip": "none"},
        {"downsampler": "unshuffle", "wide_decoder": True, "depthwise_qkv": True, "bias": False},
        {"spatial": "dense", "expansion": 1.0, "unshuffle": 2},
        {"feedforward": "mlp", "channel_attention": False, "literal_scale": True},
    ],
    ids=str,
)
def test_every_option_restores_any_size_and_learns_everywhere(options):
    net = EchoIR(replace(TINY, **options))
    image = torch.rand(1, 3, 19, 26)
    out = net(image)
    assert out.shape == image.shape
    out.square().sum().backward()
    # A fresh network already uses all that it has; the upsamplers are linear in their values.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_twice_differentiable():
    net = EchoIR(TINY).double()
    parameters = list(net.parameters())
    loss = net(torch.rand(1, 3, 8, 8, dtype=torch.float64)).square().sum()
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    curvature = torch.autograd.grad(sum(s.square().sum() for s in slopes), parameters)
    assert all(c.isfinite().all() for c in curvature)


def test_under_autocast():
    net, image = EchoIR(TINY), torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(image)
    torch.testing.assert_close(half.float(), net(image), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (1, 1)}, "one number a level"),
        ({"upsampler": "nearest"}, "must be one of echo, pixel_shuffle"),
        ({"wide_decoder": True, "skip": "add"}, 'must have skip="concat"'),
        ({"width": 9}, "multiple of its heads. Got width=18, heads=4"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        EchoIR(replace(TINY, **({"heads": (1, 4, 4)} if "width" in options else {}), **options))
