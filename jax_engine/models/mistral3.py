"""The text half of Mistral Small 3.1, 3.2 and their like, which also see (Mistral AI, 2025)."""

from jax_engine.models.mistral import Mistral
from jax_engine.models.text_half import TextHalf


class Mistral3(TextHalf, Mistral):
    """Mistral inside of a model with a vision tower."""
