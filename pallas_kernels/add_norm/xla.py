"""add_norm in plain operations: on CPU and TPU, and for shapes that the GPU kernel does not take."""

import jax
import jax.numpy as jnp


def add_norm(x, added, weight, eps: float):
    """See api.add_norm."""
    total = (x.astype(jnp.float32) + added.astype(jnp.float32)).astype(x.dtype)
    wide = total.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, weight * wide.astype(x.dtype)
