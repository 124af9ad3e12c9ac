"""The vectorised XLA body of ragged_paged_attention: the CPU path, and the fallback everywhere else.

Owns the layout of the KV pool `[layers * pages, K, 2, page_size, H]` (one contiguous key tile and value tile per page
and kv head, so that a gather of pages lands in the order the matrix products want), the work list made once per step,
and the two loops over it. Called by api.py only. It never looks at more of the KV than the longest row of a group has:
every loop has a trip count from the step's own lengths.

Method: online softmax over chunks of key positions (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv
2205.14135). Chunks start at multiples of a fixed size, and a chunk that is masked for a row is an exact no-op for it
(factor 1, sum plus 0), so a row's result does not depend on how long its neighbours are.
"""

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.implementation import Options

_MASKED = -1e30  # finite, so that a row with nothing seen yet gives exp(0) = 1 and not NaN


@dataclass(frozen=True)
class Tiles:
    """Sizes of the work items.

    Attributes:
        decode_rows: rows of one query token that are handled together; each group runs as long as its longest row.
        decode_chunk: key positions per iteration of a decode group.
        block_q: query tokens of one block of a longer row.
        blocks: blocks that are handled together.
        prefill_chunk: key positions per iteration of a group of blocks.
    """

    decode_rows: int
    decode_chunk: int
    block_q: int
    blocks: int
    prefill_chunk: int


CPU_TILES = Tiles(decode_rows=8, decode_chunk=128, block_q=32, blocks=4, prefill_chunk=128)
ACCELERATOR_TILES = Tiles(decode_rows=64, decode_chunk=256, block_q=64, blocks=16, prefill_chunk=256)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WorkList:
    """The step's rows, cut into work; shared by all layers.

    Attributes:
        decode_order: [D] int32, decode rows by descending KV length, then the other rows.
        decode_lens: [D] int32, their KV lengths; 0 for rows that are no decode rows.
        num_decodes: int32.
        block_rows, block_tokens, block_sizes, block_positions: [G] int32, row, first packed token, number of tokens
            and first position of each query block of the longer rows.
        num_blocks: int32, how many of the G blocks are real.
        page_table: [B, W] int32, clipped to pages that exist, padded to whole chunks.
        tiles: the sizes it was cut with. decode_only: there are no longer rows, and no code for them.
    """

    decode_order: jax.Array
    decode_lens: jax.Array
    num_decodes: jax.Array
    block_rows: jax.Array
    block_tokens: jax.Array
    block_sizes: jax.Array
    block_positions: jax.Array
    num_blocks: jax.Array
    page_table: jax.Array
    tiles: Tiles = field(metadata={"static": True})
    decode_only: bool = field(metadata={"static": True})


