"""Normalisation layers."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_engine.layers.linear import small
from jax_engine.layers.parallel import Part, sum_add_norm, total
from jax_engine.layers.param import declare
from pallas_kernels.add_norm import add_norm


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

    def after_sum(
        self, x: Float[Array, "T D"], added: Part | Float[Array, "T D"], platform: str
    ) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
        """(x + added, its norm), in one kernel where there is one for the platform.

        Args:
            added: a Part is summed over the devices first; of layers whose norms have no unit offset.
        """
        if isinstance(added, Part):
            return sum_add_norm(x, added, self.weight[...], eps=self.eps, platform=platform)
        if self.unit_offset:
            total = x + added
            return total, self(total)
        return add_norm(x, added, self.weight[...], eps=self.eps, platform=platform)


class HeadsNorm(nnx.Module):
    """Root-mean-square norm over all heads of a token together, which may lie on several devices.

    Args:
        shape, axes: of the weight, an element for each of the heads' dimensions; the last is a head's.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[str], eps: float, dtype: jnp.dtype):
        self.weight = declare(shape, dtype, axes, init="ones")
        self.count = math.prod(shape)
        self.eps = eps

    def __call__(self, x: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
        y = x.astype(jnp.float32)
        squares = total(jnp.sum(y * y, axis=(1, 2), keepdims=True), self.weight)
        y = y * jax.lax.rsqrt(squares / self.count + self.eps)
        return small(self.weight).reshape(x.shape[1:]) * y.astype(x.dtype)


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
