"""Reports what a run needs on accelerators that this machine lacks: scripts/compile_for.py --target tpu:v5e-8 --config FILE
or, one line per run of a sweep: scripts/compile_for.py --target gpu:h100-8 --config FILE --sweep SWEEP_FILE ...

Compiles the programs of training and inference with the accelerator's own compiler, and prints memory, exchanges between
devices, and the time of a step as a range from a floor (all arithmetic at the peak) to the compiler's estimate. No time is
measured. The compilers: pip install retina-jax[tpu] or retina-jax[cuda].
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from retina_jax.accelerators.needs import Needs, needs
from retina_jax.accelerators.targets import Target, parse_target, topology_devices
from retina_jax.cli import one_line_errors, parse_command_line
from retina_jax.config import Config, ConfigError
from retina_jax.config_io import validate
from retina_jax.console import log
from retina_jax.data.transforms import buckets, train_short_sides
from retina_jax.errors import OutOfMemory
from retina_jax.runs.folder import config_of
from retina_jax.sweeps.points import expand, load_sweeps
from retina_jax.training.parallel import Driver

PAPER = Path(__file__).parents[1] / "configs" / "paper_r50_600.py"
CLASSES = 80  # of a config whose number of classes comes from the data
VERDICTS = {True: "fits", False: "does NOT fit", None: "not reported, so it is unknown whether it fits"}


@dataclass(frozen=True)
class Arguments:
    """The options of this script; all others are fields of the config."""

    target: str
    """Accelerator and number of devices: tpu:v5e-8, tpu:v6e-4, gpu:h100-8."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: Path = PAPER
    """Config file; the other options override its fields."""
    what: Literal["step", "detect"] = "step"
    """Program: the training step, or detection."""
    shape: str = ""
    """Padded shape, height x width: 640x1024; default: each shape that training uses."""
    sweep: tuple[str, ...] = ()
    """Sweep files: compile the largest landscape shape of each of their runs; programs that are equal only once."""
    json: bool = False
    """Print one JSON object per padded shape instead of text."""
    hlo: Path | None = None
    """File for the text of the (last) program, scheduled HLO."""


def main() -> None:
    """Compiles each padded shape, and prints what it needs."""
    jax.config.update("jax_platforms", "cpu")  # the plugins would look for devices
    defaults = Arguments(tyro.MISSING, config_of(sys.argv[1:], str(PAPER)))
    arguments = parse_command_line(Arguments, defaults, sys.argv[1:], __doc__)
    config = validate(arguments.settings)
    target, number = parse_target(arguments.target)
    devices = topology_devices(target, number)
    if arguments.sweep:
        return compile_sweeps(arguments, config, target, devices)
    Driver(config, config.model.num_classes or CLASSES, tuple(devices)).check_batch_size()
    shapes = padded_shapes(arguments.shape, config)
    found, too_large = [], []
    for index, shape in enumerate(shapes, start=1):
        if not arguments.json:
            log(f"compiling program {index} of {len(shapes)} ({shape[0]}x{shape[1]}) for {number} x {target.kind} ...")
        try:
            result, text = needs(config, config.model.num_classes or CLASSES, target, devices, arguments.what, shape)
        except OutOfMemory as error:  # the compilers of TPUs refuse a program that does not fit
            print(
                json.dumps({"padded_hw": shape, "fits": False}) if arguments.json else f"does NOT fit: {error}",
                flush=True,
            )
            too_large.append(shape)
            continue
        print(json.dumps(asdict(result)) if arguments.json else report(result, target), flush=True)
        found.append(result)
        if result.fits is False:
            too_large.append(shape)
        if arguments.hlo:
            arguments.hlo.write_text(text)
    if arguments.json:
        return
    if found:
        print(schedule(found, config, number, arguments.what), flush=True)
    if too_large:
        names = ", ".join(f"{height}x{width}" for height, width in too_large)
        how = "use a smaller data.batch_size, more devices or smaller images"
        print(f"{len(too_large)} of {len(shapes)} shapes do not fit ({names}); {how}", flush=True)


