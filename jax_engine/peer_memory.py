"""The memory through which GPUs that hold one model add up without the host: each can write to that of the others.

model_runner.py makes it before the cache, which tells steps where it is; the kernel is pallas_kernels.all_reduce. On
other devices there is none, and XLA makes the sums.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int32

from jax_engine.sharding import TENSOR
from pallas_kernels import all_reduce

#: GPUs of a model up to which its steps take the kernel. For more it has been compiled, and has not run.
MOST_DEVICES = 2


def memory_bytes(mesh: Mesh) -> int:
    """Bytes that each of the devices keeps; 0 if they can have no such memory."""
    devices = list(mesh.devices.flat)
    if len({device.process_index for device in devices}) > 1:
        return 0
    return all_reduce.memory_bytes(mesh.size, devices[0].device_kind)


def peers_shape(mesh: Mesh) -> jax.ShapeDtypeStruct | None:
    """Of KVCache.peers on one of the devices; None if their steps do without."""
    return all_reduce.peers_shape(mesh.size) if mesh.size <= MOST_DEVICES and memory_bytes(mesh) else None


class PeerMemory:
    """The memory of all devices. To be kept as long as there are steps that were told where it is, for they write there
    without jax's knowledge.

    Args:
        mesh: devices that have such memory.
    """

    def __init__(self, mesh: Mesh):
        shape = (mesh.size, memory_bytes(mesh))
        own = NamedSharding(mesh, PartitionSpec(TENSOR))
        self._memory = jax.jit(lambda: jnp.zeros(shape, jnp.int8), out_shardings=own)()
        self._devices = list(mesh.devices.flat)

    def peers(self) -> Int32[np.ndarray, "entries 2"]:
        """KVCache.peers: what each device has to know, one below the other."""
        parts: dict[Any, Any] = {shard.device: shard.data for shard in self._memory.addressable_shards}
        addresses = [parts[device].unsafe_buffer_pointer() for device in self._devices]
        return np.concatenate([all_reduce.peers_table(addresses, rank) for rank in range(len(addresses))])


def open_peer_memory(mesh: Mesh) -> PeerMemory | None:
    """The memory of the devices of a mesh, where their steps do with it."""
    return PeerMemory(mesh) if peers_shape(mesh) else None
