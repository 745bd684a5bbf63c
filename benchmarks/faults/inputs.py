"""What comes into the EchoIR example from outside: images, lists of them, weights, folders, paths."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.faults.checkpoints import Malicious
from benchmarks.faults.fault import Fault, Lost, expect, message_of

# The example's files import each other by their bare names.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "echoir"))

import folders
import image_file
import photographs
import restore
import weights

EXAMPLE = Path(photographs.__file__).parent
CPU = torch.device("cpu")
MANY = 100_000
LINKS = 50_000  # of a file, which may not have many more


def photograph(height: int = 60, width: int = 70, seed: int = 0) -> Image.Image:
    """A smooth color with noise on it."""
    draw = np.random.default_rng(seed)
    pixels = draw.uniform(40, 200, 3) + draw.normal(0, 20, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def album(folder: Path, count: int = 5) -> Path:
    """A folder of a few photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        photograph(60 + i, seed=i).save(folder / f"photo{i}.png")
    return folder


def refused(path: Path) -> None:
    """All that read an image name the file, and raise a ValueError."""
    for read in (photographs.load_image, image_file.read_image):
        message_of(ValueError, lambda read=read: read(path), path.name)


def truncated(folder: Path) -> str:
    for suffix in ("png", "jpg", "tif", "webp", "bmp"):
        whole = folder / f"whole.{suffix}"
        photograph().save(whole)
        content = whole.read_bytes()
        for share in (0.0, 0.02, 0.5, 0.9):
            path = folder / f"cut.{suffix}"
            path.write_bytes(content[: int(share * len(content))])
            refused(path)
    return "ValueError that names the file: PNG, JPEG, TIFF, WebP, BMP"


def scrambled(folder: Path) -> str:
    """Random bytes changed anywhere: an error that names the file, or an image."""
    photograph().save(folder / "whole.png")
    photograph().save(folder / "whole.jpg")
    photograph().save(folder / "whole.tif", compression="tiff_lzw")
    draw = np.random.default_rng(0)
    for suffix in ("png", "jpg", "tif"):
        content = (folder / f"whole.{suffix}").read_bytes()
        path = folder / f"scrambled.{suffix}"
        for _ in range(100):
            spoiled = np.frombuffer(content, np.uint8).copy()
            spoiled[draw.integers(0, len(spoiled), 8)] = draw.integers(0, 256, 8)
            path.write_bytes(spoiled.tobytes())
            for read in (photographs.load_image, photographs.image_size, image_file.read_image):
                try:
                    with silenced():
                        read(path)
                except ValueError as error:
                    expect(path.name in str(error), f"a message without the file: {error}")
    return "an image, or a ValueError that names the file: 300 files, three readers"


def mislabeled(folder: Path) -> str:
    photograph().convert("L").save(folder / "jpeg.jpg")
    (folder / "jpeg.jpg").rename(folder / "jpeg.png")
    expect(photographs.load_image(folder / "jpeg.png").shape == (60, 70, 3), "not read")
    (folder / "text.png").write_text("no image")
    (folder / "folder.png").mkdir()
    for name in ("text.png", "folder.png"):
        refused(folder / name)
    return "a JPEG named .png is read as what it is; text and a folder are refused by name"


