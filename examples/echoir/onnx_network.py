"""An exported network in onnxruntime, which restores tiles as `whole_image.Measured` does."""

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from whole_image import Statistics


class OnnxNetwork:
    """A network that export.py wrote.

    Args:
        path: the file.

    Raises:
        ValueError: if onnxruntime is missing, or the file is not one of ours.
    """

    def __init__(self, path: Path):
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(
                "An exported network must have onnxruntime to run. Got an environment without it. Install it: "
                "pip install -e '.[onnx]'."
            ) from error
        if not path.is_file():
            raise ValueError(
                f"The weights must be a file. Got {path}, which does not exist. Write it by export.py."
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; inputs with a value of their own are meant
        options.enable_cpu_mem_arena = False  # it keeps what it had, and two sizes of tiles twice
        try:
            self.session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ValueError(
                f"The weights must be an ONNX file. Got {path}: {error}. Write it anew by export.py."
            ) from error
        known = self.session.get_modelmeta().custom_metadata_map
        if not {"multiple", "shapes"} <= known.keys():
            raise ValueError(
                f"The weights must be written by this example's export.py. Got {path}, which lacks the sizes of "
                "its statistics. Name another file by `--weights`."
            )
        self.multiple = json.loads(known["multiple"])
        self.shapes = json.loads(known["shapes"])

    def __call__(
        self, image: Tensor, core: Tensor | None = None, given: Statistics | None = None
    ) -> tuple[Tensor, Statistics]:
        """Restores a tile; arguments and result as of `Measured`."""
        feed = {"image": image.numpy()}
        if core is not None:
            feed["core"] = core.float().numpy()
        if given is not None:
            feed["statistics"] = flatten(given).numpy()
        restored, found = map(torch.from_numpy, self.session.run(None, feed))
        return restored, unflatten(found, self.shapes)


def flatten(statistics: Statistics) -> Tensor:
    """Statistics as one vector: the number of pixels, then the sums."""
    return torch.cat([statistics.pixels.reshape(1), *(each.flatten() for each in statistics.sums)])


def unflatten(vector: Tensor, shapes: Sequence[Sequence[int]]) -> Statistics:
    """Undoes `flatten`."""
    pixels, *sums = vector.split([1, *(prod(shape) for shape in shapes)])
    sums = tuple(part.reshape(tuple(shape)) for part, shape in zip(sums, shapes, strict=True))
    return Statistics(pixels.reshape(()), sums)
