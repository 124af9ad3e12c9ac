"""The Hopper kernels of ragged_paged_attention in GPU interpret mode, against the float64 reference.

Every slot that no token may read holds NaN, and page ids past a row's need are arbitrary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import (
    Device,
    Ragged,
    plan,
    ragged_paged_attention,
    reference,
    write_kv,
    xla,
)
from pallas_kernels.ragged_paged_attention.cases import Inputs, Mix, Shape, in_8_bits, make_inputs
from pallas_kernels.ragged_paged_attention.gpu_decode import DecodeWork, item_cost, max_splits, plan_decode
from pallas_kernels.ragged_paged_attention.gpu_prefill import plan_prefill
from pallas_kernels.ragged_paged_attention.gpu_tiles import HOPPER, INTERPRETED

LAYER = 1
#: Of the whole output, by the norm: rounding of weights, pieces and results, to 8 bits each in bfloat16.
TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float16: 5e-4}


def _check(shape: Shape, mix: Mix, page_size: int = 16, dtype=jnp.bfloat16, seed: int = 0, **options):
    _check_inputs(
        make_inputs(shape, mix, page_size=page_size, dtype=dtype, seed=seed), mix, page_size, dtype, **options
    )


def _check_inputs(inputs: Inputs, mix: Mix, page_size: int, dtype, kv_scales=None, **options):
    with plgpu.force_gpu_interpret_mode():
        shared = plan(
            inputs.ragged,
            num_tokens=mix.num_tokens,
            num_pages=inputs.num_pages,
            page_size=page_size,
            decode_only=all(tokens == 1 for _, tokens in mix.rows),
            implementation="gpu",
        )
        pool = write_kv(inputs.pool, inputs.k, inputs.v, shared, jnp.int32(LAYER), kv_scales=kv_scales)
        options = {"scale": inputs.q.shape[-1] ** -0.5, **options}
        out = ragged_paged_attention(inputs.q, pool, shared, jnp.int32(LAYER), kv_scales=kv_scales, **options)
    if kv_scales is not None:
        pool = np.asarray(pool, np.float32) * np.asarray(kv_scales).T[None, :, :, None, None]
    wanted = reference.ragged_paged_attention(inputs.q, pool, inputs.ragged, LAYER, inputs.num_pages, **options)
    out = np.asarray(out, np.float32)
    assert np.isfinite(out).all()
    assert not out[int(inputs.ragged.query_starts[-1]) :].any()
    assert np.linalg.norm(out - wanted) <= TOLERANCE[dtype] * np.linalg.norm(wanted)


@pytest.mark.parametrize("page_size", [16, pytest.param(128, marks=pytest.mark.long)])
def test_decode(page_size):
    _check(Shape(6, 2, 64), Mix(((1, 1), (64, 1), (65, 1), (300, 1)), 6, 6), page_size)


def _check_8_bits(pool_dtype, shape: Shape, mix: Mix, page_size: int = 16, dtype=jnp.bfloat16, **options):
    inputs, scales = in_8_bits(make_inputs(shape, mix, page_size=page_size, dtype=dtype), pool_dtype)
    _check_inputs(inputs, mix, page_size, dtype, kv_scales=scales, **options)


@pytest.mark.parametrize("pool_dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_decode_of_a_pool_of_8_bits(pool_dtype, monkeypatch):
    """Through the warpgroup that converts, with more tiles than it has buffers; nothing goes through XLA."""
    monkeypatch.setattr(xla, "attend", None)
    _check_8_bits(pool_dtype, Shape(6, 2, 64), Mix(((1, 1), (64, 1), (65, 1), (500, 1)), 6, 6))


@pytest.mark.long
@pytest.mark.parametrize(
    ("pool_dtype", "shape", "dtype"),
    [
        (jnp.float8_e4m3fn, Shape(4, 1, 128), jnp.float16),
        (jnp.float8_e4m3fn, Shape(3, 1, 96), jnp.bfloat16),
        (jnp.int8, Shape(2, 1, 256), jnp.bfloat16),
    ],
)
def test_decode_shapes_of_a_pool_of_8_bits(pool_dtype, shape, dtype):
    _check_8_bits(pool_dtype, shape, Mix(((200, 1),), 2, 2), 32, dtype, sliding_window=150)


@pytest.mark.parametrize("pool_dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_longer_rows_of_a_pool_of_8_bits(pool_dtype, monkeypatch):
    """Through the warpgroup that fetches and converts, with more tiles than there are buffers; nothing through XLA."""
    monkeypatch.setattr(xla, "attend", None)
    _check_8_bits(pool_dtype, Shape(2, 1, 64), Mix(((70, 1), (20, 20), (300, 67)), 90, 4), 32)


@pytest.mark.long
@pytest.mark.parametrize(
    ("pool_dtype", "shape", "dtype"),
    [
        (jnp.float8_e4m3fn, Shape(3, 1, 128), jnp.float16),
        (jnp.float8_e4m3fn, Shape(2, 1, 96), jnp.bfloat16),
        (jnp.int8, Shape(2, 1, 128), jnp.bfloat16),
        (jnp.int8, Shape(3, 1, 256), jnp.bfloat16),
        (jnp.float8_e4m3fn, Shape(2, 1, 256), jnp.bfloat16),
    ],
)
def test_prefill_shapes_of_a_pool_of_8_bits(pool_dtype, shape, dtype, monkeypatch):
    monkeypatch.setattr(xla, "attend", None)
    sinks = jnp.linspace(-1.0, 2.0, shape.num_heads)
    options = {"sliding_window": 150, "logits_soft_cap": 3.0, "sinks": sinks}
    _check_8_bits(pool_dtype, shape, Mix(((330, 70), (3, 3)), 80, 3), 16, dtype, **options)


def test_int8_with_float16_takes_the_fallback():
    _check_8_bits(jnp.int8, Shape(2, 1, 64), Mix(((70, 1), (20, 20)), 24, 4), dtype=jnp.float16)


def test_decode_with_every_option():
    sinks = jnp.asarray([-1.0, 2.0])
    options = {"sliding_window": 100, "logits_soft_cap": 3.0, "sinks": sinks, "scale": 0.2}
    _check(Shape(2, 1, 64), Mix(((150, 1), (99, 1)), 2, 2), **options)


@pytest.mark.long
def test_decode_of_a_window_that_leaves_pieces_empty():
    _check(Shape(2, 1, 64), Mix(((700, 1), (30, 1)), 2, 2), sliding_window=100)


@pytest.mark.parametrize("shape", [Shape(1, 1, 64), Shape(6, 2, 64), Shape(16, 1, 64)], ids=str)
def test_every_row_is_cut(shape):
    """Into five pieces and four; those of 16 query heads are more than one tile when they are merged."""
    _check(shape, Mix(((300, 1), (200, 1)), 2, 2), sinks=jnp.linspace(-2.0, 3.0, shape.num_heads))


def test_pieces_of_a_group_that_does_not_divide_a_tile_are_merged():
    """12 query heads on a kv head, and more pieces than a tile of 64 results has room for."""
    _check(Shape(12, 1, 64), Mix(((700, 1), (33, 1)), 2, 2), 32)


def test_no_row_is_cut_though_some_might_be():
    mix = Mix(((20, 1),) * 32, 32, 32)
    page_size = 128
    inputs = make_inputs(Shape(2, 1, 64), mix, page_size=page_size)
    lens, max_len = inputs.ragged.kv_lens, inputs.ragged.page_table.shape[1] * page_size
    assert max_splits(len(mix.rows), -(-max_len // INTERPRETED.block), INTERPRETED) > 1
    assert (plan_decode(lens, max_len, INTERPRETED).rows[:, 1] == 1).all()
    _check(Shape(2, 1, 64), mix, page_size)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "dtype"), [(Shape(4, 1, 128), jnp.float16), (Shape(3, 1, 96), jnp.bfloat16)])
def test_decode_shapes(shape, dtype):
    _check(shape, Mix(((100, 1),), 2, 2), 32, dtype)


def test_mixed():
    _check(Shape(2, 1, 64), Mix(((70, 1), (20, 20), (80, 67)), 90, 4), 32)


@pytest.mark.parametrize("pool_dtype", [jnp.bfloat16, pytest.param(jnp.int8, marks=pytest.mark.long)])
def test_a_token_is_the_same_however_its_row_is_cut(pool_dtype):
    """Tokens 3 to 89 of a sequence as one row, and as three that begin and end within key tiles."""
    shape, page_size, first, total = Shape(2, 1, 64), 16, 3, 90
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((total, 2, 64))
    pool = jnp.asarray(rng.standard_normal((8, 1, 2, page_size, 64)) * 10).astype(pool_dtype)
    table = jnp.asarray(np.tile(rng.permutation(8), (4, 1)), jnp.int32)

    def run(*ends: int):
        begins = [first, *ends][:-1]
        query_lens = np.diff([first, *ends])
        starts = np.concatenate([[0], np.cumsum(query_lens)])
        tokens = np.concatenate([queries[begin:end] for begin, end in zip(begins, ends, strict=True)])
        pad = 4 - len(ends)
        ragged = Ragged(
            table,
            jnp.asarray([*ends] + [0] * pad, jnp.int32),
            jnp.asarray([*starts] + [starts[-1]] * pad, jnp.int32),
            jnp.int32(0),
        )
        q = jnp.asarray(np.pad(tokens, ((0, 128 - len(tokens)), (0, 0), (0, 0))), jnp.bfloat16)
        with plgpu.force_gpu_interpret_mode():
            shared = plan(ragged, num_tokens=128, num_pages=8, page_size=page_size, implementation="gpu")
            out = ragged_paged_attention(q, pool, shared, jnp.int32(0), scale=0.1 * shape.head_dim**-0.5)
        return np.asarray(out[: total - first]).view(np.uint16)

    np.testing.assert_array_equal(run(total), run(10, 70, total))


@pytest.mark.long
def test_prefill_with_every_option_and_fewer_tokens_than_a_tile():
    sinks = jnp.asarray([-1.0, 0.0, 2.0])
    options = {"sliding_window": 60, "logits_soft_cap": 3.0, "sinks": sinks, "scale": 0.2}
    _check(Shape(3, 1, 64), Mix(((140, 40), (3, 3)), 50, 3), **options)


@pytest.mark.parametrize("group", [1, 2])
def test_prefill_of_heads_of_256(group, monkeypatch):
    """There is one place for queries, and tiles of keys and values share three buffers."""
    monkeypatch.setattr(xla, "attend", None)
    _check(Shape(group, 1, 256), Mix(((70, 1), (300, 66)), 70, 4), 32)


@pytest.mark.long
@pytest.mark.parametrize("page_size", [16, 128])
def test_prefill_of_heads_of_256_with_every_option(page_size, monkeypatch):
    monkeypatch.setattr(xla, "attend", None)
    options = {"sliding_window": 100, "logits_soft_cap": 3.0, "sinks": jnp.asarray([-1.0, 2.0]), "scale": 0.1}
    _check(Shape(2, 1, 256), Mix(((300, 150), (3, 3)), 160, 3), page_size, jnp.float16, **options)


@pytest.mark.long
def test_prefill_of_more_tokens_than_a_block_with_one_head():
    _check(Shape(1, 1, 128), Mix(((135, 133),), 140, 2), 128, jnp.float16)


def test_other_shapes_take_the_fallback():
    _check(Shape(4, 2, 8), Mix(((100, 1), (40, 30)), 40, 4))


def _first_items(work: DecodeWork, heads: int) -> list[int]:
    """The first item of each worker, and how many there are: where one share ends the next begins, without a gap.

    A worker starts at the first item that begins at or after its share's start.
    """
    rows, shares = np.asarray(work.rows), np.asarray(work.shares)
    return [
        rows[row, 3] * heads + -(-ahead * heads // item_cost(rows[row, 2]))
        if row < len(rows)
        else rows[:, 1].sum() * heads
        for row, ahead in shares
    ]


@pytest.mark.parametrize("heads", [1, 8, 32])
@pytest.mark.parametrize(("num_rows", "length"), [(1, 100), (1, 768), (1, 8192), (32, 768), (128, 1024)])
def test_rows_of_one_length_are_shared_out_evenly(num_rows, length, heads):
    """No worker has two items while another has none, whatever the number of rows and heads."""
    work = plan_decode(jnp.full(num_rows, length, jnp.int32), 8192, HOPPER)
    items = np.diff(_first_items(work, heads))
    assert items.max() == -(-items.sum() // HOPPER.num_workers)


@pytest.mark.parametrize("seed", range(20))
def test_every_piece_of_every_row_is_done_once(seed):
    rng = np.random.default_rng(seed)
    num_rows, heads = int(rng.integers(1, 300)), int(rng.integers(1, 17))
    lens = rng.integers(0, rng.choice([2, 100, 9000]), num_rows)
    work = plan_decode(jnp.asarray(lens, jnp.int32), 9000, HOPPER)
    rows = np.asarray(work.rows)
    most = max_splits(num_rows, -(-9000 // HOPPER.block), HOPPER)
    tiles = -(-lens // HOPPER.block)
    assert ((rows[:, 1] >= 1) & (rows[:, 1] <= most)).all()
    assert ((rows[:, 1] - 1) * rows[:, 2] < np.maximum(tiles, 1)).all(), "a piece without tiles"
    assert (rows[:, 1] * rows[:, 2] >= tiles).all(), "tiles in no piece"
    starts = _first_items(work, heads)
    assert starts[0] == 0 and starts[-1] == rows[:, 1].sum() * heads
    assert (np.diff(starts) >= 0).all()
    loads = np.diff(starts)
    assert loads.max() <= loads.mean() * (rows[:, 2].max() + 1) + 1


def test_a_row_is_cut_by_its_own_length():
    alone = plan_decode(jnp.asarray([5000, 0, 0], jnp.int32), 9000, HOPPER).rows[0, 1:3]
    together = plan_decode(jnp.asarray([5000, 9000, 70], jnp.int32), 9000, HOPPER).rows[0, 1:3]
    assert alone.tolist() == together.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_every_token_that_is_no_decode_is_in_one_block(seed):
    """Padding tokens too, in blocks that see no key; the blocks with most keys first."""
    rng = np.random.default_rng(seed)
    num_decodes, num_longer, block_q = int(rng.integers(0, 9)), int(rng.integers(0, 9)), int(rng.choice([64, 128]))
    query_lens = np.append(np.ones(num_decodes, int), rng.integers(2, rng.choice([4, 300]), num_longer))
    query_lens = np.append(query_lens, np.zeros(int(rng.integers(1, 4)), int))
    kv_lens = np.where(query_lens > 0, query_lens + rng.integers(0, 500, query_lens.size), 0)
    starts = np.append(0, np.cumsum(query_lens))
    num_tokens = int(starts[-1] + rng.choice([0, 1, 64, 500]))
    arrays = (jnp.asarray(x, jnp.int32) for x in (kv_lens, starts, num_decodes))
    work = plan_prefill(*arrays, num_tokens=num_tokens, block_q=block_q)
    blocks = np.asarray(work.blocks)[: int(work.num_blocks[0])]
    assert int(work.num_blocks[0]) <= len(work.blocks)
    seen = np.zeros(num_tokens, int)
    for row, first, size, position, length in blocks:
        assert 0 < size <= block_q
        seen[first : first + size] += 1
        if first < starts[-1]:
            assert starts[row] <= first and first + size <= starts[row + 1] and length == kv_lens[row]
            assert position == length - query_lens[row] + first - starts[row]
        else:
            assert position + size <= 0
    assert (seen == (np.arange(num_tokens) >= num_decodes)).all()
    assert (np.diff(blocks[:, 3] + blocks[:, 2]) <= 0).all()


def test_a_step_of_little_but_padding_ends():
    """No thread block may get items without keys: its compute warpgroups take turns by tiles, and would never end."""
    _check(Shape(2, 1, 64), Mix(((20, 20),), 400, 4))


def test_a_plan_is_made_for_the_device_of_the_program():
    mix = Mix(((3, 1),), 2, 2)
    ragged = make_inputs(Shape(4, 2, 64), mix).ragged
    device = Device("gpu", "NVIDIA H100 80GB HBM3")
    traced = jax.eval_shape(lambda r: plan(r, num_tokens=2, num_pages=128, page_size=16, device=device), ragged)
    assert traced.implementation == "gpu" and traced.work.tiles == HOPPER
