"""Runs started by the scripts, as a user starts them: trained, killed, resumed, scored, drawn, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image

from retina_jax.runs.folder import training_lock

# A network that compiles in a few seconds, in a config file as a user would write it.
TINY = """
from retina_jax.config import *

def get_config():
    return Config(
        data=DataConfig(source="scenes", batch_size=4, short_side=64, long_side=64, max_boxes=8,
            scenes=ScenesConfig(folder={scenes!r}, train_images=40, val_images=10, size=64, classes=3, max_side=30.0)),
        model=ModelConfig(backbone="resnet18", base_width=8, stage_blocks=(1, 1, 1, 1), norm="frozen",
            frozen_stages=0, min_level=4, max_level=5, fpn_channels=16, head_channels=16, head_convs=1),
        anchors=AnchorConfig(size_factor=1.0),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=4, boundaries=(9,), clip_norm=3.0),
        training=TrainingConfig(steps=12, log_every=1, eval_every=6, checkpoint_every=2, pictures=2),
        devices={devices},
    )
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    (path / "tiny.py").write_text(TINY.format(scenes=str(path / "scenes"), devices=1))
    return path


def script(name: str, *arguments: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = processes.run(name, *arguments, devices=2)
    if ok:
        assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


def refused(name: str, *arguments: object, names: str) -> str:
    """Returns the one line with which the script refuses; asserts that it contains `names`."""
    done = script(name, *arguments, ok=False)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert names in lines[0], lines[0]
    return lines[0]


@pytest.fixture(scope="session")
def run(folder: Path) -> Path:
    """Returns a finished run of 12 steps."""
    done = script("train", "--config", folder / "tiny.py", "--workdir", folder / "run")
    (folder / "run.log").write_text(done.stdout)
    return folder / "run"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def train_lines(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "train"]


def test_a_run_writes_all_its_files(run: Path) -> None:
    summary = read(run / "summary.json")
    assert summary["steps"] == 12 and summary["images"] == 48 and summary["seconds"] > 0
    assert len(summary["parameters_sha256"]) == 64
    scores = read(run / "evaluation" / "step_00000012.json")
    assert summary["evaluation"] == scores
    assert set(scores) == {
        "step", "images", "per_class", "f1_threshold",
        "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
    }  # fmt: skip
    assert scores["images"] == 10 and len(scores["per_class"]) == 3
    assert all(value is None or 0 <= value <= 1 for name, value in scores.items() if name.startswith("A"))
    assert [line["step"] for line in train_lines(run)] == list(range(1, 13))
    expected = {"loss", "classification_loss", "box_loss", "positives_per_image", "learning_rate", "gradient_norm",
                "images_per_second", "data_wait_percent", "peak_memory_mib"}  # fmt: skip
    assert expected <= set(train_lines(run)[0])
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())[-1] == 12
    assert len(list((run / "pictures").glob("step_00000012_*.png"))) == 2
    assert (run / "pictures" / "step_00000012.png").exists()
    log = (run.parent / "run.log").read_text()
    for said in ("class head", "trained", "frozen", "ETA", "Average Precision", str(run)):
        assert said in log, said


def test_a_run_that_another_process_trains_is_not_changed(run: Path, folder: Path) -> None:
    """This includes a command that may change the run."""
    before = (run / "config.json").read_bytes()
    with training_lock(run):
        change = ("--loss.gamma", 5, "--allow-changes", "loss.gamma", "--training.steps", 20)
        refused("train", "--config", folder / "tiny.py", "--workdir", run, *change, names=str(run))
    assert (run / "config.json").read_bytes() == before and (run / "summary.json").exists()


def test_detections_are_coco_results_inside_their_images(run: Path, folder: Path) -> None:
    results = read(run / "detections" / "step_00000012.json")
    annotations = next((folder / "scenes").rglob("*val*.json"))
    images = {image["id"] for image in read(annotations)["images"]}
    categories = {category["id"] for category in read(annotations)["categories"]}
    for result in results:
        assert set(result) == {"image_id", "category_id", "bbox", "score"}
        assert result["image_id"] in images and result["category_id"] in categories
        x, y, w, h = result["bbox"]
        assert 0 <= x <= x + w <= 64.001 and 0 <= y <= y + h <= 64.001


def test_a_finished_run_started_again_changes_nothing(run: Path, folder: Path) -> None:
    def state() -> tuple[dict, float, list[Path]]:
        return read(run / "summary.json"), read(run / "seconds.json"), sorted((run / "tensorboard").iterdir())

    before = state()
    done = script("train", "--config", folder / "tiny.py", "--workdir", run)
    assert state() == before
    assert f"{run} is complete: step 12 is its last\n" in done.stdout and "resuming" not in done.stdout
    assert "Average Precision" in done.stdout


