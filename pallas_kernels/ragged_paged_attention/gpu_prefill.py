"""Attention of rows of several query tokens on Hopper: chunks of prompts over the paged pool, in Mosaic GPU.

The shape of FlashAttention-3 (arXiv 2407.08608): a memory warpgroup fetches query, key and value tiles with the copy
engine; two compute warpgroups share the key and value tiles and take turns, one multiplying while the other works on
its softmax. They hold 64 query tokens of two heads that share a kv head, or, where a kv head has an odd number of query
heads, 128 tokens of one. A persistent kernel: the blocks of all rows, longest first, are dealt to the thread blocks.
Tiles of a pool of 8 bits are converted by the warpgroup that fetches them.

Called by gpu.py only. A block's result depends on its own row and nothing else.
"""

# The types of plgpu's own names are not to be had: it exports some of them lazily.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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

NUM_COMPUTE, MEMORY = 2, 2
#: Registers of a thread of the compute warpgroups and of the memory warpgroup; all three start with 168.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillWork:
    """Blocks of query tokens of the longer rows, the one with most keys first, and then those of padding tokens.

    Each sees a key tile: compute warpgroups take turns by tiles, and with two items of none would never end.

    Attributes:
        blocks: [G, 5] int32: row, first packed token, tokens, position of the first, KV length of the row. Blocks of
            padding tokens have positions below zero, so they see no key and their results are zeros.
        num_blocks: [1] int32, how many of the G are real.
    """

    blocks: jax.Array
    num_blocks: jax.Array


