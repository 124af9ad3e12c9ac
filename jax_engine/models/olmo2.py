"""OLMo 2 (arXiv 2501.00656): norms behind attention and feed-forward, and over all query and key heads together."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from checkpoints.weight_map import Source
from jax_engine.hf_config import HFConfig
from jax_engine.layers.attention import Attention
from jax_engine.layers.context import StepContext
from jax_engine.layers.mlp import GatedMLP
from jax_engine.layers.norm import RMSNorm
from jax_engine.model_config import LayerConfig, ModelConfig
from jax_engine.models import weights
from jax_engine.models.decoder import Decoder


class Olmo2Layer(nnx.Module):
    """Attention and feed-forward, each followed by a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype):
        self.attention = Attention(config, layer, dtype, qk_norm="all")
        self.post_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, dtype, activation=config.activation)
        self.post_mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)

    def __call__(
        self, x: Float[Array, "T D"], cache: Any, context: StepContext, place: Array
    ) -> tuple[Float[Array, "T D"], Any]:
        attended, cache = self.attention(x, cache, context, place)
        x = x + self.post_norm(attended)
        return x + self.post_mlp_norm(self.mlp(x)), cache


class Olmo2(Decoder):
    """See Olmo2Layer."""

    layer_class = Olmo2Layer

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        base = hf.base(norm_eps=1e-5)
        bias = hf.flag("attention_bias")
        return hf.finish(**base, ropes=(hf.rope(base["head_dim"]),), attention_bias=bias, output_bias=bias)

    @classmethod
    def layer_sources(cls, config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
        """See Decoder."""
        return {
            **weights.attention("attention", name + "self_attn.", config, qk_norm="all"),
            **weights.norm("post_norm", name + "post_attention_layernorm", config),
            **weights.gated_mlp("mlp", name + "mlp.", config),
            **weights.norm("post_mlp_norm", name + "post_feedforward_layernorm", config),
        }
