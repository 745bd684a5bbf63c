"""Exports trained weights to ONNX, for programs without torch.

    python examples/echoir/export.py                                     # runs/echoir/weights.safetensors to .onnx
    python examples/echoir/restore.py PHOTO --output restored --weights runs/echoir/weights.onnx

Needs the extra `onnx`: `pip install -e '.[onnx]'`. The file has one input that must be given and two that may be:

    image        (1, 3, H, W), float32 in [0, 1]; H and W multiples of 8 (the metadata's `multiple`)
    core         (4,): top, bottom, left and right of the part whose statistics are wanted; all by default
    statistics   (S,): those of the image that `image` is a tile of; its own by default

and returns the restored image and the statistics of the core, which add up over tiles. So a large image is restored
as if it were in one piece: once over its tiles for the sum of their statistics, once more with it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from console import fail_plainly
from echo_upsampler import EchoUpsampler, upsample_reference
from model import EchoIR
from onnx_network import OnnxNetwork, flatten, unflatten
from parts import replaced
from torch import Tensor, nn
from weights import load_weights
from whole_image import Measured, measured

SIZES = ((64, 96), (40, 56))  # of the images on which the two are compared
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Arguments:
    """Exports trained weights to ONNX.

    Attributes:
        weights: file written by train.py.
        output: the file to write; the weights' name with another suffix by default.
    """

    weights: Path = Path("runs/echoir/weights.safetensors")
    output: Path | None = None


def main(a: Arguments):
    net, about = load_weights(a.weights, torch.device("cpu"))
    output = a.output or a.weights.with_suffix(".onnx")
    if output.suffix != ".onnx" or output.is_dir():
        raise ValueError(
            "`--output` must be a file whose name ends in .onnx, by which restore.py knows it. Got "
            f"{output}. Use e.g. weights.onnx."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    export(net, output, about)
    worst = difference(net, output)
    if not worst < TOLERANCE:
        raise ValueError(
            f"The exported network must give torch's numbers to {TOLERANCE:g}. Got {output}, {worst:.1e} off. "
            "Another version of onnxruntime may do better."
        )
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {worst:.1e} from torch")


def export(net: EchoIR, path: Path, about: dict):
    """Writes a network as an ONNX file.

    Args:
        net: the network.
        path: the file.
        about: what a user of the weights wants to know, kept in the metadata.

    Raises:
        ValueError: if the packages are missing.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch needs it)
    except ImportError as error:
        raise ValueError(
            f"Export must have the packages of the extra `onnx`. Got {error}. Install them: pip install -e '.[onnx]'."
        ) from error
    multiple = net.config.multiple
    net = net.to(memory_format=torch.contiguous_format)
    side = {axis: multiple * torch.export.Dim(name) for axis, name in ((2, "rows"), (3, "columns"))}
    image, core = torch.zeros(1, 3, 4 * multiple, 6 * multiple), torch.tensor([0.0, 1e9, 0.0, 1e9])
    with torch.no_grad(), replaced(net, (EchoUpsampler,), _Plain), measured(net) as measure:
        _, own = measure(image, core)
        nothing = torch.zeros_like(flatten(own))
        shapes = [tuple(each.shape) for each in own.sums]
        program = torch.onnx.export(
            _Flat(measure, shapes).eval(),
            (image, core, nothing),
            dynamic_shapes=(side, None, None),
            input_names=["image", "core", "statistics"],
            output_names=["restored", "found"],
            verbose=False,
        )
    model = program.model_proto
    # An input with a value of its own may be left out.
    model.graph.initializer.append(onnx.numpy_helper.from_array(core.numpy(), "core"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(nothing.numpy(), "statistics"))
    known = {"multiple": multiple, "shapes": shapes, "about": about, "config": asdict(net.config)}
    metadata = {name: json.dumps(value) for name, value in known.items()}
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def difference(net: EchoIR, path: Path) -> float:
    """The largest difference of the two networks' outputs, on images of several sizes."""
    exported = OnnxNetwork(path)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 3, *size, generator=generator) for size in SIZES]
    with torch.no_grad():
        return max(float((exported(image)[0] - net(image)).abs().max()) for image in images)


class _Plain(nn.Module):
    """An Echo-Upsampler by the readable formula: no step of it depends on the image's size."""

    def __init__(self, upsampler: EchoUpsampler):
        super().__init__()
        self.upsampler = upsampler

    def forward(self, x: Tensor, echo: Tensor) -> Tensor:
        up = self.upsampler
        kernels = up.log_spatial.exp(), up.log_range.exp()
        options = {"radius": up.radius, "combine": up.combine}
        return upsample_reference(up.reduce(x), up.guide(echo), *kernels, **options)


class _Flat(nn.Module):
    """A measured network with its statistics as one vector."""

    def __init__(self, measure: Measured, shapes: list[tuple[int, ...]]):
        super().__init__()
        self.measure, self.shapes = measure, shapes

    def forward(self, image: Tensor, core: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        restored, found = self.measure(image, core, unflatten(statistics, self.shapes))
        return restored, flatten(found)


if __name__ == "__main__":
    with fail_plainly():
        main(tyro.cli(Arguments))
