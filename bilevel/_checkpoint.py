"""States on disk: written as a whole or not at all, and checked to the byte when read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bilevel._errors import CheckpointError, check_kind
from bilevel._solution import Evaluations, State, Status

VERSION = 1
_HEADER = re.compile(rb"bilevel-state version (\d{1,9}) sha256 ([0-9a-f]{64})\n")
_LONGEST_HEADER = 128


def save_state(path: str | os.PathLike[str], state: State) -> None:
    """Write a state to a file, so that a crash at any moment leaves the old file or the new one.

    The file is a line with the format's version and a sha256, then the state as `torch.save`
    writes it. It holds tensors and plain Python values only. One process at a time may save to a
    path.

    Args:
        path: Where; an existing file is replaced.
        state: The state. Tensors are stored detached, on the device that they are on.

    Raises:
        TypeError: `path` is no path, `state` is no `State`, or its memory or metrics hold something else than
            tensors, numbers, strings, None, and dicts, lists and tuples of them.
        OSError: The file cannot be written; a file that was there before stays.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "state.pt"
        >>> save_state(file, State(torch.ones(2), {"w": torch.zeros(3)}, step=7))
        >>> load_state(file).step
        7
    """
    check_kind("save_state(path, ...)", path, (str, os.PathLike), "Pass the file, then the state.")
    mend = "Pass a `State`: what `iterate` yields, or `Solution.state`."
    check_kind("save_state(path, state)", state, State, mend)
    payload = _serialize(state)
    header = f"bilevel-state version {VERSION} sha256 {hashlib.sha256(payload).hexdigest()}\n"
    target = Path(path)
    temporary = target.with_name(
        f".{target.name}.tmp"
    )  # a killed save leaves one, the next takes it
    try:
        with open(temporary, "wb") as file:
            file.write(header.encode())
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        reason = f"The state was not saved, what was there before stays: {error.strerror}"
        raise OSError(error.errno, reason, str(target)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_state(
    path: str | os.PathLike[str], *, map_location: str | torch.device | None = None
) -> State:
    """Read a state that `save_state` wrote, and know that it is the one.

    No code in the file is run (`torch.load` with `weights_only=True`).

    Args:
        path: The file.
        map_location: The device for all tensors; where they were saved from if left out.

    Returns:
        A state equal to the saved one: values, dtypes, and the structure of all trees.

    Raises:
        CheckpointError: The file is no saved state, is cut short or altered, or has a later format.
        FileNotFoundError: There is no such file.
        TypeError: `path` is no path.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "state.pt"
        >>> save_state(file, State(torch.ones(2), [torch.zeros(3)], memory={"sigma": 0.1}))
        >>> state = load_state(file)
        >>> state.y, state.memory
        ([tensor([0., 0., 0.])], {'sigma': 0.1})
    """
    check_kind("load_state(path)", path, (str, os.PathLike), "Pass the file of `save_state`.")
    content = Path(path).read_bytes()
    header = _HEADER.match(content[:_LONGEST_HEADER])
    if header is None:
        raise _damaged(path, "it does not begin as a saved state", "Pass a file of `save_state`.")
    version, digest = int(header[1]), header[2].decode()
    if version != VERSION:
        raise _damaged(
            path,
            f"its format is version {version}, this library reads version {VERSION}",
            "Read it with the version of the library that wrote it.",
        )
    payload = memoryview(content)[header.end() :]
    if hashlib.sha256(payload).hexdigest() != digest:
        raise _damaged(
            path, "its bytes do not have the sha256 in its header", "Take the checkpoint before it."
        )
    return _restore(path, io.BytesIO(payload), map_location)


def _restore(path: Any, payload: io.BytesIO, map_location: Any) -> State:
    try:
        parts: dict[str, Any] = torch.load(payload, map_location=map_location, weights_only=True)
        parts["status"] = Status[parts["status"]]
        parts["evaluations"] = Evaluations(**parts["evaluations"])
        return State(**parts)
    except (pickle.UnpicklingError, KeyError, TypeError) as error:
        raise _damaged(
            path, f"it holds no state ({error})", "Read it with the library that wrote it."
        ) from error


def _damaged(path: Any, reason: str, mend: str) -> CheckpointError:
    return CheckpointError(
        f"`load_state(path)` must be given a file as `save_state` wrote it. "
        f"Got {os.fspath(path)!r}: {reason}. {mend}"
    )


def _serialize(state: State) -> memoryview:
    parts = {
        "x": _plain(state.x, "x"),
        "y": _plain(state.y, "y"),
        "step": state.step,
        "status": state.status.name,
        "metrics": _plain(state.metrics, "metrics"),
        "memory": _plain(state.memory, "memory"),
        "evaluations": asdict(state.evaluations),
        "message": state.message,
        "origin": state.origin,
        "recoveries": state.recoveries,
    }
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    return buffer.getbuffer()


def _plain(value: Any, where: str) -> Any:
    """The value in types that can be loaded without running code."""
    if isinstance(value, Tensor):
        leaf = value.detach()
        whole = leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()
        return leaf if whole else leaf.clone()  # else the whole storage of a view would be written
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((key, _plain(part, f"{where}[{key!r}]")) for key, part in items)
    if type(value) in (list, tuple):
        parts = (_plain(part, f"{where}[{i}]") for i, part in enumerate(value))
        return list(parts) if isinstance(value, list) else tuple(parts)
    for kind in (bool, int, float, str):  # NumPy's float64 is a float, and cannot be loaded
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise TypeError(
        "`State` must hold tensors, numbers, strings, None, and dicts, lists and tuples of them. "
        f"Got {type(value).__name__} in `{where}`. Convert it, e.g. with `torch.as_tensor(...)`."
    )


def _sync_folder(folder: Path) -> None:
    """Make the file's new name last through a power failure, where folders can be synced."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
