"""Self-ensemble: the mean of what a network makes of an image's eight flips and rotations.

From *Seven Ways to Improve Example-Based Single Image Super Resolution* (Timofte et al., CVPR
2016). The errors of the eight are not the same, so the mean has less. It costs eight times as much.
"""

from collections.abc import Callable

from torch import Tensor

ORIENTATIONS = [(turns, mirror) for turns in range(4) for mirror in (False, True)]


def turn(image: Tensor, turns: int, mirror: bool) -> Tensor:
    """Mirrors an image, (C, H, W), left to right, then turns it by quarters of a circle."""
    return (image.flip(2) if mirror else image).rot90(turns, (1, 2))


def turn_back(image: Tensor, turns: int, mirror: bool) -> Tensor:
    """Undoes `turn`."""
    image = image.rot90(-turns, (1, 2))
    return image.flip(2) if mirror else image


def self_ensemble(restore: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function that restores an image, (3, H, W), in all eight ways and takes the mean."""

    def restored(image: Tensor) -> Tensor:
        total = image.new_zeros(image.shape)
        for turns, mirror in ORIENTATIONS:
            total += turn_back(restore(turn(image, turns, mirror)), turns, mirror)
        return total / len(ORIENTATIONS)

    return restored
