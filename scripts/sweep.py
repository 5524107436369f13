"""Trains many runs: python scripts/sweep.py --sweep configs/sweeps/table1b.py --workdir DIR [--base FILE] [--loss.beta 1]

Trains every point of one or several sweep files over a base config, each distinct run once, in DIR/FOLDER. If you start it
again, it skips runs that have ended, resumes interrupted ones and skips those that another process or machine trains. A run
that diverges is recorded in DIR/FOLDER/diverged.json and is not tried again until you remove that file.

    --list                    prints the points, their states and their costs, and writes nothing; without --workdir,
                              every point is listed as waiting
    --launcher local          runs --jobs points at a time on this machine (the default). Without a GPU or TPU the jobs share
                              the CPU's cores; with one, --jobs 1 gives each point the complete device
    --launcher slurm          submits one SLURM array: --slurm timeout_min=2880 gpus_per_node=8 slurm_partition=gpu
    --index I                 runs one point in this process; I is $SLURM_ARRAY_TASK_ID, $JOB_COMPLETION_INDEX (Kubernetes),
                              ...; exit status: 0 done or diverged; 75 stopped, or trained by another worker; 1 failed
"""

from __future__ import annotations

import retina_jax.interrupts  # noqa: F401  handles signals during the imports below

# isort: split

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from retina_jax.cli import one_line_errors, parse_command_line, set_up_jax
from retina_jax.config import Config, ConfigError
from retina_jax.config_io import load_config
from retina_jax.console import log
from retina_jax.errors import TRY_AGAIN
from retina_jax.installation import config_path
from retina_jax.sweeps.launchers import launch_local, launch_slurm
from retina_jax.sweeps.points import Task, base_file, chosen, load_sweeps, open_sweep, tasks_of
from retina_jax.sweeps.status import listing, run_point

PAPER = Path(__file__).parents[1] / "configs" / "paper_ablations.py"
LAUNCHING = ("--launcher", "--jobs", "--slurm", "--only")


@dataclass(frozen=True)
class Arguments:
    """Options of this script; all others are fields of the base config."""

    sweep: tuple[Path, ...]
    """Sweep files, in Python: they are executed."""
    settings: Annotated[Config, tyro.conf.arg(name="")]
    workdir: Path | None = None
    """Folder of all runs; created if missing."""
    base: Path | None = None
    """Config file that the points override; default: the sweep file's BASE, else configs/paper_ablations.py."""
    seeds: tuple[int, ...] | None = None
    """Seeds of every point; default: the base's seed."""
    only: tuple[str, ...] = ()
    """Names of the points to launch or list (gamma_2.0, or table1b/gamma_2.0); default: all."""
    list: bool = False
    """Print the points and run nothing."""
    index: int | None = None
    """Run only the point with this index, in this process."""
    launcher: Literal["local", "slurm"] = "local"
    """Where the points run."""
    jobs: int = 1
    """Points at a time (launcher local)."""
    slurm: tuple[str, ...] = ()
    """KEY=VALUE parameters of submitit (launcher slurm); cluster=local tries it without SLURM."""


def main() -> int:
    """Reads the command line, writes the manifests, and lists or runs the points; returns the exit status."""
    argv = sys.argv[1:]
    files, named_base, command = early_options(argv)
    modules = load_sweeps(files)
    base = config_path(Path(named_base), "--base") if named_base else base_file(modules, PAPER)
    defaults = Arguments(sweep=tyro.MISSING, settings=load_config(base))
    arguments = parse_command_line(Arguments, defaults, argv, __doc__)

    workdir, seeds, settings = arguments.workdir, arguments.seeds, arguments.settings
    if workdir is None and not arguments.list:
        raise ConfigError("--workdir: required unless you give --list")
    write = not arguments.list
    sweeps = {
        path.stem: open_sweep(workdir, path, module, base, settings, seeds or (), write=write)
        for path, module in modules.items()
    }
    every_task = tasks_of(sweeps)
    if arguments.index is not None and not arguments.list:
        return run_index(every_task, arguments.index, workdir)
    if arguments.list:
        jax.config.update("jax_platforms", "cpu")  # counting costs needs no GPU, which may be training
        print(listing(workdir, chosen(every_task, arguments.only, seeds)), flush=True)
        return 0
    selected = chosen(every_task, arguments.only, seeds or (settings.seed,))
    if arguments.launcher == "slurm":
        return int(launch_slurm(selected, command, workdir, arguments.slurm) > 0)
    return int(launch_local(selected, command, workdir, arguments.jobs) > 0)


def early_options(argv: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """Returns the sweep files and the base, which decide what the other options are, and the command of a single point."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--sweep", nargs="*", action="append", default=[])
    parser.add_argument("--base", nargs="?")
    for option in LAUNCHING:
        parser.add_argument(option, nargs="*")
    found, others = parser.parse_known_args(argv)
    if len(found.sweep) > 1:
        raise ConfigError("--sweep: give all files after one --sweep")
    files = [file for some in found.sweep for file in some]
    base = ["--base", found.base] if found.base else []
    return files, found.base, [sys.executable, str(Path(__file__).resolve()), "--sweep", *files, *base, *others]


def run_index(every_task: Sequence[Task], index: int, workdir: Path) -> int:
    """Trains one point in this process; returns 0; 1 if it failed; 75 if it was stopped or is trained elsewhere."""
    from train import train

    if not 0 <= index < len(every_task):
        raise ConfigError(f"--index {index}: must be from 0 to {len(every_task) - 1}")
    point = every_task[index].point
    set_up_jax()
    try:
        with one_line_errors():
            state = run_point(workdir, point, train)
    except SystemExit as end:  # a stopped run ends with 0, but the point is not done
        return {0: TRY_AGAIN, 2: 1}.get(end.code, end.code)
    result = "skipped, another worker trains it" if state.kind == "running" else state
    log(f"index {index}, {point.name}: {result}")
    return TRY_AGAIN if state.kind == "running" else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
