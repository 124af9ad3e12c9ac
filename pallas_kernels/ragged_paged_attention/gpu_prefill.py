"""Attention of rows of several query tokens on Hopper: chunks of prompts over the paged pool, in Mosaic GPU.

The shape of FlashAttention-3 (arXiv 2407.08608): a memory warpgroup fetches query, key and value tiles with the copy
engine; two compute warpgroups share the key and value tiles and take turns, one multiplying while the other works on
its softmax. They hold 64 query tokens of two heads that share a kv head, or, where a kv head has an odd number of query
heads, 128 tokens of one. A persistent kernel: the blocks of all rows, longest first, are dealt to the thread blocks.

Called by gpu.py only. A block's result depends on its own row and nothing else.
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

from pallas_kernels.ragged_paged_attention.gpu_tiles import (
    LOG2E,
    MASKED,
    WARPGROUP_ROWS,
    Tiles,
    add_values,
    cap_scores,
    clear_unwritten,
    exponent,
    transforms,
    update_softmax,
)
from pallas_kernels.ragged_paged_attention.implementation import Options

NUM_COMPUTE, MEMORY = 2, 2
#: Key and value tiles in flight.
STAGES = 2


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
    """A block of query tokens under one head, or two: key tiles [begin, end); those below `full` need no mask."""

    row: Any
    token: Any
    size: Any
    position: Any
    length: Any
    head: Any
    begin: Any
    full: Any
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
        return self.tiles.prefill_block


def prefill(
    q: jax.Array, pool: jax.Array, table: jax.Array, work: PrefillWork, first_page, options: Options, tiles: Tiles
) -> jax.Array:
    """Attention of the blocks' tokens: q [T, N, H], table [B, P] -> [T, N, H]; those of decodes hold anything."""
    num_tokens, num_heads, head_dim = q.shape
    _, num_kv_heads, _, page_size, _ = pool.shape
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
        q.dtype,
        options._replace(sinks=None),
        has_sinks,
        tiles,
    )
    run = plgpu.kernel(
        functools.partial(_entry, sizes),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
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
    rows, block, width, stages = WARPGROUP_ROWS, sizes.block, sizes.head_dim, STAGES
    layout = transforms(width)
    copies = max(block // sizes.page_size, 1)
    # The interpreter's way needs the probabilities in shared memory; the other has no use for them.
    p_shape = (1, 8, 64) if sizes.tiles.registers else (NUM_COMPUTE, rows, block)

    def run(*scratch):
        memory = _Shared(*scratch)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == MEMORY)(lambda: _fetch(sizes, refs, memory))
        pl.when(warpgroup < NUM_COMPUTE)(lambda: _compute(sizes, refs, memory, warpgroup))

    pl.run_scoped(
        run,
        plgpu.SMEM((NUM_COMPUTE, rows, width), sizes.dtype),
        plgpu.SMEM((NUM_COMPUTE, rows, width), sizes.dtype, transforms=layout),
        plgpu.SMEM((stages, block, width), sizes.dtype, transforms=layout),
        plgpu.SMEM((stages, block, width), sizes.dtype, transforms=layout),
        plgpu.SMEM((NUM_COMPUTE, rows, width), sizes.dtype),
        plgpu.SMEM(p_shape, sizes.dtype, transforms=transforms(p_shape[-1])),
        plgpu.Barrier(num_arrivals=NUM_COMPUTE),
        plgpu.Barrier(num_arrivals=NUM_COMPUTE),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=stages),
        plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=stages),
        plgpu.Barrier(num_arrivals=NUM_COMPUTE),
        collective_axes="warpgroup",
    )


class _Shared(NamedTuple):
    """Shared memory of a thread block, and the barriers that hand its parts over.

    Queries come into `staging`, since the copy engine writes the tensor cores' layout only at every eighth token, and a
    row's tokens may start anywhere. `turn` gives the tensor cores to one compute warpgroup at a time.
    """

    staging: Any
    q: Any
    k: Any
    v: Any
    out: Any
    p: Any
    q_full: Any
    q_free: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any


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
        head = lax.rem(item, jnp.int32(per_block)) * sizes.heads
        return visit(turn, _Item(row, token, size, position, length, head, begin, full, end), carry)

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
    plgpu.set_max_registers(40, action="decrease")
    q_ref, pool_ref, table_ref, blocks_ref, num_blocks_ref, first_ref, *_ = refs
    block, page_size, stages = sizes.block, sizes.page_size, STAGES
    first_page = first_ref[0]
    size = min(block, page_size)

    def load(item, tile, step):
        stage = lax.rem(step, jnp.int32(stages))
        last_page = lax.div(item.length - 1, jnp.int32(page_size))
        kv_head = lax.div(item.head, jnp.int32(sizes.group))
        for part, (tiles, free, full) in enumerate(
            ((memory.k, memory.k_free, memory.k_full), (memory.v, memory.v_free, memory.v_full))
        ):
            pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free.at[stage]))
            for piece in range(block // size):
                position = tile * block + piece * size
                # Past the row's last page that page is read again, from the cache: the barrier counts copies.
                page = first_page + table_ref[item.row, jnp.minimum(lax.div(position, jnp.int32(page_size)), last_page)]
                inside = pl.ds(lax.rem(position, jnp.int32(page_size)), size) if size < page_size else slice(None)
                source = pool_ref.at[page, kv_head, part, inside]
                plgpu.copy_gmem_to_smem(source, tiles.at[stage, pl.ds(piece * size, size)], full.at[stage])
        return step + 1

    def visit(index, item, step):
        pl.when(index > 0)(lambda: plgpu.barrier_wait(memory.q_free))
        for warpgroup in range(NUM_COMPUTE):
            token, *_ = _query_span(sizes, item, warpgroup)
            head = item.head + (warpgroup if sizes.heads == 2 else 0)
            source = q_ref.at[pl.ds(token, WARPGROUP_ROWS), head]
            plgpu.copy_gmem_to_smem(source, memory.staging.at[warpgroup], memory.q_full)
        return lax.fori_loop(item.begin, item.end, lambda tile, step: load(item, tile, step), step)

    steps = _for_items(sizes, blocks_ref, num_blocks_ref, visit, jnp.int32(0))

    # Nobody may leave while arrivals are outstanding.
    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step):
        stage = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(memory.k_free.at[stage])
        plgpu.barrier_wait(memory.v_free.at[stage])

    pl.when(steps > 0)(lambda: plgpu.barrier_wait(memory.q_free))


