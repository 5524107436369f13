"""COCO scores of detections. pycocotools is the reference; `precision_recall` computes the same scores much faster. This
module converts the input for both and checks it."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
from jaxtyping import Float, Int
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina_jax.data.classes import unique_names
from retina_jax.errors import PlainError, shortened
from retina_jax.evaluation.precision_recall import (
    MAX_DETECTIONS,
    DetectedBoxes,
    GroundTruth,
    coco_curves,
    coco_operating_point,
    coco_stats,
    detection_limit,
    mean,
    most_objects,
)

SUMMARY = {
    # score: (kind, its abbreviation, IoU, area, detections per image), in pycocotools' order
    "AP": ("Average Precision", "(AP)", "0.50:0.95", "all", 100),
    "AP50": ("Average Precision", "(AP)", "0.50", "all", 100),
    "AP75": ("Average Precision", "(AP)", "0.75", "all", 100),
    "APs": ("Average Precision", "(AP)", "0.50:0.95", "small", 100),
    "APm": ("Average Precision", "(AP)", "0.50:0.95", "medium", 100),
    "APl": ("Average Precision", "(AP)", "0.50:0.95", "large", 100),
    "AR1": ("Average Recall", "(AR)", "0.50:0.95", "all", 1),
    "AR10": ("Average Recall", "(AR)", "0.50:0.95", "all", 10),
    "AR100": ("Average Recall", "(AR)", "0.50:0.95", "all", 100),
    "ARs": ("Average Recall", "(AR)", "0.50:0.95", "small", 100),
    "ARm": ("Average Recall", "(AR)", "0.50:0.95", "medium", 100),
    "ARl": ("Average Recall", "(AR)", "0.50:0.95", "large", 100),
}


class EvaluationError(PlainError, ValueError):
    """Detections that do not fit the ground truth they are scored against; one line that names the ids."""


class Result(msgspec.Struct, gc=False):
    """A detection in COCO's results format."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float


Records = Iterable[Mapping[str, Any]] | Iterable[Result]
KEYS = "image_id", "category_id"
PIECE = 1 << 12  # records that are converted together


class Scores(NamedTuple):
    """COCO scores, each in [0, 1], or None where there is no ground truth to define it."""

    summary: dict[str, float | None]  # the scores of SUMMARY, by name
    per_class: dict[str, float | None]  # AP of each class by its unique name, by ascending category id
    f1_threshold: float | None = None  # score from which on detections have the highest F1 at IoU 0.5
    objects: int = 0  # largest number of objects of a class in an image, crowds left out
    # AP of all detections, if `objects` is above COCO's limit of 100 detections of a class in an image.
    ap_of_all: float | None = None


def coco_results(
    image_id: int,
    boxes_xyxy: Float[np.ndarray, "D 4"],
    scores: Float[np.ndarray, " D"],
    labels: Int[np.ndarray, " D"],
    category_ids: Sequence[int | None],
) -> list[dict[str, Any]]:
    """Returns one image's detections as COCO result records, {"image_id", "category_id", "bbox": [x, y, width, height],
    "score"}, unrounded. Boxes are in pixels of the ORIGINAL image. `category_ids` has the category id of each label; left
    out are classes whose id is None, and negative labels, which are padding."""
    boxes = boxes_xyxy.astype(np.float64)
    boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    return [
        {"image_id": int(image_id), "category_id": int(category_ids[label]), "bbox": box, "score": score}
        for box, score, label in zip(boxes_xywh.tolist(), scores.tolist(), labels.tolist(), strict=True)
        if label >= 0 and category_ids[label] is not None
    ]


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    image_ids: Sequence[int],
    evaluator: Literal["arrays", "pycocotools"] = "arrays",
) -> Scores:
    """Scores bounding boxes as COCO does. Without any detection AP is 0 if there is a box to find, else None.

    Args:
      ground_truth: a COCO annotation file as a dict.
      detections: COCO result records.
      image_ids: the images to score; the ground truth of others is left out.
      evaluator: "pycocotools", or "arrays" (`precision_recall`), which gives the same scores in a fortieth of the time.

    Raises EvaluationError if an image is missing, given twice, or not in the ground truth, if a detection is of another
    image or category, or if a box or score is not finite.
    """
    objects, found, categories = as_arrays(ground_truth, detections, image_ids)
    if evaluator == "arrays":
        curves = coco_curves(objects, found, categories)
        stats, precision = coco_stats(curves), curves.precision
    else:
        stats, precision = _by_pycocotools(ground_truth, detections, sorted(image_ids))

    names = unique_names(sorted((c["id"], str(c.get("name", c["id"]))) for c in ground_truth["categories"]))
    aps = [mean(precision[:, :, k, 0, -1]) for k in range(len(names))]  # all areas, 100 detections
    summary, per_class = ([None if value < 0 else float(value) for value in values] for values in (stats, aps))
    by_name = dict(zip(SUMMARY, summary, strict=True)), dict(zip(names, per_class, strict=True))
    best, most, ap_of_all = coco_operating_point(objects, found), most_objects(objects), None
    if most > MAX_DETECTIONS[-1]:
        curves = coco_curves(objects, found, categories, (detection_limit(objects, found),))
        ap_of_all = mean(curves.precision[..., 0, 0])
    return Scores(*by_name, best.score if best else None, most, ap_of_all)


