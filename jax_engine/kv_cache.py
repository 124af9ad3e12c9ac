"""KVCache: the arrays behind the page pool, on device. The pool of pages says who owns what; this only holds it."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_engine.config import Limits, ModelConfig
from pallas_kernels.ragged_paged_attention import api as attention_op


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """What the steps keep between them; donated to each step, which returns it updated in place.

    Attributes:
        pool: keys and values of all layers, in the attention op's own layout.
        token_ids: [num_pages * page_size] the token at each place of the pool. The penalties read a sequence's history
            from here, by the same page table, so it is right whatever happens to the sequence's pages.
        last_tokens: [max_num_seqs + 1] the token that each slot sampled last; the last place takes what padding writes.
    """

    pool: Array
    token_ids: Int[Array, " slots"]
    last_tokens: Int[Array, " seqs"]


def cache_shapes(model: ModelConfig, limits: Limits, dtype: jnp.dtype, device: attention_op.Device) -> KVCache:
    """The cache's arrays on such a device, as jax.ShapeDtypeStructs."""
    pool = _pool_shape(model, limits.num_pages, limits.page_size, device)
    empty = {
        "pool": (pool, dtype),
        "token_ids": ((limits.num_pages * limits.page_size,), jnp.int32),
        "last_tokens": ((limits.max_num_seqs + 1,), jnp.int32),
    }
    return jax.eval_shape(lambda: KVCache(**{name: jnp.zeros(*array) for name, array in empty.items()}))


def page_bytes(model: ModelConfig, page_size: int, dtype: jnp.dtype, device: attention_op.Device) -> int:
    """Bytes of one page over all layers, on such a device."""
    pool = math.prod(_pool_shape(model, 1, page_size, device)) * jnp.dtype(dtype).itemsize
    return pool + page_size * jnp.dtype(jnp.int32).itemsize


def _pool_shape(model: ModelConfig, num_pages: int, page_size: int, device: attention_op.Device) -> tuple[int, ...]:
    heads, head_dim = model.num_key_value_heads, model.head_dim
    return attention_op.pool_shape(model.num_hidden_layers, num_pages, page_size, heads, head_dim, device=device)
