"""Runs points as processes of this machine, or as jobs of SLURM."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from retina_jax.config import ConfigError
from retina_jax.console import log
from retina_jax.errors import TRY_AGAIN
from retina_jax.sweeps.points import Task, distinct
from retina_jax.sweeps.status import ENDED, State, state_of

ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "kfd")  # devices under /dev: NVIDIA, TPU, AMD
MOST_TIMEOUTS = 100  # default number of times that a SLURM job may be queued again
GRACE = 300.0  # seconds in which a stopped process may save before it is killed; a second Ctrl-C kills it at once


class _Child(NamedTuple):
    """Running point; `started` is a time of the monotonic clock."""

    task: Task
    process: subprocess.Popen[bytes]
    log: Path
    cores: set[int]
    started: float


def launch_local(tasks: Sequence[Task], command: Sequence[str], workdir: Path, jobs: int) -> int:
    """Runs `command --index I` for each task, `jobs` at a time; returns how many failed. A failure does not stop the others.

    The output of a point goes to DIR/logs/FOLDER.txt; a line reports when a point starts and when it ends. Points that have
    ended or that another worker trains are skipped. KeyboardInterrupt also ends the running points.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs: invalid value {jobs}; must be at least 1")
    waiting, children, failed = distinct(tasks), [], 0
    free = _core_slots(jobs) or [set() for _ in range(jobs)]
    with contextlib.ExitStack() as stack:
        stack.callback(_end, children)
        while waiting or children:
            while waiting and free:
                task = waiting.pop(0)
                if state := _startable(task, workdir):
                    children.append(_start(task, command, workdir, free.pop(0)))
                    verb = "resumes" if state.kind == "interrupted" else "started"
                    _log(task, f"{verb}, log {children[-1].log}")
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                free.append(child.cores)
                failed += not _succeeded(child, workdir)
            if children:
                time.sleep(0.1)
    return failed


def _startable(task: Task, workdir: Path) -> State | None:
    """Returns the state of a point that can be started; logs the reason and returns None for the others."""
    state = state_of(workdir, task.point)
    if state.kind not in (*ENDED, "running"):
        return state
    _log(task, "skipped, another worker trains it" if state.kind == "running" else f"already {state}")
    return None


def _start(task: Task, command: Sequence[str], workdir: Path, cores: set[int]) -> _Child:
    file = workdir / "logs" / f"{task.point.folder}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as out, contextlib.ExitStack() as stack:
        if cores:
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores)  # the process inherits it
        process = subprocess.Popen([*command, "--index", str(task.index)], stdout=out, stderr=subprocess.STDOUT)
    return _Child(task, process, file, cores, time.monotonic())


def _succeeded(child: _Child, workdir: Path) -> bool:
    """Logs how a process ended; returns whether it did not fail."""
    took = f"after {(time.monotonic() - child.started) / 60:.1f} min"
    code = child.process.returncode
    if code not in (0, TRY_AGAIN):
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        _log(child.task, f"failed {took} ({how}): {_last_line(child.log)}; {child.log}")
        return False
    state = state_of(workdir, child.task.point)
    _log(child.task, "skipped, another worker trains it" if state.kind == "running" else f"{state}, {took}")
    return True


def _log(task: Task, what: str) -> None:
    log(f"{time.strftime('%H:%M:%S')}  {task.index:>3}  {task.labels[0]}  seed {task.point.seed}: {what}")


def _last_line(file: Path) -> str:
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


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


def _core_slots(jobs: int) -> list[set[int]]:
    """Returns the CPU cores of each slot; empty if all slots share them.

    XLA's thread pool uses all cores that it may use: two jobs on the same cores run at half the speed each or less. With an
    accelerator, the CPU only feeds it, and there are no slots.
    """
    if jobs == 1 or not hasattr(os, "sched_setaffinity") or any(any(Path("/dev").glob(d)) for d in ACCELERATORS):
        return []
    cores = sorted(os.sched_getaffinity(0))
    slots = [set(cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs]) for slot in range(jobs)]
    return slots if all(slots) else []


@dataclass(frozen=True)
class SlurmPoint:
    """Work of a SLURM job: `command --index I`. A job that is pre-empted or out of time is queued again and resumes."""

    command: tuple[str, ...]

    def __call__(self, index: int) -> None:
        """Runs the point; raises CalledProcessError if it fails, which also fails the job."""
        done = subprocess.run([*self.command, "--index", str(index)], preexec_fn=_leave_signals_to_submitit)
        if done.returncode != TRY_AGAIN:  # another worker trains it, or it was stopped
            done.check_returncode()

    def checkpoint(self, index: int) -> Any:
        """Returns the job to queue instead; submitit calls it before the job ends early."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, index)


def _leave_signals_to_submitit() -> None:
    """Ignores the signals that SLURM sends to every process of a job. The point must run until submitit has queued it again
    and ends it: a point that ends earlier fails its job."""
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def launch_slurm(tasks: Sequence[Task], command: Sequence[str], workdir: Path, options: Sequence[str]) -> int:
    """Queues the points that have not ended as one array of jobs and prints the job ids; returns how many failed.

    `options` are KEY=VALUE for submitit's `update_parameters` (timeout_min=2880 gpus_per_node=8 slurm_array_parallelism=8).
    cluster=local runs the jobs here with submitit's local executor and waits for them; else the function returns 0 at once.
    """
    settings = _settings(options)
    cluster = settings.pop("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise ConfigError(f"--slurm cluster={cluster}: give slurm or local")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError("--launcher slurm: there is no sbatch on this machine; run it where jobs are submitted")
    waiting = [task for task in distinct(tasks) if _startable(task, workdir)]
    if not waiting:
        return 0
    import submitit

    most = settings.pop("max_num_timeout", MOST_TIMEOUTS)
    executor = submitit.AutoExecutor(folder=workdir / "slurm", cluster=cluster, slurm_max_num_timeout=most)
    try:
        executor.update_parameters(**{"name": f"sweep-{workdir.name}", **settings})
        submitted = executor.map_array(SlurmPoint(tuple(command)), [task.index for task in waiting])
    except (NameError, TypeError, AssertionError, ValueError, submitit.core.utils.FailedJobError) as error:
        raise ConfigError(f"--slurm: {type(error).__name__}: {' '.join(str(error).split())}") from None
    for task, job in zip(waiting, submitted, strict=True):
        _log(task, f"job {job.job_id}, log {job.paths.stdout}")
    failed = 0
    for task, job in zip(waiting, submitted, strict=True) if cluster == "local" else ():
        error = job.exception()
        failed += error is not None
        _log(task, str(state_of(workdir, task.point)) if error is None else f"failed: {_last_line(job.paths.stderr)}")
    return failed


def _settings(options: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"--slurm {option}: give KEY=VALUE, as in timeout_min=600")
        settings[key] = int(value) if value.lstrip("-").isdigit() else value
    return settings
