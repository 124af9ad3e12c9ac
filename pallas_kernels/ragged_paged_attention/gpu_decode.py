"""Decode attention on Hopper: rows of one query token over the paged pool, in Mosaic GPU.

Flash-decoding (a row's KV is cut into pieces whose results are merged by their log-sum-exp) in a persistent kernel:
each thread block walks its share of a list of items (row, piece, kv head) that was planned once per step. A memory
warpgroup fetches key and value tiles page by page with the copy engine and runs ahead of the compute warpgroup, also
from one item into the next, so the fetches never drain. The query heads of a kv head are padded to the 64 rows of a
matrix instruction; the kernel is bound by memory, so the padding is free.

Tiles of a pool of 8 bits pass through a third warpgroup, which converts them into a second pair of buffers.

Who finishes the last piece of a row, as a counter tells, merges all of them in their order: no bit depends on whom.

Called by gpu.py only. How a row is cut depends on its own length and on compiled sizes, never on its neighbours.
"""

# The types of plgpu's own names are not to be had: it exports some of them lazily.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_counters import is_last
from pallas_kernels.ragged_paged_attention.gpu_tiles import (
    LOG2E,
    MASKED,
    WARPGROUP_ROWS,
    Tiles,
    add_values,
    cap_scores,
    clear_unwritten,
    exponent,
    packed_transforms,
    product_dtype,
    swizzle,
    transforms,
    update_softmax,
)
from pallas_kernels.ragged_paged_attention.implementation import Options

COMPUTE, MEMORY, CONVERT = 0, 1, 2
#: Of each thread of the warpgroup that converts; it starts with 168, a third of what there is.
CONVERT_REGISTERS = 232
#: Units of cost of a tile under all kv heads. Were there fewer than heads, a share could not begin at every one of
#: them, and some workers would get several items while others get none.
_TILE_COST = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeWork:
    """The decode rows of a step, cut into pieces and shared out.

    Attributes:
        rows: [D, 4] int32: KV length (0: no decode row), pieces, tiles per piece, pieces of the rows before.
        shares: [workers + 1, 2] int32: where each worker's share starts: row, and how far into the row in units of
            cost, of which a tile has _TILE_COST, all kv heads together.
    """

    rows: jax.Array
    shares: jax.Array


