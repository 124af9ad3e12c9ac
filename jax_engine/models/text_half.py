"""TextHalf: what models that also see have in common, where only their text half is loaded. Prompts are text."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jax_engine.hf_config import HFConfig
from jax_engine.model_config import ModelConfig
from jax_engine.models.decoder import Decoder


class TextHalf(Decoder):
    """Comes before the architecture that the text half is of, among a model's bases.

    Attributes:
        TEXT_DEFAULTS: fields of the text half that published files leave to their class.
    """

    IGNORED_TENSORS = (*Decoder.IGNORED_TENSORS, "*vision_tower.*", "*multi_modal_projector.*")
    TEXT_DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        text = hf.flat("text_config", cls.TEXT_DEFAULTS)
        # The fields of the other half.
        text.ignore("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
        text.ignore("multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "vision_feature_layer")
        return super().read_config(text)

    @classmethod
    def tensor_name(cls, name: str) -> str:
        """See Decoder. transformers 4.52 to 4.57 put what sees and what reads into one `model`, others do not."""
        if name.startswith("model.language_model."):
            return "model." + name.removeprefix("model.language_model.")
        return name.removeprefix("language_model.")
