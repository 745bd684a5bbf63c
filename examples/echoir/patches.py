"""Batches of patches, each a pure function of the seed and the step: a resumed run sees the same.

Patches are drawn where the gradients are: a patch of sky teaches little. A photograph that is yet
on disk is read when it is drawn from: twenty milliseconds for one of 500 x 500 pixels and its input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from degradations import MARGIN, Degradation
from photographs import Photograph, Source
from torch import Tensor


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

    Raises:
        ValueError: if a photograph is smaller than a patch.
    """

    def __init__(
        self,
        photographs: Sequence[Source],
        degrade: Degradation,
        size: int,
        device: torch.device,
    ):
        for photograph in photographs:
            if min(photograph.size) < size:
                raise ValueError(
                    f"A photograph must be at least as large as a patch ({size} x {size}). Got "
                    f"{photograph.name} of size {photograph.size}. Take it out of the "
                    "data, or ask for smaller patches."
                )
        self.photographs = photographs
        self.degrade = degrade
        self.size = size
        self.device = device
        self.densities = {  # of those in memory, once and for all
            i: _density(photograph.target, size)
            for i, photograph in enumerate(photographs)
            if isinstance(photograph, Photograph)
        }
        areas = np.array([p.size[0] * p.size[1] for p in photographs], float)
        self.shares = areas / areas.sum()

    def batch(self, count: int, *key: int) -> Patches:
        """The batch of a key, e.g. (seed, step, level): equal keys give equal batches."""
        rng = np.random.default_rng(key)
        chosen = rng.choice(len(self.photographs), count, p=self.shares)
        pairs = [self._draw(int(i), rng) for i in chosen]
        inputs, targets = zip(*pairs, strict=True)
        return Patches(self._tensor(inputs), self._tensor(targets))

    def _draw(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        photograph = self.photographs[index].read()
        known = self.densities.get(index)
        density = _density(photograph.target, self.size) if known is None else known
        columns = photograph.target.shape[1] - self.size + 1
        top, left = divmod(int(np.searchsorted(density, rng.random() * density[-1])), columns)
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


def _density(image: np.ndarray, size: int) -> np.ndarray:
    """The running sum, over all positions of a patch, of the gradient energy within it."""
    gray = image.astype(np.float64).mean(-1)
    energy = np.abs(np.diff(gray, axis=0))[:, :-1] + np.abs(np.diff(gray, axis=1))[:-1]
    energy = np.pad(energy, ((1, 1), (1, 1)))  # (H + 1, W + 1): a leading zero for the sums below
    total = energy.cumsum(0).cumsum(1)
    inside = (
        total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
    )
    return (inside.ravel() + 1e-3).cumsum()  # a flat photograph is drawn from evenly
