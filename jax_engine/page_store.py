"""PageStore: pages of preempted sequences, kept in host memory, and the two programs that copy them.

model_runner.py makes one where there is swap space, and hands it each schedule's copies. Who is swapped, and how much
fits, is decided by the scheduler. Nothing here waits: a copy is one more program in the device's line, so a page that
is copied out holds what all steps before have written, and one that is copied in is there for all steps after.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jax_engine.kv_cache import KVCache
from jax_engine.schedule import Schedule
from jax_engine.swap_space import COPY_PAGES


class PageStore:
    """Groups of COPY_PAGES pages by ticket; in pinned host memory where the platform has it.

    Args:
        shapes: the cache's arrays, with their shardings. num_pages: pages of a layer.
        put: uploads host arrays.
    """

    def __init__(self, shapes: KVCache, num_pages: int, put: Callable[[Any], Any]):
        self.num_pages = num_pages
        self._put = put
        self._kept: dict[int, list[Any]] = {}
        self._no_page = np.full(COPY_PAGES, num_pages, np.int32)
        ids = put(self._no_page)
        here = _group_shardings(shapes, ids.sharding)
        there = jax.tree.map(_in_host_memory, here)
        group = jax.eval_shape(functools.partial(_read, num_pages), shapes, ids)
        group = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), group, there)
        read = jax.jit(functools.partial(_read, num_pages), out_shardings=there)
        write = jax.jit(functools.partial(_write, num_pages, here), donate_argnums=0)
        self._read = read.lower(shapes, ids).compile()
        self._write = write.lower(shapes, group, ids).compile()

    def copy(self, cache: KVCache, schedule: Schedule) -> KVCache:
        """Enqueues a schedule's copies; the cache is donated and comes back."""
        for ticket in schedule.dropped_tickets:
            del self._kept[ticket]
        for ticket, _, pages in schedule.swapped_out:
            self._kept[ticket] = [
                self._read(cache, self._put(self._ids(pages[at : at + COPY_PAGES])))
                for at in range(0, len(pages), COPY_PAGES)
            ]
        for ticket, first, pages in schedule.swapped_in:
            # The first of them may have been found in the prefix cache; they are kept, but not copied.
            targets = [self.num_pages] * first + pages
            for number in range(first // COPY_PAGES, -(-len(targets) // COPY_PAGES)):
                ids = self._ids(targets[number * COPY_PAGES : (number + 1) * COPY_PAGES])
                cache = self._write(cache, self._kept[ticket][number], self._put(ids))
        return cache

    def _ids(self, pages: list[int]) -> np.ndarray:
        """The pages as a full group; one past the end stands for none."""
        ids = self._no_page.copy()
        ids[: len(pages)] = pages
        return ids


def _read(num_pages: int, cache: KVCache, ids: Int[Array, " n"]) -> tuple[Array, Array]:
    """The pages of all layers [L, n, ...], and their token ids [n, page_size]."""
    return _by_layer(cache.pool, num_pages)[:, ids], cache.token_ids.reshape(num_pages, -1)[ids]


def _write(num_pages: int, here: Any, cache: KVCache, group: Any, ids: Int[Array, " n"]) -> KVCache:
    """The cache with a group's pages written to `ids`; an id past the end is dropped."""
    pool, token_ids = jax.device_put(group, here)
    new_pool = _by_layer(cache.pool, num_pages).at[:, ids].set(pool, mode="drop")
    new_ids = cache.token_ids.reshape(num_pages, -1).at[ids].set(token_ids, mode="drop")
    return KVCache(new_pool.reshape(cache.pool.shape), new_ids.reshape(-1), cache.last_tokens)


def _by_layer(pool: Array, num_pages: int) -> Array:
    return pool.reshape(-1, num_pages, *pool.shape[1:])


def _group_shardings(shapes: KVCache, replicated: Any) -> tuple[Any, Any]:
    """Where the two arrays of a group lie on the device: over the devices as the pool is."""
    pool = shapes.pool.sharding
    spec = PartitionSpec(None, None, *pool.spec[1:])
    return NamedSharding(pool.mesh, spec), replicated


def _in_host_memory(sharding: Any) -> Any:
    """The same in pinned host memory; on a CPU, whose memory is the host's, as it is."""
    device = next(iter(sharding.device_set))
    kinds = {memory.kind for memory in device.addressable_memories()}
    if device.platform == "cpu" or "pinned_host" not in kinds:
        return sharding
    return sharding.with_memory_kind("pinned_host")
