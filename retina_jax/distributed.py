"""Several hosts as one: JAX's runtime joins them, and a line between them tells at once when one is gone.

Every host runs the same command. Host 0 writes the run's folder and speaks; the others say nothing but errors. All hosts
take the same decisions from the same facts, so that none ever waits for something that another does not do.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from retina_jax.config import ConfigError
from retina_jax.errors import Stopped, ending, reason

HEARTBEAT_SECONDS = 30
"""JAX's runtime ends all hosts where one has not been heard of for so long: a machine without power, a cut cable."""
LOST = 75
"""Exit status where another host is gone: the same command, given to all hosts, goes on (EX_TEMPFAIL of sysexits.h)."""
FAREWELL = "bye"
WITNESS = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"
"""A program that speaks where its standard input ends without a word."""


@dataclass(frozen=True)
class Hosts:
    """How this process finds the others. On one host none of this is given."""

    distributed: bool = False
    """Train on several hosts, which JAX finds through SLURM, Open MPI, Kubernetes or the TPU pod."""
    coordinator: str = ""
    """Without --distributed: ADDRESS:PORT of host 0, the same on every host; a port that is free there."""
    hosts: int = 0
    """Without --distributed: number of hosts."""
    host: int = -1
    """Without --distributed: number of this host, from 0."""


ALONE = Hosts()
"""This process trains alone."""


def first() -> bool:
    """Whether this is host 0, which alone writes; True on one host. Does not wake JAX's devices up."""
    return _state().process_id == 0


def several() -> bool:
    """Whether there are other hosts. Does not wake JAX's devices up."""
    return _state().num_processes > 1


@contextlib.contextmanager
def joined(options: Hosts) -> Iterator[None]:
    """All hosts together, for as long as the `with` block runs; on one host nothing happens.

    An error on one host ends its process and, with a line that names it, the others within seconds: they could only wait
    for it for ever. Raises ConfigError where the hosts do not find each other.
    """
    if options == ALONE:
        yield
        return
    _connect(options)
    if not several():
        yield
        return
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for good
    lifeline = _Lifeline()
    try:
        yield
    except Stopped:  # by all hosts at the same step
        _leave(lifeline)
        raise
    except BaseException as error:
        line, status = ending(error)
        if line is None:
            traceback.print_exc()
        else:
            print(line, file=sys.stderr, flush=True)
        lifeline.tell(line or f"{type(error).__name__}: {error}")
        end_at_once(status)
    _leave(lifeline)


def share() -> dict[str, int]:
    """Number of this host and of all, as the input pipeline takes them."""
    return {"host": _state().process_id, "hosts": _state().num_processes}


def exchange(text: str) -> list[str]:
    """What each host gives, by number of the host, on every host."""
    if not several():
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(own)], np.int32)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(own)] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths.tolist(), strict=True)]


def gather(rows: PyTree) -> PyTree:
    """Arrays of equally many rows on each host, one after the other by number of the host, on every host."""
    return multihost_utils.process_allgather(rows, tiled=True) if several() else rows


def check_same(what: str, facts: dict[str, object]) -> None:
    """Raise ConfigError, on every host, where a host has other `facts` than host 0, naming the first that differs."""
    of_hosts = [json.loads(text) for text in exchange(json.dumps(facts))]
    for host, other in enumerate(of_hosts):
        for name, value in of_hosts[0].items():
            if other.get(name) != value:
                raise ConfigError(
                    f"{what}: {name} is {value} on host 0 and {other.get(name)} on host {host}; "
                    "it must be the same on all hosts"
                )


def _state() -> object:
    from jax._src.distributed import global_state  # JAX has no public name for it that leaves the devices alone

    return global_state


