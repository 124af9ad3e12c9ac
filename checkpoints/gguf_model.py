"""What a GGUF file's metadata and tensors mean: a Hugging Face config, Hugging Face names, rows in Hugging Face order.

Called by formats.py. Supported architectures are those of _ARCHITECTURES; others are refused with a list of these.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.gguf_io import GgufFile
from checkpoints.tensors import TensorInfo


@dataclass(frozen=True)
class _Architecture:
    """Attributes: interleaved_rope: q and k rows are stored permuted for interleaved RoPE (llama.cpp's `permute`)."""

    class_name: str
    model_type: str
    interleaved_rope: bool


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", "llama", True),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2", False),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3", False),
}

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

#: Divisors of the RoPE frequencies; carried by the config instead.
_ROPE_FACTORS = "rope_freqs.weight"


def read_config(file: GgufFile) -> dict[str, Any]:
    """The file's metadata as a Hugging Face config.

    Raises:
        CheckpointError: the architecture is not supported, or keys are missing or of no use; all are named.
    """
    architecture = _architecture(file)
    prefix = file.metadata["general.architecture"]
    _refuse_unsupported(file, prefix)
    keys = _Keys(file, prefix)
    hidden_size, num_heads = keys.size("embedding_length"), keys.size("attention.head_count")
    head_dim = keys.size("attention.key_length", hidden_size // num_heads or None)
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": _vocab_size(file, keys.problems),
        "hidden_size": hidden_size,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if keys.problems:
        raise CheckpointError(keys.problems)
    scaling = _rope_scaling(file, prefix, config["rope_theta"], head_dim)
    return config | ({"rope_scaling": scaling} if scaling else {})


class _Keys:
    """Reads an architecture's metadata keys and gathers what is wrong with them."""

    def __init__(self, file: GgufFile, prefix: str):
        self.file, self.prefix = file, prefix
        self.problems: list[str] = []

    def size(self, key: str, default: int | None = None) -> int:
        value = self.file.metadata.get(f"{self.prefix}.{key}", default)
        if type(value) is int and 0 < value < 2**31:
            return value
        self.problems.append(f"{self.file.path}: {self.prefix}.{key} must be a positive integer, got {str(value)[:80]}")
        return 1

    def number(self, key: str, default: float) -> float:
        value = self.file.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        self.problems.append(f"{self.file.path}: {self.prefix}.{key} must be a positive number, got {str(value)[:80]}")
        return default


def _vocab_size(file: GgufFile, problems: list[str]) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        return embedding.shape[0]
    problems.append(f"{file.path}: tensor token_embd.weight: missing, or not a matrix")
    return 0


def _architecture(file: GgufFile) -> _Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {str(name)[:80]!r} is not supported in GGUF; supported: "
            + ", ".join(_ARCHITECTURES)
        )
    return _ARCHITECTURES[name]


def _refuse_unsupported(file: GgufFile, prefix: str) -> None:
    if file.metadata.get(f"{prefix}.expert_count"):
        raise CheckpointError(f"{file.path}: mixtures of experts are not supported in GGUF; use safetensors")
    parts = file.metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{file.path}: one of {parts} parts; merge them into one file first (llama-gguf-split --merge)"
        )


def _rope_scaling(file: GgufFile, prefix: str, theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = file.metadata.get(f"{prefix}.rope.scaling.type", "none")
    if kind != "none":
        return {"rope_type": kind, "factor": file.metadata.get(f"{prefix}.rope.scaling.factor", 1.0)}
    if _ROPE_FACTORS not in file.tensors:
        return None
    stored = np.asarray(file.tensors[_ROPE_FACTORS].read(), np.float32).reshape(-1)
    # GGUF keeps only the divisors Llama 3's rule leads to. Its inputs other than the factor are the same in every
    # Llama 3 release, so they are put in, and the rule must lead back to the stored divisors.
    scaling = {
        "rope_type": "llama3",
        "factor": float(stored.max()) if stored.size else 1.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = _llama3_divisors(theta, head_dim, scaling)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise CheckpointError(f"{file.path}: tensor {_ROPE_FACTORS}: not the frequency scaling of a Llama 3 model")
    return scaling


def _llama3_divisors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """By how much Llama 3's rule divides each RoPE frequency: float32 [head_dim // 2]."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)


def read_tensors(file: GgufFile, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The tensors under their Hugging Face names; one that has none keeps its own, to be reported as unexpected.

    Raises:
        CheckpointError: query or key rows that are no whole heads.
    """
    heads: dict[str, int] = {}
    if _architecture(file).interleaved_rope:
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, TensorInfo] = {}
    problems = []
    for name, info in file.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        match = _LAYER_TENSOR.fullmatch(name)
        hf_name, num_heads = _GLOBAL_NAMES.get(name, name), None
        if match and match[2] in _LAYER_NAMES:
            hf_name = f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
            num_heads = heads.get(match[2])
        if num_heads and info.shape[0] % (2 * num_heads):
            problems.append(f"{file.path}: tensor {name}: {info.shape[0]} rows are no even share of {num_heads} heads")
        reader = functools.partial(_read_unpermuted, info, num_heads) if num_heads else info.reader
        tensors[hf_name] = replace(info, name=hf_name, reader=reader)
    if problems:
        raise CheckpointError(problems)
    return tensors


def _read_unpermuted(info: TensorInfo, num_heads: int, dtype: np.dtype | None) -> np.ndarray:
    return unpermute(info.read(dtype), num_heads)


def unpermute(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Query or key rows [N * H, ...] from interleaved-RoPE order to the rotate-half order of Hugging Face.

    Within each head, row 2 i + j of the stored order is row j * H / 2 + i of the result.
    """
    half = array.shape[0] // num_heads // 2
    pairs = array.reshape(num_heads, half, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