def compile_sweeps(arguments: Arguments, config: Config, target: Target, devices: Sequence[Any]) -> None:
    """Compiles the largest landscape shape of each run of the sweeps, and prints one line per run."""
    modules = load_sweeps(arguments.sweep)
    runs: dict[str, tuple[str, Config]] = {}
    for path, module in modules.items():
        for point in expand(path, module, config, [config.seed]):
            runs.setdefault(point.folder, (f"{path.stem}/{point.name}", point.config))
    known: dict[str, tuple[Needs, str]] = {}
    for name, settings in runs.values():
        shape = max(padded_shapes(arguments.shape, settings), key=lambda hw: (hw[0] <= hw[1], hw[0] * hw[1]))
        classes = settings.model.num_classes or CLASSES
        try:
            found, _ = needs(settings, classes, target, devices, arguments.what, shape, known)
        except OutOfMemory as error:
            line = json.dumps({"point": name, "fits": False}) if arguments.json else f"{name}  does NOT fit: {error}"
        else:
            verdict = VERDICTS[found.fits]
            times = f"{1e3 * found.floor_seconds:.1f} to {1e3 * found.estimate_seconds:.1f} ms"
            line = f"{name}  {shape[0]}x{shape[1]}  {found.memory or 'memory'}: {verdict}  {times}"
            line = json.dumps({"point": name, **asdict(found)}) if arguments.json else line
        print(line, flush=True)


def padded_shapes(given: str, config: Config) -> Sequence[tuple[int, int]]:
    """Returns the shape that the option --shape names, or all shapes of training."""
    if not given:
        return buckets(config.data, train_short_sides(config.data))
    sides = given.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) and int(side) % 32 == 0 for side in sides):
        raise ConfigError(f"--shape {given}: must be HEIGHTxWIDTH, multiples of 32, such as 640x1024")
    return [(int(sides[0]), int(sides[1]))]


def report(found: Needs, target: Target) -> str:
    """Returns what a program needs as text."""
    lines = [f"{found.padded_hw[0]}x{found.padded_hw[1]}, {found.images} images per device:"]
    needed, usable = found.memory or "of the program", target.usable / 2**30
    of_all = ", three quarters of the GPU's, which JAX reserves by default" if target.usable < target.memory else ""
    lines.append(f"  memory      {needed}: {VERDICTS[found.fits]} in {usable:.0f} GiB{of_all}")
    if found.largest_batch:
        lines.append(f"  batch       about {found.largest_batch} images per device fit (extrapolated)")
    for kind, (number, size) in found.collectives.items():
        lines.append(f"  collective  {number} {kind}, {size / 2**20:.1f} MiB")
    lines.append(f"  host        {found.host_transfers} transfers")
    lines.append(f"  compiled    in {found.compile_seconds:.0f} s")
    lines.append(f"  arithmetic  {found.flops / 1e12:.2f} TFLOP")
    if found.cycles:
        lines.append(f"  cycles      {found.cycles / 1e6:.1f} M, the compiler's estimate")
    for kind, (number, size) in found.kernels.items():
        lines.append(f"  kernels     {number} {kind}, {size / 2**30:.2f} GiB")
    if found.kernels:
        moved = sum(size for _, size in found.kernels.values()) / target.bandwidth
        at_peak = f"{1e3 * found.flops / target.peak_flops:.1f} ms of arithmetic, {1e3 * moved:.1f} ms of memory"
        lines.append(f"  at the peak {at_peak}")
    lines.append(
        f"  time        {1e3 * found.floor_seconds:.1f} ms floor, {1e3 * found.estimate_seconds:.1f} ms estimate"
    )
    unit, scale = ("M cycles", 1e6) if found.cycles else ("GiB", 2**30)
    lines.append(f"  largest ({unit}):")
    lines += [f"    {size / scale:8.2f}  {place}" for place, size in found.largest]
    return "\n".join(lines)


def schedule(found: Sequence[Needs], config: Config, devices: int, what: str) -> str:
    """Returns the expected hours of the config's schedule, as a range over all padded shapes; for detection, images/s."""
    floor = min(each.floor_seconds for each in found)
    estimate = max(each.estimate_seconds for each in found)
    if what == "detect":
        rates = [config.data.batch_size / seconds for seconds in (estimate, floor)]
        return f"detection: {rates[0]:.0f} to {rates[1]:.0f} images/s on {devices} devices (not measured)"
    if config.training.epochs:
        rates = [config.data.batch_size / seconds for seconds in (estimate, floor)]
        return f"training.epochs {config.training.epochs:g}: {rates[0]:.0f} to {rates[1]:.0f} images/s (not measured)"
    hours = [config.training.steps * seconds / 3600 for seconds in (floor, estimate)]
    low, high = (f"{value:.1f}" if value >= 1 else f"{value:.2g}" for value in hours)
    return f"{config.training.steps} steps: {low} to {high} hours on {devices} devices (not measured)"


if __name__ == "__main__":
    with one_line_errors():
        main()
