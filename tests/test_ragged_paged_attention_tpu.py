"""The TPU kernels in the interpreter that runs DMAs at their wait and watches for races, against the float64 reference.

What nothing may read is NaN: slots nobody wrote, and all of VMEM at the start. tests/test_tpu_compile.py compiles the
same kernels for real chips.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import (
    Device,
    Ragged,
    plan,
    pool_shape,
    ragged_paged_attention,
    reference,
    tpu_attend,
    tpu_tiles,
    tpu_write,
    write_kv,
)
from pallas_kernels.ragged_paged_attention.cases import MIXES, SHAPES, Inputs, Mix, Shape, make_inputs

LAYER = 1
PAGE_SIZE = 16
CHIP = Device("tpu", "a chip of small blocks")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that the cases have several, and fewer buffers than blocks."""
    tiles = tpu_tiles.Tiles(block_kv=64, buffers=3, block_q=32, vmem_limit_bytes=1 << 20)
    monkeypatch.setitem(tpu_tiles.TILES, CHIP.kind, tiles)


def to_layout(pool: np.ndarray) -> np.ndarray:
    """The pool [pages, K, 2, page_size, H] in the layout of tpu.py: written slots get zeros in the padding lanes."""
    num_pages, heads, _, page_size, head_dim = pool.shape
    wanted = pool_shape(1, num_pages, page_size, heads, head_dim, implementation="tpu")
    half = 64 if wanted[2] == 1 else wanted[-1]
    written = ~np.isnan(pool[..., :1].astype(np.float32))
    padded = np.concatenate([pool, np.where(written, 0, np.nan).astype(pool.dtype).repeat(half - head_dim, -1)], -1)
    return padded if wanted[2] == 2 else np.concatenate([padded[:, :, :1], padded[:, :, 1:]], -1)


def from_layout(pool: np.ndarray, head_dim: int) -> np.ndarray:
    """The reverse of to_layout."""
    if pool.shape[2] == 1:
        pool = np.concatenate([pool[..., :64], pool[..., 64:]], 2)
    return pool[..., :head_dim]


def run(inputs: Inputs, page_size: int = PAGE_SIZE, decode_only: bool = False, dma: str = "on_wait", **options):
    """Writes and attends as a model does, in the interpreter; a race is an error. Returns output and pool."""
    options = {"scale": inputs.q.shape[-1] ** -0.5, **options}

    def step(q, k, v, pool, ragged):
        shared = plan(
            ragged,
            num_tokens=q.shape[0],
            num_pages=inputs.num_pages,
            page_size=page_size,
            decode_only=decode_only,
            device=CHIP,
            implementation="tpu",
        )
        pool = write_kv(pool, k, v, shared, jnp.int32(LAYER), kv_scales=options.get("kv_scales"))
        return ragged_paged_attention(q, pool, shared, jnp.int32(LAYER), **options), pool

    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma)):
        out, pool = jax.jit(step)(inputs.q, inputs.k, inputs.v, to_layout(np.asarray(inputs.pool)), inputs.ragged)
        return np.asarray(out, np.float32), from_layout(np.asarray(pool), inputs.q.shape[-1])


def check(inputs: Inputs, page_size: int = PAGE_SIZE, tolerance: float = 1e-5, decode_only=False, **options):
    out, pool = run(inputs, page_size, decode_only, **options)
    wanted_pool = reference.write_kv(inputs.pool, inputs.k, inputs.v, inputs.ragged, LAYER, inputs.num_pages)
    np.testing.assert_array_equal(pool.astype(np.float32), wanted_pool.astype(np.float32))
    options = {"scale": inputs.q.shape[-1] ** -0.5, **options}
    wanted = reference.ragged_paged_attention(inputs.q, wanted_pool, inputs.ragged, LAYER, inputs.num_pages, **options)
    assert np.isfinite(out).all()
    assert not out[int(inputs.ragged.query_starts[-1]) :].any()
    error = np.abs(out - wanted).max(initial=0) / max(np.abs(wanted).max(initial=0), 1e-6)
    assert error < tolerance


