"""The photographs that `input` reads, and the size each becomes. Plain Python, so that every variant has it."""

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
"""The first ones of the JSON: what a repetition reads, once each where batches come out even."""
MULTIPLE = 32
"""Of the sides of a canvas, pixels."""
QUIET = 0.01
"""Seconds between two looks at whether anything is still being made."""


class Photograph(NamedTuple):
    """A file, and what is to become of it."""

    path: str
    size_hw: tuple[int, int]
    """Height and width after the resize, pixels: the rule of Detectron."""
    canvas: tuple[int, int]
    """Height and width with the padding: the smallest of the four canvases that this project's training pads to."""


def photographs(task: Task) -> list[Photograph]:
    """The first IMAGES of `task.annotations`; short and long side are the two numbers of `task.size`.

    Raises BenchmarkError, one line, where the file is no COCO JSON of images or one of them is absent.
    """
    try:
        entries = json.loads(Path(task.annotations).read_text())["images"][:IMAGES]
        found = [_photograph(Path(task.images), entry, *task.canvas) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BenchmarkError(f"{task.annotations}: must be a COCO JSON with images ({error!r})") from None
    absent = [photograph.path for photograph in found if not Path(photograph.path).is_file()]
    if absent or not found:
        raise BenchmarkError(f"{absent[0]}: no such file" if absent else f"{task.annotations}: has no images")
    return found


def in_batches(walk: list[Photograph], batch: int) -> list[Photograph]:
    """Photographs to read from first to last, again and again, each `batch` in a row of one canvas.

    They are walked through `batch` times. Each waits until as many of its canvas are there: after the last walk none does.
    """
    waiting: defaultdict[tuple[int, int], list[Photograph]] = defaultdict(list)
    ordered = []
    for photograph in walk * batch:
        queue = waiting[photograph.canvas]
        queue.append(photograph)
        if len(queue) == batch:
            ordered += queue
            queue.clear()
    return ordered


def batches_a_repetition(batch: int) -> int:
    """As many as IMAGES fill; at least one."""
    return max(1, IMAGES // batch)


def rest() -> None:
    """Until no thread of this process has anything to do.

    What threads make ahead for the next repetition is so counted in this one, which found as much made ahead.
    """
    while True:
        used = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - used < QUIET / 10 and not _waits_for_a_core():
            return


def _waits_for_a_core() -> bool:
    """Whether another thread would run if it were given a core, or is reading; False where the system does not tell."""
    states = []
    for thread in Path("/proc/self/task").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # It has just ended.
            states.append(thread.read_text().rpartition(")")[2].split()[0])
    return sum(state in ("R", "D") for state in states) > 1  # One is this.


def _photograph(folder: Path, entry: dict, short: int, long: int) -> Photograph:
    sides = entry["height"], entry["width"]
    scale = min(short / min(sides), long / max(sides))
    size = max(1, int(sides[0] * scale + 0.5)), max(1, int(sides[1] * scale + 0.5))
    lower, longest = _padded(short), _padded(long)
    canvases = [
        canvas
        for side in (min(_padded(4 / 3 * short), longest), longest)
        for canvas in ((min(lower, longest), side), (side, min(lower, longest)))
        if size[0] <= canvas[0] and size[1] <= canvas[1]
    ]
    return Photograph(str(folder / entry["file_name"]), size, min(canvases, key=math.prod))


def _padded(side: int | float) -> int:
    return math.ceil(side / MULTIPLE) * MULTIPLE
