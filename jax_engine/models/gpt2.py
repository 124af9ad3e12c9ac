"""GPT-2 (OpenAI, 2019): learned positions, layer norms with biases, one feed-forward product without a gate."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from checkpoints.weight_map import Source, fuse, take, transpose
from jax_engine.hf_config import HFConfig
from jax_engine.layers.attention import Attention
from jax_engine.layers.context import StepContext
from jax_engine.layers.mlp import MLP
from jax_engine.layers.norm import LayerNorm
from jax_engine.layers.param import declare
from jax_engine.model_config import ACTIVATIONS, LayerConfig, ModelConfig
from jax_engine.models import weights
from jax_engine.models.decoder import Decoder


class GPT2Layer(nnx.Module):
    """Attention and feed-forward, each behind a layer norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype):
        self.input_norm = LayerNorm(config.hidden_size, config.norm_eps, dtype)
        self.attention = Attention(config, layer, dtype)
        self.post_norm = LayerNorm(config.hidden_size, config.norm_eps, dtype)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, dtype, activation=config.activation)

    def __call__(
        self, x: Float[Array, "T D"], cache: Any, context: StepContext, place: Array
    ) -> tuple[Float[Array, "T D"], Any]:
        attended, cache = self.attention(self.input_norm(x), cache, context, place)
        x = x + attended
        return x + self.mlp(self.post_norm(x)), cache


class GPT2(Decoder):
    """See GPT2Layer. Its linear layers are stored inputs first."""

    #: The causal mask was once stored with the weights.
    IGNORED_TENSORS = ("*.attn.bias", "*.attn.masked_bias", "lm_head.weight")
    layer_class = GPT2Layer

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, unroll_layers: bool):
        super().__init__(config, dtype, unroll_layers)
        shape = (config.max_position_embeddings, config.hidden_size)
        self.position_embed = declare(shape, dtype, (None, "embed"))

    def make_norm(self, config: ModelConfig, dtype: jnp.dtype) -> nnx.Module:
        """See Decoder."""
        return LayerNorm(config.hidden_size, config.norm_eps, dtype)

    def embed_tokens(self, ids: Int[Array, " T"], positions: Int[Array, " T"]) -> Float[Array, "T D"]:
        """See Decoder."""
        return self.embed(ids) + self.position_embed[...][positions]

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder."""
        embed, num_heads, num_layers = hf.size("n_embd"), hf.size("n_head"), hf.size("n_layer")
        if embed % num_heads:
            hf.problem(f"n_embd {embed} is no multiple of n_head {num_heads}")
        hf.only("scale_attn_by_inverse_layer_idx", False)
        # How attention is computed, not what; and heads that this class does not have.
        hf.ignore("reorder_and_upcast_attn", "n_ctx", "summary_type", "summary_use_proj", "summary_activation")
        hf.ignore("summary_proj_to_labels", "summary_first_dropout")
        return hf.finish(
            architecture=hf.architecture,
            vocab_size=hf.size("vocab_size"),
            hidden_size=embed,
            intermediate_size=hf.size("n_inner", 4 * embed),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            head_dim=max(embed // num_heads, 1),
            max_position_embeddings=hf.size("n_positions", 1024),
            norm_eps=hf.number("layer_norm_epsilon", 1e-5),
            activation=hf.choice("activation_function", ACTIVATIONS, "gelu_new"),
            tie_word_embeddings=hf.flag("tie_word_embeddings", True),
            layers=(LayerConfig(rope=None),) * num_layers,
            attention_scale=None if hf.flag("scale_attn_weights", True) else 1.0,
            attention_bias=True,
            output_bias=True,
        )

    @classmethod
    def tensor_name(cls, name: str) -> str:
        """See Decoder. The files of the first release have no prefix."""
        return "transformer." + name if name.startswith(("h.", "wte.", "wpe.", "ln_f.")) else name

    @classmethod
    def weight_map(cls, config: ModelConfig) -> dict[str, Source]:
        """See Decoder."""
        embed, vocab = config.hidden_size, config.vocab_size
        sources = {
            "embed.weight": take("transformer.wte.weight", (vocab, embed)),
            "position_embed": take("transformer.wpe.weight", (config.max_position_embeddings, embed)),
            **_layer_norm("norm", "transformer.ln_f", embed),
        }
        if not config.tie_word_embeddings:
            sources["lm_head.weight"] = take("lm_head.weight", (vocab, embed))
        for index, layer in enumerate(config.layers):
            name = f"transformer.h.{index}."
            sources |= {f"layers.{index}.{path}": s for path, s in cls.layer_sources(config, layer, name).items()}
        return sources

    @classmethod
    def layer_sources(cls, config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
        """See Decoder."""
        embed, hidden = config.hidden_size, config.intermediate_size

        def regroup(qkv: np.ndarray) -> np.ndarray:
            return weights.join_heads(config, *np.split(np.transpose(qkv), 3))

        def split(output: np.ndarray) -> np.ndarray:
            return np.transpose(output).reshape(embed, config.num_key_value_heads, 1, config.head_dim)

        return {
            **_layer_norm("input_norm", name + "ln_1", embed),
            "attention.qkv": fuse(regroup, (name + "attn.c_attn.weight", (embed, 3 * embed))),
            "attention.qkv_bias": fuse(regroup, (name + "attn.c_attn.bias", (3 * embed,))),
            "attention.output": fuse(split, (name + "attn.c_proj.weight", (embed, embed))),
            "attention.output_bias": take(name + "attn.c_proj.bias", (embed,)),
            **_layer_norm("post_norm", name + "ln_2", embed),
            "mlp.up": transpose(name + "mlp.c_fc.weight", (embed, hidden)),
            "mlp.up_bias": take(name + "mlp.c_fc.bias", (hidden,)),
            "mlp.down": transpose(name + "mlp.c_proj.weight", (hidden, embed)),
            "mlp.down_bias": take(name + "mlp.c_proj.bias", (embed,)),
        }


def _layer_norm(path: str, name: str, size: int) -> dict[str, Source]:
    return {f"{path}.{part}": take(f"{name}.{part}", (size,)) for part in ("weight", "bias")}
