"""Options of several hosts, and the reaction of the other hosts if one ends; tests/test_several_hosts.py trains on
them."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest

from retina_jax import distributed as hosts
from retina_jax import watch as watch_module
from retina_jax.config import ConfigError
from retina_jax.distributed import ALONE, Hosts, check_same, exchange, from_primary, joined
from retina_jax.errors import TRY_AGAIN
from retina_jax.watch import LATE_SECONDS, Watch


def test_a_single_host_is_primary_and_receives_its_own_messages() -> None:
    with joined(ALONE):
        assert hosts.is_primary() and not hosts.is_multihost() and hosts.share() == {"host": 0, "hosts": 1}
        assert exchange("é\n") == ["é\n"] and from_primary([1]) == [1]
        check_same("run", {"a": 1})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Hosts(distributed=True, hosts=2), "--distributed: finds the hosts itself; leave out --coordinator"),
        (Hosts(hosts=2, host=0), r"--coordinator \(missing\): must be ADDRESS:PORT of host 0"),
        (Hosts(coordinator="here", hosts=2, host=0), "--coordinator here: must be ADDRESS:PORT"),
        (Hosts(coordinator=":80", hosts=2, host=0), "--coordinator :80: must be ADDRESS:PORT"),
        (Hosts(coordinator="a:65536", hosts=2, host=0), "--coordinator a:65536: must be ADDRESS:PORT"),
        (Hosts(coordinator="a:0", hosts=2, host=0), "--coordinator a:0: must be ADDRESS:PORT"),
        (Hosts(coordinator="a:80", host=0), "--hosts 0: must be the number of hosts"),
        (Hosts(coordinator="a:80", hosts=2), r"--host -1: must be the number of this host, 0 to 1"),
        (Hosts(coordinator="a:80", hosts=2, host=2), r"--host 2: must be the number of this host, 0 to 1"),
    ],
)
def test_options_that_are_invalid_are_named(options: Hosts, says: str) -> None:
    with pytest.raises(ConfigError, match=says), joined(options):
        pass


# Facts that differ between hosts, instead of those that two processes would exchange.
def test_the_first_fact_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "exchange", lambda facts: [facts, {"data": "abc", "seed": 4}, facts])
    with pytest.raises(
        ConfigError, match=r"run: seed is 3 on host 0 and 4 on host 1; it must be the same on all hosts"
    ):
        check_same("run", {"data": "abc", "seed": 3})


class Coordinator(dict):
    """The values that hosts share, as JAX's client keeps them."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        self[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return list(self.items())


def test_a_silent_host_counts_as_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped at the same point as the others, and shares nothing more."""
    now, watch, client = [0.0], Watch(), Coordinator({"retina_jax/points/1": "1 8 step 7"})
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now[0])
    watch.reached("step 7")
    assert watch._shared(client, 0) == {0: (1, "step 7"), 1: (1, "step 7")}
    now[0] = 2 * watch_module.SILENT_SECONDS
    assert watch._shared(client, 0) == {0: (1, "step 7"), 1: (-1, "step 7")}
    client["retina_jax/points/1"] = "1 9 step 7"
    assert watch._shared(client, 0) == {0: (1, "step 7"), 1: (1, "step 7")}


@contextlib.contextmanager
def listener(address: str = "127.0.0.1", shares_port: bool = False) -> Iterator[int]:
    """Listens at a free port, which it yields. Servers of gRPC share their port (SO_REUSEPORT)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if family == socket.AF_INET6 and not socket.has_ipv6:
        pytest.skip("no IPv6")
    with socket.create_server((address, 0), family=family, reuse_port=shares_port) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("shares_port", [False, True])
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_port_is_taken_at_whatever_address_another_program_listens(address: str, shares_port: bool) -> None:
    with listener(address, shares_port) as port:
        with pytest.raises(
            ConfigError, match=rf"^--coordinator a:1: host 0 cannot listen on port {port} \(Address alr"
        ):
            hosts.check_port(port, "--coordinator a:1")
        with pytest.raises(ConfigError, match=rf"^--distributed: .* port {port} .*; JAX_COORDINATOR_PORT=PORT"):
            hosts.check_port(port, "--distributed")
    hosts.check_port(port, "--coordinator a:1")


def test_the_port_of_a_server_that_has_just_ended_is_free() -> None:
    """Its connections, which it closed first, keep the port in the state TIME_WAIT."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))
    hosts.check_port(port, "--coordinator a:1")


JOINS = """
import sys
from retina_jax import distributed
from retina_jax.cli import one_line_errors
from retina_jax.distributed import Hosts, joined
distributed.CONNECT_SECONDS = 1
with one_line_errors(starting=True), joined(Hosts(coordinator="127.0.0.1:" + sys.argv[2], hosts=2, host=int(sys.argv[1]))):
    pass
