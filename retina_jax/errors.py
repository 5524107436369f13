"""The errors that a person can mend."""


class PlainError(Exception):
    """Ends a script with its message, one line that names what is wrong and what would be right, and no traceback."""