def pool_shape(num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of the pool in this package's layout."""
    return (num_layers * num_pages, num_kv_heads, 2, page_size, head_dim)


def keys_only_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a pool's shape, that of one whose values are part of the keys."""
    return (*shape[:2], 1, *shape[3:])


def make_work_list(
    page_table, kv_lens, query_starts, num_decodes, *, num_tokens, num_pages, page_size, device, decode_only=False
):
    """Cuts a step into groups of decode rows and blocks of query tokens (see WorkList)."""
    tiles = CPU_TILES if device.platform == "cpu" else ACCELERATOR_TILES
    batch = kv_lens.shape[0]
    rows = min(batch, num_tokens)
    lens = jnp.where(jnp.arange(rows) < num_decodes, kv_lens[:rows], 0)
    order = jnp.argsort(-lens, stable=True).astype(jnp.int32)
    query_lens = query_starts[1:] - query_starts[:-1]
    is_long = (jnp.arange(batch) >= num_decodes) & (query_lens > 0)
    blocks_per_row = jnp.where(is_long, -(-query_lens // tiles.block_q), 0)
    block_ends = jnp.cumsum(blocks_per_row)
    # Every row past the decodes adds at most one block that is not full.
    max_blocks = num_tokens // tiles.block_q + min(batch, num_tokens)
    block = jnp.arange(max_blocks, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(block_ends, block, side="right"), batch - 1).astype(jnp.int32)
    first = (block - (block_ends - blocks_per_row)[row]) * tiles.block_q
    size = jnp.where(block < block_ends[-1], jnp.clip(query_lens[row] - first, 0, tiles.block_q), 0)
    chunk_pages = max(tiles.decode_chunk, tiles.prefill_chunk, page_size) // page_size
    padding = -page_table.shape[1] % chunk_pages
    return WorkList(
        decode_order=order,
        decode_lens=lens[order],
        num_decodes=num_decodes,
        block_rows=row,
        block_tokens=query_starts[row] + first,
        block_sizes=size,
        block_positions=(kv_lens - query_lens)[row] + first,
        num_blocks=block_ends[-1],
        page_table=jnp.pad(jnp.clip(page_table, 0, num_pages - 1), ((0, 0), (0, padding))),
        tiles=tiles,
        decode_only=decode_only,
    )


def write_kv(pool, k, v, slots, work, first_page):
    """Writes k and v [T, K, H] at flat token slots [T] of the layer whose pages start at `first_page`; negative: none.

    One scatter of contiguous rows of H along a single leading axis: that form stays in place on every platform. v is
    None where the pool has keys only.
    """
    del work
    _, num_kv_heads, _, page_size, head_dim = pool.shape
    page = first_page + slots // page_size
    if v is None:
        # Not by rows as below: with one kv head too, there XLA would bring the result into the pool's form by a copy.
        head = jnp.arange(num_kv_heads, dtype=jnp.int32)
        page = jnp.where(slots < 0, pool.shape[0], page)
        target = pool.at[page[:, None], head, 0, (slots % page_size)[:, None]]
        return target.set(k.astype(pool.dtype), mode="drop", unique_indices=True)
    tiles = 2 * num_kv_heads
    index = (page[:, None] * tiles + jnp.arange(tiles, dtype=jnp.int32)) * page_size + (slots % page_size)[:, None]
    index = jnp.where(slots[:, None] < 0, jnp.iinfo(jnp.int32).max, index)
    rows = jnp.stack([k, v], axis=2).astype(pool.dtype).reshape(-1, head_dim)
    flat = pool.reshape(-1, head_dim)
    return flat.at[index.reshape(-1)].set(rows, mode="drop", unique_indices=True).reshape(pool.shape)


def attend(q, pool, work: WorkList, first_page, options: Options):
    """Causal attention of the packed queries q [T, N, H] on their rows' KV. Returns [T, N, H] of q's dtype."""
    decoded = _attend_decodes(q, pool, work, first_page, options)
    if work.decode_only:
        return decoded
    out = jnp.zeros((q.shape[0], *decoded.shape[1:]), q.dtype).at[: decoded.shape[0]].set(decoded)
    return _attend_blocks(out, q, pool, work, first_page, options)


def _attend_decodes(q, pool, work, first_page, options):
    """Rows of one query token, whose token index is their row index. Returns [D, N, V], zero for other rows."""
    rows, num_heads, head_dim = work.decode_order.shape[0], q.shape[1], q.shape[2]
    value_dim = options.value_dim or head_dim
    num_kv_heads = pool.shape[1]
    group = min(work.tiles.decode_rows, rows)
    padding = -rows % group
    order = jnp.pad(work.decode_order, (0, padding))
    lens = jnp.pad(work.decode_lens, (0, padding))

    def run_group(g, out):
        row = jax.lax.dynamic_slice_in_dim(order, g * group, group)
        length = jax.lax.dynamic_slice_in_dim(lens, g * group, group)
        queries = q[row].reshape(group * num_kv_heads, num_heads // num_kv_heads, head_dim)
        position = (length - 1)[:, None]
        result = _attend_group(
            queries, pool, work.page_table[row], first_page, position, length, options, work.tiles.decode_chunk
        )
        result = result.reshape(group, num_heads, value_dim).astype(q.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, result, g * group, axis=0)

    out = jnp.zeros((rows + padding, num_heads, value_dim), q.dtype)
    out = jax.lax.fori_loop(0, -(-work.num_decodes // group), run_group, out)
    out = jnp.zeros((rows, num_heads, value_dim), q.dtype).at[work.decode_order].set(out[:rows], unique_indices=True)
    return jnp.where((jnp.arange(rows) < work.num_decodes)[:, None, None], out, 0)


def _attend_blocks(out, q, pool, work, first_page, options):
    """Rows of more than one query token, a few blocks of tokens at a time; writes their tokens of `out`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = pool.shape[1]
    heads_per_kv = num_heads // num_kv_heads
    group, size = min(work.tiles.blocks, work.block_rows.shape[0]), work.tiles.block_q
    offset = jnp.arange(size, dtype=jnp.int32)

    def run_group(g, out):
        # Clipped rather than padded: a last group that is moved back computes some blocks twice, to the same values.
        start = jnp.minimum(g * group, work.block_rows.shape[0] - group)
        row, token, count, position = (
            jax.lax.dynamic_slice_in_dim(x, start, group)
            for x in (work.block_rows, work.block_tokens, work.block_sizes, work.block_positions)
        )
        token = token[:, None] + offset
        real = offset < count[:, None]
        queries = q[jnp.where(real, token, 0)].reshape(group, size, num_kv_heads, heads_per_kv, head_dim)
        queries = queries.transpose(0, 2, 3, 1, 4).reshape(group * num_kv_heads, heads_per_kv * size, head_dim)
        position = jnp.where(real, position[:, None] + offset, -1)
        position = jnp.tile(position, (1, heads_per_kv))
        length = position.max(axis=1) + 1
        result = _attend_group(
            queries, pool, work.page_table[row], first_page, position, length, options, work.tiles.prefill_chunk
        )
        result = result.reshape(group, num_kv_heads, heads_per_kv, size, -1).transpose(0, 3, 1, 2, 4)
        result = result.reshape(group * size, num_heads, -1).astype(q.dtype)
        target = jnp.where(real, token, num_tokens).reshape(-1)
        return out.at[target].set(result, mode="drop", unique_indices=True)

    return jax.lax.fori_loop(0, -(-work.num_blocks // group), run_group, out)


def _attend_group(queries, pool, pages, first_page, positions, lens, options, chunk):
    """Online softmax over the KV of R rows at once, a chunk of key positions at a time.

    Args:
        queries: [R * K, M, H], the M query vectors that share a kv head.
        pages: [R, W] int32 pages in one layer, whole chunks of them.
        positions: [R, M] int32 position of each query vector's token, or [R, 1] for all; negative: no token.
        lens: [R] int32 number of key positions to look at.

    Returns:
        [R * K, M, V] float32; finite and of no meaning where there is nothing to see.
    """
    num_kv_heads, page_size = pool.shape[1], pool.shape[3]
    size = max(chunk, page_size)
    first = jnp.int32(0)
    if options.sliding_window is not None:
        oldest = jnp.maximum(positions - options.sliding_window + 1, 0)
        first = jnp.where(positions >= 0, oldest, jnp.iinfo(jnp.int32).max).min() // size
    precision = jax.lax.Precision.HIGHEST if queries.dtype == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def attend_chunk(c, carry):
        acc, top, total = carry
        page = jax.lax.dynamic_slice_in_dim(pages, c * (size // page_size), size // page_size, axis=1)
        keys, values = _read_tiles(pool, page + first_page, options.value_dim)
        keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
        key_position = c * size + jnp.arange(size, dtype=jnp.int32)
        scores = einsum("rmh,rsh->rms", queries, keys)
        scores = _mask_scores(scores, key_position, positions, num_kv_heads, options)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        # Zero where masked; one where the row has seen nothing yet, which the first seen chunk's factor of 0 wipes out.
        weights = jnp.exp(scores - new_top[..., None])
        # Slots that hold nothing may hold NaN, and 0 * NaN is NaN.
        written = jnp.repeat(key_position < lens[:, None], num_kv_heads, axis=0)
        values = jnp.where(written[:, :, None], values, 0)
        factor = jnp.exp(top - new_top)
        acc = acc * factor[..., None] + einsum("rms,rsh->rmh", weights.astype(values.dtype), values)
        return acc, new_top, total * factor + weights.sum(axis=-1)

    statistic = jnp.zeros(queries.shape[:2], jnp.float32)
    value_dim = options.value_dim or pool.shape[4]
    carry = (jnp.zeros((*queries.shape[:2], value_dim), jnp.float32), statistic + _MASKED, statistic)
    acc, top, total = jax.lax.fori_loop(first, -(-lens.max() // size), attend_chunk, carry)
    if options.sinks is not None:
        acc, total = _add_sinks(acc, top, total, options.sinks, num_kv_heads)
    return acc / jnp.where(total > 0, total, 1)[..., None]


def _mask_scores(scores, key_position, positions, num_kv_heads, options):
    """Scores [R * K, M, S] after scale and soft cap, _MASKED where the token at `positions` does not see the key."""
    scores = scores * jnp.float32(options.scale)
    if options.logits_soft_cap is not None:
        scores = options.logits_soft_cap * jnp.tanh(scores / options.logits_soft_cap)
    seen = key_position <= positions[:, :, None]
    if options.sliding_window is not None:
        seen &= key_position > positions[:, :, None] - options.sliding_window
    return jnp.where(jnp.repeat(seen, num_kv_heads, axis=0), scores, _MASKED)


def _read_tiles(pool, page, value_dim):
    """Keys and values, [R * K, S, H] each, of the pages [R, n] (indices into the pool), in the order of positions."""
    num_kv_heads, parts, page_size, head_dim = pool.shape[1:]
    head = parts * jnp.arange(num_kv_heads, dtype=jnp.int32)[:, None]
    tile = (page[:, None, :] * (parts * num_kv_heads) + head).reshape(-1, page.shape[1])
    tiles = pool.reshape(-1, page_size, head_dim)
    shape = (tile.shape[0], -1, head_dim)
    keys = tiles[tile].reshape(shape)
    return keys, (keys[..., :value_dim] if parts == 1 else tiles[tile + 1].reshape(shape))


def _add_sinks(acc, top, total, sinks, num_kv_heads):
    """The sums after each query head's sink, a logit without a value, has joined its softmax."""
    rows_heads, count = top.shape
    sink = jnp.repeat(sinks.astype(jnp.float32).reshape(num_kv_heads, -1), count * num_kv_heads // sinks.size, axis=1)
    sink = jnp.tile(sink, (rows_heads // num_kv_heads, 1))
    new_top = jnp.maximum(top, sink)
    factor = jnp.exp(top - new_top)
    return acc * factor[..., None], total * factor + jnp.exp(sink - new_top)
