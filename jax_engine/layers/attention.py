"""Grouped-query attention over the paged KV pool."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_engine.layers.context import StepContext
from jax_engine.layers.linear import matmul, small
from jax_engine.layers.norm import HeadsNorm, RMSNorm
from jax_engine.layers.param import declare
from jax_engine.layers.rope import rotate
from jax_engine.model_config import LayerConfig, ModelConfig
from pallas_kernels.ragged_paged_attention import api as attention_op


class Attention(nnx.Module):
    """Query, key and value from one matrix product; grouped-query attention (arXiv 2305.13245); output product.

    The fused weight keeps each KV head beside the query heads that use it, so that a split over `kv_heads` leaves
    every device with whole groups.

    Args:
        qk_norm: queries and keys are normalised before they turn: "head": each head by itself; "all": all heads
            together; None: they are not. unit_offset: as in RMSNorm, for these norms.
        sinks: each query head has a logit without a value in its softmax.
        gated: each query head's result has a factor from the token, for each of its dimensions.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: LayerConfig,
        dtype: jnp.dtype,
        *,
        qk_norm: str | None = None,
        unit_offset: bool = False,
        sinks: bool = False,
        gated: bool = False,
    ):
        embed, num_kv_heads, head_dim = config.hidden_size, config.num_key_value_heads, config.head_dim
        group = config.num_attention_heads // num_kv_heads
        rows = (2 if gated else 1) * group + 2
        self.qkv = declare(
            (num_kv_heads, rows, head_dim, embed), dtype, ("kv_heads", "group", "head_dim", "embed"), inputs=1
        )
        self.output = declare(
            (embed, num_kv_heads, group, head_dim), dtype, ("embed", "kv_heads", "group", "head_dim"), inputs=3
        )
        if config.attention_bias:
            axes = ("kv_heads", "group", "head_dim")
            self.qkv_bias = declare((num_kv_heads, rows, head_dim), dtype, axes, init="zeros")
        if config.output_bias:
            self.output_bias = declare((embed,), dtype, ("embed",), init="zeros")
        if qk_norm == "all":
            axes = ("kv_heads", "group", "head_dim")
            self.q_norm = HeadsNorm((num_kv_heads, group, head_dim), axes, config.norm_eps, dtype)
            self.k_norm = HeadsNorm((num_kv_heads, head_dim), ("kv_heads", "head_dim"), config.norm_eps, dtype)
        elif qk_norm:
            norms = (RMSNorm(head_dim, config.norm_eps, dtype, unit_offset=unit_offset) for _ in range(2))
            self.q_norm, self.k_norm = norms
        if sinks:
            self.sinks = declare((num_kv_heads, group), dtype, ("kv_heads", "group"), init="zeros")
        self.layer = layer
        self.gated = gated
        self.scale = config.query_scale
        self.soft_cap = config.attention_soft_cap

    def __call__(
        self, x: Float[Array, "T D"], pool: Array, context: StepContext, place: Array
    ) -> tuple[Float[Array, "T D"], Array]:
        """Writes the tokens' keys and values into the pool and attends over it. Returns the output and the pool.

        Args:
            place: which of the pool's layers is this one's.
        """
        attended, pool = self.attend(x, pool, context, place)
        output = matmul(attended, self.output)
        if hasattr(self, "output_bias"):
            output = output + self.output_bias[...]
        return output, pool

    def attend(
        self, x: Float[Array, "T D"], pool: Array, context: StepContext, place: Array
    ) -> tuple[Float[Array, "T A"], Array]:
        """The same without the output product: all heads of a token side by side."""
        plan = context.plan
        tokens = x.shape[0]
        q, k, v = self._project(x)
        if self.gated:
            q, gate = (part.reshape(tokens, -1, q.shape[-1]) for part in jnp.split(q, 2, axis=2))
        else:
            q = q.reshape(tokens, -1, q.shape[-1])
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.layer.rope is not None:
            rotation = context.rotations[self.layer.rope]
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        kv_scales = None if context.kv_scales is None else context.kv_scales[place]
        pool = attention_op.write_kv(pool, k, v, plan, place, kv_scales=kv_scales)
        attended = attention_op.ragged_paged_attention(
            q,
            pool,
            plan,
            place,
            scale=self.scale,
            sliding_window=self.layer.sliding_window,
            logits_soft_cap=self.soft_cap,
            sinks=small(self.sinks).reshape(-1) if hasattr(self, "sinks") else None,
            kv_scales=kv_scales,
        )
        if self.gated:
            attended = attended * jax.nn.sigmoid(gate)
        return attended.reshape(tokens, -1), pool

    def _project(self, x: Float[Array, "T D"]) -> tuple[Array, Array, Array]:
        """Queries and what gates them [T, K, group, H], keys and values [T, K, H]."""
        tokens = x.shape[0]
        num_kv_heads, group_and_kv, head_dim, _ = self.qkv.shape
        qkv = matmul(x, self.qkv).reshape(tokens, num_kv_heads, group_and_kv, head_dim)
        if hasattr(self, "qkv_bias"):
            qkv = qkv + small(self.qkv_bias)
        return qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
