"""Generated scenes: a small detection task with the class imbalance of the paper's Section 3, without a download. A class
is a shape and a hue ("red disc"). Objects are few, mostly small, and overlap. The background has hard negatives."""

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
from jaxtyping import Float, Float32, UInt8
from numpy.random import Generator
from PIL import Image, ImageDraw

from retina_jax.config import ScenesConfig

Span = tuple[float, float]
VERSION = 1  # incremented whenever the same settings give other pixels or boxes
# Degrees. Class k is the k-th shape in the k-th hue; the first classes are the easiest to distinguish.
HUES = {
    **{"red": 0.0, "blue": 228.0, "yellow": 53.0, "green": 128.0, "violet": 270.0, "cyan": 184.0, "orange": 27.0},
    **{"pink": 332.0, "lime": 83.0, "azure": 206.0, "magenta": 301.0, "teal": 160.0},
}
EMPTY_SHARE = 0.05  # share of images without objects
LEAST_VISIBLE = 0.4  # share of an object's pixels; a shape that would hide more is placed elsewhere or left out
PLACES_TRIED = 20
TRAIN, VAL = 1, 2  # random streams of the seed
SUPERSAMPLING = 4  # shapes are drawn this many times larger and averaged


def _around(radii: list[float], start: float = 0.0) -> Float[np.ndarray, "n 2"]:
    """Returns points at equal angles around the centre; the first is `start` turns clockwise from the top."""
    angles = 2 * np.pi * (np.arange(len(radii)) / len(radii) + start)
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.array(radii)[:, None]


def _arc(turns: Float[np.ndarray, " n"], radius: float, centre: float) -> Float[np.ndarray, "n 2"]:
    return np.stack([centre + radius * np.cos(2 * np.pi * turns), radius * np.sin(2 * np.pi * turns)], axis=1)


_T = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_HEART_DOWN = -(13 * np.cos(_T) - 5 * np.cos(2 * _T) - 2 * np.cos(3 * _T) - np.cos(4 * _T))
_CRESCENT = _arc(np.linspace(0.12, 0.88, 40), 1.0, 0.0), _arc(np.linspace(0.78, 0.22, 32), 0.70, 0.62)
_CROSS = [[1, 0], [2, 0], [2, 1], [3, 1], [3, 2], [2, 2], [2, 3], [1, 3], [1, 2], [0, 2], [0, 1], [1, 1]]
# Polygons, in any unit, y down; the second one is the hole of the ring.
SHAPES: dict[str, tuple[Float[np.ndarray, "n 2"], ...]] = {
    "disc": (_around([1.0] * 48),),
    "square": (_around([1.0] * 4, 1 / 8),),
    "triangle": (_around([1.0] * 3),),
    "cross": (np.array(_CROSS) - 1.5,),
    "ring": (_around([1.0] * 48), _around([0.52] * 48)),
    "star": (_around([1.0, 0.42] * 5),),
    "diamond": (_around([1.0, 0.75] * 2),),
    "heart": (np.stack([16 * np.sin(_T) ** 3, _HEART_DOWN], axis=1),),
    "hexagon": (_around([1.0] * 6),),
    "crescent": (np.concatenate(_CRESCENT),),
    "arrow": (np.array([[0, -2], [2, 0.2], [0.8, 0.2], [0.8, 2], [-0.8, 2], [-0.8, 0.2], [-2, 0.2]]),),
    "bolt": (np.array([[0.5, -2], [-1.3, 0.4], [-0.2, 0.4], [-0.6, 2], [1.3, -0.6], [0.2, -0.6], [1.2, -2]]),),
}
CLASSES = tuple(zip(SHAPES, HUES.values(), strict=True))  # shape and hue of each class
CLASS_NAMES = [f"{hue} {shape}" for hue, shape in zip(HUES, SHAPES, strict=True)]


class Scene(NamedTuple):
    """An image and its objects; boxes include hidden parts."""

    image: UInt8[np.ndarray, "size size 3"]
    labels: list[int]
    boxes_xywh: list[tuple[float, float, float, float]]
    visible: list[float]  # visible share of each object's pixels