def read_results(file: Path) -> Iterator[Result]:
    """Yields the detections in a file. They are decoded in pieces: all of COCO's 500,000 would take 160 MiB."""
    entries = msgspec.json.decode(file.read_bytes(), type=list[msgspec.Raw])
    for start in range(0, len(entries), PIECE):
        piece = b",".join(entries[start : start + PIECE])
        try:
            yield from msgspec.json.decode(b"[" + piece + b"]", type=list[Result])
        except msgspec.ValidationError as error:
            raise msgspec.ValidationError(f"{error} of the entries from {start}") from None


def as_arrays(
    ground_truth: Mapping[str, Any], detections: Records, image_ids: Sequence[int]
) -> tuple[GroundTruth, DetectedBoxes, int]:
    """Returns the arguments of `coco_curves`: images by their index in the ascending `image_ids`, categories by ascending
    id, and their number. Ground truth of other images is left out. Raises the EvaluationErrors of `evaluate_coco`."""
    if not image_ids:
        raise EvaluationError("image_ids is empty: give at least one image to score")
    known, categories = ({record["id"] for record in ground_truth[kind]} for kind in ("images", "categories"))
    places = [{record_id: i for i, record_id in enumerate(sorted(ids))} for ids in (set(image_ids), categories)]
    _refuse("image_ids has duplicates; give each image once", {i for i, n in Counter(image_ids).items() if n > 1})
    _refuse("image_ids has images that are not in the ground truth", places[0].keys() - known)

    listed = ground_truth["annotations"]
    columns = _columns(listed, places)
    _check_finite("annotations", 0, listed, columns[2:])
    columns += (
        np.array([_area(a) for a in listed], np.float64),
        np.array([bool(a.get("iscrowd", 0)) for a in listed], bool),
    )
    kept = (columns[0] >= 0) & (columns[1] >= 0)

    parts, unknown, number, left = [_columns([], places, ("score",))], (set(), set()), 0, iter(detections)
    while piece := list(itertools.islice(left, PIECE)):
        parts.append(_columns(piece, places, ("score",)))
        for ids, key, column in zip(unknown, KEYS, parts[-1], strict=False):
            ids.update(_getter(piece)(key)(piece[row]) for row in np.flatnonzero(column < 0))
        if not any(unknown):
            _check_finite("detections", number, piece, parts[-1][2:])
        number += len(piece)
    _refuse("detections are of images that are not in image_ids", unknown[0])
    _refuse("detections are of category ids not in the ground truth", unknown[1])
    found = DetectedBoxes(*map(np.concatenate, zip(*parts, strict=True)))
    return GroundTruth(*(column[kept] for column in columns)), found, len(places[1])


def _getter(records: Sequence[Any]) -> Callable[[str], Callable[[Any], Any]]:
    return attrgetter if records and isinstance(records[0], Result) else itemgetter


