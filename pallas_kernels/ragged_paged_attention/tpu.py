"""ragged_paged_attention on TPUs: layout, work list, and what XLA does around the two Pallas kernels.

Called by api.py only. tpu_attend.py and tpu_write.py hold the kernels, tpu_tiles.py their sizes by chip generation.

The pool is `[layers * pages, K, parts, page_size, lanes]`. Heads of more than 64 dimensions have two parts, keys and
values, each padded to whole lanes of 128; smaller ones have one, keys in lanes [0, 64) and values in [64, 128), so that
nothing is padded at 64. Each (page, head, part) is then a run of whole tiles, so a page is fetched by one DMA, a head's
tiles are the operand of a matrix product as they lie, and no DMA needs a reshaped or bitcast ref. Its price: a new
token is one row of a tile, so writing it reads and writes the tile (see tpu_write.py).

Method: the flat walk over (row, KV block) pairs with several page fetches in flight follows Ragged Paged Attention
(arXiv 2604.15464); softmax is the online one of FlashAttention (arXiv 2205.14135).
"""

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.implementation import Options
from pallas_kernels.ragged_paged_attention.tpu_attend import AttendSpec, attend_kernel
from pallas_kernels.ragged_paged_attention.tpu_tiles import Tiles, tiles_for
from pallas_kernels.ragged_paged_attention.tpu_write import write_kernel

_LANES = 128
_HALF = _LANES // 2
#: Rows of a page that are written together, in whole tiles: of 2-byte elements and larger ones, and of 1-byte elements.
_UNIT_ROWS, _UNIT_ROWS_OF_BYTES = 16, 32
#: Query tokens that are moved together.
_GROUP = 16
_SUBLANES = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Items:
    """What attention works on: decode rows, then blocks of query tokens of the longer rows. I items at most.

    The query tokens of longer rows lie in groups of _GROUP tokens, each row beginning a new one: S groups at most.

    Attributes:
        counts: [2] int32, decode rows and items. Item i below the first is row i.
        rows, starts, ends: [I + 1] int32, row, position of the first query token, and number of key positions that the
            last query token sees.
        groups: [I + 1] int32, first group of a block.
        tokens: [S, _GROUP] int32, the packed token at each place, some real one where there is none; None where the
            step has decode rows only.
        places: [T] int32, the place of each packed token of a longer row, in [S * _GROUP]; negative for other tokens.
    """

    counts: jax.Array
    rows: jax.Array
    starts: jax.Array
    ends: jax.Array
    groups: jax.Array
    tokens: jax.Array | None = None
    places: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Units:
    """What is written: groups of so many rows of a page, or whole pages where these are smaller. U at most.

    Attributes:
        count: [1] int32.
        pages, groups: [U] int32, page in a layer, and which group of its rows.
        firsts, ends: [U] int32, which rows of the unit are new.
        tokens: [U, rows] int32 or [U, 1], the packed token of each row, some real one where the row is not new; with
            one token, it is that of every new row.
    """

    count: jax.Array
    pages: jax.Array
    groups: jax.Array
    firsts: jax.Array
    ends: jax.Array
    tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WorkList:
    """The step cut into work, made once and shared by all layers.

    page_table: [B * P] int32, clipped to pages that exist.
    units: by their rows, for XLA drops those that no pool's elements want: of decode rows, then of longer rows if there
        are any.
    num_rows: B. table_width: P.
    """

    page_table: jax.Array
    items: Items
    units: dict[int, tuple[Units, ...]]
    tiles: Tiles = field(metadata={"static": True})
    num_rows: int = field(metadata={"static": True})
    table_width: int = field(metadata={"static": True})


