"""Table 1d: the focal loss against online hard example mining, ResNet-101, 10 runs.

    python scripts/sweep.py --sweep configs/sweeps/table1d.py --workdir DIR

Paper (minival): OHEM 31.1, 31.8, 30.6 (NMS 0.7), 32.8, 31.0, 27.6 (NMS 0.5); OHEM 1:3 31.1, 28.3, 24.0; focal loss 36.0 AP,
in the order of the points. The mined anchors are trained with cross entropy. The focal row is Table 1e's ResNet-101 at 600.
"""

from typing import Any

from retina_jax.config import Config
from retina_jax.paper.settings import deeper, focal

ROWS = (("ohem", 0.7), ("ohem", 0.5), ("ohem_1_3", 0.5))
BATCHES = (128, 256, 512)


def get_sweep(base: Config) -> dict[str, dict[str, Any]]:
    """Returns one run per kind of mining, NMS threshold and batch size, then the focal loss."""
    points = {
        f"{mining}_{batch}_nms_{iou}": {
            **deeper(base),
            "loss.kind": "cross_entropy",
            "loss.mining": mining,
            "loss.mining_batch": batch,
            "loss.mining_nms_iou": iou,
        }
        for mining, iou in ROWS
        for batch in BATCHES
    }
    return {**points, "focal": {**deeper(base), **focal(2.0, 0.25)}}
