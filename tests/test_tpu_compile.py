"""The TPU kernels and steps through the real TPU compiler, for chips that are not here: needs libtpu (extra `tpu`).

What is proven: Mosaic takes the kernels, VMEM and HBM suffice, the pool is updated in place. No speed, no values; those
are in tests/test_ragged_paged_attention_tpu.py. `make tpu-check` runs all of it, `make test` only what is quick.
"""

import dataclasses
import importlib.util
import math
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_engine import compile_target
from jax_engine.batch import Bucket
from jax_engine.config import EngineConfig, resolve
from jax_engine.errors import ConfigError
from jax_engine.model_config import ModelConfig
from jax_engine.models import read_config
from jax_engine.models.shapes import NAMED_SHAPES
from jax_engine.program import ModelProgram
from pallas_kernels.ragged_paged_attention import Device, Ragged, plan, pool_shape, ragged_paged_attention, write_kv
from pallas_kernels.ragged_paged_attention.cases import SHAPES, Shape

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jax-engine[tpu]'"
)

#: One chip of each generation, the oldest that is tested first.
CHIPS = ("v5e:1x1", "v6e:1x1", "v5p:1x1x1", "tpu7x:1x1x1")
#: The page table is that of the default limits: 256 rows of 8,192 tokens, half of the scalar memory.
LAYERS, PAGES, PAGE_SIZE, WIDTH = 3, 4096, 16, 512


@pytest.fixture(scope="module", autouse=True)
def compiler_environment():
    """As `jax-engine compile` sets it."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def compile_op(chip: str, shape: Shape, tokens: int, rows: int, decode_only: bool, dtype=jnp.bfloat16, **options):
    """Compiles write and attention of LAYERS layers; returns the compiler's memory analysis and the pool's bytes."""
    device = compile_target.open_target(chip).devices[0]
    mesh = Mesh([device], ("one",))
    place = NamedSharding(mesh, PartitionSpec())

    def array(dims, kind=jnp.int32):
        return jax.ShapeDtypeStruct(dims, kind, sharding=place)

    def step(pool, q, k, v, ragged, sinks):
        shared = plan(
            ragged,
            num_tokens=tokens,
            num_pages=PAGES,
            page_size=PAGE_SIZE,
            decode_only=decode_only,
            device=Device("tpu", device.device_kind),
        )
        for layer in range(LAYERS):
            pool = write_kv(pool, k, v, shared, jnp.int32(layer))
            q = ragged_paged_attention(q, pool, shared, jnp.int32(layer), scale=0.1, sinks=sinks, **options)
        return pool, q

    sinks = array((shape.num_heads,), jnp.float32) if options.pop("sinks", False) else None
    dims = pool_shape(LAYERS, PAGES, PAGE_SIZE, shape.num_kv_heads, shape.head_dim, implementation="tpu")
    ragged = Ragged(array((rows, WIDTH)), array((rows,)), array((rows + 1,)), array(()))
    kv = array((tokens, shape.num_kv_heads, shape.head_dim), dtype)
    q = array((tokens, shape.num_heads, shape.head_dim), dtype)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(array(dims, dtype), q, kv, kv, ragged, sinks)
    return lowered.compile().memory_analysis(), math.prod(dims) * jnp.dtype(dtype).itemsize


def check_op(*args, **options):
    memory, pool = compile_op(*args, **options)
    assert memory.alias_size_in_bytes == pool
    assert memory.temp_size_in_bytes < pool / LAYERS


@pytest.mark.parametrize("chip", CHIPS)
def test_decode_compiles_in_place(chip):
    check_op(chip, SHAPES["llama-8b"], 256, 256, True)


@pytest.mark.parametrize(
    "chip", [chip if chip == "v6e:1x1" else pytest.param(chip, marks=pytest.mark.long) for chip in CHIPS]
)
def test_a_mixed_step_compiles_in_place(chip):
    check_op(chip, SHAPES["llama-8b"], 256, 32, False)


@pytest.mark.long
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", ["smollm2-135m", "qwen3-0.6b", "mha", "mqa"])
def test_other_shapes_compile_in_place(chip, shape):
    check_op(chip, SHAPES[shape], 128, 32, False)


@pytest.mark.long
@pytest.mark.parametrize("chip", CHIPS)
def test_every_option_compiles(chip):
    check_op(chip, SHAPES["llama-8b"], 128, 32, False, sliding_window=1024, logits_soft_cap=30.0, sinks=True)


@pytest.mark.long
def test_float32_compiles():
    check_op("v6e:1x1", SHAPES["llama-8b"], 128, 32, False, dtype=jnp.float32)


def engine_limits(model: ModelConfig, num_pages: int, **options):
    config = EngineConfig(load_format="dummy", num_pages=num_pages, max_model_len=4096, **options)
    return resolve(config, model, platform="tpu", num_pages=num_pages)


def two_layers(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, num_hidden_layers=2, layers=model.layers[:2])


LLAMA_8B = read_config(NAMED_SHAPES["llama-3.1-8b"])


@pytest.mark.long
@pytest.mark.parametrize("chip", ["v6e:1x1", "tpu7x:1x1x1"])
def test_whole_steps_of_an_8b_model_compile_in_place(chip):
    """With two of the 32 layers: the others are the same again."""
    program = ModelProgram(two_layers(LLAMA_8B), "auto", compile_target.open_target(chip).devices[:1])
    limits = engine_limits(program.model_config, 65536, max_num_seqs=64)
    for bucket in (Bucket(64, 64, True), Bucket(512, 64, False)):
        report = compile_target.compile_step(program, bucket, limits)
        pool = limits.num_pages * program.page_bytes(PAGE_SIZE)
        assert pool <= report.alias_bytes < pool * 1.001
        assert report.temp_bytes < pool / 2


def test_a_wrong_name_is_refused():
    with pytest.raises(ConfigError, match=r"'v9:1x1' cannot be compiled for.*v6e:1x1"):
        compile_target.open_target("v9:1x1")


def test_the_compiler_states_what_memory_there_is():
    assert 15 < compile_target.open_target("v5e:1x1").hbm_bytes / 2**30 < 16
    assert 31 < compile_target.open_target("v6e:1x1").hbm_bytes / 2**30 < 32
