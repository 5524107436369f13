"""What the options of several hosts refuse, and what one host says to the others; tests/test_several_hosts.py runs them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retina_jax import distributed as hosts
from retina_jax.config import ConfigError
from retina_jax.distributed import ALONE, Hosts, check_same, exchange, gather, joined

ROOT = Path(__file__).parents[1]


def test_one_host_is_first_and_hears_itself() -> None:
    with joined(ALONE):
        assert hosts.is_primary() and not hosts.is_multihost() and hosts.share() == {"host": 0, "hosts": 1}
        assert exchange("é\n") == ["é\n"]
        np.testing.assert_array_equal(gather(np.arange(3)), np.arange(3))
        check_same("run", {"a": 1})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Hosts(distributed=True, hosts=2), "--distributed: finds the hosts itself; leave out --coordinator"),
        (Hosts(hosts=2, host=0), r"--coordinator \(missing\): it must be ADDRESS:PORT of host 0"),
        (Hosts(coordinator="here", hosts=2, host=0), "--coordinator here: it must be ADDRESS:PORT"),
        (Hosts(coordinator=":80", hosts=2, host=0), "--coordinator :80: it must be ADDRESS:PORT"),
        (Hosts(coordinator="a:80", host=0), "--hosts 0: it must be the number of hosts"),
        (Hosts(coordinator="a:80", hosts=2), r"--host -1: it must be the number of this host, 0 to 1"),
        (Hosts(coordinator="a:80", hosts=2, host=2), r"--host 2: it must be the number of this host, 0 to 1"),
    ],
)
def test_options_that_cannot_be_meant_are_named(options: Hosts, says: str) -> None:
    with pytest.raises(ConfigError, match=says), joined(options):
        pass


# Facts that differ between hosts, in the place of what two processes would exchange.
def test_the_first_fact_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "exchange", lambda text: [text, '{"data": "abc", "seed": 4}', text])
    with pytest.raises(
        ConfigError, match=r"run: seed is 3 on host 0 and 4 on host 1; it must be the same on all hosts"
    ):
        check_same("run", {"data": "abc", "seed": 3})


FAILS = """
import sys
sys.path.insert(0, {root!r})
from retina_jax.config import ConfigError
from retina_jax.distributed import Hosts, joined
host, port = int(sys.argv[1]), sys.argv[2]
with joined(Hosts(coordinator="127.0.0.1:" + port, hosts=2, host=host)):
    if host == {failing}:
        {what}
    import time
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("failing", "what", "own", "heard", "status"),
    [
        (
            0,
            "raise ConfigError('data.x: wrong')",
            "error: data.x: wrong",
            "host 0 of 2 ended: error: data.x: wrong;",
            2,
        ),
        (1, "raise KeyError('no\\n key')", "Traceback", "host 1 of 2 ended: KeyError:", 1),
        (1, "import os; os._exit(9)", "", "host 1 of 2 is gone", 9),
        (0, "import os; os._exit(9)", "", "host 0 of 2 is gone", 9),
    ],
)
def test_an_error_on_one_host_ends_the_other(failing: int, what: str, own: str, heard: str, status: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = FAILS.format(root=str(ROOT), failing=failing, what=what)
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "HOME": str(ROOT)}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(host), str(port)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for host in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=150)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert pair[failing].returncode == status and own in said[failing], said
    assert "Traceback" not in said[1 - failing]
    if pair[failing].returncode == 9:  # killed, and its witness says so
        assert f"host {failing} of 2 ended without a word" in said[failing]
    # JAX's runtime lives in host 0. Where that is killed, it may end the others before they speak, or as they have spoken.
    if failing == 0 and not own and pair[1].returncode == -signal.SIGABRT:
        assert "host 1 of 2 ended without a word" in said[1] or heard in said[1], said
    else:
        assert pair[1 - failing].returncode == hosts.LOST and heard in said[1 - failing], said
        assert "without a word" not in said[1 - failing]
