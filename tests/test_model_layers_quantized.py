"""Weights in 8 bits: how near they are, and every product with them against one in float64 with what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints.quantized_weight import FORMATS, QuantizedWeight, quantize
from jax_engine.layers import linear
from jax_engine.layers.linear import FP8_ROWS
from jax_engine.layers.parallel import take_rows

formats = pytest.mark.parametrize("format", FORMATS)


def draw(seed: int, *shape: int) -> np.ndarray:
    """Rows of very different sizes."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal(shape) * 10 ** rng.uniform(-4, 3, shape[:1]).reshape(-1, *(1,) * (len(shape) - 1))
    return rows.astype(np.float32)


def whole(weight: QuantizedWeight) -> np.ndarray:
    """What it stands for, float64."""
    scale = np.asarray(weight.scale, np.float64)
    return np.asarray(weight.values, np.float64) * scale.reshape(scale.shape + (1,) * (weight.ndim - scale.ndim))


@formats
@pytest.mark.parametrize(("shape", "inputs"), [((7, 33), 1), ((3, 4, 5, 16), 1), ((6, 2, 3, 8), 3)])
def test_a_quantized_weight_is_as_near_as_its_format_allows(format, shape, inputs):
    weight = draw(1, *shape)
    weight[2] = 0
    got = quantize(jnp.asarray(weight), format, inputs)
    dtype, limit = FORMATS[format]
    assert got.values.dtype == dtype and got.scale.dtype == jnp.float32
    assert got.shape == shape and got.scale.shape == shape[:-inputs]
    values = np.abs(np.asarray(got.values, np.float32)).reshape(*got.scale.shape, -1).max(axis=-1)
    largest = np.abs(weight).reshape(*got.scale.shape, -1).max(axis=-1)
    np.testing.assert_array_equal(values, np.where(largest > 0, limit, 0))
    step = np.broadcast_to(np.asarray(got.scale).reshape(got.scale.shape + (1,) * inputs), shape)
    # int8: half a step. e4m3: three bits behind the first, or half of the smallest number, 2 ** -9.
    error = step * 0.5001 if format == "int8" else np.maximum(np.abs(weight) * 2.0**-4, step * 2.0**-10) * 1.0001
    assert (np.abs(whole(got) - weight) <= error).all()
    assert not whole(got)[2].any()


def param(weight: QuantizedWeight) -> nnx.Param:
    return nnx.Param(weight, axes=(None,) * weight.ndim, sizes=weight.shape, init="normal", inputs=1)


def near(got: jax.Array, want: np.ndarray, tolerance: float) -> None:
    """Each row by the size of its largest element."""
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.isfinite(error).all() and (error <= tolerance * np.abs(want).max(axis=0)).all()


@formats
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_products(format, dtype, tolerance):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((9, 24)), dtype)
    wide = np.asarray(x, np.float64)
    weight = quantize(jnp.asarray(draw(3, 5, 7, 24)), format, 1)
    want = wide @ whole(weight).reshape(35, 24).T
    got = linear.matmul(x, param(weight))
    assert got.dtype == dtype
    near(got, want, tolerance)
    got = linear.matmul_float32(x, param(weight))
    assert got.dtype == jnp.float32
    near(got, want, 1e-5)
    heads = jnp.asarray(rng.standard_normal((9, 5, 24)), dtype)
    want = np.einsum("tnh,nfh->tnf", np.asarray(heads, np.float64), whole(weight))
    near(linear.matmul_by_head(heads, param(weight)), want, tolerance)
    table = quantize(jnp.asarray(draw(4, 11, 24)), format, 1)
    ids = jnp.array([3, 0, 10, 3])
    np.testing.assert_allclose(take_rows(param(table), ids), whole(table)[np.asarray(ids)], rtol=1e-6)


@formats
def test_experts_have_scales_of_their_own(format):
    sizes = jnp.array([5, 0, 11])
    x = np.random.default_rng(5).standard_normal((16, 12)).astype(np.float32)
    weight = quantize(jnp.asarray(draw(6, 3, 2, 5, 12)), format, 1)
    matrices = whole(weight).reshape(3, 10, 12)
    want = np.concatenate([part @ matrices[i].T for i, part in enumerate(np.split(x, [5, 5]))])
    got = np.asarray(jax.jit(linear.grouped_matmul)(x, sizes, param(weight)), np.float64)
    np.testing.assert_allclose(got / np.abs(want).max(axis=0), want / np.abs(want).max(axis=0), atol=1e-4)


@formats
def test_one_layers_weight_is_chosen_by_a_traced_index(format):
    weights = [quantize(jnp.asarray(draw(seed, 6, 8)), format, 1) for seed in range(3)]
    x = np.random.default_rng(7).standard_normal((4, 8)).astype(np.float32)

    @jax.jit
    def product(index, x):
        chosen = param(weights[0])
        chosen.set_value(linear.WeightByLayer(weights, index))
        return linear.matmul(x, chosen)

    for index, weight in enumerate(weights):
        near(product(index, x), x @ whole(weight).T, 1e-5)


def test_inputs_in_8_bits_are_scaled_token_by_token():
    """What a GPU does from FP8_ROWS rows on: e4m3 keeps three bits behind the first, and errors average out."""
    x = draw(8, FP8_ROWS, 256)
    x[5] = 0
    weight = quantize(jnp.asarray(np.random.default_rng(9).standard_normal((40, 256))), "fp8", 1)
    got = np.asarray(linear.multiply_fp8(jnp.asarray(x), weight.values, weight.scale), np.float64)
    want = x @ whole(weight).T
    assert not got[5].any()
    error = np.linalg.norm(got - want, axis=1) / np.maximum(np.linalg.norm(want, axis=1), 1e-30)
    assert error.max() < 2**-4  # the largest rounding of one input
    alone = linear.multiply_fp8(jnp.asarray(x[3:4]), weight.values, weight.scale)
    np.testing.assert_allclose(got[3:4], alone, rtol=1e-4, atol=1e-4 * np.abs(alone).max())
