"""Checkpoints of this project's own: parameters as the model holds them, written and restored by Orbax.

A folder holds `parameters/` (Orbax), config.json, generation_config.json, the tokenizer's files, and last of all
MARKER_NAME with the format's version and every parameter's shape and type. formats.py opens one, loader.py restores
it. Importing this module imports neither jax nor orbax; writing and restoring do.
"""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.tensors import TensorInfo
from checkpoints.tokenizer_files import TokenizerFiles, read_json

MARKER_NAME = "jax_engine_checkpoint.json"
FORMAT_VERSION = 1

_PARAMETERS = "parameters"


def save(
    folder: str | Path,
    params: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    tokenizer_files: TokenizerFiles | None = None,
) -> None:
    """Writes a checkpoint: into a temporary folder beside `folder`, renamed at the end, so that it is whole or absent.

    Args:
        params: parameter path -> jax or numpy array.
        tokenizer_files: those of the checkpoint the parameters came from.

    Raises:
        CheckpointError: the folder is there already, or cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; name a new folder")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        _write_parameters(temporary / _PARAMETERS, params)
        _write_json(temporary / "config.json", config)
        if generation_config:
            _write_json(temporary / "generation_config.json", generation_config)
        if tokenizer_files is not None:
            _write_tokenizer(temporary, tokenizer_files)
        shapes = {name: {"shape": list(value.shape), "dtype": str(value.dtype)} for name, value in params.items()}
        _write_json(temporary / MARKER_NAME, {"format_version": FORMAT_VERSION, "parameters": shapes})
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_parameters(folder: Path, params: Mapping[str, Any]) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, dict(params))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(dict(value), file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _write_tokenizer(folder: Path, files: TokenizerFiles) -> None:
    if files.tokenizer is not None:
        files.tokenizer.save(str(folder / "tokenizer.json"))
    template = {} if files.chat_template is None else {"chat_template": files.chat_template}
    _write_json(folder / "tokenizer_config.json", {**files.special_tokens, **template})


def read_marker(folder: Path) -> dict[str, TensorInfo]:
    """The parameters of a checkpoint, none of them read.

    Raises:
        CheckpointError: the marker is damaged or of another version, or the parameters are missing.
    """
    path = folder / MARKER_NAME
    marker = read_json(path)
    version = marker.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}")
    if not (folder / _PARAMETERS).is_dir():
        raise CheckpointError(f"{folder / _PARAMETERS}: missing")
    parameters = marker.get("parameters")
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{path}: parameters must be an object, got {type(parameters).__name__}")
    tensors = {}
    for name, entry in parameters.items():
        try:
            shape, dtype = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: tensor {name}: needs shape and dtype, got {entry!r}") from error
        reader = functools.partial(_read, folder, name)
        tensors[name] = TensorInfo(name, shape, dtype, str(folder), reader)
    return tensors


def _read(folder: Path, name: str, dtype: np.dtype | None) -> np.ndarray:
    """One parameter, as the file has it or cast."""
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            folder / _PARAMETERS,
            args=ocp.args.PyTreeRestore(
                item={name: 0}, partial_restore=True, restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)}
            ),
        )
    return restored[name] if dtype is None else restored[name].astype(dtype, copy=False)


def restore(folder: Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters, straight to their places.

    Args:
        targets: parameter path -> jax.ShapeDtypeStruct with the sharding; a type other than the stored one casts.

    Raises:
        CheckpointError: Orbax cannot read its files.
    """
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder / _PARAMETERS, dict(targets))
    except Exception as error:  # orbax and tensorstore raise what they will for damaged files
        raise CheckpointError(f"{folder / _PARAMETERS}: cannot be restored: {error}") from error
