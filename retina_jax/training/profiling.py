"""Records a few steps with JAX's profiler: `--training.profile-steps 10:15` traces the steps 10 to 15.

RUN/profile/plugins/profile/TIME/ then holds `*.xplane.pb` (TensorBoard with the xprof plugin, or `jax.profiler.ProfileData`)
and `perfetto_trace.json.gz` (https://ui.perfetto.dev, chrome://tracing).
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax
from jaxtyping import PyTree

from retina_jax.console import log
from retina_jax.errors import reason


class Profiler(contextlib.AbstractContextManager):
    """A trace of the steps of one window; other steps cost nothing. The loop calls `begin` and `end` around each step.

    It waits for the device before the first step and after the last one. A run that resumes or ends inside the window traces
    its part. If the trace cannot be written, the run continues with a warning.
    """

    def __init__(self, run_folder: Path, window: tuple[int, int] | None, announce: Callable[[str], None] = log) -> None:
        """Takes the result of `parse_window`. Each of several hosts writes its own folder, profile/host_I."""
        host = f"host_{jax.process_index()}" if jax.process_count() > 1 else ""
        self._folder = run_folder / "profile" / host
        self._window, self._announce = window, announce
        self._traced: list[int] = []  # steps
        self._step = contextlib.ExitStack()

    def __exit__(self, *error: object) -> None:
        self._step.close()
        if self._window is not None and self._traced:
            self._stop(", where the run ended")
        elif self._window is not None:
            self._give_up("the run ended before these steps")

    def begin(self, step: int) -> None:
        """Starts or continues the trace if `step` is in the window. Called before waiting for the batch."""
        if self._window is None:
            return
        first, last = self._window
        if step > last:
            self._give_up(f"the run is at step {step} already")
        elif step >= first:
            if not self._traced:
                try:
                    self._folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    return self._give_up(f"{self._folder} cannot be written: {reason(error)}")
                # Without Python's calls, which slow the loop down and fill the trace.
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
            self._traced.append(step)
            self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def end(self, step: int, results: PyTree) -> None:
        """Ends the trace after the window. Called once `step` was dispatched; `results` are arrays that it computes."""
        if self._window is None:
            return
        first, last = self._window
        self._step.close()
        if step == first - 1:
            jax.block_until_ready(results)  # or the trace would begin with earlier steps
        elif step == last and self._traced:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self, ended: str = "") -> None:
        first, last = self._traced[0], self._traced[-1]
        steps = f"steps {first} to {last}" if first < last else f"step {last}"
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError, ValueError) as error:  # the disk, XLA, JAX's search for the file just written
            return self._give_up(f"{self._folder} cannot be written: {reason(error)}")
        self._window = None
        found = max(self._folder.glob("plugins/profile/*"), key=lambda folder: folder.stat().st_mtime)
        self._announce(
            f"profile of {steps}{ended}: {found / 'perfetto_trace.json.gz'} for https://ui.perfetto.dev; "
            f"or pip install tensorboard xprof, and tensorboard --logdir {self._folder}"
        )

    def _give_up(self, why: str) -> None:
        first, last = self._window
        self._window = None
        self._announce(f"warning: training.profile_steps {first}:{last}: no profile: {why}")
