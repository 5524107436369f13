"""A real run on a disk that fills up, becomes read-only or returns wrong bytes: it reports one line and loses no
step."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image
from small_disk import SmallDisk, mounted
from small_runs import measured, metrics, start, stopped_when, summary, wait_for_step, write_config

from retina_jax.evaluate import write_picture
from retina_jax.runs.files import DiskError

OPTIONS = (
    "--training.steps", 50, "--training.checkpoint-every", 10, "--training.eval-every", 0, "--training.pictures", 0,
    "--optimizer.boundaries", 40, "--optimizer.ema-decay", 0,
)  # fmt: skip


@dataclass(frozen=True)
class Life:
    """One start of the run, to its end."""

    status: int
    lines: list[str]
    """Its output, without the lines of the steps."""
    step: int
    """Newest step in its metrics."""
    saved: int
    """Its newest checkpoint."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    small = mounted(tmp_path_factory.mktemp("disk"))
    yield small
    small.close()


@pytest.fixture(scope="module")
def uninterrupted_and_lives(
    tmp_path_factory: pytest.TempPathFactory, disk: SmallDisk
) -> tuple[Path, Path, dict[str, Life]]:
    """Returns a run on a good disk, the same run on a disk with all these faults, and the result of each of its
    starts."""
    folder = tmp_path_factory.mktemp("runs")
    config, unbroken, workdir = write_config(folder), folder / "unbroken", disk.folder / "run"
    lives: dict[str, Life] = {}

    def live(name: str, when: Callable[[], bool] | None = None, then: Callable[[], None] = disk.fill) -> None:
        log = folder / f"{name}.log"
        with start(config, disk.mounted / "run", *OPTIONS, devices=1, log=log, namespaces_of=disk.holder) as process:
            if when is not None:
                with stopped_when(process, when):
                    then()
            status = process.wait(240)
        lines = [line for line in log.read_text().splitlines() if not line.startswith("step ")]
        lives[name] = Life(status, lines, newest(workdir), max(saved(workdir)))

    with start(config, unbroken, *OPTIONS, devices=1) as process:
        wait_for_step(unbroken, 1, process)  # it writes the scenes for both
        live("full in a save", lambda: any(workdir.glob("checkpoints/saving/20*")), lambda: disk.fill(150_000))
        disk.empty()
        live("full", lambda: 30 in saved(workdir) and newest(workdir) >= 32)
        disk.resize("10m")
        # The life before may have come to step 50, in room that a deleted checkpoint left: this one must take steps itself.
        log = folder / "read-only.log"
        live(
            "read-only",
            lambda: takes_steps(log) and 40 in saved(workdir) and newest(workdir) >= 42,
            disk.turn_read_only,
        )
        live("read-only from the start")
        disk.turn_writable()
        damaged = workdir / "checkpoints" / str(lives["read-only"].saved)
        flip(max((path for path in damaged.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
        live("damaged")
        assert process.wait(240) == 0, unbroken.with_suffix(".log").read_text()
    return unbroken, workdir, lives


def saved(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, oldest first."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))


def takes_steps(log: Path) -> bool:
    """Whether the process that writes `log` has logged a step."""
    return re.search(r"^step \d+/", log.read_text(errors="replace"), re.MULTILINE) is not None


def newest(workdir: Path) -> int:
    """Returns the newest step in the metrics; 0 before the first."""
    lines = metrics(workdir)
    return lines[-1]["step"] if lines else 0


def flip(file: Path) -> None:
    """Flips a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def resumed_at(life: Life, disk: SmallDisk) -> int:
    """Returns the step in the line that reports that the run resumes."""
    (line,) = (line for line in life.lines if line.startswith("resum"))
    return int(re.search(rf"{re.escape(str(disk.mounted))}/run.*\bstep (\d+)$", line)[1])


@pytest.mark.slow
def test_a_disk_that_fills_during_a_save_prevents_checkpoints_but_not_the_run(
    uninterrupted_and_lives: tuple[Path, Path, dict[str, Life]], disk: SmallDisk
) -> None:
    life = uninterrupted_and_lives[2]["full in a save"]
    assert life.status == 2 and life.step == 50
    steps = range(life.saved + 10, 51, 10)
    warnings = [line for line in life.lines if line.startswith(f"warning: {disk.mounted}/run/")]
    assert life.saved in (10, 20)  # 20 if it was complete before the disk was full
    assert len(warnings) == len(steps)
    for line, step in zip(warnings, steps, strict=True):
        assert line.startswith(f"warning: {disk.mounted}/run/checkpoints: step {step} ")
        assert "No space left on device" in line and line.endswith(f"step {life.saved}")
    assert refuses_the_last_step(life.lines[-1], disk), life.lines[-1]


@pytest.mark.slow
def test_a_full_disk_stops_the_run_in_one_line(
    uninterrupted_and_lives: tuple[Path, Path, dict[str, Life]], disk: SmallDisk
) -> None:
    _, _, lives = uninterrupted_and_lives
    life = lives["full"]
    assert resumed_at(life, disk) == lives["full in a save"].saved
    assert life.status == 2 and life.saved >= 30
    assert refuses_the_last_step(life.lines[-1], disk), life.lines[-1]


def refuses_the_last_step(line: str, disk: SmallDisk) -> bool:
    """Returns whether an error names one of the files of step 50 that do not fit on a full disk.

    Which file it is depends on bytes: the rest of the last page of metrics.jsonl, and a checkpoint deleted meanwhile,
    decide whether the run reaches its last step and the evaluation there.
    """
    run = re.escape(f"error: {disk.mounted}/run/")
    file = r"(metrics\.jsonl|(detections|evaluation)/step_00000050\.json|checkpoints: step 50\b)"
    return re.match(rf"{run}{file}.*No space left on device", line) is not None


@pytest.mark.slow
def test_a_disk_that_becomes_read_only_stops_the_run_in_one_line(
    uninterrupted_and_lives: tuple[Path, Path, dict[str, Life]], disk: SmallDisk
) -> None:
    _, _, lives = uninterrupted_and_lives
    life = lives["read-only"]
    assert resumed_at(life, disk) == lives["full"].saved
    assert life.status == 2 and life.saved >= 40
    assert life.lines[-1].startswith(f"error: {disk.mounted}/run/metrics.jsonl: ")
    assert life.lines[-1].endswith("Read-only file system")


@pytest.mark.slow
def test_a_read_only_folder_is_refused_in_one_line(
    uninterrupted_and_lives: tuple[Path, Path, dict[str, Life]], disk: SmallDisk
) -> None:
    life = uninterrupted_and_lives[2]["read-only from the start"]
    assert life.status == 2 and not any(line.startswith("resum") for line in life.lines)
    assert life.lines[-1].startswith(f"error: --workdir {disk.mounted}/run: ")
    assert life.lines[-1].endswith("Read-only file system")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    uninterrupted_and_lives: tuple[Path, Path, dict[str, Life]], disk: SmallDisk
) -> None:
    _, workdir, lives = uninterrupted_and_lives
    bad = lives["read-only"].saved
    (line,) = (line for line in lives["damaged"].lines if line.startswith("warning: "))
    assert line.startswith(f"warning: {disk.mounted}/run/checkpoints/{bad}: ")
    assert f"step {bad - 10} " in line and f"damaged-{bad}" in line
    assert resumed_at(lives["damaged"], disk) == bad - 10
    assert (workdir / "checkpoints" / f"damaged-{bad}").is_dir()


@pytest.mark.slow
def test_the_run_with_all_faults_equals_the_uninterrupted_run(
    uninterrupted_and_lives: tuple[Path, Path, dict[str, Life]],
) -> None:
    unbroken, workdir, lives = uninterrupted_and_lives
    assert lives["damaged"].status == 0
    assert measured(workdir) == measured(unbroken)
    assert summary(workdir)["parameters_sha256"] == summary(unbroken)["parameters_sha256"]
    for name, life in lives.items():
        assert "Traceback" not in "\n".join(life.lines), name


def test_a_page_or_figure_that_does_not_fit_on_the_disk_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    run, small = trained, mounted(tmp_path)
    try:
        outs = [small.folder / name for name in ("report.html", "figure.png", "figure.svg")]
        for out in outs:
            out.write_text("earlier")
        small.fill()
        commands = [("report", "--workdir", run, "--out", outs[0].with_suffix(""))]
        commands += [("figures", "--figure", 1, "--out", out) for out in outs[1:]]
        for name, *arguments in commands:
            monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
            with pytest.raises(DiskError, match="cannot be written: No space left on device"):
                importlib.import_module(name).main()
        assert [out.read_text() for out in outs] == ["earlier"] * 3
        assert {path.name for path in small.folder.iterdir()} == {"ballast", *(out.name for out in outs)}
    finally:
        small.close()


def test_predictions_that_do_not_fit_on_the_disk_or_cannot_be_read_leave_the_earlier_ones(
    tmp_path: Path, trained: Path
) -> None:
    run, photos, small = trained, tmp_path / "photos", mounted(tmp_path)
    photos.mkdir()
    Image.new("RGB", (64, 64), "grey").save(photos / "a.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (640, 640, 3), np.uint8)).save(photos / "b.png")
    (photos / "bad.png").write_bytes(b"no image")
    try:
        out = small.folder / "out"
        out.mkdir()
        (out / "detections.json").write_text("earlier")
        (out / "a.png").write_text("earlier")
        small.fill(100_000)  # enough for a.png
        for images, line in (
            (("a.png", "b.png"), "b.png: cannot be written: No space left on device"),
            (("bad.png",), "bad.png: is not"),
        ):
            done = processes.run("predict", *(photos / image for image in images), "--workdir", run, "--out", out)
            assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert {path.name: path.read_text() for path in out.iterdir()} == dict.fromkeys(
            ("detections.json", "a.png"), "earlier"
        )
    finally:
        small.close()


def test_a_picture_that_does_not_fit_on_the_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    small = mounted(tmp_path)
    try:
        small.fill()
        with pytest.raises(DiskError, match=r"a\.png: .*No space left on device"):
            write_picture(small.folder / "a.png", np.zeros((64, 64, 3), np.uint8))
    finally:
        small.close()
