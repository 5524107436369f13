"""Measure work on files as large as COCO's: python scripts/benchmarks/coco_scale.py --folder data/coco_scale

Generates annotations of 118,287 images with 860,001 boxes and polygons (490 MB of JSON), and the folder of a run of 90,000
steps with an evaluation of 5,000 images. Then it runs each task in a process of its own and prints its processor time and
its peak memory. The time is that of the task alone; the memory includes the imported packages. The task "padding" prints
the pixels of padded images over those of the images, by number of padded shapes, for images of sizes as frequent as COCO's.
With `--open-images` it also loads annotations of 1,170,301 images with 13,650,000 boxes, without polygons.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

TRAIN, VAL = (118_287, 860_001), (5_000, 36_781)
"""Images and boxes of COCO's train2017 and val2017."""
OPEN_IMAGES = 1_170_301, 13_650_000
"""As many images as in the training split of MLPerf's OpenImages, and an assumed number of boxes, without polygons."""
SIZES = {
    # width and height: how many of 517 images of COCO; the others have different sizes, most of them a side of 640
    **{(640, 480): 110, (640, 427): 63, (480, 640): 45, (640, 426): 22, (500, 375): 20, (427, 640): 16, (640, 425): 15},
    **{(640, 428): 15, (375, 500): 12, (612, 612): 6, (425, 640): 6, (500, 333): 6},
}
OTHER_SIZES = 181
RATIOS = (
    (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1),
    (1, 1.012, 1.092, 1.24, 1.325, 1.339, 1.435, 1.495, 1.506, 1.572, 1.778, 1.823, 2.251, 3.005),
)
"""Quantiles of longer over shorter side of the other sizes."""
CATEGORIES, CORNERS = 80, 25
STEPS, LOG_EVERY = 90_000, 20
DETECTIONS_PER_IMAGE = 100

TASKS = {
    # name: (module that it needs, what is imported before the clock starts, what is measured)
    "load the training JSON": (
        "retina_jax",
        "from retina_jax.data.datasets import read_coco",
        "read_coco('{train}', '{images}')",
    ),
    "load JSON of OpenImages' size": (
        "retina_jax",
        "from retina_jax.data.datasets import read_coco",
        "read_coco('{open_images}', '{open_images_folder}')",
    ),
    "load the training JSON, pycocotools": (
        "pycocotools",
        "from pycocotools.coco import COCO",
        "COCO('{train}')",
    ),
    "load the training JSON, hotcoco": ("hotcoco", "import hotcoco", "hotcoco.COCO('{train}')"),
    "write 500,000 detections": (
        "retina_jax",
        "import json; from pathlib import Path; from retina_jax.runs.files import write_json\n"
        "results = json.loads(Path('{detections}').read_bytes())",
        "write_json(Path('{folder}/written.json'), results, compact=True)",
    ),
    "list the paper's sweeps": (
        "retina_jax",
        "import sys, glob, runpy; sys.path.insert(0, 'scripts')\n"
        "sys.argv = ['sweep.py', '--list', '--sweep', *sorted(glob.glob('configs/sweeps/table*.py'))]",
        "runpy.run_path('scripts/sweep.py', run_name='__main__')",
    ),
    "report of a run of 90,000 steps": (
        "retina_jax",
        "from pathlib import Path; from retina_jax.reports.run_page import run_page",
        "Path('{folder}/page.html').write_text(run_page(Path('{run}'))[0])",
    ),
    "score 500,000 detections": (
        "retina_jax",
        "import json; from pathlib import Path; from retina_jax.evaluation.coco_scores import evaluate_coco\n"
        "expected, found = (json.loads(Path(file).read_bytes()) for file in ('{val}', '{detections}'))",
        "evaluate_coco(expected, found, [image['id'] for image in expected['images']])",
    ),
    "score 500,000 detections, pycocotools": (
        "pycocotools",
        "from pycocotools.coco import COCO; from pycocotools.cocoeval import COCOeval\n"
        "coco = COCO('{val}'); scores = COCOeval(coco, coco.loadRes('{detections}'), 'bbox')",
        "scores.evaluate(); scores.accumulate(); scores.summarize()",
    ),
    "score 500,000 detections, hotcoco": (
        "hotcoco",
        "import hotcoco\n"
        "coco = hotcoco.COCO('{val}'); scores = hotcoco.COCOeval(coco, coco.load_res('{detections}'), 'bbox')",
        "scores.evaluate(); scores.accumulate(); scores.summarize()",
    ),
    "check the training data, without images": (
        "retina_jax",
        "from pathlib import Path; from retina_jax.config import Config; from retina_jax.data_check.check import check_data",
        "check_data(Config(), {{'train': (Path('{train}'), Path('{images}'))}})",
    ),
    "check the training data, no suggestion": (
        "retina_jax",
        "from pathlib import Path; from retina_jax.config import Config; from retina_jax.data_check.check import check_data",
        "check_data(Config(), {{'train': (Path('{train}'), Path('{images}'))}}, search=False)",
    ),
}
MEASURE = """
import re, time
{imports}
started = time.process_time()
try:
    {work}
except SystemExit:
    pass
seconds, status = time.process_time() - started, open('/proc/self/status').read()
print(seconds, int(re.search(r'VmHWM:\\s*(\\d+)', status)[1]) / 2**20)  # ru_maxrss starts at the parent's peak
"""


