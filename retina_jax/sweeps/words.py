"""Options that take several words, read and left out before the command line is parsed as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def words_of(argv: Sequence[str], option: str) -> list[str]:
    """The values given to `option`: words_of(["--a", "1", "2", "--b"], "--a") is ["1", "2"]."""
    return [word for name, word in _named(argv) if name == option and word]


def without(argv: Sequence[str], options: Sequence[str]) -> list[str]:
    """The command line without these options and their values."""
    kept: list[str] = []
    taking = True
    for word in argv:
        if word.startswith("--"):
            taking = word.partition("=")[0] not in options
        if taking:
            kept.append(word)
    return kept


def _named(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each value with the option it is given to."""
    option = ""
    for word in argv:
        if word.startswith("--"):
            option, _, word = word.partition("=")
        yield option, word
