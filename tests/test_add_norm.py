"""add_norm: its implementations against the float64 reference; the GPU kernel in GPU interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.add_norm import add_norm, reference
from pallas_kernels.add_norm.cases import CASES

EPS = 1e-5


@pytest.fixture(autouse=True)
def arrays_by_hand():
    with jax.transfer_guard("allow"):
        yield


def make_arrays(tokens, width, dtype, added_dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width)) * rng.uniform(0.01, 100, (tokens, 1))
    added = rng.standard_normal((tokens, width)) * rng.uniform(0.01, 100, (tokens, 1))
    weight = rng.uniform(-2, 2, width)
    return jnp.asarray(x, dtype), jnp.asarray(added, added_dtype), jnp.asarray(weight, dtype)


def run(arrays, implementation):
    if implementation == "xla":
        return add_norm(*arrays, eps=EPS, platform="cpu")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return add_norm(*arrays, eps=EPS, platform="gpu", implementation="gpu")


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
@pytest.mark.parametrize("added_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["llama-8b, one row", "qwen3-0.6b", "odd width", "wide"])
def test_sum_and_norm_are_those_of_the_reference(name, added_dtype, implementation):
    case = CASES[name]
    rows = min(case.tokens, 4) if implementation == "gpu" else case.tokens
    arrays = make_arrays(rows, case.width, jnp.bfloat16, added_dtype)
    total, norm = run(arrays, implementation)
    wanted_total, wanted_norm = reference.add_norm(*arrays, EPS)
    assert total.dtype == norm.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(total, np.float64), wanted_total, rtol=2**-8)
    np.testing.assert_allclose(np.asarray(norm, np.float64), wanted_norm, rtol=2**-7, atol=1e-6)


def test_the_kernel_gives_what_xla_gives():
    arrays = make_arrays(3, 1024, jnp.bfloat16, jnp.bfloat16, seed=1)
    for mine, other in zip(run(arrays, "gpu"), run(arrays, "xla"), strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(other, np.float32), rtol=2**-7)


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
def test_a_row_of_nan_stays_alone(implementation):
    x, added, weight = make_arrays(3, 256, jnp.bfloat16, jnp.bfloat16, seed=2)
    clean = run((x, added, weight), implementation)
    dirty = run((x.at[1].set(jnp.nan), added, weight), implementation)
    for before, after in zip(clean, dirty, strict=True):
        before, after = np.asarray(before, np.float32), np.asarray(after, np.float32)
        assert np.isnan(after[1]).all()
        np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


def test_shapes_that_the_kernel_does_not_take():
    x, added, weight = make_arrays(2, 100, jnp.bfloat16, jnp.bfloat16)
    with pytest.raises(ValueError, match="multiple of 128; got bfloat16 and D = 100; take 'xla'"):
        add_norm(x, added, weight, eps=EPS, platform="gpu", implementation="gpu")
    with pytest.raises(ValueError, match="must be one of auto, gpu, xla; got 'triton'"):
        add_norm(x, added, weight, eps=EPS, platform="gpu", implementation="triton")
    total, _ = add_norm(x, added, weight, eps=EPS, platform="gpu")  # auto: XLA serves it
    np.testing.assert_array_equal(np.asarray(total, np.float32), np.asarray(x + added, np.float32))
