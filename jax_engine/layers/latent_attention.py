"""Multi-head latent attention over a compressed cache (DeepSeek-V2, arXiv 2405.04434)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_engine.layers.context import StepContext
from jax_engine.layers.linear import matmul, matmul_by_head
from jax_engine.layers.norm import RMSNorm
from jax_engine.layers.param import declare
from jax_engine.layers.rope import rotate
from jax_engine.model_config import LayerConfig, ModelConfig
from pallas_kernels.ragged_paged_attention import api as attention_op

#: Of the norms of latents, whatever the config says of the others.
_LATENT_EPS = 1e-6


class LatentAttention(nnx.Module):
    """The cache holds one latent vector per token, from which keys and values of all heads could be made, and a part of
    the key that turns with the position and is common to all heads.

    Nothing is ever made of the latents: the product that would make keys is applied to the queries instead, and the one
    that would make values to what attention gives. So attention is that of one KV head whose keys are latent and
    turning part, and whose values are the latents, the leading dimensions of these keys.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype):
        mla = config.mla
        assert mla is not None
        embed, heads = config.hidden_size, config.num_attention_heads
        query_size = mla.nope_dim + mla.rope_dim
        if mla.query_rank:
            self.query_down = declare((mla.query_rank, embed), dtype, (None, "embed"), inputs=1)
            self.query_norm = RMSNorm(mla.query_rank, _LATENT_EPS, dtype)
        self.query = declare(
            (heads, query_size, mla.query_rank or embed),
            dtype,
            ("heads", "head_dim", None if mla.query_rank else "embed"),
            inputs=1,
        )
        self.latent_down = declare((config.head_dim, embed), dtype, ("head_dim", "embed"), inputs=1)
        self.latent_norm = RMSNorm(mla.latent_dim, _LATENT_EPS, dtype)
        self.key_up = declare((heads, mla.latent_dim, mla.nope_dim), dtype, ("heads", None, "head_dim"), inputs=1)
        self.value_up = declare((heads, mla.value_dim, mla.latent_dim), dtype, ("heads", "head_dim", None), inputs=1)
        self.output = declare((embed, heads, mla.value_dim), dtype, ("embed", "heads", "head_dim"), inputs=2)
        if config.attention_bias:
            if mla.query_rank:
                self.query_bias = declare((mla.query_rank,), dtype, (None,), init="zeros")
            self.latent_bias = declare((config.head_dim,), dtype, ("head_dim",), init="zeros")
            self.output_bias = declare((embed,), dtype, ("embed",), init="zeros")
        self.mla = mla
        self.scale = config.query_scale

    def __call__(
        self, x: Float[Array, "T D"], pool: Array, context: StepContext, place: Array
    ) -> tuple[Float[Array, "T D"], Array]:
        """As Attention."""
        tokens, mla, rotation = x.shape[0], self.mla, context.rotations[0]
        latent = matmul(x, self.latent_down)
        if hasattr(self, "latent_bias"):
            latent = latent + self.latent_bias[...]
        latent, turning = latent[:, : mla.latent_dim], latent[:, None, mla.latent_dim :]
        key = jnp.concatenate([self.latent_norm(latent)[:, None], rotate(turning, *rotation)], axis=-1)
        pool = attention_op.write_kv(pool, key, None, context.plan, place)
        fixed, turning = jnp.split(self._queries(x), [mla.nope_dim], axis=-1)
        query = jnp.concatenate([matmul_by_head(fixed, self.key_up), rotate(turning, *rotation)], axis=-1)
        attended = attention_op.ragged_paged_attention(
            query, pool, context.plan, place, scale=self.scale, value_dim=mla.latent_dim
        )
        output = matmul(matmul_by_head(attended, self.value_up).reshape(tokens, -1), self.output)
        return output + self.output_bias[...] if hasattr(self, "output_bias") else output, pool

    def _queries(self, x: Float[Array, "T D"]) -> Float[Array, "T N H"]:
        if self.mla.query_rank:
            x = matmul(x, self.query_down)
            x = self.query_norm(x + self.query_bias[...] if hasattr(self, "query_bias") else x)
        return matmul(x, self.query).reshape(x.shape[0], -1, self.mla.nope_dim + self.mla.rope_dim)
