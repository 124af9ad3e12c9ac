"""all_reduce: what the kernel takes, and when it is taken. Its sums are checked by benchmarks.all_reduce, on GPUs: the
interpreter knows no memory of others. tests/on_eight_devices.py has XLA's form and how layers call it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import all_reduce as op
from pallas_kernels.all_reduce import gpu
from pallas_kernels.all_reduce.cases import CASES


def traced(case, num_devices, *, peers=True, implementation="auto"):
    """What one of so many devices does."""
    x = jax.ShapeDtypeStruct((case.rows, case.width), case.dtype)
    known = op.peers_shape(num_devices) if peers else None

    def run(x, known):
        return op.all_reduce(x, "tensor", known, implementation=implementation)

    return str(jax.make_jaxpr(run, axis_env=[("tensor", num_devices)])(x, known))


@pytest.mark.parametrize("name", CASES)
def test_cases_are_sums_of_the_kernel_on_two_devices(name):
    assert "name=all_reduce" in traced(CASES[name], 2)
    assert "psum" in traced(CASES[name], 2, peers=False)
    assert "psum" in traced(CASES[name], 2, implementation="xla")


def test_what_everybody_would_get_too_much_of_is_left_to_xla():
    rows = CASES["llama-8b, 256 rows"]
    assert "psum" in traced(rows, 4) and "name=all_reduce" in traced(rows, 4, implementation="gpu")
    assert "name=all_reduce" in traced(CASES["llama-8b, decode"], 8)
    assert "psum" in traced(CASES["llama-70b, decode"], 8)


def test_the_next_sum_takes_what_a_sum_returns():
    x = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    (_, peers) = jax.eval_shape(gpu.all_reduce, x, op.peers_shape(4))
    assert (peers.shape, peers.dtype) == ((6, 2), jnp.int32)


@pytest.mark.parametrize(
    ("shape", "dtype", "units"),
    [
        ((1, 1024), jnp.bfloat16, 1),
        ((8, 64), jnp.float32, 1),
        ((512, 1024), jnp.bfloat16, 2),
        ((256, 1024), jnp.bfloat16, 1),
        ((257, 1024), jnp.bfloat16, 0),  # more blocks than there may be, and no whole number of larger ones
        ((258, 1024), jnp.bfloat16, 2),
        ((2048, 1024), jnp.bfloat16, 8),
        ((2049, 1024), jnp.bfloat16, 0),
        ((1, 1000), jnp.bfloat16, 0),
        ((0, 1024), jnp.bfloat16, 0),
    ],
)
def test_blocks_are_alike_and_no_more_than_fit_a_gpu(shape, dtype, units):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert gpu.supports(x) == (units > 0)
    if units:
        blocks = x.size * x.dtype.itemsize // (2048 * units)
        assert blocks <= gpu.BLOCKS and f"grid=({blocks},)" in str(jax.make_jaxpr(gpu.all_reduce)(x, op.peers_shape(2)))


@pytest.mark.parametrize(
    ("shape", "dtype", "num_devices", "fits"),
    [
        ((1, 4096), jnp.bfloat16, 2, True),
        ((64, 8192), jnp.float16, 2, True),
        ((8, 8192), jnp.bfloat16, 4, True),
        ((8, 8192), jnp.bfloat16, 8, False),  # more than a thread's registers hold
        ((32, 4096), jnp.bfloat16, 8, True),
        ((64, 16384), jnp.bfloat16, 2, False),
        ((8, 896), jnp.bfloat16, 2, False),
        ((8, 4096), jnp.float32, 2, False),
        ((257, 4096), jnp.bfloat16, 2, False),
    ],
)
def test_rows_that_are_normed_on_the_way(shape, dtype, num_devices, fits):
    x, peers = jax.ShapeDtypeStruct(shape, dtype), op.peers_shape(num_devices)

    def run(x, peers):
        return op.all_reduce_add_norm(x, x, x[0], "tensor", peers, eps=1e-5, platform="gpu")

    program = str(jax.make_jaxpr(run, axis_env=[("tensor", num_devices)])(x, peers))
    assert ("name=all_reduce_add_norm" in program) == fits
    assert ("psum" in program) != fits
    assert "name=all_reduce_add_norm" not in str(jax.make_jaxpr(run, axis_env=[("tensor", num_devices)])(x, None))


def test_integers_are_not_taken():
    assert not gpu.supports(jax.ShapeDtypeStruct((8, 1024), jnp.int32))


def test_tables_hold_addresses_of_64_bits():
    addresses = [0x7F0A_0000_0200, 0x7F1A_FFFF_FE00]
    tables = [op.peers_table(addresses, rank) for rank in range(2)]
    assert [(table.shape, table.dtype) for table in tables] == [((4, 2), np.int32)] * 2
    assert [table.view(np.int64)[:, 0].tolist() for table in tables] == [
        [*addresses, 0, addresses[0]],
        [*addresses, 1, addresses[1]],
    ]


def test_memory_is_for_linked_gpus_and_several_of_them():
    assert op.memory_bytes(1, "NVIDIA H200") == op.memory_bytes(2, "cpu") == op.memory_bytes(4, "TPU v6e") == 0
    two, four = (op.memory_bytes(number, "NVIDIA H200") for number in (2, 4))
    assert two < 34 << 20 and 1.9 < four / two < 2


def test_refusals():
    x = np.zeros((1, 1000), jnp.bfloat16)
    with pytest.raises(ValueError, match="must be one of auto, gpu, xla; got 'nccl'"):
        op.all_reduce(x, "tensor", None, implementation="nccl")
    with pytest.raises(ValueError, match=r"a multiple of 2048 bytes up to 4 MiB, and peers; got bfloat16, \(1, 1000\)"):
        op.all_reduce(x, "tensor", np.zeros((4, 2), np.int32), implementation="gpu")
    with pytest.raises(ValueError, match="and no peers; take 'xla'"):
        op.all_reduce(np.zeros((1, 1024), jnp.bfloat16), "tensor", None, implementation="gpu")
    options = {"eps": 1e-5, "platform": "gpu", "implementation": "gpu"}
    with pytest.raises(
        ValueError,
        match=r"elements up to 8192, or half of that on 8 devices, and peers; got bfloat16, \(1, 1000",
    ):
        op.all_reduce_add_norm(x, x, x[0], "tensor", np.zeros((4, 2), np.int32), **options)
