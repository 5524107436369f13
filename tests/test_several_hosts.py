"""Two real processes of two devices each train one run: shared, stopped, killed, resumed, and equal to one process."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import Pair, kill, losses, metrics, start, summary, wait_for_step

LAST = 100
EVERY = ("--training.checkpoint-every", 10, "--training.eval-every", 0, "--training.pictures", 0)
MORE = (*EVERY, "--training.steps", LAST, "--detection.tta-flip")
LONG = (*EVERY, "--training.steps", 10**6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def config(trained: Path) -> Path:
    """That of `trained`, from whose 60 steps all runs here start: Adam's first steps, divided by their own size, make
    rounding as large as gradients, and no two numbers of devices would agree."""
    return trained.with_name("learns.py")


@pytest.fixture(scope="module")
def killed(folder: Path, config: Path, trained: Path) -> Iterator[tuple[Path, Path, Pair, float]]:
    """Trains the same run on two hosts: SIGTERM to one, resumed, SIGKILL of host 1. Returns its folder, a copy of it at
    SIGTERM, the hosts, and the time of the SIGKILL, which host 0 notices later, while other tests run."""
    workdir = shutil.copytree(trained, folder / "shared")
    with Pair(config, workdir, *LONG) as pair:
        wait_for_step(workdir, 62, *pair.hosts)
        pair.hosts[1].send_signal(signal.SIGTERM)
        assert pair.ended() == [0, 0], pair.said()
        assert "Traceback" not in pair.said()
    saved = max(line["step"] for line in metrics(workdir))
    assert re.search(rf"^stopped.*\bSIGTERM\b.*\bstep {saved}\b", pair.said(), re.MULTILINE), pair.said()
    assert (workdir / "checkpoints" / str(saved)).is_dir() and not (workdir / "summary.json").exists()
    stopped = shutil.copytree(workdir, folder / "stopped")
    with Pair(config, workdir, *LONG) as pair:
        wait_for_step(workdir, saved + 2, *pair.hosts)
        assert resumed(pair.said(), workdir, saved)
        kill(pair.hosts[1])
        yield workdir, stopped, pair, time.time()


@pytest.fixture(scope="module")
def alone(folder: Path, config: Path, trained: Path, killed: object) -> Path:
    """Trains the same run for 40 more steps, while host 0 notices that host 1 was killed."""
    workdir = shutil.copytree(trained, folder / "alone")
    process = start(config, workdir, *MORE, "--training.profile-steps", "65:67", devices=4)
    assert process.wait(300) == 0, workdir.with_suffix(".log").read_text()
    assert re.search(r"profile.* 65 .*67", workdir.with_suffix(".log").read_text())
    assert list((workdir / "profile").rglob("perfetto_trace.json.gz"))
    return workdir


@pytest.fixture(scope="module")
def shared(config: Path, killed: tuple[Path, Path, Pair, float]) -> Path:
    """Waits until host 0 has ended; resumes the run to its end on two hosts."""
    workdir, _, pair, at = killed
    status = pair.hosts[0].wait(60)
    assert pair.logs[0].stat().st_mtime - at < 60
    assert status in (75, -signal.SIGABRT), pair.said()  # gloo or JAX's heartbeat may abort
    assert status < 0 or re.search("error: .*start all hosts again", pair.said())
    with Pair(config, workdir, *MORE) as pair:
        assert pair.ended() == [0, 0], pair.said()
        assert "Traceback" not in pair.said()
    return workdir


def resumed(said: str, workdir: Path, step: int) -> bool:
    """Returns whether a line reports that this run resumes at this step."""
    return re.search(rf"^resum.*{re.escape(str(workdir))}.*\bstep {step}$", said, re.MULTILINE) is not None


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_run_of_two_hosts_resumes_on_one(
    folder: Path, config: Path, alone: Path, killed: tuple[Path, Path, Pair, float], devices: int
) -> None:
    """It is saved on 2 x 2 devices, and resumed on 1 x 1 and on 1 x 8."""
    workdir = shutil.copytree(killed[1], folder / f"on_{devices}")
    before = len(losses(workdir))
    process = start(
        config, workdir, *EVERY, "--training.eval-every", -1, "--training.steps", before + 5, devices=devices
    )
    assert process.wait(300) == 0, workdir.with_suffix(".log").read_text()
    assert resumed(workdir.with_suffix(".log").read_text(), workdir, before)
    got = losses(workdir)
    assert len(got) == before + 5
    assert list(got.values()) == pytest.approx(list(losses(alone).values())[: len(got)], rel=1e-3)


def test_hosts_of_other_configs_refuse_each_other(folder: Path, config: Path) -> None:
    workdir = folder / "differing"
    with Pair(config, workdir, own=((), ("--loss.gamma", 3.0))) as pair:
        assert all(status in (2, 75, -signal.SIGABRT) for status in pair.ended())
        assert "loss.gamma is 2.0 on host 0 and 3.0 on host 1" in pair.said()
        assert "Traceback" not in pair.said() and not (workdir / "config.json").exists()


def broken(folder: Path, config: Path) -> tuple[object, ...]:
    """Returns options for the same images as a COCO folder, in which the last image is truncated."""
    folder = folder / "broken"
    if not folder.exists():
        annotations = next(path for path in (config.parent / "scenes").rglob("*train*.json"))
        shutil.copytree(annotations.parent, folder)
        picture = sorted(
            path for path in folder.rglob("*") if path.suffix in (".png", ".jpg") and "train" in str(path)
        )[-1]
        picture.write_bytes(picture.read_bytes()[:300])
    train, val = (next(folder.rglob(f"*{split}*.json")) for split in ("train", "val"))
    images = {split: next(p for p in folder.iterdir() if p.is_dir() and split in p.name) for split in ("train", "val")}
    return (
        "--data.source", "coco", "--data.train-annotations", train, "--data.train-images", images["train"],
        "--data.val-annotations", val, "--data.val-images", images["val"], "--training.steps", 20,
    )  # fmt: skip


@pytest.mark.slow
def test_an_image_that_cannot_be_read_ends_all_hosts_by_name(folder: Path, config: Path) -> None:
    """The host that reads the image names it; the other one ends too."""
    with Pair(config, folder / "stops", *broken(folder, config)) as pair:
        statuses = pair.ended()
        assert 2 in statuses and {*statuses} <= {2, 75, -signal.SIGABRT}, pair.said()
        assert re.search("error: .*broken", pair.said()) and "Traceback" not in pair.said()


def test_two_hosts_are_one_process_with_as_many_devices(alone: Path, shared: Path) -> None:
    """The losses, step by step, and AP are the same, despite the signals to the hosts."""
    expected, got = losses(alone), losses(shared)
    assert got.keys() == expected.keys() and len(got) == LAST
    assert list(got.values()) == pytest.approx(list(expected.values()), rel=1e-3)
    first, second = summary(alone)["evaluation"], summary(shared)["evaluation"]
    assert first["AP50"] > 0.3 and first["images"] == second["images"] == 11
    for name in ("AP", "AP50", "AR100"):
        assert second[name] == pytest.approx(first[name], abs=0.01), name


@pytest.mark.slow
def test_an_image_that_is_skipped_on_one_host_is_skipped_by_all(folder: Path, config: Path) -> None:
    workdir = folder / "skips"
    with Pair(config, workdir, *broken(folder, config), "--data.bad-images", "skip") as pair:
        assert pair.ended() == [0, 0], pair.said()
        assert re.search(r"^warning: 1 .*image", pair.said(), re.MULTILINE)
    assert len(losses(workdir)) == 20


def named(pair: Pair, hung: int, times: int = 1) -> None:
    """Waits until the other host has named `hung` this often; fails if it ends before."""
    line = re.compile(
        rf"^warning: no progress of host {hung} for .* last seen at step [0-9]+; others wait", re.MULTILINE
    )
    while len(line.findall(pair.logs[1 - hung].read_text())) < times:
        assert pair.hosts[1 - hung].poll() is None, pair.said()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("hung", [0, 1])
def test_a_stopped_host_is_named_by_the_other(folder: Path, config: Path, hung: int) -> None:
    """It resumes in time, and both train on; it stops again for good, is named again, and the other one ends."""
    workdir = folder / f"stopped_{hung}"
    with Pair(config, workdir, *LONG) as pair:
        wait_for_step(workdir, 12, *pair.hosts)
        pair.hosts[hung].send_signal(signal.SIGSTOP)
        named(pair, hung)
        at = metrics(workdir)[-1]["step"]
        pair.hosts[hung].send_signal(signal.SIGCONT)
        wait_for_step(workdir, at + 200, *pair.hosts)
        pair.hosts[hung].send_signal(signal.SIGSTOP)
        named(pair, hung, times=2)
        assert pair.hosts[1 - hung].wait(60) in (75, -signal.SIGABRT), pair.said()
