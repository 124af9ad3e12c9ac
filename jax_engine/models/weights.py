"""How the shared layers' parameters are made of Hugging Face tensors. The files in models/ build their maps of it.

Each function gives parameter path -> Source, for parameters below `path` and tensors whose names start with `name`.
"""

import functools

import numpy as np

from checkpoints.weight_map import Source, fuse, take
from jax_engine.model_config import ModelConfig


def vocabulary(config: ModelConfig, name: str = "model.") -> dict[str, Source]:
    """Embedding, last norm and head."""
    embed, vocab = config.hidden_size, config.vocab_size
    sources = {
        "embed.weight": take(name + "embed_tokens.weight", (vocab, embed)),
        "norm.weight": take(name + "norm.weight", (embed,)),
    }
    if not config.tie_word_embeddings:
        sources["lm_head.weight"] = take("lm_head.weight", (vocab, embed))
    return sources


def norm(path: str, name: str, config: ModelConfig, size: int | None = None) -> dict[str, Source]:
    """An RMSNorm."""
    return {f"{path}.weight": take(name + ".weight", (size or config.hidden_size,))}


def attention(
    path: str, name: str, config: ModelConfig, *, qk_norm: str | None = None, gated: bool = False
) -> dict[str, Source]:
    """Attention with separate q_proj, k_proj and v_proj; if gated, q_proj has each head's gate behind its query."""
    embed, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    parts = (("q_proj", 2 * q_size if gated else q_size), ("k_proj", kv_size), ("v_proj", kv_size))

    def join(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        if gated:
            pairs = q.reshape(config.num_key_value_heads, -1, 2, head_dim, *q.shape[1:])
            q = pairs.swapaxes(1, 2).reshape(q.shape)
        return join_heads(config, q, k, v)

    sources = {
        f"{path}.qkv": fuse(join, *((f"{name}{part}.weight", (size, embed)) for part, size in parts)),
        **attention_output(path, name + "o_proj", config),
    }
    if config.attention_bias:
        sources[f"{path}.qkv_bias"] = fuse(join, *((f"{name}{part}.bias", (size,)) for part, size in parts))
    if qk_norm == "all":
        for norm_name, size in (("q_norm", q_size), ("k_norm", kv_size)):
            shape = (config.num_key_value_heads, *(() if norm_name == "k_norm" else (-1,)), head_dim)
            by_head = functools.partial(np.reshape, shape=shape)
            sources[f"{path}.{norm_name}.weight"] = fuse(by_head, (f"{name}{norm_name}.weight", (size,)))
    elif qk_norm:
        sources |= norm(f"{path}.q_norm", name + "q_norm", config, head_dim)
        sources |= norm(f"{path}.k_norm", name + "k_norm", config, head_dim)
    return sources


def attention_output(path: str, name: str, config: ModelConfig) -> dict[str, Source]:
    """Attention's output product."""
    embed, num_kv_heads, head_dim = config.hidden_size, config.num_key_value_heads, config.head_dim

    def split(output: np.ndarray) -> np.ndarray:
        return output.reshape(embed, num_kv_heads, -1, head_dim)

    sources = {f"{path}.output": fuse(split, (name + ".weight", (embed, config.num_attention_heads * head_dim)))}
    if config.output_bias:
        sources[f"{path}.output_bias"] = take(name + ".bias", (embed,))
    return sources


def join_heads(config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[N * H, ...], [K * H, ...] and [K * H, ...] -> [K, group + 2, H, ...]: each KV head beside its query heads."""
    shape = (config.num_key_value_heads, -1, config.head_dim, *q.shape[1:])
    return np.concatenate([part.reshape(shape) for part in (q, k, v)], axis=1)


def gated_mlp(path: str, name: str, config: ModelConfig, hidden: int | None = None) -> dict[str, Source]:
    """A GatedMLP with separate gate_proj and up_proj."""
    embed, hidden = config.hidden_size, hidden or config.intermediate_size
    sources = {
        f"{path}.gate_up": fuse(
            _stack, (name + "gate_proj.weight", (hidden, embed)), (name + "up_proj.weight", (hidden, embed))
        ),
        f"{path}.down": take(name + "down_proj.weight", (embed, hidden)),
    }
    if config.mlp_bias:
        gate_up = ((name + "gate_proj.bias", (hidden,)), (name + "up_proj.bias", (hidden,)))
        sources |= {f"{path}.gate_up_bias": fuse(_stack, *gate_up)}
        sources |= {f"{path}.down_bias": take(name + "down_proj.bias", (embed,))}
    return sources


def experts(path: str, name: str, config: ModelConfig, parts: tuple[str, str, str]) -> dict[str, Source]:
    """The experts of a MoE with one tensor per expert and part.

    Args:
        parts: what a checkpoint calls gate, up and down.
    """
    assert config.moe is not None
    embed, hidden, numbers = config.hidden_size, config.moe.intermediate_size, range(config.moe.num_experts)
    gate, up, down = parts

    def stack_pairs(*arrays: np.ndarray) -> np.ndarray:
        return np.stack(arrays).reshape(-1, 2, hidden, embed)

    pairs = [(f"{name}experts.{i}.{part}.weight", (hidden, embed)) for i in numbers for part in (gate, up)]
    downs = [(f"{name}experts.{i}.{down}.weight", (embed, hidden)) for i in numbers]
    return {f"{path}.gate_up": fuse(stack_pairs, *pairs), f"{path}.down": fuse(_stack, *downs)}


def _stack(*arrays: np.ndarray) -> np.ndarray:
    return np.stack(arrays)
