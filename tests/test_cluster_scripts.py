"""scripts/cluster: the reaction of each scheduler's script to a complete, stopped or failed run and to a lost host."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from retina_jax.config import Config
from retina_jax.config_io import flatten
from retina_jax.distributed import Hosts
from retina_jax.errors import TRY_AGAIN

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "scripts" / "cluster"


def program(folder: Path, name: str, lines: str) -> Path:
    """Writes a stand-in for `name` that appends its arguments to NAME.calls, one line per call."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "$@" >>"{folder / name}.calls"\n{lines}\n')
    path.chmod(0o755)
    return path


def calls(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.calls"
    return path.read_text().splitlines() if path.exists() else []


def known_options() -> set[str]:
    """Returns the options of scripts/train.py, by the names of the fields they set."""
    arguments = runpy.run_path(str(ROOT / "scripts" / "train.py"))["Arguments"]
    named = [*dataclasses.fields(arguments), *dataclasses.fields(Hosts)]
    return {field.name for field in named} | set(flatten(Config()))


def options(text: str) -> set[str]:
    return {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", text)}


def test_options_of_train_py_in_scripts_and_readme_exist() -> None:
    used = options(container()["args"][0])
    for name in ("slurm.sh", "tpu_pod.sh"):
        text = (CLUSTER / name).read_text()
        command = next(line for line in text.splitlines() if "train.py --workdir" in line)
        used |= options(command.partition("train.py")[2]) | options(re.search(r" RUN (--config.*)\]", text)[1])
    readme = (CLUSTER / "README.md").read_text()
    schedulers = {"nodes", "signal", "zone", "worker", "command"}  # options of sbatch and gcloud, not of train.py
    used |= options(readme) - schedulers
    assert {"distributed", "coordinator", "hosts", "host", "workdir", "config", "training.steps"} <= used
    assert used <= known_options()


def test_the_readme_is_short_and_names_the_exit_status_of_a_lost_host() -> None:
    readme = (CLUSTER / "README.md").read_text()
    assert len(readme.splitlines()) <= 40
    assert f"| {TRY_AGAIN} on the others" in readme


# SLURM


def sbatch_options() -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --(\S+)$", (CLUSTER / "slurm.sh").read_text(), re.MULTILINE)
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_slurm_signals_the_tasks_and_queues_the_job_again() -> None:
    given = sbatch_options()
    assert (CLUSTER / "slurm.sh").read_text().count("#SBATCH") == len(given)
    assert re.fullmatch(r"TERM@\d+", given["signal"])  # with B: only the batch shell would receive it
    assert "requeue" in given and given["open-mode"] == "append"
    assert given["gpus-per-node"] == given["ntasks-per-node"]  # under SLURM, JAX gives each process one GPU


def slurm(tmp_path: Path, srun: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    programs = tmp_path / "programs"
    program(programs, "srun", srun)
    program(programs, "scontrol", "")
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "3",
        "SLURM_RESTART_COUNT": str(restarts),
        "RUN": str(tmp_path / "run"),
    }
    (tmp_path / "run").mkdir(exist_ok=True)
    return subprocess.run(
        ["bash", str(CLUSTER / "slurm.sh"), str(tmp_path / "run"), "--loss.gamma", "5"],
        env=environment, capture_output=True, text=True, timeout=20,
    )  # fmt: skip


def test_slurm_ends_with_a_complete_run(tmp_path: Path) -> None:
    ended = slurm(tmp_path, 'echo "$SRUN_CPUS_PER_TASK"; touch "$RUN/summary.json"')
    assert (ended.returncode, ended.stdout) == (0, "3\n")
    (call,) = calls(tmp_path / "programs", "srun")
    run = tmp_path / "run"
    assert call.endswith(f".venv/bin/python scripts/train.py --workdir {run} --distributed --loss.gamma 5")
    assert calls(tmp_path / "programs", "scontrol") == []
    assert slurm(tmp_path, "exit 1").returncode == 0  # a complete run is not started again
    assert len(calls(tmp_path / "programs", "srun")) == 1


@pytest.mark.parametrize("status", [0, TRY_AGAIN, 128 + signal.SIGKILL, 128 + signal.SIGTERM])
def test_slurm_queues_a_run_again_that_was_stopped_or_lost_a_host(tmp_path: Path, status: int) -> None:
    assert slurm(tmp_path, f"exit {status}", restarts=3).returncode == 0
    assert calls(tmp_path / "programs", "scontrol") == ["requeue 17"]


def test_slurm_does_not_restart_a_run_with_an_error(tmp_path: Path) -> None:
    assert slurm(tmp_path, "exit 2").returncode == 2
    assert calls(tmp_path / "programs", "scontrol") == []


def test_slurm_restarts_a_run_at_most_20_times(tmp_path: Path) -> None:
    ended = slurm(tmp_path, f"exit {TRY_AGAIN}", restarts=20)
    assert ended.returncode == 1 and "not complete after 20 restarts" in ended.stderr
    assert calls(tmp_path / "programs", "scontrol") == []


def test_slurms_shell_waits_for_its_tasks_after_sigterm_and_queues_again(tmp_path: Path) -> None:
    """At the time limit SLURM signals the batch shell too; it waits until its tasks have saved."""
    ended = slurm(tmp_path, "kill -TERM $PPID; sleep 0.3; exit 0")
    assert ended.returncode == 0
    assert calls(tmp_path / "programs", "scontrol") == ["requeue 17"]


# Kubernetes


def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    return service, job


def container() -> dict[str, Any]:
    (only,) = manifest()[1]["spec"]["template"]["spec"]["containers"]
    return only


def test_kubernetes_gives_every_pod_a_name_and_a_number() -> None:
    service, job = manifest()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    environment = {variable["name"]: variable["value"] for variable in container()["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["HOSTS"])
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    # An indexed Job's pod I is called JOB-I.
    address = f"--coordinator {job['metadata']['name']}-0.{pod['subdomain']}:"
    assert address in container()["args"][0] and '--host "$JOB_COMPLETION_INDEX"' in container()["args"][0]


def test_kubernetes_counts_neither_sigterm_nor_a_lost_host_as_a_failure() -> None:
    spec = manifest()[1]["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy is refused otherwise
    by_status, by_condition = spec["podFailurePolicy"]["rules"]
    assert by_status["action"] == by_condition["action"] == "Ignore"
    assert by_status["onExitCodes"] == {
        "containerName": container()["name"],
        "operator": "In",
        "values": [TRY_AGAIN, 128 + signal.SIGABRT],
    }
    assert by_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def start_container(tmp_path: Path, train: str, late: str = "") -> subprocess.Popen[bytes]:
    """Starts the container with `train` as its python; its shell runs `late` before it waits."""
    program(tmp_path / ".venv" / "bin", "python", train)
    (tmp_path / "run").mkdir(exist_ok=True)
    environment = {**os.environ, "RUN": "run", "CONFIG": "c.py", "HOSTS": "2", "JOB_COMPLETION_INDEX": "1"}
    (shell,) = container()["args"]
    assert "child=$!" in shell
    shell = shell.replace("child=$!", f"child=$!\n{late}")
    return subprocess.Popen([*container()["command"], shell], cwd=tmp_path, env=environment)


@pytest.mark.parametrize(
    ("train", "status"),
    [
        ("touch run/summary.json", 0),
        ("exit 0", TRY_AGAIN),
        (f"exit {TRY_AGAIN}", TRY_AGAIN),
        ("exit 2", 2),
        ("kill -9 $$", 137),
    ],
    ids=["complete", "stopped", "lost host", "error", "killed"],
)
def test_kubernetes_container_exit_status(tmp_path: Path, train: str, status: int) -> None:
    assert start_container(tmp_path, train).wait(100) == status
    (call,) = calls(tmp_path / ".venv" / "bin", "python")
    assert call.split() == [
        "scripts/train.py", "--config", "c.py", "--workdir", "run",
        "--coordinator", "retina-0.retina:8476", "--hosts", "2", "--host", "1",
    ]  # fmt: skip


def test_kubernetes_container_returns_the_status_of_a_process_that_ended_before_the_wait(tmp_path: Path) -> None:
    assert start_container(tmp_path, "exit 2", late="sleep 0.3").wait(100) == 2


def test_kubernetes_container_forwards_sigterm_and_waits_for_the_save(tmp_path: Path) -> None:
    train = "trap 'sleep 0.5; touch run/saved; exit 0' TERM; touch run/started; while true; do sleep 0.05; done"
    process = start_container(tmp_path, train)
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == TRY_AGAIN
    assert (tmp_path / "run" / "saved").exists()


def test_kubernetes_container_does_not_start_a_complete_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").touch()
    assert start_container(tmp_path, "exit 1").wait(100) == 0
    assert calls(tmp_path / ".venv" / "bin", "python") == []


# TPU


def tpu_pod(tmp_path: Path, train: str, at_once: int = 300) -> subprocess.CompletedProcess[str]:
    """Runs tpu_pod.sh with a stand-in for gcloud, which runs the `test` commands here and `train` instead of the
    others."""
    checkout = tmp_path / "retina_jax"
    checkout.mkdir()
    program(
        tmp_path / "programs",
        "gcloud",
        f'command=${{@: -1}}\ncommand=${{command#--command=}}\ncd "{tmp_path}" || exit 255\n'
        f'case $command in *train.py*) {train} ;; *) eval "$command" ;; esac',
    )
    environment = {**os.environ, "PATH": f"{tmp_path / 'programs'}:{os.environ['PATH']}", "AT_ONCE": str(at_once)}
    return subprocess.run(
        [str(CLUSTER / "tpu_pod.sh"), "slice", "us-a", "run 1", "--loss.gamma", "5"],
        env=environment, capture_output=True, text=True, timeout=30,
    )  # fmt: skip


def test_tpu_runs_on_all_hosts_until_the_run_is_complete(tmp_path: Path) -> None:
    train = (
        'cd retina_jax && mkdir -p "run 1" && echo >>times; [ "$(wc -l <times)" -lt 3 ] || touch "run 1/summary.json"'
    )
    assert tpu_pod(tmp_path, train).returncode == 0
    starts = [call for call in calls(tmp_path / "programs", "gcloud") if "train.py" in call]
    assert len(starts) == 3
    assert starts[0].rstrip() == (
        "compute tpus tpu-vm ssh slice --zone=us-a --worker=all --command=cd retina_jax && .venv/bin/python "
        r"scripts/train.py --workdir run\ 1 --distributed --loss.gamma 5"
    )


def test_tpu_does_not_restart_a_run_that_fails_at_once(tmp_path: Path) -> None:
    ended = tpu_pod(tmp_path, "exit 1")
    assert ended.returncode == 1 and "is not restarted" in ended.stderr
    assert len([call for call in calls(tmp_path / "programs", "gcloud") if "train.py" in call]) == 1


def test_tpu_restarts_a_run_at_most_20_times(tmp_path: Path) -> None:
    assert tpu_pod(tmp_path, "exit 1", at_once=0).returncode == 1
    assert len([call for call in calls(tmp_path / "programs", "gcloud") if "train.py" in call]) == 20


@pytest.mark.parametrize(("script", "arguments"), [("slurm.sh", []), ("tpu_pod.sh", ["slice", "us-a"])])
def test_scripts_print_their_usage(script: str, arguments: list[str]) -> None:
    ended = subprocess.run(["bash", str(CLUSTER / script), *arguments], capture_output=True, text=True, timeout=20)
    assert ended.returncode != 0 and "RUN [options of scripts/train.py]" in ended.stderr
