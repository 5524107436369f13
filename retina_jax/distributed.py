"""Several hosts that train one run together, through JAX's distributed runtime; SIGTERM and Ctrl-C stop all at one step.

Every host runs the same command. Host 0, the primary, writes the run's folder and the log; the others print errors only. All
hosts take the same decisions from the same values, so that no host waits for a collective that another never enters.

If a host ends, the others end by JAX's heartbeat or by an error of the network library, with status TRY_AGAIN, or SIGABRT
if JAX ends them. A host for which the others wait is named before that. docs/results/reliability.md has the times.
"""

import contextlib
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from retina_jax import interrupts
from retina_jax.config import ConfigError
from retina_jax.errors import TRY_AGAIN, Stopped, ending, one_line, reason
from retina_jax.watch import Watch

T = TypeVar("T")

HEARTBEAT_SECONDS = 30  # JAX's runtime ends all hosts if one of them has sent no heartbeat for this long
CONNECT_SECONDS = 300  # for all hosts to start
START_GRACE_SECONDS = 1.0  # for Python to handle a signal during the start
PRIMARY_GRACE_SECONDS = 2.0  # for the others to report their own error before host 0, JAX's coordinator, ends
NETWORK = re.compile(r"\b(Gloo|NCCL|coordination service)\b", re.IGNORECASE)  # in the message of a failed collective


@dataclass(frozen=True)
class Hosts:
    """Options by which this process finds the others. On one host none is given."""

    distributed: bool = False
    """Run on several hosts, which JAX finds through SLURM, Open MPI, Kubernetes or the TPU pod."""
    coordinator: str = ""
    """Without --distributed: ADDRESS:PORT of host 0, the same on every host; a port that is free there."""
    hosts: int = 0
    """Without --distributed: number of hosts."""
    host: int = -1
    """Without --distributed: number of this host, from 0."""


ALONE = Hosts()  # this process trains alone
_watch = Watch()


def is_primary() -> bool:
    """Returns whether this is host 0, the only one that writes files. Does not initialise JAX's devices."""
    return _state().process_id == 0


def is_multihost() -> bool:
    """Returns whether there are other hosts. Does not initialise JAX's devices."""
    return _state().num_processes > 1


@contextlib.contextmanager
def joined(options: Hosts) -> Iterator[None]:
    """Connects all hosts while the `with` block runs; on one host it does nothing. ConfigError for invalid options. An
    error ends this host's process at once, and thereby the others, which would wait for it in a collective."""
    if options != ALONE:
        _connect(options)
    if not is_multihost():
        yield
        return
    if not is_primary():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process
    _watch.start(_state().client, _state().process_id)
    try:
        yield
    except Stopped:  # raised on all hosts at the same step
        _leave()
        raise
    except BaseException as error:
        line, status = ending(error)
        if isinstance(error, ValueError | RuntimeError) and line is None and NETWORK.search(str(error)):
            how = "start all hosts again with the same command, and the run resumes from its newest checkpoint"
            line = f"error: the connection to another host failed ({reason(error)}); its log has the cause; {how}"
            status = TRY_AGAIN
        if line is None:
            traceback.print_exc()
        else:
            print(one_line(line), file=sys.stderr, flush=True)
        if is_primary():
            time.sleep(PRIMARY_GRACE_SECONDS)
        end_at_once(status)
    _leave()


def share() -> dict[str, int]:
    """Returns the number of this host and the number of hosts, as the input pipeline takes them."""
    return {"host": _state().process_id, "hosts": _state().num_processes}


def reached() -> None:
    """Counts a point that all hosts reach equally often, for the watch that names a late host. It does not wait."""
    _watch.reached()


def counted(items: Iterable[T]) -> Iterator[T]:
    """Yields `items`, each of them a point that all hosts reach; they then name a host that waits for one."""
    for item in items:
        _watch.reached()
        yield item


def exchange(value: Any) -> list[Any]:
    """Returns the value of every host (anything that can be pickled), by number of the host. All hosts must call it."""
    if not is_multihost():
        return [value]
    _watch.reached()
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(own)], np.int32)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(own)] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths.tolist(), strict=True)]


def from_primary(value: T) -> T:
    """Returns host 0's value on every host. All hosts must call it."""
    return exchange(value)[0]


def check_same(what: str, facts: dict[str, object]) -> None:
    """Raises ConfigError on every host if `facts` of a host differ from host 0's; it names the first that differs."""
    first, *others = exchange(facts)
    for host, other in enumerate(others, start=1):
        for name in first:
            if other.get(name) != first[name]:
                found = f"{first[name]} on host 0 and {other.get(name)} on host {host}"
                raise ConfigError(f"{what}: {name} is {found}; it must be the same on all hosts")


