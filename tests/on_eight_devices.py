"""Tests that need several devices. test_parallel.py runs this file in a process that has eight simulated ones."""

import dataclasses
import json
import os
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from benchmarks import all_reduce, steps
from checkpoints import orbax_io
from checkpoints.formats import open_checkpoint
from checkpoints.loader import dummy, load
from jax_engine.compilation import build
from jax_engine.convert import convert
from jax_engine.kept_programs import KeptPrograms
from jax_engine.layers.parallel import complete, sums_take, take_rows, total
from jax_engine.llm import LLM
from jax_engine.models import decoder, read_config
from jax_engine.program import ModelProgram
from jax_engine.sampling_params import SamplingParams
from jax_engine.sharding import TENSOR, make_mesh
from pallas_kernels import all_reduce as all_reduce_op
from pallas_kernels.all_reduce import reference
from pallas_kernels.all_reduce.cases import CASES
from tests.conftest import Modes
from tests.test_engine import content, random_requests, serve
from tests.test_preemption import random_requests as long_requests

GOLDEN = Path(__file__).parent / "golden" / "tiny"
ONE_BUCKET = {"token_buckets": (24,), "decode_buckets": ()}


@pytest.fixture(scope="module")
def two() -> Modes:
    """Two devices, with a kv head and two query heads each."""
    return Modes(tensor_parallel_size=2, **ONE_BUCKET)


@pytest.fixture(scope="module")
def four() -> Modes:
    """Four devices for two kv heads: each is held twice."""
    return Modes(tensor_parallel_size=4, token_buckets=(24,), decode_buckets=(8,))


def check_golden(modes: Modes, architecture: str = "llama") -> None:
    """Log-probabilities at every position of three prompts, and their greedy continuations, near-ties apart."""
    expected = np.load(GOLDEN / architecture / "expected.npz")
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, prompt_logprobs=0, logprobs=5)
    prompts = expected["tokens"].tolist()
    outputs = serve(modes.engine(), [(prompt, params) for prompt in prompts])
    for output, tokens, logprobs, greedy in zip(
        outputs, prompts, expected["logprobs"], expected["greedy"].tolist(), strict=True
    ):
        (completion,) = output.outputs
        for got, want, entries in zip(completion.token_ids, greedy, completion.logprobs, strict=True):
            if got != want:
                assert entries[got].logprob - entries[want].logprob < 0.02, "another token, and no near-tie"
                break
        got = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]
        np.testing.assert_allclose(got, logprobs[np.arange(47), tokens[1:]], rtol=0, atol=2e-3)


def test_two_devices_give_the_golden_answers(two):
    check_golden(two)
    weights, pool = two.runner.weights, two.runner._cache.pool
    attention = weights["layers"][0]["attention"]
    assert attention["qkv"].sharding.shard_shape(attention["qkv"].shape)[0] == 1
    assert attention["output"].sharding.shard_shape(attention["output"].shape)[1] == 1
    assert weights["embed"]["weight"].sharding.shard_shape((320, 64)) == (160, 64)
    assert pool.shape[1] == 1 and pool.sharding.num_devices == 2


def test_more_devices_than_kv_heads_give_the_golden_answers(four):
    check_golden(four)
    pool = four.runner._cache.pool
    assert pool.shape[1] == 1 and pool.sharding.num_devices == 4


def test_lowered_programs_that_were_kept_give_the_golden_answers(two, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("it was traced")

    parts = two.runner._program.parts(two.limits)
    lowered = [KeptPrograms(tmp_path).lower(made).as_text() for made in parts.values()]
    unlike = {part: dataclasses.replace(made, function=fail) for part, made in parts.items()}
    assert [KeptPrograms(tmp_path).lower(made).as_text() for made in unlike.values()] == lowered
    monkeypatch.setattr(two.runner, "_programs", build(unlike, "program", KeptPrograms(tmp_path).lower))
    check_golden(two)


#: Recurrent states beside gated attention and shared experts; the others take too long for every run.
SOME = ("qwen3_next",)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "architecture",
    [
        name if name in SOME else pytest.param(name, marks=pytest.mark.long)
        for name in sorted(path.name for path in GOLDEN.iterdir())
    ],
)
def test_every_architecture_gives_the_golden_answers(architecture, size):
    modes = Modes(
        model=str(GOLDEN / architecture),
        tensor_parallel_size=size,
        max_num_seqs=3,
        token_buckets=(64,),
        decode_buckets=(),
        num_pages=280,
    )
    check_golden(modes, architecture)


