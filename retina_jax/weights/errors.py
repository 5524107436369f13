"""What every reader and converter of weights ends in when it cannot go on."""

from retina_jax.errors import PlainError


class WeightsError(PlainError, ValueError):
    """Weights that cannot be used; the message is one line that names the file, what is wrong and what would be right."""