def _connect(options: Hosts) -> None:
    explicit = options.coordinator, options.hosts, options.host
    if options.distributed and explicit != ("", 0, -1):
        raise ConfigError("--distributed: finds the hosts itself; leave out --coordinator, --hosts and --host")
    if not options.distributed:
        if not options.coordinator.rpartition(":")[2].isdigit() or not options.coordinator.rpartition(":")[0]:
            raise ConfigError(f"--coordinator {options.coordinator or '(missing)'}: it must be ADDRESS:PORT of host 0")
        if options.hosts < 1:
            raise ConfigError(f"--hosts {options.hosts}: it must be the number of hosts")
        if not 0 <= options.host < options.hosts:
            raise ConfigError(f"--host {options.host}: it must be the number of this host, 0 to {options.hosts - 1}")
    # Detection is kept away from hosts that were given: under SLURM it would leave each process one GPU.
    coordinator, number, own = (None, None, None) if options.distributed else explicit
    if number and own == 0:
        print(f"host 0: waiting for {number - 1} more at {coordinator}", flush=True)
    try:
        jax.distributed.initialize(
            coordinator,
            number,
            own,
            cluster_detection_method=None if options.distributed else "deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        how = "--distributed" if options.distributed else f"--coordinator {options.coordinator}"
        print(f"error: {how}: the hosts did not find each other: {reason(error)}", file=sys.stderr)
        end_at_once(
            LOST
        )  # they may the next time; and JAX's runtime, half begun, would only complain at an orderly exit


def _leave(lifeline: _Lifeline) -> None:
    multihost_utils.sync_global_devices("retina_jax: the end")
    lifeline.end()
    jax.distributed.shutdown()


def end_at_once(status: int) -> NoReturn:
    """End the process: an orderly exit would wait for hosts that wait themselves, or for threads in the middle of things."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


class _Lifeline:
    """A TCP connection from every host to host 0. The kernel closes it however a process ends, and the others know.

    Host 0 passes on what it hears. Each line is the number of a host, a tab, and why it ended. JAX's runtime lives in host
    0: where that is killed while another holds Python's lock, JAX aborts the other before it can speak (SIGABRT, "another
    task died"); the same, after HEARTBEAT_SECONDS, where a host stands still without its connections being closed; and gloo,
    which adds up over CPUs, may abort at half a message. A witness, a process of its own, then says the line.
    """

    def __init__(self) -> None:
        # Where JAX or the network library below it aborts this process, there is no time for a word of its own.
        line = (
            f"error: host {jax.process_index()} of {jax.process_count()} ended without a word: it was killed, or aborted "
            "since another is gone; start all hosts again with the same command, and the run resumes from its newest "
            "checkpoint"
        )
        self._witness = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", WITNESS, line],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._peers: dict[int, socket.socket] = {}
        self._readers: list[threading.Thread] = []
        self._ending = False
        self._lock = threading.Lock()
        listener = _listener() if first() else None
        meeting = {"port": listener.getsockname()[1], "token": secrets.token_hex(16)} if listener else {}
        meeting = json.loads(exchange(json.dumps(meeting))[0])
        if listener is not None:
            threading.Thread(target=self._accept, args=(listener, meeting["token"]), daemon=True).start()
        else:
            self._call(meeting)
        # From here on all can be told. A host that could not connect has said so.
        connected = sum(text == "connected" for text in exchange("connected" if self._peers and not first() else ""))
        deadline = time.monotonic() + 30
        while first() and len(self._peers) < connected and time.monotonic() < deadline:
            time.sleep(0.01)

    def _call(self, meeting: dict[str, Any]) -> None:
        address = _state().coordinator_address.rpartition(":")[0].strip("[]")
        try:
            peer = socket.create_connection((address, meeting["port"]), timeout=30)
        except OSError as error:
            print(
                f"warning: no connection to port {meeting['port']} of host 0 ({error.strerror or error}): a host that is "
                f"gone is noticed after {HEARTBEAT_SECONDS} seconds instead of at once",
                file=sys.stderr,
            )
            return
        peer.settimeout(None)
        peer.sendall(f"{meeting['token']} {jax.process_index()}\n".encode())
        self._take(0, peer)

    def tell(self, why: str) -> None:
        """Say that this host ends, and why; on host 0, wait a moment until all have heard it."""
        self._ending = True
        self._speak_for_itself()
        self._send(f"{jax.process_index()}\t{' '.join(why.split())}")
        if first():  # JAX's runtime lives in this process: the others would die of its end before they can speak
            deadline = time.monotonic() + 5
            for reader in self._readers:
                reader.join(max(0.0, deadline - time.monotonic()))

    def end(self) -> None:
        """An orderly end, on all hosts."""
        self._ending = True
        self._speak_for_itself()
        self._witness.wait()
        self._send(FAREWELL)

    def _accept(self, listener: socket.socket, token: str) -> None:
        while True:
            try:
                peer, _ = listener.accept()
                peer.settimeout(30)
                said = peer.makefile("r").readline().split()
                if len(said) != 2 or said[0] != token:
                    peer.close()
                    continue
                peer.settimeout(None)
                self._take(int(said[1]), peer)
            except OSError:  # a stranger that connects and goes
                if self._ending:
                    return

    def _take(self, host: int, peer: socket.socket) -> None:
        for option, value in (("SO_KEEPALIVE", 1), ("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                level = socket.SOL_SOCKET if option.startswith("SO_") else socket.IPPROTO_TCP
                peer.setsockopt(level, getattr(socket, option), value)
        self._peers[host] = peer
        self._readers.append(threading.Thread(target=self._listen, args=(host, peer), daemon=True))
        self._readers[-1].start()

    def _listen(self, host: int, peer: socket.socket) -> None:
        said = ""
        with contextlib.suppress(OSError):
            said = peer.makefile("r").readline().strip()
        if said == FAREWELL or self._ending:
            return
        who, _, why = said.partition("\t") if said else (str(host), "", "")
        with self._lock:
            if first():
                self._send(f"{who}\t{why}")
            print(
                f"error: host {who} of {_state().num_processes} "
                f"{f'ended: {why}' if why else 'is gone (killed, or its machine is down)'}; "
                "start all hosts again with the same command, and the run resumes from its newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
            self._speak_for_itself()
            end_at_once(LOST)

    def _speak_for_itself(self) -> None:
        """The witness stays silent. It is not waited for: this process may be aborted at any moment."""
        with contextlib.suppress(OSError, ValueError):  # a witness that was killed, or told already by another thread
            self._witness.stdin.write(b"said")
            self._witness.stdin.close()

    def _send(self, line: str) -> None:
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):  # whoever is gone already need not hear it
                peer.sendall(f"{line}\n".encode())


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
