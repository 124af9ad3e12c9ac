"""How a model's parameters are made of a checkpoint's tensors, and whether the two fit together.

The models write Sources down, loader.py follows them. Nothing here reads a tensor or touches a device.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from checkpoints.tensors import TensorInfo


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from.

    Attributes:
        tensors: names and expected shapes of the checkpoint's tensors.
        assemble: gets their arrays in this order, which it must not write to; returns the parameter's array.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    assemble: Callable[..., np.ndarray]


@dataclass(frozen=True)
class Quantization:
    """How a parameter is kept in 8 bits; see quantized_weight.py.

    Attributes:
        format: `int8` or `fp8`.
        inputs: how many of the last dimensions a product sums over; the others are its outputs.
        sharding: where the scales go, one for each output.
    """

    format: str
    inputs: int
    sharding: Any


@dataclass(frozen=True)
class Wanted:
    """One parameter of the model.

    Attributes:
        shape: of the assembled parameter. dtype: the checkpoint's values are cast to it.
        sharding: a jax.sharding.Sharding: where it goes.
        source: how it is read. init: what it holds when weights are made up instead of read.
        arrange: from what `source` makes, or an Orbax checkpoint holds, of shape `stored_shape`, to the parameter;
            takes numpy and jax arrays. None: they are the same.
        quantization: None: it stays as it is.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: Any
    source: Source
    init: Literal["normal", "ones", "zeros"] = "normal"
    stored_shape: tuple[int, ...] | None = None
    arrange: Callable[[Any], Any] | None = None
    quantization: Quantization | None = None


def take(name: str, shape: tuple[int, ...]) -> Source:
    """The tensor as it is."""
    return Source(((name, tuple(shape)),), _identity)


def transpose(name: str, shape: tuple[int, ...]) -> Source:
    """A linear layer's weight, stored [out, in] = `shape`, as [in, out]."""
    return Source(((name, tuple(shape)),), np.transpose)


def fuse(combine: Callable[..., np.ndarray], *tensors: tuple[str, tuple[int, ...]]) -> Source:
    """`combine(*arrays)` of several tensors, each given by name and shape, such as a concatenation of q, k and v."""
    return Source(tuple((name, tuple(shape)) for name, shape in tensors), combine)


def _identity(array: np.ndarray) -> np.ndarray:
    return array


def check(wanted: Mapping[str, Wanted], tensors: Mapping[str, TensorInfo], ignore: Iterable[str] = ()) -> list[str]:
    """Every missing, mis-shaped and unexpected tensor, one message each; empty when the two fit.

    Args:
        ignore: name patterns (`*` matches anything) of tensors that may be there though no parameter wants them.
    """
    problems = []
    used = set()
    for parameter, want in wanted.items():
        for name, shape in want.source.tensors:
            used.add(name)
            info = tensors.get(name)
            if info is None:
                problems.append(f"tensor {name}: missing; parameter {parameter} is made of it")
            elif info.shape != shape:
                problems.append(f"{info.file}: tensor {name}: shape must be {shape}, got {info.shape}")
    patterns = tuple(ignore)
    for name, info in tensors.items():
        if name not in used and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            problems.append(f"{info.file}: tensor {name}: unexpected; the model has no place for it")
    return problems
