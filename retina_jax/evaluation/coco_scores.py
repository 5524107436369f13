"""COCO scores of detections. pycocotools is the reference; `precision_recall` computes the same scores much faster. This
module converts the input for both and checks it."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    DetectedBoxes,
    GroundTruth,
    coco_curves,
    coco_operating_point,
    coco_stats,
    mean,
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
    """A detection in COCO's results format, in half the memory of a dict; its fields are read as those of a dict."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


Results = Sequence[Mapping[str, Any]] | Sequence[Result]


class Scores(NamedTuple):
    """COCO scores, each in [0, 1], or None where there is no ground truth to define it."""

    summary: dict[str, float | None]  # the scores of SUMMARY, by name
    per_class: dict[str, float | None]  # AP of each class by its unique name, by ascending category id
    f1_threshold: float | None = None  # score from which on detections have the highest F1 at IoU 0.5


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
    detections: Results,
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
    check_inputs(ground_truth, detections, image_ids)
    objects, found, categories = as_arrays(ground_truth, detections, sorted(image_ids))
    if evaluator == "arrays":
        curves = coco_curves(objects, found, categories)
        stats, precision = coco_stats(curves), curves.precision
    else:
        stats, precision = _by_pycocotools(ground_truth, detections, sorted(image_ids))

    names = unique_names(sorted((c["id"], str(c.get("name", c["id"]))) for c in ground_truth["categories"]))
    aps = [mean(precision[:, :, k, 0, -1]) for k in range(len(names))]  # all areas, 100 detections
    summary, per_class = ([None if value < 0 else float(value) for value in values] for values in (stats, aps))
    best = coco_operating_point(objects, found)
    by_name = dict(zip(SUMMARY, summary, strict=True)), dict(zip(names, per_class, strict=True))
    return Scores(*by_name, best.score if best else None)


def as_arrays(
    ground_truth: Mapping[str, Any], detections: Results, image_ids: Sequence[int]
) -> tuple[GroundTruth, DetectedBoxes, int]:
    """Returns the arguments of `coco_curves`: images by their index in `image_ids`, categories by ascending id, and their
    number. Ground truth of other images is left out; the detections must have passed `check_inputs`."""
    images = {image_id: i for i, image_id in enumerate(image_ids)}
    categories = {k: i for i, k in enumerate(sorted({category["id"] for category in ground_truth["categories"]}))}
    boxes = [a for a in ground_truth["annotations"] if a["image_id"] in images and a["category_id"] in categories]

    def columns(records: Results) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        of_image = np.array([images[record["image_id"]] for record in records], np.int64)
        of_category = np.array([categories[record["category_id"]] for record in records], np.int64)
        boxes_xywh = np.array([record["bbox"] for record in records], np.float64).reshape(len(records), 4)
        return of_image, of_category, boxes_xywh

    areas = np.array([_area(a) for a in boxes], np.float64)
    crowds = np.array([bool(a.get("iscrowd", 0)) for a in boxes], bool)
    found = DetectedBoxes(*columns(detections), np.array([d["score"] for d in detections], np.float64))
    return GroundTruth(*columns(boxes), areas, crowds), found, len(categories)


def _area(record: Mapping[str, Any]) -> float:
    return float(record["area"] if "area" in record else record["bbox"][2] * record["bbox"][3])


def _by_pycocotools(
    ground_truth: Mapping[str, Any], detections: Results, image_ids: Sequence[int]
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


def check_inputs(ground_truth: Mapping[str, Any], detections: Results, image_ids: Sequence[int]) -> None:
    """Raises the EvaluationErrors of `evaluate_coco`."""
    if not image_ids:
        raise EvaluationError("image_ids is empty: give at least one image to score")
    wanted = set(image_ids)
    images, categories = ({record["id"] for record in ground_truth[kind]} for kind in ("images", "categories"))
    for complaint, ids in {
        "image_ids has duplicates; give each image once": {i for i, n in Counter(image_ids).items() if n > 1},
        "image_ids has images that are not in the ground truth": wanted - images,
        "detections are of images that are not in image_ids": {d["image_id"] for d in detections} - wanted,
        "detections are of category ids not in the ground truth": {d["category_id"] for d in detections} - categories,
    }.items():
        if ids:
            shown = ", ".join(map(str, sorted(ids)[:10])) + (", ..." if len(ids) > 10 else "")
            raise EvaluationError(f"{complaint}: {shown} ({len(ids)} in all)")
    for name, records in (("annotations", ground_truth["annotations"]), ("detections", detections)):
        for number, record in enumerate(records):
            score = record["score"] if records is detections else 0
            if not all(map(math.isfinite, (*record["bbox"], score))):
                scored = f" and score {score}" if records is detections else ""
                where = f"{name}[{number}] (image {record['image_id']})"
                raise EvaluationError(f"{where} has bbox {record['bbox']}{scored}: give finite numbers")


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
