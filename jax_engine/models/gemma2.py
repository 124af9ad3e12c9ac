"""Gemma 2 (arXiv 2408.00118): norms on both sides, soft caps, and a sliding window in every other layer."""

from typing import Any, ClassVar

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

#: Parameter -> Hugging Face name.
_NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


class Gemma2Layer(nnx.Module):
    """Attention and feed-forward, each between two norms, added to the residual stream; norms scale by 1 + weight."""

    #: See Attention.
    qk_norm: ClassVar[str | None] = None

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype):
        self.input_norm, self.post_norm, self.pre_mlp_norm, self.post_mlp_norm = (
            RMSNorm(config.hidden_size, config.norm_eps, dtype, unit_offset=True) for _ in _NORMS
        )
        self.attention = Attention(config, layer, dtype, qk_norm=self.qk_norm, unit_offset=True)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, dtype, activation=config.activation)

    def __call__(
        self, x: Float[Array, "T D"], cache: Any, context: StepContext, place: Array
    ) -> tuple[Float[Array, "T D"], Any]:
        attended, cache = self.attention(self.input_norm(x), cache, context, place)
        x = x + self.post_norm(attended)
        return x + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x))), cache


class Gemma2(Decoder):
    """See Gemma2Layer; embeddings are scaled by the square root of their size."""

    layer_class = Gemma2Layer

    def make_norm(self, config: ModelConfig, dtype: jnp.dtype) -> nnx.Module:
        """See Decoder."""
        return RMSNorm(config.hidden_size, config.norm_eps, dtype, unit_offset=True)

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        fields = read_gemma(hf)
        num_layers = fields["num_hidden_layers"]
        alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
        return hf.finish(
            **fields,
            ropes=(hf.rope(fields["head_dim"]),),
            layers=hf.windows(hf.optional_size("sliding_window", 4096), alternating),
            attention_soft_cap=hf.optional_number("attn_logit_softcapping", 50.0),
            logits_soft_cap=hf.optional_number("final_logit_softcapping", 30.0),
        )

    @classmethod
    def layer_sources(cls, config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
        """See Decoder."""
        sources = {
            **weights.attention("attention", name + "self_attn.", config, qk_norm=cls.layer_class.qk_norm),
            **weights.gated_mlp("mlp", name + "mlp.", config),
        }
        for path, hf_name in _NORMS.items():
            sources |= weights.norm(path, name + hf_name, config)
        return sources


def read_gemma(hf: HFConfig) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common, as arguments of ModelConfig."""
    hf.ignore("hidden_act")  # overruled by hidden_activation, and wrong in the first files
    base = hf.base(head_dim=256, activation="gelu_pytorch_tanh", activation_field="hidden_activation", tied=True)
    bias = hf.flag("attention_bias")
    return {
        **base,
        "attention_bias": bias,
        "output_bias": bias,
        "attention_scale": hf.number("query_pre_attn_scalar", 256) ** -0.5,
        "embedding_multiplier": base["hidden_size"] ** 0.5,
    }
