"""ragged_paged_attention against its float32 reference, on every named shape and on random ragged steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import Ragged, plan, pool_shape, ragged_paged_attention, reference, write_kv
from pallas_kernels.ragged_paged_attention.api import largest_number, largest_values
from pallas_kernels.ragged_paged_attention.cases import MIXES, SHAPES, Inputs, Mix, in_8_bits, make_inputs

LAYER = 1


@functools.partial(jax.jit, static_argnames=("num_pages", "page_size", "scale", "sliding_window", "logits_soft_cap"))
def _step(q, k, v, pool, ragged, layer, *, num_pages, page_size, scale, **options):
    shared = plan(ragged, num_tokens=q.shape[0], num_pages=num_pages, page_size=page_size)
    pool = write_kv(pool, k, v, shared, layer, kv_scales=options.get("kv_scales"))
    return ragged_paged_attention(q, pool, shared, layer, scale=scale, **options), pool


def _run(inputs: Inputs, page_size: int = 16, **options):
    """Writes the step's KV into layer 1 and attends, as a model does; returns output and pool."""
    options = {"scale": inputs.q.shape[-1] ** -0.5, "num_pages": inputs.num_pages, "page_size": page_size, **options}
    return _step(inputs.q, inputs.k, inputs.v, inputs.pool, inputs.ragged, jnp.int32(LAYER), **options)


def _check(inputs: Inputs, page_size: int = 16, tolerance: float = 1e-5, **options):
    out, pool = _run(inputs, page_size, **options)
    wanted_pool = reference.write_kv(inputs.pool, inputs.k, inputs.v, inputs.ragged, LAYER, inputs.num_pages)
    np.testing.assert_array_equal(np.asarray(pool, np.float32), wanted_pool.astype(np.float32))
    options = {"scale": inputs.q.shape[-1] ** -0.5, **options}
    wanted = reference.ragged_paged_attention(inputs.q, wanted_pool, inputs.ragged, LAYER, inputs.num_pages, **options)
    out = np.asarray(out, np.float32)
    assert np.isfinite(out).all()
    assert not out[int(inputs.ragged.query_starts[-1]) :].any()
    error = np.abs(out - wanted).max(initial=0) / max(np.abs(wanted).max(initial=0), 1e-6)
    assert error < tolerance


@pytest.mark.parametrize("mix", MIXES)
def test_matches_the_reference_on_every_mix(mix):
    _check(make_inputs(SHAPES["tiny"], MIXES[mix]))


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference_on_every_shape(shape):
    _check(make_inputs(SHAPES[shape], MIXES["mixed"]))


@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_page_sizes(page_size):
    _check(make_inputs(SHAPES["tiny"], MIXES["chunked"], page_size=page_size), page_size)


def test_bfloat16():
    _check(make_inputs(SHAPES["smollm2-135m"], MIXES["mixed"], dtype=jnp.bfloat16), tolerance=1e-2)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_pool_of_8_bits(mix, dtype):
    inputs = make_inputs(SHAPES["mha"], MIXES[mix], dtype=dtype, pool_dtype=jnp.float8_e4m3fn)
    _check(inputs, tolerance=1e-5 if dtype == jnp.float32 else 1e-2)


def test_what_8_bits_cannot_hold_becomes_their_largest_number():
    inputs = make_inputs(SHAPES["tiny"], MIXES["chunked"], pool_dtype=jnp.float8_e4m3fn)
    inputs = dataclasses.replace(inputs, k=inputs.k * 1e3, v=inputs.v.at[::2, 0, 0].set(-1e6))
    _check(inputs)
    _, pool = _run(inputs)
    assert np.nanmin(np.asarray(pool, np.float32)) == -448


def _as_it_was(pool: jax.Array, scales: jax.Array) -> np.ndarray:
    return np.asarray(pool, np.float32) * np.asarray(scales).T[None, :, :, None, None]


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("mix", MIXES)
def test_a_pool_of_8_bits_has_scales_by_head(mix, dtype):
    inputs, scales = in_8_bits(make_inputs(SHAPES["mha"], MIXES[mix]), dtype)
    out, pool = _run(inputs, kv_scales=scales)
    before = _as_it_was(inputs.pool, scales)
    wanted_pool = reference.write_kv(before, inputs.k, inputs.v, inputs.ragged, LAYER, inputs.num_pages)
    unit = np.asarray(scales).T[None, :, :, None, None]
    wanted_pool = np.clip(wanted_pool, -largest_number(dtype) * unit, largest_number(dtype) * unit)
    error = np.abs(_as_it_was(pool, scales) - wanted_pool) / unit
    # Half a unit of int8; half of the last of three bits behind the first of e4m3, or of its smallest number.
    allowed = 0.501 if dtype == jnp.int8 else np.maximum(np.abs(wanted_pool) / unit * 2.0**-4, 2.0**-10) * 1.001
    assert (np.isnan(error) | (error < allowed)).all()
    np.testing.assert_array_equal(np.isnan(error), np.isnan(before) & np.isnan(wanted_pool))
    scale = inputs.q.shape[-1] ** -0.5
    wanted = reference.ragged_paged_attention(
        inputs.q, _as_it_was(pool, scales), inputs.ragged, LAYER, inputs.num_pages, scale=scale
    )
    assert np.abs(np.asarray(out) - wanted).max(initial=0) < 1e-5


