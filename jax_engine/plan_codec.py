"""What a step is made of, as bytes and back, for the processes that run the same steps. Called by group.py.

An order is nested named tuples and lists of numpy arrays and numbers. Nothing in a message names code: classes come
from a fixed table, and an array's type and size are checked before it is made. Knows no sockets and no jax.
"""

import math
from typing import Any, NamedTuple

import msgspec
import numpy as np

from jax_engine.batch import Adjustments, Batch
from jax_engine.buckets import Bucket
from jax_engine.constraints import Constraints
from jax_engine.schedule import Copies, PageCopy


class Sampling(NamedTuple):
    """The order to sample a structured step, the last one sent. mask: see ModelRunner.sample."""

    batch: Batch
    mask: np.ndarray


#: What a process may be told to do.
Order = Batch | Sampling | Copies
_CLASSES = {kind.__name__: kind for kind in (Batch, Bucket, Adjustments, Constraints, Sampling, Copies, PageCopy)}
_DTYPES = {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64"}


class PlanError(Exception):
    """A message that is no order."""


def encode(order: Order) -> bytes:
    """The order as a message."""
    return msgspec.msgpack.encode(_plain(order))


def decode(message: bytes) -> Order:
    """The order in a message.

    Raises:
        PlanError: it holds none.
    """
    try:
        order = _restore(msgspec.msgpack.decode(message))
    except (msgspec.DecodeError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise PlanError(f"not an order: {error}") from error
    if not isinstance(order, Order):
        raise PlanError(f"must be a Batch, a Sampling or Copies, got {type(order).__name__}")
    return order


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.name, "shape": list(value.shape), "data": np.ascontiguousarray(value).data}
    if type(value).__name__ in _CLASSES:
        return {"class": type(value).__name__, "fields": [_plain(field) for field in value]}
    if isinstance(value, list):
        return list(map(_plain, value))
    if value is None or isinstance(value, bool | int):
        return value
    raise TypeError(f"an order holds arrays, numbers, lists and named tuples of them; got {type(value).__name__}")


def _restore(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, list):
        return list(map(_restore, value))
    if "class" in value:
        return _CLASSES[value["class"]](*map(_restore, value["fields"]))
    shape = tuple(value["shape"])
    if value["dtype"] not in _DTYPES or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"array of type {value['dtype']!r} and shape {shape}")
    array = np.frombuffer(value["data"], value["dtype"])
    if array.size != math.prod(shape):
        raise ValueError(f"{array.size} values for shape {shape}")
    return array.reshape(shape)