def plan_prefill(kv_lens, query_starts, num_decodes, *, num_tokens: int, block_q: int) -> PrefillWork:
    """Cuts the rows past the decodes, and what is left of num_tokens, into blocks of at most block_q tokens. See
    PrefillWork."""
    batch = kv_lens.shape[0]
    starts = jnp.append(query_starts, num_tokens)  # the padding tokens are one row more
    query_lens = starts[1:] - starts[:-1]
    counts = jnp.where(jnp.arange(batch + 1) >= num_decodes, -(-query_lens // block_q), 0)
    ends = jnp.cumsum(counts)
    # Every longer row has at least two tokens and at most one block that is not full; so has the padding.
    most = num_tokens // block_q + min(batch, -(-num_tokens // 2)) + 1
    block = jnp.arange(most, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, block, side="right", method="compare_all"), batch).astype(jnp.int32)
    first = (block - (ends - counts)[row]) * block_q
    real = block < ends[-1]
    size = jnp.where(real, jnp.clip(query_lens[row] - first, 0, block_q), 0)
    padding, row_of_kv = row == batch, jnp.minimum(row, batch - 1)
    position = jnp.where(padding, -size, kv_lens[row_of_kv] - query_lens[row] + first)
    blocks = jnp.stack([row_of_kv, starts[row] + first, size, position, kv_lens[row_of_kv]], axis=-1)
    order = jnp.argsort(jnp.where(real, -(position + size), 1), stable=True)
    return PrefillWork(blocks[order].astype(jnp.int32), ends[-1:].astype(jnp.int32))


def tokens_per_block(group: int) -> int:
    """Query tokens of a block where `group` query heads share a kv head."""
    return WARPGROUP_ROWS if group % 2 == 0 else 2 * WARPGROUP_ROWS


class _Item(NamedTuple):
    """A block of query tokens under one head, or two: key tiles [begin, end); those below `full` need no mask, and of
    those from `whole` on, one or none, no query sees the second half."""

    row: Any
    token: Any
    size: Any
    position: Any
    length: Any
    head: Any
    begin: Any
    full: Any
    whole: Any
    end: Any


@dataclass(frozen=True)
class _Sizes:
    """Everything static about one call."""

    num_heads: int
    group: int
    head_dim: int
    page_size: int
    num_tokens: int
    dtype: Any
    pool_dtype: Any
    out_dtype: Any
    options: Options
    has_sinks: bool
    tiles: Tiles

    @property
    def heads(self) -> int:
        """Heads of an item."""
        return 2 if self.group % 2 == 0 else 1

    @property
    def block(self) -> int:
        """Key positions of a tile."""
        return self.tiles.prefill_block if self.head_dim <= 128 else min(self.tiles.prefill_block, 64)

    @property
    def halves(self) -> bool:
        """Whether half a tile is computed where no query sees more of it."""
        return self.head_dim <= 128 and not self.converts

    @property
    def converts(self) -> bool:
        """Tiles arrive in another type than the tensor cores'."""
        return self.dtype != self.pool_dtype

    @property
    def stages(self) -> int:
        """Tiles that the compute warpgroups read from, keys and values in turn: as many as there is room for."""
        if self.head_dim <= 96 or (self.head_dim <= 128 and not self.converts):
            return 4
        return 3 if self.head_dim <= 128 or not self.converts else 2

    @property
    def tiles_ahead(self) -> int:
        """Key tiles of 8 bits in flight, and as many of values."""
        return 2 if self.head_dim <= 128 else 1

    @property
    def query_slots(self) -> int:
        """2 where there is room for the next item's queries while the current item's are multiplied, else 1."""
        return 2 if self.head_dim <= 128 and not self.converts else 1

    @property
    def columns(self) -> int:
        """Of a head, those of one pattern in shared memory: queries and results are held in parts of so many."""
        return swizzle(self.head_dim) // 2

    @property
    def parts(self) -> int:
        """Parts of a head's queries and results."""
        return self.head_dim // self.columns


def prefill(
    q: jax.Array, pool: jax.Array, table: jax.Array, work: PrefillWork, first_page, options: Options, tiles: Tiles
) -> jax.Array:
    """Attention of the blocks' tokens: q [T, N, H], table [B, P] -> [T, N, H]; those of decodes hold anything."""
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, _, page_size, _ = pool.shape
    dtype, out_dtype = product_dtype(q.dtype, pool.dtype), q.dtype
    q = q.astype(dtype)
    if num_tokens < WARPGROUP_ROWS:
        q = jnp.pad(q, ((0, WARPGROUP_ROWS - num_tokens), (0, 0), (0, 0)))
    has_sinks = options.sinks is not None
    sinks = jnp.zeros(1, jnp.float32) if options.sinks is None else options.sinks.astype(jnp.float32)
    sizes = _Sizes(
        num_heads,
        num_heads // num_kv_heads,
        head_dim,
        page_size,
        q.shape[0],
        dtype,
        pool.dtype,
        out_dtype,
        options._replace(sinks=None),
        has_sinks,
        tiles,
    )
    run = plgpu.kernel(
        functools.partial(_entry, sizes),
        out_type=jax.ShapeDtypeStruct(q.shape, out_dtype),
        kernel_name="attention_prefill",
        grid=(tiles.num_workers,),
        grid_names=("worker",),
        num_threads=NUM_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
    )
    first = jnp.reshape(first_page, (1,)).astype(jnp.int32)
    return run(q, pool, table, work.blocks, work.num_blocks, first, sinks)[:num_tokens]


def _entry(sizes: _Sizes, *refs):
    """Allocates shared memory and barriers, then runs the three warpgroups."""
    rows, block, width, stages = WARPGROUP_ROWS, sizes.block, sizes.head_dim, sizes.stages
    copies = max(block // sizes.page_size, 1)
    # The interpreter's way needs the probabilities in shared memory; the other has no use for them.
    p = None
    if not sizes.tiles.registers:
        p = plgpu.SMEM((NUM_COMPUTE, rows, block), sizes.dtype, transforms=transforms(block))

    def run(*scratch):
        memory = _Shared(*scratch)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == MEMORY)(lambda: _fetch(sizes, refs, memory))
        pl.when(warpgroup < NUM_COMPUTE)(lambda: _compute(sizes, refs, memory, warpgroup))

    packed = packed_full = None
    if sizes.converts:
        in_flight = 2 * sizes.tiles_ahead
        packed = plgpu.SMEM((in_flight, block, width), sizes.pool_dtype, transforms=packed_transforms(width))
        packed_full = plgpu.Barrier(num_arrivals=copies, num_barriers=in_flight)
    slots = sizes.query_slots
    pl.run_scoped(
        run,
        _two_views(sizes, slots, sizes.dtype),
        plgpu.SMEM((stages, block, width), sizes.dtype, transforms=transforms(width)),
        packed,
        _two_views(sizes, 1, sizes.out_dtype),
        p,
        plgpu.Barrier(num_arrivals=NUM_COMPUTE * sizes.parts, num_barriers=slots),
        plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=slots),
        plgpu.Barrier(num_arrivals=1 if sizes.converts else copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=stages),
        packed_full,
        plgpu.Barrier(num_arrivals=NUM_COMPUTE),
        collective_axes="warpgroup",
    )


