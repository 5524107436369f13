"""Where points are run: as processes of this machine, or as jobs of SLURM."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from retina_jax.config import ConfigError
from retina_jax.sweeps.manifest import Row, distinct
from retina_jax.sweeps.state import state_of

ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "kfd")
"""Devices under /dev of a machine that has more than its CPU: NVIDIA, TPU, AMD."""
HELD = 75
"""Exit status of a point that another worker holds, or that was asked to stop and will resume (EX_TEMPFAIL)."""
MOST_TIMEOUTS = 100
"""Times that a SLURM job may be queued again, by default."""
GRACE = 300.0
"""Seconds that a child has to save in before it is killed; a second Ctrl-C cuts them short."""


@dataclass
class _Child:
    row: Row
    process: subprocess.Popen[bytes]
    log: Path
    slot: int
    begun: float


def launch_local(rows: Sequence[Row], command: Sequence[str], workdir: Path, jobs: int) -> int:
    """Run `command --index I` for each row, `jobs` at once, and go on after a failure; how many failed.

    What a point prints goes to DIR/logs/FOLDER.txt; here it is a line when it starts and one when it ends. Points that have
    ended, or that another worker holds, are left alone. Ended by Ctrl-C or SIGTERM, the running points are ended too.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs: invalid value {jobs}; must be at least 1")
    waiting, children, failed = distinct(rows), [], 0
    cores = _core_slots(jobs)
    with _sigterm_as_interrupt():
        try:
            while waiting or children:
                while waiting and len(children) < jobs:
                    row = waiting.pop(0)
                    state = state_of(workdir, row.point)
                    if state.kind in ("done", "diverged", "running"):
                        say = "is run elsewhere, left alone" if state.kind == "running" else f"already {state}"
                        _tell(row, say)
                        continue
                    slot = min(set(range(jobs)) - {child.slot for child in children})
                    children.append(_start(row, command, workdir, slot, cores))
                    _tell(row, f"{'resumes' if state.kind == 'broken' else 'started'}, log {children[-1].log}")
                ended = [child for child in children if child.process.poll() is not None]
                for child in ended:
                    children.remove(child)
                    failed += not _report(child, workdir)
                if not ended and children:
                    time.sleep(0.1)
        finally:
            _end(children)
    return failed


def _start(row: Row, command: Sequence[str], workdir: Path, slot: int, cores: Sequence[set[int]]) -> _Child:
    log = workdir / "logs" / f"{row.point.folder}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out, _pinned(cores[slot] if cores else None):
        process = subprocess.Popen([*command, "--index", str(row.index)], stdout=out, stderr=subprocess.STDOUT)
    return _Child(row, process, log, slot, time.monotonic())


def _report(child: _Child, workdir: Path) -> bool:
    """Say how a child ended; whether it did not fail."""
    took = f"after {(time.monotonic() - child.begun) / 60:.1f} min"
    code = child.process.returncode
    if code not in (0, HELD):
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        _tell(child.row, f"failed {took} ({how}): {_last_line(child.log)}; {child.log}")
        return False
    state = state_of(workdir, child.row.point)
    _tell(child.row, "is run elsewhere, left alone" if state.kind == "running" else f"{state}, {took}")
    return True


def _tell(row: Row, what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {row.index:>3}  {row.labels[0]}  seed {row.point.seed}: {what}", flush=True)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _end(children: Sequence[_Child]) -> None:
    for child in children:
        child.process.terminate()
    until = time.monotonic() + GRACE
    try:
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(until - time.monotonic(), 0))
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what it started is ended with it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _core_slots(jobs: int) -> list[set[int]]:
    """The CPU cores of each slot; empty where slots share them all.

    XLA's thread pool is as wide as the cores it may use: two jobs that both use all would run at half the speed each or
    less. With an accelerator the CPU only feeds it, and there are no slots.
    """
    if jobs == 1 or not hasattr(os, "sched_setaffinity") or any(any(Path("/dev").glob(d)) for d in ACCELERATORS):
        return []
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < jobs:
        return []
    return [set(cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs]) for slot in range(jobs)]


@contextlib.contextmanager
def _pinned(cores: set[int] | None) -> Iterator[None]:
    """What is started in this block inherits the cores."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True)
class SlurmPoint:
    """What a SLURM job does: `command --index I`. Pre-empted or out of time, it is queued again and resumes."""

    command: tuple[str, ...]

    def __call__(self, index: int) -> str:
        """Run the point; raises CalledProcessError where it fails, with which the job fails."""
        done = subprocess.run([*self.command, "--index", str(index)], preexec_fn=_leave_signals_to_submitit)
        if done.returncode != HELD:
            done.check_returncode()
        return f"index {index} {'is held by another worker, or was stopped' if done.returncode == HELD else 'ended'}"

    def checkpoint(self, index: int) -> Any:
        """Called by submitit before the job ends early: what to queue in its place."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, index)


def _leave_signals_to_submitit() -> None:
    """SLURM sends its warning to every process of a job. The point goes on until submitit has queued it again and ends it:
    would it end first, its job had failed."""
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def launch_slurm(rows: Sequence[Row], command: Sequence[str], workdir: Path, options: Sequence[str]) -> int:
    """Queue the points that have not ended as one array of jobs, and print their ids; how many failed.

    Args:
      options: KEY=VALUE, as submitit's `update_parameters` takes them (timeout_min=2880 gpus_per_node=8
        slurm_partition=gpu slurm_array_parallelism=8). cluster=local runs them here, by submitit's local executor, and
        waits for them; otherwise nothing is waited for and 0 returned.
    """
    settings = _settings(options)
    cluster = settings.pop("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise ConfigError(f"--slurm cluster={cluster}: give slurm or local")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError("--launcher slurm: there is no sbatch on this machine; start it where jobs are submitted")
    waiting = []
    for row in distinct(rows):
        state = state_of(workdir, row.point)
        if state.kind in ("done", "diverged", "running"):
            _tell(row, "is run elsewhere, left alone" if state.kind == "running" else f"already {state}")
        else:
            waiting.append(row)
    if not waiting:
        return 0
    import submitit

    most = settings.pop("max_num_timeout", MOST_TIMEOUTS)
    executor = submitit.AutoExecutor(folder=workdir / "slurm", cluster=cluster, slurm_max_num_timeout=most)
    try:
        executor.update_parameters(**{"name": f"sweep-{workdir.name}", **settings})
    except (NameError, TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"--slurm: {' '.join(str(error).split())}") from None
    try:
        submitted = executor.map_array(SlurmPoint(tuple(command)), [row.index for row in waiting])
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(f"--launcher slurm: sbatch refused: {' '.join(str(error).split())}") from None
    for row, job in zip(waiting, submitted, strict=True):
        _tell(row, f"job {job.job_id}, log {job.paths.stdout}")
    if cluster == "slurm":
        return 0
    failed = 0
    for row, job in zip(waiting, submitted, strict=True):
        error = job.exception()
        failed += error is not None
        _tell(row, str(state_of(workdir, row.point)) if error is None else f"failed: {_last_line(job.paths.stderr)}")
    return failed


def _settings(options: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"--slurm {option}: give KEY=VALUE, as in timeout_min=600")
        settings[key] = int(value) if value.lstrip("-").isdigit() else value
    return settings
