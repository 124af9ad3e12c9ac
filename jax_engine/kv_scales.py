"""What one unit of an 8-bit KV cache is worth, for each layer, kv head, keys and values: found before any request.

Called by model_runner.py. The model reads a fixed text of random tokens into a small cache of its own dtype, and the
largest number that a head wrote, some times over, becomes the largest of the 8-bit cache: 127 of int8, 448 of fp8.
Scales so depend on the model alone: a page holds the same bits whichever request wrote it, which the prefix cache
relies on (docs/adr/0027, docs/adr/0030).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_engine.batch import BatchLayout
from jax_engine.buckets import Bucket
from jax_engine.config import Limits
from jax_engine.kv_cache import KVCache
from jax_engine.layers.recurrent import RecurrentCache
from jax_engine.program import ModelProgram
from pallas_kernels.ragged_paged_attention import api as attention_op

#: Tokens that are read.
_NUM_TOKENS = 256
#: Room for numbers larger than those seen; what is larger still is cut off. It costs int8 one of its bits. The numbers
#: of fp8 have the same bits behind the first wherever they lie, so room costs them nothing as far as 2 ** -6.
_MARGINS = {"int8": 2.0, "float8_e4m3fn": 8.0}


def find_scales(
    program: ModelProgram,
    kv_dtype: jnp.dtype,
    limits: Limits,
    weights: Any,
    put: Callable[[Any], Any],
    empty: Callable[[KVCache], KVCache],
) -> Float[Array, "L 2 K"]:
    """Runs the model once; compiles one step.

    Args:
        program: the model with a cache of its own dtype. kv_dtype: of the cache that the scales are for, int8 or
            float8_e4m3fn. limits: of the engine.
        put: uploads host arrays. empty: makes a cache of such shapes, of zeros.

    Returns:
        float32, on the devices as KVCache.kv_scales is.
    """
    num_tokens = min(_NUM_TOKENS, limits.max_model_len)
    num_pages = -(-num_tokens // limits.page_size)
    num_groups = limits.page_groups.num
    limits = dataclasses.replace(limits, num_pages=num_groups * num_pages, max_num_seqs=1)
    bucket = Bucket(num_tokens, 1, False)
    layout, lowered = program.lower(bucket, limits)
    compiled = lowered.compile(compiler_options=program.compiler_options(bucket))
    shapes = program.cache_shapes(limits)
    cache, _ = compiled(
        weights,
        empty(shapes),
        put(_packed(layout, num_tokens, num_pages, program.model_config.vocab_size)),
    )
    pool = cache.pool.pages if isinstance(cache.pool, RecurrentCache) else cache.pool
    units = _MARGINS[kv_dtype.name] / attention_op.largest_number(kv_dtype)
    find = functools.partial(_scales, num_pages=limits.num_pages, units=units)
    return jax.jit(find, out_shardings=shapes.token_ids.sharding)(pool)


def _packed(layout: BatchLayout, num_tokens: int, num_pages: int, vocab_size: int) -> np.ndarray:
    """One row of random tokens, from position 0 on."""
    packed = np.zeros(layout.size, np.int32)
    parts = layout.unpack(packed)
    parts["token_ids"][:] = np.random.default_rng(0).integers(vocab_size, size=num_tokens)
    parts["query_starts"][1:] = num_tokens
    parts["stop_ids"][:] = -1
    tables = parts["page_table"].reshape(layout.num_tables, -1)
    tables[:, :num_pages] = np.arange(layout.num_tables * num_pages).reshape(layout.num_tables, -1)
    return packed


def _scales(pool: Array, num_pages: int, units: float) -> Array:
    return jnp.maximum(attention_op.largest_values(pool, num_pages), 1e-6) * units
