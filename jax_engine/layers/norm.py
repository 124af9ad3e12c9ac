"""Normalisation layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_engine.layers.param import declare


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis (arXiv 1910.07467), computed in float32.

    Args:
        unit_offset: the factor is one plus the weight.
    """

    def __init__(self, size: int, eps: float, dtype: jnp.dtype, *, unit_offset: bool = False):
        self.weight = declare((size,), dtype, ("embed",), init="zeros" if unit_offset else "ones")
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.unit_offset:
            return (y * (1 + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return self.weight[...] * y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with weight and bias over the last axis (arXiv 1607.06450), computed in float32."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.weight = declare((size,), dtype, ("embed",), init="ones")
        self.bias = declare((size,), dtype, ("embed",), init="zeros")
        self.eps = eps

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...] + self.bias[...]).astype(x.dtype)
