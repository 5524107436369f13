"""A few steps of a run under JAX's profiler: `--training.profile-steps 10:15` traces the steps 10 to 15.

RUN/profile/plugins/profile/TIME/ then holds, with nothing installed beside JAX, `*.xplane.pb` (TensorBoard with the xprof
plugin, or `jax.profiler.ProfileData`) and `perfetto_trace.json.gz` (https://ui.perfetto.dev, chrome://tracing).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import jax
from jaxtyping import PyTree

from retina_jax.console import tell


class Profiler:
    """Traces the steps of one window; all other steps cost nothing. The loop calls `begin` and `end` around each step.

    The device is waited for before the first step and after the last one, so that the trace holds these steps, whole, and
    no others. A run resumed inside the window traces what is left of it; one that ends inside, or by an exception, keeps
    what it traced. A trace that cannot be written costs a warning and not the run. What is said, is said once.

    A step that is the first of its canvas shape compiles: its trace is of the compiler. Take later steps.
    """

    def __init__(
        self, run_folder: Path, window: tuple[int, int] | None, announce: Callable[[str], None] = tell
    ) -> None:
        """`window` as `parse_window` gives it. Several hosts each write a folder of their own, profile/host_I."""
        hosts = jax.process_count()
        self._folder = run_folder / "profile" / (f"host_{jax.process_index()}" if hosts > 1 else "")
        self._window, self._announce = window, announce
        self._first: int | None = None
        """The first step traced, while tracing, and the last one so far."""
        self._last = 0
        self._step: jax.profiler.StepTraceAnnotation | None = None

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first is not None:
            self._leave_step()
            self._stop(self._last, ", where the run ended")
        elif self._window is not None:
            first, last = self._window
            self._announce(
                f"warning: training.profile_steps {first}:{last}: the run ended and took none of these steps"
            )
            self._window = None

    def begin(self, step: int) -> None:
        """To be called before `step`, before its batch is waited for."""
        if self._window is None:
            return
        first, last = self._window
        if step > last:
            self._announce(f"warning: training.profile_steps {first}:{last}: the run is at step {step} already")
            self._window = None
        elif step >= first:
            if self._first is None:
                self._start(step)
            if self._first is not None:
                self._last = step
                self._step = jax.profiler.StepTraceAnnotation("train", step_num=step)
                self._step.__enter__()

    def end(self, step: int, results: PyTree) -> None:
        """To be called after `step` was dispatched; `results` are arrays that it computes."""
        if self._window is None:
            return
        first, last = self._window
        self._leave_step()
        if step == first - 1:
            jax.block_until_ready(results)  # or the trace would begin with the steps still under way
        elif step == last and self._first is not None:
            jax.block_until_ready(results)
            self._stop(step)

    def _start(self, step: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)
            return
        # Without Python's own calls, which slow the loop down that is to be measured and fill the trace.
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
        self._first = step

    def _leave_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _stop(self, last: int, ended: str = "") -> None:
        steps = f"steps {self._first} to {last}" if self._first < last else f"step {last}"
        self._first = self._window = None
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError, ValueError) as error:  # the disk, XLA, JAX's search for the file just written
            self._give_up(error)
            return
        found = max(self._folder.glob("plugins/profile/*"), key=lambda folder: folder.stat().st_mtime)
        self._announce(
            f"profile of {steps}{ended}: {found / 'perfetto_trace.json.gz'} for https://ui.perfetto.dev; "
            f"or pip install tensorboard xprof, and tensorboard --logdir {self._folder}"
        )

    def _give_up(self, error: Exception) -> None:
        self._window = None
        self._announce(f"warning: {self._folder}: the profile cannot be written: {str(error).splitlines()[0]}")
