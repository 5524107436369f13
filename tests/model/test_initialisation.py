"""Random weights give activations of a reasonable size at any depth of the backbone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retina_jax.config import ModelConfig
from retina_jax.model.initialisation import initialise
from retina_jax.model.resnet import ResNet
from retina_jax.model.retinanet import RetinaNet, normalise


@pytest.mark.parametrize(
    ("backbone", "norm"),
    [
        ("resnet18", "frozen"),
        ("resnet101", "group"),
        pytest.param("resnet18", "group", marks=pytest.mark.slow),
        pytest.param("resnet101", "frozen", marks=pytest.mark.slow),
    ],
)
def test_activations_neither_explode_nor_vanish(backbone: str, norm: str) -> None:
    config = ModelConfig(backbone=backbone, base_width=16, norm=norm, norm_groups=4, min_level=2)
    maps_of = jax.jit(lambda v, x: ResNet(config).apply(v, x, False))
    # Like a photograph: bright and dark regions around the mean colour, with noise.
    rng = np.random.default_rng(0)
    regions = np.repeat(np.repeat(rng.normal(110, 55, (1, 8, 8, 3)), 16, axis=1), 16, axis=2)
    images = (regions + rng.normal(0, 15, regions.shape)).clip(0, 255).astype(np.uint8)
    for kind in ("detectron", "imagenet"):
        variables = initialise(RetinaNet(replace(config, input_normalisation=kind), 3, 9), seed=0)
        x = normalise(jnp.asarray(images), jnp.array([[128, 128]], jnp.int32), kind)
        backbone_only = {collection: tree["backbone"] for collection, tree in variables.items() if "backbone" in tree}
        for level, c in enumerate(maps_of(backbone_only, x), start=2):
            assert 0.02 < float(jnp.sqrt(jnp.mean(jnp.square(c)))) < 20, f"{kind}: C{level}"