def end_at_once(status: int) -> NoReturn:
    """Ends the process without an orderly exit, which would wait for other hosts, or for threads that are still writing."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _state() -> Any:
    from jax._src.distributed import global_state  # jax.process_index would initialise the devices

    return global_state


def _connect(options: Hosts) -> None:
    explicit = options.coordinator, options.hosts, options.host
    if options.distributed:
        if explicit != ("", 0, -1):
            raise ConfigError("--distributed: finds the hosts itself; leave out --coordinator, --hosts and --host")
    elif not re.fullmatch(r".+:[0-9]{1,5}", options.coordinator) or not 0 < _port(options.coordinator) < 2**16:
        raise ConfigError(f"--coordinator {options.coordinator or '(missing)'}: must be ADDRESS:PORT of host 0")
    elif options.hosts < 1:
        raise ConfigError(f"--hosts {options.hosts}: must be the number of hosts")
    elif not 0 <= options.host < options.hosts:
        raise ConfigError(f"--host {options.host}: must be the number of this host, 0 to {options.hosts - 1}")
    how = "--distributed" if options.distributed else f"--coordinator {options.coordinator}"
    pool = ThreadPoolExecutor(1, "connect")  # so that signals and the time limit end the wait, JAX's own by SIGABRT
    interrupts.catch()
    try:
        connected, until = pool.submit(_initialize, options, how), time.monotonic() + CONNECT_SECONDS
        while time.monotonic() < until and not wait([connected], 0.5).done:
            pass  # not one long wait: Python acts on a signal that came just before a wait only after it
        connected.result(0)
    except ConfigError:
        raise
    except (TimeoutError, ValueError, RuntimeError) as error:
        needs = "every host must run the same command and reach that address, where host 0 and no other program listens"
        why = f"not within {CONNECT_SECONDS} s; {needs}" if isinstance(error, TimeoutError) else reason(error)
        print(f"error: {how}: the hosts did not find each other: {why}", file=sys.stderr)
        end_at_once(TRY_AGAIN)  # a later start may find them; JAX's half-initialised runtime prevents an orderly exit
    finally:
        # JAX handles SIGTERM from now on. It set its handler without Python, which would replace it.
        interrupts.restore({*interrupts.SIGNALS} - {signal.SIGTERM})
    pool.shutdown()


def _initialize(options: Hosts, how: str) -> None:
    """Starts JAX's distributed runtime. Host 0 first checks the port, since JAX would crash if it is taken."""
    given = (None, None, None) if options.distributed else (options.coordinator, options.hosts, options.host)
    address, hosts, host = given
    if options.distributed:
        from jax._src.clusters import ClusterEnv

        known = os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, CONNECT_SECONDS
        address, hosts, host, _ = ClusterEnv.auto_detect_unset_distributed_params(*known)
    if host == 0:
        check_port(_port(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address)), how)
        print(f"host 0: waiting for {hosts - 1} more hosts at {address}", flush=True)
    # With explicit options detection is off: under SLURM it would leave each process one GPU.
    method = None if options.distributed else "deactivate"
    times = {"initialization_timeout": CONNECT_SECONDS + 60, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    jax.distributed.initialize(*given, cluster_detection_method=method, **times)


def check_port(port: int, how: str) -> None:
    """Raises ConfigError, for the option `how`, unless this host can listen on `port` at all its addresses, and alone: JAX
    would crash, or share the port with another program. The port of a run that has just ended is free."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        other = "JAX_COORDINATOR_PORT=PORT sets another" if how == "--distributed" else "use a free one"
        taken = f"host 0 cannot listen on port {port} ({os.strerror(error.errno)})"
        raise ConfigError(f"{how}: {taken}; {other}, the same on all hosts") from None


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _leave() -> None:
    multihost_utils.sync_global_devices("retina_jax: the end")
    _watch.stop()
    jax.distributed.shutdown()


class Interruption:
    """A `with` block in which Ctrl-C, SIGTERM and SIGHUP stop the run: they raise Stopped, at first at once, after `defer`
    at the next `check`. A second Ctrl-C then ends the process at once."""

    def __init__(self) -> None:
        self._number, self._checks, self._deferred = 0, 0, False
        self._before: dict[int, object] = {}
        self._signalled: int | None = None  # the end of a pipe that gets the number of each signal, on one host

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is not threading.main_thread():  # only there may Python handle signals
            return self
        if not is_multihost():
            # Before the handlers: one that raises in the middle of a thread's start would leave `threading` inconsistent.
            pipe, self._signalled = os.pipe()
            os.set_blocking(self._signalled, False)
            threading.Thread(target=self._end_start, args=(pipe,), name="signals", daemon=True).start()
            signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)
        for number in interrupts.SIGNALS:
            # On several hosts JAX handles SIGTERM: it notifies the others and agrees with them on where to stop.
            handled_by_jax = is_multihost() and number == signal.SIGTERM
            if not handled_by_jax and signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        self._deferred = True
        if self._signalled is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._signalled)  # ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # The start is over. On several hosts JAX's handler of SIGTERM stays, which it set without Python.
        interrupts.restore({*interrupts.SIGNALS} - ({signal.SIGTERM} if is_multihost() else set()))

    def defer(self) -> None:
        """Starts the part of the run that a signal may only stop at a `check`."""
        self._deferred = True

    def check(self, step: int) -> None:
        """Raises Stopped after `step` if a signal has come. All hosts call it equally often and stop at the same call."""
        _watch.reached(f"step {step}")
        self._checks += 1
        if is_multihost():
            if multihost_utils.reached_preemption_sync_point(self._checks):
                raise Stopped(self._number or signal.SIGTERM, step)
        elif self._number:
            raise Stopped(self._number, step)

    def checked(self, step: int, items: Iterable[T]) -> Iterator[T]:
        """Yields `items`, and calls `check(step)` before each."""
        for item in items:
            self.check(step)
            yield item

    def _end_start(self, pipe: int) -> None:
        """Ends the process at a signal while it starts, if Python has not: it calls a handler after a compiler's call, which
        may take minutes, and drops what the handler raises if that happens in the garbage collector."""
        while sent := os.read(pipe, 1):
            time.sleep(START_GRACE_SECONDS)
            if not self._deferred and sent[0] in self._before:
                line, status = ending(Stopped(sent[0], None))
                print(line, flush=True)
                end_at_once(status)
        os.close(pipe)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._number == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._number = number
        if is_multihost():
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self._deferred:
            raise Stopped(number, None)
