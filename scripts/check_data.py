"""Checks a dataset before training.

python scripts/check_data.py --annotations FILE --images DIR --out DIR [--config FILE --data.short-side 300 ...]
    [--val-annotations FILE --val-images DIR]

Reads the data as training with this config does, but reports all mistakes, not only the first. Writes
DIR/data_check.html, a single file, and DIR/data_check.json with the same facts and all names.

Exit status: 0, ready to train (there may be warnings); 3, not ready: training would refuse the data, or the anchors miss
most of the boxes; 2, nothing can be checked: a wrong option, a file that is not COCO JSON, a missing folder.
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retina_jax.cli import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import Config, ConfigError
from retina_jax.config_io import validate
from retina_jax.console import log
from retina_jax.data_check.check import Check, check_data, facts_of
from retina_jax.errors import one_line
from retina_jax.reports.check_page import check_page, labelled_images, worst_pictures
from retina_jax.runs.files import write_bytes, write_json
from retina_jax.runs.folder import config_of

OWN_DATA = Path(__file__).parents[1] / "configs" / "own_data.py"
NOT_READY = 3
"""Exit status if the data is not ready to train."""


@dataclass(frozen=True)
class Arguments:
    """Options of this script; all others are fields of the config."""

    annotations: Path
    """COCO JSON of the training images."""
    images: Path
    """Folder of the training images."""
    out: Path
    """Folder for the page and the JSON; created if it is missing."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: Path = OWN_DATA
    """Config file of the training; the other options override its fields."""
    val_annotations: Path | None = None
    """COCO JSON of the evaluation images; None: only the training images are checked."""
    val_images: Path | None = None
    """Folder of the evaluation images; None: the folder of the training images."""
    pictures: int = 8
    """Maximum number of images that are drawn because their boxes have no anchor; 0: none."""
    suggestion: bool = True
    """Search for anchors and an image size that cover the boxes better, and match all boxes with them."""


def main() -> None:
    """Checks, writes the page and the facts, prints a summary."""
    defaults = Arguments(*[tyro.MISSING] * 3, settings=config_of(sys.argv[1:], str(OWN_DATA)))
    used = r"(?!data\.(train|val)_(annotations|images)$)"
    arguments = parse_command_line(Arguments, defaults, sys.argv[1:], __doc__, listed=used)
    config = validate(arguments.settings)
    if arguments.pictures < 0:
        raise ConfigError(f"--pictures: invalid value {arguments.pictures}; must be 0 or more")
    pairs = {"train": (arguments.annotations, arguments.images)}
    if arguments.val_annotations is not None:
        pairs["val"] = arguments.val_annotations, arguments.val_images or arguments.images
    elif arguments.val_images is not None:
        raise ConfigError("--val-images: give --val-annotations too")
    page, facts = arguments.out / "data_check.html", arguments.out / "data_check.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    set_up_jax()
    check = check_data(config, pairs, search=arguments.suggestion)
    pictures = worst_pictures(
        check.splits[0], check.config.data, check.decoding, check.views, check.coverage, arguments.pictures
    )
    wall = labelled_images(check.splits[0], check.decoding)
    html = check_page(check, wall, pictures, f"Data check: {arguments.annotations.name}")
    write_bytes(page.resolve() if page.is_symlink() else page, html.encode(errors="backslashreplace"))
    write_json(facts, facts_of(check))
    summarise(check)
    log(f"page: {page}\nfacts: {facts}\n{check.verdict()}")
    sys.exit(0 if check.ready else NOT_READY)


def summarise(check: Check) -> None:
    """Prints one line per kind of finding, the anchor coverage and the suggestion."""
    for group in check.groups:
        log(one_line(group.line()))
    shares, total = check.shares, check.shares.total
    if not total.boxes:
        return
    log(
        f"anchors: {total.part('by_iou'):.1%} of {total.boxes} boxes by IoU, {total.part('by_low_quality'):.1%} by the "
        f"low-quality rule only, {total.part('uncovered'):.1%} none; {shares.positives_per_image:.1f} positives per image"
    )
    if check.suggestion is not None:
        log(check.suggestion.line())


if __name__ == "__main__":
    with one_line_errors():
        main()
