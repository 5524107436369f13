"""Damaged files, and how a reader ends: it refuses them in one line, or reads what was written.

`.venv/bin/pytest -m slow -s -k attacked` makes all cases and prints a row for each kind; the default tests make fewer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from retina_jax.errors import LONGEST_LINE, ending
from retina_jax.export.loader import LoadError

both_shares = pytest.mark.parametrize("share", [0.05, pytest.param(1.0, marks=pytest.mark.slow)], ids=["short", "full"])


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Returns the content with one to three flipped bits, bytes lost, added or set to zero, or without its end."""
    data, at = bytearray(content), rng.randrange(len(content))
    how = rng.choice(("flip", "flip", "truncate", "remove", "insert", "zero"))
    if how == "flip":
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del data[at:]
    elif how == "remove":
        del data[at : at + rng.randint(1, 40)]
    elif how == "insert":
        data[at:at] = rng.randbytes(rng.randint(1, 40))
    else:
        data[at : at + rng.randint(1, 400)] = bytes(len(data[at : at + 400]))
    return bytes(data)


def attack(kind: str, number: int, case: Callable[[random.Random], str]) -> Counter[str]:
    """Runs `number` cases, which return how they ended, or raise what the reader raises; prints and returns the counts.
    An error that is not one printable line fails the test."""
    ended: Counter[str] = Counter()
    for seed in range(max(number, 1)):
        try:
            ended[case(random.Random(seed))] += 1
        except AssertionError as error:
            raise AssertionError(f"{kind}, seed {seed}: {error}") from error
        except Exception as error:
            line = str(error) if isinstance(error, LoadError) else ending(error)[0]
            if line is None or not line.isprintable() or len(line) > LONGEST_LINE + 200:
                raise AssertionError(f"{kind}, seed {seed}: {line!r}") from error
            ended["refused in one line"] += 1
    print(f"\n| {kind} | {ended.total()} | {', '.join(f'{n} {how}' for how, n in sorted(ended.items()))} |")
    return ended
