"""The tokenizer in a GGUF file's metadata, as a `tokenizers.Tokenizer`. Called by tokenizer_files.py.

Byte-level BPE only (`tokenizer.ggml.model` = gpt2); any other kind is refused with a clear error. The splitting
patterns are those of the Hugging Face tokenizers that the names in `tokenizer.ggml.pre` stand for.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from checkpoints.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "gpt2": "gpt2",
    "smollm": "smollm",
    "llama-bpe": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "qwen2": "qwen2",
}
#: llama.cpp's default where the file does not say whether a prompt begins with BOS.
_ADDS_BOS = frozenset({"llama-bpe"})


def build(metadata: dict[str, Any], path: Path) -> Tokenizer | None:
    """None where the file holds no tokenizer.

    Raises:
        CheckpointError: a kind of tokenizer that is not supported, or lists that do not fit together.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        return None
    if model != "gpt2":
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model {str(model)[:80]!r} is not supported; supported: gpt2 (byte-level BPE). "
            "Give the model's Hugging Face tokenizer instead"
        )
    named = metadata.get("tokenizer.ggml.pre", "default")
    pre = _PRE_TOKENIZERS.get(named) if isinstance(named, str) else None
    if pre is None:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre {str(named)[:80]!r} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens, types, merges = (_list(metadata, path, key, kind) for key, kind in _LISTS.items())
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens must be distinct, each with a token_type")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        bpe = BPE(dict(zip(tokens, range(len(tokens)), strict=True)), pairs, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library raises plain Exception and TypeError
        raise CheckpointError(f"{path}: tokenizer.ggml.merges do not fit its tokens: {error}") from error
    tokenizer = Tokenizer(bpe)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    added = [(t, kind) for t, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(text, special=kind == _CONTROL, normalized=False) for text, kind in added])
    tokenizer.post_processor = _post_processor(metadata, pre, tokens)
    return tokenizer


_LISTS = {"tokenizer.ggml.tokens": str, "tokenizer.ggml.token_type": int, "tokenizer.ggml.merges": str}


def _list(metadata: dict[str, Any], path: Path, key: str, kind: type) -> list[Any]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise CheckpointError(f"{path}: {key} must be a list of {kind.__name__}")
    return values


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    numbers = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
    split = pre_tokenizers.Split(Regex(_WORDS + numbers + _REST), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _post_processor(metadata: dict[str, Any], pre: str, tokens: list[str]) -> processors.PostProcessor:
    """Puts BOS before and EOS after a text, where the file says so."""

    def special(name: str, default: bool) -> list[tuple[str, int]]:
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        wanted = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        if wanted is not True or type(token_id) is not int or not 0 <= token_id < len(tokens):
            return []
        return [(tokens[token_id], token_id)]

    bos, eos = special("bos", pre in _ADDS_BOS), special("eos", False)
    template = [*(text for text, _ in bos), "$A", *(text for text, _ in eos)]
    byte_level = processors.ByteLevel(trim_offsets=False)
    if len(template) == 1:
        return byte_level
    around = processors.TemplateProcessing(single=template, special_tokens=list(dict.fromkeys(bos + eos)))
    return processors.Sequence([byte_level, around])