@dataclass(frozen=True)
class Arguments:
    """Options of this script."""

    folder: Path = Path("data/coco_scale")
    """Folder of the generated files; made if missing, and used again if complete."""
    only: tuple[str, ...] = ()
    """Words; a task is run if its name has one of them. Default: all tasks."""
    open_images: bool = False
    """Also load a file of OpenImages' size; needs 8 GiB of memory."""


def main() -> None:
    """Generates the files and prints one line per task."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if not arguments.only or "padding" in arguments.only:
        print_padding()
    paths = generate(arguments.folder, arguments.open_images)
    for name, (module, imports, work) in TASKS.items():
        if "OpenImages" in name and not arguments.open_images:
            continue
        if arguments.only and not any(word in name for word in arguments.only):
            continue
        if importlib.util.find_spec(module) is None:
            print(f"{name}: {module} is not installed")
            continue
        program = MEASURE.format(imports=imports.format(**paths), work=work.format(**paths))
        done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
        seconds, gib = map(float, done.stdout.splitlines()[-1].split())
        print(f"{name}: {seconds:.1f} s CPU, peak {gib:.2f} GiB", flush=True)


def image_sizes(number: int) -> list[tuple[int, int]]:
    """Returns widths and heights that are as frequent as in COCO; the other sizes have random ratios of its quantiles."""
    random, known = np.random.default_rng(0), list(SIZES)
    shares = np.array([*SIZES.values(), OTHER_SIZES]) / (sum(SIZES.values()) + OTHER_SIZES)
    shorter = np.rint(640 / np.interp(random.random(number), *RATIOS)).astype(int).tolist()
    upright = random.random(number) < 1 / 3
    others = [(side, 640) if tall else (640, side) for side, tall in zip(shorter, upright, strict=True)]
    chosen = random.choice(len(shares), number, p=shares).tolist()
    return [known[of] if of < len(known) else other for of, other in zip(chosen, others, strict=True)]


def print_padding() -> None:
    """Prints padded over real pixels at COCO's two short sides, by number of padded shapes."""
    from retina_jax.config import DataConfig
    from retina_jax.data.transforms import assign_bucket, buckets, resized_size

    for short, long in ((600, 1000), (800, 1333)):
        sizes = [resized_size(height, width, short, long) for width, height in image_sizes(TRAIN[0])]
        for number in (1, 2, 4, 6):
            shapes = buckets(DataConfig(short_side=short, long_side=long, buckets=number), (short,))
            padded = sum(math.prod(shapes[assign_bucket(size, shapes)]) for size in sizes)
            print(f"padding at {short} px, {number} shapes: {padded / sum(map(math.prod, sizes)):.3f}", flush=True)


def generate(folder: Path, open_images: bool) -> dict[str, Path]:
    """Writes the files that are missing, with `open_images` also those of that size; returns paths by the names in TASKS."""
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    detections = run / "detections" / f"step_{STEPS:08d}.json"
    paths = {"folder": folder, "images": folder / "images", "run": run, "detections": detections}
    paths |= {"train": folder / "train.json", "val": folder / "val.json"}
    paths["val_images"] = folder / "val_images"
    paths |= {"open_images": folder / "open_images.json", "open_images_folder": folder / "open_images"}
    files = [("train", "images", *TRAIN, CORNERS), ("val", "val_images", *VAL, CORNERS)]
    files += [("open_images", "open_images_folder", *OPEN_IMAGES, 0)] * open_images
    for file, images, num_images, num_boxes, corners in files:
        if not paths[file].exists():
            print(f"writing {paths[file]} ...", flush=True)
            names = write_annotations(paths[file], num_images, num_boxes, corners)
            paths[images].mkdir(exist_ok=True)
            for name in names:  # empty: no task decodes an image
                (paths[images] / name).touch()
    if not (run / "summary.json").exists():
        print(f"writing {run} ...", flush=True)
        write_run(run, paths["val"], paths["val_images"])
    return paths