"""


def test_a_host_that_waits_for_the_others_ends_with_one_line_at_a_signal(tmp_path: Path) -> None:
    (script := tmp_path / "joins.py").write_text(JOINS.replace("CONNECT_SECONDS = 1", "CONNECT_SECONDS = 60"))
    with listener() as port:
        pass
    command = [sys.executable, script, "0", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waits:
        assert waits.stdout.readline().startswith("host 0: waiting for 1 more hosts")
        waits.terminate()
        out, error = waits.communicate(timeout=50)
    assert waits.returncode == 0 and out == "" and error.count("\n") == 1 and "SIGTERM" in error, error


@pytest.mark.parametrize(
    ("host", "status", "says"), [(0, 2, "cannot listen on port"), (1, TRY_AGAIN, "not within 1 s")]
)
def test_hosts_end_with_one_line_if_another_program_has_the_port(
    tmp_path: Path, host: int, status: int, says: str
) -> None:
    (script := tmp_path / "joins.py").write_text(JOINS)
    with listener() as port:
        ended = processes.run(script, host, port, timeout=60)
    assert ended.returncode == status and ended.stdout == "", ended
    assert ended.stderr.startswith(f"error: --coordinator 127.0.0.1:{port}: ") and says in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_host_that_stays_behind_is_named_once() -> None:
    watch, late = Watch(), float(LATE_SECONDS)
    assert watch.late({0: 5, 1: 5, 2: 5}, 0.0) == []
    assert watch.late({0: 5, 1: 5, 2: 5}, 10 * late) == []  # all are busy, and nobody waits
    begun = 10 * late + 1
    assert watch.late({0: 6, 1: 5, 2: 6}, begun) == []
    assert watch.late({0: 6, 1: 5, 2: 6}, begun + late - 1) == []
    assert watch.late({0: 9, 1: 5, 2: 9}, begun + late) == [1]
    assert watch.late({0: 9, 1: 5, 2: 9}, begun + 2 * late) == []
    assert watch.late({0: 9, 1: 6, 2: 9}, begun + 2 * late) == []  # it advances, slowly
    assert watch.late({0: 9, 1: 9, 2: 9}, begun + 4 * late) == []
    assert watch.late({0: 9, 1: 10, 2: 9}, begun + 5 * late) == []
    assert watch.late({0: 9, 1: 10, 2: 9}, begun + 6 * late) == [0, 2]
    assert watch.late({0: -1, 1: 11}, begun + 7 * late) == []  # host 0 does not answer
    assert watch.late({0: -1, 1: 11}, begun + 8 * late) == [0]
    assert watch.late({0: 12, 1: 12}, begun + 9 * late) == []
    assert watch.late({0: -1, 1: 12}, begun + 10 * late) == []
    assert watch.late({0: -1, 1: 12}, begun + 11 * late) == [0]


FAILS = """
import os, sys, time
from retina_jax.config import ConfigError
from retina_jax.distributed import Hosts, exchange, joined
host, port = int(sys.argv[1]), sys.argv[2]
with joined(Hosts(coordinator="127.0.0.1:" + port, hosts=2, host=host)):
    exchange("both are here")
    if host == {failing}:
        {what}
    while True:
        time.sleep(0.1)
        {collective} and exchange("still here")
"""


@pytest.mark.parametrize(
    ("failing", "what", "own", "status", "collective"),
    [
        (0, "raise ConfigError('data.x: wrong')", "error: data.x: wrong", 2, True),
        (1, "raise KeyError('no\\n key')", "Traceback", 1, True),
        (1, "raise KeyboardInterrupt", "interrupted", 130, True),
        (1, "os._exit(9)", "", 9, True),
        (0, "os._exit(9)", "", 9, False),
        pytest.param(1, "os._exit(9)", "", 9, False, marks=pytest.mark.slow),  # JAX's heartbeat: 30 seconds
    ],
)
def test_a_host_ends_if_the_other_ends(
    tmp_path: Path, failing: int, what: str, own: str, status: int, collective: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script, logs = tmp_path / "fails.py", [tmp_path / "0.log", tmp_path / "1.log"]
    script.write_text(FAILS.format(failing=failing, what=what, collective=collective))
    with logs[0].open("w") as first, logs[1].open("w") as second:
        pair = [processes.start(script, host, port, stdout=log) for host, log in enumerate((first, second))]
    try:
        for process in pair:
            process.wait(150)
    finally:
        for process in pair:
            process.kill()
    output = [log.read_text() for log in logs]
    assert pair[failing].returncode == status and own in output[failing], output
    # In a collective the network library may report it first, otherwise JAX aborts.
    assert pair[1 - failing].returncode in (TRY_AGAIN, -signal.SIGABRT), output
    assert (
        "error: the connection to another host failed" in output[1 - failing] or "task died" in output[1 - failing]
    ), output
    assert "Traceback" not in output[1 - failing]


WAITS = """
import sys, time
from retina_jax.distributed import Hosts, Interruption, exchange, joined
host, port = int(sys.argv[1]), sys.argv[2]
with joined(Hosts(coordinator="127.0.0.1:" + port, hosts=2, host=host)), Interruption() as interruption:
    for step in (1, 2):
        interruption.check(step)
        if host == {waiting} and step == 2:
            time.sleep(40)
        exchange("still here")
"""


@pytest.mark.slow
@pytest.mark.parametrize("waiting", [0, 1])
def test_a_host_that_waits_for_a_file_is_named_by_the_other(tmp_path: Path, waiting: int) -> None:
    """It sleeps instead, longer than JAX's heartbeat may be absent; the thread that sends it is not affected."""
    with listener() as port:
        pass
    script, logs = tmp_path / "waits.py", [tmp_path / "0.log", tmp_path / "1.log"]
    script.write_text(WAITS.format(waiting=waiting))
    with logs[0].open("w") as first, logs[1].open("w") as second:
        pair = [processes.start(script, host, port, stdout=log) for host, log in enumerate((first, second))]
    assert [process.wait(240) for process in pair] == [0, 0]
    line = f"warning: no progress of host {waiting} for {LATE_SECONDS} s, last seen at step 2; others wait for it"
    assert logs[1 - waiting].read_text().count(line) == 1
    assert "warning" not in logs[waiting].read_text()
