"""Batches of patches, each a pure function of the seed and the step: a resumed run sees the same.

Patches are drawn where the gradients are: a patch of sky teaches little. A photograph that is yet
on disk is read when it is drawn from, several at a time.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from degradations import MARGIN, Degradation
from photographs import Photograph, Source
from torch import Tensor

STRIDE = 8  # pixels between two sites of a patch
READERS = 8  # threads that read photographs from disk


@dataclass(frozen=True)
class Patches:
    """What a level learns from: degraded patches and their truth, (B, 3, P, P)."""

    input: Tensor
    target: Tensor


class PatchSampler:
    """Draws patches from photographs.

    Args:
        photographs: where from.
        degrade: makes the input of a photograph that comes without one.
        size: height and width of a patch.
        device: of the batches.

    A photograph that is a little smaller than a patch is mirrored at its right and lower border, as in
    Restormer's training: Rain13K has images of 321 rows, and the paper's last patches have 336.

    Raises:
        ValueError: if a photograph is smaller than half a patch.
    """

    def __init__(
        self,
        photographs: Sequence[Source],
        degrade: Degradation,
        size: int,
        device: torch.device,
    ):
        for photograph in photographs:
            if 2 * min(photograph.size) < size:
                raise ValueError(
                    f"A photograph must be at least half as large as a patch ({size} x {size}), to be "
                    f"mirrored. Got {photograph.name} of size {photograph.size}. Take it out of the data, "
                    f"or lower --patch to {2 * min(photograph.size)}."
                )
        self.photographs = [
            _extend(photograph, size) if isinstance(photograph, Photograph) else photograph
            for photograph in photographs
        ]
        self.degrade = degrade
        self.size = size
        self.device = device
        self.densities = {  # of those in memory, once and for all
            i: _density(photograph.target, size)
            for i, photograph in enumerate(self.photographs)
            if isinstance(photograph, Photograph)
        }
        # Decoding releases the interpreter's lock; what is in memory needs no second thread.
        unread = len(self.densities) < len(photographs)
        self.map = ThreadPoolExecutor(READERS).map if unread else map
        areas = np.array([p.size[0] * p.size[1] for p in photographs], float)
        self.shares = areas / areas.sum()

    def batch(self, count: int, *key: int, share: slice = slice(None)) -> Patches:
        """The batch of a key, e.g. (seed, step, level): equal keys give equal batches.

        Of that batch, the `share` of one process: each draws its own patches only.
        """
        rng = np.random.default_rng(key)
        chosen = rng.choice(len(self.photographs), count, p=self.shares)
        # Each patch has a generator of its own, so that they may be drawn in any order.
        pairs = self.map(self._draw, chosen[share].tolist(), rng.spawn(count)[share])
        inputs, targets = zip(*pairs, strict=True)
        return Patches(self._tensor(inputs), self._tensor(targets))

    def _draw(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        photograph = _extend(self.photographs[index].read(), self.size)
        known = self.densities.get(index)
        density = _density(photograph.target, self.size) if known is None else known
        site = np.searchsorted(density, rng.random() * density[-1])
        (height, width), columns = photograph.size, (photograph.size[1] - self.size) // STRIDE + 1
        down, right = rng.integers(STRIDE, size=2)
        top = min(int(site) // columns * STRIDE + int(down), height - self.size)
        left = min(int(site) % columns * STRIDE + int(right), width - self.size)
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))

        def patch(image: np.ndarray, top: int, left: int, *, margin: int = 0) -> np.ndarray:
            rows = slice(max(top - margin, 0), top + self.size + margin)
            cut = image[rows, max(left - margin, 0) : left + self.size + margin]
            return cut.astype(np.float32) / 255

        target = patch(photograph.target, top, left)
        if photograph.input is not None:
            degraded = patch(photograph.input, top, left)
        else:
            # Kernels reach beyond the patch: degrade with a margin, where the photograph has one.
            wide = self.degrade(patch(photograph.target, top, left, margin=MARGIN), rng)
            degraded = wide[min(top, MARGIN) :, min(left, MARGIN) :][: self.size, : self.size]

        def turn(image: np.ndarray) -> np.ndarray:
            return np.rot90(image[:, ::-1] if mirror else image, turns)

        return turn(degraded), turn(target)

    def _tensor(self, images: Sequence[np.ndarray]) -> Tensor:
        """Stacks (P, P, 3) images to (B, 3, P, P), channels last in memory as convolutions like it."""
        stack = np.ascontiguousarray(np.stack(images))  # turned patches may come in another order
        return torch.from_numpy(stack).permute(0, 3, 1, 2).to(self.device)


def _extend(photograph: Photograph, size: int) -> Photograph:
    """Mirrors a photograph at its right and lower border until it is as large as a patch."""
    if min(photograph.size) >= size:
        return photograph
    lack = [(0, max(size - length, 0)) for length in photograph.size]
    images = (photograph.target, photograph.input)
    target, degraded = (
        None if image is None else np.pad(image, [*lack, (0, 0)], mode="symmetric")
        for image in images
    )
    return replace(photograph, target=target, input=degraded)


def _density(image: np.ndarray, size: int) -> np.ndarray:
    """The running sum, over the sites of a patch, of the gradient energy within it.

    Sites are eight pixels apart, and a patch is shifted at random by up to seven: a photograph from
    disk is looked at for a single patch, and this is ten times as fast as every place by itself.
    """
    height, width = image.shape[:2]
    green = image[..., 1].astype(np.int16)  # most of what the eye sees as light
    energy = np.zeros([-(-length // STRIDE) * STRIDE for length in (height, width)], np.int16)
    energy[: height - 1, : width - 1] = np.abs(np.diff(green, axis=0))[:, :-1]
    energy[: height - 1, : width - 1] += np.abs(np.diff(green, axis=1))[:-1]
    blocks = energy.reshape(energy.shape[0] // STRIDE, STRIDE, -1, STRIDE).sum((1, 3))
    total = np.pad(blocks, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    reach = -(-size // STRIDE)
    rows, columns = ((length - size) // STRIDE + 1 for length in (height, width))
    inside = (
        total[reach:, reach:]
        - total[:-reach, reach:]
        - total[reach:, :-reach]
        + total[:-reach, :-reach]
    )[:rows, :columns]
    return (inside.ravel() + 1e-3).cumsum()  # a flat photograph is drawn from evenly
