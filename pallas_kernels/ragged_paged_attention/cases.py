"""Named shapes and row mixes of ragged_paged_attention, shared by tests, benchmarks and tuning.

The shapes are those of real models. `make_inputs` draws a step for a shape and a mix; what no token may read is filled
with NaN. Nothing here measures or asserts.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention.api import Ragged, largest_number, pool_shape


@dataclass(frozen=True)
class Shape:
    """Query heads, kv heads and head dim of a model's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {
    "tiny": Shape(4, 2, 8),
    "smollm2-135m": Shape(9, 3, 64),
    "llama-8b": Shape(32, 8, 128),
    "qwen3-0.6b": Shape(16, 8, 128),
    "phi3-mini": Shape(32, 32, 96),
    "gemma3-4b": Shape(8, 4, 256),
    "mha": Shape(8, 8, 64),
    "mqa": Shape(8, 1, 64),
}


@dataclass(frozen=True)
class Mix:
    """Rows of a step: (KV length after the step, query tokens) each, within T tokens and B rows.

    The rows of one query token come first.
    """

    rows: tuple[tuple[int, int], ...]
    num_tokens: int
    batch: int


MIXES = {
    "one-decode": Mix(((37, 1),), 1, 1),
    "decode": Mix(((1, 1), (128, 1), (129, 1), (16, 1), (300, 1)), 8, 8),
    "prefill": Mix(((70, 70),), 128, 8),
    "prefills": Mix(((2, 2), (33, 33), (64, 64), (17, 17)), 128, 8),
    "mixed": Mix(((200, 1), (5, 1), (40, 40), (3, 3)), 128, 8),
    "chunked": Mix(((140, 1), (3, 1), (300, 50), (65, 2)), 128, 8),
    "more-rows-than-tokens": Mix(((9, 1), (40, 6)), 8, 12),
    "empty": Mix((), 128, 8),
}


@dataclass(frozen=True)
class Inputs:
    """A step: q [T, N, H], new k and v [T, K, H], the pool before they are written, and the rows."""

    q: jnp.ndarray
    k: jnp.ndarray
    v: jnp.ndarray
    pool: jnp.ndarray
    ragged: Ragged
    num_pages: int


def make_inputs(
    shape: Shape,
    mix: Mix,
    *,
    page_size: int = 16,
    dtype=jnp.float32,
    num_layers: int = 2,
    seed: int = 0,
    poison=np.nan,
    pool_dtype=None,
) -> Inputs:
    """Draws a step. `poison` fills each slot that holds no past token; page ids past a row's need are arbitrary.

    Args:
        pool_dtype: the pool's, where it is not `dtype`.
    """
    rng = np.random.default_rng(seed)
    kv_lens, query_lens = (
        np.array([r[i] for r in mix.rows] + [0] * (mix.batch - len(mix.rows)), np.int32) for i in (0, 1)
    )
    pages_of = -(-kv_lens // page_size)
    # Rounded up, so that steps of like size are of one shape.
    num_pages = -(-(int(pages_of.sum()) + 3) // 128) * 128
    width = -(-(int(pages_of.max(initial=0)) + 2) // 32) * 32
    free = rng.permutation(num_pages)
    table = rng.integers(-(2**31), 2**31 - 1, (mix.batch, width)).astype(np.int32)
    pool = np.full(pool_shape(num_layers, num_pages, page_size, shape.num_kv_heads, shape.head_dim), poison, np.float32)
    taken = 0
    for row, count in enumerate(pages_of):
        table[row, :count] = free[taken : taken + count]
        taken += count
        for position in range(kv_lens[row] - query_lens[row]):
            page, offset = divmod(position, page_size)
            pages = table[row, page] + num_pages * np.arange(num_layers)
            pool[pages, :, :, offset] = rng.standard_normal((num_layers, shape.num_kv_heads, 2, shape.head_dim))

    def draw(heads):
        return jnp.asarray(rng.standard_normal((mix.num_tokens, heads, shape.head_dim)), dtype)

    ragged = Ragged(
        page_table=jnp.asarray(table),
        kv_lens=jnp.asarray(kv_lens),
        query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)),
        num_decodes=jnp.int32((query_lens == 1).sum()),
    )
    kv_heads = shape.num_kv_heads
    new = draw(shape.num_heads), draw(kv_heads), draw(kv_heads)
    return Inputs(*new, jnp.asarray(pool, pool_dtype or dtype), ragged, num_pages)


def in_8_bits(inputs: Inputs, dtype) -> tuple[Inputs, jnp.ndarray]:
    """The step with its pool in int8 or float8_e4m3fn, and the pool's scales [2, K] float32, each head's another.

    The type's largest number is 4 to 6 of what the pool holds. What is NaN stays so, or becomes the largest number.
    """
    heads, largest = inputs.k.shape[1], largest_number(jnp.dtype(dtype))
    scales = jnp.asarray(np.linspace(4, 6, 2 * heads, dtype=np.float32).reshape(2, heads) / largest)
    units = inputs.pool.astype(jnp.float32) / scales.T[None, :, :, None, None]
    if jnp.issubdtype(dtype, jnp.integer):
        units = jnp.nan_to_num(units, nan=largest).round()
    return replace(inputs, pool=units.clip(-largest, largest).astype(dtype)), scales
