"""HTML pages of runs, data checks and sweeps, made of `templates/`: one file each, values escaped, no other requests."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from retina_jax.evaluation.coco_scores import score_text

TEMPLATES = Environment(
    loader=PackageLoader("retina_jax.reports"),
    autoescape=lambda name: not name.endswith(".md"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters["score"] = score_text
TEMPLATES.filters["percent"] = "{:.1%}".format


def render(template: str, **values: Any) -> Markup:
    """Returns the text of a template. Values are escaped except in Markdown templates and if they are Markup already."""
    return Markup(TEMPLATES.get_template(template).render(values))


def jpeg(pixels: UInt8[np.ndarray, "H W 3"], quality: int = 80) -> dict[str, Any]:
    """Returns the size of an image and its data URL, by which a page embeds it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"src": f"data:image/jpeg;base64,{data}", "height": pixels.shape[0], "width": pixels.shape[1]}
