"""The attention kernel for TPUs: one program that walks over all (item, KV block) pairs of a step.

Called by tpu.py, which says what an item is and cuts the step into them. The walk is a loop whose length comes from the
step's own lengths, so padding costs nothing. At each turn the pages of a block `buffers - 1` turns ahead are sent for,
whatever item they belong to, so that the DMAs never run dry between rows.

Items are independent and their blocks start at multiples of a fixed size: a row's result does not depend on others.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_MASKED = -1e30  # finite, so that a query that has seen nothing yet gives exp(0) = 1 and not NaN
_LANES = 128
#: VMEM beside what a kernel keeps: scores and weights on their way, which are too many for registers.
_WORKING_BYTES = 8 << 20
#: KV heads whose work is written out side by side, for the compiler to interleave.
_HEADS_AT_ONCE = 8
#: Query vectors of a kv head whose scores are computed at once: with twice as many a v6e issues an eighth more.
_VECTORS_AT_ONCE = 256


@dataclass(frozen=True)
class AttendSpec:
    """What is static in the kernel.

    Attributes:
        num_kv_heads, parts, page_size, lanes: of the pool; see tpu.py.
        block_pages: pages of a KV block. table_width: pages of a row in the page table.
        buffers: KV blocks in VMEM.
        block_groups: groups of query tokens in a full block.
        scale, sliding_window, soft_cap: of the scores. has_sinks: whether sinks are given.
        vmem_limit_bytes: the most that the kernel may take of VMEM.
    """

    num_kv_heads: int
    parts: int
    page_size: int
    lanes: int
    block_pages: int
    table_width: int
    buffers: int
    block_groups: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    has_sinks: bool
    vmem_limit_bytes: int

    @property
    def block_kv(self) -> int:
        """Key positions of a KV block."""
        return self.block_pages * self.page_size


def attend_kernel(spec: AttendSpec, scalars, queries, sinks, pool):
    """Runs the kernel.

    Args:
        scalars: first_page [1], counts [2], item_rows, item_starts, item_ends, item_groups [I + 1], page_table [B * P];
            all int32.
        queries: one or two arrays. Of the decode rows [n, K, 1, vectors, lanes], an item each. Of the blocks
            [groups, K, vectors, tokens, lanes], block_groups of which are an item, or fewer at the end of a row.
        sinks: none, or for each array of queries [K, query vectors of a head in an item, 128] float32.
        pool: stays in HBM.

    Returns:
        An array like each of `queries`. Entries of no item are never written.
    """
    dtype, heads, buffers = queries[0].dtype, spec.num_kv_heads, spec.buffers
    scratch = [
        pltpu.VMEM((buffers, spec.block_pages, heads, spec.parts, spec.page_size, spec.lanes), pool.dtype),
        pltpu.SemaphoreType.DMA((buffers,)),
    ]
    for query, groups in zip(queries, (1, spec.block_groups), strict=False):
        item = (groups, *query.shape[1:])
        rows = groups * query.shape[2] * query.shape[3]
        scratch += [
            pltpu.VMEM((buffers, *item), dtype),  # queries
            pltpu.SemaphoreType.DMA((buffers,)),
            pltpu.VMEM((2, *item), dtype),  # results on their way out
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((heads, rows, spec.lanes), jnp.float32),  # sum of weighted values
            pltpu.VMEM((heads, rows, _LANES), jnp.float32),  # largest score, in every lane
            pltpu.VMEM((heads, rows, _LANES), jnp.float32),  # sum of weights, in every lane
        ]
    kept = sum(math.prod(ref.shape) * ref.dtype.itemsize for ref in scratch if ref.memory_space == pltpu.VMEM)
    kept += sum(sink.size * sink.dtype.itemsize for sink in sinks)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    return pl.pallas_call(
        functools.partial(_kernel, spec, len(queries)),
        out_shape=[jax.ShapeDtypeStruct(query.shape, dtype) for query in queries],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(),
            in_specs=[*(hbm for _ in queries), *(vmem for _ in sinks), hbm],
            out_specs=[hbm for _ in queries],
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=min(kept + _WORKING_BYTES, spec.vmem_limit_bytes),
            # The work list clips every page to the pool. Checking again takes half of what a page's fetch issues.
            disable_bounds_checks=True,
        ),
        cost_estimate=_cost(spec, queries, pool),
        name="ragged_paged_attention",
    )(*scalars, *queries, *sinks, pool)


def _cost(spec: AttendSpec, queries, pool) -> pl.CostEstimate:
    """An upper bound, for the compiler's schedule: every item sees a whole page table of keys."""
    vectors = sum(query.size // spec.lanes for query in queries)
    keys = spec.table_width * spec.page_size
    page = pool.size // pool.shape[0] * pool.dtype.itemsize
    items = sum(pl.cdiv(query.shape[0], size) for query, size in zip(queries, (1, spec.block_groups), strict=False))
    moved = 2 * sum(query.size * query.dtype.itemsize for query in queries)
    return pl.CostEstimate(
        flops=4 * vectors * keys * spec.lanes,
        transcendentals=vectors * keys,
        bytes_accessed=moved + items * spec.table_width * page,
    )


@dataclass(frozen=True)
class _Group:
    """The refs that belong to one kind of items: decode rows or blocks.

    is_decode: an item is one query token. first: the item that is number 0 of the kind.
    """

    is_decode: bool
    first: Any
    queries: jax.Array
    sinks: jax.Array | None
    results: jax.Array
    q_buffer: jax.Array
    q_sems: jax.Array
    out_buffer: jax.Array
    out_sems: jax.Array
    total: jax.Array
    top: jax.Array
    weight: jax.Array


@dataclass(frozen=True)
class _Refs:
    """What all items share."""

    first_page: jax.Array
    counts: jax.Array
    item_rows: jax.Array
    item_starts: jax.Array
    item_ends: jax.Array
    item_groups: jax.Array
    page_table: jax.Array
    pool: jax.Array
    kv: jax.Array
    kv_sems: jax.Array


def _kernel(spec: AttendSpec, num_kinds: int, *refs: Any):
    scalars, refs = refs[:7], refs[7:]
    queries, refs = refs[:num_kinds], refs[num_kinds:]
    sinks: Any = (None,) * num_kinds
    if spec.has_sinks:
        sinks, refs = refs[:num_kinds], refs[num_kinds:]
    pool, refs = refs[0], refs[1:]
    results, refs = refs[:num_kinds], refs[num_kinds:]
    common: list[Any] = [*scalars, pool, *refs[:2]]
    shared = _Refs(*common)
    num_decodes, num_items = shared.counts[0], shared.counts[1]
    groups = []
    for kind, first in enumerate((0, num_decodes)[:num_kinds]):
        own: list[Any] = [queries[kind], sinks[kind], results[kind], *refs[2 + 7 * kind :][:7]]
        groups.append(_Group(kind == 0, first, *own))

    def fetch(item, block, turn):
        @pl.when(item < num_items)
        def _():
            _fetch_block(spec, shared, item, block, lax.rem(turn, spec.buffers))

            @pl.when(block == _first_block(spec, shared, item))
            def _():
                _by_kind(groups, item, functools.partial(_fetch_queries, spec, shared))

        return _next(spec, shared, item, block)

    def turn(carry):
        item, block, ahead_item, ahead_block, count = carry
        ahead_item, ahead_block = fetch(ahead_item, ahead_block, count + spec.buffers - 1)
        slot = lax.rem(count, spec.buffers)
        _wait_block(spec, shared, item, block, slot)
        _by_kind(groups, item, functools.partial(_compute, spec, shared, block=block, slot=slot))
        return (*_next(spec, shared, item, block), ahead_item, ahead_block, count + 1)

    _clear_values(spec, shared.kv)
    start = (jnp.int32(0), _first_block(spec, shared, 0))
    ahead = start
    for count in range(spec.buffers - 1):
        ahead = fetch(*ahead, count)
    lax.while_loop(lambda carry: carry[0] < num_items, turn, (*start, *ahead, jnp.int32(0)))
    for group, end in zip(groups, (num_decodes, num_items), strict=False):
        _drain(shared, group, end)


def _by_kind(groups, item, run):
    """Calls run(group, item) for the kind that the item is of."""
    if len(groups) == 1:
        run(groups[0], item)
        return
    pl.when(item < groups[1].first)(lambda: run(groups[0], item))
    pl.when(item >= groups[1].first)(lambda: run(groups[1], item))


def _first_block(spec: AttendSpec, shared: _Refs, item):
    if spec.sliding_window is None:
        return jnp.int32(0)
    return jnp.maximum(shared.item_starts[item] - spec.sliding_window + 1, 0) // spec.block_kv


def _is_last(spec: AttendSpec, shared: _Refs, item, block):
    return (block + 1) * spec.block_kv >= shared.item_ends[item]


def _next(spec: AttendSpec, shared: _Refs, item, block):
    """The pair after (item, block); past the last item, any block of one that does not exist."""
    last = _is_last(spec, shared, jnp.minimum(item, shared.counts[1]), block)
    following = jnp.minimum(item + 1, shared.counts[1])
    return jnp.where(last, following, item), jnp.where(last, _first_block(spec, shared, following), block + 1)


def _num_pages(spec: AttendSpec, shared: _Refs, item, block):
    pages = pl.cdiv(shared.item_ends[item], spec.page_size)
    return jnp.minimum(pages - block * spec.block_pages, spec.block_pages)


def _fetch_block(spec: AttendSpec, shared: _Refs, item, block, slot):
    """Sends for the pages of a block."""
    base = shared.item_rows[item] * spec.table_width + block * spec.block_pages

    def fetch_page(index, _):
        page = shared.first_page[0] + shared.page_table[base + index]
        pltpu.make_async_copy(shared.pool.at[page], shared.kv.at[slot, index], shared.kv_sems.at[slot]).start()

    lax.fori_loop(0, _num_pages(spec, shared, item, block), fetch_page, None)


def _wait_block(spec: AttendSpec, shared: _Refs, item, block, slot):
    """Waits for as many bytes as the block's pages have: one wait, not one for each page."""
    pages = pl.ds(0, _num_pages(spec, shared, item, block))
    pltpu.make_async_copy(shared.pool.at[pages], shared.kv.at[slot, pages], shared.kv_sems.at[slot]).wait()


def _item_groups(shared: _Refs, group: _Group, item):
    """The groups of an item, among all groups and in a buffer."""
    if group.is_decode:
        return item, 0
    tokens = shared.item_ends[item] - shared.item_starts[item]
    count = pl.cdiv(tokens, group.q_buffer.shape[4])
    return pl.ds(shared.item_groups[item], count), pl.ds(0, count)


def _copy_queries(spec: AttendSpec, shared: _Refs, group: _Group, item):
    # At most `buffers` consecutive items are between their first fetch and their last turn.
    slot = lax.rem(item, spec.buffers)
    source, target = _item_groups(shared, group, item)
    return pltpu.make_async_copy(group.queries.at[source], group.q_buffer.at[slot, target], group.q_sems.at[slot])


def _fetch_queries(spec: AttendSpec, shared: _Refs, group: _Group, item):
    _copy_queries(spec, shared, group, item).start()


def _copy_result(shared: _Refs, group: _Group, item):
    slot = lax.rem(item - group.first, 2)
    target, source = _item_groups(shared, group, item)
    return pltpu.make_async_copy(group.out_buffer.at[slot, source], group.results.at[target], group.out_sems.at[slot])


def _drain(shared: _Refs, group: _Group, end):
    """Waits for the results that are still on their way out; `end` is the item after the kind's last."""
    for back in (2, 1):
        pl.when(end - back >= group.first)(lambda back=back: _copy_result(shared, group, end - back).wait())


def _clear_values(spec: AttendSpec, kv):
    """A page that is not fetched leaves what was in its place; a weight of 0 makes nothing of it unless it is NaN.

    So no NaN may ever stand in the place of a value: not at the start, and not past a row's end (see _clear_tail).
    """
    value = spec.parts - 1
    zeros = jnp.zeros((spec.num_kv_heads, spec.page_size, spec.lanes), kv.dtype)

    def clear(index, _):
        kv[index // spec.block_pages, lax.rem(index, spec.block_pages), :, value] = zeros

    lax.fori_loop(0, spec.buffers * spec.block_pages, clear, None)


def _clear_tail(spec: AttendSpec, shared: _Refs, end, block, slot):
    """Zeroes the values past the end in the page that holds it: nobody has written those slots yet."""
    inside = end - block * spec.block_kv
    offset = lax.rem(end, spec.page_size)

    @pl.when((inside < spec.block_kv) & (offset > 0))
    def _():
        page, value = inside // spec.page_size, spec.parts - 1
        values = shared.kv[slot, page, :, value]
        position = lax.broadcasted_iota(jnp.int32, values.shape, 1)
        if values.dtype.itemsize == 1:  # a core has no selection among bytes
            values = values.astype(jnp.float32)
        kept = jnp.where(position < offset, values, jnp.zeros_like(values))
        shared.kv[slot, page, :, value] = kept.astype(shared.kv.dtype)


def _compute(spec: AttendSpec, shared: _Refs, group: _Group, item, *, block, slot):
    """One turn: takes a block of keys and values into an item's running sums."""
    _clear_tail(spec, shared, shared.item_ends[item], block, slot)

    @pl.when(block == _first_block(spec, shared, item))
    def _():
        _copy_queries(spec, shared, group, item).wait()
        group.total[...] = jnp.zeros_like(group.total)
        if group.sinks is None:
            group.top[...] = jnp.full_like(group.top, _MASKED)
            group.weight[...] = jnp.zeros_like(group.weight)
        else:  # a sink is a score that was there before all others, and whose value is zero
            group.top[...] = group.sinks[...]
            group.weight[...] = jnp.ones_like(group.weight)

    def attend(masked):
        one = functools.partial(_attend_head, spec, shared, group, item, block, slot, masked)
        _each_head(spec.num_kv_heads, group.is_decode, one)

    if group.is_decode:
        attend(True)
    else:
        whole = _sees_all(spec, shared, group, item, block)
        pl.when(whole)(lambda: attend(False))
        pl.when(~whole)(lambda: attend(True))

    @pl.when(_is_last(spec, shared, item, block))
    def _():
        pl.when(item - 2 >= group.first)(lambda: _copy_result(shared, group, item - 2).wait())
        out = lax.rem(item - group.first, 2)

        def finish(head):
            weight = _widen(group.weight[head], spec.lanes)
            result = group.total[head] / jnp.where(weight > 0, weight, 1)
            groups, _, *rest = group.out_buffer.shape[1:]
            group.out_buffer[out, :, head] = result.astype(group.out_buffer.dtype).reshape(groups, *rest)

        _each_head(spec.num_kv_heads, group.is_decode, finish)
        _copy_result(shared, group, item).start()


def _each_head(num_heads, side_by_side, run):
    """Calls run(head) for every kv head: written out in eights, or in a loop where one head is work enough."""
    step = max(n for n in range(1, _HEADS_AT_ONCE + 1) if num_heads % n == 0) if side_by_side else 1

    def some(first, _):
        for offset in range(step):
            run(first * step + offset)

    if step == num_heads:
        some(0, None)
    else:
        lax.fori_loop(0, num_heads // step, some, None)


def _sees_all(spec: AttendSpec, shared: _Refs, group: _Group, item, block):
    """Whether every query token of a block of queries sees every key of a block of keys."""
    start = shared.item_starts[item]
    whole = (block + 1) * spec.block_kv <= start + 1
    if spec.sliding_window is not None:
        tokens = spec.block_groups * group.q_buffer.shape[4]
        whole &= block * spec.block_kv > start + tokens - 1 - spec.sliding_window
    return whole


def _seen(spec: AttendSpec, shared: _Refs, group: _Group, item, block, first, count):
    """[count, vectors, tokens, block_kv] which query vector of some groups, from the first on, sees which key."""
    _, _, vectors, tokens, _ = group.q_buffer.shape[1:]
    shape = (count, vectors, tokens, spec.block_kv)
    key = block * spec.block_kv + lax.broadcasted_iota(jnp.int32, shape, 3)
    position = shared.item_starts[item] + first * tokens
    if not group.is_decode:
        position += lax.broadcasted_iota(jnp.int32, shape, 0) * tokens + lax.broadcasted_iota(jnp.int32, shape, 2)
    seen = key <= position
    if spec.sliding_window is not None:
        seen &= key > position - spec.sliding_window
    return seen


def _attend_head(spec: AttendSpec, shared: _Refs, group: _Group, item, block, slot, masked, head):
    """Takes one head's keys and values of a block into the running sums, for some groups of queries at a time."""
    dtype = group.q_buffer.dtype  # of an 8-bit pool's numbers too, once they are read
    keys = shared.kv[slot, :, head, 0].reshape(spec.block_kv, spec.lanes).astype(dtype)
    values = shared.kv[slot, :, head, spec.parts - 1].reshape(spec.block_kv, spec.lanes).astype(dtype)
    groups, _, vectors, tokens, _ = group.q_buffer.shape[1:]
    count = math.gcd(groups, max(_VECTORS_AT_ONCE // (vectors * tokens), 1))
    for first in range(0, groups, count):
        queries = group.q_buffer[lax.rem(item, spec.buffers), pl.ds(first, count), head].reshape(-1, spec.lanes)
        seen = _seen(spec, shared, group, item, block, first, count) if masked else None
        _attend_vectors(spec, group, head, first // count, queries, keys, values, seen)


def _attend_vectors(spec: AttendSpec, group: _Group, head, index, queries, keys, values, seen):
    """Takes keys and values [block_kv, lanes] into the sums of `queries` [vectors, lanes], part `index` of a head's."""
    rows = pl.ds(index * queries.shape[0], queries.shape[0])
    dot = functools.partial(
        lax.dot_general,
        precision=lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    scores = dot(queries, keys, (((1,), (1,)), ((), ()))) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    if seen is not None:
        scores = jnp.where(seen, scores.reshape(seen.shape), _MASKED).reshape(scores.shape)
    top = group.top[head, rows]
    new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
    # Zero where masked; one where nothing has been seen yet, which the first seen block's factor of 0 wipes out.
    weights = jnp.exp(scores - _widen(new_top, spec.block_kv))
    factor = jnp.exp(top - new_top)
    group.top[head, rows] = new_top
    group.weight[head, rows] = group.weight[head, rows] * factor + weights.sum(axis=1, keepdims=True)
    sums = dot(weights.astype(queries.dtype), values, (((1,), (0,)), ((), ())))
    group.total[head, rows] = group.total[head, rows] * _widen(factor, spec.lanes) + sums


def _widen(x, width):
    """x [rows, 128], the same number in every lane, in so many lanes; nothing moves from lane to lane."""
    return jnp.concatenate([x] * pl.cdiv(width, _LANES), axis=1)[:, :width]
