"""Causal attention of a ragged batch over a paged KV pool: contract, reference, implementations, named cases."""

from pallas_kernels.ragged_paged_attention.api import Plan, Ragged, plan, pool_shape, ragged_paged_attention, write_kv
from pallas_kernels.ragged_paged_attention.implementation import Device

__all__ = ["Device", "Plan", "Ragged", "plan", "pool_shape", "ragged_paged_attention", "write_kv"]
