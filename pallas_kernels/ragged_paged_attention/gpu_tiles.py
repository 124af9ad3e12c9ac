"""What the two Mosaic GPU kernels of ragged_paged_attention share: tile sizes, and online softmax on a tile.

Read by gpu.py, gpu_decode.py and gpu_prefill.py. Sizes are those of Hopper (sm_90a); nothing here asks a device.
"""

# The types of plgpu's own names are not to be had: it exports some of them lazily.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention.implementation import Options

LOG2E = math.log2(math.e)
MASKED = -1e30  # finite, so that the difference of two is zero and not NaN
#: Rows of one matrix instruction of a warpgroup.
WARPGROUP_ROWS = 64


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        num_workers: thread blocks of a persistent kernel; one fits a multiprocessor.
        block: key positions of a tile of the decode kernel. prefill_block: of the other one.
        split_rows: below this many decode rows a row is cut so that about this many pieces exist in all; with 8 kv
            heads, as many models have, then each thread block has one, and no second one waits until it is written.
        max_piece: key tiles of a decode piece at most; longer rows are cut.
        max_splits: most pieces of a row.
        max_head_dim: the widest heads that the kernels take.
        registers: probabilities go from registers into the second product and sums stay in registers, the fast way
            that the interpreter cannot run; otherwise through shared memory.
        in_order: thread blocks run one after the other, as in the interpreter, which knows no counters in device
            memory; otherwise all at once.
    """

    num_workers: int = 132
    block: int = 64
    prefill_block: int = 128
    split_rows: int = 16
    max_piece: int = 32
    max_splits: int = 64
    max_head_dim: int = 256
    registers: bool = True
    in_order: bool = False


#: From jax 0.12 on Mosaic's search for layouts does not end for heads of 256.
HOPPER = Tiles(max_head_dim=256 if jax.__version_info__ < (0, 12) else 128)
#: The same programs in a form GPU interpret mode can run, small enough that it ends soon.
INTERPRETED = Tiles(num_workers=2, prefill_block=64, registers=False, in_order=True)


def swizzle(head_dim: int) -> int:
    """Bytes of the pattern that `transforms` lays 16-bit rows of `head_dim` in."""
    return 128 if head_dim % 64 == 0 else 64


def transforms(head_dim: int) -> tuple:
    """The layout in shared memory that the tensor cores read 16-bit rows of `head_dim` in."""
    width = swizzle(head_dim)
    return (plgpu.TilingTransform((8, width // 2)), plgpu.SwizzleTransform(width))


def packed_transforms(head_dim: int) -> tuple:
    """The layout of 8-bit rows of `head_dim` that a warpgroup reads in the order of `transforms`, 8 numbers a thread,
    without two threads in one bank."""
    width = swizzle(head_dim) // 2
    return (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width))


def supports(head_dim: int, dtype, page_size: int, tiles: Tiles) -> bool:
    """Whether the kernels take this shape."""
    taken = head_dim in (64, 96, 128, 256) and head_dim <= tiles.max_head_dim
    return taken and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and 16 <= page_size <= 128


def product_dtype(dtype, pool_dtype) -> jnp.dtype | None:
    """What the tensor cores multiply, for queries of `dtype`; None where the kernels do not take such a pool.

    8-bit numbers are converted on their way, exactly. Hopper has an instruction for e4m3 to float16 and none to
    bfloat16, and three instructions for two numbers of int8 to bfloat16.
    """
    if dtype == pool_dtype:
        return jnp.dtype(dtype)
    if pool_dtype == jnp.float8_e4m3fn:
        return jnp.dtype(jnp.float16)
    return jnp.dtype(dtype) if pool_dtype == jnp.int8 and dtype == jnp.bfloat16 else None


def cap_scores(scores, options: Options):
    """Products of queries and keys, under the soft cap where there is one; in base 2 once times exponent(options)."""
    if options.logits_soft_cap is None:
        return scores
    return jnp.tanh(scores * (options.scale / options.logits_soft_cap))


def exponent(options: Options) -> float:
    """What a score is multiplied by on its way into exp2."""
    return LOG2E * (options.scale if options.logits_soft_cap is None else options.logits_soft_cap)


def update_softmax(scores, top, total, scale: float):
    """Weights of a tile's scores, the factor of what was summed before, and the new statistics.

    top is the largest score so far; times `scale` scores are in base 2. They are multiplied here and nowhere before,
    masked or not: the compiler makes one instruction of the product and the difference, which rounds once, and where a
    mask came between them it could not, so that a token's bits would depend on where its block of queries begins.
    """
    new_top = jnp.maximum(top, scores.max(axis=1))
    # A row that has seen nothing yet: the difference of two numbers so large would not be zero.
    least = jnp.where(new_top > MASKED, new_top * scale, 0.0)
    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(least, scores.shape, [0]))
    rescale = jnp.exp2((top - new_top) * scale)
    return weights, rescale, new_top, total * rescale + weights.sum(axis=1)


def clear_unwritten(values, count):
    """Zeroes the rows of a value tile from `count` on: nobody wrote them, and 0 * NaN is NaN."""
    width = values.shape[1]
    step = width if width <= 128 else 64  # so that registers hold what is copied beside the sums of a wide head
    for first in range(0, width, step):
        part = values.at[:, pl.ds(first, step)]
        tile = part[...]
        row = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where(row < count, tile, jnp.zeros_like(tile))
    plgpu.commit_smem()


def add_values(acc, weights, values, staging):
    """acc + weights @ values; the weights go through `staging`, or from registers where that is None."""
    if staging is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(plgpu.ACC.init(acc))
    staging[...] = weights
    plgpu.commit_smem()

    def multiply(ref):
        plgpu.wgmma(ref, staging, values)
        return ref[...]

    return acc + pl.run_scoped(multiply, plgpu.ACC(acc.shape, jnp.float32))
