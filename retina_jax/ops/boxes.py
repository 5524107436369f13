"""Boxes: overlap, the R-CNN parameterisation and clipping.

A box is (x1, y1, x2, y2) in pixels, half-open: its width is x2 - x1, without the "+1" of Detectron. Functions are
elementwise over leading dimensions (except `iou_matrix`) and compute in the dtype of their arguments, usually float32.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

Boxes = Float[Array | np.ndarray, "*N 4"]
Sides = tuple[Array, Array, Array, Array]

MAX_LOG_SCALE = math.log(1000 / 16)
"""Largest dw and dh that `decode` applies: a side of 62.5 times the anchor's. Detectron's BBOX_XFORM_CLIP."""


def iou_matrix(
    a_xyxy: Float[Array | np.ndarray, "N 4"], b_xyxy: Float[Array | np.ndarray, "M 4"]
) -> Float[Array, "N M"]:
    """Returns the intersection over union of every a with every b, in [0, 1].

    Boxes that only touch have IoU 0, and so do two boxes without area (x2 <= x1 or y2 <= y1). Every operation is rounded to
    the dtype, as in numpy and detectron2: which anchors tie for the largest IoU depends on the last bit.
    """
    a, b = jnp.asarray(a_xyxy).T, jnp.asarray(b_xyxy).T
    return iou(tuple(a[:, :, None]), tuple(b[:, None]))


def iou(a: Sides, b: Sides) -> Float[Array, "*N"]:
    """Returns the intersection over union of boxes given as (x1, y1, x2, y2), four arrays each; see `iou_matrix`. Arrays
    of one side fill the lanes of a vector unit; rows of four numbers do not."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    intersection = _area(jnp.maximum(ax1, bx1), jnp.maximum(ay1, by1), jnp.minimum(ax2, bx2), jnp.minimum(ay2, by2))
    areas = intersection, _area(ax1, ay1, ax2, ay2), _area(bx1, by1, bx2, by2)
    intersection, area_a, area_b = map(rounded, areas)
    return _ratio(intersection, area_a + area_b - intersection)


def giou(a_xyxy: Boxes, b_xyxy: Boxes) -> Float[Array, "*N"]:
    """Returns the generalised IoU of each a with its b, in [-1, 1]: IoU - (hull - union) / hull (Rezatofighi et al. 2019).

    The hull is the smallest box around both. Value and gradient are finite for boxes without area: a ratio over an area of
    0 counts as 0, so two equal points have GIoU 0.
    """
    ax1, ay1, ax2, ay2 = jnp.moveaxis(jnp.asarray(a_xyxy), -1, 0)
    bx1, by1, bx2, by2 = jnp.moveaxis(jnp.asarray(b_xyxy), -1, 0)
    intersection = _area(jnp.maximum(ax1, bx1), jnp.maximum(ay1, by1), jnp.minimum(ax2, bx2), jnp.minimum(ay2, by2))
    union = _area(ax1, ay1, ax2, ay2) + _area(bx1, by1, bx2, by2) - intersection
    hull = _area(jnp.minimum(ax1, bx1), jnp.minimum(ay1, by1), jnp.maximum(ax2, bx2), jnp.maximum(ay2, by2))
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def encode(boxes_xyxy: Boxes, anchors_xyxy: Boxes) -> Float[Array, "*N 4"]:
    """Returns box deltas (dx, dy, dw, dh) from anchors to boxes (R-CNN, Girshick et al. 2014, appendix C; weights 1).

    dx = (box centre - anchor centre) / anchor width, dw = log(box width / anchor width); dy, dh alike. Anchors must have
    positive sides. A box side <= 0 (padding) counts as the anchor's side: the result is finite, and the caller masks it.
    """
    centre_x, centre_y, width, height = _centre_and_size(boxes_xyxy)
    anchor_x, anchor_y, anchor_width, anchor_height = _centre_and_size(anchors_xyxy)
    # Guarded before the logarithm, because `where` differentiates both of its branches.
    width = jnp.where(width > 0, width, anchor_width)
    height = jnp.where(height > 0, height, anchor_height)
    dx, dy = (centre_x - anchor_x) / anchor_width, (centre_y - anchor_y) / anchor_height
    return jnp.stack([dx, dy, jnp.log(width / anchor_width), jnp.log(height / anchor_height)], axis=-1)


def decode(deltas: Boxes, anchors_xyxy: Boxes) -> Float[Array, "*N 4"]:
    """Returns boxes from box deltas; the inverse of `encode` while dw, dh <= log(1000 / 16).

    Larger dw and dh count as log(1000 / 16), with gradient 0 (Detectron), so an untrained network cannot overflow the
    exponential. There is no lower bound: a side can be arbitrarily close to 0.
    """
    dx, dy, dw, dh = jnp.moveaxis(jnp.asarray(deltas), -1, 0)
    anchor_x, anchor_y, anchor_width, anchor_height = _centre_and_size(anchors_xyxy)
    x, y = anchor_x + dx * anchor_width, anchor_y + dy * anchor_height
    half_width = 0.5 * anchor_width * jnp.exp(jnp.minimum(dw, MAX_LOG_SCALE))
    half_height = 0.5 * anchor_height * jnp.exp(jnp.minimum(dh, MAX_LOG_SCALE))
    return jnp.stack([x - half_width, y - half_height, x + half_width, y + half_height], axis=-1)


def clip(boxes_xyxy: Boxes, size_hw: Num[Array | np.ndarray, "2"]) -> Float[Array, "*N 4"]:
    """Clips boxes to an image of (height, width); one completely outside becomes a box without area on the border."""
    boxes_xyxy = jnp.asarray(boxes_xyxy)
    height, width = jnp.asarray(size_hw).astype(boxes_xyxy.dtype)
    limits = jnp.stack([width, height, width, height]).reshape((1,) * (boxes_xyxy.ndim - 1) + (4,))
    return jnp.clip(boxes_xyxy, 0.0, limits)


def _area(x1: Array, y1: Array, x2: Array, y2: Array) -> Array:
    return jnp.maximum(x2 - x1, 0.0) * jnp.maximum(y2 - y1, 0.0)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Returns numerator / denominator, and 0 with gradient 0 where the denominator is 0."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)


def _centre_and_size(boxes_xyxy: Array | np.ndarray) -> tuple[Array, Array, Array, Array]:
    x1, y1, x2, y2 = jnp.moveaxis(jnp.asarray(boxes_xyxy), -1, 0)
    return 0.5 * (x1 + x2), 0.5 * (y1 + y2), x2 - x1, y2 - y1


def rounded(numbers: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Rounds numbers to their dtype before anything else is computed from them. Infinity becomes the largest number.

    A compiler may contract a product and a sum into one fused multiply-add, which rounds once instead of twice, or rewrite
    a quotient of quotients. Whether it does depends on the rest of the program, and so does the last bit: `match` alone
    gave other labels than inside the loss program. A bound that no finite number exceeds separates the two operations,
    as the compiler cannot rule out an overflow. (XLA on the CPU removes `lax.reduce_precision` to the same precision.)
    """
    return jnp.minimum(numbers, jnp.finfo(numbers.dtype).max)
