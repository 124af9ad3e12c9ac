"""add_norm on Hopper: a warpgroup holds a row in registers from the first read to the last write.

Called by api.py only. Every byte is read and written once; XLA needs a pass for the sum, and one or two for the norm.
"""

# The types of plgpu's own names are not to be had: it exports some of them lazily.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

#: Threads of a warpgroup; a row's elements are dealt out to them evenly.
_THREADS = 128
#: Elements of a row that fit the registers of a warpgroup with room to spare.
_MAX_WIDTH = 8192
ALLOWED = f"the GPU kernel takes bfloat16 or float16 and D up to {_MAX_WIDTH}, a multiple of {_THREADS}"


def supports(x: jax.Array) -> bool:
    """Whether the kernel takes rows like these."""
    return x.dtype in (jnp.bfloat16, jnp.float16) and x.shape[1] % _THREADS == 0 and x.shape[1] <= _MAX_WIDTH


def add_norm(x, added, weight, eps: float):
    """See api.add_norm."""
    run = plgpu.kernel(
        functools.partial(_row, eps),
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype),) * 2,
        kernel_name="add_norm",
        grid=(x.shape[0],),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return run(x, added, weight)


def _row(eps: float, x_ref, added_ref, weight_ref, sum_ref, norm_ref):
    row, layout = lax.axis_index("row"), row_layout(x_ref.shape[1])
    total = read(x_ref.at[row], layout) + read(added_ref.at[row], layout)
    write(total, layout, eps, weight_ref, sum_ref.at[row], norm_ref.at[row])


def row_layout(width: int):
    """A row's elements over the threads, of which each reads 16 bytes of a 16-bit format at once, if it is so long."""
    vector = next(size for size in (8, 4, 2, 1) if width % (size * _THREADS) == 0)
    return plgpu.Layout.WG_STRIDED((width,), vec_size=vector)


def read(ref, layout):
    """A row as float32."""
    return plgpu.layout_cast(ref[...], layout).astype(jnp.float32)


def write(total, layout, eps: float, weight_ref, sum_ref, norm_ref):
    """Writes a row, float32 [D] in that layout, and its norm, both rounded to the results' dtype."""
    dtype, width = sum_ref.dtype, sum_ref.shape[0]
    total = total.astype(dtype)
    sum_ref[...] = total
    wide = total.astype(jnp.float32)
    scale = lax.rsqrt(jnp.sum(wide * wide) / width + eps)
    norm_ref[...] = (read(weight_ref, layout) * (wide * scale).astype(dtype).astype(jnp.float32)).astype(dtype)
