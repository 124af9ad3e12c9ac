"""Keys and values of layers with a sliding window, kept for their window only, by slot (docs/adr/0015).

Each slot has a ring of pages in a pool of its own: the page of position p is number p // page_size modulo the ring's
length. A ring holds the window and the longest run of tokens that a step can add, so a step never overwrites what its
own tokens see.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from jax_engine.model_config import LayerConfig


class WindowCache(NamedTuple):
    """The pool of the layers that see all positions, and that of the layers with windows."""

    pages: Array
    rings: Array


def ring_table(slots: Int32[Array, " B"], max_pages: int, ring_pages: int) -> Int32[Array, "B P"]:
    """The page table of the rings: for each row's positions, page by page, where its slot's ring has them."""
    return slots[:, None] * ring_pages + jnp.arange(max_pages, dtype=jnp.int32) % ring_pages


def in_ring(cache: Any, layer: LayerConfig) -> bool:
    """Whether the layer's keys and values are in the rings."""
    return isinstance(cache, WindowCache) and layer.sliding_window is not None


def pool_of(cache: Any, layer: LayerConfig) -> Array:
    """The pool that holds the layer's keys and values."""
    if not isinstance(cache, WindowCache):
        return cache
    return cache.rings if in_ring(cache, layer) else cache.pages


def with_pool(cache: Any, layer: LayerConfig, pool: Array) -> Any:
    """The cache with that pool in its place."""
    if not isinstance(cache, WindowCache):
        return pool
    return cache._replace(rings=pool) if in_ring(cache, layer) else cache._replace(pages=pool)
