"""The table of architectures: the class name in a checkpoint's config -> the model. One file each in this folder."""

from jax_engine.config import ModelConfig
from jax_engine.errors import ConfigError
from jax_engine.models.llama import Llama

ARCHITECTURES = {
    "LlamaForCausalLM": Llama,
}


def model_class(config: ModelConfig) -> type[Llama]:
    """The model of a config's architecture.

    Raises:
        ConfigError: nobody has written it yet.
    """
    try:
        return ARCHITECTURES[config.architecture]
    except KeyError:
        raise ConfigError(
            f"architecture {config.architecture!r} is not known; known: {', '.join(sorted(ARCHITECTURES))}. "
            "A new one is a file in jax_engine/models/ and a line in its table."
        ) from None