def _two_views(sizes: _Sizes, slots: int, dtype):
    """Memory for 64 rows of a head for each compute warpgroup, in parts, under two names: for the tensor cores, and for
    the copy engine.

    The tensor cores' layout is of tiles of eight rows, and so Pallas copies it to and from device memory at every
    eighth token only, where a row's tokens may start anywhere. A part is as wide as the pattern that its rows are laid
    in, which the memory's address gives, so that its bytes lie the same in tiles of one row, which may start anywhere.
    The interpreter, which knows no layouts, has one name for both.
    """
    shape, pattern = (slots, NUM_COMPUTE, sizes.parts, WARPGROUP_ROWS, sizes.columns), swizzle(sizes.head_dim)
    of_tensor_cores = plgpu.SMEM(shape, dtype, transforms=transforms(sizes.head_dim))
    if not sizes.tiles.registers:
        return of_tensor_cores
    by_rows = (plgpu.TilingTransform((1, sizes.columns)), plgpu.SwizzleTransform(pattern))
    return plgpu.RefUnion(of_tensor_cores, plgpu.SMEM(shape, dtype, transforms=by_rows))


class _Shared(NamedTuple):
    """Shared memory of a thread block, and the barriers that hand its parts over.

    `q` and `out` are those of _two_views. `tiles` holds keys and values in turn, `packed` those of 8 bits before they
    are converted. `turn` gives the tensor cores to one compute warpgroup at a time.
    """

    q: Any
    tiles: Any
    packed: Any
    out: Any
    p: Any
    q_full: Any
    q_free: Any
    full: Any
    free: Any
    packed_full: Any
    turn: Any


def _views(sizes: _Sizes, memory):
    """(for the tensor cores, for the copy engine): what _two_views allocated."""
    return tuple(memory) if sizes.tiles.registers else (memory, memory)


