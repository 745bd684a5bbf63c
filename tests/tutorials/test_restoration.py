"""A short training of the restoration tutorial, and its figure."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("skimage", reason="needs the `example` extra")

import restoration


@pytest.mark.slow
def test_training_restores_and_puts_the_weights_into_the_network() -> None:
    torch.manual_seed(0)
    photographs = restoration.bundled()
    net = restoration.EchoIR(restoration.PRESETS["cpu"])
    before, _ = restoration.psnr(restoration.judge(net, photographs))
    run = restoration.train(net, photographs, restoration.STEPS)
    *_, state = itertools.islice(run, 70)  # with the rate of the whole run, just past its rise
    assert state.step == 70
    result = restoration.judge(net, photographs)
    assert restoration.psnr(result)[1] > before + 0.5
    for name, leaf in {**state.x, **state.y}.items():
        assert torch.equal(dict(net.named_parameters())[name], leaf)
    *_, axes = restoration.drawing(result, [(20, 21.0), (40, 23.0)]).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [21.0, 23.0])


def test_levels_see_different_photographs() -> None:
    photographs = restoration.bundled()
    names = [{p.name for p in part} for part in (photographs.train, photographs.validation)]
    seen = {photographs.test[0].name}
    assert not names[0] & names[1]
    assert not seen & (names[0] | names[1])
    (batch,) = restoration.batches(photographs, 1)
    assert batch.upper.input.shape == (restoration.VALIDATION_PATCHES, 3, 48, 48)
    assert batch.lower.target.shape == (restoration.TRAINING_PATCHES, 3, 48, 48)
