"""Boxes: overlap, the R-CNN parameterisation, clipping and scaling.

A box is (x1, y1, x2, y2) in pixels, continuous and half-open: its width is x2 - x1, and the image of width W spans
0 to W. Nothing here adds the "+1" of Detectron's inclusive pixels. Every function is elementwise over leading
dimensions, except `iou_matrix`, and computes in the dtype it is given (callers give float32).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

MAX_LOG_SCALE = math.log(1000 / 16)
"""Most that `decode` lets a side grow, as a logarithm: 62.5 times the anchor's. Detectron's BBOX_XFORM_CLIP."""


def iou_matrix(
    a_xyxy: Float[Array | np.ndarray, "N 4"], b_xyxy: Float[Array | np.ndarray, "M 4"]
) -> Float[Array, "N M"]:
    """Intersection over union of every a with every b, in [0, 1].

    Boxes that only touch have IoU 0. Where the union is 0 (two boxes without area) the IoU is 0, not NaN.
    A box whose x2 < x1 or y2 < y1 has no area. Every operation is rounded to the dtype, as in numpy and detectron2, in
    every program alike: which anchors tie for the largest IoU depends on the last bit.
    """
    ax1, ay1, ax2, ay2 = (side[:, None] for side in jnp.asarray(a_xyxy).T)
    bx1, by1, bx2, by2 = (side[None, :] for side in jnp.asarray(b_xyxy).T)
    intersection = _area(jnp.maximum(ax1, bx1), jnp.maximum(ay1, by1), jnp.minimum(ax2, bx2), jnp.minimum(ay2, by2))
    areas = intersection, _area(ax1, ay1, ax2, ay2), _area(bx1, by1, bx2, by2)
    intersection, area_a, area_b = map(rounded, areas)
    return _ratio(intersection, area_a + area_b - intersection)


def giou(a_xyxy: Float[Array | np.ndarray, "*N 4"], b_xyxy: Float[Array | np.ndarray, "*N 4"]) -> Float[Array, "*N"]:
    """Generalised IoU of each a with its b, in [-1, 1]: IoU - (hull - union) / hull (Rezatofighi et al. 2019).

    The hull is the smallest box around both. Value and gradient are finite on boxes without area: a ratio over an
    area of 0 counts as 0, so two equal points have GIoU 0.
    """
    ax1, ay1, ax2, ay2 = jnp.moveaxis(jnp.asarray(a_xyxy), -1, 0)
    bx1, by1, bx2, by2 = jnp.moveaxis(jnp.asarray(b_xyxy), -1, 0)
    intersection = _area(jnp.maximum(ax1, bx1), jnp.maximum(ay1, by1), jnp.minimum(ax2, bx2), jnp.minimum(ay2, by2))
    union = _area(ax1, ay1, ax2, ay2) + _area(bx1, by1, bx2, by2) - intersection
    hull = _area(jnp.minimum(ax1, bx1), jnp.minimum(ay1, by1), jnp.maximum(ax2, bx2), jnp.maximum(ay2, by2))
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def encode(
    boxes_xyxy: Float[Array | np.ndarray, "*N 4"], anchors_xyxy: Float[Array | np.ndarray, "*N 4"]
) -> Float[Array, "*N 4"]:
    """Box deltas (dx, dy, dw, dh) from each anchor to its box (R-CNN, Girshick et al. 2014, appendix C; weights 1).

    dx = (box centre - anchor centre) / anchor width, dw = log(box width / anchor width); dy, dh alike.
    Anchors must have positive sides. A box side of 0 or less (padding) is read as the anchor's, so its logarithm is 0:
    value and gradient are finite and the caller masks them.
    """
    centre_x, centre_y, width, height = _centre_and_size(boxes_xyxy)
    anchor_x, anchor_y, anchor_width, anchor_height = _centre_and_size(anchors_xyxy)
    # Guarded before the logarithm, not after it: `where` differentiates both of its branches.
    width = jnp.where(width > 0, width, anchor_width)
    height = jnp.where(height > 0, height, anchor_height)
    return jnp.stack(
        [
            (centre_x - anchor_x) / anchor_width,
            (centre_y - anchor_y) / anchor_height,
            jnp.log(width / anchor_width),
            jnp.log(height / anchor_height),
        ],
        axis=-1,
    )


def decode(
    deltas: Float[Array | np.ndarray, "*N 4"], anchors_xyxy: Float[Array | np.ndarray, "*N 4"]
) -> Float[Array, "*N 4"]:
    """Boxes from box deltas; the inverse of `encode` while dw, dh <= log(1000 / 16).

    Larger dw and dh are read as log(1000 / 16) with gradient 0 (Detectron), so that an untrained network cannot
    overflow the exponential. There is no bound below: a side may come arbitrarily close to 0.
    """
    dx, dy, dw, dh = jnp.moveaxis(jnp.asarray(deltas), -1, 0)
    anchor_x, anchor_y, anchor_width, anchor_height = _centre_and_size(anchors_xyxy)
    centre_x, centre_y = anchor_x + dx * anchor_width, anchor_y + dy * anchor_height
    half_width = 0.5 * anchor_width * jnp.exp(jnp.minimum(dw, MAX_LOG_SCALE))
    half_height = 0.5 * anchor_height * jnp.exp(jnp.minimum(dh, MAX_LOG_SCALE))
    return jnp.stack(
        [centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height], axis=-1
    )


def clip(boxes_xyxy: Float[Array | np.ndarray, "*N 4"], size_hw: Num[Array | np.ndarray, "2"]) -> Float[Array, "*N 4"]:
    """Boxes cut to an image of size (height, width): x in [0, width], y in [0, height], both ends included.

    A box wholly outside becomes a box without area on the border.
    """
    boxes_xyxy = jnp.asarray(boxes_xyxy)
    height, width = jnp.asarray(size_hw).astype(boxes_xyxy.dtype)
    return jnp.clip(boxes_xyxy, 0.0, _along_last(jnp.stack([width, height, width, height]), boxes_xyxy.ndim))


def rescale(
    boxes_xyxy: Float[Array | np.ndarray, "*N 4"], scale_xy: Float[Array | np.ndarray, "2"]
) -> Float[Array, "*N 4"]:
    """Boxes with x multiplied by scale_xy[0] and y by scale_xy[1]: the actual scale of each axis, which differ because
    a resized image has whole pixels."""
    boxes_xyxy = jnp.asarray(boxes_xyxy)
    x, y = jnp.asarray(scale_xy).astype(boxes_xyxy.dtype)
    return boxes_xyxy * _along_last(jnp.stack([x, y, x, y]), boxes_xyxy.ndim)


def _area(x1: Array, y1: Array, x2: Array, y2: Array) -> Array:
    return jnp.maximum(x2 - x1, 0.0) * jnp.maximum(y2 - y1, 0.0)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, and 0 with gradient 0 where the denominator is 0."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), 0.0)


def _centre_and_size(boxes_xyxy: Array | np.ndarray) -> tuple[Array, Array, Array, Array]:
    x1, y1, x2, y2 = jnp.moveaxis(jnp.asarray(boxes_xyxy), -1, 0)
    return 0.5 * (x1 + x2), 0.5 * (y1 + y2), x2 - x1, y2 - y1


def _along_last(four: Array, ndim: int) -> Array:
    return four.reshape((1,) * (ndim - 1) + (4,))


# Float operations that round alike in every program.
#
# A compiler may contract a product and the sum that takes it into one fused multiply-add, which rounds once instead of
# twice, or rewrite a quotient of quotients. Whether it does depends on what else is in the program, so the last bit does too:
# alone, `match` then gave other labels than inside the loss program.


def rounded(numbers: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`numbers`, rounded to their dtype before anything else is computed from them. Infinity becomes the largest number.

    A bound that no finite number exceeds separates the two operations: a compiler cannot prove that it does nothing,
    because a product can overflow. XLA removes `lax.reduce_precision` to the same precision (tried on the CPU).
    """
    return jnp.minimum(numbers, jnp.finfo(numbers.dtype).max)
