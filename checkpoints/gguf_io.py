"""GGUF files: metadata and tensor table read and checked against the file's length, the tensors decoded when asked for.

Called by gguf_model.py and gguf_tokenizer.py; knows nothing of what a model's metadata or tensors mean. Types, block
sizes and dequantisation are the gguf package's. The header is walked here because gguf.GGUFReader trusts the counts it
reads, so that a damaged file can take all memory, and needs seconds where this takes a tenth of one.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from checkpoints.errors import CheckpointError
from checkpoints.tensors import TensorInfo, map_bytes

_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
#: Values that are decoded in one go: bounds what a large tensor takes beside its result.
_VALUES_AT_ONCE = 1 << 20
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)
_SCALARS = {
    int(GGUFValueType.UINT8): "<u1",
    int(GGUFValueType.INT8): "<i1",
    int(GGUFValueType.UINT16): "<u2",
    int(GGUFValueType.INT16): "<i2",
    int(GGUFValueType.UINT32): "<u4",
    int(GGUFValueType.INT32): "<i4",
    int(GGUFValueType.FLOAT32): "<f4",
    int(GGUFValueType.BOOL): "?",
    int(GGUFValueType.UINT64): "<u8",
    int(GGUFValueType.INT64): "<i8",
    int(GGUFValueType.FLOAT64): "<f8",
}


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        metadata: key -> int, float, bool, str, or a list of these.
        tensors: under the file's own names; shapes in Hugging Face order (GGUF stores them reversed).
    """

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)


def read_header(path: Path) -> GgufFile:
    """Reads metadata and tensor table; takes memory in proportion to the header's true length only.

    Raises:
        CheckpointError: not a GGUF file, cut, or its header contradicts itself or the file's length.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(path, data).header()
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


class _Walk:
    """A cursor over the header, which looks at the bytes left before it takes or allocates anything."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.size = path, data, len(data)
        self.at = 0

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem} (byte {self.at} of {self.size})")

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.fail(f"{what} takes {count} bytes, {self.size - self.at} are left: cut or damaged")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error}") from error

    def header(self) -> GgufFile:
        if self.take(4, "the magic number") != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file: its first four bytes are not 'GGUF'")
        version = self.number("I", "the version")
        if version not in _VERSIONS:
            raise self.fail(f"GGUF version must be one of {_VERSIONS}, little-endian; got {version}")
        num_tensors = self.number("Q", "the tensor count")
        num_keys = self.number("Q", "the key count")
        left = self.size - self.at
        # Least bytes of a tensor entry (name length, dimension count, type, offset) and of a key (length, type, value).
        if num_tensors * 24 > left or num_keys * 13 > left:
            raise self.fail(f"{num_tensors} tensors and {num_keys} keys do not fit into the {left} bytes left")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string("a metadata key")
            if key in metadata:
                raise self.fail(f"metadata key {key!r} occurs twice")
            metadata[key] = self.value(self.number("I", f"the type of {key!r}"), f"metadata {key!r}")
        entries = [self.entry() for _ in range(num_tensors)]
        return GgufFile(self.path, metadata, self.place(entries, self.alignment(metadata)))

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            return self.scalars(kind, 1, what)[0]
        if kind != _ARRAY:
            raise self.fail(f"{what} has the unknown type {kind}")
        kind, count = self.number("I", what), self.number("Q", what)
        if kind in _SCALARS:
            return self.scalars(kind, count, what)
        if kind != _STRING:
            raise self.fail(f"{what} is an array of type {kind}; allowed are arrays of numbers and strings")
        if count * 8 > self.size - self.at:
            raise self.fail(f"{what} claims {count} strings, {self.size - self.at} bytes are left")
        return [self.string(what) for _ in range(count)]

    def scalars(self, kind: int, count: int, what: str) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype).tolist()

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor's name")
        num_dims = self.number("I", f"tensor {name}")
        if not 1 <= num_dims <= _MAX_DIMENSIONS:
            raise self.fail(f"tensor {name}: {num_dims} dimensions; 1 to {_MAX_DIMENSIONS} are allowed")
        dims = struct.unpack(f"<{num_dims}Q", self.take(8 * num_dims, f"tensor {name}"))
        return name, dims[::-1], self.number("I", f"tensor {name}"), self.number("Q", f"tensor {name}")

    def alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment must be a power of two, got {alignment!r}")
        return alignment

    def place(self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, TensorInfo]:
        start = -(-self.at // alignment) * alignment
        problems: list[str] = []
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            problem = "occurs twice" if name in tensors else _problem(shape, kind, start + offset, self.size)
            if problem is None and offset % alignment:
                problem = f"offset {offset} is no multiple of the alignment {alignment}"
            if problem:
                problems.append(f"{self.path}: tensor {name}: {problem}")
                continue
            qtype = GGMLQuantizationType(kind)
            reader = functools.partial(_read, self.path, start + offset, shape, qtype)
            tensors[name] = TensorInfo(name, shape, qtype.name, str(self.path), reader)
        if problems:
            raise CheckpointError(problems)
        return tensors


def _num_bytes(shape: tuple[int, ...], qtype: GGMLQuantizationType) -> int:
    block_size, block_bytes = GGML_QUANT_SIZES[qtype]
    return math.prod(shape) // block_size * block_bytes


@functools.cache
def _supported(kind: int) -> GGMLQuantizationType | None:
    """The type of that number if gguf can dequantise it, which only trying tells: a block of zeros is enough."""
    try:
        qtype = GGMLQuantizationType(kind)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[qtype][1]), np.uint8), qtype)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return qtype


def _problem(shape: tuple[int, ...], kind: int, begin: int, file_size: int) -> str | None:
    qtype = _supported(kind)
    if qtype is None:
        return f"its type, number {kind}, is not supported"
    block_size = GGML_QUANT_SIZES[qtype][0]
    if shape[-1] % block_size:
        return f"rows of {shape[-1]} values are no multiple of the {block_size} values of a {qtype.name} block"
    end = begin + _num_bytes(shape, qtype)
    if end > file_size:
        return f"{qtype.name} of shape {shape} lies at bytes {begin} to {end} of a file of {file_size}: cut or damaged"
    return None


def _read(
    path: Path, offset: int, shape: tuple[int, ...], qtype: GGMLQuantizationType, dtype: np.dtype | None
) -> np.ndarray:
    """float32, which stays memory-mapped if it is stored so, or `dtype`. Decoded and cast some rows at a time."""
    data = map_bytes(path, offset, _num_bytes(shape, qtype))
    dtype = np.dtype(np.float32) if dtype is None else dtype
    if data.size == 0:
        return np.empty(shape, dtype)
    data = data.reshape(math.prod(shape[:-1]), -1)
    if qtype == GGMLQuantizationType.F32 and dtype == np.float32:
        return dequantize(data, qtype).reshape(shape)
    values = np.empty((len(data), shape[-1]), dtype)
    step = max(1, _VALUES_AT_ONCE // shape[-1])
    for first in range(0, len(data), step):
        values[first : first + step] = dequantize(data[first : first + step], qtype)
    return values.reshape(shape)
