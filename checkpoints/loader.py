"""Puts a checkpoint's weights on devices, or makes weights up. The engine calls it once, at start.

Host memory holds about one parameter at a time, and what is made of it: its tensors are mapped, or cast as they are
read, and the next is not touched before this one is in its place. What is to be quantised is quantised there, one
parameter at a time, so a device never holds more than one whole one. With model_runner.py this is the only code that
puts data on a device.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from checkpoints import orbax_io
from checkpoints.errors import CheckpointError
from checkpoints.formats import Checkpoint
from checkpoints.quantized_weight import SCALE, QuantizedWeight, parts, quantize
from checkpoints.weight_map import Quantization, Wanted, check, take

#: Standard deviation of made-up weights.
_DUMMY_SCALE = 0.02


def load(
    checkpoint: Checkpoint, wanted: Mapping[str, Wanted], *, ignore: Iterable[str] = (), progress: bool = True
) -> dict[str, Any]:
    """Checks that the checkpoint holds what is wanted, then reads it, parameter by parameter, to its place.

    An Orbax checkpoint holds assembled parameters, so there `source` and `ignore` have no part. What it holds in 8 bits
    is restored as it is; what it does not, and is wanted so, is read and quantised like any other.

    Args:
        ignore: name patterns of tensors that may be there though no parameter wants them; see weight_map.check.
        progress: draw a bar on standard error.

    Raises:
        CheckpointError: tensors are missing, mis-shaped or unexpected (all are named, before any device memory is
            taken), or a file cannot be read.

    Returns:
        Arrays, and a QuantizedWeight for what is wanted in 8 bits.
    """
    if checkpoint.format == "orbax":
        quantized = [name for name, want in wanted.items() if want.quantization is not None]
        if not quantized or any(name + SCALE in checkpoint.tensors for name in quantized):
            return _restore(checkpoint, wanted)
        wanted = {name: _whole(name, want) for name, want in wanted.items()}
    problems = check(wanted, checkpoint.tensors, ignore)
    if problems:
        raise CheckpointError([f"{checkpoint.path}: {p}" if p.startswith("tensor ") else p for p in problems])
    params = {}
    for name, want in tqdm(
        wanted.items(), desc="Loading weights", unit="parameter", disable=None if progress else True
    ):
        params[name] = _place(_assemble(checkpoint, name, want), want)
    return params


def _assemble(checkpoint: Checkpoint, name: str, want: Wanted) -> np.ndarray:
    tensors = [checkpoint.tensors[tensor].read(want.dtype) for tensor, _ in want.source.tensors]
    array = want.source.assemble(*tensors)
    if want.arrange is not None:
        array = want.arrange(array)
    if array.shape != want.shape:
        raise CheckpointError(f"{checkpoint.path}: parameter {name}: shape must be {want.shape}, made {array.shape}")
    array = np.asarray(array, dtype=want.dtype, order="C")
    # On a CPU the device array is the host array itself: were that the mapped file, the weights would change with it.
    on_cpu = any(device.platform == "cpu" for device in want.sharding.device_set)
    return array.copy() if on_cpu and not array.flags.writeable else array


def _place(array: np.ndarray, want: Wanted) -> Any:
    # Waiting keeps the arrays of several parameters from piling up.
    placed = jax.block_until_ready(_put(array, want.sharding))
    if want.quantization is None:
        return placed
    return jax.block_until_ready(_quantize(want.quantization, want.sharding)(placed))


@functools.cache
def _quantize(how: Quantization, sharding: Any) -> Any:
    """A compiled function: array -> QuantizedWeight."""
    function = functools.partial(quantize, format=how.format, inputs=how.inputs)
    return jax.jit(function, out_shardings=QuantizedWeight(sharding, how.sharding))


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # Some devices are other processes': each process places its own devices' parts, and asks nobody.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _whole(name: str, want: Wanted) -> Wanted:
    """The same, from the one tensor that an Orbax checkpoint has of it."""
    return dataclasses.replace(want, source=take(name, want.stored_shape or want.shape))


def _restore(checkpoint: Checkpoint, wanted: Mapping[str, Wanted]) -> dict[str, Any]:
    stored = {
        name + suffix: _whole(name + suffix, part)
        for name, want in wanted.items()
        for suffix, part in parts(want).items()
    }
    problems = check(stored, checkpoint.tensors)
    if problems:
        raise CheckpointError([f"{checkpoint.path}: {p}" if p.startswith("tensor ") else p for p in problems])
    targets = {
        name: jax.ShapeDtypeStruct(w.stored_shape or w.shape, w.dtype, sharding=_stored_sharding(w))
        for name, w in stored.items()
    }
    params = orbax_io.restore(checkpoint.path, targets)
    for name, want in stored.items():
        if want.arrange is not None:
            params[name] = jax.jit(want.arrange, out_shardings=want.sharding)(params[name])
    return {
        name: params[name] if want.quantization is None else QuantizedWeight(params[name], params[name + SCALE])
        for name, want in wanted.items()
    }


def _stored_sharding(want: Wanted) -> Any:
    """Where a parameter is restored to: its place, or whole everywhere when it has yet to be arranged."""
    if want.arrange is None:
        return want.sharding
    return jax.sharding.NamedSharding(want.sharding.mesh, jax.sharding.PartitionSpec())


def dummy(wanted: Mapping[str, Wanted], seed: int) -> dict[str, Any]:
    """Made-up weights, drawn on the devices: normal with standard deviation 0.02, ones or zeros, as `Wanted.init` says.

    A parameter's values depend on the seed and its name and shape, and on nothing else; a quantised one's are these,
    quantised.
    """
    params = {}
    for name, want in wanted.items():
        # Placed where the parameter goes, for moving them there later would be a hidden transfer.
        place = want.sharding
        if isinstance(place, jax.sharding.NamedSharding):
            place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
        seeds = _put(np.array([seed & 0xFFFFFFFF, zlib.crc32(name.encode())], np.uint32), place)
        draw = _draw(tuple(want.shape), jnp.dtype(want.dtype), want.init, want.sharding, want.quantization)
        # One after the other where parameters are larger on the way than in their place.
        params[name] = draw(seeds) if want.quantization is None else jax.block_until_ready(draw(seeds))
    return params


@functools.cache
def _draw(shape: tuple[int, ...], dtype: jnp.dtype, init: str, sharding: Any, how: Quantization | None) -> Any:
    """A compiled function: uint32 [2] -> parameter. One per shape, so that a model's layers share it."""

    def values(seeds: jax.Array) -> jax.Array:
        if init == "ones":
            return jnp.ones(shape, dtype)
        if init == "zeros":
            return jnp.zeros(shape, dtype)
        key = jax.random.fold_in(jax.random.key(seeds[0]), seeds[1])
        return (_DUMMY_SCALE * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    if how is None:
        return jax.jit(values, out_shardings=sharding)

    def draw(seeds: jax.Array) -> QuantizedWeight:
        return quantize(values(seeds), how.format, how.inputs)

    return jax.jit(draw, out_shardings=QuantizedWeight(sharding, how.sharding))
