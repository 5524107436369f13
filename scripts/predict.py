"""Runs a detector on your images: scripts/predict.py (--workdir RUN | --weights KIND:FILE) IMAGE_OR_FOLDER... --out DIR

Writes DIR/detections.json (for each image: boxes in its pixels, scores, class names and ids) and one picture per image.
They appear at the end, and replace those of an earlier run together: a failure leaves the earlier ones as they were.
Inference settings can be overridden, for example --detection.nms-iou 0.6. Test-time augmentation: --detection.tta-flip,
--detection.tta-short-sides 500 700. Large images with small objects: --tile 800 --overlap 0.25.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from retina_jax.cli import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import ConfigError, DetectionConfig
from retina_jax.config_io import override, validate
from retina_jax.console import log, warn
from retina_jax.data import transforms
from retina_jax.data.decoding import read_rgb
from retina_jax.data.image_paths import image_files
from retina_jax.data.source import BadImage
from retina_jax.data.survey import decoding_of_files
from retina_jax.detector import Detector, load_detector
from retina_jax.errors import shortened
from retina_jax.evaluate import encoded_png
from retina_jax.evaluation.drawing import draw
from retina_jax.runs.files import all_or_none, encoded_json
from retina_jax.runs.folder import described_step, settings_of
from retina_jax.training.checkpoints import Step


@dataclass(frozen=True)
class Arguments:
    """Options of this script."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders with image files."""
    out: Path
    """Folder to write to."""
    workdir: Path | None = None
    """Folder of the run whose detector is used."""
    weights: str = ""
    """KIND:FILE or KIND:NAME of a detector of another library; KIND is torchvision, detectron2 or detectron."""
    step: Step = None
    """Saved step, best (the step with the highest AP) or newest; default: the best, or the newest if none was evaluated."""
    score: float | None = None
    """Lowest score that is drawn; default: the one with the highest F1 in the evaluation of that step, or 0.3.
    detections.json contains all detections above --detection.score-threshold."""
    short_side: int | None = None
    """Length that the shorter image side is resized to, pixels; None: as in training."""
    tile: int | None = None
    """Side of the overlapping square tiles that images are cut into, pixels; each is resized like an image. 0: images are
    not cut; default: as in training (data.tile)."""
    overlap: float | None = None
    """Smallest overlap of neighbouring tiles as a fraction of --tile; default: as in training (data.tile_overlap)."""
    class_names: tuple[str, ...] = ()
    """Names of the classes of --weights, if they are not COCO's."""
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    """Inference settings; default: those of the detector."""


def main() -> None:
    """Runs the detector on all images; writes detections.json and the pictures."""
    settings = settings_of(sys.argv[1:], exclusive=True)
    defaults = Arguments(tyro.MISSING, tyro.MISSING, detection=settings.detection)
    arguments = parse_command_line(Arguments, defaults, sys.argv[1:], __doc__)
    if (arguments.workdir is None) == (not arguments.weights):
        raise ConfigError("--workdir: give the folder of a run, or --weights KIND:FILE, and not both")
    if arguments.score is not None and not 0 <= arguments.score <= 1:
        raise ConfigError(f"--score: invalid value {arguments.score}; must be from 0 to 1")
    tiles = {"data.tile": arguments.tile, "data.tile_overlap": arguments.overlap}
    settings = override(settings, {name: value for name, value in tiles.items() if value is not None})
    if arguments.overlap is not None and not settings.data.tile:
        raise ConfigError(f"--overlap {arguments.overlap:g}: has no effect without tiles; give --tile too")
    set_up_jax()
    files = image_files(arguments.images, arguments.out)
    detector = load_detector(
        arguments.weights or arguments.workdir,
        short_side=arguments.short_side,
        step=arguments.step,
        config=validate(replace(settings, detection=arguments.detection, devices=1)),
        class_names=arguments.class_names,
    )
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {arguments.out}: cannot be written: {error.strerror}") from None
    score, chosen = arguments.score, "--score"
    if score is None:
        score, chosen = detector.f1_threshold, "the highest F1 in its evaluation"
    if score is None:
        score, chosen = 0.3, "the default; there is no evaluation with a best F1"
    step = described_step(detector.step, arguments.workdir if arguments.step is None else None)
    log(f"{step}; detections with a score of {score:.2f} or more are drawn ({chosen})")
    with all_or_none(arguments.out) as write:
        entries, bad = detect_all(detector, files, arguments.out, write, score)
        if not entries:
            raise BadImage(f"none of the images could be read: {'; '.join(bad)}")
        source = arguments.weights or str(arguments.workdir)
        write("detections.json", encoded_json({"detector": source, "step": detector.step, "images": entries}))
    log(f"{len(entries)} images; their pictures and detections.json are in {arguments.out}")
    if bad:
        raise BadImage(f"{len(bad)} of {len(files)} images could not be read: {'; '.join(bad)}")


def detect_all(
    detector: Detector, files: Mapping[Path, str], out: Path, write: Callable[[str, bytes], None], score: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Detects in all files and writes their pictures to `out` by `write`, which takes name and content; warns if detections
    that would be drawn are left out. Returns the entries of detections.json, and why files could not be read."""
    data = detector.config.data
    if data.tile:
        side = transforms.resized_size(data.tile, data.tile, data.short_side, data.long_side)[0]
        log(f"images are cut into tiles of {data.tile} px, which are resized to {side} px")
    decoding = decoding_of_files(list(files), data)
    entries, bad, full = [], [], []
    for file, target in files.items():
        try:
            image = read_rgb(file, decoding)
        except BadImage as error:
            bad.append(str(error))
            continue
        (found,) = detector.detect([image])
        good = found.scores >= score
        if found.full_from >= score:
            full.append(file.name)
        picture = draw(
            image, found.boxes_xyxy[good], found.labels[good], found.scores[good], class_names=detector.shown_names
        )
        write(target, encoded_png(picture))
        entries.append(
            {
                "file": str(file),
                "width": image.shape[1],
                "height": image.shape[0],
                "boxes_xyxy": found.boxes_xyxy.round(2).tolist(),
                "scores": found.scores.round(5).tolist(),
                "labels": list(found.class_names),
                "category_ids": [detector.category_ids[label] for label in found.labels],
            }
        )
        log(f"{shortened(file)}: {int(good.sum())} detections")
    if full:
        most = detector.config.detection.max_detections
        shown = ", ".join(map(shortened, full[:5])) + (", ..." if len(full) > 5 else "")
        found = f"detection.max_detections {most} leaves out detections that would be drawn, in {len(full)} images ({shown})"
        warn(f"{found}; set --detection.max-detections {3 * most}, or --tile")
    return entries, bad


if __name__ == "__main__":
    with one_line_errors():
        main()
