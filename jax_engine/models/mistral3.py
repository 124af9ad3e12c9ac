"""The text half of Mistral Small 3.1, 3.2 and their like, which also see (Mistral AI, 2025)."""

from jax_engine.hf_config import HFConfig
from jax_engine.model_config import ModelConfig
from jax_engine.models.mistral import Mistral
from jax_engine.models.text_half import TextHalf, ignore_sight


class Mistral3(TextHalf, Mistral):
    """Mistral inside of a model with a vision tower."""

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        text = hf.flat("text_config", {})
        ignore_sight(text)
        return super().read_config(text)
