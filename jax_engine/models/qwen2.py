"""Qwen2 and 2.5 (arXiv 2407.10671): Llama's layer with biases on query, key and value, windows in upper layers."""

from jax_engine.hf_config import HFConfig
from jax_engine.model_config import LayerConfig, ModelConfig
from jax_engine.models.decoder import Decoder


class Qwen2(Decoder):
    """Pre-norm decoder; query, key and value have biases."""

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        base = hf.base()
        hf.only("attention_bias", True)
        return hf.finish(
            **base,
            ropes=(hf.rope(base["head_dim"]),),
            layers=read_windows(hf, base["num_hidden_layers"]),
            attention_bias=True,
        )


def read_windows(hf: HFConfig, num_layers: int) -> tuple[LayerConfig, ...]:
    """Which layers have a sliding window: those that layer_types says, else all from max_window_layers on."""
    window = hf.optional_size("sliding_window") if hf.flag("use_sliding_window") else hf.ignore("sliding_window")
    first = hf.count("max_window_layers", 28)
    by_number = ["sliding_attention" if window and i >= first else "full_attention" for i in range(num_layers)]
    return hf.windows(window, default=by_number)
