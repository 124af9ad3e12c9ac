"""A weight in 8 bits: values, and a scale for each output (docs/adr/0018).

loader.py makes one of a parameter that is declared as a factor of products, layers/linear.py multiplies with it. Both
formats are symmetric. Nothing here knows which weights a model has.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.tensors import TensorInfo
from checkpoints.weight_map import Wanted

#: Format -> type of the values, and the largest of them that is used.
FORMATS = {"int8": (np.dtype(np.int8), 127.0), "fp8": (jnp.dtype(jnp.float8_e4m3fn), 448.0)}
#: What a checkpoint of ours calls the scales of a parameter, after its name.
SCALE = ".scale"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """The weight is values * scale.

    Attributes:
        values: of the weight's shape, outputs before inputs; int8 or float8_e4m3fn.
        scale: float32, of the shape of the outputs.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return self.values.ndim


def quantize(weight: jax.Array, format: str, inputs: int) -> QuantizedWeight:
    """The nearest weight whose largest element of each output is the largest value of the format.

    Args:
        weight: float, outputs before inputs. inputs: how many of the last dimensions a product sums over.
    """
    dtype, limit = FORMATS[format]
    wide = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(-inputs, 0)))
    scale = jnp.where(largest > 0, largest / limit, 1)
    values = wide / scale.reshape(scale.shape + (1,) * inputs)
    values = jnp.round(values) if format == "int8" else values
    return QuantizedWeight(jnp.clip(values, -limit, limit).astype(dtype), scale)


def shapes(want: Wanted) -> Any:
    """What the parameter is on its devices: a jax.ShapeDtypeStruct with its place, or a QuantizedWeight of two."""
    quantized = want.quantization
    if quantized is None:
        return jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=want.sharding)
    dtype, _ = FORMATS[quantized.format]
    outputs = want.shape[: len(want.shape) - quantized.inputs]
    return QuantizedWeight(
        jax.ShapeDtypeStruct(want.shape, dtype, sharding=want.sharding),
        jax.ShapeDtypeStruct(outputs, jnp.float32, sharding=quantized.sharding),
    )


def split(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as a checkpoint of ours stores them: values and scales are entries of their own."""
    stored = {}
    for name, value in params.items():
        if isinstance(value, QuantizedWeight):
            stored |= {name: value.values, name + SCALE: value.scale}
        else:
            stored[name] = value
    return stored


def stored_format(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The format of a checkpoint's weights, or None if they are not quantised by us."""
    names = {str(dtype): name for name, (dtype, _) in FORMATS.items()}
    found = {names.get(info.dtype) for name, info in tensors.items() if name + SCALE in tensors}
    return found.pop() if len(found) == 1 else None


def parts(want: Wanted) -> dict[str, Wanted]:
    """The parameter as `split` has it: suffix of the name -> what is wanted under it."""
    if want.quantization is None:
        return {"": want}
    placed = shapes(want)
    inputs = want.quantization.inputs
    stored = want.stored_shape and want.stored_shape[: len(want.stored_shape) - inputs]
    values = dataclasses.replace(want, dtype=placed.values.dtype, quantization=None)
    scale = dataclasses.replace(
        values, shape=placed.scale.shape, dtype=placed.scale.dtype, sharding=placed.scale.sharding, stored_shape=stored
    )
    return {"": values, SCALE: scale}
