"""Many runs: python scripts/sweep.py --sweep configs/sweeps/table1b.py --workdir DIR [--base FILE] [--loss.beta 1 ...]

Trains every point of one or several sweep files over a base config, each distinct run once, in DIR/FOLDER. Started again,
it skips what has ended, resumes what was begun and leaves alone what another process or machine is at. What diverges is
recorded in DIR/FOLDER/diverged.json and not tried again until that file is removed.

    --list                    what there is to run, how far it has come, what it costs; without --workdir: as if in an
                              empty folder. Nothing is written
    --launcher local          here, --jobs at once (the default). Without a GPU or TPU the jobs share out the CPU's cores;
                              with one, --jobs 1 gives each point all of it
    --launcher slurm          as one SLURM array: --slurm timeout_min=2880 gpus_per_node=8 slurm_partition=gpu
    --index I                 one point, in this process; I is $SLURM_ARRAY_TASK_ID, $JOB_COMPLETION_INDEX (Kubernetes), ...;
                              ends with 0 where it is done or diverged, with 75 where another worker holds it
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from retina_jax.cli import one_line_errors, option_value, parse_command_line, set_up_jax
from retina_jax.config import Config, ConfigError
from retina_jax.config_io import load_config
from retina_jax.sweeps.listing import without, words_of
from retina_jax.sweeps.manifest import Row, chosen, plan, rows, write_manifest
from retina_jax.sweeps.points import base_file, load_sweeps

PAPER = Path(__file__).parents[1] / "configs" / "paper_ablations.py"
LAUNCHING = ("--launcher", "--jobs", "--slurm", "--only")


@dataclass(frozen=True)
class Arguments:
    """Options of this script; all others are fields of the base config."""

    sweep: tuple[Path, ...]
    """Sweep files."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    workdir: Path | None = None
    """Folder of all runs; made where it is missing."""
    base: Path | None = None
    """Config file that the points override; not given: the sweep file's BASE, else configs/paper_ablations.py."""
    seeds: tuple[int, ...] | None = None
    """Every point with each of these; not given: the base's own."""
    only: tuple[str, ...] = ()
    """Names of the points to launch or list (gamma_2.0, or table1b/gamma_2.0); not given: all."""
    list: bool = False
    """Show the points and run nothing."""
    index: int | None = None
    """Run this point in this process."""
    launcher: Literal["local", "slurm"] = "local"
    """Where the points are run."""
    jobs: int = 1
    """Points at once (launcher local)."""
    slurm: tuple[str, ...] = ()
    """KEY=VALUE parameters of submitit (launcher slurm); cluster=local tries it out without SLURM."""


def main() -> int:
    """Read the command line, write the manifests, and list or run; the exit status."""
    argv = sys.argv[1:]
    if sum(word.partition("=")[0] == "--sweep" for word in argv) > 1:
        raise ConfigError("--sweep: give all files after one --sweep")
    modules = load_sweeps(words_of(argv, "--sweep"))
    base = Path(option_value(argv, "--base") or base_file(modules, PAPER))
    defaults = Arguments(sweep=tyro.MISSING, settings=load_config(base))
    arguments = parse_command_line(Arguments, defaults, argv, __doc__)

    workdir, seeds, settings = arguments.workdir, arguments.seeds, arguments.settings
    if workdir is None and not arguments.list:
        raise ConfigError("--workdir: must be given; --list alone does without")
    take = plan if arguments.list else write_manifest
    sweeps = [take(workdir, path, module, base, settings, seeds) for path, module in modules.items()]
    every_row = rows(sweeps)
    if arguments.index is not None and not arguments.list:
        return run_index(every_row, arguments.index, workdir)
    if arguments.list:
        from retina_jax.sweeps.listing import listing  # imports TensorFlow: seconds

        jax.config.update("jax_platforms", "cpu")  # costs are counted; the GPU is left to those who train
        print(listing(workdir, chosen(every_row, arguments.only, seeds)))
        return 0
    from retina_jax.sweeps.launchers import launch_local, launch_slurm

    asked = chosen(every_row, arguments.only, seeds or (settings.seed,))
    command = [sys.executable, str(Path(__file__).resolve()), *without(argv, LAUNCHING)]
    if arguments.launcher == "slurm":
        return int(launch_slurm(asked, command, workdir, arguments.slurm) > 0)
    return int(launch_local(asked, command, workdir, arguments.jobs) > 0)


def run_index(every_row: Sequence[Row], index: int, workdir: Path) -> int:
    """Train one point here; 1 where that fails for another reason than a loss that diverges, 75 where it goes on later."""
    from train import train

    from retina_jax.sweeps.launchers import HELD
    from retina_jax.sweeps.state import run_point

    if not 0 <= index < len(every_row):
        raise ConfigError(f"--index {index}: there are the points 0 to {len(every_row) - 1}")
    point = every_row[index].point
    set_up_jax()
    try:
        with one_line_errors():
            state = run_point(workdir, point, train)
    except SystemExit as end:  # asked to stop, a run ends with 0, but the point is not done
        return {0: HELD, 2: 1}.get(end.code, end.code)
    print(f"index {index}, {point.name}: {'run elsewhere, left alone' if state.kind == 'running' else state}")
    return HELD if state.kind == "running" else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