def _compute(sizes: _Sizes, refs, memory: _Shared, warpgroup):
    """A compute warpgroup: online softmax over each item's tiles, then its tokens' results to device memory."""
    plgpu.set_max_registers(232, action="increase")
    *_, blocks_ref, num_blocks_ref, _, sinks_ref, out_ref = refs
    rows, width = WARPGROUP_ROWS, sizes.head_dim
    pl.when(warpgroup == 1)(lambda: _pass_turn(memory))

    def visit(index, item, step):
        plgpu.barrier_wait(memory.q_full)
        memory.q[warpgroup] = plgpu.load(memory.staging.at[warpgroup], layout=plgpu.Layout.WGMMA)
        plgpu.commit_smem()
        plgpu.barrier_arrive(memory.q_free)
        statistic = plgpu.Layout.WGMMA.reduce(1)
        acc = plgpu.layout_cast(jnp.zeros((rows, width), jnp.float32), plgpu.Layout.WGMMA)
        top = plgpu.layout_cast(jnp.full((rows,), MASKED, jnp.float32), statistic)
        total = plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), statistic)
        _, _, _, position = span = _query_span(sizes, item, warpgroup)

        def attend(masked, tile, carry):
            return _attend_tile(sizes, memory, warpgroup, item, position, masked, tile, carry)

        carry = lax.fori_loop(item.begin, item.full, functools.partial(attend, False), (acc, top, total, step))
        acc, top, total, step = lax.fori_loop(item.full, item.end, functools.partial(attend, True), carry)
        head = item.head + (warpgroup if sizes.heads == 2 else 0)
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


def _attend_tile(sizes: _Sizes, memory: _Shared, warpgroup, item: _Item, position, masked: bool, tile, carry):
    """One step of online softmax: scores of a key tile, then their weights times the value tile."""
    acc, top, total, step = carry
    rows, block, options = WARPGROUP_ROWS, sizes.block, sizes.options
    stage = lax.rem(step, jnp.int32(STAGES))
    plgpu.barrier_wait(memory.k_full.at[stage])

    def multiply_keys(scores):
        plgpu.wgmma(scores, memory.q.at[warpgroup], memory.k.at[stage].transpose((1, 0)))
        _pass_turn(memory)
        return scores[...]

    scores = pl.run_scoped(multiply_keys, plgpu.ACC((rows, block), jnp.float32))
    plgpu.barrier_arrive(memory.k_free.at[stage])
    scores = cap_scores(scores, options)
    if masked:
        key = plgpu.broadcasted_iota(jnp.int32, (rows, block), 1, layout=plgpu.Layout.WGMMA) + tile * block
        query = plgpu.broadcasted_iota(jnp.int32, (rows, block), 0, layout=plgpu.Layout.WGMMA) + position
        seen = key <= query
        if options.sliding_window is not None:
            seen = seen & (key > query - options.sliding_window)
        scores = jnp.where(seen, scores, MASKED)
    weights, factor, top, total = update_softmax(scores, top, total, exponent(options))
    acc = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
    weights = weights.astype(sizes.dtype)
    acc, top, total, weights = lax.optimization_barrier((acc, top, total, weights))
    plgpu.barrier_arrive(memory.turn)
    plgpu.barrier_wait(memory.v_full.at[stage])
    if masked:
        unwritten = (tile + 1) * block > item.length
        pl.when(unwritten)(lambda: clear_unwritten(memory.v.at[stage], item.length - tile * block))
    plgpu.barrier_wait(memory.turn)
    acc = add_values(acc, weights, memory.v.at[stage], memory.p.at[warpgroup], sizes.tiles.registers)
    plgpu.barrier_arrive(memory.v_free.at[stage])
    return acc, top, total, step + 1


def _store(sizes: _Sizes, memory: _Shared, warpgroup, head, span, acc, total, out_ref):
    """Writes the warpgroup's own tokens; a number of them that is not 64 goes in powers of two."""
    token, shift, size, _ = span
    inverse = jnp.where(total > 0, 1.0 / jnp.maximum(total, 1e-30), 0.0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
    out = memory.out.at[warpgroup]
    out[...] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(sizes.dtype)
    plgpu.commit_smem()

    def copy(first, count):
        plgpu.copy_smem_to_gmem(out.at[pl.ds(first, count)], out_ref.at[pl.ds(token + first, count), head])

    pl.when(size == WARPGROUP_ROWS)(lambda: copy(0, WARPGROUP_ROWS))
    count = WARPGROUP_ROWS // 2
    while count:
        first = shift + (size & (WARPGROUP_ROWS - 2 * count))
        pl.when((size & count) != 0)(functools.partial(copy, first, count))
        count //= 2
