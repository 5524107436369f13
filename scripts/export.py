"""Ship a detector in one file: scripts/export.py (--workdir RUN | --weights KIND:FILE) --out FILE

stablehlo: programs of jax.export for CPU, CUDA and TPU, from uint8 pixels to boxes, with the parameters beside them;
retina_jax/export/loader.py reads it with jax and numpy alone. docs/export.md shows how.

Before FILE is there, it is loaded again and asked about real images beside the live detector. Where the answers differ by
more than a rounding, no file is left, and the exit status is 2.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from retina_jax.cli import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import ConfigError, DetectionConfig
from retina_jax.config_io import validate
from retina_jax.detector import load_detector
from retina_jax.export.agreement import images_for
from retina_jax.export.programs import ship
from retina_jax.runs.base_config import settings_of
from retina_jax.training.checkpoints import Step

REFUSED = {
    "savedmodel": "TensorFlow 2.21, the newest release, cannot read what jax 0.10.2 writes",
    "onnx": "jax2onnx 0.17.1 converts neither convolutions chosen by platform nor the suppression",
}


@dataclass(frozen=True)
class Arguments:
    """Options of this script."""

    out: Path
    """File to write."""
    workdir: Path | None = None
    """Folder of the run whose detector is shipped."""
    weights: str = ""
    """KIND:FILE or KIND:NAME of a detector from elsewhere; KIND is torchvision, detectron2 or detectron."""
    format: Literal["stablehlo", "savedmodel", "onnx"] = "stablehlo"
    """What is written; the last two are refused while no converter holds (docs/export.md)."""
    step: Step = None
    """Saved step, or best: the one with the highest AP; None: the newest."""
    short_side: int | None = None
    """Length the shorter image side is resized to, pixels; None: as in training."""
    class_names: tuple[str, ...] = ()
    """Names of the classes of --weights, where they are not COCO's."""
    images: Path | None = None
    """Image file, or folder of them, to compare on; None: the run's validation images, where there are none generated
    scenes."""
    count: int = 16
    """Images to compare on, the first ones."""
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """Inference; what is not given is the detector's own. Test-time augmentation is not shipped."""


def main() -> None:
    """Load, write, load again, compare, tell."""
    settings = settings_of(sys.argv[1:])
    defaults = Arguments(tyro.MISSING, detection=settings.detection)
    arguments = parse_command_line(Arguments, defaults, sys.argv[1:], __doc__)
    if (arguments.workdir is None) == (not arguments.weights):
        raise ConfigError("--workdir: give the folder of a run, or --weights KIND:FILE, and not both")
    if arguments.format in REFUSED:
        raise ConfigError(
            f"--format {arguments.format}: {REFUSED[arguments.format]}; docs/export.md has what was tried"
        )
    if arguments.count < 1:
        raise ConfigError(f"--count: invalid value {arguments.count}; must be at least 1")
    if arguments.out.is_dir():
        raise ConfigError(f"--out {arguments.out}: is a folder; name a file")
    set_up_jax()
    source = arguments.weights or str(arguments.workdir)
    detector = load_detector(
        source,
        short_side=arguments.short_side,
        step=arguments.step,
        config=validate(replace(settings, detection=arguments.detection, devices=1)),
        class_names=arguments.class_names,
    )
    images, what = images_for(detector, arguments.images, arguments.count)
    print(f"compared on {what}")
    print(ship(detector, arguments.out, source, images))
    print(f"{arguments.out}: {arguments.out.stat().st_size / 2**20:.1f} MiB, step {detector.step}")


if __name__ == "__main__":
    with one_line_errors():
        main()
