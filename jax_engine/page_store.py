"""PageStore: pages of preempted sequences, kept in host memory, and the two programs that copy them.

model_runner.py makes one where there is swap space, and hands it each schedule's copies. Who is swapped, and how much
fits, is decided by the scheduler. Nothing here waits: reading and writing pages are programs in the device's line, so
what is copied out is what all steps before have written, and what is copied in is there for all steps after.

On the way out a program only gathers the pages on the device; their way to the host goes on beside the steps that
follow. On the way in it cannot: XLA lets a transfer to the device begin when the programs before it have ended, as its
memory may be theirs until then.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jax_engine.kv_cache import KVCache
from jax_engine.schedule import Copies
from jax_engine.swap_space import COPY_PAGES

#: Groups that may wait on the device for their way to the host, of one schedule. Others are copied by the program that
#: gathers them, which holds up the steps after it, but needs room for one group only.
_MOST_BESIDE = 8


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
        here = _group_shardings(shapes)
        there = jax.tree.map(_in_host_memory, here)
        sizes = num_pages, shapes.pool.sharding.mesh.size
        group = jax.eval_shape(functools.partial(_read, *sizes), shapes, ids)
        group = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), group, there)
        cache = jax.tree.map(lambda shape: shape.sharding, shapes)
        write = jax.jit(functools.partial(_write, *sizes, here), out_shardings=cache, donate_argnums=0)
        self._there = there
        # Arrays of which other processes hold parts are moved by programs only.
        self._most_beside = _MOST_BESIDE if there != here and shapes.pool.sharding.is_fully_addressable else 0
        self._gather, self._read = (
            jax.jit(functools.partial(_read, *sizes), out_shardings=place).lower(shapes, ids).compile()
            for place in (here, there)
        )
        self._write = write.lower(shapes, group, ids).compile()

    def copy(self, cache: KVCache, copies: Copies) -> KVCache:
        """Enqueues a schedule's copies; the cache is donated and comes back."""
        for ticket in copies.dropped_tickets:
            del self._kept[ticket]
        num_beside = 0
        for ticket, _, pages in copies.swapped_out:
            groups = self._kept[ticket] = []
            for at in range(0, len(pages), COPY_PAGES):
                ids = self._put(self._ids(pages[at : at + COPY_PAGES]))
                if num_beside < self._most_beside:
                    groups.append(jax.device_put(self._gather(cache, ids), self._there))
                    num_beside += 1
                else:
                    groups.append(self._read(cache, ids))
        for ticket, first, pages in copies.swapped_in:
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


def _read(num_pages: int, num_devices: int, cache: KVCache, ids: Int[Array, " n"]) -> tuple[Array, Array]:
    """The pages of all layers [devices * L, n, ...], and their token ids [devices, n, page_size]."""
    pool, token_ids = _by_page(cache, num_pages, num_devices)
    return pool[:, ids], token_ids[:, ids]


def _write(num_pages: int, num_devices: int, here: Any, cache: KVCache, group: Any, ids: Int[Array, " n"]) -> KVCache:
    """The cache with a group's pages written to `ids`; an id past the end is dropped."""
    both = zip(_by_page(cache, num_pages, num_devices), jax.device_put(group, here), strict=True)
    pool, token_ids = (whole.at[:, ids].set(part, mode="drop") for whole, part in both)
    return dataclasses.replace(cache, pool=pool.reshape(cache.pool.shape), token_ids=token_ids.reshape(-1))


def _by_page(cache: KVCache, num_pages: int, num_devices: int) -> tuple[Array, Array]:
    """Pool and token ids with an axis of pages, the second; what the devices have lies side by side along the first."""
    pool = cache.pool.reshape(-1, num_pages, *cache.pool.shape[1:])
    return pool, cache.token_ids.reshape(num_devices, num_pages, -1)


def _group_shardings(shapes: KVCache) -> tuple[Any, Any]:
    """Where the two arrays of a group lie on the devices: each has its own part of a page."""
    mesh, spec = shapes.pool.sharding.mesh, shapes.pool.sharding.spec
    by_device = PartitionSpec(*spec[:1])
    return NamedSharding(mesh, by_device), NamedSharding(mesh, by_device)


def _in_host_memory(sharding: Any) -> Any:
    """The same in pinned host memory; on a CPU, whose memory is the host's, as it is."""
    device = next(iter(sharding.device_set))
    kinds = {memory.kind for memory in device.addressable_memories()}
    if device.platform == "cpu" or "pinned_host" not in kinds:
        return sharding
    return sharding.with_memory_kind("pinned_host")
