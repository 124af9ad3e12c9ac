"""Mistral 7B and its like (arXiv 2310.06825): Llama's layer; all layers may have a sliding window."""

from jax_engine.hf_config import HFConfig
from jax_engine.model_config import LayerConfig, ModelConfig
from jax_engine.models.decoder import Decoder


class Mistral(Decoder):
    """Pre-norm decoder, with a window over the latest positions."""

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder. A sliding_window of null means none; a missing one means 4096, as in the first release."""
        base = hf.base()
        window = hf.optional_size("sliding_window", 4096)
        return hf.finish(
            **base,
            ropes=(hf.rope(base["head_dim"]),),
            layers=(LayerConfig(sliding_window=window),) * base["num_hidden_layers"],
        )