def max_splits(num_rows: int, max_tiles: int, tiles: Tiles) -> int:
    """Most pieces a row of a step with `num_rows` decode rows can have."""
    wanted = max(tiles.split_rows // num_rows, -(-max_tiles // tiles.max_piece), 1)
    return min(wanted, max_tiles, tiles.max_splits)


def plan_decode(lens: jax.Array, max_len: int, tiles: Tiles) -> DecodeWork:
    """Cuts the rows; lens [D] int32, at most max_len. See DecodeWork."""
    num_rows = lens.shape[0]
    most = max_splits(num_rows, -(-max_len // tiles.block), tiles)
    num_tiles = -(-lens // tiles.block)
    wanted = jnp.maximum(max(tiles.split_rows // num_rows, 1), -(-num_tiles // tiles.max_piece))
    piece = -(-num_tiles // jnp.clip(wanted, 1, most))
    splits = jnp.maximum(-(-num_tiles // jnp.maximum(piece, 1)), 1)
    cost = splits * item_cost(piece)
    ends = jnp.cumsum(cost)
    worker = jnp.arange(tiles.num_workers, dtype=jnp.int32)
    each, rest = ends[-1] // tiles.num_workers, ends[-1] % tiles.num_workers
    start = each * worker + rest * worker // tiles.num_workers
    row = jnp.searchsorted(ends, start, side="right", method="compare_all").astype(jnp.int32)
    shares = jnp.stack([row, start - (ends - cost)[row]], axis=-1)
    end = jnp.array([[num_rows, 0]], jnp.int32)
    rows = jnp.stack([lens, splits, piece, jnp.cumsum(splits) - splits], axis=-1)
    return DecodeWork(rows.astype(jnp.int32), jnp.concatenate([shares.astype(jnp.int32), end]))


def item_cost(piece):
    """Of a piece of so many tiles; what an item costs beside them is worth about one."""
    return (piece + 1) * _TILE_COST


class _Item(NamedTuple):
    """A piece of a row under one kv head: key tiles [begin, end)."""

    row: Any
    head: Any
    split: Any
    splits: Any
    length: Any
    begin: Any
    end: Any


@dataclass(frozen=True)
class _Sizes:
    """Everything static about one call."""

    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    max_splits: int
    dtype: Any
    pool_dtype: Any
    out_dtype: Any
    options: Options
    tiles: Tiles

    @property
    def padded_group(self) -> int:
        """Query heads per kv head, rounded up to the 16 bytes that the copy engine moves of a float32 for each."""
        return -(-self.group // 4) * 4

    @property
    def part_rows(self) -> int:
        """Results of all pieces of a row under a kv head, rounded up to the rows of a shared-memory tile."""
        return -(-self.max_splits * self.padded_group // 8) * 8

    @property
    def staged_rows(self) -> int:
        """The same, rounded up to what a warpgroup copies at once."""
        return -(-self.group // 32) * 32

    @property
    def converts(self) -> bool:
        """Tiles arrive in another type than the tensor cores'."""
        return self.dtype != self.pool_dtype

    @property
    def fetched_stages(self) -> int:
        """Key and value tiles in flight."""
        if self.converts and self.head_dim <= 128:
            return 6
        return 4 if self.head_dim <= 128 else 2

    @property
    def stages(self) -> int:
        """Key and value tiles that the compute warpgroup reads from."""
        if not self.converts:
            return self.fetched_stages
        return 2 if self.head_dim <= 128 else 1


def decode(
    q: jax.Array, pool: jax.Array, table: jax.Array, work: DecodeWork, first_page, options: Options, tiles: Tiles
) -> jax.Array:
    """Attention of decode rows: q [D, N, H], table [D, P] -> [D, N, H]; zero where a row's length is 0."""
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, _, page_size, _ = pool.shape
    group = num_heads // num_kv_heads
    most = max_splits(num_rows, -(-table.shape[1] * page_size // tiles.block), tiles)
    dtype = product_dtype(q.dtype, pool.dtype)
    sizes = _Sizes(
        num_kv_heads, group, head_dim, page_size, most, dtype, pool.dtype, q.dtype, options._replace(sinks=None), tiles
    )
    sinks = options.sinks
    if sinks is not None:  # the copy engine moves whole 16 bytes
        sinks = jnp.pad(sinks, (0, -num_heads % 8))
    # Read in whole tiles, the last one as well.
    part_rows = num_rows * num_kv_heads * sizes.part_rows + WARPGROUP_ROWS
    cut = most > 1
    run = plgpu.kernel(
        functools.partial(_entry, sizes),
        out_type=(
            jax.ShapeDtypeStruct((num_rows, num_heads, head_dim), dtype),
            jax.ShapeDtypeStruct((part_rows, head_dim), dtype) if cut else None,
            jax.ShapeDtypeStruct((part_rows,), jnp.float32) if cut else None,
        ),
        kernel_name="attention_decode",
        grid=(tiles.num_workers,),
        grid_names=("worker",),
        num_threads=3 if sizes.converts else 2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    first = jnp.reshape(first_page, (1,)).astype(jnp.int32)
    counters = jnp.zeros(num_rows * num_kv_heads, jnp.int32) if cut else None
    out, *_ = run(q.astype(dtype), pool, table, work.rows, work.shares, first, sinks, counters)
    return lax.bitcast_convert_type(out, q.dtype)


class _Arrays(NamedTuple):
    """Arrays in device memory.

    Given: those of `decode`, and counters [D * K] int32, how many pieces of a row are done under a kv head. Made: out
    [D, N, H], bits of the queries' dtype. In between, where rows may be cut: of each (row, kv head, piece), one after
    the other, the results of its query heads in parts [., H] and the base-2 logarithms of their weights in lse [.].
    """

    q: Any
    pool: Any
    table: Any
    rows: Any
    shares: Any
    first_page: Any
    sinks: Any
    counters: Any
    out: Any
    parts: Any
    lse: Any


def _entry(sizes: _Sizes, *refs):
    """Allocates shared memory and barriers, then runs the warpgroups."""
    arrays = _Arrays(*refs)
    rows, block, width = WARPGROUP_ROWS, sizes.tiles.block, sizes.head_dim
    layout = transforms(width)
    copies = max(block // sizes.page_size, 1)
    # The interpreter's way needs the probabilities in shared memory; the other has no use for them.
    p = None if sizes.tiles.registers else plgpu.SMEM((rows, block), sizes.dtype, transforms=transforms(block))

    def tiles(stages: int, dtype, layout: tuple, arrivals: int) -> "_Tiles":
        buffer = plgpu.SMEM((stages, block, width), dtype, transforms=layout)
        full, free = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages), plgpu.Barrier(num_barriers=stages)
        return _Tiles(buffer, buffer, full, full, free, free)

    def run(fetched, own, *scratch):
        memory = _Shared(fetched, own or fetched, *scratch)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == MEMORY)(lambda: _fetch(sizes, arrays, memory))
        pl.when(warpgroup == COMPUTE)(lambda: _compute(sizes, arrays, memory))
        if sizes.converts:
            pl.when(warpgroup == CONVERT)(lambda: _convert(sizes, arrays, memory))

    pl.run_scoped(
        run,
        tiles(sizes.fetched_stages, sizes.pool_dtype, packed_transforms(width) if sizes.converts else layout, copies),
        tiles(sizes.stages, sizes.dtype, layout, 1) if sizes.converts else None,
        plgpu.SMEM((sizes.staged_rows, width), sizes.dtype),
        plgpu.SMEM((rows, width), sizes.dtype, transforms=layout),
        plgpu.SMEM((rows, width), sizes.dtype),
        plgpu.SMEM((rows,), jnp.float32),
        p,
        None if arrays.sinks is None else plgpu.SMEM((arrays.sinks.shape[0] + rows,), arrays.sinks.dtype),
        plgpu.Barrier(),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=2),
        collective_axes="warpgroup",
    )


class _Tiles(NamedTuple):
    """Key and value tiles, and the barriers that hand them over."""

    k: Any
    v: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any

    def both(self) -> tuple[tuple, tuple]:
        """(tiles, full, free) of keys, and of values."""
        return (self.k, self.k_full, self.k_free), (self.v, self.v_full, self.v_free)


class _Shared(NamedTuple):
    """Shared memory of a thread block, and the barriers that hand its parts over.

    The copy engine fills `fetched`; the compute warpgroup reads `tiles`, which are the same ones unless the pool's type
    has to be converted. Queries come into `staging`: the copy engine writes the tensor cores' layout only by eight rows
    at multiples of eight, and the query heads of a kv head may be any number. Pieces that are merged come into `q`, the
    logarithms of their weights into `lse`; `loaded` hands over these, and before the first item the sinks.
    """

    fetched: _Tiles
    tiles: _Tiles
    staging: Any
    q: Any
    out: Any
    lse: Any
    p: Any
    sinks: Any
    q_full: Any
    q_free: Any
    loaded: Any


def _for_items(sizes: _Sizes, rows, shares, visit, carry):
    """visit(index, item, carry) -> carry for each item of this worker's share, in order."""
    heads, block, window = sizes.num_kv_heads, sizes.tiles.block, sizes.options.sliding_window
    worker = lax.axis_index("worker")
    num_rows = rows.shape[0]

    def locate(worker):
        """(row, item within the row, items before it) of the start of a worker's share."""
        row, ahead = shares[worker, 0], shares[worker, 1]
        real = jnp.minimum(row, num_rows - 1)
        splits, cost, before = rows[real, 1], item_cost(rows[real, 2]), rows[real, 3]
        item = jnp.where(row < num_rows, lax.div(ahead * heads + cost - 1, cost), splits * heads)
        return real, item, before * heads + item, splits * heads

    row, item, first, items_of_row = locate(worker)
    _, _, last, _ = locate(worker + 1)
    row, item = jnp.where(item < items_of_row, row, row + 1), jnp.where(item < items_of_row, item, 0)

    def body(index, state):
        row, item, carry = state
        length, splits, piece = rows[row, 0], rows[row, 1], rows[row, 2]
        split = lax.div(item, jnp.int32(heads))
        begin = split * piece
        end = jnp.minimum(begin + piece, lax.div(length + block - 1, jnp.int32(block)))
        if window is not None:
            begin = jnp.maximum(begin, lax.div(jnp.maximum(length - window, 0), jnp.int32(block)))
        work = _Item(row, lax.rem(item, jnp.int32(heads)), split, splits, length, begin, jnp.maximum(begin, end))
        carry = visit(index, work, carry)
        more = item + 1 < splits * heads
        return jnp.where(more, row, row + 1), jnp.where(more, item + 1, 0), carry

    return lax.fori_loop(0, last - first, body, (row, item, carry))[2]


def _fetch(sizes: _Sizes, arrays: _Arrays, memory: _Shared):
    """The memory warpgroup: queries and key and value tiles of all items, as fast as buffers come free."""
    plgpu.set_max_registers(40, action="decrease")
    block, page_size, stages, tiles = sizes.tiles.block, sizes.page_size, sizes.fetched_stages, memory.fetched
    first_page = arrays.first_page[0]
    size = min(block, page_size)

    def load(row, head, last_page, tile, step):
        stage = lax.rem(step, jnp.int32(stages))

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(tiles.k_free.at[stage])
            plgpu.barrier_wait(tiles.v_free.at[stage])

        for part in range(block // size):
            position = tile * block + part * size
            # Past the row's last page that page is read again, from the cache: the barrier counts copies.
            index = jnp.minimum(lax.div(position, jnp.int32(page_size)), last_page)
            page = first_page + arrays.table[row, index]
            inside = pl.ds(lax.rem(position, jnp.int32(page_size)), size) if size < page_size else slice(None)
            here = pl.ds(part * size, size)
            plgpu.copy_gmem_to_smem(
                arrays.pool.at[page, head, 0, inside], tiles.k.at[stage, here], tiles.k_full.at[stage]
            )
            plgpu.copy_gmem_to_smem(
                arrays.pool.at[page, head, 1, inside], tiles.v.at[stage, here], tiles.v_full.at[stage]
            )
        return step + 1

    def visit(index, item, carry):
        pl.when(index > 0)(lambda: plgpu.barrier_wait(memory.q_free))
        source = arrays.q.at[item.row, pl.ds(item.head * sizes.group, sizes.group)]
        plgpu.copy_gmem_to_smem(source, memory.staging.at[pl.ds(0, sizes.group)], memory.q_full)
        last_page = lax.div(item.length - 1, jnp.int32(page_size))
        step = lax.fori_loop(
            item.begin, item.end, lambda tile, step: load(item.row, item.head, last_page, tile, step), carry[0]
        )
        return step, index + 1

    steps, items = _for_items(sizes, arrays.rows, arrays.shares, visit, (jnp.int32(0), jnp.int32(0)))

    # Nobody may leave while arrivals are outstanding.
    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step):
        stage = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(tiles.k_free.at[stage])
        plgpu.barrier_wait(tiles.v_free.at[stage])

    pl.when(items > 0)(lambda: plgpu.barrier_wait(memory.q_free))


def _convert(sizes: _Sizes, arrays: _Arrays, memory: _Shared):
    """The third warpgroup: 8-bit tiles to the tensor cores' type."""
    plgpu.set_max_registers(CONVERT_REGISTERS, action="increase")
    source, target = memory.fetched, memory.tiles
    shape = (sizes.tiles.block, sizes.head_dim)
    layout = plgpu.Layout.SMEM_GMEM_COPY(shape, sizes.dtype, swizzle(sizes.head_dim))

    def convert(_, step):
        fetched, stage = (lax.rem(step, jnp.int32(stages)) for stages in (sizes.fetched_stages, sizes.stages))
        for (packed, full, free), (own, own_full, own_free) in zip(source.both(), target.both(), strict=True):
            plgpu.barrier_wait(full.at[fetched])
            numbers = plgpu.load(packed.at[fetched], layout=layout)
            pl.when(step >= sizes.stages)(lambda own_free=own_free: plgpu.barrier_wait(own_free.at[stage]))
            own[stage] = numbers.astype(sizes.dtype)
            plgpu.barrier_arrive(free.at[fetched])
            plgpu.commit_smem()
            plgpu.barrier_arrive(own_full.at[stage])
        return step + 1

    def visit(_, item, step):
        return lax.fori_loop(item.begin, item.end, convert, step)

    steps = _for_items(sizes, arrays.rows, arrays.shares, visit, jnp.int32(0))

    # Nobody may leave while arrivals are outstanding.
    @pl.loop(jnp.maximum(steps - sizes.stages, 0), steps)
    def _(step):
        stage = lax.rem(step, jnp.int32(sizes.stages))
        plgpu.barrier_wait(target.k_free.at[stage])
        plgpu.barrier_wait(target.v_free.at[stage])


def _compute(sizes: _Sizes, arrays: _Arrays, memory: _Shared):
    """The compute warpgroup: online softmax over each item's tiles, then its result to device memory."""
    plgpu.set_max_registers(232, action="increase")
    rows, width = WARPGROUP_ROWS, sizes.head_dim
    # What rows past the group hold does not matter: what comes of them is never stored.
    memory.q[...] = plgpu.layout_cast(jnp.zeros((rows, width), sizes.dtype), plgpu.Layout.WGMMA)
    own = pl.ds(0, sizes.staged_rows)
    if arrays.sinks is not None:
        _load_sinks(arrays, memory)
    copying = plgpu.Layout.SMEM_GMEM_COPY((sizes.staged_rows, width), sizes.dtype, swizzle(width))

    def visit(index, item, step):
        plgpu.barrier_wait(memory.q_full)
        memory.q[own] = plgpu.load(memory.staging, layout=copying)
        plgpu.commit_smem()
        plgpu.barrier_arrive(memory.q_free)
        statistic = plgpu.Layout.WGMMA.reduce(1)
        acc = plgpu.layout_cast(jnp.zeros((rows, width), jnp.float32), plgpu.Layout.WGMMA)
        top = plgpu.layout_cast(jnp.full((rows,), MASKED, jnp.float32), statistic)
        total = plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), statistic)
        acc, top, total, step = lax.fori_loop(
            item.begin,
            item.end,
            lambda tile, carry: _attend_tile(sizes, memory, item.length, tile, carry),
            (acc, top, total, step),
        )
        top = jnp.where(total > 0, top * exponent(sizes.options), MASKED)
        _finish(sizes, arrays, memory, item, _Sum(acc, top, total))
        return step

    _for_items(sizes, arrays.rows, arrays.shares, visit, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _attend_tile(sizes: _Sizes, memory: _Shared, length, tile, carry):
    """One step of online softmax: scores of a key tile, then their weights times the value tile."""
    acc, top, total, step = carry
    rows, block, options, tiles = WARPGROUP_ROWS, sizes.tiles.block, sizes.options, memory.tiles
    stage = lax.rem(step, jnp.int32(sizes.stages))
    plgpu.barrier_wait(tiles.k_full.at[stage])

    def multiply_keys(scores):
        plgpu.wgmma(scores, memory.q, tiles.k.at[stage].transpose((1, 0)))
        return scores[...]

    scores = pl.run_scoped(multiply_keys, plgpu.ACC((rows, block), jnp.float32))
    plgpu.barrier_arrive(tiles.k_free.at[stage])
    scores = cap_scores(scores, options)
    key = plgpu.broadcasted_iota(jnp.int32, (rows, block), 1, layout=plgpu.Layout.WGMMA) + tile * block
    seen = key < length
    if options.sliding_window is not None:
        seen = seen & (key >= length - options.sliding_window)
    weights, factor, top, total = update_softmax(jnp.where(seen, scores, MASKED), top, total, exponent(options))
    acc = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
    plgpu.barrier_wait(tiles.v_full.at[stage])
    pl.when((tile + 1) * block > length)(lambda: clear_unwritten(tiles.v.at[stage], length - tile * block))
    acc = add_values(acc, weights.astype(sizes.dtype), tiles.v.at[stage], memory.p)
    plgpu.barrier_arrive(tiles.v_free.at[stage])
    return acc, top, total, step + 1


class _Sum(NamedTuple):
    """Values summed by weight [rows, H], the largest base-2 logarithm of a weight [rows], and what the weights sum to
    in units of the largest [rows]; float32."""

    acc: Any
    top: Any
    total: Any

    def mean(self):
        """The weighted mean; zero where there is no weight."""
        inverse = jnp.where(self.total > 0, 1.0 / jnp.maximum(self.total, 1e-30), 0.0)
        return self.acc * lax.broadcast_in_dim(inverse, self.acc.shape, [0])

    def lse(self):
        """Base-2 logarithms of what the weights sum to."""
        return jnp.where(self.total > 0, self.top + jnp.log2(jnp.maximum(self.total, 1e-30)), MASKED)


def _finish(sizes: _Sizes, arrays: _Arrays, memory: _Shared, item: _Item, result: _Sum):
    """Writes an item's result, and if it is the last of several that a row has under a kv head, the row's."""
    if sizes.max_splits == 1:
        _write(sizes, arrays, memory, item, result)
        return
    pl.when(item.splits == 1)(lambda: _write(sizes, arrays, memory, item, result))

    @pl.when(item.splits > 1)
    def _():
        _write_part(sizes, arrays, memory, item, result)
        plgpu.wait_smem_to_gmem(0)
        if sizes.tiles.in_order:
            last = item.split == item.splits - 1
        else:
            last = is_last(arrays.counters.at[item.row * sizes.num_kv_heads + item.head], item.splits - 1)
        pl.when(last)(lambda: _write(sizes, arrays, memory, item, _merge(sizes, arrays, memory, item)))


def _write(sizes: _Sizes, arrays: _Arrays, memory: _Shared, item: _Item, result: _Sum):
    """Writes a row's result under a kv head."""
    heads = pl.ds(item.head * sizes.group, sizes.group)
    if arrays.sinks is not None:
        mine = memory.sinks.at[pl.ds(item.head * sizes.group, WARPGROUP_ROWS)]
        sink = plgpu.load(mine, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False).astype(jnp.float32)
        weight = jnp.where(result.total > 0, jnp.exp2(sink * LOG2E - result.top), 0.0)
        result = result._replace(total=result.total + weight)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
    memory.out[...] = lax.bitcast_convert_type(result.mean().astype(sizes.out_dtype), sizes.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(memory.out.at[pl.ds(0, sizes.group)], arrays.out.at[item.row, heads])


def _write_part(sizes: _Sizes, arrays: _Arrays, memory: _Shared, item: _Item, result: _Sum):
    """Writes the result of one of several pieces."""
    mean = result.mean()
    if sizes.padded_group > sizes.group:  # whoever merges multiplies the rest by zero, which must not be NaN
        row = plgpu.broadcasted_iota(jnp.int32, mean.shape, 0, layout=plgpu.Layout.WGMMA)
        mean = jnp.where(row < sizes.group, mean, 0.0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
    memory.out[...] = mean.astype(sizes.dtype)
    memory.lse[...] = result.lse()
    plgpu.commit_smem()
    mine, here = pl.ds(0, sizes.padded_group), pl.ds(_first_part(sizes, item, item.split), sizes.padded_group)
    plgpu.copy_smem_to_gmem(memory.out.at[mine], arrays.parts.at[here])
    plgpu.copy_smem_to_gmem(memory.lse.at[mine], arrays.lse.at[here])


def _first_part(sizes: _Sizes, item: _Item, split):
    """Where the rows of a piece begin in `parts` and `lse`."""
    return (item.row * sizes.num_kv_heads + item.head) * sizes.part_rows + split * sizes.padded_group


def _merge(sizes: _Sizes, arrays: _Arrays, memory: _Shared, item: _Item) -> _Sum:
    """A row's sum under a kv head from the results of its pieces, in their order.

    This is attention once more: results are the values, and the logarithms of what their weights sum to the scores, of
    a query head on its own pieces only. Weights are multiplied in two parts, so that they are as good as float32.
    """
    rows, group, shape = WARPGROUP_ROWS, sizes.padded_group, (WARPGROUP_ROWS, WARPGROUP_ROWS)
    of_row, of_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    count, first = item.splits * group, _first_part(sizes, item, 0)

    def add(tile, carry):
        here, left = pl.ds(first + tile * rows, rows), count - tile * rows
        plgpu.commit_smem()  # nobody reads the tile before any more
        plgpu.copy_gmem_to_smem(arrays.parts.at[here], memory.q, memory.loaded)
        plgpu.copy_gmem_to_smem(arrays.lse.at[here], memory.lse, memory.loaded)
        plgpu.barrier_wait(memory.loaded)
        lse = plgpu.load(memory.lse, layout=of_column, optimized=False)
        head, part = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
        own = (lax.rem(part + tile * rows, jnp.int32(group)) == head) & (part < left)
        scores = jnp.where(own, lax.broadcast_in_dim(lse, shape, [1]), MASKED)
        weights, factor, top, total = update_softmax(scores, carry.top, carry.total, 1.0)
        acc = carry.acc * lax.broadcast_in_dim(factor, carry.acc.shape, [0])
        pl.when(left < rows)(lambda: clear_unwritten(memory.q, left))
        high = weights.astype(sizes.dtype)
        low = (weights - high.astype(jnp.float32)).astype(sizes.dtype)
        for portion in (high, low):
            acc = add_values(acc, portion, memory.q, memory.p)
        return _Sum(acc, top, total)

    nothing = _Sum(
        plgpu.layout_cast(jnp.zeros((rows, sizes.head_dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((rows,), MASKED, jnp.float32), of_row),
        plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), of_row),
    )
    return lax.fori_loop(0, lax.div(count + rows - 1, jnp.int32(rows)), add, nothing)


def _load_sinks(arrays: _Arrays, memory: _Shared):
    """Fetches the sinks of all query heads."""
    plgpu.copy_gmem_to_smem(arrays.sinks, memory.sinks.at[pl.ds(0, arrays.sinks.shape[0])], memory.loaded)
    plgpu.barrier_arrive(memory.loaded)
    plgpu.barrier_wait(memory.loaded)
