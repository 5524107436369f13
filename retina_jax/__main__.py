"""The command `retina-jax`, also as `python -m retina_jax`; it ends with one line at a signal from its first import on."""

import sys

from retina_jax import interrupts

interrupts.catch()

# isort: split

from retina_jax.command import main  # noqa: E402  after the handlers

if __name__ == "__main__":
    sys.exit(main())
