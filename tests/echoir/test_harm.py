"""What comes from outside and means harm, or comes at a bad time: each ends with a message, not a traceback."""

import json
import resource
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from arguments import Arguments, settle, start_anew
from console import fail_plainly
from folders import find_pairs
from image_file import read_image
from model import PRESETS, EchoIR
from photographs import image_size, load_image
from PIL import Image, PngImagePlugin
from rich.console import Console
from scenes import save
from train import exit_codes
from weights import load_weights, save_weights

READERS = (load_image, image_size, read_image)


def png(width, height):
    """A file of a few bytes whose head claims so many pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 15_000), (20_000, 10_001)])
@pytest.mark.parametrize("read", READERS)
def test_more_than_two_hundred_megapixels_are_an_attack(read, size, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(*size))
    with pytest.raises(ValueError, match=r"bomb\.png: .*exceeds limit of 200000000 pixels"):
        read(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_photograph_of_two_hundred_megapixels_is_none(tmp_path):
    (tmp_path / "large.png").write_bytes(png(20_000, 10_000))
    assert image_size(tmp_path / "large.png") == (10_000, 20_000)


@pytest.mark.parametrize("read", READERS)
def test_a_note_that_unpacks_to_a_hundred_times_its_size_names_the_file(read, tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_text("comment", "0" * 20_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "note.png", pnginfo=note)
    with pytest.raises(ValueError, match=r"note\.png"):
        read(tmp_path / "note.png")


@pytest.mark.parametrize(
    "line", ["../secret.png a.png", "a.png x/../../secret.png", "{}/secret.png a.png"]
)
def test_a_list_of_pairs_does_not_lead_out_of_its_folder(line, tmp_path):
    data = tmp_path / "data"
    for path in (tmp_path / "secret.png", data / "a.png"):
        save(path, np.zeros((8, 8, 3), np.uint8))
    (data / "list.txt").write_text(line.format(tmp_path))
    with pytest.raises(ValueError, match=r"below its own folder.*secret\.png in line 1"):
        find_pairs(data / "list.txt")


def test_a_list_of_pairs_that_is_no_text_is_named(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"UTF-8. Got .*list\.txt"):
        find_pairs(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("known", "spoiled"),
    [
        (b'width\\": 16', b'width\\": 24'),  # other shapes than the tensors have
        (b'\\"width', b'\\"wodth'),  # an unknown name
        (b'\\"blocks', b'\\"blacks'),  # a missing one
        (b'width\\": 16', b'width\\": 1]'),  # no JSON
        (b'width\\": 16', b'width\\": -1'),
        (b'width\\": 16', b'width\\":9e9'),
    ],
)
def test_weights_whose_configuration_was_altered_are_named(known, spoiled, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, EchoIR(PRESETS["small"]), {})
    content = path.read_bytes()
    assert known in content
    path.write_bytes(content.replace(known, spoiled, 1))
    with pytest.raises(
        ValueError, match=r"fit the configuration in their file. Got .*weights\.saf"
    ):
        load_weights(path, torch.device("cpu"))


def test_arguments_that_are_damaged_are_named(tmp_path):
    start_anew(Arguments(output=tmp_path), ())
    assert settle(Arguments(output=tmp_path, resume=True)).steps is None
    path = tmp_path / "arguments.json"
    for content in (path.read_text()[:40], "[]", json.dumps({"unknown": 1}), ""):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"arguments\.json, which is damaged"):
            settle(Arguments(output=tmp_path, resume=True))


def ended(action):
    with pytest.raises(SystemExit) as left, fail_plainly(), exit_codes(Console(), "--resume"):
        action()
    return left.value.code


def raising(error):
    def action():
        raise error

    return action


def test_a_full_disk_ends_with_a_message(capsys):
    assert ended(raising(OSError(28, "No space left on device", "runs/state.pt"))) == 74
    assert "No space left on device: 'runs/state.pt'. Make room" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_no_memory_ends_with_what_to_lower(capsys):
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**40, before[1]))
    try:
        assert ended(lambda: torch.empty(2**40)) == 74
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert "--batch, --lower-batch and --patch in training, --tile" in capsys.readouterr().err


def test_an_error_of_another_kind_stays_one():
    with pytest.raises(RuntimeError, match="another"), fail_plainly():
        raise RuntimeError("another")


def test_ctrl_c_outside_of_the_steps_shows_no_traceback(capsys):
    assert ended(raising(KeyboardInterrupt())) == 75
    assert "go on with --resume" in capsys.readouterr().out
