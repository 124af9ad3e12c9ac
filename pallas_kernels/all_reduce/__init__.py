"""Sums over the GPUs that hold one model, as a kernel that a CUDA graph can hold."""

from pallas_kernels.all_reduce.api import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    Peers as Peers,
    all_reduce as all_reduce,
    memory_bytes as memory_bytes,
    peers_shape as peers_shape,
    peers_table as peers_table,
)