def png(width: int, height: int) -> bytes:
    """A PNG of so many pixels in a few bytes; its data end at once."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


def bomb(width: int, height: int, folder: Path) -> str:
    path = folder / "bomb.png"
    path.write_bytes(png(width, height))
    for read in (photographs.load_image, photographs.image_size, image_file.read_image):
        message_of(ValueError, lambda read=read: read(path), path.name, "pixels")
    return f"ValueError with the file and its pixels, from its head, {path.stat().st_size} bytes"


def text_bomb(folder: Path) -> str:
    """A note that unpacks to a gigabyte."""
    note = PngInfo()
    note.add_text("comment", "0" * 200_000_000, zip=True)
    photograph().save(folder / "note.png", pnginfo=note)
    size = (folder / "note.png").stat().st_size
    expect(size < 1_000_000, f"the file has {size} bytes")
    refused(folder / "note.png")
    return "ValueError that names the file"


def restored_into(out: Path, source: Path, folder: Path) -> None:
    """Restores a folder, without a word on the screen."""
    words = {"weights": weights_file(folder), "device": "cpu", "tile": 64, "overlap": 8}
    with silenced():
        restore.main(restore.Arguments((str(source),), output=out, **words))


@contextmanager
def silenced() -> Iterator[None]:
    """Sends what is printed nowhere, what libraries in C print too."""
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            for number, known in enumerate(kept, 1):
                os.dup2(known, number), os.close(known)


def broken_among_good(folder: Path) -> str:
    """One bad file of an album costs that file alone."""
    source, out = album(folder / "album"), folder / "out"
    (source / "photo1.png").write_bytes((source / "photo1.png").read_bytes()[:300])
    try:
        restored_into(out, source, folder)
    except SystemExit as stop:
        expect(stop.code == 1, f"exit code {stop.code}")
    restored = {path.name for path in out.iterdir()}
    expect(restored == {f"photo{i}.png" for i in (0, 2, 3, 4)}, f"restored: {restored}", Lost)
    return "named; the other four are restored; exit code 1"


def listed(lines: str, word: str, folder: Path) -> str:
    """A list of pairs that reaches for files outside of its folder."""
    secret = folder / "secret"
    secret.mkdir()
    photograph().save(secret / "a.png")
    data = folder / "data"
    data.mkdir()
    photograph().save(data / "b.png")
    (data / "list.txt").write_text(lines.format(secret=secret))
    return message_of(ValueError, lambda: folders.find_pairs(data / "list.txt"), word, "line 1")


def binary_list(folder: Path) -> str:
    (folder / "list.txt").write_bytes(bytes(range(128, 256)))
    return message_of(ValueError, lambda: folders.find_pairs(folder / "list.txt"), "list.txt")


def links(folder: Path) -> str:
    """Data sets are often links: one that leads nowhere is named, one in a circle too."""
    data = album(folder / "data", 3)
    (data / "good.png").symlink_to(data / "photo0.png")
    expect(len(folders.load_folder(data)) == 4, "a link is not followed")
    (data / "nowhere.png").symlink_to(folder / "none.png")
    message_of(ValueError, lambda: folders.load_folder(data), "nowhere.png")
    (data / "nowhere.png").unlink()
    (data / "circle.png").symlink_to(data / "circle.png")
    message_of(ValueError, lambda: folders.load_folder(data), "circle.png")
    return "followed; ValueError that names the one that leads nowhere, or in a circle"


def many_files(folder: Path) -> str:
    """Links to one file, so that the fault costs no disk."""
    many = folder / "many"
    many.mkdir()
    for i in range(MANY):
        if i % LINKS == 0:
            one = folder / f"one{i}.png"
            photograph(16, 16).save(one)
        os.link(one, many / f"{i}.png")
    found = photographs.list_images(many)
    expect([path.stem for path in found[:3]] == ["0", "1", "2"], "not in natural order")
    expect(len(found) == MANY, f"{len(found)} are found", Lost)
    parts = photographs.split([folders.alone(p) for p in found[:2000]], validation=0.5, seed=0)
    expect(len(parts.test) == photographs.TESTED, f"{len(parts.test)} are held out")
    return f"all {MANY:,} are found, in natural order; no more than {len(parts.test)} are held out"


def empty_folder(folder: Path) -> str:
    for path, word in ((folder, "Got none"), (folder / "none", "must exist")):
        message_of(ValueError, lambda path=path: folders.load_folder(path), word, str(path))
    return "ValueError with the path"


def pairs_apart(folder: Path) -> str:
    album(folder / "input", 3), album(folder / "target", 2)
    message_of(ValueError, lambda: folders.load_folder(folder), "photo2.png")
    album(folder / "target", 3)
    photograph(10, 10).save(folder / "target" / "photo0.png")
    message_of(ValueError, lambda: folders.load_folder(folder), "one size", "photo0.png")
    return "ValueError that names the lonely file, and the pair of two sizes"


def odd_paths(folder: Path) -> str:
    for name in ("a b", "Äpfel & Birnen", "日本 語", "[x]", "e\u0301", "'q'"):
        source, out = album(folder / name, 1), folder / f"{name} out"
        restored_into(out, source, folder)
        expect((out / "photo0.png").is_file(), f"{name!r} is not restored", Lost)
    return "restored: spaces, umlauts, Japanese, brackets, quotes"


def network() -> weights.EchoIR:
    from model import PRESETS

    torch.manual_seed(0)
    return weights.EchoIR(PRESETS["small"])


def weights_file(folder: Path) -> Path:
    path = folder / "weights.safetensors"
    weights.save_weights(path, network(), {"task": "denoise"})
    return path


def damaged_weights(change: Callable[[bytes], bytes], folder: Path) -> str:
    path = weights_file(folder)
    path.write_bytes(change(path.read_bytes()))
    message_of(ValueError, lambda: weights.load_weights(path, CPU), path.name)
    return "ValueError that names the file"


def flipped_weights(folder: Path) -> str:
    path = weights_file(folder)
    content, draw = path.read_bytes(), np.random.default_rng(0)
    head = 8 + struct.unpack("<Q", content[:8])[0]
    # the head holds the configuration; what is not read (`about`) may change, so only errors count
    for position in [*draw.integers(0, head, 150), *draw.integers(head, len(content), 50)]:
        spoiled = bytearray(content)
        spoiled[position] ^= 1 << int(draw.integers(8))
        path.write_bytes(spoiled)
        try:
            weights.load_weights(path, CPU)
        except ValueError as error:
            expect(path.name in str(error), f"a message without the file: {error}")
            continue
        expect(position < head, "a flipped byte in the weights is read as if it were whole")
    return "ValueError that names the file at each flip in the weights; no other error anywhere"


def malicious_weights(folder: Path) -> str:
    proof, path = folder / "proof", folder / "weights.safetensors"
    for content in (pickle.dumps(Malicious(proof)), b"PK\x03\x04" + pickle.dumps(Malicious(proof))):
        path.write_bytes(content)
        message_of(ValueError, lambda: weights.load_weights(path, CPU), path.name)
    torch.save({"a": Malicious(proof)}, path)
    message_of(ValueError, lambda: weights.load_weights(path, CPU), path.name)
    expect(not proof.exists(), "its code was run")
    return "ValueError that names the file; no code was run"


def malicious_checkpoint(folder: Path) -> str:
    import checkpoint

    proof = folder / "proof"
    step = folder / "checkpoints" / "step-00000009"
    step.mkdir(parents=True)
    for name in ("state.pt", "average.pt"):
        torch.save(Malicious(proof), step / name)
    (step / "run.json").write_text(json.dumps({"seconds": 1.0, "finished": False}))
    load = partial(checkpoint.load, folder / "checkpoints", CPU)
    message_of(ValueError, load, "damaged", "step-00000009")
    expect(not proof.exists(), "its code was run")
    return "ValueError that names it as damaged; no code was run"


FAULTS = [
    Fault("a truncated image", "cut at 0, 2, 50 and 90 % of five formats", truncated),
    Fault("an image with random bytes", "eight bytes changed, 300 times", scrambled),
    Fault("a mislabeled image", "a JPEG, text and a folder named .png", mislabeled),
    Fault("a decompression bomb", "a PNG of 60,000 x 60,000", partial(bomb, 60_000, 60_000)),
    Fault("a smaller one", "a PNG of 20,000 x 15,000", partial(bomb, 20_000, 15_000)),
    Fault("a decompression bomb in a note", "a zTXt chunk of 200 MB", text_bomb),
    Fault("a damaged image in an album", "restore.py on five, one cut", broken_among_good),
    Fault(
        "a list of pairs leads out of its folder, by dots",
        "`../secret/a.png b.png`",
        partial(listed, "../secret/a.png b.png", "../secret/a.png"),
    ),
    Fault(
        "a list of pairs leads out of its folder, by an absolute path",
        "`/.../secret/a.png b.png`",
        partial(listed, "{secret}/a.png b.png", "secret"),
    ),
    Fault(
        "a broken line in a list of pairs",
        "one path for two",
        partial(listed, "b.png", "Got 1"),
    ),
    Fault("a list of pairs that is no text", "bytes from 128 to 255", binary_list),
    Fault("links in a folder of images", "to a file, to nowhere, to itself", links),
    Fault("a folder with very many files", f"{MANY:,} files", many_files),
    Fault("a folder without images", "empty, and missing", empty_folder),
    Fault("pairs that do not match", "a target is missing; two sizes", pairs_apart),
    Fault("odd paths for restore.py", "spaces, Unicode, brackets, quotes", odd_paths),
    Fault(
        "truncated weights",
        "half of the file",
        partial(damaged_weights, lambda c: c[: len(c) // 2]),
    ),
    Fault("empty weights", "no byte", partial(damaged_weights, lambda _: b"")),
    Fault(
        "weights of another configuration",
        "the width in their head is changed",
        partial(damaged_weights, lambda c: c.replace(b'width\\": 16', b'width\\": 24', 1)),
    ),
    Fault(
        "weights with an unknown configuration",
        "a name in their head is changed",
        partial(damaged_weights, lambda c: c.replace(b'\\"width', b'\\"wodth', 1)),
    ),
    Fault("a flipped bit in weights", "200 random bits", flipped_weights),
    Fault("a malicious pickle as weights", "`__reduce__` makes a folder", malicious_weights),
    Fault("a malicious pickle as a checkpoint", "of train.py --resume", malicious_checkpoint),
]