def quick(names, chosen):
    """Parameters of which those that are not chosen are long."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.mark.parametrize("mix", quick(MIXES, {"chunked"}))
def test_every_mix(mix):
    check(make_inputs(SHAPES["tiny"], MIXES[mix]))


@pytest.mark.parametrize("mix", quick(["one-decode", "decode"], {"decode"}))
def test_a_step_of_decode_rows_only(mix):
    check(make_inputs(SHAPES["tiny"], MIXES[mix]), decode_only=True)


@pytest.mark.parametrize("shape", quick(SHAPES, {"smollm2-135m"}))
def test_every_shape(shape):
    check(make_inputs(SHAPES[shape], MIXES["mixed"]))


@pytest.mark.parametrize("head_dim", quick([80, 128, 256], {128}))
def test_head_dims(head_dim):
    check(make_inputs(Shape(4, 2, head_dim), MIXES["mixed"], dtype=jnp.bfloat16), tolerance=1e-2)


@pytest.mark.parametrize("page_size", quick([8, 64], set()))
def test_page_sizes(page_size):
    check(make_inputs(SHAPES["tiny"], MIXES["chunked"], page_size=page_size), page_size)


@pytest.mark.parametrize("mix", quick(["decode", "chunked", "mixed"], {"chunked"}))
@pytest.mark.parametrize("page_size", quick([32, 64], {64}))
def test_a_pool_of_8_bits(mix, page_size):
    inputs = make_inputs(SHAPES["tiny"], MIXES[mix], page_size=page_size)
    check(dataclasses.replace(inputs, pool=inputs.pool.astype(jnp.float8_e4m3fn)), page_size)


def test_a_pool_of_int8():
    """Against the same pool in float32, whose numbers are those of int8."""
    inputs = make_inputs(SHAPES["tiny"], MIXES["chunked"], page_size=64)
    units = np.nan_to_num(np.asarray(inputs.pool) * 30, nan=127).astype(np.int8)
    scales = jnp.asarray([[1 / 30, 1 / 20], [1 / 30, 1 / 40]])
    out, pool = run(dataclasses.replace(inputs, pool=units), 64, kv_scales=scales)
    wide = dataclasses.replace(
        inputs,
        pool=units.astype(np.float32),
        k=jnp.round(inputs.k / scales[0][:, None]).clip(-127, 127),
        v=jnp.round(inputs.v / scales[1][:, None]).clip(-127, 127),
        q=inputs.q * jnp.repeat(scales[0], 2)[:, None],
    )
    wanted_pool = reference.write_kv(wide.pool, wide.k, wide.v, inputs.ragged, LAYER, inputs.num_pages)
    np.testing.assert_array_equal(pool, wanted_pool)
    wanted = reference.ragged_paged_attention(
        wide.q, wanted_pool, inputs.ragged, LAYER, inputs.num_pages, scale=inputs.q.shape[-1] ** -0.5
    )
    wanted *= np.repeat(np.asarray(scales[1]), 2)[:, None]
    assert np.abs(out - wanted).max() < 1e-5 * np.abs(wanted).max()


OPTIONS = {
    "window of 1": {"sliding_window": 1},
    "window of two blocks": {"sliding_window": 130},
    "soft cap": {"logits_soft_cap": 0.5},
    "sinks": {"sinks": jnp.asarray([-1.0, 0.0, 2.0, 40.0])},
    "all": {"sliding_window": 70, "logits_soft_cap": 2.0, "sinks": jnp.asarray([-1.0, 0.0, 2.0, 4.0]), "scale": 0.7},
}


@pytest.mark.parametrize("name", quick(OPTIONS, {"all"}))
def test_options(name):
    check(make_inputs(SHAPES["tiny"], MIXES["chunked"]), **OPTIONS[name])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(16))
def test_random_steps(seed):
    rng = np.random.default_rng(seed)
    decodes = [(int(rng.integers(1, 400)), 1) for _ in range(rng.integers(0, 6))]
    longer = []
    while rng.random() < 0.7 and sum(n for _, n in longer) < 80 and len(longer) < 5:
        tokens = int(rng.integers(2, 70))
        longer.append((tokens + int(rng.choice([0, 0, 1, 50, 200])), tokens))
    check(make_inputs(SHAPES["tiny"], Mix((*decodes, *longer), 160, 11), seed=seed))


@pytest.mark.long
def test_a_row_is_the_same_bit_for_bit_in_any_slot():
    lens = (1, 128, 129, 16, 300, 7)
    inputs = make_inputs(SHAPES["smollm2-135m"], Mix(tuple((n, 1) for n in lens), 6, 6))
    out, _ = run(inputs)
    order = np.random.default_rng(0).permutation(6)
    ragged = dataclasses.replace(
        inputs.ragged, page_table=inputs.ragged.page_table[order], kv_lens=inputs.ragged.kv_lens[order]
    )
    moved = dataclasses.replace(inputs, q=inputs.q[order], k=inputs.k[order], v=inputs.v[order], ragged=ragged)
    np.testing.assert_array_equal(run(moved)[0], out[order])


@pytest.mark.parametrize(
    ("module", "wait", "dma", "symptom"),
    [
        (tpu_attend, "_wait_block", "eager", "race"),
        (tpu_write, "_wait_fetched", "eager", "race"),
        (tpu_attend, "_drain", "on_wait", "isfinite"),
    ],
    ids=["pages", "units", "results"],
)
def test_a_kernel_without_one_of_its_waits_is_caught(monkeypatch, module, wait, dma, symptom):
    monkeypatch.setattr(module, wait, lambda *_: None)
    inputs = make_inputs(SHAPES["tiny"], MIXES["decode"])
    with pytest.raises(Exception, match=symptom):
        assert np.isfinite(run(inputs, decode_only=True, dma=dma)[0]).all()


def kernels_in(jaxpr):
    """Every pallas_call of a program, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from kernels_in(inner)


