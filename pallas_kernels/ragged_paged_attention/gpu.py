"""ragged_paged_attention on Hopper: rows of one query token through one kernel, longer rows through another.

Called by api.py only. Owns the work list of a step on a GPU. The pool has the layout of xla.py, whose scatter also
writes it, in place. Shapes the kernels do not take (float32, odd head sizes, pages
under 16 tokens) go through xla.py as a whole; of the two work lists XLA drops the one that no layer reads.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import xla
from pallas_kernels.ragged_paged_attention.gpu_decode import DecodeWork, decode, plan_decode
from pallas_kernels.ragged_paged_attention.gpu_prefill import PrefillWork, plan_prefill, prefill, tokens_per_block
from pallas_kernels.ragged_paged_attention.gpu_tiles import HOPPER, INTERPRETED, Tiles, product_dtype, supports
from pallas_kernels.ragged_paged_attention.implementation import Options

pool_shape = xla.pool_shape
write_kv = xla.write_kv


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WorkList:
    """The step's work; shared by all layers.

    Attributes:
        decodes: the rows of one query token.
        prefills: tokens of a block -> the longer rows, cut into blocks of so many.
        page_table: [B, P] int32, clipped to pages that exist.
        num_decodes: int32, rows of one query token.
        fallback: the same step for xla.py.
        page_size, tiles: what it was cut for. decode_only: there are no longer rows.
    """

    decodes: DecodeWork
    prefills: dict[int, PrefillWork]
    page_table: jax.Array
    num_decodes: jax.Array
    fallback: xla.WorkList
    page_size: int = field(metadata={"static": True})
    tiles: Tiles = field(metadata={"static": True})
    decode_only: bool = field(metadata={"static": True})


def make_work_list(
    page_table, kv_lens, query_starts, num_decodes, *, num_tokens, num_pages, page_size, device, decode_only=False
):
    """Cuts a step into pieces of decode rows and blocks of query tokens (see WorkList)."""
    tiles = HOPPER if device.platform == "gpu" else INTERPRETED
    rows = min(kv_lens.shape[0], num_tokens)
    lens = jnp.where(jnp.arange(rows) < num_decodes, kv_lens[:rows], 0)
    fallback = xla.make_work_list(
        page_table,
        kv_lens,
        query_starts,
        num_decodes,
        num_tokens=num_tokens,
        num_pages=num_pages,
        page_size=page_size,
        decode_only=decode_only,
        device=device,
    )

    def prefills(block_q: int) -> PrefillWork:
        return plan_prefill(kv_lens, query_starts, num_decodes, num_tokens=num_tokens, block_q=block_q)

    return WorkList(
        decodes=plan_decode(lens, page_table.shape[1] * page_size, tiles),
        prefills={size: prefills(size) for size in {tokens_per_block(1), tokens_per_block(2)}},
        page_table=jnp.clip(page_table, 0, num_pages - 1),
        num_decodes=num_decodes,
        fallback=fallback,
        page_size=page_size,
        tiles=tiles,
        decode_only=decode_only,
    )


def attend(q, pool, work: WorkList, first_page, options: Options):
    """Causal attention of the packed queries q [T, N, H] on their rows' KV. Returns [T, N, H] of q's dtype."""
    taken = supports(q.shape[-1], q.dtype, work.page_size, work.tiles)
    if not taken or product_dtype(q.dtype, pool.dtype) is None:
        return xla.attend(q, pool, work.fallback, first_page, options)
    rows = work.decodes.rows.shape[0]
    decoded = decode(q[:rows], pool, work.page_table[:rows], work.decodes, first_page, options, work.tiles)
    if work.decode_only:
        return decoded
    blocks = work.prefills[tokens_per_block(q.shape[1] // pool.shape[1])]
    longer = prefill(q, pool, work.page_table, blocks, first_page, options, work.tiles)
    # A scatter, which XLA does in place: the results of other tokens are not read and written once more.
    token = jnp.arange(rows)
    token = jnp.where(token < work.num_decodes, token, q.shape[0] + token)  # past the end: dropped
    return longer.at[token].set(decoded, mode="drop", unique_indices=True)
