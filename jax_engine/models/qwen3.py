"""Qwen3, dense (arXiv 2505.09388): Llama's layer with each query and key head normalised."""

from checkpoints.weight_map import Source
from jax_engine.hf_config import HFConfig
from jax_engine.model_config import LayerConfig, ModelConfig
from jax_engine.models import weights
from jax_engine.models.decoder import Decoder, DecoderLayer
from jax_engine.models.qwen2 import read_windows


class Qwen3Layer(DecoderLayer):
    """Pre-norm layer; queries and keys are normalised head by head."""

    qk_norm = "head"


class Qwen3(Decoder):
    """See Qwen3Layer."""

    layer_class = Qwen3Layer

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        base = hf.base(head_dim=128)
        bias = hf.flag("attention_bias")
        return hf.finish(
            **base,
            ropes=(hf.rope(base["head_dim"]),),
            layers=read_windows(hf, base["num_hidden_layers"]),
            attention_bias=bias,
            output_bias=bias,
        )

    @classmethod
    def layer_sources(cls, config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
        """See Decoder."""
        sources = super().layer_sources(config, layer, name)
        return sources | weights.attention("attention", name + "self_attn.", config, qk_norm="head")
