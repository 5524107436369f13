"""Generated scenes: a detection task in miniature, hard in the paper's way, for which nothing is downloaded.

A class is a shape AND a hue ("red disc"). Objects are few and mostly small, they hide one another, and the background is
full of what is almost an object: the right shape in a wrong hue, the right hue in a wrong shape, noise, gratings, blobs
and lines. So nearly every anchor is background and some of it is hard: the imbalance of Section 3.
"""

from __future__ import annotations

import colorsys
import dataclasses
import hashlib
import json
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw

from retina_jax.config import ConfigError, ScenesConfig
from retina_jax.data.shapes import SHAPES, draw_shape

VERSION = 1
"""Raised whenever the same setting would give other pixels or boxes."""
HUES = {
    "red": 0.0,
    "blue": 228.0,
    "yellow": 53.0,
    "green": 128.0,
    "violet": 270.0,
    "cyan": 184.0,
    "orange": 27.0,
    "pink": 332.0,
    "lime": 83.0,
    "azure": 206.0,
    "magenta": 301.0,
    "teal": 160.0,
}
"""Degrees. Class k is the k-th shape in the k-th hue, so the first classes are the easiest to tell apart."""
EMPTY_SHARE = 0.05
"""Share of images without an object."""
LEAST_VISIBLE = 0.4
"""No object keeps less than this share of its pixels in view: what would hide more is placed elsewhere or not at all."""
PLACES_TRIED = 20
TRAIN, VAL = 1, 2
"""Streams of the seed."""


class Scene(NamedTuple):
    """An image and its objects; boxes hold the whole shape, hidden parts included."""

    image: UInt8[np.ndarray, "size size 3"]
    labels: list[int]
    boxes_xywh: list[tuple[float, float, float, float]]
    visible: list[float]
    """Share of each object's pixels in view."""


class ScenePaths(NamedTuple):
    """Where the scenes are, for `read_coco`."""

    train_annotations: str
    train_images: str
    val_annotations: str
    val_images: str


def class_names(classes: int) -> tuple[str, ...]:
    """Names of the first `classes` classes: "red disc", "blue square", ..."""
    return tuple(f"{hue} {shape}" for hue, shape in zip(list(HUES)[:classes], SHAPES, strict=False))