def _columns(records: Sequence[Any], places: Sequence[dict[int, int]], others: Sequence[str] = ()) -> list[np.ndarray]:
    """Returns the places of the images and categories (-1: none), the boxes, and the numbers in the fields `others`."""
    get = _getter(records)
    keys = zip(KEYS, places, strict=True)
    of_places = [np.array([place.get(i, -1) for i in map(get(key), records)], np.int64) for key, place in keys]
    boxes_xywh = np.array(list(map(get("bbox"), records)), np.float64).reshape(len(records), 4)
    return [*of_places, boxes_xywh, *(np.array(list(map(get(key), records)), np.float64) for key in others)]


def _refuse(complaint: str, ids: set[int]) -> None:
    if ids:
        shown = ", ".join(map(str, sorted(ids)[:10])) + (", ..." if len(ids) > 10 else "")
        raise EvaluationError(f"{complaint}: {shown} ({len(ids)} in all)")


def _check_finite(name: str, first: int, records: Sequence[Any], columns: Sequence[np.ndarray]) -> None:
    """Raises EvaluationError for a box or score that is not finite; `first` is the number of the first record."""
    finite = np.isfinite(np.column_stack(columns)).all(axis=1)
    for row in np.flatnonzero(~finite)[:1].tolist():
        get, record = _getter(records), records[row]
        scored = f" and score {get('score')(record)}" if len(columns) > 1 else ""
        where = f"{name}[{first + row}] (image {get('image_id')(record)})"
        raise EvaluationError(f"{where} has bbox {get('bbox')(record)}{scored}: give finite numbers")


def _area(record: Mapping[str, Any]) -> float:
    return float(record["area"] if "area" in record else record["bbox"][2] * record["bbox"][3])


def _by_pycocotools(
    ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int]
) -> tuple[Float[np.ndarray, " 12"], Float[np.ndarray, "10 101 K 4 3"]]:
    """Returns the twelve scores and the precisions of pycocotools; `image_ids` ascend."""
    wanted = set(image_ids)

    def index(records: Iterable[Mapping[str, Any]]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image["id"]} for image in ground_truth["images"] if image["id"] in wanted],
            "categories": [dict(category) for category in ground_truth["categories"]],
            # pycocotools writes into its records and takes id 0 for "no match": it gets copies, numbered from 1.
            "annotations": [
                {key: record[key] for key in ("image_id", "category_id")}
                | {"id": number, "bbox": list(record["bbox"]), "area": _area(record)}
                | {"iscrowd": record.get("iscrowd", 0), "score": record.get("score")}
                for number, record in enumerate(records, start=1)
            ],
        }
        coco.createIndex()
        return coco

    objects = (a for a in ground_truth["annotations"] if a["image_id"] in wanted)
    results = ({key: d[key] for key in ("image_id", "category_id", "bbox", "score")} for d in detections)
    with _without_progress():
        evaluation = COCOeval(index(objects), index(results), "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"]


@contextlib.contextmanager
def _without_progress() -> Iterator[None]:
    """Mutes pycocotools. The output itself is not redirected: other threads may report slow files meanwhile."""
    modules = pycocotools.coco, pycocotools.cocoeval
    for module in modules:
        module.print = lambda *words, **options: None
    try:
        yield
    finally:
        for module in modules:
            del module.print


def score_text(value: float | None) -> str:
    """Returns a score to three digits, n/a if it is undefined."""
    return "n/a" if value is None else f"{value:.3f}"


def coco_table(scores: Scores) -> str:
    """Returns COCO's twelve lines and the AP of each class; n/a if there is no ground truth. No trailing newline."""
    lines = [
        f" {kind:<17} {short} @[ IoU={iou:<9} | area={area:>6} | maxDets={count:>3} ] = {score_text(scores.summary[key]):>5}"
        for key, (kind, short, iou, area, count) in SUMMARY.items()
    ]
    names = [shortened(name) for name in scores.per_class]
    width = max(map(len, names), default=0)
    of_classes = zip(names, scores.per_class.values(), strict=True)
    lines += [f" AP of {name:<{width}}  {score_text(value):>5}" for name, value in of_classes]
    return "\n".join(lines)