@pytest.mark.parametrize("architecture", ["gpt_oss", pytest.param("qwen3_next", marks=pytest.mark.long)])
def test_whole_experts_on_each_device_give_the_golden_answers(architecture):
    modes = Modes(
        model=str(GOLDEN / architecture),
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        max_num_seqs=3,
        token_buckets=(64,),
        decode_buckets=(),
        num_pages=280,
    )
    gate_up = modes.runner.weights["layers"][0]["mlp"]["gate_up"]
    assert gate_up.sharding.shard_shape(gate_up.shape)[0] == gate_up.shape[0] // 2
    check_golden(modes, architecture)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("size", [2, 4])
def test_weights_of_8_bits_are_split_and_restored_with_their_scales(tmp_path, format, size):
    """On more devices than kv heads too, where scales are repeated as the heads are."""
    convert(str(GOLDEN / "llama"), tmp_path / "stored", dtype="float32", quantization=format)
    found = []
    for model in (GOLDEN / "llama", tmp_path / "stored"):
        checkpoint = open_checkpoint(str(model))
        program = ModelProgram(read_config(checkpoint.config), "float32", jax.devices()[:size], quantization=format)
        wanted = program.wanted
        found.append(load(program.renamed(checkpoint), wanted, ignore=program.ignored_tensors, progress=False))
    at_load, restored = found
    for name, want in at_load.items():
        assert jax.tree.map(lambda a: a.sharding, restored[name]) == jax.tree.map(lambda a: a.sharding, want)
        for got, array in zip(jax.tree.leaves(restored[name]), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(jax.device_get(got), jax.device_get(array), err_msg=name)
    qkv, output = restored["layers.0.attention.qkv"], restored["layers.0.attention.output"]
    assert qkv.scale.sharding.shard_shape(qkv.scale.shape)[0] == qkv.values.sharding.shard_shape(qkv.shape)[0] == 1
    assert output.scale.sharding.is_fully_replicated and not output.values.sharding.is_fully_replicated
    made = dummy(wanted, 0)["layers.0.mlp.down"]
    assert made.values.sharding == wanted["layers.0.mlp.down"].sharding


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("cache", ["fp8", "int8"])
def test_weights_and_cache_of_8_bits_give_what_one_device_gives(size, cache):
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    prompts = np.load(GOLDEN / "llama" / "expected.npz")["tokens"].tolist()
    found = []
    for number in (1, size):
        modes = Modes(tensor_parallel_size=number, quantization="int8", kv_cache_dtype=cache, **ONE_BUCKET)
        outputs = serve(modes.engine(), [(prompt, params) for prompt in prompts])
        pairs = [zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True) for o in outputs]
        found.append(np.array([[entry[token].logprob for entry, token in pair] for pair in pairs]))
    # Sums in another order fall on the other side of a rounding to 8 bits here and there.
    errors = np.abs(found[0] - found[1])
    assert errors.mean() < 0.02 and np.median(errors) < 2e-3


def test_async_is_sync_bit_for_bit_on_several_devices(two):
    requests = random_requests(21, 30)
    want = serve(two.engine("sync"), requests)
    got = serve(two.engine("async", 3), requests, chance=random.Random(22))
    assert list(map(content, got)) == list(map(content, want))


def test_pages_of_several_devices_are_swapped_bit_for_bit():
    modes = Modes(tensor_parallel_size=2, swap_space_gib=0.01, preemption_mode="swap", **ONE_BUCKET)
    requests = long_requests(24, 8)
    want = serve(modes.engine("sync", enable_prefix_caching=False), requests)
    engine = modes.engine("async", 3, num_pages=17, enable_prefix_caching=False)
    assert list(map(content, serve(engine, requests))) == list(map(content, want))
    assert engine.metrics.preemptions_by_way["swap"] > 3


