"""KVCache: the arrays behind the page pool, on device. The pool of pages says who owns what; this only holds it."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_engine.config import Limits
from jax_engine.layers.recurrent import RecurrentCache
from jax_engine.model_config import ModelConfig
from jax_engine.peer_memory import PeerMemory
from pallas_kernels.all_reduce import Peers
from pallas_kernels.ragged_paged_attention import api as attention_op


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """What the steps keep between them; donated to each step, which returns it updated in place.

    Attributes:
        pool: keys and values of all layers, in the attention op's own layout; a RecurrentCache with that in it where
            some layers keep a state by slot instead. Its layers are those of a group (see PageGroups): a page that one
            sequence has for one group may be another's for another.
        token_ids: [num_pages * page_size] the token at each place of the pool. The penalties read a sequence's history
            from here, by the same page table, so it is right whatever happens to the sequence's pages.
        last_tokens: [max_num_seqs + 1] the token that each slot sampled last; the last place takes what padding writes.
        kv_scales: [L, 2, K] float32, of a pool of 8-bit keys and values; see StepContext. None for
            other pools: those of 16 or 32 bits, and latent keys.
        peers: where steps find the memory of peer_memory.py, which they keep as it is; None where there is none.
    """

    pool: Any
    token_ids: Int[Array, " slots"]
    last_tokens: Int[Array, " seqs"]
    kv_scales: Float[Array, "L 2 K"] | None = None
    peers: Peers | None = None


def cache_shapes(
    model: ModelConfig, limits: Limits, dtype: jnp.dtype, kv_dtype: jnp.dtype, device: attention_op.Device
) -> KVCache:
    """The cache's arrays on such a device, as jax.ShapeDtypeStructs.

    Args:
        dtype: of what recurrent layers keep of their inputs. kv_dtype: of keys and values.
    """
    pages = _pool_shape(model, limits.num_pages, limits.page_size, device)
    states = _state_shapes(model, limits.max_num_seqs, dtype)
    scales = (model.layers_per_page, 2, model.num_key_value_heads)

    def make() -> KVCache:
        pool: Any = jnp.zeros(pages, kv_dtype)
        if states:
            pool = RecurrentCache(pool, *(jnp.zeros(*state) for state in states))
        return KVCache(
            pool=pool,
            token_ids=jnp.zeros(limits.num_pages * limits.page_size, jnp.int32),
            last_tokens=jnp.zeros(limits.max_num_seqs + 1, jnp.int32),
            kv_scales=jnp.ones(scales, jnp.float32) if kv_dtype.itemsize == 1 and model.mla is None else None,
        )

    return jax.eval_shape(make)


def empty_cache(shapes: KVCache, peer_memory: PeerMemory | None) -> KVCache:
    """Arrays of zeros of such shapes, placed as these say.

    Args:
        peer_memory: what `peers` is to lead to; None where the shapes have none.
    """

    def make(peers: Peers | None) -> KVCache:
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return replace(zeros, peers=peers)

    peers = peer_memory.peers() if peer_memory else None
    return jax.jit(make, out_shardings=jax.tree.map(lambda shape: shape.sharding, shapes))(peers)


def page_bytes(model: ModelConfig, page_size: int, kv_dtype: jnp.dtype, device: attention_op.Device) -> int:
    """Bytes of one page, which are those of a group's layers, on such a device."""
    pool = math.prod(_pool_shape(model, 1, page_size, device)) * kv_dtype.itemsize
    return pool + page_size * jnp.dtype(jnp.int32).itemsize


def _pool_shape(model: ModelConfig, num_pages: int, page_size: int, device: attention_op.Device) -> tuple[int, ...]:
    return attention_op.pool_shape(
        model.layers_per_page,
        num_pages,
        page_size,
        model.num_key_value_heads,
        model.head_dim,
        device=device,
        keys_only=model.mla is not None,
    )


def slot_bytes(model: ModelConfig, limits: Limits, dtype: jnp.dtype) -> int:
    """Bytes kept for all slots, whatever the number of pages: recurrent states."""
    states = _state_shapes(model, limits.max_num_seqs, dtype)
    return sum(math.prod(shape) * kind.itemsize for shape, kind in states)


def _state_shapes(model: ModelConfig, max_num_seqs: int, dtype: jnp.dtype) -> list[tuple[tuple[int, ...], jnp.dtype]]:
    """Shape and dtype of RecurrentCache's inputs and states; empty for a model without recurrent layers."""
    delta = model.delta
    if delta is None:
        return []
    group = delta.num_value_heads // delta.num_key_heads
    slots = (model.num_recurrent_layers, max_num_seqs + 1, delta.num_key_heads)
    channels = 2 * delta.key_dim + group * delta.value_dim
    return [
        ((*slots, delta.width - 1, channels), jnp.dtype(dtype)),
        ((*slots, group, delta.key_dim, delta.value_dim), jnp.dtype(jnp.float32)),
    ]
