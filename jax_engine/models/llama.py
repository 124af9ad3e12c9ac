"""Llama 1 to 3.x, SmolLM and others of the same shape (arXiv 2302.13971, 2407.21783)."""

from jax_engine.hf_config import HFConfig
from jax_engine.model_config import ModelConfig
from jax_engine.models.decoder import Decoder


class Llama(Decoder):
    """Pre-norm decoder with grouped-query attention, rotary positions, RMSNorm and SwiGLU."""

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
        )
