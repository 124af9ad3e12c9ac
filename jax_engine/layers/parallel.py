"""Sums and gathers over the devices that hold one model between them.

Called by the layers that multiply with weights. A step on several devices runs under `jax.shard_map`, so a layer sees
its own device's part of each weight. Whether a weight is split is read off its shape: who meets less than was declared
has a part. On one device nothing is split, and nothing here adds an operation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from checkpoints.quantized_weight import QuantizedWeight
from jax_engine.sharding import TENSOR
from pallas_kernels.all_reduce import Peers, all_reduce, all_reduce_add_norm, takes_rows

#: What the sums of the function being traced take; as the mesh axis, layers do not hand it on.
_peers: ContextVar[Peers | None] = ContextVar("peers", default=None)


@contextmanager
def sums_take(peers: Peers | None) -> Iterator[None]:
    """Sums over the devices that are traced inside, which are so made one after the other, take these peers.

    For a whole function that jax traces by itself: what is traced inside another, as by a loop, is not seen outside.
    """
    token = _peers.set(peers)
    try:
        yield
    finally:
        _peers.reset(token)


class Part(NamedTuple):
    """What this device has of a sum over the devices: [T, D]."""

    array: Array


def leaves_parts(x: Float[Array, "T D"]) -> bool:
    """Whether what is added to x, and then normed, is best left as a Part: one kernel does all three."""
    return _peers.get() is not None and takes_rows(x, TENSOR, _peers.get())


def sum_add_norm(
    x: Float[Array, "T D"], part: Part, weight: Float[Array, " D"], *, eps: float, platform: str
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """(x + the sum, its root-mean-square norm times weight), both of x's dtype."""
    given = (x, part.array, weight, TENSOR, _peers.get())
    total, norm, peers = all_reduce_add_norm(*given, eps=eps, platform=platform)
    _peers.set(peers)
    return total, norm


def _sum(part: Array) -> Array:
    whole, peers = all_reduce(part, TENSOR, _peers.get())
    _peers.set(peers)
    return whole


def is_split(weight: nnx.Param) -> bool:
    """Whether this device holds a part of the weight only."""
    return tuple(weight.shape) != weight.get_metadata()["sizes"]


def gives_parts(weight: nnx.Param) -> bool:
    """Whether each device adds up a part of the inputs only in a product with the weight.

    That is so where a split weight leads back to the residual stream: its axis `embed`, which is never split, comes
    before the one that is, for outputs come before inputs. Other split weights give each device outputs of its own.
    """
    axes, sizes = (weight.get_metadata()[key] for key in ("axes", "sizes"))
    split = [part != size for part, size in zip(weight.shape, sizes, strict=True)]
    return "embed" in axes and any(split[axes.index("embed") :])


def complete(product: Float[Array, "T F"], weight: nnx.Param) -> Float[Array, "T F"]:
    """A product with a weight, summed over the devices where each has a part."""
    return _sum(product) if gives_parts(weight) else product


def total(part: Float[Array, "*T"], weight: nnx.Param) -> Float[Array, "*T"]:
    """A sum over what belongs to a weight's elements, over all devices where the weight is split."""
    return _sum(part) if is_split(weight) else part


def shard_index() -> Array:
    """This device's number among those that hold the model."""
    return jax.lax.axis_index(TENSOR)


def take_rows(table: nnx.Param, ids: Int[Array, " T"]) -> Float[Array, "T D"]:
    """Rows of a table whose first axis may be split; float32 of a quantised one."""
    if not is_split(table):
        return _rows(table.get_value(), ids)
    local = ids - shard_index() * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    return _sum(jnp.where(mine[:, None], _rows(table.get_value(), jnp.where(mine, local, 0)), 0))


def _rows(table: Any, ids: Array) -> Array:
    if not isinstance(table, QuantizedWeight):
        return table[ids]
    return table.values[ids].astype(jnp.float32) * table.scale[ids, None]


def gather_columns(part: Float[Array, "B _"], weight: nnx.Param) -> Float[Array, "B V"]:
    """The outputs of all devices side by side, where the weight that made them is split over its outputs."""
    return jax.lax.all_gather(part, TENSOR, axis=1, tiled=True) if is_split(weight) else part
