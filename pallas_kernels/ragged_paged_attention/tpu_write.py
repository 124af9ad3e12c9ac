"""The kernel that writes a step's keys and values into the pool, in place, for TPUs.

Called by tpu.py. The unit is a tile row group of one page: all heads, some consecutive rows. One new token is one row
of such a unit, and no DMA can write a single row of a packed tile, so each unit is fetched, changed and sent back, four
at a time in flight. No two units of a step are the same place: two rows never write to one page.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_BUFFERS = 4


@dataclass(frozen=True)
class _Kind:
    """Units of one kind, those of decode rows or those of longer rows, and the buffers for them.

    Attributes:
        count: how many there are.
        pages: [n], page of a unit in its layer. groups: [n], which group of rows of the page.
        firsts, ends: [n], rows of the unit that are new.
        new: [n, K, parts, 1 or rows, lanes]: one row for a decode row, for the others the unit as it shall be.
    """

    count: jax.Array
    pages: jax.Array
    groups: jax.Array
    firsts: jax.Array
    ends: jax.Array
    new: jax.Array
    new_buffer: jax.Array
    new_sems: jax.Array


def write_kernel(pool, scalars, kinds, *, rows):
    """Returns the pool with the units written; the pool's buffer is reused.

    Args:
        pool: [pages, K, parts, page_size, lanes].
        scalars: first_page [1] int32.
        kinds: for each kind (count [1], pages, groups, firsts, ends, new), as in _Kind.
        rows: rows of a unit; it divides the page size.
    """
    _, heads, parts, _, lanes = pool.shape
    flat = [scalars, *(array for kind in kinds for array in kind[:5])]
    new = [kind[5] for kind in kinds]
    unit = (heads, parts, rows, lanes)
    scratch = [
        pltpu.VMEM((_BUFFERS, *unit), pool.dtype),
        pltpu.SemaphoreType.DMA((_BUFFERS,)),
        pltpu.SemaphoreType.DMA((_BUFFERS,)),
    ]
    for array in new:
        scratch += [pltpu.VMEM((_BUFFERS, *array.shape[1:]), pool.dtype), pltpu.SemaphoreType.DMA((_BUFFERS,))]
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    moved = sum(array.size + 2 * array.shape[0] * heads * parts * rows * lanes for array in new) * pool.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, len(kinds), rows),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(flat),
            grid=(),
            in_specs=[hbm] * (len(new) + 1),
            out_specs=hbm,
            scratch_shapes=scratch,
        ),
        input_output_aliases={len(flat) + len(new): 0},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),  # the work list's pages are clipped
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        name="write_kv",
    )(*flat, *new, pool)


def _kernel(num_kinds, rows, first_page, *refs: Any):
    scalars, refs = refs[: 5 * num_kinds], refs[5 * num_kinds :]
    new, (_, pool, units, fetched, sent, *buffers) = refs[:num_kinds], refs[num_kinds:]
    for index in range(num_kinds):
        count, *places = scalars[5 * index : 5 * index + 5]
        own: list[Any] = [*places, new[index], *buffers[2 * index : 2 * index + 2]]
        _write_all(_Kind(count[0], *own), pool, first_page[0], units, fetched, sent, rows)


def _write_all(kind: _Kind, pool, first_page, units, fetched, sent, rows):
    """Fetch, change, send back. At turn i unit i is changed, and unit i + 2 sent for into the place of unit i - 2."""
    ahead = _BUFFERS // 2

    def place(index):
        page = first_page + kind.pages[index]
        if rows == pool.shape[3]:
            return pool.at[page]
        return pool.at[page, :, :, pl.ds(kind.groups[index] * rows, rows)]

    def copy_in(index):
        slot = lax.rem(index, _BUFFERS)
        return (
            pltpu.make_async_copy(place(index), units.at[slot], fetched.at[slot]),
            pltpu.make_async_copy(kind.new.at[index], kind.new_buffer.at[slot], kind.new_sems.at[slot]),
        )

    def copy_out(index):
        slot = lax.rem(index, _BUFFERS)
        return pltpu.make_async_copy(units.at[slot], place(index), sent.at[slot])

    def fetch(index):
        @pl.when(index < kind.count)
        def _():
            for copy in copy_in(index):
                copy.start()

    def turn(index, _):
        pl.when(index >= ahead)(lambda: copy_out(index - ahead).wait())
        fetch(index + ahead)
        _wait_fetched(copy_in(index))
        slot = lax.rem(index, _BUFFERS)
        old = units[slot]
        row = lax.broadcasted_iota(jnp.int32, old.shape, 2)
        is_new = (row >= kind.firsts[index]) & (row < kind.ends[index])
        units[slot] = _choose(is_new, jnp.broadcast_to(kind.new_buffer[slot], old.shape), old)
        copy_out(index).start()

    for index in range(ahead):
        fetch(jnp.int32(index))
    lax.fori_loop(0, kind.count, turn, None)
    for back in range(ahead, 0, -1):
        pl.when(kind.count >= back)(lambda back=back: copy_out(kind.count - back).wait())


def _choose(is_new, new, old):
    """A core has no selection among bytes: they become words on the way, which loses nothing."""
    if old.dtype.itemsize > 1:
        return jnp.where(is_new, new, old)
    return jnp.where(is_new, new.astype(jnp.float32), old.astype(jnp.float32)).astype(old.dtype)


def _wait_fetched(copies):
    for copy in copies:
        copy.wait()
