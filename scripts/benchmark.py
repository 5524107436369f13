"""Times this project and other libraries: python scripts/benchmark.py step --peer torchvision [--size 512 --batch 4 --json]

Each variant runs in its own process on the same cores, one repetition of each in turn. Figures are medians. `ratio` is a
variant's CPU time divided by this project's; with --device gpu, its wall time.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import tyro
from benchmarks.alternation import measure
from benchmarks.inputs import COCO_BOXES
from benchmarks.table import table
from benchmarks.variants import HERE, OURS, PEERS
from benchmarks.work import Task

from retina_jax.cli import one_line_errors, parse_command_line
from retina_jax.config import Config, ConfigError, ModelConfig
from retina_jax.console import cores

ROWS = {"loss": 100_000, "match": 120_000, "nms": 5000}
BOXES = {"match": 50}
Backbone = get_type_hints(ModelConfig)["backbone"]


@dataclass(frozen=True)
class Arguments:
    """Options; each benchmark ignores those that do not apply to it."""

    name: Annotated[
        Literal["step", "forward", "detect", "loss", "match", "nms", "input", "evaluate", "compile"],
        tyro.conf.Positional,
    ]
    """Benchmark to run."""
    peer: tuple[
        Literal["torchvision", "torchvision.compiled", "kerashub", "optax", "pycocotools", "tf.data", "pil"], ...
    ] = ()
    """Compare with: torchvision, kerashub, optax (loss), pycocotools (evaluate), tf.data and pil (input). The backbone and
    heads of torchvision.compiled are compiled by torch.compile."""
    size: str = "256"
    """Padded shape, pixels: 512, or 800x1344 (height x width)."""
    batch: int = 1
    """Images per repetition."""
    backbone: Backbone = "resnet50"
    """Backbone of step, forward, detect and compile."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of convolutions and logits."""
    rows: int = 0
    """Anchors of loss and match, candidates of nms; 0: 100000, 120000, 5000."""
    classes: int = 80
    """Number of classes of the network, and in loss and nms."""
    boxes: int = 0
    """Ground-truth boxes per image; 0: 7, COCO's mean, and 50 for match."""
    kept: int = 300
    """Maximum number of boxes that nms keeps."""
    keep_logits: bool = False
    """loss: keep the logits; by default they are donated, as in a training step (optax's too)."""
    images: Path = Path("data/coco/val2017")
    """Folder of the JPEG files of input."""
    annotations: Path = Path("data/coco/annotations/instances_val2017.json")
    """COCO JSON of input and evaluate; evaluate also reads text: lines of FOLDER/000000000139.jpg x1,y1,x2,y2,class ..."""
    detections: int = 180_000
    """Number of detections that evaluate generates from the annotations."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device."""
    cores: int = 1
    """Number of cores that each variant is pinned to; 0: not pinned."""
    repetitions: int = 7
    """Repetitions per variant, after three for warm-up."""
    peer_python: str = sys.executable
    """Python interpreter of the peers, if they are installed in another environment."""
    seed: int = 0
    """Random seed."""
    json: bool = False
    """Print one JSON object per line instead of a table."""


def main() -> None:
    """Measures all variants and prints the figures."""
    arguments = parse_command_line(Arguments, Arguments(name=tyro.MISSING), sys.argv[1:], __doc__)
    variants = {HERE: OURS[arguments.name]} | {peer: PEERS[peer] for peer in arguments.peer}
    rows = measure(task_of(arguments), variants, arguments.repetitions, arguments.peer_python)
    print("\n".join(map(json.dumps, rows)) if arguments.json else table(rows), flush=True)


def task_of(arguments: Arguments) -> Task:
    """Returns the work of one repetition; raises ConfigError if an option is invalid."""
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)?", arguments.size):
        raise ConfigError(f"--size {arguments.size}: give pixels, 512 or 800x1344 (height x width)")
    for option in ("batch", "classes", "repetitions"):
        if getattr(arguments, option) < 1:
            raise ConfigError(f"--{option} {getattr(arguments, option)}: give a number from 1")
    if not 0 <= arguments.cores <= cores():
        raise ConfigError(f"--cores {arguments.cores}: give 0 (not pinned) to {cores()}, the available cores")
    of_network = arguments.name in ("step", "forward", "detect", "compile")
    if arguments.boxes > (most := Config().data.max_boxes) and of_network:
        raise ConfigError(f"--boxes {arguments.boxes}: a training image has at most {most} (data.max_boxes)")
    given = {f.name: getattr(arguments, f.name) for f in fields(Task)}
    given["rows"] = arguments.rows or ROWS.get(arguments.name, 0)
    given["boxes"] = arguments.boxes or BOXES.get(arguments.name, COCO_BOXES)
    return Task(**given | {name: str(given[name]) for name in ("images", "annotations")})


if __name__ == "__main__":
    with one_line_errors():
        main()
