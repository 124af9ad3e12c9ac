"""The contract of all_reduce, and the choice of who fulfils it.

Called by a model's layers, under `jax.shard_map`, wherever each device has a part of a sum. On GPUs that can write to
each other's memory gpu.py is used for sums that are small enough, elsewhere xla.py.

Axis letters: n devices.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.all_reduce import gpu, xla

IMPLEMENTATIONS = ("auto", "gpu", "xla")
#: jax's names of GPUs whose boards link all of them by NVLink: each can write to the others' memory.
LINKED = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
#: Bytes that a device sends, to all others together, up to which `auto` takes the kernel: it sends a sum's parts to
#: everybody, and each twice as large as it is. More is left to XLA, which adds up a share on each device.
MAX_SENT_BYTES = 4 << 20

#: What the kernel has to know of the devices' memory, n + 2 entries; see peers_table. Each device has its own.
Peers = Int32[Array, "entries 2"]


def memory_bytes(num_devices: int, device_kind: str) -> int:
    """Bytes of memory, zeros at first, that each device keeps for the kernel; 0 if these devices are not for it.

    Args:
        device_kind: jax's name of the devices, which are of one host and one process.
    """
    return gpu.memory_bytes(num_devices) if num_devices > 1 and device_kind in LINKED else 0


def peers_shape(num_devices: int) -> jax.ShapeDtypeStruct:
    """Of what the kernel on one device has to know."""
    return jax.ShapeDtypeStruct((num_devices + 2, 2), jnp.int32)


def peers_table(addresses: Sequence[int], rank: int) -> Int32[np.ndarray, "entries 2"]:
    """The same itself: numbers of 64 bits, of which jax has none, as pairs.

    Args:
        addresses: of all devices' memory, in the order of the mesh axis. rank: of the device among them.
    """
    return np.array([*addresses, rank, addresses[rank]], np.uint64).view(np.int32).reshape(-1, 2)


def all_reduce(
    x: Float[Array, "*shape"], axis: str, peers: Peers | None, *, implementation: str = "auto"
) -> tuple[Float[Array, "*shape"], Peers | None]:
    """The sum of x over the devices of a mesh axis, the same bits on each of them; and peers for the next sum.

    The kernel adds up in float32, in the order of the devices; how XLA does it is XLA's choice. It communicates behind
    the compiler's back, so it needs nothing of the host and may be in a CUDA graph, but sums must be made one after the
    other: of two sums of which neither needs the other's result, one has to take the peers that the other returns.

    Args:
        axis: all devices of the program; see jax.lax.psum.
        peers: this device's, for the kernel; None where there is no memory for it.
        implementation: `auto`: gpu.py where there are peers and it takes the array, else xla.py; or either by name.

    Raises:
        ValueError: there is no such implementation, or it does not take the array.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    if implementation == "gpu" and (peers is None or not gpu.supports(x)):
        raise ValueError(f"{gpu.ALLOWED}, and peers; got {x.dtype}, {x.shape} and {_kind(peers)}; take 'xla'")
    if peers is None or implementation == "xla" or not gpu.supports(x):
        return xla.all_reduce(x, axis), peers
    others = jax.lax.axis_size(axis) - 1
    if implementation == "auto" and others * x.size * x.dtype.itemsize > MAX_SENT_BYTES:
        return xla.all_reduce(x, axis), peers
    return gpu.all_reduce(x, peers)


def _kind(peers: Any) -> str:
    return "no peers" if peers is None else f"peers {peers.shape}"
