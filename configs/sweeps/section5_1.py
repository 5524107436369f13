"""Results in the text of Section 5.1: the prior, the hinge loss, focal loss with alpha 0.5; 4 runs.

    python scripts/sweep.py --sweep configs/sweeps/section5_1.py --workdir DIR

Paper (minival): cross entropy without the prior diverges, with it 30.2 AP; the hinge loss on p_t was unstable, without a
meaningful result; focal loss with alpha 0.5 is 0.4 AP below alpha 0.25. The cross entropy is Table 1a's alpha 0.50, which
also has 30.2 AP: positives and negatives have the same weight. On a base with the paper's prior, `prior_0.01` is that run.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import balanced_cross_entropy, focal


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns the four runs. Without the prior, the initial probability of each class is 0.5 at every anchor."""
    return {
        "no_prior": {**balanced_cross_entropy(0.5), "model.prior": 0.5},
        "prior_0.01": {**balanced_cross_entropy(0.5), "model.prior": 0.01},
        "hinge": {"loss.kind": "hinge", "loss.alpha": 0.5},
        "focal_alpha_0.50": focal(2.0, 0.5),
    }