@pytest.mark.slow
def test_pmap_trains_the_same_run(run: Path, folder: Path) -> None:
    script("train", "--config", folder / "tiny.py", "--workdir", folder / "pmap", "--parallel", "pmap", "--devices", 2,
           "--training.steps", 6, "--training.eval-every", 6)  # fmt: skip
    for one, two in zip(train_lines(run)[:6], train_lines(folder / "pmap"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    ours, theirs = read(run / "evaluation/step_00000006.json"), read(folder / "pmap/evaluation/step_00000006.json")
    assert theirs["AR100"] == pytest.approx(ours["AR100"], abs=0.02)


def test_evaluate_reproduces_the_scores_of_the_run(run: Path, folder: Path) -> None:
    expected = read(run / "evaluation/step_00000012.json")
    copy = folder / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "evaluation")
    done = script("evaluate", "--workdir", copy)
    assert read(copy / "evaluation/step_00000012.json") == expected
    assert "Average Precision" in done.stdout
    script("evaluate", "--workdir", copy, "--devices", 2, "--training.eval-batch-size", 3)
    (other,) = (copy / "evaluation").glob("step_00000012_*.json")
    again = read(other)
    assert again["settings"] == {"devices": 2, "training.eval_batch_size": 3} and "settings" not in expected
    assert {k: v for k, v in again.items() if k.startswith("A")} == pytest.approx(
        {k: v for k, v in expected.items() if k.startswith("A")}, abs=1e-3, nan_ok=True
    )
    refused("evaluate", "--workdir", copy, "--step", 3, names="--step 3")


def test_predict_writes_boxes_in_original_pixels_and_pictures(run: Path, folder: Path) -> None:
    images = folder / "photos"
    (images / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 150, 3), np.uint8)).save(images / "a.jpg")
    Image.fromarray(rng.integers(0, 256, (200, 40), np.uint8)).save(images / "a.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (30, 70, 3), np.uint8)).save(images / "deeper" / "r.jpg", exif=rotated)
    versions = ("--step", "best", "--detection.tta-flip", "--detection.tta-short-sides", 48, 96, "--tile", 64)
    script("predict", images, images / "a.jpg", "--workdir", run, "--out", folder / "out", "--score", 0.01, *versions)
    written = read(folder / "out" / "detections.json")
    found = written["images"]
    scored = [read(run / f"evaluation/step_{step:08d}.json") for step in (6, 12)]
    assert written["step"] == max((scores["AP"], scores["step"]) for scores in scored)[1]
    sizes = {(Path(entry["file"]).name): (entry["width"], entry["height"]) for entry in found}
    assert sizes == {"a.jpg": (150, 90), "a.png": (40, 200), "r.jpg": (30, 70)}
    for entry in found:
        boxes = np.array(entry["boxes_xyxy"]).reshape(-1, 4)
        assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= entry["width"]).all()
        assert (boxes[:, [1, 3]] <= entry["height"]).all()
        assert entry["scores"] == sorted(entry["scores"], reverse=True)
    assert len(list((folder / "out").glob("*.png"))) == 3
    (images / "broken.jpg").write_bytes((images / "a.jpg").read_bytes()[:600])
    refused("predict", images / "broken.jpg", "--workdir", run, "--out", folder / "out2", names="broken.jpg")
    refused("predict", images / "absent.jpg", "--workdir", run, "--out", folder / "out2", names="absent.jpg")


def test_a_loss_that_explodes_stops_and_keeps_the_last_good_checkpoint(folder: Path) -> None:
    work = folder / "explodes"
    line = refused("train", "--config", folder / "tiny.py", "--workdir", work, "--optimizer.learning-rate", 1e9,
                   "--optimizer.clip-norm", 0, "--optimizer.warmup-steps", 0, "--training.eval-every", -1,
                   "--training.checkpoint-every", 1, names="images")  # fmt: skip
    assert "is nan" in line or "is inf" in line
    step = int(line.split(" at step ")[1].split()[0])
    saved = sorted(int(p.name) for p in (work / "checkpoints").iterdir() if p.name.isdigit())
    assert saved and max(saved) == step - 1
    assert not (work / "summary.json").exists()


def test_a_resumed_run_keeps_its_config_and_classes(run: Path, folder: Path) -> None:
    same = ("--config", folder / "tiny.py", "--workdir", run)
    before = (run / "config.json").read_text()
    refused("train", *same, "--loss.gamma", 5, names="loss.gamma: 2.0 -> 5.0")
    refused("train", *same, "--data.scenes.classes", 4, names="classes")
    refused("train", *same, "--model.num-classes", 7, names="model.num_classes: 7")
    assert (run / "config.json").read_text() == before