def _for_items(sizes: _Sizes, blocks, num_blocks, visit, carry):
    """visit(index, item, carry) -> carry for each of this worker's items: dealt out to and fro, longest first."""
    workers, block, window = sizes.tiles.num_workers, jnp.int32(sizes.block), sizes.options.sliding_window
    worker = lax.axis_index("worker")
    per_block = sizes.num_heads // sizes.heads
    total = num_blocks[0] * per_block

    def number(turn):
        forward = lax.rem(turn, jnp.int32(2)) == 0
        return turn * workers + jnp.where(forward, worker, workers - 1 - worker)

    rounds = lax.div(total, jnp.int32(workers))
    rounds = rounds + jnp.where(number(rounds) < total, 1, 0)

    def body(turn, carry):
        item = number(turn)
        at = lax.div(item, jnp.int32(per_block))
        row, token, size, position, length = (blocks[at, i] for i in range(5))
        begin = jnp.int32(0)
        full = lax.div(position + 1, block)
        if window is not None:
            begin = lax.div(jnp.maximum(position - window + 1, 0), block)
            full = begin
        end = jnp.maximum(lax.div(position + size + block - 1, block), 1)  # each block takes part in the turns
        whole = end
        if sizes.halves:
            whole = end - jnp.where(lax.rem(position + size - 1, block) < block // 2, 1, 0)
        head = lax.rem(item, jnp.int32(per_block)) * sizes.heads
        return visit(turn, _Item(row, token, size, position, length, head, begin, full, whole, end), carry)

    return lax.fori_loop(0, rounds, body, carry)


def _query_span(sizes: _Sizes, item: _Item, warpgroup):
    """(first packed token of the warpgroup's 64 rows, row of its first own token, own tokens, position of row 0).

    The rows may start before the block's tokens, so that they do not reach past the last packed token.
    """
    offset = 0 if sizes.heads == 2 else warpgroup * WARPGROUP_ROWS
    token = jnp.minimum(item.token + offset, sizes.num_tokens - WARPGROUP_ROWS)
    shift = item.token + offset - token
    size = jnp.clip(item.size - offset, 0, WARPGROUP_ROWS)
    return token, shift, size, item.position + offset - shift


def _fetch(sizes: _Sizes, refs, memory: _Shared):
    """The memory warpgroup: queries and key and value tiles of all items, as fast as buffers come free."""
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
    q_ref, pool_ref, table_ref, blocks_ref, num_blocks_ref, first_ref = refs[:6]
    block, page_size, stages, slots = sizes.block, sizes.page_size, sizes.stages, sizes.query_slots
    queries = _views(sizes, memory.q)[1]
    first_page = first_ref[0]
    size = min(block, page_size)

    def wait_free(number):
        pl.when(number >= stages)(lambda: plgpu.barrier_wait(memory.free.at[lax.rem(number, jnp.int32(stages))]))

    def copy(item, tile, part, target, full):
        last_page = lax.div(item.length - 1, jnp.int32(page_size))
        kv_head = lax.div(item.head, jnp.int32(sizes.group))
        for piece in range(block // size):
            position = tile * block + piece * size
            # Past the row's last page that page is read again, from the cache: the barrier counts copies.
            page = first_page + table_ref[item.row, jnp.minimum(lax.div(position, jnp.int32(page_size)), last_page)]
            inside = pl.ds(lax.rem(position, jnp.int32(page_size)), size) if size < page_size else slice(None)
            source = pool_ref.at[page, kv_head, part, inside]
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(piece * size, size)], full)

    def load(item, tile, step):
        for part in (0, 1):
            number = 2 * step + part
            stage = lax.rem(number, jnp.int32(stages))
            wait_free(number)
            copy(item, tile, part, memory.tiles.at[stage], memory.full.at[stage])
        return step + 1

    def load_packed(item, tile, step, part):
        @pl.when(tile < item.end)
        def _():
            slot = lax.rem(2 * step + part, jnp.int32(2 * sizes.tiles_ahead))
            copy(item, tile, part, memory.packed.at[slot], memory.packed_full.at[slot])

    def convert(item, tile, step):
        ahead = sizes.tiles_ahead
        for part in (0, 1):
            number = 2 * step + part
            slot, stage = (lax.rem(number, jnp.int32(count)) for count in (2 * ahead, stages))
            plgpu.barrier_wait(memory.packed_full.at[slot])
            wait_free(number)
            _convert_tile(sizes, memory.packed.at[slot], memory.tiles.at[stage])
            plgpu.barrier_arrive(memory.full.at[stage])
            load_packed(item, tile + ahead, step + ahead, part)
        return step + 1

    def visit(index, item, carry):
        slot = lax.rem(index, jnp.int32(slots))
        pl.when(index >= slots)(lambda: plgpu.barrier_wait(memory.q_free.at[slot]))
        for warpgroup, part in itertools.product(range(NUM_COMPUTE), range(sizes.parts)):
            token, *_ = _query_span(sizes, item, warpgroup)
            head = item.head + (warpgroup if sizes.heads == 2 else 0)
            source = q_ref.at[pl.ds(token, WARPGROUP_ROWS), head, pl.ds(part * sizes.columns, sizes.columns)]
            plgpu.copy_gmem_to_smem(source, queries.at[slot, warpgroup, part], memory.q_full.at[slot])
        step, _ = carry
        if sizes.converts:
            for ahead, part in itertools.product(range(sizes.tiles_ahead), (0, 1)):
                load_packed(item, item.begin + ahead, step + ahead, part)
        load_tile = convert if sizes.converts else load
        return lax.fori_loop(item.begin, item.end, lambda tile, step: load_tile(item, tile, step), step), index + 1

    steps, items = _for_items(sizes, blocks_ref, num_blocks_ref, visit, (jnp.int32(0), jnp.int32(0)))

    # Nobody may leave while arrivals are outstanding.
    @pl.loop(jnp.maximum(2 * steps - stages, 0), 2 * steps)
    def _(number):
        plgpu.barrier_wait(memory.free.at[lax.rem(number, jnp.int32(stages))])

    @pl.loop(jnp.maximum(items - slots, 0), items)
    def _(index):
        plgpu.barrier_wait(memory.q_free.at[lax.rem(index, jnp.int32(slots))])


