"""block_tail: its implementations against the float64 reference, the GPU kernel in GPU interpret mode; in a layer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from checkpoints.quantized_weight import QuantizedWeight
from jax_engine.layers.attention import Attention
from jax_engine.layers.context import StepContext
from jax_engine.model_config import LayerConfig, ModelConfig
from jax_engine.models.decoder import DecoderLayer, Residual
from pallas_kernels.block_tail import api, block_tail, gpu, reference, takes
from pallas_kernels.block_tail.cases import CASES, SMALL_CASES
from pallas_kernels.ragged_paged_attention import Ragged, plan

EPS = 1e-5
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def interpreted_device(monkeypatch):
    """The interpreter, as a device of one multiprocessor, and layers of any size."""
    monkeypatch.setitem(api.MULTIPROCESSORS, "interpreter", 1)
    monkeypatch.setattr(api, "MIN_WEIGHT_BYTES", 0)


def make_arrays(tokens, case, dtype=jnp.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    embed, attended, hidden = case

    def normal(scale, *shape):
        return jnp.asarray(rng.standard_normal(shape) * scale, dtype)

    tokens_of = normal(1, tokens, attended), normal(1, tokens, embed) * 3
    weights = normal(attended**-0.5, embed, attended), jnp.asarray(rng.uniform(0.5, 2, embed), dtype)
    return *tokens_of, *weights, normal(embed**-0.5, 2 * hidden, embed), normal(hidden**-0.5, embed, hidden)


def run(arrays, implementation):
    if implementation == "xla":
        return block_tail(*arrays, eps=EPS, device_kind="", implementation="xla")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return block_tail(*arrays, eps=EPS, device_kind="interpreter")


def error(got, wanted):
    return np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
@pytest.mark.parametrize("name", SMALL_CASES)
@pytest.mark.parametrize("tokens", [1, 8, 21])
def test_both_results_are_those_of_the_reference(tokens, name, implementation):
    arrays = make_arrays(tokens, SMALL_CASES[name])
    for got, wanted in zip(run(arrays, implementation), reference.block_tail(*arrays, EPS), strict=True):
        assert got.shape == wanted.shape and got.dtype == jnp.bfloat16
        # Rounding the two addends and the sum to 8 bits makes 2e-3 by itself, and three roundings in a row 5e-3.
        assert error(got, wanted) < 8e-3


@pytest.mark.parametrize("name", SMALL_CASES)
def test_the_kernel_rounds_no_more_than_needed_in_float16(name):
    arrays = make_arrays(8, SMALL_CASES[name], jnp.float16)
    for got, wanted in zip(run(arrays, "gpu"), reference.block_tail(*arrays, EPS), strict=True):
        assert error(got, wanted) < 1e-3


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
def test_a_token_of_nan_stays_alone(implementation):
    arrays = make_arrays(5, SMALL_CASES["odd rows"], seed=1)
    clean = run(arrays, implementation)
    attended, *rest = arrays
    dirty = run((attended.at[2].set(jnp.nan), *rest), implementation)
    for before, after in zip(clean, dirty, strict=True):
        before, after = np.asarray(before, np.float32), np.asarray(after, np.float32)
        assert np.isnan(after[2]).all()
        np.testing.assert_array_equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("workers", [132, 114])
def test_every_output_belongs_to_one_worker(name, workers):
    tiles = gpu.Tiles(workers)
    for product in gpu.products(*CASES[name], tiles):
        assert product.fits
        assert product.rows * (workers - 1) < product.outputs + 8 * workers
        assert product.rows * workers >= product.outputs
        assert product.steps * product.blocks * 64 >= product.inputs


def test_where_the_kernel_is_taken(monkeypatch):
    monkeypatch.undo()
    widths = CASES["llama-8b"]
    assert takes(32, *widths, jnp.bfloat16, H100)
    assert not takes(1, *widths, jnp.bfloat16, H100), "XLA's own products are as fast"
    assert not takes(512, *widths, jnp.bfloat16, H100), "many tokens are not bound by the weights"
    assert not takes(32, *widths, jnp.float32, H100)
    assert not takes(32, *CASES["qwen3-0.6b"], jnp.bfloat16, H100), "not measured"
    assert not takes(32, *widths, jnp.bfloat16, "NVIDIA H100 PCIe"), "fewer multiprocessors than workers: a dead end"
    assert not takes(32, 8192, 8192, 28672, jnp.bfloat16, H100), "more outputs than a worker's place takes"


def test_shapes_that_the_kernel_does_not_take():
    arrays = make_arrays(2, SMALL_CASES["odd rows"], jnp.float32)
    with pytest.raises(ValueError, match=r"takes bfloat16 or float16.*\(2, 40, 72, 112\) of float32; take 'xla'"):
        block_tail(*arrays, eps=EPS, device_kind="interpreter")
    with pytest.raises(ValueError, match="must be one of gpu, xla; got 'auto'"):
        block_tail(*arrays, eps=EPS, device_kind="interpreter", implementation="auto")
    with pytest.raises(ValueError, match=r"is for NVIDIA H100.*got 'NVIDIA H100 PCIe'; take 'xla'"):
        block_tail(*arrays, eps=EPS, device_kind="NVIDIA H100 PCIe")


CONFIG = ModelConfig(
    architecture="none", vocab_size=2, hidden_size=40, intermediate_size=112, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64, layers=(LayerConfig(),),
)  # fmt: skip


def make_layer(config: ModelConfig = CONFIG) -> DecoderLayer:
    layer = DecoderLayer(config, LayerConfig(), jnp.dtype(jnp.bfloat16))
    graph, state = nnx.split(layer)
    rng = np.random.default_rng(3)
    return nnx.merge(graph, jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape) * 0.3, w.dtype), state))


def run_layer(layer: DecoderLayer, device_kind: str, monkeypatch) -> Residual:
    """The layer behind an attention that returns what it got."""
    attend = lambda self, x, cache, context, place: (x[:, :32], cache)  # noqa: E731
    monkeypatch.setattr(Attention, "attend", attend)
    zeros = jnp.zeros(1, jnp.int32)
    ragged = Ragged(zeros[None], zeros, jnp.zeros(2, jnp.int32), jnp.int32(0))
    shared = plan(ragged, num_tokens=17, num_pages=1, page_size=8)
    context = StepContext(shared, zeros, ragged.query_starts, jnp.int32(0), True, device_kind=device_kind)
    rng = np.random.default_rng(4)
    stream = Residual(*(jnp.asarray(rng.standard_normal((17, 40)), jnp.bfloat16) for _ in range(2)))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return layer(stream, jnp.zeros(0), context, jnp.int32(0))[0]


def test_a_layer_gives_the_same_with_the_kernel_and_without(monkeypatch):
    calls = []
    monkeypatch.setattr(gpu, "block_tail", lambda *args, kernel=gpu.block_tail: calls.append(1) or kernel(*args))
    layer = make_layer()
    with_it, without = (run_layer(layer, kind, monkeypatch) for kind in ("interpreter", "cpu"))
    assert len(calls) == 1
    for got, wanted in zip(with_it, without, strict=True):
        assert error(got, np.asarray(wanted, np.float64)) < 8e-3


@pytest.mark.parametrize("change", ["bias", "activation", "multiplier", "split", "quantised"])
def test_layers_of_other_forms_do_without_the_kernel(change, monkeypatch):
    monkeypatch.setattr(gpu, "block_tail", lambda *args: pytest.fail("the kernel has no such form"))
    changes = {
        "bias": {"mlp_bias": True},
        "activation": {"activation": "relu"},
        "multiplier": {"residual_multiplier": 0.5},
    }
    layer = make_layer(dataclasses.replace(CONFIG, **changes.get(change, {})))
    mlp: Any = layer.mlp
    if change == "split":  # as a device of two sees it; the sum over both is not the matter here
        monkeypatch.setattr("jax_engine.layers.linear.complete", lambda product, weight: product)
        mlp.down.set_value(mlp.down[...][:, :56])
        mlp.gate_up.set_value(mlp.gate_up[...][:, :56])
    if change == "quantised":
        scale = jnp.ones(mlp.down.shape[:1], jnp.float32)
        mlp.down.set_value(QuantizedWeight(mlp.down[...].astype(jnp.int8), scale))
    run_layer(layer, "interpreter", monkeypatch)
