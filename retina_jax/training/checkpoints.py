"""Checkpoints: host 0 writes them in a thread next to training and verifies the checksums; then every host reads.

RUN/checkpoints/STEP holds state/ (orbax), checksums.json, and metrics/metrics with the AP. A step is written under
RUN/checkpoints/saving and renamed once the disk has it: a kill or a power cut leaves it complete or absent.
"""

import contextlib
import gc
import logging
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import jax
import numpy as np
import orbax.checkpoint as orbax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from retina_jax import distributed
from retina_jax.config import ConfigError
from retina_jax.console import warn
from retina_jax.errors import PlainError, Stopped, reason
from retina_jax.runs.files import CHECKSUMS, DiskError, damage, sync, write_checksums, write_json
from retina_jax.runs.folder import best_step, saved_ap, saved_steps

T = TypeVar("T")
Step = int | Literal["best", "newest"] | None  # a saved step: its number, "best" by AP, or the newest

LEFTOVERS = ("saving", "deleting-*", "*.orbax-checkpoint-tmp*")
"""What a kill may leave behind. None of it is named by a number, so it is never read as a checkpoint."""

warnings.filterwarnings("ignore", "coroutine '.*' was never awaited")  # the rest of an array whose file was deleted


class Checkpoints:
    """The folder RUN/checkpoints. Leaving the `with` block waits for the last save, except by KeyboardInterrupt."""

    def __init__(self, folder: Path, keep: int | None = 2, *, read_only: bool = False) -> None:
        """Takes the number of newest steps to `keep`, besides the best by AP; None: all. `read_only` changes nothing."""
        self.folder, self._keep, self._read_only = folder, keep, read_only
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None
        self._failure = ""
        self._interrupted = False

    def __enter__(self) -> "Checkpoints":
        if not self._read_only and distributed.is_primary():
            self._clear()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._interrupted = isinstance(error, KeyboardInterrupt)
        try:
            self._writer.shutdown(wait=not self._interrupted, cancel_futures=self._interrupted)
        except KeyboardInterrupt:
            self._interrupted = True
            raise
        if error is None or isinstance(error, Stopped):  # after any other error, other hosts may not come here
            self.wait()

    def save(self, step: int, state: PyTree) -> None:
        """Starts saving `state` as `step`, unless it is saved; returns once the arrays may be overwritten. On host 0. A
        failing disk is a warning, and the next save tries again; `wait` raises the failure of the last save."""
        if not distributed.is_primary():
            return
        self._join()
        own = jax.device_get(jax.tree.map(lambda array: array.addressable_data(0), state))
        if jax.default_backend() == "cpu":  # there device_get returns views of the device's memory
            own = jax.tree.map(np.array, own)
        self._pending = self._writer.submit(self._write, step, own)

    def score(self, step: int, ap: float | None) -> None:
        """Saves the AP of a saved `step` that has none, then deletes old steps. On host 0. A failing disk is a warning."""
        if ap is None or not distributed.is_primary():
            return
        self._join()
        if step not in saved_steps(self.folder) or saved_ap(self.folder, step) is not None:
            return
        file = self.folder / str(step) / "metrics" / "metrics"
        try:
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"AP": ap})
        except (OSError, DiskError) as error:
            warn(f"{self.folder}: the AP of step {step} could not be saved: {reason(error)}")
        else:
            self._delete_old()

    @contextlib.contextmanager
    def save_on_error(self, step: int, state: PyTree, first: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Calls `first` and saves `state` as `step` (if above 0) when the block raises anything but KeyboardInterrupt. If
        `first` fails, nothing is saved. A failing disk is a warning; the block's error is raised."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            try:
                first()
                if step > 0:
                    self.save(step, state)
            except Exception as failure:  # a full disk, a lost device
                if isinstance(failure, PlainError) and not isinstance(failure, DiskError):
                    raise  # it explains more, for example a non-finite loss
                self._join()
                self._fail(step, failure)
            raise

    def wait(self) -> None:
        """Waits until the last save is on disk. Called by all hosts together; raises DiskError on all if it failed."""
        self._join()
        if failure := _first_failure(self._failure):
            raise DiskError(failure)

    def steps(self) -> list[int]:
        """Returns the saved steps, oldest first, as host 0 sees them. Called by all hosts together."""
        self._join()
        return distributed.from_primary(saved_steps(self.folder))

    def restore(self, like: T, step: Step = None, *, partial: bool = False) -> T:
        """Returns the state saved at `step`, with the types and shardings of `like`. Called by all hosts together.

        `like` holds arrays, or shapes with shardings; with `partial` it may be a dict of some fields of the state. For the
        newest step (also None), damaged steps are skipped with a warning and, unless read_only, renamed to `damaged-STEP`.

        Raises ConfigError if there is no such step, none is intact, or an intact one is of another network.
        """
        is_best, step = step == "best", None if step == "newest" else step
        if is_best:
            step = distributed.from_primary(best_step(self.folder))
            if step is None:
                raise ConfigError(f"--step best: no step in {self.folder} was evaluated; saved steps: {self.steps()}")
        damaged: dict[int, str] = {}
        while left := [s for s in self.steps() if s not in damaged and step in (None, s)]:  # a run may delete steps
            state, wrong = self._read(left[-1], like, partial)
            if state is not None:
                if distributed.is_primary():
                    self._set_aside(damaged, left[-1])
                return state
            damaged[left[-1]] = wrong
        if is_best and step not in self.steps():  # its run has saved a better one and deleted it meanwhile
            return self.restore(like, "best", partial=partial)
        if damaged and step is not None:
            best = ", the best by AP," if is_best else ""
            raise ConfigError(
                f"{self.folder}: step {step}{best} is damaged ({damaged[step]}); saved steps: {self.steps()}; use another "
                f"one, or --step newest for the newest that is intact"
            )
        if damaged:
            listed = "; ".join(f"{step}: {wrong}" for step, wrong in damaged.items())
            raise ConfigError(f"{self.folder}: no checkpoint can be restored ({listed}); saved steps: {self.steps()}")
        if step is None or not self.steps():
            raise ConfigError(f"{self.folder}: no checkpoint yet; train the run first")
        saved = ", ".join(map(str, self.steps()))
        raise ConfigError(f"--step {step}: no such checkpoint in {self.folder}; saved steps: {saved}")

    def _read(self, step: int, like: T, partial: bool) -> tuple[T | None, str]:
        """Returns the state, or what is wrong with it; the same on all hosts."""
        folder = self.folder / str(step)
        if wrong := _first_failure(damage(folder) if distributed.is_primary() else ""):
            return None, wrong
        state, wrong = load_arrays(folder, like, partial)
        if not (wrong := _first_failure(wrong)):
            return state, ""
        if distributed.from_primary((folder / CHECKSUMS).exists()):  # otherwise its run has deleted it meanwhile
            how = "use the config it was trained with, and a folder that all hosts reach"
            raise ConfigError(f"{folder}: its checksums match, but it cannot be loaded: {wrong}; {how}")
        return None, wrong

    def _set_aside(self, damaged: dict[int, str], taken: int) -> None:
        for step, wrong in damaged.items():
            folder, moved = self.folder / str(step), ""
            if not folder.exists():  # its run has deleted it meanwhile
                continue
            if not self._read_only:
                shutil.rmtree(aside := self.folder / f"damaged-{step}", ignore_errors=True)
                folder.rename(aside)
                moved = f" and was moved to {aside.name}"
            warn(f"{folder}: is damaged ({wrong}){moved}; step {taken} is used instead")

    def _write(self, step: int, state: PyTree) -> None:
        temporary = self.folder / "saving" / str(step)
        try:
            if step not in saved_steps(self.folder):
                self._clear()
                if not self.folder.exists():
                    self.folder.mkdir()  # but not the run's folder: it may have been moved
                temporary.parent.mkdir(exist_ok=True)
                save_arrays(temporary, state)
                write_checksums(temporary)
                temporary.rename(self.folder / str(step))
                sync(self.folder)  # before older steps are deleted
        except Exception as error:  # libraries report a full disk in various ways; training continues
            self._clear()
            self._fail(step, error)
        else:
            self._failure = ""
            self._delete_old()

    def _fail(self, step: int, error: Exception) -> None:
        saved = saved_steps(self.folder)
        newest = f"the newest intact checkpoint is step {saved[-1]}" if saved else "there is no intact checkpoint yet"
        self._failure = f"{self.folder}: step {step} could not be saved: {reason(error)}; {newest}"
        if not self._interrupted:
            warn(self._failure)

    def _delete_old(self) -> None:
        with contextlib.suppress(OSError):  # only costs space, and the next save tries again
            steps = saved_steps(self.folder)
            for step in {*steps} - {*steps[-(self._keep or len(steps)) :], best_step(self.folder)}:
                (self.folder / str(step)).rename(self.folder / f"deleting-{step}")
        self._clear()

    def _clear(self) -> None:
        with contextlib.suppress(OSError):
            for path in [path for pattern in LEFTOVERS for path in self.folder.glob(pattern)]:
                shutil.rmtree(path, ignore_errors=True)

    def _join(self) -> None:
        if self._pending is not None:
            self._pending.result()


def _first_failure(wrong: str) -> str:
    """Returns what is wrong on some host, the first of them, on every host; "" if nothing is wrong on any."""
    return next(filter(None, distributed.exchange(wrong)), "")


def save_arrays(folder: Path, arrays: PyTree) -> None:
    """Writes numpy arrays into the new `folder`. Called by host 0 alone, from any thread; raises what orbax raises. Not by
    orbax's `training.Checkpointer` or `ocp.save`, which wait for the other hosts."""
    alone = orbax.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    items = orbax.CompositeCheckpointHandler(composite_options=orbax.CompositeOptions(multiprocessing_options=alone))
    with _one_error(), orbax.Checkpointer(items, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(folder.resolve(), orbax.args.Composite(state=orbax.args.PyTreeSave(arrays)))


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Drops what libraries print of an error that they raise: orbax raises that of the first array; its threads,
    tensorstore's and asyncio print those of all, until a second later. asyncio reports a task when it is collected, which
    may be later still: after an error its reports of orbax's tasks are dropped from then on."""

    loggers, hooks = [logging.getLogger(name) for name in ("absl", "asyncio")], (sys.excepthook, sys.unraisablehook)
    for logger in loggers:
        logger.addFilter(_never)
    main = threading.main_thread()
    sys.excepthook = lambda *error: hooks[0](*error) if threading.current_thread() is main else None
    sys.unraisablehook = lambda event: None
    try:
        yield
    except Exception:
        time.sleep(1)
        gc.collect()
        loggers[1].addFilter(_not_of_orbax)
        raise
    finally:
        sys.excepthook, sys.unraisablehook = hooks
        for logger in loggers:
            logger.removeFilter(_never)


def _never(record: logging.LogRecord) -> bool:
    return False


def _not_of_orbax(record: logging.LogRecord) -> bool:
    trace = record.exc_info[2] if record.exc_info else None
    return not any("orbax" in frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))


def load_arrays(folder: Path, like: T, partial: bool) -> tuple[T | None, str]:
    """Returns this host's part of the arrays in `folder`, with the types and shardings of `like`; or what is wrong. With
    `partial`, `like` may lack arrays of the folder."""
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    context.pytree.loading.partial_load = partial
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
    try:
        with _one_error(), context:
            saved = ocp.metadata(folder.resolve(), checkpointable_name="state").metadata
            if difference := _difference(saved, like, partial):
                return None, difference
            return ocp.load(folder.resolve(), abstract, checkpointable_name="state"), ""
    except Exception as error:  # whatever the libraries raise for damaged files
        return None, reason(error)


def _difference(saved: PyTree, like: PyTree, partial: bool) -> str:
    """Returns the first array whose shape differs, by name. Orbax reports that too, but leaves unfinished tasks behind."""
    there, here = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree.leaves_with_path, (saved, like))
    )
    for name in sorted(here if partial else there | here):
        if there.get(name) != here.get(name):
            shown, own = (f"shape {shapes[name]}" if name in shapes else "missing" for shapes in (there, here))
            return f"{name}: {shown} in the checkpoint, {own} in this network"
    return ""
