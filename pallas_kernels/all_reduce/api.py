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

from pallas_kernels.add_norm import add_norm
from pallas_kernels.all_reduce import gpu, xla

IMPLEMENTATIONS = ("auto", "gpu", "xla")
#: jax's names of GPUs whose boards link all of them by NVLink: each can write to the others' memory.
LINKED = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
#: Bytes that a device sends, to all others together, up to which `auto` takes the kernel: it sends a sum's parts to
#: everybody, and each twice as large as it is. More is left to XLA, which adds up a share on each device.
MAX_SENT_BYTES = 2 << 20

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
    _check(implementation, peers, gpu.supports(x), f"{gpu.ALLOWED}, and peers; got {x.dtype}, {x.shape}")
    if implementation == "gpu" or (implementation == "auto" and gpu.supports(x) and _is_small(x, axis, peers)):
        return gpu.all_reduce(x, peers)
    return xla.all_reduce(x, axis), peers


def takes_rows(x: Float[Array, "T D"], axis: str, peers: Peers | None) -> bool:
    """Whether all_reduce_add_norm is one kernel for such rows."""
    return _fits_rows(x, peers) and _is_small(x, axis, peers)


def all_reduce_add_norm(
    x: Float[Array, "T D"],
    part: Float[Array, "T D"],
    weight: Float[Array, " D"],
    axis: str,
    peers: Peers | None,
    *,
    eps: float,
    platform: str,
    implementation: str = "auto",
) -> tuple[Float[Array, "T D"], Float[Array, "T D"], Peers | None]:
    """add_norm of x and the sum of `part` over the devices, the same bits on each of them; and peers for the next sum.

    The kernel adds x to the sum before it rounds; xla.py rounds the sum as well.

    Args:
        axis, peers: see all_reduce. weight, eps, platform: see add_norm.
        implementation: `auto`: gpu.py where `takes_rows`, else xla.py; or either by name.

    Raises:
        ValueError: there is no such implementation, or it does not take the rows.
    """
    _check(implementation, peers, _fits_rows(x, peers), f"{gpu.ALLOWED_ROWS}, and peers; got {x.dtype}, {x.shape}")
    if implementation == "gpu" or (implementation == "auto" and takes_rows(x, axis, peers)):
        return gpu.all_reduce_add_norm(x, part, weight, peers, eps)
    return *add_norm(x, xla.all_reduce(part, axis), weight, eps=eps, platform=platform), peers


def _fits_rows(x: Any, peers: Peers | None) -> bool:
    return peers is not None and gpu.supports_rows(x, peers.shape[0] - 2)


def _is_small(x: Any, axis: str, peers: Peers | None) -> bool:
    return peers is not None and (jax.lax.axis_size(axis) - 1) * x.size * x.dtype.itemsize <= MAX_SENT_BYTES


def _check(implementation: str, peers: Any, fits: bool, message: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    if implementation == "gpu" and (peers is None or not fits):
        raise ValueError(f"{message} and {'no peers' if peers is None else 'peers'}; take 'xla'")
