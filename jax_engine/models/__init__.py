"""The table of architectures: the class name in a checkpoint's config -> the model. One file each in this folder."""

from collections.abc import Mapping
from typing import Any

from jax_engine.errors import ConfigError
from jax_engine.hf_config import HFConfig
from jax_engine.model_config import ModelConfig
from jax_engine.models.decoder import Decoder
from jax_engine.models.deepseek_v2 import DeepseekV2
from jax_engine.models.deepseek_v3 import DeepseekV3
from jax_engine.models.gemma2 import Gemma2
from jax_engine.models.gemma3 import Gemma3
from jax_engine.models.gemma3_multimodal import Gemma3Multimodal
from jax_engine.models.gpt2 import GPT2
from jax_engine.models.gpt_oss import GptOss
from jax_engine.models.granite import Granite
from jax_engine.models.llama import Llama
from jax_engine.models.mistral import Mistral
from jax_engine.models.mistral3 import Mistral3
from jax_engine.models.mixtral import Mixtral
from jax_engine.models.olmo2 import Olmo2
from jax_engine.models.phi3 import Phi3
from jax_engine.models.qwen2 import Qwen2
from jax_engine.models.qwen3 import Qwen3
from jax_engine.models.qwen3_moe import Qwen3Moe
from jax_engine.models.qwen3_next import Qwen3Next
from jax_engine.models.smollm3 import SmolLM3

ARCHITECTURES: dict[str, type[Decoder]] = {
    "DeepseekV2ForCausalLM": DeepseekV2,
    "DeepseekV3ForCausalLM": DeepseekV3,
    "GPT2LMHeadModel": GPT2,
    "Gemma2ForCausalLM": Gemma2,
    "Gemma3ForCausalLM": Gemma3,
    "Gemma3ForConditionalGeneration": Gemma3Multimodal,
    "GptOssForCausalLM": GptOss,
    "GraniteForCausalLM": Granite,
    "LlamaForCausalLM": Llama,
    "Mistral3ForConditionalGeneration": Mistral3,
    "MistralForCausalLM": Mistral,
    "MixtralForCausalLM": Mixtral,
    "Olmo2ForCausalLM": Olmo2,
    "Phi3ForCausalLM": Phi3,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "Qwen3MoeForCausalLM": Qwen3Moe,
    "Qwen3NextForCausalLM": Qwen3Next,
    "SmolLM3ForCausalLM": SmolLM3,
}


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hugging Face config.json, of transformers 4 or 5.

    Raises:
        ConfigError: the architecture is not known; fields are missing, of no use or not supported (all are named).
    """
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and len(architectures) == 1 and isinstance(architectures[0], str)):
        raise ConfigError(f"config.json: architectures must name one class, got {str(architectures)[:80]}")
    return _lookup(architectures[0]).read_config(HFConfig(config))


def model_class(config: ModelConfig) -> type[Decoder]:
    """The model of a config's architecture.

    Raises:
        ConfigError: nobody has written it yet.
    """
    return _lookup(config.architecture)


def _lookup(architecture: str) -> type[Decoder]:
    try:
        return ARCHITECTURES[architecture]
    except KeyError:
        raise ConfigError(
            f"architecture {architecture!r} is not known; known: {', '.join(sorted(ARCHITECTURES))}. "
            "A new one is a file in jax_engine/models/ and a line in the table of its __init__.py; "
            "docs/adding-a-model.md says how."
        ) from None