def write_scenes(config: ScenesConfig) -> ScenePaths:
    """Writes the scenes as JPEGs and COCO JSONs where they are not there yet.

    The folder's name holds a hash of the setting. It is written under another name and renamed when complete, so a folder
    of that name is always whole, and processes that start together do no harm.
    """
    _check(config)
    setting = {key: value for key, value in dataclasses.asdict(config).items() if key != "folder"}
    digest = hashlib.sha256(json.dumps([VERSION, setting], sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(config.folder) / f"{config.size}px_{config.classes}classes_{digest}"
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            _write_split(unfinished, "train", config, TRAIN, config.train_images)
            _write_split(unfinished, "val", config, VAL, config.val_images)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # Otherwise another process was first.
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return ScenePaths(str(folder / "train.json"), str(folder / "train"), str(folder / "val.json"), str(folder / "val"))


def draw_scene(config: ScenesConfig, stream: int, index: int) -> Scene:
    """Scene `index` of a stream (TRAIN or VAL), a pure function of its arguments."""
    rng = np.random.default_rng([config.seed % 2**64, stream, index])
    picture = draw_background(rng, config.size)
    objects = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, config.max_objects, endpoint=True))
    wanted = [True] * objects + [False] * int(rng.integers(0, config.lookalikes, endpoint=True))
    owner = np.full(picture.shape[:2], -1)
    labels, boxes, areas, visible = [], [], np.zeros(0, int), np.zeros(0, int)
    for is_object in rng.permutation(wanted):
        label = int(rng.integers(config.classes))
        shape, hue = _class_look(label) if is_object else _lookalike(rng, label)
        for _ in range(PLACES_TRIED):
            box = _draw_box(rng, config)
            side = float(np.sqrt(box[2] * box[3]))
            (x, y), whole, inside = draw_shape(shape, box, rng.uniform(-0.25, 0.25), 0.5 + 0.02 * side)
            patch = np.s_[y : y + whole.shape[0], x : x + whole.shape[1]]
            solid = whole >= 0.5
            left = visible - np.bincount(owner[patch][solid] + 1, minlength=len(labels) + 1)[1:]
            if not solid.any() or (left < LEAST_VISIBLE * areas).any():
                continue
            picture[patch] = _painted(rng, picture[patch], whole, inside, hue)
            owner[patch][solid] = len(labels) if is_object else -1
            visible = left
            if is_object:
                labels.append(label)
                boxes.append(box)
                areas, visible = np.append(areas, solid.sum()), np.append(visible, solid.sum())
            break
    picture += 0.012 * rng.standard_normal(picture.shape, np.float32)
    image = (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Scene(image, labels, boxes, (visible / areas).tolist())


def draw_background(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "size size 3"]:
    """Clutter in [0, 1]: a muted colour, noise of several octaves, blobs, gratings and lines."""
    ramp = (np.arange(size, dtype=np.float32) + 0.5) / size
    u, v = ramp[None, :, None], ramp[:, None, None]
    picture = np.zeros((size, size, 3), np.float32) + _colour(rng, (0.1, 0.5), (0.35, 0.7))
    for cells, strength in ((3, 0.35), (6, 0.25), (12, 0.18), (24, 0.14), (48, 0.1)):
        noise = rng.random((cells, cells, 3), np.float32)
        noise = 0.35 * noise + 0.65 * noise.mean(2, keepdims=True)  # Less colour than light and dark.
        coarse = Image.fromarray((noise * 255).astype(np.uint8))
        fine = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        picture += (fine - 127.5) * (1.4 * strength * rng.uniform(0.3, 1.0) / 255)
    for _ in range(rng.integers(0, 7)):
        picture += (_colour(rng, (0.2, 0.8), (0.3, 1.0)) - picture) * 0.6 * _spot(rng, u, v, (0.02, 0.12))
    for _ in range(rng.integers(0, 4)):
        angle, waves = rng.uniform(0, np.pi), rng.uniform(6, 28)
        across, down = (2 * np.pi * waves * np.array([np.cos(angle), np.sin(angle)])).tolist()
        phase = across * u + down * v + rng.uniform(0, 2 * np.pi)
        picture += rng.uniform(0.05, 0.2) * np.sin(phase) * _spot(rng, u, v, (0.08, 0.3))
    drawn = Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for _ in range(rng.integers(0, 7)):
        ends = rng.uniform(-0.1, 1.1, 4) * size
        ink = tuple((_colour(rng, (0.1, 0.8), (0.2, 0.95)) * 255).astype(int).tolist())
        pen.line(ends.tolist(), fill=ink, width=int(rng.integers(1, 2 + size // 64)))
    return np.asarray(drawn, np.float32) / 255


def paint_shape(
    rng: np.random.Generator,
    picture: Float32[np.ndarray, "H W 3"],
    shape: str,
    hue: float,
    box_xywh: tuple[float, float, float, float],
) -> None:
    """Paints a shape (of `SHAPES`) in a hue (degrees) into the picture, so that it fills the box, which lies inside."""
    side = float(np.sqrt(box_xywh[2] * box_xywh[3]))
    (x, y), whole, inside = draw_shape(shape, box_xywh, rng.uniform(-0.25, 0.25), 0.5 + 0.02 * side)
    patch = np.s_[y : y + whole.shape[0], x : x + whole.shape[1]]
    picture[patch] = _painted(rng, picture[patch], whole, inside, hue)


def _class_look(label: int) -> tuple[str, float]:
    return list(SHAPES)[label], list(HUES.values())[label]


def _lookalike(rng: np.random.Generator, label: int) -> tuple[str, float]:
    """The class's shape in another hue, or its hue on another shape, of all twelve: no class at all."""
    shape, hue = _class_look(label)
    other = _class_look(int((label + rng.integers(1, len(SHAPES))) % len(SHAPES)))
    return (shape, other[1]) if rng.random() < 0.5 else (other[0], hue)


def _draw_box(rng: np.random.Generator, config: ScenesConfig) -> tuple[float, float, float, float]:
    # The square of a uniform number skews sizes to the small ones: half are under min_side × (max / min) ^ 1/4.
    side = config.min_side * (config.max_side / config.min_side) ** (rng.random() ** 2)
    aspect = np.exp(rng.uniform(np.log(0.6), np.log(1.6)))
    width, height = (float(min(s, config.size)) for s in (side * aspect**0.5, side / aspect**0.5))
    x, y = rng.uniform(0, config.size - width), rng.uniform(0, config.size - height)
    # Hundredths of a pixel, as COCO writes them; drawn from the rounded numbers.
    return int(x * 100) / 100, int(y * 100) / 100, int(width * 100) / 100, int(height * 100) / 100


def _painted(
    rng: np.random.Generator, under: np.ndarray, whole: np.ndarray, inside: np.ndarray, hue: float
) -> np.ndarray:
    """The patch with a shape on it: lit from the upper left, with a dark outline."""
    height, width = whole.shape
    u = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    v = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
    base = _colour(rng, (0.72, 1.0), (0.75, 1.0), hue + rng.uniform(-4, 4))
    shine = 0.45 * np.exp(-((u + 0.4) ** 2 + (v + 0.45) ** 2) / 0.15)
    fill = base * (1 - 0.16 * (u + v))
    fill = fill + (1 - fill) * shine
    whole, inside = whole[..., None], inside[..., None]
    return under * (1 - whole) + 0.3 * base * (whole - inside) + fill * inside


def _colour(
    rng: np.random.Generator,
    saturation: tuple[float, float],
    value: tuple[float, float],
    hue: float | None = None,
) -> Float32[np.ndarray, " channels"]:
    """RGB in [0, 1]; `hue` in degrees, any where None."""
    turns = rng.random() if hue is None else hue % 360 / 360
    return np.array(colorsys.hsv_to_rgb(turns, rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def _spot(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, radius: tuple[float, float]) -> np.ndarray:
    """A soft ellipse somewhere, 1 at its centre."""
    cu, cv, (ru, rv) = rng.random(), rng.random(), rng.uniform(*radius, 2).tolist()
    return np.exp(-(((u - cu) / ru) ** 2)) * np.exp(-(((v - cv) / rv) ** 2))


def _write_split(folder: Path, split: str, config: ScenesConfig, stream: int, count: int) -> None:
    (folder / split).mkdir(parents=True)

    def write(index: int) -> Scene:
        scene = draw_scene(config, stream, index)
        # Whole chroma: halved, the hue of an eight-pixel object would be its surroundings'.
        Image.fromarray(scene.image).save(folder / split / f"{index:06d}.jpg", quality=92, subsampling=0)
        return scene._replace(image=scene.image[:0])

    with ThreadPoolExecutor() as pool:
        scenes = list(pool.map(write, range(count)))
    images = [
        {"id": i + 1, "file_name": f"{i:06d}.jpg", "width": config.size, "height": config.size} for i in range(count)
    ]
    annotations = [
        {"image_id": i + 1, "category_id": label + 1, "bbox": box, "area": round(box[2] * box[3], 2), "iscrowd": 0}
        for i, scene in enumerate(scenes)
        for label, box in zip(scene.labels, scene.boxes_xywh, strict=True)
    ]
    document = {
        "info": {"description": "retina_jax generated scenes", "version": VERSION},
        "images": images,
        "annotations": [{"id": i + 1, **annotation} for i, annotation in enumerate(annotations)],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(class_names(config.classes))],
    }
    (folder / f"{split}.json").write_text(json.dumps(document))


def _check(config: ScenesConfig) -> None:
    if not 2 <= config.classes <= len(SHAPES):
        raise ConfigError(f"data.scenes.classes must be 2 to {len(SHAPES)}, not {config.classes}")
    if not 4 <= config.min_side <= config.max_side <= 0.75 * config.size:
        raise ConfigError(
            "data.scenes must have 4 <= min_side <= max_side <= 0.75 size,"
            f" not {config.min_side:g}, {config.max_side:g} and size {config.size}"
        )
    for field, least in (("train_images", 1), ("val_images", 1), ("max_objects", 1), ("lookalikes", 0)):
        if getattr(config, field) < least:
            raise ConfigError(f"data.scenes.{field} must be at least {least}, not {getattr(config, field)}")