def write_scenes(config: ScenesConfig) -> Path:
    """Writes the scenes as JPEGs and COCO JSONs, unless they exist. Returns the folder of train.json, train, val.json,
    val, named by a hash of the settings. It gets the name when complete, so several processes may write at once."""
    setting = {key: value for key, value in dataclasses.asdict(config).items() if key != "folder"}
    digest = hashlib.sha256(json.dumps([VERSION, setting], sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(config.folder) / f"{config.size}px_{config.classes}classes_{digest}"
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _write_split(unfinished, "train", config, TRAIN, config.train_images)
        _write_split(unfinished, "val", config, VAL, config.val_images)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def draw_scene(config: ScenesConfig, stream: int, index: int) -> Scene:
    """Draws scene `index` of a stream (TRAIN or VAL), a pure function of its arguments."""
    rng = np.random.default_rng([config.seed % 2**64, stream, index])
    picture = draw_background(rng, config.size)
    objects = 0
    if rng.random() >= EMPTY_SHARE:
        objects = int(rng.integers(min(1, config.max_objects), config.max_objects, endpoint=True))
    wanted = [True] * objects + [False] * int(rng.integers(0, config.lookalikes, endpoint=True))
    owner = np.full(picture.shape[:2], -1)
    labels, boxes, areas, visible = [], [], np.zeros(0, int), np.zeros(0, int)
    for is_object in rng.permutation(wanted):
        label = int(rng.integers(config.classes))
        shape, hue = CLASSES[label]
        if not is_object:  # the class's shape in another hue, or its hue in another shape
            other = CLASSES[int((label + rng.integers(1, len(SHAPES))) % len(SHAPES))]
            shape, hue = (shape, other[1]) if rng.random() < 0.5 else (other[0], hue)
        for _ in range(PLACES_TRIED):
            box = _draw_box(rng, config)
            side = float(np.sqrt(box[2] * box[3]))
            (x, y), cover, inside = draw_shape(shape, box, rng.uniform(-0.25, 0.25), 0.5 + 0.02 * side)
            patch = np.s_[y : y + cover.shape[0], x : x + cover.shape[1]]
            solid = cover >= 0.5
            left = visible - np.bincount(owner[patch][solid] + 1, minlength=len(labels) + 1)[1:]
            if not solid.any() or (left < LEAST_VISIBLE * areas).any():
                continue
            picture[patch] = painted(rng, picture[patch], cover, inside, hue)
            owner[patch][solid] = len(labels) if is_object else -1
            visible = left
            if is_object:
                labels.append(label)
                boxes.append(box)
                areas, visible = np.append(areas, solid.sum()), np.append(visible, solid.sum())
            break
    picture += 0.012 * rng.standard_normal(picture.shape, np.float32)
    return Scene((picture.clip(0, 1) * 255 + 0.5).astype(np.uint8), labels, boxes, (visible / areas).tolist())


def draw_background(rng: Generator, size: int) -> Float32[np.ndarray, "size size 3"]:
    """Draws a background in [0, 1]: a muted colour, noise of several octaves, blobs, gratings and lines."""
    ramp = (np.arange(size, dtype=np.float32) + 0.5) / size
    u, v = ramp[None, :, None], ramp[:, None, None]
    picture = np.zeros((size, size, 3), np.float32) + _colour(rng, (0.1, 0.5), (0.35, 0.7))
    for cells, strength in ((3, 0.35), (6, 0.25), (12, 0.18), (24, 0.14), (48, 0.1)):
        noise = rng.random((cells, cells, 3), np.float32)
        noise = 0.35 * noise + 0.65 * noise.mean(2, keepdims=True)  # less colour than brightness
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


def draw_shape(
    shape: str, box_xywh: tuple[float, float, float, float], rotation: float, outline: float
) -> tuple[tuple[int, int], Float32[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
    """Draws a shape, rotated by `rotation` (radians) and then stretched to fill the box exactly. Returns the pixel (x,
    y) of the patch's corner, the share of each pixel inside the shape, and the share more than `outline` pixels inside."""
    x, y, width, height = box_xywh
    left, top = int(np.floor(x)), int(np.floor(y))
    patch_w, patch_h = int(np.ceil(x + width)) - left, int(np.ceil(y + height)) - top
    turn = np.array([[np.cos(rotation), np.sin(rotation)], [-np.sin(rotation), np.cos(rotation)]])
    polygons = [polygon @ turn for polygon in SHAPES[shape]]
    low, high = polygons[0].min(0), polygons[0].max(0)
    drawing = Image.new("L", (patch_w * SUPERSAMPLING, patch_h * SUPERSAMPLING))
    pen = ImageDraw.Draw(drawing)
    for polygon, ink in zip(polygons, (255, 0), strict=False):
        pixels = (polygon - low) / (high - low) * [width, height] + [x - left, y - top]
        # PIL's coordinates are pixel centres, ours are corners.
        pen.polygon((pixels * SUPERSAMPLING - 0.5).ravel().tolist(), fill=ink)
    mask = np.asarray(drawing)
    radius = round(outline * SUPERSAMPLING)
    padded, diagonal = np.pad(mask, radius), round(radius / 2**0.5)
    steps = [(0, radius), (0, -radius), (radius, 0), (-radius, 0)]
    steps += [(a * diagonal, b * diagonal) for a in (-1, 1) for b in (-1, 1)]
    shifted = [padded[radius + y :, radius + x :][: mask.shape[0], : mask.shape[1]] for y, x in steps]
    eroded = np.minimum.reduce([mask, *shifted])
    cover, inside = (np.asarray(Image.fromarray(m).reduce(SUPERSAMPLING), np.float32) / 255 for m in (mask, eroded))
    return (left, top), cover, inside


def _draw_box(rng: Generator, config: ScenesConfig) -> tuple[float, float, float, float]:
    # The square of a uniform number favours small sizes: half are below min_side × (max / min) ^ 1/4.
    side = config.min_side * (config.max_side / config.min_side) ** (rng.random() ** 2)
    aspect = np.exp(rng.uniform(np.log(0.6), np.log(1.6)))
    width, height = (float(min(s, config.size)) for s in (side * aspect**0.5, side / aspect**0.5))
    x, y = rng.uniform(0, config.size - width), rng.uniform(0, config.size - height)
    # Hundredths of a pixel, as in COCO; shapes are drawn from the rounded numbers.
    return int(x * 100) / 100, int(y * 100) / 100, int(width * 100) / 100, int(height * 100) / 100


def painted(rng: Generator, under: np.ndarray, cover: np.ndarray, inside: np.ndarray, hue: float) -> np.ndarray:
    """Returns the patch with a shape painted on it, lit from the upper left, with a dark outline."""
    height, width = cover.shape
    u = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    v = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
    base = _colour(rng, (0.72, 1.0), (0.75, 1.0), hue + rng.uniform(-4, 4))
    shine = 0.45 * np.exp(-((u + 0.4) ** 2 + (v + 0.45) ** 2) / 0.15)
    fill = base * (1 - 0.16 * (u + v))
    fill = fill + (1 - fill) * shine
    cover, inside = cover[..., None], inside[..., None]
    return under * (1 - cover) + 0.3 * base * (cover - inside) + fill * inside


def _colour(rng: Generator, saturation: Span, value: Span, hue: float | None = None) -> Float32[np.ndarray, " 3"]:
    """Draws RGB in [0, 1]; `hue` in degrees, None: random."""
    turns = rng.random() if hue is None else hue % 360 / 360
    return np.array(colorsys.hsv_to_rgb(turns, rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def _spot(rng: Generator, u: np.ndarray, v: np.ndarray, radius: Span) -> np.ndarray:
    """Draws a soft ellipse at a random place, 1 at its centre."""
    cu, cv, (ru, rv) = rng.random(), rng.random(), rng.uniform(*radius, 2).tolist()
    return np.exp(-(((u - cu) / ru) ** 2)) * np.exp(-(((v - cv) / rv) ** 2))


def _write_split(folder: Path, split: str, config: ScenesConfig, stream: int, count: int) -> None:
    (folder / split).mkdir(parents=True)

    def write(index: int) -> Scene:
        scene = draw_scene(config, stream, index)
        # No chroma subsampling, which would blend the hue of an eight-pixel object with its surroundings.
        Image.fromarray(scene.image).save(folder / split / f"{index:06d}.jpg", quality=92, subsampling=0)
        return scene._replace(image=scene.image[:0])

    with ThreadPoolExecutor() as pool:
        scenes = list(pool.map(write, range(count)))
    size = {"width": config.size, "height": config.size}
    objects = [(i, *o) for i, scene in enumerate(scenes, 1) for o in zip(scene.labels, scene.boxes_xywh, strict=True)]
    document = {
        "info": {"description": "retina_jax generated scenes", "version": VERSION},
        "images": [{"id": i + 1, "file_name": f"{i:06d}.jpg"} | size for i in range(count)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k + 1, "bbox": b, "area": round(b[2] * b[3], 2), "iscrowd": 0}
            for n, (i, k, b) in enumerate(objects, 1)
        ],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(CLASS_NAMES[: config.classes])],
    }
    (folder / f"{split}.json").write_text(json.dumps(document))
