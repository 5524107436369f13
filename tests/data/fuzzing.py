"""What the fuzz tests share: how many cases each runs, and what counts as a named error.

`.venv/bin/pytest -m slow -s -k refused_by_name` runs the full shares and prints how the cases ended; the plain suite runs
the short ones.
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
    """Runs `case`, which says how it ended, on as many drawn values as `CASES` asks for; counts and prints the endings."""
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
    """The error is one line that a terminal can show, and has all of `names` in it."""
    line = str(error)
    assert line and line.splitlines() == [line] and len(line) < 5000, line
    assert all(name in line for name in names), (line, names)
    line.encode()


def test_the_full_shares_are_ten_thousand_cases() -> None:
    assert sum(full for _, full in CASES.values()) >= 10_000
