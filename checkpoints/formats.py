"""open_checkpoint: from the name of a model to a Checkpoint whose every file has been found and checked.

The engine calls it once, at start. Nothing here reads a tensor, touches a device or imports jax; loader.py does.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from tokenizers import Tokenizer

from checkpoints import gguf_io, gguf_model, known_models, orbax_io, safetensors_io, tokenizer_files
from checkpoints.errors import CheckpointError
from checkpoints.tensors import TensorInfo
from checkpoints.tokenizer_files import TokenizerFiles, read_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_SMALL_FILES = ("*.json", "tokenizer*", "*.jinja")
#: Second copies of the weights in other layouts, which some repositories carry.
_HUB_IGNORED = ("*/*", "consolidated*")


@dataclass(frozen=True)
class Checkpoint:
    """An opened model.

    Attributes:
        path: the folder or file.
        config: in the style of a Hugging Face config.json, whatever the format.
        generation_config: the same for generation_config.json; empty where there is none.
        tensors: under their Hugging Face names; of an Orbax checkpoint, under the paths of the parameters.
        tokenizer_files: the tokenizer and what belongs to it.
    """

    path: Path
    format: Literal["safetensors", "gguf", "orbax"]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    tokenizer_files: TokenizerFiles = field(repr=False)

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer, loaded at the first call; None where the checkpoint has none.

        Raises:
            CheckpointError: there is one, but it is damaged or of a kind that is not supported.
        """
        return self.tokenizer_files.tokenizer

    @property
    def chat_template(self) -> str | None:
        """Source of the jinja template, or None."""
        return self.tokenizer_files.chat_template

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Texts of bos_token, eos_token, pad_token and unk_token: those there are."""
        return self.tokenizer_files.special_tokens

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: of the tokenizer, the config and the generation config, in this order."""
        ids = [self.tokenizer_files.special_id("eos_token"), *self.tokenizer_files.eos_token_ids]
        for config in (self.config, self.generation_config):
            value = config.get("eos_token_id")
            ids += value if isinstance(value, list) else [value]
        return tuple(dict.fromkeys(i for i in ids if _is_token_id(i)))

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, or None."""
        for token_id in (self.tokenizer_files.special_id("bos_token"), self.config.get("bos_token_id")):
            if _is_token_id(token_id):
                return token_id
        return None


def _is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def open_checkpoint(
    model: str, *, tokenizer: str | None = None, cache_dir: str | None = None, weights: bool = True
) -> Checkpoint:
    """Finds a model, fetching it if need be, and checks all its files; reads no tensor.

    Args:
        model: a name in KNOWN_MODELS, a folder (Hugging Face or Orbax), a .gguf file, or a Hugging Face id `org/name`.
        tokenizer: where the tokenizer is, if not with the model: named like a model, or a tokenizer.json.
        cache_dir: where fetched models are kept; by default the user's cache, and Hugging Face's own.
        weights: False leaves the tensors of a Hugging Face folder out, so that they need not be there.

    Raises:
        CheckpointError: there is no such model, or its files are missing or damaged; every problem is named.
    """
    path = _locate(model, cache_dir, weights)
    if path.is_dir():
        checkpoint = _open_folder(path, weights)
    elif path.suffix == ".gguf":
        checkpoint = _open_gguf(path)
    else:
        raise CheckpointError(f"{path}: not a model; looked for a folder or a file that ends in .gguf")
    if (known := known_models.KNOWN_MODELS.get(model)) is not None:
        checkpoint = replace(checkpoint, generation_config={**known.generation_config, **checkpoint.generation_config})
    if tokenizer is None:
        return checkpoint
    return replace(checkpoint, tokenizer_files=_open_tokenizer(tokenizer, cache_dir))


def _locate(model: str, cache_dir: str | None, weights: bool, what: str = "model") -> Path:
    if model in known_models.KNOWN_MODELS:
        return known_models.fetch(model, None if cache_dir is None else Path(cache_dir))
    path = Path(model).expanduser()
    if model and path.exists():
        return path.absolute()
    looked_for = f"a known model ({', '.join(known_models.KNOWN_MODELS)}), a folder or file {path.absolute()}"
    if not _HUB_ID.fullmatch(model) or path.suffix in (".gguf", ".json"):
        raise CheckpointError(f"{model!r} is not a {what}; looked for {looked_for}; it is no Hugging Face id either")
    patterns = [*_HUB_SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        folder = huggingface_hub.snapshot_download(
            model, allow_patterns=patterns, ignore_patterns=list(_HUB_IGNORED), cache_dir=cache_dir
        )
    except Exception as error:  # network, HTTP, access and disk errors share no base class
        raise CheckpointError(
            f"{model!r} is not a {what}; looked for {looked_for}, and for a Hugging Face repository, which failed: "
            f"{str(error).strip() or type(error).__name__}"
        ) from error
    return Path(folder)


def _open_folder(folder: Path, weights: bool) -> Checkpoint:
    is_orbax = (folder / orbax_io.MARKER_NAME).is_file()
    if not is_orbax:
        has_config = (folder / "config.json").is_file()
        has_weights = any(folder.glob("*.safetensors")) or (folder / safetensors_io.INDEX_NAME).is_file()
        if not has_config or (weights and not has_weights):
            raise CheckpointError(
                f"{folder}: not a model; looked for config.json ({'found' if has_config else 'missing'}) and "
                f"*.safetensors ({'found' if has_weights else 'missing'}), or for {orbax_io.MARKER_NAME} (Orbax)"
            )
    problems: list[str] = []
    config = _collect(problems, lambda: read_json(folder / "config.json"), {})
    generation_config = _collect(problems, lambda: read_json(folder / "generation_config.json"), {})
    files = _collect(problems, lambda: tokenizer_files.from_path(folder), None)
    tensors: Mapping[str, TensorInfo] = {}
    if is_orbax:
        tensors = _collect(problems, lambda: orbax_io.read_marker(folder), {})
    elif weights:
        tensors = _collect(problems, lambda: safetensors_io.open_folder(folder), {})
    if problems or files is None:
        raise CheckpointError(problems)
    return Checkpoint(folder, "orbax" if is_orbax else "safetensors", config, generation_config, tensors, files)


def _collect(problems: list[str], read: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return read()
    except CheckpointError as error:
        problems.extend(error.problems)
        return otherwise


def _open_gguf(path: Path) -> Checkpoint:
    file = gguf_io.read_header(path)
    config = gguf_model.read_config(file)
    files = tokenizer_files.from_gguf(file)
    generation_config = {"eos_token_id": list(files.eos_token_ids)} if files.eos_token_ids else {}
    return Checkpoint(path, "gguf", config, generation_config, gguf_model.read_tensors(file, config), files)


def _open_tokenizer(name: str, cache_dir: str | None) -> TokenizerFiles:
    path = _locate(name, cache_dir, weights=False, what="tokenizer")
    if path.suffix == ".gguf" and path.is_file():
        return tokenizer_files.from_gguf(gguf_io.read_header(path))
    if not ((path / "tokenizer.json").is_file() or (path.is_file() and path.suffix == ".json")):
        raise CheckpointError(
            f"{path}: no tokenizer; looked for a folder with tokenizer.json, or such a file, or a .gguf"
        )
    return tokenizer_files.from_path(path)
