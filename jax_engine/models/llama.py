"""The Llama family: Llama 1 to 3.x, SmolLM and others of the same shape.

Pre-norm decoder with grouped-query attention, rotary positions, RMSNorm and SwiGLU (arXiv 2302.13971, 2407.21783).
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from checkpoints.weight_map import Source, fuse, take
from jax_engine.config import ModelConfig
from jax_engine.layers import rope
from jax_engine.layers.attention import Attention
from jax_engine.layers.embedding import Embedding
from jax_engine.layers.mlp import GatedMLP
from jax_engine.layers.norm import RMSNorm
from jax_engine.layers.stack import run_layers
from pallas_kernels.ragged_paged_attention.api import Plan


class LlamaLayer(nnx.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        embed = config.hidden_size
        self.input_norm = RMSNorm(embed, config.rms_norm_eps, dtype)
        self.attention = Attention(
            embed, config.num_attention_heads, config.num_key_value_heads, config.head_dim, dtype
        )
        self.post_norm = RMSNorm(embed, config.rms_norm_eps, dtype)
        self.mlp = GatedMLP(embed, config.intermediate_size, dtype)

    def __call__(
        self, x: Float[Array, "T D"], pool: Array, rotation: tuple[Array, Array], plan: Plan, layer: Array
    ) -> tuple[Float[Array, "T D"], Array]:
        attended, pool = self.attention(self.input_norm(x), rotation, pool, plan, layer)
        x = x + attended
        return x + self.mlp(self.post_norm(x)), pool


class Llama(nnx.Module):
    """Packed tokens in, hidden states out; keys and values go into the pool."""

    #: Checkpoint tensors that no weight is made of: recomputed tables, and a stored copy of a tied head.
    IGNORED_TENSORS = ("*.rotary_emb.inv_freq", "lm_head.weight")

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, unroll_layers: bool):
        self.config = config
        self.unroll_layers = unroll_layers
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nnx.List([LlamaLayer(config, dtype) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, dtype)

    def __call__(
        self, ids: Int[Array, " T"], positions: Int[Array, " T"], pool: Array, plan: Plan
    ) -> tuple[Float[Array, "T D"], Array]:
        """Returns the hidden states after the last norm, and the pool."""
        x = self.embed(ids)
        config = self.config
        frequencies = rope.inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        rotation = rope.rotation(positions, frequencies)
        x, pool = run_layers(self.layers, (x, pool), rotation, plan, unroll=self.unroll_layers)
        return self.norm(x), pool

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Scores of every token, float32."""
        head = self.lm_head if hasattr(self, "lm_head") else self.embed
        return head.logits(hidden)

    @staticmethod
    def weight_map(config: ModelConfig) -> dict[str, Source]:
        """Parameter path -> the checkpoint tensors that make it, under their Hugging Face names."""
        embed, vocab = config.hidden_size, config.vocab_size
        sources = {
            "embed.weight": take("model.embed_tokens.weight", (vocab, embed)),
            "norm.weight": take("model.norm.weight", (embed,)),
        }
        if not config.tie_word_embeddings:
            sources["lm_head.weight"] = take("lm_head.weight", (vocab, embed))
        for index in range(config.num_hidden_layers):
            sources |= {f"layers.{index}.{path}": source for path, source in _layer_sources(config, index).items()}
        return sources


def _layer_sources(config: ModelConfig, index: int) -> dict[str, Source]:
    embed, hidden, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    num_kv_heads = config.num_key_value_heads
    group = config.num_attention_heads // num_kv_heads
    name = f"model.layers.{index}."

    def fuse_qkv(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        parts = [part.reshape(num_kv_heads, -1, head_dim, embed) for part in (q, k, v)]
        return np.concatenate(parts, axis=1)

    def split_heads(output: np.ndarray) -> np.ndarray:
        return output.reshape(embed, num_kv_heads, group, head_dim)

    def fuse_gate_up(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return np.stack([gate, up])

    q_size, kv_size = num_kv_heads * group * head_dim, num_kv_heads * head_dim
    attention, mlp = name + "self_attn.", name + "mlp."
    return {
        "input_norm.weight": take(name + "input_layernorm.weight", (embed,)),
        "attention.qkv": fuse(
            fuse_qkv,
            (attention + "q_proj.weight", (q_size, embed)),
            (attention + "k_proj.weight", (kv_size, embed)),
            (attention + "v_proj.weight", (kv_size, embed)),
        ),
        "attention.output": fuse(split_heads, (attention + "o_proj.weight", (embed, q_size))),
        "post_norm.weight": take(name + "post_attention_layernorm.weight", (embed,)),
        "mlp.gate_up": fuse(
            fuse_gate_up,
            (mlp + "gate_proj.weight", (hidden, embed)),
            (mlp + "up_proj.weight", (hidden, embed)),
        ),
        "mlp.down": take(mlp + "down_proj.weight", (embed, hidden)),
    }
