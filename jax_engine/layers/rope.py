"""Rotary position embedding (arXiv 2104.09864), with the halves of a head rotated against each other."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_engine.model_config import Rope


def rotation(positions: Int[Array, " T"], rope: Rope) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles, float32 [T, 1, R/2] each; made once per step, used by all layers."""
    angles = positions[:, None].astype(jnp.float32) * np.array(rope.frequencies, np.float32)
    return rope.amplitude * jnp.cos(angles)[:, None], rope.amplitude * jnp.sin(angles)[:, None]


def rotate(x: Float[Array, "T N H"], cos: Array, sin: Array) -> Float[Array, "T N H"]:
    """Turns the first R dimensions of each head by its position's angles, in float32; the others stay."""
    rotary_dim = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :rotary_dim].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if rotary_dim == x.shape[-1] else jnp.concatenate([turned, x[..., rotary_dim:]], axis=-1)
