"""Sums over the GPUs that hold one model, as kernels that a CUDA graph can hold."""

from pallas_kernels.all_reduce.api import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    Peers as Peers,
    all_reduce as all_reduce,
    all_reduce_add_norm as all_reduce_add_norm,
    memory_bytes as memory_bytes,
    peers_shape as peers_shape,
    peers_table as peers_table,
    takes_rows as takes_rows,
)
