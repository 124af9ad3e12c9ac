"""Matrix products with weights, and the forms a layer's weight comes in: an array or a QuantizedWeight, or one of them
by layer. No layer looks at which it has.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from checkpoints.quantized_weight import QuantizedWeight
from jax_engine.layers.parallel import Part, complete, gives_parts

#: From so many rows on, an H100 multiplies fp8 with fp8 faster than it converts the weights on their way to a product
#: of bfloat16 (benchmarks/results/h100_quantized_products.json); see ModelProgram.compiler_options too.
FP8_ROWS = 64
#: A weight as a product takes it.
Weight = Array | QuantizedWeight


class WeightByLayer:
    """The weights of one place in every layer, of which a traced index picks one.

    A loop over the layers meets weights in this form. The choice is made by `lax.switch` around what is done with the
    weight, so no weight is copied, as slicing a stack of them would.
    """

    def __init__(self, weights: Sequence[Weight], index: Array):
        self._weights = weights
        self._index = index
        self.shape = weights[0].shape

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args, weight) of the chosen weight."""
        return jax.lax.switch(self._index, [lambda *args, w=w: function(*args, w) for w in self._weights], *args)


def with_weight(function: Callable[..., Any], *args: Any, weight: nnx.Param) -> Any:
    """function(*args, value) for a function that does all its work with the weight at once."""
    value: Any = weight.get_value()
    return value.apply(function, *args) if isinstance(value, WeightByLayer) else function(*args, value)


def matmul(x: Float[Array, "T D"], weight: nnx.Param) -> Float[Array, "T F"]:
    """x times a weight stored outputs first, inputs last, as checkpoints do: F and D are its flattened axes."""
    return complete(with_weight(_matmul, x, weight=weight), weight)


def matmul_part(x: Float[Array, "T D"], weight: nnx.Param) -> Part | Float[Array, "T F"]:
    """The same, but a sum over the devices is left to who takes it."""
    product = with_weight(_matmul, x, weight=weight)
    return Part(product) if gives_parts(weight) else product


def matmul_float32(x: Float[Array, "T D"], weight: nnx.Param) -> Float[Array, "T F"]:
    """The same in float32 whatever x is, and of this device's outputs only."""
    return with_weight(_matmul_float32, x, weight=weight)


def matmul_by_head(x: Float[Array, "T N H"], weight: nnx.Param) -> Float[Array, "T N F"]:
    """Each head of x times a matrix of its own; the weight is [N, F, H]."""
    return with_weight(_matmul_by_head, x, weight=weight)


def grouped_matmul(x: Float[Array, "S D"], sizes: Int32[Array, " E"], weight: nnx.Param) -> Float[Array, "S F"]:
    """Runs of rows of x times one matrix each: the first sizes[0] rows times weight[0], and so on.

    Args:
        sizes: they sum to S, or to less: rows past them come out as anything.
        weight: [E, ..., D], outputs first as in matmul.
    """
    return with_weight(_grouped_matmul, x, sizes, weight=weight)


def small(weight: nnx.Param) -> Array:
    """The value of a weight that is small enough to be copied, such as a bias."""
    return with_weight(lambda array: array, weight=weight)


def _matmul_by_head(x: Array, weight: Weight) -> Array:
    if not isinstance(weight, QuantizedWeight):
        return jnp.einsum("tnh,nfh->tnf", x, weight)
    return (_matmul_by_head(x, weight.values.astype(x.dtype)) * weight.scale).astype(x.dtype)


def _grouped_matmul(x: Array, sizes: Array, weight: Weight) -> Array:
    if isinstance(weight, QuantizedWeight):
        row = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right", method="compare_all")
        scale = weight.scale.reshape(sizes.shape[0], -1)[jnp.minimum(row, sizes.shape[0] - 1)]
        return (_grouped_matmul(x, sizes, weight.values) * scale).astype(x.dtype)
    weight = weight.reshape(weight.shape[0], -1, x.shape[1])
    # XLA's ragged_dot on a CPU multiplies every row with every matrix.
    return jax.lax.platform_dependent(x, sizes, weight, cpu=multiply_blocks, default=ragged_dot)


def ragged_dot(x: Array, sizes: Array, weight: Array) -> Array:
    """grouped_matmul by XLA's own operation; weight [E, F, D]."""
    dims = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    return jax.lax.ragged_dot_general(x, weight.astype(x.dtype), sizes, dims)


def multiply_blocks(x: Array, sizes: Array, weight: Array) -> Array:
    """grouped_matmul by one block of rows of one expert after the other; weight [E, F, D].

    A block may reach into the next expert's rows: these come later and put their own results there.
    """
    num_rows, num_experts = x.shape[0], weight.shape[0]
    block = min(64, max(8, 1 << (num_rows // num_experts).bit_length()))
    blocks = -(-sizes // block)
    ends, first_rows = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes
    x = jnp.pad(x, ((0, block), (0, 0)))

    def multiply(number: Array, out: Array) -> Array:
        expert = jnp.searchsorted(ends, number, side="right")
        row = first_rows[expert] + (number - ends[expert] + blocks[expert]) * block
        rows = jax.lax.dynamic_slice_in_dim(x, row, block)
        matrix = jax.lax.dynamic_index_in_dim(weight, expert, keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(out, _dot(rows, matrix.astype(x.dtype)), row, axis=0)

    out = jnp.zeros((num_rows + block, weight.shape[1]), x.dtype)
    return jax.lax.fori_loop(0, ends[-1], multiply, out)[:num_rows]


def _matmul(x: Array, weight: Weight) -> Array:
    return _matmul_float32(x, weight).astype(x.dtype) if isinstance(weight, QuantizedWeight) else _dot(x, weight)


def _matmul_float32(x: Array, weight: Weight) -> Array:
    if not isinstance(weight, QuantizedWeight):
        return _dot(x, weight, jnp.float32)
    parts = x, weight.values, weight.scale.reshape(-1)
    if weight.values.dtype == jnp.float8_e4m3fn and x.shape[0] >= FP8_ROWS:
        return jax.lax.platform_dependent(*parts, cuda=multiply_fp8, default=multiply_values)
    return multiply_values(*parts)


def multiply_values(x: Array, values: Array, scale: Array) -> Array:
    """x [T, D] times 8-bit values [F, ...D] with a scale for each output, float32; x keeps its bits."""
    # Every number of 8 bits is one of x's type too. The scales belong to outputs, so they wait for the sum.
    return _dot(x, values.astype(x.dtype), jnp.float32) * scale


def multiply_fp8(x: Array, values: Array, scale: Array) -> Array:
    """The same with x in fp8 too, each token by its own scale: tensor cores take both as they are."""
    wide = x.astype(jnp.float32)
    own = jnp.maximum(jnp.max(jnp.abs(wide), axis=1, keepdims=True), 1e-12) / float(jnp.finfo(values.dtype).max)
    return _dot((wide / own).astype(values.dtype), values, jnp.float32) * own * scale


def _dot(x: Array, weight: Array, dtype: Any = None) -> Array:
    weight = weight.reshape(-1, x.shape[-1])
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
