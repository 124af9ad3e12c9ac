"""Logical axes to mesh axes: the one table that says how weights and cache are laid over devices."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, TENSOR = "data", "tensor"

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


def make_mesh(devices: Sequence[Any]) -> Mesh:
    """A (data, tensor) mesh with all devices on the tensor axis."""
    return Mesh(np.array(devices).reshape(1, -1), (DATA, TENSOR))


def sharding_of(axes: Sequence[str | None], mesh: Mesh) -> NamedSharding:
    """The placement of an array whose dimensions have these logical axes."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in axes)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
