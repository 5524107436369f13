"""Detect on images of your own: scripts/predict.py (--workdir RUN | --weights KIND:FILE) IMAGE_OR_FOLDER... --out DIR

Writes DIR/detections.json (per image: boxes in its own pixels, scores, class names) and a drawn picture per image.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from retina_jax.command_line import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import ConfigError
from retina_jax.data.decoding import to_rgb
from retina_jax.data.source import BadImage
from retina_jax.detector import load_detector
from retina_jax.training.run import write_json
from retina_jax.visualize import draw

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Arguments:
    """Options of this script."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them."""
    out: Path
    """Folder to write to."""
    workdir: Path | None = None
    """Folder of the run whose detector is asked."""
    weights: str = ""
    """KIND:FILE or KIND:NAME of a detector from elsewhere; KIND is torchvision, detectron2 or detectron."""
    step: int | None = None
    """Saved step; None: the newest."""
    score: float = 0.3
    """Least score drawn; detections.json holds all that the run's config keeps."""
    short_side: int | None = None
    """Length the shorter image side is resized to, pixels; None: as in training."""
    class_names: tuple[str, ...] = ()
    """Names of the classes of --weights, where they are not COCO's."""


def main() -> None:
    """Read, detect, write, draw."""
    arguments = parse_command_line(Arguments, Arguments(tyro.MISSING, tyro.MISSING), sys.argv[1:], __doc__)
    if (arguments.workdir is None) == (not arguments.weights):
        raise ConfigError("--workdir: give the folder of a run, or --weights KIND:FILE, and not both")
    set_up_jax()
    files = image_files(arguments.images)
    asked = {"step": arguments.step, "short_side": arguments.short_side, "class_names": arguments.class_names}
    detector = load_detector(arguments.weights or arguments.workdir, **asked)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {arguments.out}: cannot be written: {error.strerror}") from None
    entries = []
    for file, target in files.items():
        try:
            image = to_rgb(file.read_bytes(), expected_size=None)
        except (OSError, BadImage) as error:
            raise BadImage(f"{file}: {error}") from None
        (found,) = detector.detect([image])
        good = found.scores >= arguments.score
        picture = draw(
            image, found.boxes_xyxy[good], found.labels[good], found.scores[good], class_names=detector.class_names
        )
        Image.fromarray(picture).save(arguments.out / target)
        entries.append(
            {
                "file": str(file),
                "width": image.shape[1],
                "height": image.shape[0],
                "boxes_xyxy": found.boxes_xyxy.round(2).tolist(),
                "scores": found.scores.round(5).tolist(),
                "labels": list(found.class_names),
            }
        )
        print(f"{file}: {int(good.sum())} detections at {arguments.score} or above -> {arguments.out / target}")
    write_json(
        arguments.out / "detections.json",
        {"detector": arguments.weights or str(arguments.workdir), "step": detector.step, "images": entries},
    )
    print(f"{len(files)} images; boxes in {arguments.out / 'detections.json'}")


def image_files(paths: tuple[Path, ...]) -> dict[Path, str]:
    """Each image file with the name of its drawn picture; names that would meet get a number."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise ConfigError(f"{path}: no image in this folder ({', '.join(SUFFIXES)})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"{path}: no such file or folder")
    named: dict[str, Path] = {}
    for file in dict.fromkeys(files):
        name, number = f"{file.stem}.png", 1
        while name in named:
            number += 1
            name = f"{file.stem}_{number}.png"
        named[name] = file
    return {file: name for name, file in named.items()}


if __name__ == "__main__":
    with one_line_errors():
        main()
