"""TensorFlow data sets with COCO's features, read by index: no shuffle buffer, no state.

Features: `image`, `objects` with `bbox` (ymin, xmin, ymax, xmax over the image's sides) and `label`; where present also
`image/id`, `image/filename`, and in `objects` `is_crowd` and `area`.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float64, Int64

from retina_jax.data.coco import read_coco_header, read_truth
from retina_jax.data.coco_classes import COCO_CATEGORIES
from retina_jax.data.decoding import open_image
from retina_jax.data.source import BadImage, DataError, Source, make_records