def pool_shape(num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of the pool in this package's layout."""
    parts, lanes = (1, _LANES) if head_dim <= _HALF else (2, -(-head_dim // _LANES) * _LANES)
    return (num_layers * num_pages, num_kv_heads, parts, page_size, lanes)


def make_work_list(
    page_table, kv_lens, query_starts, num_decodes, *, num_tokens, num_pages, page_size, device, decode_only=False
):
    """Cuts a step into items of attention and units of writing (see WorkList)."""
    tiles = tiles_for(device.kind)
    table = jnp.clip(page_table, 0, num_pages - 1)
    query_lens = query_starts[1:] - query_starts[:-1]
    firsts = kv_lens - query_lens
    decode = jnp.arange(min(kv_lens.size, num_tokens), dtype=jnp.int32)
    position = jnp.maximum(firsts, 0)[decode]
    sizes = {min(page_size, _UNIT_ROWS), min(page_size, _UNIT_ROWS_OF_BYTES)}
    units = {
        rows: Units(
            count=num_decodes.reshape(1),
            pages=table[decode, position // page_size],
            groups=position % page_size // rows,
            firsts=position % rows,
            ends=position % rows + 1,
            tokens=query_starts[decode][:, None],
        )
        for rows in sizes
    }
    items = Items(jnp.stack([num_decodes, num_decodes]), decode, position, kv_lens[decode], decode)
    if decode_only:
        decode_units = {rows: (own,) for rows, own in units.items()}
        return WorkList(table.reshape(-1), _one_more(items), decode_units, tiles, *table.shape)
    is_long = (jnp.arange(kv_lens.size) >= num_decodes) & (query_lens > 0)
    lens = jnp.where(is_long, query_lens, 0)
    items = _add_blocks(items, lens, query_starts, firsts, num_tokens, tiles.block_q)
    all_units = {
        rows: (own, _long_units(table, lens, query_starts, firsts, num_tokens, page_size, rows))
        for rows, own in units.items()
    }
    return WorkList(table.reshape(-1), _one_more(items), all_units, tiles, *table.shape)


def _one_more(items: Items) -> Items:
    """With an entry that stands for the item after the last, which the kernel's cursors look at."""
    more = {name: jnp.pad(getattr(items, name), (0, 1)) for name in ("rows", "starts", "ends", "groups")}
    return dataclasses.replace(items, **more)


def _spread(counts, size):
    """For things of which row b has counts[b]: the row of each and its number in the row, [size] each, and how many."""
    ends = jnp.cumsum(counts)
    index = jnp.arange(size, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right"), counts.size - 1).astype(jnp.int32)
    return row, index - (ends - counts)[row], ends[-1]


def _add_blocks(items: Items, lens, query_starts, firsts, num_tokens, block_q) -> Items:
    """The items, and behind the decode rows the blocks of the longer rows, which have `lens` query tokens."""
    num_decodes, decodes = items.counts[0], items.rows.size
    # Every longer row adds at most one block, and one group, that is not full.
    row, number, count = _spread(-(-lens // block_q), num_tokens // block_q + decodes)
    start = firsts[row] + number * block_q
    end = jnp.minimum(start + block_q, (firsts + lens)[row])
    groups_of_row = -(-lens // _GROUP)
    group = (jnp.cumsum(groups_of_row) - groups_of_row)[row] + number * (block_q // _GROUP)
    index = jnp.arange(decodes + row.size, dtype=jnp.int32)
    block = jnp.clip(index - num_decodes, 0, row.size - 1)

    def joined(of_decodes, of_blocks):
        return jnp.where(index < num_decodes, of_decodes[jnp.minimum(index, decodes - 1)], of_blocks[block])

    tokens, places = _group_tokens(lens, query_starts, num_tokens, num_tokens // _GROUP + decodes)
    return Items(
        counts=jnp.stack([num_decodes, num_decodes + count]),
        rows=joined(items.rows, row),
        starts=joined(items.starts, start),
        ends=joined(items.ends, end),
        groups=joined(items.groups, group),
        tokens=tokens,
        places=places,
    )


def _group_tokens(lens, query_starts, num_tokens, most):
    """Items.tokens and Items.places."""
    row, number, count = _spread(-(-lens // _GROUP), min(most, num_tokens))
    offset = number[:, None] * _GROUP + jnp.arange(_GROUP, dtype=jnp.int32)
    token = query_starts[row][:, None] + offset
    real = (jnp.arange(row.size) < count)[:, None] & (offset < lens[row][:, None])
    place = jnp.arange(token.size, dtype=jnp.int32).reshape(token.shape)
    places = jnp.full(num_tokens, -1, jnp.int32).at[jnp.where(real, token, num_tokens)].set(place, mode="drop")
    return jnp.clip(token, 0, num_tokens - 1), places


def _long_units(table, lens, query_starts, firsts, num_tokens, page_size, rows) -> Units:
    first_unit = firsts // rows
    counts = jnp.where(lens > 0, (firsts + lens - 1) // rows - first_unit + 1, 0)
    # A row touches two units more than it fills, and never more than it has tokens.
    most = min(num_tokens, num_tokens // rows + 2 * lens.size)
    row, number, count = _spread(counts, most)
    position = (first_unit[row] + number) * rows
    offset = position - firsts[row]
    token = (query_starts[row] + offset)[:, None] + jnp.arange(rows, dtype=jnp.int32)
    return Units(
        count=count.reshape(1),
        pages=table[row, jnp.clip(position // page_size, 0, table.shape[1] - 1)],
        groups=position % page_size // rows,
        firsts=jnp.maximum(-offset, 0),
        ends=jnp.minimum(lens[row] - offset, rows),
        tokens=jnp.clip(token, 0, num_tokens - 1),
    )


def write_kv(pool, k, v, slots, work: WorkList, first_page):
    """Writes k and v [T, K, H] where the work list says, which is where `slots` says."""
    del slots
    _, heads, parts, page_size, lanes = pool.shape
    packing = 4 // pool.dtype.itemsize
    if page_size % (_SUBLANES * packing):
        raise ValueError(
            f"on a TPU, page_size must be a multiple of {_SUBLANES * packing} for {pool.dtype.name}, got {page_size}"
        )
    width = lanes if parts == 2 else _HALF
    new = jnp.stack([_pad_lanes(k, width), _pad_lanes(v, width)], axis=2).astype(pool.dtype)
    new = new.reshape(-1, heads, parts, lanes)
    unit_rows = min(page_size, _UNIT_ROWS_OF_BYTES if pool.dtype.itemsize == 1 else _UNIT_ROWS)
    kinds = []
    for units in work.units[unit_rows]:
        # [U, K, parts, rows of tokens, lanes]
        rows = new[units.tokens].transpose(0, 2, 3, 1, 4)
        kinds.append((units.count, units.pages, units.groups, units.firsts, units.ends, rows))
    return write_kernel(pool, first_page.reshape(1), kinds, rows=unit_rows)


def _pad_lanes(x, width):
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))


def attend(q, pool, work: WorkList, first_page, options: Options):
    """Attention of q [T, N, H] on the layer's pages."""
    num_tokens, num_heads, head_dim = q.shape
    _, heads, parts, page_size, lanes = pool.shape
    items, tiles = work.items, work.tiles
    vectors = num_heads // heads
    num_decodes = items.counts[0]
    padded = -(-vectors // _SUBLANES) * _SUBLANES
    grouped = _pad_lanes(q, lanes).reshape(num_tokens, heads, vectors, lanes)
    # [items, K, 1, query vectors of a kv head, lanes], and [groups, K, query vectors, tokens, lanes]
    decodes = grouped[: min(num_tokens, work.num_rows)]
    queries = [jnp.pad(decodes, ((0, 0), (0, 0), (0, padded - vectors), (0, 0)))[:, :, None]]
    if items.tokens is not None:
        queries.append(grouped[items.tokens].transpose(0, 2, 3, 1, 4))
    spec = AttendSpec(
        num_kv_heads=heads,
        parts=parts,
        page_size=page_size,
        lanes=lanes,
        block_pages=min(max(tiles.block_kv // page_size, 1), work.table_width),
        table_width=work.table_width,
        buffers=tiles.buffers,
        block_groups=tiles.block_q // _GROUP,
        scale=options.scale,
        sliding_window=options.sliding_window,
        soft_cap=options.logits_soft_cap,
        has_sinks=options.sinks is not None,
        vmem_limit_bytes=tiles.vmem_limit_bytes,
    )
    scalars = (first_page.reshape(1), items.counts, items.rows, items.starts, items.ends, items.groups, work.page_table)
    sinks = _sink_rows(options.sinks, heads, padded, None if items.tokens is None else tiles.block_q)
    results = attend_kernel(spec, scalars, queries, sinks, pool)
    # Values lie in the upper half of the lanes where they share them with keys.
    values = slice(_HALF, _HALF + head_dim) if parts == 1 else slice(0, head_dim)
    out = results[0][:, :, 0, :vectors, values].reshape(-1, num_heads, head_dim)
    out = jnp.pad(out, ((0, num_tokens - out.shape[0]), (0, 0), (0, 0)))
    is_decode = jnp.arange(num_tokens) < num_decodes
    out = jnp.where(is_decode[:, None, None], out, 0)
    if items.places is not None:
        blocks = results[1][..., values].transpose(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)
        in_block = items.places >= 0
        out = jnp.where(in_block[:, None, None], blocks[jnp.maximum(items.places, 0)], out)
    return out


def _sink_rows(sinks, heads, padded, block_q):
    """For each kind of items, its query vectors' sinks [K, rows, 128] float32; none without sinks."""
    if sinks is None:
        return []
    sinks = sinks.astype(jnp.float32).reshape(heads, -1)
    vectors = sinks.shape[1]
    kinds = [jnp.pad(sinks, ((0, 0), (0, padded - vectors)))]
    if block_q is not None:
        kinds.append(jnp.tile(jnp.repeat(sinks, _GROUP, axis=1), (1, block_q // _GROUP)))
    return [jnp.broadcast_to(rows[:, :, None], (*rows.shape, _LANES)) for rows in kinds]
