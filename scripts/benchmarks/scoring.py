"""The benchmark of COCO scoring, with detections generated from the ground truth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from benchmarks.work import BenchmarkError, Task, Work
from retina_jax.data.classes import COCO_CATEGORIES
from retina_jax.data.coco_document import parse_coco
from retina_jax.evaluation.coco_scores import evaluate_coco

RECALLED, NEAR = 0.62, 0.5
"""Share of the boxes that are detected; of the other detections, share of those near a box."""


def make(task: Task) -> Work:
    """Prepares scoring by this project's evaluator."""
    return scored(task, "arrays")


def scored(task: Task, evaluator: Literal["arrays", "pycocotools"]) -> Work:
    """Prepares the scoring of `task.detections` detections generated from `task.annotations`, a COCO JSON or text as in
    `read_boxes`."""
    path = Path(task.annotations)
    if not path.is_file():
        raise BenchmarkError(f"{path}: no such file; --annotations must be a COCO JSON or text of boxes")
    ground_truth = read_boxes(path) if path.suffix == ".txt" else parse_coco(path).ground_truth()
    ids = [image["id"] for image in ground_truth["images"]]
    found = detections_like(ground_truth, task.detections / len(ids), task.seed)
    summary = evaluate_coco(ground_truth, found, ids, evaluator=evaluator).summary
    return Work(
        lambda: evaluate_coco(ground_truth, found, ids, evaluator=evaluator),
        images=len(ids),
        facts={"detections": len(found), "boxes": len(ground_truth["annotations"]), "AP": summary["AP"]},
    )


def read_boxes(path: Path) -> dict[str, Any]:
    """Reads COCO ground truth from lines of FOLDER/000000000139.jpg x1,y1,x2,y2,class x1,y1,x2,y2,class ... (pixels;
    class 0 to 79). Areas are those of the boxes, there are no crowds, and an image ends at its last box."""
    images, annotations = [], []
    for line in path.read_text().splitlines():
        name, *boxes = line.split(" ")
        rows = [[int(number) for number in box.split(",")] for box in boxes]
        width, height = (max((row[i] for row in rows), default=1) for i in (2, 3))
        images.append({"id": int(Path(name).stem), "width": width, "height": height})
        annotations += [
            {
                "id": len(annotations) + number,
                "image_id": images[-1]["id"],
                "category_id": COCO_CATEGORIES[label][0],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            for number, (x1, y1, x2, y2, label) in enumerate(rows, start=1)
        ]
    categories = [{"id": category_id, "name": name} for category_id, name in COCO_CATEGORIES]
    return {"images": images, "annotations": annotations, "categories": categories}


def detections_like(ground_truth: Mapping[str, Any], per_image: float, seed: int) -> list[dict[str, Any]]:
    """Generates COCO result records: most ground-truth boxes, slightly shifted, with high scores; duplicates, some with
    another class, and random boxes, with low scores. AP is about 0.36 on val2017.

    Args:
      ground_truth: COCO dict of images (with sizes), annotations (at least one) and categories.
      per_image: mean number of detections per image; the total is `round(per_image * images)`.
      seed: random seed.

    Returns:
      Records sorted by image, then by falling score, with float32 values, as from `coco_results`.
    """
    rng = np.random.default_rng(seed)
    images, annotations = ground_truth["images"], ground_truth["annotations"]
    total = round(per_image * len(images))
    row_of = {image["id"]: row for row, image in enumerate(images)}
    rows = np.array([row_of[a["image_id"]] for a in annotations])
    labels = np.array([a["category_id"] for a in annotations])
    boxes_xywh = np.array([a["bbox"] for a in annotations], np.float64)

    recalled = rng.permutation(len(rows))[: min(total, round(RECALLED * len(rows)))]
    near, anywhere = (rng.integers(0, len(rows), n) for n in _shares(total - len(recalled)))
    corners = rng.uniform(size=(len(anywhere), 2))
    placed_in = rng.integers(0, len(images), len(anywhere))
    sizes_wh = np.array([[image["width"], image["height"]] for image in images], np.float64)[placed_in]
    sides_wh = np.minimum(boxes_xywh[anywhere, 2:], sizes_wh)
    boxes = [
        _moved(boxes_xywh[recalled], 0.06, rng),
        _moved(boxes_xywh[near], 0.25, rng),
        np.concatenate([corners * (sizes_wh - sides_wh), sides_wh], axis=1),
    ]
    of_near = np.where(rng.uniform(size=len(near)) < 0.3, rng.permutation(labels[near]), labels[near])
    scores = [rng.beta(*shape, size=len(part)) for shape, part in zip(((3, 2), (1, 6), (1, 9)), boxes, strict=True)]
    of_image = np.concatenate([rows[recalled], rows[near], placed_in])
    of_class = np.concatenate([labels[recalled], of_near, labels[anywhere]])
    score = (0.05 + 0.95 * np.concatenate(scores)).astype(np.float32)
    order = np.lexsort((-score, of_image))
    boxes_xywh = np.concatenate(boxes).astype(np.float32)
    columns = (column[order].tolist() for column in (of_image, of_class, boxes_xywh, score))
    return [
        {"image_id": images[row]["id"], "category_id": label, "bbox": box, "score": score}
        for row, label, box, score in zip(*columns, strict=True)
    ]


def _shares(number: int) -> tuple[int, int]:
    near = round(NEAR * number)
    return near, number - near


def _moved(boxes_xywh: Float[np.ndarray, "N 4"], share: float, rng: np.random.Generator) -> Float[np.ndarray, "N 4"]:
    """Shifts centres by about `share` of the sides, and scales the sides as much."""
    sides = boxes_xywh[:, 2:] * np.exp(rng.normal(0, share, (len(boxes_xywh), 2)))
    moved = boxes_xywh[:, :2] + boxes_xywh[:, 2:] * (0.5 + rng.normal(0, share, (len(boxes_xywh), 2)))
    return np.concatenate([moved - sides / 2, sides], axis=1)
