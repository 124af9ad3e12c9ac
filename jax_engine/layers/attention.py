"""Grouped-query attention over the paged KV pool."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_engine.layers.linear import matmul
from jax_engine.layers.param import declare
from jax_engine.layers.rope import rotate
from pallas_kernels.ragged_paged_attention import api as attention_op


class Attention(nnx.Module):
    """Query, key and value from one matrix product; grouped-query attention (arXiv 2305.13245); output product.

    The fused weight keeps each KV head beside the query heads that use it, so that a split over `kv_heads` leaves
    every device with whole groups.
    """

    def __init__(self, embed: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype):
        group = num_heads // num_kv_heads
        self.qkv = declare(
            (num_kv_heads, group + 2, head_dim, embed), dtype, ("kv_heads", "group", "head_dim", "embed")
        )
        self.output = declare((embed, num_kv_heads, group, head_dim), dtype, ("embed", "kv_heads", "group", "head_dim"))
        self.scale = head_dim**-0.5

    def __call__(
        self,
        x: Float[Array, "T D"],
        rotation: tuple[Array, Array],
        pool: Array,
        plan: attention_op.Plan,
        layer: Array,
    ) -> tuple[Float[Array, "T D"], Array]:
        """Writes the tokens' keys and values into the pool and attends over it. Returns the output and the pool."""
        tokens = x.shape[0]
        num_kv_heads, group_and_kv, head_dim, _ = self.qkv.shape
        qkv = matmul(x, self.qkv).reshape(tokens, num_kv_heads, group_and_kv, head_dim)
        q = rotate(qkv[:, :, :-2].reshape(tokens, -1, head_dim), *rotation)
        k = rotate(qkv[:, :, -2], *rotation)
        pool = attention_op.write_kv(pool, k, qkv[:, :, -1], plan, layer)
        attended = attention_op.ragged_paged_attention(q, pool, plan, layer, scale=self.scale)
        return matmul(attended.reshape(tokens, -1), self.output), pool
