"""Sums and gathers over the devices that hold one model between them.

Called by the layers that multiply with weights. A step on several devices runs under `jax.shard_map`, so a layer sees
its own device's part of each weight. Whether a weight is split is read off its shape: who meets less than was declared
has a part. On one device nothing is split, and nothing here adds an operation.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from checkpoints.quantized_weight import QuantizedWeight
from jax_engine.sharding import TENSOR


def is_split(weight: nnx.Param) -> bool:
    """Whether this device holds a part of the weight only."""
    return tuple(weight.shape) != weight.get_metadata()["sizes"]


def complete(product: Float[Array, "T F"], weight: nnx.Param) -> Float[Array, "T F"]:
    """A product with a weight, summed over the devices where each has added up a part of the inputs only.

    That is so where a split weight leads back to the residual stream: its axis `embed`, which is never split, comes
    before the one that is, for outputs come before inputs. Other split weights give each device outputs of its own.
    """
    axes, sizes = (weight.get_metadata()[key] for key in ("axes", "sizes"))
    split = [part != size for part, size in zip(weight.shape, sizes, strict=True)]
    if "embed" in axes and any(split[axes.index("embed") :]):
        return jax.lax.psum(product, TENSOR)
    return product


def total(part: Float[Array, "*T"], weight: nnx.Param) -> Float[Array, "*T"]:
    """A sum over what belongs to a weight's elements, over all devices where the weight is split."""
    return jax.lax.psum(part, TENSOR) if is_split(weight) else part


def shard_index() -> Array:
    """This device's number among those that hold the model."""
    return jax.lax.axis_index(TENSOR)


def take_rows(table: nnx.Param, ids: Int[Array, " T"]) -> Float[Array, "T D"]:
    """Rows of a table whose first axis may be split; float32 of a quantised one."""
    if not is_split(table):
        return _rows(table.get_value(), ids)
    local = ids - shard_index() * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    return jax.lax.psum(jnp.where(mine[:, None], _rows(table.get_value(), jnp.where(mine, local, 0)), 0), TENSOR)


def _rows(table: Any, ids: Array) -> Array:
    if not isinstance(table, QuantizedWeight):
        return table[ids]
    return table.values[ids].astype(jnp.float32) * table.scale[ids, None]


def gather_columns(part: Float[Array, "B _"], weight: nnx.Param) -> Float[Array, "B V"]:
    """The outputs of all devices side by side, where the weight that made them is split over its outputs."""
    return jax.lax.all_gather(part, TENSOR, axis=1, tiled=True) if is_split(weight) else part
