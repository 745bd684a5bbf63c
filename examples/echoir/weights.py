"""Weights with their configuration in one safetensors file, and a sha256 that a flipped byte fails."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from model import EchoIR, EchoIRConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from whole_file import replacing

# Blind denoisers, of noise that is independent from pixel to pixel and of what JPEG files make of it; the
# arguments and the log of each lie beside it.
DENOISER = Path(__file__).parent / "denoiser" / "weights.safetensors"
JPEG_DENOISER = Path(__file__).parent / "denoiser_jpeg" / "weights.safetensors"


def save_weights(path: Path, net: EchoIR, about: dict[str, Any]):
    """Writes a network's weights; the file is complete or absent, never half of one.

    Args:
        path: the file.
        net: the network.
        about: what a user of the weights wants to know (task, data, scores), of JSON's types.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    metadata = {
        "config": json.dumps(asdict(net.config)),
        "about": json.dumps(about),
        "sha256": _digest(tensors),
    }
    with replacing(path) as file:
        save_file(tensors, file, metadata)


def load_weights(path: Path, device: torch.device) -> tuple[EchoIR, dict[str, Any]]:
    """Reads what `save_weights` wrote.

    Returns:
        The network, in evaluation mode, and what is known about it.

    Raises:
        ValueError: if the file is missing, damaged, or not one of ours.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(
            f"The weights must be a file. Got {path}, which {found}. Train first, with "
            "`python examples/echoir/train.py`, or name another file."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"The weights must be a safetensors file. Got {path}: {error}. Copy or train it anew."
        ) from error
    if not {"config", "about", "sha256"} <= metadata.keys():
        raise ValueError(
            f"The weights must be written by this example's train.py. Got {path}, which lacks the "
            "network's configuration. Name another file by `--weights`."
        )
    if _digest(tensors) != metadata["sha256"]:
        raise ValueError(
            f"The weights must match their checksum. Got {path}, which does not: the file is "
            "damaged. Copy or train it anew."
        )
    net, about = _network(path, metadata, tensors)
    return net.to(device, memory_format=torch.channels_last).eval(), about


def _network(
    path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]
) -> tuple[EchoIR, dict[str, Any]]:
    """The network that the head of a file describes: first without storage, whatever size it claims."""
    try:
        config = json.loads(metadata["config"])
        config |= {"blocks": tuple(config["blocks"]), "heads": tuple(config["heads"])}
        with torch.device("meta"):
            net = EchoIR(EchoIRConfig(**config))
        net.load_state_dict(tensors, assign=True)
        return net, json.loads(metadata["about"])
    except (
        TypeError,
        KeyError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        first = str(error).strip().splitlines()[:2]
        raise ValueError(
            f"The weights must fit the configuration in their file. Got {path}, where they do not: "
            f"{' '.join(map(str.strip, first))} Copy or train it anew."
        ) from error


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