@pytest.mark.parametrize("decode_only", [True, False], ids=["decode", "mixed"])
def test_every_kernel_says_what_it_costs_and_asks_no_device(monkeypatch, decode_only):
    """At most, for the compiler's schedule: every row sees a whole page table. The chip is an argument."""
    for name in ("devices", "local_devices", "default_backend"):
        monkeypatch.setattr(jax, name, lambda *_: pytest.fail("a kernel asked which devices are here"))
    shape, rows, table_width, num_pages = SHAPES["llama-8b"], 32, 16, 64
    device = Device("tpu", "TPU v6 lite")

    def step(pool, q, k, v, ragged):
        shared = plan(
            ragged, num_tokens=rows, num_pages=num_pages, page_size=64, decode_only=decode_only, device=device
        )
        pool = write_kv(pool, k, v, shared, jnp.int32(0))
        return ragged_paged_attention(q, pool, shared, jnp.int32(0), scale=0.1), pool

    def array(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype)

    pool = array(*pool_shape(1, num_pages, 64, shape.num_kv_heads, shape.head_dim, device=device), dtype=jnp.bfloat16)
    q = array(rows, shape.num_heads, shape.head_dim, dtype=jnp.bfloat16)
    kv = array(rows, shape.num_kv_heads, shape.head_dim, dtype=jnp.bfloat16)
    ragged = Ragged(array(rows, table_width), array(rows), array(rows + 1), array())
    costs = {
        kernel.params["name"]: kernel.params["cost_estimate"]
        for kernel in kernels_in(jax.make_jaxpr(step)(pool, q, kv, kv, ragged).jaxpr)
    }
    assert costs.keys() == {"write_kv", "ragged_paged_attention"} and None not in costs.values()
    kv_bytes = 2 * shape.num_kv_heads * shape.head_dim * 2
    keys = rows * table_width * 64
    assert costs["write_kv"].bytes_accessed >= rows * kv_bytes
    assert costs["ragged_paged_attention"].bytes_accessed >= keys * kv_bytes
    assert costs["ragged_paged_attention"].flops >= 4 * keys * shape.num_heads * shape.head_dim
    assert costs["ragged_paged_attention"].transcendentals >= keys * shape.num_heads


def test_a_page_that_is_no_whole_tile_is_refused():
    with pytest.raises(ValueError, match="multiple of 16 for bfloat16, got 8"):
        run(make_inputs(SHAPES["tiny"], MIXES["decode"], page_size=8, dtype=jnp.bfloat16), 8)
