"""Writes converted annotations, and reports what they hold and how to train on them."""

import contextlib
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from retina_jax.config import ConfigError
from retina_jax.conversion.annotated import Annotated, Files, Picture
from retina_jax.conversion.formats import Format
from retina_jax.data.source import classify_boxes
from retina_jax.errors import reason, shortened
from retina_jax.runs.files import DiskError, write_bytes

IMAGE_FOLDERS = {"yolo": "images/{split}", "voc": "JPEGImages"}  # formats whose tools expect the images in the folder
CONTINUED = " \\\n    "  # continues a shell command on the next line
FOUND = {
    "crowd": "crowds (ignored)",
    "zero_size": "without area or reversed (dropped)",
    "outside": "outside the image (dropped)",
    "clipped": "partly outside (clipped)",
}


def write_folder(out: Path, files: Files, images: dict[str, Path], copy: bool) -> None:
    """Writes files, and links to images or copies of them, into a new folder, which appears when it is complete, or over
    equal files. Raises ConfigError if `out` has other files, DiskError if it cannot be written."""
    present = sorted(os.listdir(out) if out.is_dir() else [out.name] if out.exists() else [])
    flat = (
        set() if images else {name for name, content in files.items() if "/" not in name and is_in(out / name, content)}
    )
    if other := [name for name in present if name not in flat]:
        raise ConfigError(f"--out {out}: has another {other[0]} already; choose a new folder, or delete it")
    full = Path(os.path.abspath(out))  # "." has no name
    staged = full.with_name(f".{full.name}.{os.getpid()}")
    try:
        for name, content in files.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(staged / name, content)
        for name, path in images.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staged / name) if copy else (staged / name).symlink_to(path.absolute())
        if not out.is_dir():
            staged.rename(out)
        else:  # kept: it may be the working folder of the shell
            for path in list(staged.iterdir()):
                path.replace(out / path.name)
    except OSError as error:
        raise DiskError(f"{out}: cannot be written: {reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(staged, ignore_errors=True)


def is_in(path: Path, content: bytes) -> bool:
    """Returns whether the file at `path` is absent or has this content."""
    return not path.exists() or (path.is_file() and path.read_bytes() == content)


def check_inputs_kept(out: Path, files: Files, found: Annotated, annotations: Iterable[Path]) -> None:
    """Raises ConfigError if a file that would be written, or `out`, is one that was read, by any path or link."""
    targets = [path for path in (out, *(out / name for name in files)) if os.path.exists(path)]
    if not targets:
        return
    places = {text for p in found.pictures for text in (p.place, p.place.rpartition(": ")[0])}  # a file, or its entry
    read = {os.path.realpath(path) for path in (*annotations, *places, *(p.path for p in found.pictures if p.path))}
    if same := [path for path in targets if os.path.realpath(path) in read]:
        raise ConfigError(f"--out {out}: {same[0]} would be overwritten, but is an input; choose another folder")


def images_in(to: Format, pictures: list[Picture]) -> dict[str, Path]:
    """Returns the places of the image files in the folder of a format that needs them there."""
    folder = IMAGE_FOLDERS.get(to)
    located = [(picture, picture.path) for picture in pictures if picture.path]
    return {f"{folder.format(split=p.split)}/{p.name}": path for p, path in located} if folder else {}


def summary(found: Annotated, classes: list[str]) -> str:
    """Returns a line per split, with its images, and its boxes by class, and a line per kind of unusual box."""
    lines = []
    for split in found.splits:
        pictures = found.split(split)
        boxes = [box for picture in pictures for box in picture.boxes]
        counts = Counter(box.label for box in boxes)
        empty = [picture for picture in pictures if not picture.boxes]
        unlabelled = sum(picture.unlabelled for picture in empty)
        without = f"{len(empty)} without boxes" + f", {unlabelled} of them without a label file" * bool(unlabelled)
        by_class = ", ".join(f"{shortened(name)} {counts[name]}" for name in classes)
        lines.append(f"{split}: {len(pictures)} images ({without}), {len(boxes)} boxes: {by_class}")
        sizes = np.array([p.size for p in pictures for _ in p.boxes], np.int64).reshape(-1, 2)
        corners = np.array([box.corners for box in boxes], np.float64).reshape(-1, 4)
        kinds = classify_boxes(corners, np.array([box.crowd for box in boxes], bool), sizes)[1]
        unusual = [f"{kinds[kind].sum()} {text}" for kind, text in FOUND.items() if kinds[kind].any()]
        if unusual:
            lines.append(
                f"{split}: boxes that are converted as they are, but that training changes: {', '.join(unusual)}"
            )
    return "\n".join(lines)


def commands(out: Path, splits: list[str], folder: Path) -> str:
    """Returns the commands that check and train on COCO JSON files, to be copied."""
    script = Path(sys.argv[0])
    is_script = script.suffix == ".py"  # else the installed command, `retina-jax convert-data`
    run = f"{interpreter()} {script.with_name('{}.py')}" if is_script else f"{sys.argv[0].split()[0]} {{}}"
    check_data = "check_data" if is_script else "check-data"
    has_val = "val" in splits
    data = {"annotations": out / "train.json", "images": folder}
    val = {"val-annotations": out / "val.json", "val-images": folder} if has_val else {}
    name = Path(os.path.abspath(out)).name
    check = {**data, **val, "out": Path("checks") / name}
    train = {"workdir": Path("runs") / name} | {f"data.train-{key}": value for key, value in data.items()}
    train |= {f"data.{key}": value for key, value in val.items()} or {"training.eval-every": "-1"}
    own_data = script.parent.parent / "configs" / "own_data.py" if is_script else Path("configs/own_data.py")
    config = f"--config {shlex.quote(str(own_data))}"
    lines = ["check the data, then train:", CONTINUED.join([run.format(check_data), *options(check)])]
    if not has_val:
        lines.insert(0, "there is no validation set: --split 0.8 makes one of a fifth of the images")
    return "\n".join([*lines, CONTINUED.join([f"{run.format('train')} {config}", *options(train)])])


def options(values: dict[str, object]) -> list[str]:
    """Returns options as words of a shell command."""
    return [f"--{name} {shlex.quote(str(value))}" for name, value in values.items()]


def interpreter() -> str:
    """Returns the Python that runs this, relative to the working folder if it is inside."""
    path = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if path.startswith(os.pardir) else path)
