"""Table 1c: anchors per cell, scales by ratios, 7 runs.

    python scripts/sweep.py --sweep configs/sweeps/table1c.py --workdir DIR

Paper (minival): 30.3, 31.9, 31.8, 32.4, 34.2, 34.0 and 33.8 AP, in the order of the points. S scales are 2^(k/S) for k < S
("4 sub-octave scales 2^(k/4)", Section 5.2; the paper does not state those of S = 2). One ratio is 1:1, three are 1:2, 1:1,
2:1. The default is 3 by 3.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import focal

SCALES_BY_RATIOS = ((1, 1), (2, 1), (3, 1), (1, 3), (2, 3), (3, 3), (4, 3))
RATIOS = {1: (1.0,), 3: (0.5, 1.0, 2.0)}


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns one run per set of anchors."""
    return {
        f"scales_{scales}_ratios_{ratios}": {
            "anchors.scales": tuple(2.0 ** (k / scales) for k in range(scales)),
            "anchors.ratios": RATIOS[ratios],
            **focal(2.0, 0.25),
        }
        for scales, ratios in SCALES_BY_RATIOS
    }