def test_the_largest_values_of_a_pool():
    pool = np.zeros((6, 2, 2, 4, 8), np.float32)  # two layers of three pages, two kv heads
    pool[1, 0, 0, 2, 3], pool[2, 0, 0, 0, 0], pool[4, 1, 1, 3, 7] = -5, 2, 3
    wanted = np.zeros((2, 2, 2), np.float32)
    wanted[0, 0, 0], wanted[1, 1, 1] = 5, 3
    np.testing.assert_array_equal(largest_values(jnp.asarray(pool), 3), wanted)
    side_by_side = np.concatenate([pool[:, :, :1], pool[:, :, 1:]], axis=-1)  # as tpu.py has heads of 64
    np.testing.assert_array_equal(largest_values(jnp.asarray(side_by_side), 3), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 130},
        {"logits_soft_cap": 0.5},
        {"sinks": jnp.asarray([-1.0, 0.0, 2.0, 40.0])},
        {"sliding_window": 20, "logits_soft_cap": 2.0, "sinks": jnp.asarray([-1.0, 0.0, 2.0, 4.0]), "scale": 0.7},
    ],
    ids=lambda options: "+".join(f"{k}={v}" if k == "sliding_window" else k for k, v in options.items()),
)
def test_options(options):
    _check(make_inputs(SHAPES["tiny"], MIXES["chunked"]), **options)


@pytest.mark.parametrize("seed", range(16))
def test_random_steps(seed):
    rng = np.random.default_rng(seed)
    decodes = [(int(rng.integers(1, 400)), 1) for _ in range(rng.integers(0, 6))]
    longer = []
    while rng.random() < 0.7 and sum(n for _, n in longer) < 80 and len(longer) < 5:
        tokens = int(rng.integers(2, 70))
        longer.append((tokens + int(rng.choice([0, 0, 1, 50, 200])), tokens))
    mix = Mix((*decodes, *longer), 160, 11)
    _check(make_inputs(SHAPES["tiny"], mix, seed=seed))


def _permuted(inputs: Inputs, order) -> Inputs:
    ragged = inputs.ragged
    moved = Ragged(ragged.page_table[order], ragged.kv_lens[order], ragged.query_starts, ragged.num_decodes)
    return dataclasses.replace(inputs, q=inputs.q[order], k=inputs.k[order], v=inputs.v[order], ragged=moved)


def test_a_decode_row_is_the_same_bit_for_bit_in_any_slot():
    lens = (1, 128, 129, 16, 300, 7, 90, 255, 31, 500, 2, 64)
    inputs = make_inputs(SHAPES["smollm2-135m"], Mix(tuple((n, 1) for n in lens), 12, 12))
    out = np.asarray(_run(inputs)[0])
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(np.asarray(_run(_permuted(inputs, order))[0]), out[order])


@pytest.mark.parametrize("kept", [0, 3])
def test_a_row_is_the_same_bit_for_bit_without_its_neighbours(kept):
    mix = Mix(((140, 1), (600, 1), (70, 1), (200, 90), (900, 33)), 160, 8)
    inputs = make_inputs(SHAPES["smollm2-135m"], mix)
    together = np.asarray(_run(inputs)[0])
    starts = np.asarray(inputs.ragged.query_starts)
    start, end = int(starts[kept]), int(starts[kept + 1])

    def first(x):
        return jnp.roll(x, -start, axis=0)

    alone = Ragged(
        jnp.roll(inputs.ragged.page_table, -kept, axis=0),
        jnp.zeros(mix.batch, jnp.int32).at[0].set(mix.rows[kept][0]),
        jnp.full(mix.batch + 1, end - start, jnp.int32).at[0].set(0),
        jnp.int32(end - start == 1),
    )
    moved = dataclasses.replace(inputs, q=first(inputs.q), k=first(inputs.k), v=first(inputs.v), ragged=alone)
    np.testing.assert_array_equal(np.asarray(_run(moved)[0])[: end - start], together[start:end])