@pytest.mark.parametrize("size", [4, pytest.param(1, marks=pytest.mark.long), pytest.param(8, marks=pytest.mark.long)])
def test_an_orbax_folder_is_restored_to_any_number_of_devices(two, tmp_path, size):
    requests = [(prompt, SamplingParams(temperature=0, max_tokens=8)) for prompt, _ in random_requests(23, 3)]
    want = [output.outputs[0].token_ids for output in serve(two.engine(), requests)]
    weights = jax.tree_util.tree_leaves_with_path(two.runner.weights)
    params = {".".join(str(part.key) for part in path): weight for path, weight in weights}
    orbax_io.save(tmp_path / "copy", params, config=open_checkpoint(two.config.model).config)
    copy = Modes(model=str(tmp_path / "copy"), tensor_parallel_size=size, **ONE_BUCKET)
    assert [output.outputs[0].token_ids for output in serve(copy.engine(), requests)] == want
    assert copy.runner.weights["embed"]["weight"].sharding.num_devices == size


def test_two_replicas_of_two_devices_give_what_one_device_gives(tmp_path):
    """Greedy and seeded, with and without seeds of their own; each replica writes its own step log."""
    one = Modes(**ONE_BUCKET)
    prompts, params = zip(*random_requests(25, 24), strict=True)
    params = [dataclasses.replace(p, detokenize=False, stop=None, logprobs=None, prompt_logprobs=None) for p in params]
    want = serve(one.engine(), list(zip(prompts, params, strict=True)))
    options = {field.name: getattr(one.config, field.name) for field in dataclasses.fields(one.config)}
    options |= {"tensor_parallel_size": 2, "data_parallel_size": 2, "step_log": str(tmp_path / "steps.jsonl")}
    llm = LLM(**options)
    places = [engine._runner.weights["embed"]["weight"].sharding.device_set for engine in llm._engines]
    assert len(places[0] | places[1]) == 4 and [len(place) for place in places] == [2, 2]
    got = llm.generate(list(prompts), params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
    assert min(engine.metrics.tokens["generated"] for engine in llm._engines) > 0
    assert llm.metrics.tokens["generated"] == sum(len(c.token_ids) for o in got for c in o.outputs)
    assert llm.metrics.compiles_after_ready == 0
    assert {path.name for path in tmp_path.iterdir()} == {"steps.0.jsonl", "steps.1.jsonl"}


def on_devices(function, num_devices, *arrays):
    """function of one device's slice of each array, on each of so many devices; the results as [devices, ...]."""
    mesh, own = make_mesh(jax.devices()[:num_devices]), PartitionSpec(TENSOR)

    def one(*parts):
        return jax.tree.map(lambda result: result[None], function(*(part[0] for part in parts)))

    with jax.transfer_guard("allow"):
        run = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=own, out_specs=own, check_vma=False))
        return jax.tree.map(np.asarray, run(*arrays))


