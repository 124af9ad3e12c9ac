"""Safetensors files: the header read and checked against the file's length, the tensors mapped when asked for.

Called by formats.py. The header is checked here, and not by the safetensors library, because all problems of all
shards have to be reported at once and before any tensor is read. Format: 8 bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, then the data, which the tensors tile without holes.
"""

import json
import math
import struct
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.tensors import TensorInfo, map_bytes

INDEX_NAME = "model.safetensors.index.json"

#: The format's own bound on its header.
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 16

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def open_folder(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder: of model.safetensors, else of the index's shards, else of every *.safetensors.

    Raises:
        CheckpointError: a shard is missing or a file damaged; every problem is named.
    """
    problems: list[str] = []
    expected: dict[str, str] = {}
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif (folder / INDEX_NAME).is_file():
        expected = _read_index(folder / INDEX_NAME)
        files = [folder / name for name in sorted(set(expected.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    tensors = _open_files(files, problems)
    for name, shard in expected.items():
        where = tensors.get(name)
        if where is None and not any(str(folder / shard) in problem for problem in problems):
            problems.append(f"{folder / shard}: tensor {name}: missing, though {INDEX_NAME} places it here")
    if problems:
        raise CheckpointError(problems)
    return tensors


def _open_files(files: Iterable[Path], problems: list[str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        try:
            found = read_header(path)
        except CheckpointError as error:
            problems.extend(error.problems)
            continue
        for name, info in found.items():
            if name in tensors:
                problems.append(f"{path}: tensor {name}: also in {tensors[name].file}")
            tensors[name] = info
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not an index of shards: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must name a file for each tensor, got {type(weight_map).__name__}")
    problems = [
        f"{path}: tensor {name}: the shard must be a *.safetensors file in the same folder, got {shard!r}"
        for name, shard in weight_map.items()
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or {"/", "\\", "\0"} & set(shard)
    ]
    if problems:
        raise CheckpointError(problems)
    return weight_map


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, none of them read.

    Raises:
        CheckpointError: the file is missing, cut, or its header contradicts itself or the file's length.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start, header = _read_json(path, file, size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    problems: list[str] = []
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        problem = _entry_problem(entry, size - start)
        if problem:
            problems.append(f"{path}: tensor {name}: {problem}")
            continue
        begin, end = entry["data_offsets"]
        spans.append((begin, end, name))
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        reader = partial(_read, path, start + begin, end - begin, dtype, shape)
        tensors[name] = TensorInfo(name, shape, dtype.name, str(path), reader)
    problems += [] if problems else _tiling_problems(path, spans, size - start)
    if problems:
        raise CheckpointError(problems)
    return tensors


def _read_json(path: Path, file: Any, size: int) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the header."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: its header claims {length} bytes, but {size - 8} follow: cut, or not a safetensors file"
        )
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header must be a JSON object, got {type(header).__name__}")
    return 8 + length, header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry_problem(entry: Any, data_size: int) -> str | None:
    if not isinstance(entry, dict):
        return f"its header entry must be an object, got {type(entry).__name__}"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return f"dtype {dtype!r} is not supported; supported: {', '.join(_DTYPES)}"
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        return f"shape must be at most {_MAX_DIMENSIONS} sizes, got {str(shape)[:80]}"
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets must be a begin and an end, got {str(offsets)[:80]}"
    if offsets[1] > data_size:
        return f"lies at bytes {offsets[0]} to {offsets[1]} of {data_size} bytes of data: the file is cut or damaged"
    wanted = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        return f"{dtype} of shape {shape} takes {wanted} bytes, but its header gives it {offsets[1] - offsets[0]}"
    return None


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _tiling_problems(path: Path, spans: list[tuple[int, int, str]], data_size: int) -> list[str]:
    problems = []
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            problems.append(f"{path}: tensor {name}: begins at byte {begin} of the data, expected {reached}")
        reached = max(reached, end)
    if reached != data_size and not problems:
        problems.append(f"{path}: {data_size - reached} bytes after the last tensor belong to none")
    return problems


def _read(
    path: Path, offset: int, length: int, stored: np.dtype, shape: tuple[int, ...], dtype: np.dtype | None
) -> np.ndarray:
    array = map_bytes(path, offset, length).view(stored).reshape(shape)
    return array if dtype is None else array.astype(dtype, copy=False)
