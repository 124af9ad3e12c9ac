"""TextHalf: what models that also see have in common, where only their text half is loaded. Prompts are text."""

from jax_engine.hf_config import HFConfig
from jax_engine.models.decoder import Decoder


class TextHalf(Decoder):
    """Comes before the architecture that the text half is of, among a model's bases."""

    IGNORED_TENSORS = (*Decoder.IGNORED_TENSORS, "*vision_tower.*", "*multi_modal_projector.*")

    @classmethod
    def tensor_name(cls, name: str) -> str:
        """See Decoder. transformers 4.52 to 4.57 put what sees and what reads into one `model`, others do not."""
        if name.startswith("model.language_model."):
            return "model." + name.removeprefix("model.language_model.")
        return name.removeprefix("language_model.")


def ignore_sight(text: HFConfig) -> None:
    """The fields of the other half."""
    text.ignore("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
    text.ignore("multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size", "vision_feature_layer")
