"""Rotary position embedding (arXiv 2104.09864), with the halves of a head rotated against each other."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_engine.config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position, float32 [head_dim / 2]; `scaling` stretches the long wavelengths as Llama 3.1 does."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share = np.clip(share, 0, 1)
        frequencies = frequencies * (share + (1 - share) / scaling.factor)
    return frequencies.astype(np.float32)


def rotation(positions: Int[Array, " T"], frequencies: np.ndarray) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles, float32 [T, 1, H/2] each; made once per step, used by all layers."""
    angles = positions[:, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]


def rotate(x: Float[Array, "T N H"], cos: Array, sin: Array) -> Float[Array, "T N H"]:
    """Turns each head by its position's angles, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
