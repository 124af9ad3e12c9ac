"""The text half of those Gemma 3 models that see, too (arXiv 2503.19786): from 4B on, as they are published."""

from jax_engine.hf_config import HFConfig
from jax_engine.model_config import ModelConfig
from jax_engine.models.gemma3 import Gemma3
from jax_engine.models.text_half import TextHalf, ignore_sight

#: Fields that the published files leave to their class.
_TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}


class Gemma3Multimodal(TextHalf, Gemma3):
    """Gemma 3 inside of a model with a vision tower."""

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        text = hf.flat("text_config", _TEXT_DEFAULTS)
        ignore_sight(text)
        return super().read_config(text)
