"""What every reader and converter of weights ends in when it cannot go on."""


class WeightsError(ValueError):
    """Weights that cannot be used; the message is one line that names the file, what is wrong and what would be right."""
