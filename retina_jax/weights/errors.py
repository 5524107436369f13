"""What every reader and converter of weights ends in when it cannot go on."""

from retina_jax.errors import PlainError, printable

LONGEST_NAME = 120
"""Characters of a name in a message."""


class WeightsError(PlainError, ValueError):
    """Weights that cannot be used; the message is one line that names the file, what is wrong and what would be right."""


def shortened(name: object) -> str:
    """A name from a file, as a message shows it: without control characters, a long one without its middle."""
    text = str(name)
    if len(text) > LONGEST_NAME:
        half = LONGEST_NAME // 2 - 2
        text = f"{text[:half]}...{text[-half:]}"
    return printable(text)


def quoted(name: object) -> str:
    """`shortened`, in quotes."""
    return f"'{shortened(name)}'"
