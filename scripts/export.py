"""Exports a detector to one file: scripts/export.py (--workdir RUN | --weights KIND:FILE) --out FILE

Both formats contain everything from uint8 pixels to boxes, and the parameters. stablehlo: programs of jax.export for CPU,
CUDA and TPU, which retina_jax/export/loader.py reads with jax, numpy and flatbuffers. onnx: a graph for ONNX Runtime and
other runtimes. docs/export.md shows how to use them.

The new file is loaded again and compared with the original detector on real images. If the detections differ by more than
rounding, no file is written and the exit status is 2.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from retina_jax.cli import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import ConfigError, DetectionConfig
from retina_jax.config_io import validate
from retina_jax.console import log
from retina_jax.detector import load_detector
from retina_jax.export.agreement import export_detector, images_for
from retina_jax.runs.folder import described_step, settings_of
from retina_jax.training.checkpoints import Step

REFUSED = {
    "savedmodel": "TensorFlow 2.21, the newest release, cannot read the files of jax 0.10.2",
}


@dataclass(frozen=True)
class Arguments:
    """Options of this script."""

    out: Path
    """File to write."""
    workdir: Path | None = None
    """Folder of the run whose detector is exported."""
    weights: str = ""
    """KIND:FILE or KIND:NAME of a detector of another library; KIND is torchvision, detectron2 or detectron."""
    format: Literal["auto", "stablehlo", "savedmodel", "onnx"] = "auto"
    """Format of the file; auto: by the end of its name, .onnx or .zip (stablehlo). savedmodel is refused, because no
    converter works yet (docs/export.md)."""
    step: Step = None
    """Saved step, best (the step with the highest AP) or newest; default: the best, or the newest if none was evaluated."""
    short_side: int | None = None
    """Length that the shorter image side is resized to, pixels; default: as in training."""
    class_names: tuple[str, ...] = ()
    """Names of the classes of --weights, if they are not COCO's."""
    images: Path | None = None
    """Image file or folder of images to compare on; default: the run's validation images, or generated scenes if there are
    none."""
    count: int = 16
    """Number of images to compare on: the first ones."""
    licence: str = ""
    """Licence of the detector, such as Apache-2.0, for the model card in the file; empty: not stated."""
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """Inference settings; default: the detector's own. Test-time augmentation cannot be exported."""


def main() -> None:
    """Loads the detector, writes the file, compares the two, and prints how they differ."""
    settings = settings_of(sys.argv[1:], exclusive=True)
    defaults = Arguments(tyro.MISSING, detection=settings.detection)
    arguments = parse_command_line(Arguments, defaults, sys.argv[1:], __doc__)
    if (arguments.workdir is None) == (not arguments.weights):
        raise ConfigError("--workdir: give the folder of a run, or --weights KIND:FILE, and not both")
    if arguments.format in REFUSED:
        raise ConfigError(f"--format {arguments.format}: {REFUSED[arguments.format]}; see docs/export.md")
    if arguments.count < 1:
        raise ConfigError(f"--count: invalid value {arguments.count}; must be at least 1")
    if arguments.out.is_dir():
        raise ConfigError(f"--out {arguments.out}: is a folder; give a file")
    if arguments.format == "auto" and arguments.out.suffix not in (".zip", ".onnx"):
        raise ConfigError(f"--out {arguments.out}: must end in .zip (StableHLO) or .onnx, or give --format")
    set_up_jax()
    source = arguments.weights or str(arguments.workdir)
    detector = load_detector(
        source,
        short_side=arguments.short_side,
        step=arguments.step,
        config=validate(replace(settings, detection=arguments.detection, devices=1)),
        class_names=arguments.class_names,
    )
    images, description = images_for(detector, arguments.images, arguments.count)
    log(f"images for the comparison: {description}")
    step = ["--step", str(detector.step)] if arguments.workdir and arguments.step is None else []
    renew = shlex.join(["scripts/export.py", *sys.argv[1:], *step])  # the best step may be another one by then
    onnx = arguments.format == "onnx" or (arguments.format == "auto" and arguments.out.suffix == ".onnx")
    log(export_detector(detector, arguments.out, source, images, renew, arguments.licence, onnx))
    taken = described_step(detector.step, arguments.workdir if arguments.step is None else None)
    log(f"{arguments.out}: {arguments.out.stat().st_size / 2**20:.1f} MiB, {taken}")


if __name__ == "__main__":
    with one_line_errors():
        main()
