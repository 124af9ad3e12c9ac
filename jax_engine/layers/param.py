"""How a layer declares a weight."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx


def declare(shape: Sequence[int], dtype: jnp.dtype, axes: Sequence[str | None], init: str = "normal") -> nnx.Param:
    """A weight of the given shape; its values come from the checkpoint.

    Models are only ever built under `nnx.eval_shape`, so nothing is allocated here.

    Args:
        axes: the logical axis of each dimension; see sharding.RULES.
        init: what dummy weights hold: `normal`, `ones` or `zeros`.
    """
    return nnx.Param(jnp.zeros(tuple(shape), dtype), axes=tuple(axes), sizes=tuple(shape), init=init)