def write_annotations(path: Path, num_images: int, num_boxes: int, corners: int) -> list[str]:
    """Writes a COCO JSON with the fields of COCO's own and polygons of `corners` points; returns the names of its images."""
    random = np.random.default_rng(num_images)
    sizes = random.integers(300, 641, (num_images, 2))
    ids = random.permutation(5 * num_images)[:num_images] + 1
    owners = random.integers(0, num_images, num_boxes)
    wh = np.round(np.exp(random.uniform(np.log(0.02), np.log(0.9), (num_boxes, 2))) * sizes[owners], 2)
    xy = np.round(random.random((num_boxes, 2)) * (sizes[owners] - wh), 2)
    labels = random.integers(1, CATEGORIES + 1, num_boxes)
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1) / 2 + 0.5
    images = [
        {
            "license": 1,
            "file_name": f"{i:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/train2017/{i:012d}.jpg",
        }
        | {"height": height, "width": width, "date_captured": "2013-11-14 11:18:45", "id": i}
        for i, (width, height) in zip(ids.tolist(), sizes.tolist(), strict=True)
    ]
    categories = [{"supercategory": "thing", "id": k, "name": f"class {k}"} for k in range(1, CATEGORIES + 1)]
    part = path.with_suffix(".part")
    with open(part, "w") as file:
        file.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, "annotations": [')
        for m, (owner, label) in enumerate(zip(ids[owners].tolist(), labels.tolist(), strict=True)):
            polygons = [(xy[m] + circle * wh[m]).round(2).ravel().tolist()] if corners else []
            entry = {"segmentation": polygons, "area": round(float(wh[m].prod()) * 0.78, 4), "iscrowd": 0}
            entry |= {"image_id": owner, "bbox": [*xy[m].tolist(), *wh[m].tolist()], "category_id": label, "id": m + 1}
            file.write((", " if m else "") + json.dumps(entry))
        file.write("]}")
    part.rename(path)
    return [image["file_name"] for image in images]


def write_run(run: Path, annotations: Path, images: Path) -> None:
    """Writes the folder of a finished run: metrics of STEPS steps, one evaluation and its detections."""
    from retina_jax.config import Config
    from retina_jax.config_io import override, to_dict
    from retina_jax.evaluation.coco_scores import evaluate_coco

    random, ground_truth = np.random.default_rng(0), json.loads(annotations.read_text())
    boxes: dict[int, list[dict]] = {image["id"]: [] for image in ground_truth["images"]}
    for entry in ground_truth["annotations"]:
        boxes[entry["image_id"]].append(entry)
    detections = []
    for image_id, entries in boxes.items():
        for m in range(DETECTIONS_PER_IMAGE):  # the objects, moved by about a tenth of their side, then background
            bbox = np.array(entries[m]["bbox"]) if m < len(entries) else random.random(4) * 200
            label = entries[m]["category_id"] if m < len(entries) else int(random.integers(1, CATEGORIES + 1))
            moved = bbox + random.normal(0, 0.1, 4) * np.tile(bbox[2:], 2)
            score = float(random.beta(4, 2) if m < len(entries) else random.beta(1, 9))
            detections.append({"image_id": image_id, "category_id": label, "bbox": moved.tolist(), "score": score})
    for kind in ("detections", "evaluation"):
        (run / kind).mkdir(parents=True, exist_ok=True)
    (run / "detections" / f"step_{STEPS:08d}.json").write_text(json.dumps(detections))
    scores = evaluate_coco(ground_truth, detections, list(boxes))
    evaluation = {"step": STEPS, "images": len(boxes), **scores.summary, "per_class": scores.per_class}
    (run / "evaluation" / f"step_{STEPS:08d}.json").write_text(json.dumps(evaluation))
    names = ("loss", "classification_loss", "box_loss", "gradient_norm", "learning_rate", "positives_per_image")
    lines = [
        {"step": step, "event": "train", "images_per_second": 80.0, "data_wait_percent": 1.0, "peak_memory_mib": 9000.0}
        | dict(zip(names, random.random(len(names)).round(6).tolist(), strict=True))
        for step in range(LOG_EVERY, STEPS + 1, LOG_EVERY)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"data.val_annotations": str(annotations), "data.val_images": str(images)}
    saved = {"config": to_dict(override(Config(), changes))}
    categories = ground_truth["categories"]
    saved |= {"class_names": [c["name"] for c in categories], "category_ids": [c["id"] for c in categories]}
    (run / "config.json").write_text(json.dumps(saved))
    summary = {"steps": STEPS, "images": 16 * STEPS, "seconds": 90_000.0, "evaluation": evaluation}
    (run / "summary.json").write_text(json.dumps(summary | {"parameters_sha256": ""}))


if __name__ == "__main__":
    main()
