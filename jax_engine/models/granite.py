"""Granite 3 (IBM): Llama's layer with fixed factors on embeddings, attention, residual stream and logits."""

from jax_engine.hf_config import HFConfig
from jax_engine.model_config import ModelConfig
from jax_engine.models.decoder import Decoder


class Granite(Decoder):
    """Pre-norm decoder with multipliers."""

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        base = hf.base()
        bias = hf.flag("attention_bias")
        return hf.finish(
            **base,
            ropes=(hf.rope(base["head_dim"]),),
            attention_bias=bias,
            output_bias=bias,
            mlp_bias=hf.flag("mlp_bias"),
            attention_scale=hf.number("attention_multiplier", 1.0),
            embedding_multiplier=hf.number("embedding_multiplier", 1.0),
            residual_multiplier=hf.number("residual_multiplier", 1.0),
            logits_divisor=hf.number("logits_scaling", 1.0),
        )
