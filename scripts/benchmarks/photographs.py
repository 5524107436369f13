"""The photographs that `input` reads, with their sizes after the resize. Standard library only, for every variant."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from benchmarks.work import BenchmarkError, Task

IMAGES = 64
"""Number of images read per repetition: the first ones of the JSON."""
MULTIPLE = 32
"""Sides of padded shapes are multiples of this, pixels."""
QUIET = 0.01
"""Seconds between two checks for running threads."""


class Photograph(NamedTuple):
    """A file and its target sizes."""

    path: str
    size_hw: tuple[int, int]
    """Height and width after the resize, pixels, by Detectron's rule."""
    padded_hw: tuple[int, int]
    """Height and width after padding: the smallest of the six padded shapes of this project's training."""


def photographs(task: Task) -> list[Photograph]:
    """Returns the first IMAGES of `task.annotations`; short and long side are the two numbers of `task.size`.

    Raises BenchmarkError if the file is not a COCO JSON with images, or an image is missing.
    """
    try:
        entries = json.loads(Path(task.annotations).read_text())["images"][:IMAGES]
        found = [_photograph(Path(task.images), entry, *task.padded_hw) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BenchmarkError(f"{task.annotations}: must be a COCO JSON with images ({error!r})") from None
    absent = [photograph.path for photograph in found if not Path(photograph.path).is_file()]
    if absent or not found:
        raise BenchmarkError(f"{absent[0]}: no such file" if absent else f"{task.annotations}: has no images")
    return found


def in_batches(walk: list[Photograph], batch: int) -> list[Photograph]:
    """Orders photographs so that each `batch` in sequence has one padded shape.

    Each photograph occurs `batch` times and waits until there are `batch` of its shape, so none is left at the end.
    """
    waiting: defaultdict[tuple[int, int], list[Photograph]] = defaultdict(list)
    ordered = []
    for photograph in walk * batch:
        queue = waiting[photograph.padded_hw]
        queue.append(photograph)
        if len(queue) == batch:
            ordered += queue
            queue.clear()
    return ordered


def batches_per_repetition(batch: int) -> int:
    """Returns the number of full batches in IMAGES, at least 1."""
    return max(1, IMAGES // batch)


def rest() -> None:
    """Waits until no thread of this process is busy, so that a repetition's time includes the prefetching it caused."""
    while True:
        used = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - used < QUIET / 10 and not _waits_for_a_core():
            return


def _waits_for_a_core() -> bool:
    """Returns whether another thread is runnable or reading; False if the system has no /proc."""
    states = []
    for thread in Path("/proc/self/task").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # The thread has ended.
            states.append(thread.read_text().rpartition(")")[2].split()[0])
    return sum(state in ("R", "D") for state in states) > 1  # One is this thread.


def _photograph(folder: Path, entry: dict, short: int, long: int) -> Photograph:
    sides = entry["height"], entry["width"]
    scale = min(short / min(sides), long / max(sides))
    size = max(1, int(sides[0] * scale + 0.5)), max(1, int(sides[1] * scale + 0.5))
    lower, longest = _padded(short), _padded(long)
    shapes = [
        shape
        for side in (*(min(_padded(ratio * short), longest) for ratio in (4 / 3, 3 / 2)), longest)
        for shape in ((min(lower, longest), side), (side, min(lower, longest)))
        if size[0] <= shape[0] and size[1] <= shape[1]
    ]
    return Photograph(str(folder / entry["file_name"]), size, min(shapes, key=math.prod))


def _padded(side: int | float) -> int:
    return math.ceil(side / MULTIPLE) * MULTIPLE