@pytest.mark.parametrize("name", ["llama-8b, one row", "odd rows", "float16", "float32"])
def test_sums_of_xla_are_those_of_the_reference(name):
    case = CASES[name]
    parts = np.random.default_rng(0).standard_normal((8, case.rows, case.width)).astype(case.dtype)
    got = on_devices(lambda part: all_reduce_op.all_reduce(part, TENSOR, None)[0], 8, parts)
    want = reference.all_reduce(parts)
    for device in range(8):
        np.testing.assert_array_equal(got[device], got[0])
    np.testing.assert_allclose(got[0].astype(np.float64), want, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("name", ["llama-8b, one row", "odd rows"])
def test_sums_with_norms_of_xla_are_those_of_the_reference(name):
    case, random = CASES[name], np.random.default_rng(0)
    parts = random.standard_normal((8, case.rows, case.width)).astype(case.dtype)
    x = random.standard_normal((case.rows, case.width)).astype(case.dtype)
    weight = random.uniform(-2, 2, case.width).astype(case.dtype)

    def run(part):
        return all_reduce_op.all_reduce_add_norm(x, part, weight, TENSOR, None, eps=1e-5, platform="cpu")[:2]

    total, norm = on_devices(run, 8, parts)
    wanted_total, wanted_norm = reference.all_reduce_add_norm(x, parts, weight, 1e-5)
    np.testing.assert_allclose(total[3].astype(np.float64), wanted_total, rtol=2**-6, atol=2**-5)
    np.testing.assert_allclose(norm[3].astype(np.float64), wanted_norm, rtol=2**-5, atol=2**-5)


def test_a_sum_may_be_left_to_the_next_norm(monkeypatch):
    """As it is where one kernel does both, which is nowhere here."""
    run_layers, left = decoder.run_layers, []
    monkeypatch.setattr(decoder, "run_layers", lambda *args, **options: run_layers(*args, **options | {"unroll": True}))
    monkeypatch.setattr(decoder, "leaves_parts", lambda x: left.append(x.shape) or True)
    check_golden(Modes(tensor_parallel_size=2, **ONE_BUCKET))
    assert left


def test_sums_of_a_layer_take_turns(monkeypatch):
    """Each takes the peers that the one before it returned, for the kernel's sums must not run at once."""

    def kernel(x, peers):
        return jax.lax.psum(x, TENSOR) + 1000 * peers[0, 0], peers + 1

    monkeypatch.setattr("pallas_kernels.all_reduce.gpu.all_reduce", kernel)
    monkeypatch.setattr("pallas_kernels.all_reduce.gpu.supports", lambda x: True)
    with jax.transfer_guard("allow"):
        table = nnx.Param(jnp.zeros((4, 2)), sizes=(8, 2), axes=("vocab", "embed"))
        down = nnx.Param(jnp.zeros((2, 4)), sizes=(2, 8), axes=("embed", "mlp"))

    def layer(part):
        with sums_take(jnp.full((4, 2), 5, jnp.int32)):
            first, second = take_rows(table, jnp.array([0])), complete(part, down)
            third = total(part, down)
        return first, second, third, complete(part, down)

    first, second, third, outside = on_devices(layer, 2, np.array([[[1.0, 2.0]], [[3.0, 4.0]]], np.float32))
    np.testing.assert_array_equal(first[0], [[5000, 5000]])
    np.testing.assert_array_equal(second[1], [[6004, 6006]])
    np.testing.assert_array_equal(third[1], [[7004, 7006]])
    np.testing.assert_array_equal(outside[1], [[4, 6]])


def test_sums_over_devices_are_measured_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # both add to it
    argv = ["all_reduce", "--devices=4", "--rows=1,3", "--width=16", "--count=3", "--repeats=2"]
    argv += ["--implementations=auto,xla", f"--out={tmp_path / 'sums.json'}"]
    assert all_reduce.main(argv) == 0
    document = json.loads((tmp_path / "sums.json").read_text())
    want = [(name, rows, rows / 32, 0) for name in ("auto", "xla") for rows in (1, 3)]
    assert [(s["implementation"], s["rows"], s["kib"], s["wrong_elements"]) for s in document["sums"]] == want
    assert document["devices"] == 4 and "COLLECTIVES" in document["xla_flags"]
    monkeypatch.setattr(all_reduce, "all_reduce", lambda x, axis, peers, implementation: (x, peers))
    assert all_reduce.main(argv) == 1


def test_single_steps_are_measured_on_several_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # both add to it
    monkeypatch.setitem(steps.NAMED_SHAPES, "tiny", open_checkpoint(GOLDEN / "llama").config)
    one, two = (steps.Stepper("tiny", 4, 8, num_devices=size) for size in (1, 2))
    assert 0.5 < two.floor_ms(4, 1e9) / one.floor_ms(4, 1e9) < 0.6, "norms only are read by both"
    layout, compiled, _ = two.compile(4)
    figures = two.run(layout, compiled, two.packed(layout, 4, "greedy"), 3)
    assert figures["step_ms"] > 0 and two.cache.last_tokens.sharding.device_set == set(jax.devices()[:2])
