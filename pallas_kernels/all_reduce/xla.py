"""all_reduce as XLA does it: on CPU and TPU, and for what the GPU kernel does not take."""

import jax


def all_reduce(x, axis: str):
    """See api.all_reduce."""
    return jax.lax.psum(x, axis)