def test_plan_places_tokens():
    ragged = Ragged(
        page_table=jnp.asarray([[5, 2, 0], [1, 7, 3], [0, 0, 0]], jnp.int32),
        kv_lens=jnp.asarray([5, 6, 0], jnp.int32),
        query_starts=jnp.asarray([0, 1, 4, 4], jnp.int32),
        num_decodes=jnp.int32(1),
    )
    shared = plan(ragged, num_tokens=6, num_pages=8, page_size=4)
    assert shared.rows[:4].tolist() == [0, 1, 1, 1]
    assert shared.positions.tolist() == [4, 3, 4, 5, 0, 0]
    assert shared.slots.tolist() == [2 * 4, 1 * 4 + 3, 7 * 4, 7 * 4 + 1, -1, -1]


def test_the_pool_is_written_in_place():
    shape, layers, pages, page_size, tokens = SHAPES["smollm2-135m"], 6, 1024, 16, 32
    pool = jax.ShapeDtypeStruct(pool_shape(layers, pages, page_size, shape.num_kv_heads, shape.head_dim), jnp.float32)
    pool_bytes = int(np.prod(pool.shape)) * 4

    def step(pool, q, k, v, ragged):
        shared = plan(ragged, num_tokens=tokens, num_pages=pages, page_size=page_size)

        def one_layer(carry, layer):
            pool, q = carry
            pool = write_kv(pool, k, v, shared, layer)
            return (pool, ragged_paged_attention(q, pool, shared, layer, scale=0.125)), None

        return jax.lax.scan(one_layer, (pool, q), jnp.arange(layers, dtype=jnp.int32))[0]

    def heads(n):
        return jax.ShapeDtypeStruct((tokens, n, shape.head_dim), jnp.float32)

    ints = {
        name: jax.ShapeDtypeStruct(size, jnp.int32)
        for name, size in {"page_table": (8, 16), "kv_lens": (8,), "query_starts": (9,), "num_decodes": ()}.items()
    }
    kv = heads(shape.num_kv_heads)
    compiled = jax.jit(step, donate_argnums=0).lower(pool, heads(shape.num_heads), kv, kv, Ragged(**ints)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / layers


def test_refusals():
    with pytest.raises(ValueError, match="power of two, got 12"):
        pool_shape(1, 1, 12, 1, 8)
    inputs = make_inputs(SHAPES["tiny"], MIXES["decode"])
    with pytest.raises(ValueError, match=r"auto, .*xla.*; got 'cuda'"):
        plan(inputs.ragged, num_tokens=8, num_pages=4, page_size=16, implementation="cuda")
    shared = plan(inputs.ragged, num_tokens=8, num_pages=inputs.num_pages, page_size=16)
    with pytest.raises(ValueError, match="multiple of kv heads"):
        ragged_paged_attention(inputs.q[:, :3], inputs.pool, shared, jnp.int32(0), scale=1.0)


@pytest.mark.parametrize("mix", ["decode", "chunked", "mixed"])
def test_values_that_are_part_of_the_keys(mix):
    # The reference gets the same pool with every key stored a second time, as its value.
    inputs, value_dim = make_inputs(dataclasses.replace(SHAPES["mqa"], head_dim=24), MIXES[mix]), 16
    doubled = dataclasses.replace(inputs, v=inputs.k, pool=np.repeat(np.asarray(inputs.pool)[:, :, :1], 2, axis=2))
    wanted_pool = reference.write_kv(doubled.pool, doubled.k, doubled.v, inputs.ragged, LAYER, inputs.num_pages)
    wanted = reference.ragged_paged_attention(
        inputs.q, wanted_pool, inputs.ragged, LAYER, inputs.num_pages, scale=0.2, sliding_window=50
    )
    pool = inputs.pool[:, :, :1]
    assert pool.shape == pool_shape(2, inputs.num_pages, 16, 1, 24, keys_only=True)

    @jax.jit
    def run(q, k, pool, ragged):
        shared = plan(ragged, num_tokens=q.shape[0], num_pages=inputs.num_pages, page_size=16, keys_only=True)
        pool = write_kv(pool, k, None, shared, jnp.int32(LAYER))
        options = {"scale": 0.2, "sliding_window": 50, "value_dim": value_dim}
        return ragged_paged_attention(q, pool, shared, jnp.int32(LAYER), **options), pool

    out, pool = run(inputs.q, inputs.k, pool, inputs.ragged)
    np.testing.assert_array_equal(pool, wanted_pool[:, :, :1])
    np.testing.assert_allclose(out, wanted[..., :value_dim], atol=1e-5)
