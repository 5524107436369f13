"""Input and output of a benchmark; plain data, sent between processes as JSON."""

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
    """A variant cannot be measured; the message is one line."""


@dataclass(frozen=True)
class Task:
    """One repetition's work, the same for all variants."""

    name: str
    size: str
    """Padded shape in pixels: 512, or 800x1344 (height x width)."""
    batch: int
    backbone: str
    dtype: str
    rows: int
    """Anchors of loss and match, candidate boxes of nms."""
    classes: int
    boxes: int
    """Ground-truth boxes per image."""
    kept: int
    """Largest number of boxes that nms keeps."""
    images: str
    """Folder of JPEG files of `input`."""
    annotations: str
    """COCO JSON of `input` and `evaluate`."""
    detections: int
    """Total number of detections of `evaluate`."""
    device: str
    """cpu, or gpu."""
    cores: int
    """Processor cores that a variant may use; 0: all."""
    seed: int = 0
    keep_logits: bool = False
    """`loss`: the logits are not donated."""

    @property
    def padded_hw(self) -> tuple[int, int]:
        """Padded height and width, pixels."""
        height, _, width = self.size.partition("x")
        return int(height), int(width or height)


class Work(NamedTuple):
    """A variant, ready to run."""

    run: Callable[[], Any]
    """Runs one repetition and waits for the device."""
    images: int = 0
    """Images per repetition, if the benchmark has images."""
    flops: int = 0
    """Floating-point operations of the convolutions and matrix products of a repetition, if they dominate."""
    facts: dict[str, Any] = {}  # noqa: RUF012  never changed
    """Further figures."""
    before: Callable[[], Any] = lambda: None
    """Prepares arguments that a repetition consumes; not timed."""
