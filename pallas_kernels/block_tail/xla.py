"""block_tail in plain operations: what a layer does without the kernel, to compare with."""

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm import add_norm


def block_tail(attended, residual, output, norm, gate_up, down, eps: float):
    """See api.block_tail."""
    total, normed = add_norm(residual, _dot(attended, output), norm, eps=eps, platform="cpu", implementation="xla")
    gate, up = jnp.split(_dot(normed, gate_up), 2, axis=-1)
    return total, _dot(jax.nn.silu(gate) * up, down)


def _dot(x, weight):
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))
