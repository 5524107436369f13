"""What Section 5.1 tells in its text: the prior, the hinge loss, focal loss with alpha .5; 4 runs.

    python scripts/sweep.py --sweep configs/sweeps/section5_1.py --workdir DIR

Paper (minival): cross entropy without the prior diverges, with it 30.2 AP; the hinge loss on p_t was unstable, without a
meaningful result; focal loss with alpha .5 is .4 AP below alpha .25.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import focal


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Without a prior every anchor starts as foreground with a probability of one half."""
    return {
        "no_prior": {"loss.kind": "cross_entropy", "model.prior": 0.5},
        "prior_0.01": {"loss.kind": "cross_entropy", "model.prior": 0.01},
        "hinge": {"loss.kind": "hinge", "loss.alpha": 0.5},
        "focal_alpha_0.50": focal(2.0, 0.5),
    }
