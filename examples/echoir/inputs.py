"""Which images are meant by files, folders and patterns, and where their restored copies go."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from photographs import SUFFIXES, is_image, list_images


@dataclass(frozen=True)
class Job:
    """An image to read, and the file to write."""

    source: Path
    target: Path


def find_jobs(inputs: Sequence[str], output: Path) -> list[Job]:
    """The images that are meant.

    Args:
        inputs: files; folders, whose images are meant; or patterns such as `album/**/*.jpg`, below
            whose first wildcard the folders are kept.
        output: the folder of the restored images.

    Raises:
        ValueError: if there is none, two would have one output, or an input would be overwritten.
    """
    if not inputs:
        raise ValueError("There must be an image or a folder to restore. Got none. Name one.")
    jobs: dict[Path, Job] = {}
    for path, name in (found for text in inputs for found in _find(text)):
        job = Job(path, output / name)
        key = job.target.resolve()
        if key in jobs and not path.samefile(jobs[key].source):
            raise ValueError(
                "Input images must have different names, because the outputs keep them. Got "
                f"{jobs[key].source} and {path}. Restore them into two folders."
            )
        jobs[key] = job
    for job in jobs.values():
        # Links and, on some systems, upper case make two names of one file.
        spoiled = job.target.exists() and any(job.target.samefile(j.source) for j in jobs.values())
        if spoiled:
            raise ValueError(
                f"The output must not replace an input. Got {job.source} and --output {output}: "
                f"{job.target} would be lost. Name another folder."
            )
    return list(jobs.values())


def left_out(inputs: Sequence[str]) -> str:
    """A line about what folders and patterns hold besides images; empty, if nothing."""
    folders = [Path(text) for text in inputs if Path(text).is_dir()]
    patterns = [text for text in inputs if not Path(text).exists()]
    inside = [path for folder in folders for path in folder.iterdir()]
    matches = [Path(match) for text in patterns for match in glob.glob(text, recursive=True)]
    files = sum(path.is_file() and not is_image(path) for path in inside + matches)
    below = [path for path in inside if path.is_dir()]
    parts = []
    if files:
        parts.append(f"{files} {'file' if files == 1 else 'files'} of other kinds")
    if below:
        words = "subfolder" if len(below) == 1 else "subfolders"
        pattern = below[0].parent / "**" / "*"
        parts.append(f"{len(below)} {words}, which e.g. '{pattern}' would reach")
    return f"left out: {', '.join(parts)}" if parts else ""


def _find(text: str) -> Iterator[tuple[Path, Path]]:
    """The images that a word of the command line means, each with its name below the output."""
    path = Path(text)
    if path.is_dir():
        yield from ((image, Path(image.name)) for image in list_images(path))
    elif path.exists():
        yield path, Path(path.name)
    elif glob.has_magic(text):
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = sorted(Path(match) for match in glob.glob(text, recursive=True))
        images = [match for match in found if is_image(match)]
        if not images:
            raise ValueError(
                f"A pattern must match an image ({', '.join(sorted(SUFFIXES))}). Got {text}, which "
                "matches none. Check the path, or convert the images."
            )
        yield from ((image, image.relative_to(root)) for image in images)
    else:
        raise ValueError(f"An input must exist. Got {text}. Check the path.")