def test_bad_input_is_one_line_that_names_it(folder: Path) -> None:
    tiny = ("--config", folder / "tiny.py", "--workdir", folder / "bad")
    refused("train", "--config", folder / "absent.py", "--workdir", folder / "bad", names="absent.py")
    refused("train", *tiny, "--loss.gama", 2, names="loss.gamma")
    refused("train", *tiny, "--devices", 2, "--data.batch-size", 3, names="data.batch_size: 3 ")
    refused("train", *tiny, "--model.prior", 2, names="model.prior")
    refused("train", *tiny, "--data.source", "coco", names="data.train_annotations")
    refused("evaluate", "--workdir", folder / "nowhere", names=str(folder / "nowhere"))
    (folder / "typed.py").write_text((folder / "tiny.py").read_text().replace("steps=12", "steps='12'"))
    refused("train", "--config", folder / "typed.py", "--workdir", folder / "bad", names="training.steps: ")
    (folder / "is_a_file").write_text("")
    refused("train", "--config", folder / "tiny.py", "--workdir", folder / "is_a_file", names=str(folder / "is_a_file"))
    assert not (folder / "bad" / "checkpoints").exists()


def coco(folder: Path, **changes: object) -> tuple[Path, Path]:
    """Writes four images with a box each, as a COCO JSON and a folder."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(images / f"{i}.png")
    document = {
        "images": [{"id": i + 1, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(4)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i + 1,
                "category_id": 1 + i % 3,
                "bbox": [8, 8, 20, 24],
                "area": 480,
                "iscrowd": 0,
            }
            for i in range(4)
        ],
        "categories": [{"id": i, "name": f"thing {i}"} for i in (1, 2, 3)],
        **changes,
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder / "annotations.json", images


def own_data(folder: Path, work: Path, annotations: Path, images: Path) -> tuple[object, ...]:
    return (
        "--config", folder / "tiny.py", "--workdir", work, "--data.source", "coco", "--training.steps", 2,
        "--training.eval-every", 2, "--data.train-annotations", annotations, "--data.train-images", images,
        "--data.val-annotations", annotations, "--data.val-images", images,
    )  # fmt: skip


@pytest.fixture(scope="session")
def own_run(folder: Path) -> tuple[Path, Path, Path]:
    """Returns a run of two steps on a small COCO dataset, its annotations and its images."""
    annotations, images = coco(folder / "own")
    script("train", *own_data(folder, folder / "own_run", annotations, images))
    return folder / "own_run", annotations, images


def test_own_coco_data_trains_and_a_bad_image_is_named_or_skipped(folder: Path, own_run: tuple[Path, ...]) -> None:
    assert read(own_run[0] / "summary.json")["evaluation"]["images"] == 4
    annotations, images = coco(folder / "broken")
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:1000])
    line = refused("train", *own_data(folder, folder / "own_bad", annotations, images), names="2.png")
    assert str(images) in line
    done = script("train", *own_data(folder, folder / "own_skip", annotations, images), "--data.bad-images", "skip")
    assert "2.png" in done.stderr + done.stdout
    assert read(folder / "own_skip/summary.json")["steps"] == 2


def test_the_error_for_data_without_boxes_names_the_file(folder: Path) -> None:
    box = {"id": 9, "image_id": 99, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
    annotations, images = coco(folder / "unknown", annotations=[box])
    refused("train", *own_data(folder, folder / "unknown_run", annotations, images), names="image_id")
    annotations, images = coco(folder / "own")
    refused("train", *own_data(folder, folder / "no_folder", annotations, folder / "nowhere"), names="nowhere")


def test_a_tensorflow_dataset_trains_as_its_coco_files_do(folder: Path, own_run: tuple[Path, ...]) -> None:
    """The same images through TFDS give the same losses, step by step, and the same ground truth."""
    from tfds_sets import example, store

    from retina_jax.data.datasets import read_coco

    one, annotations, images = own_run
    source = read_coco(str(annotations), str(images))
    prepared = store(
        folder / "sets", [example(source, i) for i in range(4)], names=tuple(f"thing {i}" for i in (1, 2, 3))
    )
    two = folder / "from_tfds"
    script(
        "train", "--config", folder / "tiny.py", "--workdir", two, "--data.source", "tfds", "--data.tfds-name", prepared,
        "--data.tfds-val-split", "train", "--training.steps", 2, "--training.eval-every", 2,
    )  # fmt: skip
    assert [line["loss"] for line in train_lines(one)] == [line["loss"] for line in train_lines(two)]
    assert read(one / "summary.json")["parameters_sha256"] == read(two / "summary.json")["parameters_sha256"]
    scores = [
        {k: v for k, v in read(path / "summary.json")["evaluation"].items() if k.startswith("A")} for path in (one, two)
    ]
    assert scores[0] == scores[1]


def test_a_failed_evaluation_loses_no_step_and_is_repeated(folder: Path) -> None:
    annotations, images = coco(folder / "late")
    val_annotations, val_images = coco(folder / "late_val")
    (val_images / "1.png").write_bytes((val_images / "1.png").read_bytes()[:900])
    command = list(own_data(folder, folder / "late_run", annotations, images))
    command[-3], command[-1] = val_annotations, val_images
    command += ["--training.checkpoint-every", 100]
    refused("train", *command, names="1.png")
    assert (folder / "late_run/checkpoints/2").is_dir()
    coco(folder / "late_val")
    done = script("train", *command)
    assert f"resuming {folder / 'late_run'} at step 2, which is its last\n" in done.stdout, "it is not complete yet"
    assert read(folder / "late_run/summary.json")["evaluation"]["images"] == 4


def test_training_data_that_changed_since_the_run_started_is_refused(folder: Path, own_run: tuple[Path, ...]) -> None:
    workdir = shutil.copytree(own_run[0], folder / "changing_run")
    _, annotations, images = own_run
    command = own_data(folder, workdir, annotations, images)
    before = annotations.read_text()
    document = json.loads(before)
    document["annotations"][0]["bbox"][2] = 30
    annotations.write_text(json.dumps(document))
    refused("train", *command, "--training.steps", 3, names="other images or boxes")
    annotations.write_text(before)
    (workdir / "config.json").unlink()
    refused("train", *command, names="config.json")


def test_evaluate_with_other_settings_does_not_change_the_scores_of_the_run(run: Path) -> None:
    before = read(run / "evaluation/step_00000012.json")
    script("evaluate", "--workdir", run, "--training.eval-images", 2)
    assert read(run / "evaluation/step_00000012.json") == before
    (other,) = (path for path in (run / "evaluation").glob("step_00000012_*.json"))
    assert read(other)["images"] == 2 and read(other)["settings"] == {"training.eval_images": 2}
    refused("evaluate", "--workdir", run, "--anchors.size-factor", 8, names="anchors.size_factor: 1.0 -> 8.0")


def test_images_without_annotations_become_a_submission_and_are_refused_in_training(run: Path, folder: Path) -> None:
    """COCO's image_info_test-dev2017.json has images and categories, but no annotations."""
    annotations = next((folder / "scenes").rglob("*val*.json"))
    document = {key: value for key, value in read(annotations).items() if key != "annotations"}
    test_dev = annotations.with_name("image_info_test-dev2017.json")
    test_dev.write_text(json.dumps(document))
    run = shutil.copytree(run, folder / "mine")
    images = annotations.with_name("val")
    before = set((run / "detections").iterdir())
    done = script("evaluate", "--workdir", run, "--data.source", "coco", "--data.val-annotations", test_dev,
                  "--data.val-images", images, "--training.eval-images", 2)  # fmt: skip
    assert "training.eval_images 2" in done.stdout + done.stderr
    submission = run / "detections" / "detections_test-dev2017_mine_results.json"
    assert str(submission) in done.stdout and "AP of" not in done.stdout
    (found,) = set((run / "detections").glob("step_00000012_*.json")) - before
    for one, other in zip(read(submission), read(found), strict=True):
        assert set(one) == {"image_id", "category_id", "bbox", "score"} and one["image_id"] == other["image_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.0051)
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)
    assert not list((run / "evaluation").glob(found.name)), "no scores"
    command = list(own_data(folder, folder / "unlabelled", *coco(folder / "labelled")))
    command[-3], command[-1] = test_dev, images
    refused("train", *command, names=f"{test_dev}: annotations")


def test_predict_never_overwrites_the_images(run: Path, folder: Path) -> None:
    photos = folder / "precious"
    photos.mkdir()
    Image.fromarray(np.full((40, 50, 3), 120, np.uint8)).save(photos / "a.png")
    before = (photos / "a.png").read_bytes()
    refused("predict", photos, "--workdir", run, "--out", photos, names=str(photos))
    assert (photos / "a.png").read_bytes() == before
    (photos / "b.jpg").write_bytes(b"no image")
    refused("predict", photos, "--workdir", run, "--out", photos / "out", names="b.jpg")
    assert len(read(photos / "out" / "detections.json")["images"]) == 1
    refused("predict", "--workdir", run, "--out", photos / "out", names="image")
