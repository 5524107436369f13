"""COCO scores. pycocotools is the truth; `coco_scores` finds the same much faster. This file feeds either and says where
the input cannot be meant."""

import contextlib
import io
import math
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retina_jax.data.classes import unique_names
from retina_jax.errors import PlainError
from retina_jax.evaluation.precision_recall import Found, Truth, coco_curves, coco_stats

SUMMARY = {
    # score: (kind, IoU, area, detections an image), in pycocotools' order
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


class Scores(NamedTuple):
    """COCO scores, each in [0, 1], or None where there is no ground truth to define it."""

    summary: dict[str, float | None]
    """Exactly the keys of SUMMARY: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl."""
    per_class: dict[str, float | None]
    """AP (IoU .50 to .95, all areas, 100 detections an image) of each class by its unique name (`classes.unique_names`), in
    the order of category ids."""


def coco_results(
    image_id: int,
    boxes_xyxy: Float[np.ndarray, "D 4"],
    scores: Float[np.ndarray, " D"],
    labels: Int[np.ndarray, " D"],
    category_ids: Sequence[int | None],
) -> list[dict[str, Any]]:
    """One image's detections as COCO result records.

    Args:
      image_id: the image's id in the ground truth.
      boxes_xyxy: boxes in pixels of the ORIGINAL image.
      scores: their scores.
      labels: classes 0 to K - 1; a negative label is padding and is left out.
      category_ids: the K category ids that the labels stand for; None of a class without detections here.

    Returns:
      {"image_id", "category_id", "bbox": [x, y, width, height], "score"} for each detection, unrounded.
    """
    real = labels >= 0
    boxes = boxes_xyxy[real].astype(np.float64)
    boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    rows = zip(boxes_xywh.tolist(), scores[real].tolist(), labels[real].tolist(), strict=True)
    return [
        {"image_id": int(image_id), "category_id": int(category_ids[label]), "bbox": box, "score": score}
        for box, score, label in rows
    ]


def evaluate_coco(
    truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    image_ids: Sequence[int],
    evaluated_ids: Sequence[int] | None = None,
    evaluator: Literal["arrays", "pycocotools"] = "arrays",
) -> Scores:
    """Score detections as COCO does (bounding boxes, 100 detections an image and class).

    An image without detections counts against the recall; no detections at all give AP 0 where there is a box to find, and
    None where there is none. Crowd regions and the areas of the ground truth are treated by pycocotools' rules. The inputs
    are not changed.

    Args:
      truth: a COCO annotation file as a dict: images, annotations, categories.
      detections: COCO result records, as from `coco_results`.
      image_ids: the images to score; the ground truth of others plays no part.
      evaluated_ids: the images that the detector was run on, one entry a run. Where given, each of `image_ids` must be
        there exactly once: an image lost between hosts would otherwise only look like a lower AP.
      evaluator: who counts: "pycocotools", or "arrays" (`coco_scores`), which gives the same numbers in a fortieth of the
        time.

    Raises:
      EvaluationError: an image is missing, twice, or not in the ground truth; a detection is of another image or
        category; a box or score is not finite; there is no such evaluator.
    """
    if evaluator not in EVALUATORS:
        raise EvaluationError(f"evaluator must be one of {', '.join(EVALUATORS)}, not {evaluator}")
    check(truth, detections, image_ids, evaluated_ids)
    stats, precision = EVALUATORS[evaluator](truth, detections, sorted(set(image_ids)))

    categories = sorted((category["id"], str(category.get("name", category["id"]))) for category in truth["categories"])
    per_class = {}
    for k, name in enumerate(unique_names(categories)):
        values = precision[:, :, k, 0, -1]  # IoU, recall, class; all areas, 100 detections
        values = values[values > -1]
        per_class[name] = float(values.mean()) if values.size else None
    summary = [None if value < 0 else float(value) for value in stats]
    return Scores(dict(zip(SUMMARY, summary, strict=True)), per_class)


def by_arrays(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int]
) -> tuple[Float[np.ndarray, " 12"], Float[np.ndarray, "10 101 K 4 3"]]:
    """The twelve numbers and the precisions of `coco_scores`; `image_ids` ascend."""
    curves = coco_curves(*in_arrays(truth, detections, image_ids))
    return coco_stats(curves), curves.precision