def _convert_tile(sizes: _Sizes, packed, tile):
    """Writes 8-bit numbers [block, H] in the tensor cores' type; then `packed` may be written again."""
    rows = 64 if sizes.head_dim <= 128 else 16  # as many at once as the warpgroup's registers hold
    layout = plgpu.Layout.SMEM_GMEM_COPY((rows, sizes.head_dim), sizes.dtype, swizzle(sizes.head_dim))
    for first in range(0, sizes.block, rows):
        here = pl.ds(first, rows)
        tile[here] = plgpu.load(packed.at[here], layout=layout).astype(sizes.dtype)
    plgpu.commit_smem()


def _compute(sizes: _Sizes, refs, memory: _Shared, warpgroup):
    """A compute warpgroup: online softmax over each item's tiles, then its tokens' results to device memory."""
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    _, _, _, blocks_ref, num_blocks_ref, _, sinks_ref, out_ref = refs
    rows, width = WARPGROUP_ROWS, sizes.head_dim
    pl.when(warpgroup == 1)(lambda: _pass_turn(memory))

    def visit(index, item, step):
        _, _, _, position = span = _query_span(sizes, item, warpgroup)
        head = item.head + (warpgroup if sizes.heads == 2 else 0)
        slot = lax.rem(index, jnp.int32(sizes.query_slots))
        plgpu.barrier_wait(memory.q_full.at[slot])
        statistic = plgpu.Layout.WGMMA.reduce(1)
        acc = plgpu.layout_cast(jnp.zeros((rows, width), jnp.float32), plgpu.Layout.WGMMA)
        top = plgpu.layout_cast(jnp.full((rows,), MASKED, jnp.float32), statistic)
        total = plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), statistic)

        def attend(masked, keys, tile, carry):
            return _attend_tile(sizes, memory, warpgroup, item, slot, position, masked, keys, tile, carry)

        carry = (acc, top, total, step)
        carry = lax.fori_loop(item.begin, item.full, functools.partial(attend, False, sizes.block), carry)
        carry = lax.fori_loop(item.full, item.whole, functools.partial(attend, True, sizes.block), carry)
        if sizes.halves:
            carry = lax.fori_loop(item.whole, item.end, functools.partial(attend, True, sizes.block // 2), carry)
        acc, top, total, step = carry
        if sizes.query_slots > 1:
            plgpu.barrier_arrive(memory.q_free.at[slot])
        if sizes.has_sinks:
            total = total + jnp.exp2(sinks_ref[head] * LOG2E - top * exponent(sizes.options))
        _store(sizes, memory, warpgroup, head, span, acc, total, out_ref)
        return step

    _for_items(sizes, blocks_ref, num_blocks_ref, visit, jnp.int32(0))
    pl.when(warpgroup == 0)(lambda: _pass_turn(memory))
    plgpu.wait_smem_to_gmem(0)


def _pass_turn(memory: _Shared):
    plgpu.barrier_arrive(memory.turn)
    plgpu.barrier_wait(memory.turn)


def _attend_tile(
    sizes: _Sizes, memory: _Shared, warpgroup, item: _Item, slot, position, masked: bool, keys: int, tile, carry
):
    """One step of online softmax: scores of the first `keys` of a tile, then their weights times the values."""
    acc, top, total, step = carry
    rows, block, options = WARPGROUP_ROWS, sizes.block, sizes.options
    of_keys, of_values = (lax.rem(2 * step + part, jnp.int32(sizes.stages)) for part in (0, 1))
    values = memory.tiles.at[of_values, pl.ds(0, keys)]
    queries = _views(sizes, memory.q)[0]
    plgpu.barrier_wait(memory.full.at[of_keys])

    def multiply_keys(scores):
        # Four parts written out would take registers that a wide head has not got.
        @pl.loop(0, sizes.parts, unroll=sizes.parts if sizes.parts <= 2 else 1)
        def _(part):
            columns = memory.tiles.at[of_keys, pl.ds(0, keys), pl.ds(part * sizes.columns, sizes.columns)]
            plgpu.wgmma(scores, queries.at[slot, warpgroup, part], columns.transpose((1, 0)))

        _pass_turn(memory)
        return scores[...]

    scores = pl.run_scoped(multiply_keys, plgpu.ACC((rows, keys), jnp.float32))
    plgpu.barrier_arrive(memory.free.at[of_keys])
    if sizes.query_slots == 1:
        # Not later: the other warpgroup's first product of the next item ends this one's wait for its turn below.
        pl.when(tile == item.end - 1)(lambda: plgpu.barrier_arrive(memory.q_free.at[slot]))
    scores = cap_scores(scores, options)
    if masked:
        key = plgpu.broadcasted_iota(jnp.int32, (rows, keys), 1, layout=plgpu.Layout.WGMMA) + tile * block
        query = plgpu.broadcasted_iota(jnp.int32, (rows, keys), 0, layout=plgpu.Layout.WGMMA) + position
        seen = key <= query
        if options.sliding_window is not None:
            seen = seen & (key > query - options.sliding_window)
        scores = jnp.where(seen, scores, MASKED)
    weights, factor, top, total = update_softmax(scores, top, total, exponent(options))
    acc = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
    weights = weights.astype(sizes.dtype)
    acc, top, total, weights = lax.optimization_barrier((acc, top, total, weights))
    plgpu.barrier_arrive(memory.turn)
    plgpu.barrier_wait(memory.full.at[of_values])
    if masked:
        unwritten = tile * block + keys > item.length
        pl.when(unwritten)(lambda: clear_unwritten(values, item.length - tile * block))
    plgpu.barrier_wait(memory.turn)
    staging = None if memory.p is None else memory.p.at[warpgroup, :, pl.ds(0, keys)]
    acc = add_values(acc, weights, values, staging)
    plgpu.barrier_arrive(memory.free.at[of_values])
    return acc, top, total, step + 1


def _store(sizes: _Sizes, memory: _Shared, warpgroup, head, span, acc, total, out_ref):
    """Writes the warpgroup's own tokens; a number of them that is not 64 goes in powers of two."""
    token, shift, size, _ = span
    inverse = jnp.where(total > 0, 1.0 / jnp.maximum(total, 1e-30), 0.0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
    registers, rows = (view.at[0, warpgroup] for view in _views(sizes, memory.out))
    columns = [slice(first, first + sizes.columns) for first in range(0, sizes.head_dim, sizes.columns)]
    for part, here in enumerate(columns):
        sums = acc[:, here]
        registers[part] = (sums * lax.broadcast_in_dim(inverse, sums.shape, [0])).astype(sizes.out_dtype)
    plgpu.commit_smem()

    def copy(first, count):
        for part, here in enumerate(columns):
            source = rows.at[part, pl.ds(first, count)]
            plgpu.copy_smem_to_gmem(source, out_ref.at[pl.ds(token + first, count), head, here])

    pl.when(size == WARPGROUP_ROWS)(lambda: copy(0, WARPGROUP_ROWS))
    count = WARPGROUP_ROWS // 2
    while count:
        first = shift + (size & (WARPGROUP_ROWS - 2 * count))
        pl.when((size & count) != 0)(functools.partial(copy, first, count))
        count //= 2
