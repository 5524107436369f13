"""What a benchmark is asked to do and what it gives back; plain data that travels between processes as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from retina_jax.errors import PlainError

BENCHMARKS = {
    "step": "a training step: forward, matching, losses, backward, SGD",
    "forward": "the network: pixels to logits and deltas",
    "detect": "inference: pixels to boxes, NMS included",
    "loss": "focal loss of rows x classes logits, value and gradient",
    "match": "rows anchors to boxes",
    "nms": "class-wise suppression of rows boxes",
    "input": "JPEG files to batches: decode, resize, flip, pad",
    "evaluate": "COCO scores of 5000 images",
    "compile": "the training step, compiled",
}
"""Name of a benchmark: what one repetition does."""


class BenchmarkError(PlainError, RuntimeError):
    """A variant that cannot be measured; one line that says why."""


@dataclass(frozen=True)
class Task:
    """One repetition's work, the same for all variants."""

    name: str
    size: str
    """Canvas in pixels: 512, or 800x1344 (height x width)."""
    batch: int
    backbone: str
    dtype: str
    rows: int
    """Anchors of loss and match, candidate boxes of nms."""
    classes: int
    boxes: int
    """Ground-truth boxes an image."""
    kept: int
    """Boxes that nms keeps at most."""
    images: str
    """Folder of JPEG files of `input`."""
    annotations: str
    """COCO JSON of `input` and `evaluate`."""
    detections: int
    """Detections of `evaluate`, in all."""
    device: str
    """cpu, or gpu."""
    cores: int
    """Processor cores that a variant may use; 0: all."""
    seed: int = 0
    keep_logits: bool = False
    """`loss`: its logits are needed afterwards, so that their memory cannot be taken."""

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width, pixels."""
        height, _, width = self.size.partition("x")
        return int(height), int(width or height)


class Work(NamedTuple):
    """A variant made ready."""

    run: Callable[[], Any]
    """One repetition, to its end: on an accelerator it waits for the device."""
    images: int = 0
    """Images a repetition, where it is about images."""
    flops: int = 0
    """Operations of the convolutions and matrix products of a repetition, where they are what it is about."""
    facts: dict[str, Any] = {}  # noqa: RUF012  never changed
    """What else is worth reporting."""
    before: Callable[[], Any] = lambda: None
    """What makes a repetition's arguments anew, where it uses them up; not timed."""