def in_arrays(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int]
) -> tuple[Truth, Found, int]:
    """What `coco_curves` takes: images by their place in `image_ids`, categories by ascending id, and how many there are.

    Truth of other images is left out; `check` says what the detections must be.
    """
    images = {image_id: i for i, image_id in enumerate(image_ids)}
    categories = {k: i for i, k in enumerate(sorted({category["id"] for category in truth["categories"]}))}
    boxes = [a for a in truth["annotations"] if a["image_id"] in images and a["category_id"] in categories]

    def places(records: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        of_image = np.array([images[record["image_id"]] for record in records], np.int64)
        of_category = np.array([categories[record["category_id"]] for record in records], np.int64)
        boxes_xywh = np.array([record["bbox"] for record in records], np.float64).reshape(len(records), 4)
        return of_image, of_category, boxes_xywh

    areas = [a["area"] if "area" in a else a["bbox"][2] * a["bbox"][3] for a in boxes]
    crowds = [bool(a.get("iscrowd", 0)) for a in boxes]
    scores = [d["score"] for d in detections]
    return (
        Truth(*places(boxes), np.array(areas, np.float64), np.array(crowds, bool)),
        Found(*places(detections), np.array(scores, np.float64)),
        len(categories),
    )


def by_pycocotools(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int]
) -> tuple[Float[np.ndarray, " 12"], Float[np.ndarray, "10 101 K 4 3"]]:
    """The twelve numbers and the precisions of pycocotools; `image_ids` ascend."""
    wanted = set(image_ids)
    shared = {
        "images": [{"id": image["id"]} for image in truth["images"] if image["id"] in wanted],
        "categories": [dict(category) for category in truth["categories"]],
    }
    # pycocotools writes into its records and takes id 0 for "no match": it gets copies, numbered from 1.
    boxes = [
        {
            "id": number,
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": list(a["bbox"]),
            "area": a.get("area", a["bbox"][2] * a["bbox"][3]),
            "iscrowd": a.get("iscrowd", 0),
        }
        for number, a in enumerate((a for a in truth["annotations"] if a["image_id"] in wanted), start=1)
    ]
    results = [
        {**d, "bbox": list(d["bbox"]), "id": number, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0}
        for number, d in enumerate(detections, start=1)
    ]
    with quiet():
        evaluation = COCOeval(_index(shared, boxes), _index(shared, results), "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"]


EVALUATORS = {"arrays": by_arrays, "pycocotools": by_pycocotools}


def _index(shared: dict[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {**shared, "annotations": annotations}
    coco.createIndex()
    return coco


def check(
    truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    image_ids: Sequence[int],
    evaluated_ids: Sequence[int] | None,
) -> None:
    """Raise the EvaluationErrors of `evaluate_coco`."""
    wanted = set(image_ids)

    def refuse(ids: Iterable[int], complaint: str) -> None:
        ids = sorted(set(ids))
        if ids:
            shown = ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")
            raise EvaluationError(f"{complaint}: {shown} ({len(ids)} in all)")

    if not wanted:
        raise EvaluationError("image_ids is empty: give at least one image to score")
    refuse((i for i, n in Counter(image_ids).items() if n > 1), "image_ids holds an image twice, give each once")
    refuse(wanted - {image["id"] for image in truth["images"]}, "image_ids holds images that the ground truth has not")
    if evaluated_ids is not None:
        counts = Counter(evaluated_ids)
        refuse(wanted - counts.keys(), "evaluated_ids misses images that are to be scored, run the detector on them")
        refuse((i for i, n in counts.items() if n > 1), "evaluated_ids holds an image twice, evaluate each once")
        refuse(counts.keys() - wanted, "evaluated_ids holds images that are not to be scored")
    refuse({d["image_id"] for d in detections} - wanted, "detections are of images that are not in image_ids")
    refuse(
        {d["category_id"] for d in detections} - {category["id"] for category in truth["categories"]},
        "detections are of category ids that the ground truth has not",
    )
    for number, a in enumerate(truth["annotations"]):
        if not all(map(math.isfinite, a["bbox"])):
            raise EvaluationError(
                f"annotations[{number}] (image {a['image_id']}) has bbox {a['bbox']}: give finite numbers"
            )
    for number, d in enumerate(detections):
        if not all(map(math.isfinite, (*d["bbox"], d["score"]))):
            raise EvaluationError(
                f"detections[{number}] (image {d['image_id']}) has bbox {d['bbox']} and score {d['score']}: give finite "
                "numbers"
            )


class _Muted(io.TextIOBase):
    """Standard output less what one thread writes to it."""

    def __init__(self, stream: Any):
        self.stream, self.thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.thread else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what this thread prints. Others, such as a training loop beside an evaluation, print on."""
    with contextlib.redirect_stdout(_Muted(sys.stdout)):
        yield


def number(value: float | None) -> str:
    """A score to three digits, n/a where it is undefined."""
    return "n/a" if value is None else f"{value:.3f}"


def coco_table(scores: Scores) -> str:
    """COCO's twelve lines and each class's AP; "n/a" where there is no ground truth. No trailing newline."""

    lines = [
        f" {kind:<17} {short} @[ IoU={iou:<9} | area={area:>6} | maxDets={count:>3} ] = {number(scores.summary[key]):>5}"
        for key, (kind, short, iou, area, count) in SUMMARY.items()
    ]
    width = max((len(name) for name in scores.per_class), default=0)
    lines += [f" AP of {name:<{width}}  {number(value):>5}" for name, value in scores.per_class.items()]
    return "\n".join(lines)
