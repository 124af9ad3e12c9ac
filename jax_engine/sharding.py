"""Logical axes to mesh axes: the one table that says how weights and cache are laid over devices.

model_runner.py asks it where each array goes; the layers know only the mesh axis (see layers/parallel.py). Nothing here
touches a device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_engine.errors import ConfigError
from jax_engine.model_config import ModelConfig

#: The mesh axis over which one model is split.
TENSOR = "tensor"

#: Logical axis of a weight -> mesh axis it is split over; None keeps it whole on every device.
RULES: dict[str | None, str | None] = {
    "embed": None,
    "vocab": TENSOR,
    "kv_heads": TENSOR,
    "heads": TENSOR,
    "group": None,
    "head_dim": None,
    "mlp": TENSOR,
    "gate_up": None,
    "expert": None,
    "expert_mlp": TENSOR,
    None: None,
}
#: What changes where experts are kept whole.
BY_EXPERT = {"expert": TENSOR, "expert_mlp": None}


def choose_devices(devices: Sequence[Any], size: int, replicas: int = 1) -> list[list[Any]]:
    """The first devices, `size` for each replica.

    Raises:
        ConfigError: there are not so many, or some of them belong to processes that would have none.
    """
    num_processes = len({device.process_index for device in devices})
    if num_processes > 1 and size != len(devices):
        raise ConfigError(
            f"tensor_parallel_size must be {len(devices)}, all devices of the {num_processes} processes; got {size}"
        )
    if size * replicas > len(devices):
        asked = f"tensor_parallel_size {size}" + (f" times data_parallel_size {replicas}" if replicas > 1 else "")
        raise ConfigError(f"{asked} needs as many devices; {len(devices)} found ({devices[0].platform})")
    return [list(devices[start : start + size]) for start in range(0, size * replicas, size)]


def make_mesh(devices: Sequence[Any]) -> Mesh:
    """The devices that hold one model between them."""
    return Mesh(np.array(devices), (TENSOR,))


def sharding_of(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, *, by_expert: bool = False
) -> NamedSharding:
    """The placement of an array whose dimensions have these logical axes; one that does not divide stays whole.

    Args:
        by_expert: whole experts on each device, rather than a part of every expert.
    """
    rules = ((RULES | BY_EXPERT if by_expert else RULES)[axis] for axis in axes)
    return NamedSharding(
        mesh,
        PartitionSpec(
            *(rule if rule and size % mesh.shape[rule] == 0 else None for rule, size in zip(rules, shape, strict=True))
        ),
    )


def side_by_side(arrays: Any, mesh: Mesh) -> Any:
    """The shapes of arrays of which each device has one of its own, as one array of which each device has its part."""
    own = NamedSharding(mesh, PartitionSpec(TENSOR))

    def place(array: Any) -> jax.ShapeDtypeStruct:
        first, *others = array.shape
        return jax.ShapeDtypeStruct((mesh.size * first, *others), array.dtype, sharding=own)

    return jax.tree.map(place, arrays)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def with_kv_copies(model: ModelConfig, num_devices: int) -> ModelConfig:
    """The model as it is laid out on `num_devices` devices, which may be more than it has kv heads.

    Each kv head is then held by several devices, each of which has its own share of the query heads that use it: the
    layout is that of a model with one kv head per device, some of them equal. Where heads do not divide the model stays
    as it is, and attention is not split at all.
    """
    copies = num_devices // model.num_key_value_heads
    group = model.num_attention_heads // model.num_key_value_heads
    if copies < 2 or num_devices % model.num_key_value_heads or group % copies:
        return model
    return dataclasses.replace(model, num_key_value_heads=num_devices)


def share_of(model: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The model as the cache of one device sees it: with the heads that are split off to it, or all."""
    heads, rest = divmod(model.num_key_value_heads, mesh.size)
    if not rest:
        model = dataclasses.replace(model, num_key_value_heads=heads)
    if model.delta is not None and model.delta.num_key_heads % mesh.size == 0:
        names = ("num_key_heads", "num_value_heads")
        share = {name: getattr(model.delta, name) // mesh.size for name in names}
        model = dataclasses.replace(model, delta=dataclasses.replace(model.delta, **share))
    return model


def copy_kv_heads(array: Any, axes: Sequence[str | None], stored: ModelConfig, placed: ModelConfig) -> Any:
    """A parameter of the model as stored -> that of `with_kv_copies`'s model; numpy or jax.

    Query heads are dealt out to the copies of their kv head, keys and values are repeated. A parameter that has no
    `kv_heads` axis comes back as it is.

    Args:
        axes: of the parameter, or of more: the scales of a quantised one have its first dimensions. `group` follows
            `kv_heads`: the query heads of a kv head; or these, one or more rows of each in turn, then key and value.
    """
    copies = placed.num_key_value_heads // stored.num_key_value_heads
    axes = axes[: array.ndim]
    if copies == 1 or "kv_heads" not in axes:
        return array
    xp = array.__array_namespace__()
    heads = axes.index("kv_heads")
    if "group" not in axes:
        return xp.repeat(array, copies, axis=heads)
    group = stored.num_attention_heads // stored.num_key_value_heads
    before, (_, size), after = array.shape[:heads], array.shape[heads : heads + 2], array.shape[heads + 2 :]
    whole = (slice(None),) * (heads + 1)
    parts = [
        array[(*whole, slice(start, start + group))].reshape(
            *before, placed.num_key_value_heads, group // copies, *after
        )
        for start in range(0, size if size == group else size - 2, group)
    ]
    if size > group:
        parts.append(xp.repeat(array[(*whole, slice(size - 2, size))], copies, axis=heads))
    return xp.concat(parts, axis=heads + 1)
