"""What a device can do at most, beside which the figures of benchmarks are read."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

#: Of the array that is copied: larger than any cache, smaller than what is left beside a model.
COPIED_BYTES = 1 << 30
ROUNDS, COPIES = 3, 10


class Peak(NamedTuple):
    """By the vendor's data sheet: bytes of memory per second, and dense bfloat16 operations per second."""

    bytes_per_s: float
    operations_per_s: float


#: By jax's name of the device.
PEAKS = {"NVIDIA H100 80GB HBM3": Peak(3.35e12, 989e12), "NVIDIA H200": Peak(4.8e12, 989e12)}


def copy_bytes_per_s() -> float:
    """Bytes per second, read and written together, of the best of some copies on the default device."""
    copy = jax.jit(jnp.copy)
    source = jax.jit(lambda: jnp.ones(COPIED_BYTES // 4, jnp.int32))()
    copy(source).block_until_ready()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(COPIES):
            copied = copy(source)
        copied.block_until_ready()
        best = min(best, (time.perf_counter() - start) / COPIES)
    return 2 * COPIED_BYTES / best
