"""The text half of those Gemma 3 models that see, too (arXiv 2503.19786): from 4B on, as they are published."""

from typing import ClassVar

from jax_engine.models.gemma3 import Gemma3
from jax_engine.models.text_half import TextHalf


class Gemma3Multimodal(TextHalf, Gemma3):
    """Gemma 3 inside of a model with a vision tower."""

    TEXT_DEFAULTS: ClassVar = {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
    }
