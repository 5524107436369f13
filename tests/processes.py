"""Scripts as real processes, forked from one that has imported JAX, TensorFlow and the package.

A start takes about 0.1 s of processor time instead of 5. The forked process has a fresh JAX backend, its own environment,
signal handlers and exit, as one started by a shell has. Tests of another package than this one start a process plainly.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


class Process:
    """A child of the fork server with the interface of subprocess.Popen."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """Returns the exit status as subprocess.Popen does: negative is the number of the signal, None means
        running."""
        return self._await(0)

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status; raises subprocess.TimeoutExpired."""
        if (status := self._await(timeout)) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return status

    def _await(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(os.read(self._status, 20))
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()


@functools.cache
def _server() -> socket.socket:
    """Returns the fork server of this process, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-u", __file__, str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def start(
    script: str | Path,
    *arguments: object,
    stdout: IO,
    stderr: IO | None = None,
    devices: int | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    own_session: bool = False,
    namespaces_of: int | None = None,
) -> Process:
    """Starts `python SCRIPT ARGUMENTS` in `folder`. A script given by name is one of scripts/.

    stderr: default `stdout`. devices: number of devices of JAX's CPU backend. environment: added to that of the tests.
    namespaces_of: the process whose user and mount namespaces it enters.
    """
    path = SCRIPTS / f"{script}.py" if isinstance(script, str) else script
    request = {
        "argv": [str(path), *map(str, arguments)],
        "environment": {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})},
        "devices": devices,
        "folder": str(folder),
        "own_session": own_session,
        "namespaces_of": namespaces_of,
    }
    status, theirs = os.pipe()
    files = [stdout.fileno(), (stderr or stdout).fileno(), theirs]
    server = _server()
    socket.send_fds(server, [json.dumps(request).encode()], files)
    os.close(theirs)
    return Process(int(server.recv(20)), status)


def run(
    script: str | Path, *arguments: object, timeout: float = 600, **options: object
) -> subprocess.CompletedProcess[str]:
    """Runs `start` to its end; returns exit status and output."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = start(script, *arguments, stdout=out, stderr=error, **options)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        out.seek(0), error.seek(0)
        return subprocess.CompletedProcess([str(script), *map(str, arguments)], status, out.read(), error.read())


def _serve(requests: socket.socket) -> None:
    """Forks a process for each request and sends its process id; writes its exit status to its pipe when it has ended."""
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the tests'
    signal.set_wakeup_fd(wake)
    statuses: dict[int, int] = {}
    while True:
        ready = select.select([requests, ended], [], [])[0]
        if ended in ready:
            os.read(ended, 1000)
            for pid in list(statuses):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    with contextlib.suppress(BrokenPipeError):
                        os.write(statuses[pid], str(os.waitstatus_to_exitcode(status)).encode())
                    os.close(statuses.pop(pid))
        if requests in ready:
            message, files, *_ = socket.recv_fds(requests, 2**20, 3)
            if not message:
                return  # the tests have ended
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                requests.close()
                for file in (ended, wake, files[2], *statuses.values()):
                    os.close(file)
                return _become(json.loads(message), *files[:2])
            statuses[pid] = files[2]
            os.close(files[0]), os.close(files[1])
            requests.send(str(pid).encode())


def _become(request: dict, stdout: int, stderr: int) -> None:
    """Sets up this forked process as requested and runs its script."""
    if request["own_session"]:
        os.setsid()
    os.dup2(stdout, 1), os.dup2(stderr, 2)
    os.close(stdout), os.close(stderr)
    sys.stdout, sys.stderr = (os.fdopen(file, "w", buffering=1, closefd=False) for file in (1, 2))
    for kind in ("user", "mnt") if request["namespaces_of"] else ():
        _enter(Path(f"/proc/{request['namespaces_of']}/ns/{kind}"))
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # which imports have set by TMPDIR as it was
    os.chdir(request["folder"])
    if request["devices"]:
        import jax

        jax.config.update("jax_num_cpu_devices", request["devices"])
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _enter(namespace: Path) -> None:
    """Does what os.setns does, which Python has from 3.12 on. Entering the current user namespace would be an error."""
    if os.readlink(namespace) == os.readlink(f"/proc/self/ns/{namespace.name}"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with namespace.open() as file:
        if libc.setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns", str(namespace))


if __name__ == "__main__":
    # Named otherwise than `__main__`, the scripts only import what they need.
    sys.path.insert(1, str(SCRIPTS))
    for path in SCRIPTS.glob("*.py"):
        runpy.run_path(str(path), run_name="preloaded")
    for name in ("orbax.checkpoint", "pycocotools.cocoeval", "tensorboardX", "tensorflow"):
        importlib.import_module(name)
    sys.path.remove(str(SCRIPTS))
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)  # as in conftest.py
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        _serve(channel)
