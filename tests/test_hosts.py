"""Options of several hosts, and the reaction of the other hosts if one ends; tests/test_several_hosts.py trains on
them."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import processes
import pytest

from retina_jax import distributed as hosts
from retina_jax.config import ConfigError
from retina_jax.distributed import ALONE, Hosts, check_same, exchange, from_primary, joined
from retina_jax.errors import TRY_AGAIN


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
