"""TokenizerFiles: the tokenizer that lies with a checkpoint, its chat template, and which ids begin and end a text.

Opened by formats.py; read by the engine's tokenizer. Nothing is loaded before it is asked for.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoints import gguf_tokenizer
from checkpoints.errors import CheckpointError
from checkpoints.gguf_io import GgufFile

_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_GGUF_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer not yet loaded.

    Attributes:
        path: the folder or file it comes from.
        chat_template: jinja source, or None.
        special_tokens: bos_token, eos_token, pad_token and unk_token, those there are -> their text.
        eos_token_ids: ids the files name as ends of text (GGUF; a Hugging Face folder names texts only).
    """

    path: Path
    chat_template: str | None
    special_tokens: Mapping[str, str]
    eos_token_ids: tuple[int, ...] = ()
    gguf: GgufFile | None = field(default=None, repr=False)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None where there is no tokenizer. Raises CheckpointError where there is one that cannot be loaded."""
        if self.gguf is not None:
            return gguf_tokenizer.build(self.gguf.metadata, self.path)
        file = self.path / "tokenizer.json" if self.path.is_dir() else self.path
        if not file.is_file():
            if (self.path / "tokenizer.model").is_file():
                raise CheckpointError(
                    f"{self.path}: holds tokenizer.model but no tokenizer.json; only that is supported"
                )
            return None
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
        # Files written by training scripts may cut or pad every text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def special_id(self, name: str) -> int | None:
        """The id of the special token of that name, such as `bos_token`."""
        text = self.special_tokens.get(name)
        return None if text is None or self.tokenizer is None else self.tokenizer.token_to_id(text)


def from_path(path: Path) -> TokenizerFiles:
    """The tokenizer in a folder, or in a tokenizer.json; for a GGUF file there is from_gguf.

    Raises:
        CheckpointError: one of the JSON files is damaged.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "tokenizer_config.json")
    special = read_json(folder / "special_tokens_map.json")
    special = {name: _token_text(config.get(name) or special.get(name)) for name in _SPECIAL_NAMES}
    return TokenizerFiles(path, _chat_template(folder, config), {k: v for k, v in special.items() if v is not None})


def from_gguf(file: GgufFile) -> TokenizerFiles:
    """The tokenizer in a GGUF file's metadata."""
    metadata = file.metadata
    tokens = metadata.get("tokenizer.ggml.tokens", [])

    def valid(name: str) -> int | None:
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(token_id) is not int or not isinstance(tokens, list) or not 0 <= token_id < len(tokens):
            return None
        return token_id if isinstance(tokens[token_id], str) else None

    ids = {key: i for key in (*_GGUF_SPECIAL.values(), "eot", "eom") if (i := valid(key)) is not None}
    special = {name: tokens[ids[key]] for name, key in _GGUF_SPECIAL.items() if key in ids}
    ends = tuple(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if key in ids))
    template = metadata.get("tokenizer.chat_template")
    return TokenizerFiles(file.path, template if isinstance(template, str) else None, special, ends, file)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _token_text(value: Any) -> str | None:
    """Tokens are written as a string, or as an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Of chat_template.jinja, chat_template.json, tokenizer_config.json: the first there is."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
    template = read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
