"""Decoder: the frame that all architectures share. Embedding, layers, last norm, logits; how the parameters are found.

An architecture's file derives from it and says what its layers are, how its config is read and what its checkpoint
calls the weights. Never looks at a request, never places anything on a device.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from checkpoints.weight_map import Source
from jax_engine.hf_config import HFConfig
from jax_engine.layers import block_tail, rope
from jax_engine.layers.attention import Attention
from jax_engine.layers.context import StepContext
from jax_engine.layers.embedding import Embedding
from jax_engine.layers.linear import matmul_part
from jax_engine.layers.mlp import GatedMLP
from jax_engine.layers.moe import MoE
from jax_engine.layers.norm import RMSNorm
from jax_engine.layers.parallel import Part, leaves_parts
from jax_engine.layers.stack import run_layers
from jax_engine.model_config import LayerConfig, ModelConfig
from jax_engine.models import weights


class Residual(NamedTuple):
    """The residual stream between layers: `total`, to which `added` is yet to be added, together with the next norm,
    and where it is a Part, with a sum over the devices."""

    total: Float[Array, "T D"]
    added: Part | Float[Array, "T D"]


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream (arXiv 2302.13971)."""

    #: See Attention.
    qk_norm: ClassVar[str | None] = None

    def __init__(self, config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype):
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.attention = self.make_attention(config, layer, dtype)
        self.post_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.mlp = self.make_mlp(config, layer, dtype)
        self.residual_multiplier = config.residual_multiplier

    def make_attention(self, config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype) -> nnx.Module:
        """The layer's attention."""
        return Attention(config, layer, dtype, qk_norm=self.qk_norm)

    def make_mlp(self, config: ModelConfig, layer: LayerConfig, dtype: jnp.dtype) -> nnx.Module:
        """The layer's feed-forward."""
        if layer.sparse:
            return MoE(config, dtype)
        return GatedMLP(
            config.hidden_size, config.intermediate_size, dtype, activation=config.activation, bias=config.mlp_bias
        )

    def __call__(self, x: Residual, cache: Any, context: StepContext, place: Array) -> tuple[Residual, Any]:
        total, normed = self.input_norm.after_sum(x.total, x.added, context.platform)
        if self.residual_multiplier == 1 and block_tail.is_plain(self.attention, self.post_norm, self.mlp):
            assert isinstance(self.attention, Attention) and isinstance(self.mlp, GatedMLP)
            if block_tail.takes(self.attention, self.mlp, total.shape[0], context):
                heads, cache = self.attention.attend(normed, cache, context, place)
                tail = block_tail.apply(self.attention, self.post_norm, self.mlp, heads, total, context)
                return Residual(*tail), cache
            if leaves_parts(total):
                heads, cache = self.attention.attend(normed, cache, context, place)
                part = matmul_part(heads, self.attention.output)
                total, normed = self.post_norm.after_sum(total, part, context.platform)
                return Residual(total, self.mlp.part(normed)), cache
        attended, cache = self.attention(normed, cache, context, place)
        total, normed = self.post_norm.after_sum(total, self._scaled(attended), context.platform)
        return Residual(total, self._scaled(self.mlp(normed))), cache

    def _scaled(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return x if self.residual_multiplier == 1 else x * self.residual_multiplier


class Decoder(nnx.Module):
    """Packed tokens in, hidden states out; keys and values go into the cache."""

    #: Checkpoint tensors that no weight is made of: recomputed tables, and a stored copy of a tied head.
    IGNORED_TENSORS: ClassVar[tuple[str, ...]] = ("*.rotary_emb.inv_freq", "lm_head.weight")
    layer_class: ClassVar[Any] = DecoderLayer

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, unroll_layers: bool):
        self.config = config
        self.unroll_layers = unroll_layers
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nnx.List([self.layer_class(config, layer, dtype) for layer in config.layers])
        self.norm = self.make_norm(config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, dtype)

    def make_norm(self, config: ModelConfig, dtype: jnp.dtype) -> nnx.Module:
        """The norm after the last layer."""
        return RMSNorm(config.hidden_size, config.norm_eps, dtype)

    def __call__(self, ids: Int[Array, " T"], cache: Any, context: StepContext) -> tuple[Float[Array, "T D"], Any]:
        """Returns the hidden states after the last norm, and the cache."""
        positions = context.plan.positions
        x = self.embed_tokens(ids, positions)
        rotations = tuple(rope.rotation(positions, kind) for kind in self.config.ropes)
        context = dataclasses.replace(context, rotations=rotations)
        leaves_sum = issubclass(self.layer_class, DecoderLayer)
        carry = (Residual(x, jnp.zeros_like(x)) if leaves_sum else x, cache)
        x, cache = run_layers(self.layers, carry, context, places=self.config.places, unroll=self.unroll_layers)
        if leaves_sum:
            assert isinstance(self.norm, RMSNorm), "layers that leave a sum behind need a norm that adds it up"
            left = Residual(*x)
            return self.norm.after_sum(left.total, left.added, context.platform)[1], cache
        return self.norm(x), cache

    def embed_tokens(self, ids: Int[Array, " T"], positions: Int[Array, " T"]) -> Float[Array, "T D"]:
        """What the first layer gets."""
        x = self.embed(ids)
        return x if self.config.embedding_multiplier == 1 else x * self.config.embedding_multiplier

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Scores of every token, float32."""
        head = self.lm_head if hasattr(self, "lm_head") else self.embed
        logits = head.logits(hidden)
        if self.config.logits_divisor != 1:
            logits = logits / self.config.logits_divisor
        cap = self.config.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """The model that a Hugging Face config describes.

        Raises:
            ConfigError: fields are missing, of no use, or not supported; all are named.
        """
        raise NotImplementedError

    @classmethod
    def tensor_name(cls, name: str) -> str:
        """What weight_map calls a checkpoint's tensor, where older files have other names."""
        return name

    @classmethod
    def weight_map(cls, config: ModelConfig) -> dict[str, Source]:
        """Parameter path -> the checkpoint tensors that make it, under their Hugging Face names."""
        sources = weights.vocabulary(config)
        for index, layer in enumerate(config.layers):
            name = f"model.layers.{index}."
            sources |= {f"layers.{index}.{path}": s for path, s in cls.layer_sources(config, layer, name).items()}
        return sources

    @classmethod
    def layer_sources(cls, config: ModelConfig, layer: LayerConfig, name: str) -> dict[str, Source]:
        """The same for one layer, whose tensors' names start with `name`."""
        return {
            **weights.norm("input_norm", name + "input_layernorm", config),
            **weights.attention("attention", name + "self_attn.", config),
            **weights.norm("post_norm", name + "post_attention_layernorm", config),
            **weights.gated_mlp("mlp", name + "mlp.", config),
        }
