import pytest
import torch
from ensemble import ORIENTATIONS, self_ensemble, turn, turn_back


def test_the_eight_are_all_and_can_be_undone():
    image = torch.rand(3, 4, 6)
    turned = [turn(image, *how) for how in ORIENTATIONS]
    assert len({str(t.tolist()) for t in turned}) == 8
    for t, how in zip(turned, ORIENTATIONS, strict=True):
        assert torch.equal(turn_back(t, *how), image)


def test_what_is_symmetric_gains_nothing():
    image = torch.rand(3, 5, 7)
    torch.testing.assert_close(self_ensemble(lambda x: 2 * x)(image), 2 * image)


@pytest.mark.parametrize("dim", [1, 2])
def test_a_shift_becomes_the_mean_of_four_neighbors(dim):
    """A shift to one side, which turns with the image, goes to each of the four sides twice."""
    image = torch.rand(3, 6, 6)
    expected = sum(image.roll(step, d) for step in (1, -1) for d in (1, 2)) / 4
    torch.testing.assert_close(self_ensemble(lambda x: x.roll(1, dim))(image), expected)
