"""Shared code of the fuzz tests: the number of cases of each test, and the form of an acceptable error.

`.venv/bin/pytest -m slow -s -k refused_by_name` runs all cases and prints how they ended; the default tests run fewer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CASES = {
    "COCO reader": (250, 4000),
    "decoder": (250, 6000),
    "configs as dicts": (150, 1500),
    "config files": (100, 1000),
    "command lines": (60, 500),
}
"""Cases of each fuzz test, in the plain suite and in the slow one."""
both_shares = pytest.mark.parametrize("share", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["short", "full"])


def run_cases(fuzzed: str, share: int, strategy: st.SearchStrategy, case: Callable[[Any], str]) -> Counter[str]:
    """Runs `case`, which returns how it ended, on as many drawn values as `CASES` has; counts and prints the
    endings."""
    ended: Counter[str] = Counter()
    target = CASES[fuzzed][share]

    @settings(
        max_examples=target,
        deadline=None,
        database=None,
        derandomize=not share,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def one(drawn: Any) -> None:
        ended[case(drawn)] += 1

    one()
    assert ended.total() >= target
    print(f"\n{fuzzed}: {ended.total()} cases: {', '.join(f'{n} {how}' for how, n in sorted(ended.items()))}")
    return ended


def assert_named(error: Exception, *names: str) -> None:
    """Asserts that the error is one printable line and contains all of `names`."""
    line = str(error)
    assert line and line.splitlines() == [line] and len(line) < 5000, line
    assert all(name in line for name in names), (line, names)
    line.encode()


def test_the_full_shares_are_ten_thousand_cases() -> None:
    assert sum(full for _, full in CASES.values()) >= 10_000
