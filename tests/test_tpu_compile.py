"""The TPU kernels and steps through the real TPU compiler, for chips that are not here: needs libtpu (extra `tpu`).

What is proven: Mosaic takes the kernels, VMEM and HBM suffice, the pool is updated in place, the kernels issue no more
than they did, several chips exchange what they must and no more. No speed, no values; those are in
tests/test_ragged_paged_attention_tpu.py. `.ci/tpu` runs what takes minutes, `make tpu-check` all of it.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import pytest

from benchmarks.tpu_kernels import LAYERS, compile_op
from jax_engine import compile_target
from jax_engine.buckets import Bucket, buckets
from jax_engine.compilation import memory
from jax_engine.config import EngineConfig, Limits, resolve
from jax_engine.errors import ConfigError
from jax_engine.kept_programs import KeptPrograms
from jax_engine.model_config import ModelConfig
from jax_engine.models import read_config
from jax_engine.models.shapes import NAMED_SHAPES
from jax_engine.program import PROMPT_BLOCK, ModelProgram, Part
from jax_engine.targets import open_target
from pallas_kernels.ragged_paged_attention.cases import SHAPES
from pallas_kernels.ragged_paged_attention.tpu_tiles import tiles_for
from serving import cli

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install '.[tpu]'"
)

#: One chip of each generation, the oldest that is tested first.
CHIPS = ("v5e:1x1", "v6e:1x1", "v5p:1x1x1", "tpu7x:1x1x1")
ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "tpu_kernels.json"
LLAMA_8B, LLAMA_70B = (read_config(NAMED_SHAPES[f"llama-3.1-{size}"]) for size in ("8b", "70b"))
long = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def compiler_environment():
    """As `jax-engine compile` sets it."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def check_op(*args, **options):
    compiled = compile_op(*args, **options)
    assert compiled.alias_bytes == compiled.pool_bytes
    assert compiled.temp_bytes < compiled.pool_bytes / LAYERS


@pytest.mark.parametrize("chip", CHIPS)
def test_decode_compiles_in_place(chip):
    check_op(chip, SHAPES["llama-8b"], 256, 256, True)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_mixed_step_compiles_in_place(chip):
    check_op(chip, SHAPES["llama-8b"], 256, 32, False)


@long
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", ["smollm2-135m", "qwen3-0.6b", "mha", "mqa"])
def test_other_shapes_compile_in_place(chip, shape):
    check_op(chip, SHAPES[shape], 128, 32, False)


@long
@pytest.mark.parametrize("chip", CHIPS)
def test_every_option_compiles(chip):
    check_op(chip, SHAPES["llama-8b"], 128, 32, False, sliding_window=1024, logits_soft_cap=30.0, sinks=True)


@pytest.mark.parametrize("chip", [chip if chip == "v6e:1x1" else pytest.param(chip, marks=long) for chip in CHIPS])
@pytest.mark.parametrize("decode_only", [True, pytest.param(False, marks=long)], ids=["decode", "mixed"])
@pytest.mark.parametrize("pool_dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_a_pool_of_8_bits_compiles(chip, pool_dtype, decode_only):
    check_op(chip, SHAPES["llama-8b"], 64, 64, decode_only, pool_dtype=pool_dtype)


@long
def test_float32_compiles():
    check_op("v6e:1x1", SHAPES["llama-8b"], 128, 32, False, dtype=jnp.float32)


@pytest.mark.parametrize("chip", [chip if chip == "v6e:1x1" else pytest.param(chip, marks=long) for chip in CHIPS])
def test_kernels_issue_no_more_than_they_did(chip, tmp_path):
    """A fiftieth more bundles, or any spill more, than the record: make it better, or record it again and say why."""
    record = json.loads(RECORD.read_text())
    if version("libtpu") != record["compiler"]["libtpu"]:
        pytest.skip(f"recorded with libtpu {record['compiler']['libtpu']}, here is {version('libtpu')}")
    out = tmp_path / "now.json"
    command = [sys.executable, "-m", "benchmarks.tpu_kernels", f"--chips={chip}", f"--out={out}"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, timeout=600)
    recorded = {(entry["chip"], entry["step"], entry["kernel"]): entry for entry in record["kernels"]}
    for entry in json.loads(out.read_text())["kernels"]:
        before = recorded[entry["chip"], entry["step"], entry["kernel"]]
        assert entry["bundles"] <= 1.02 * before["bundles"], entry
        assert entry.get("issued_per_block", 0) <= 1.02 * before.get("issued_per_block", 0), entry
        assert entry["fills"] <= before["fills"] and entry["spills"] <= before["spills"], entry


def cut(model: ModelConfig, layers: int, vocab_size: int | None = None) -> ModelConfig:
    """The model with its first layers only: the compiler makes the others of the same programs."""
    changes = {"num_hidden_layers": layers, "layers": model.layers[:layers]}
    return dataclasses.replace(model, **changes, vocab_size=vocab_size or model.vocab_size)


def made(target: str, model: ModelConfig, num_devices: int = 1, **options) -> tuple[ModelProgram, Limits]:
    """The model on the first devices of a target, with a pool of some pages."""
    config = EngineConfig(load_format="dummy", max_model_len=4096, max_num_seqs=64, **options)
    limits = resolve(config, model, platform="tpu", num_pages=8192)
    form = {"quantization": None if config.quantization == "auto" else config.quantization}
    form["kv_cache_dtype"] = config.kv_cache_dtype
    return ModelProgram(model, "auto", open_target(target).devices[:num_devices], **form), limits


def check_step(program: ModelProgram, bucket: Bucket, limits: Limits) -> compile_target.StepReport:
    """The pool is updated in place, and what a step needs beside its arguments is less than one layer of it."""
    report = compile_target.compile_step(program, bucket, limits)
    pool = limits.num_pages * program.page_bytes(limits.page_size)
    assert pool <= report.alias_bytes < pool * 1.001
    assert report.temp_bytes < pool / program.model_config.num_hidden_layers
    check_vmem(program, bucket, limits, report)
    return report


def check_vmem(program: ModelProgram, bucket: Bucket, limits: Limits, report: compile_target.StepReport) -> None:
    """VMEM is what the attention kernel keeps, which is mostly its blocks of keys and values, and no more than it may
    take; not what XLA keeps beside it."""
    tiles, heads = tiles_for(program.device.kind), max(program.model_config.num_key_value_heads // program.mesh.size, 1)
    pages = min(tiles.block_kv // limits.page_size, limits.full_pages)
    blocks = tiles.buffers * pages * limits.page_size * 2 * heads * program.model_config.head_dim
    blocks *= program.kv_dtype.itemsize
    queries = 16 << 20 if not bucket.decode_only else 1 << 20
    assert blocks < report.vmem_bytes < min(blocks + queries, tiles.vmem_limit_bytes)


def test_a_step_that_was_kept_is_the_same_for_the_compiler(tmp_path):
    """Its Pallas kernels, and the pool updated in place; see kept_programs.py."""
    model, limits = made("v6e:1x1", cut(LLAMA_8B, 2, vocab_size=4096), decode_buckets=(64,), token_buckets=(256,))
    program = model.part(Part("model", Bucket(64, 64, True)), limits)
    KeptPrograms(tmp_path).lower(program)
    kept = KeptPrograms(tmp_path).lower(dataclasses.replace(program, function=None))
    want, got = (lowered.compile() for lowered in (program.lower(), kept))
    assert memory(got) == dataclasses.replace(memory(want), code=memory(got).code)
    kernels = [compiled.as_text().count('custom_call_target="tpu_custom_call"') for compiled in (want, got)]
    assert kernels[0] == kernels[1] > 0


#: What an 8B model is served on: a target, and how weights and cache are kept.
SERVED_8B = [
    ("v5e:1x1", {"quantization": "int8", "kv_cache_dtype": "int8"}),
    ("v6e:1x1", {}),
    ("tpu7x:1x1x1", {}),
]


@pytest.mark.parametrize(("target", "form"), [*SERVED_8B, pytest.param("v5p:1x1x1", {}, marks=long)])
def test_both_kinds_of_steps_of_an_8b_model_compile_in_place(target, form):
    """Two layers, for the others are of the same programs; few tokens, for the sampler takes most of a minute."""
    sizes = {"decode_buckets": (64,), "token_buckets": (256,)}
    program, limits = made(target, cut(LLAMA_8B, 2, vocab_size=4096), **form, **sizes)
    for bucket in buckets(limits):
        assert not check_step(program, bucket, limits).collectives


@long
@pytest.mark.parametrize(("target", "form"), SERVED_8B)
def test_every_step_of_an_8b_model_compiles_in_place(target, form):
    """As many at a time as there are cores: the compiler uses one for a program."""
    program, limits = made(target, cut(LLAMA_8B, 2), **form)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = [pool.submit(check_step, program, bucket, limits) for bucket in buckets(limits)]
    for check in checks:
        check.result()


#: A layer's two products that lead back to the residual stream, and the rows of the embedding; the logits' columns.
def exchanges(layers: int) -> dict[str, int]:
    return {"all-gather": 1, "all-reduce": 2 * layers + 1}


@pytest.mark.parametrize(
    ("target", "model"),
    [
        pytest.param("v6e:2x2", LLAMA_8B, id="8b-v6e"),
        pytest.param("v5e:2x4", LLAMA_8B, id="8b-v5e", marks=long),
        pytest.param("v6e:2x2", LLAMA_70B, id="70b-v6e", marks=long),
        pytest.param("v5e:2x4", LLAMA_70B, id="70b-v5e"),
    ],
)
@pytest.mark.parametrize("decode_only", [True, pytest.param(False, marks=long)], ids=["decode", "mixed"])
def test_several_chips_exchange_what_they_must(target, model, decode_only):
    """With a small vocabulary: the sampler is the same on every device, and takes most of a minute to compile."""
    model = cut(model, 2, vocab_size=4096)
    num_devices = len(open_target(target).devices)
    bucket = Bucket(64, 64, True) if decode_only else Bucket(256, 64, False)
    program, limits = made(target, model, num_devices, decode_buckets=(64,), token_buckets=(64, 256))
    assert check_step(program, bucket, limits).collectives == exchanges(layers=2)
    scoring, _ = compile_target.report(program, Part("score", Bucket(PROMPT_BLOCK, 0, False)), limits)
    assert scoring.collectives == {"all-gather": 1}
    pool = program.cache_shapes(limits).pool
    assert pool.sharding.shard_shape(pool.shape)[1] == model.num_key_value_heads // num_devices
    for name, want in program.wanted.items():
        if want.shape and len(want.shape) > 1:
            assert want.sharding.shard_shape(want.shape) != want.shape, f"{name} is whole on every device"


def test_the_command_compiles_every_step(capsys):
    golden = ROOT / "tests" / "golden" / "tiny" / "llama"
    flags = ["--decode_buckets=4", "--token_buckets=32", "--max_num_seqs=4", "--num_pages=64", "--max_model_len=256"]
    assert cli.main(["compile", f"--model={golden}", "--target=v6e:1x1", "--json", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    steps = [(step["kind"], step["bucket"]["num_tokens"]) for step in report["steps"]]
    assert steps == [
        ("model", 4),
        ("model", 32),
        ("likeliest", 0),
        ("sample", 0),
        ("pick", 4),
        ("pick", 32),
        ("score", 64),
    ]
    for step in report["steps"][:2]:
        assert step["alias_bytes"] >= report["fit"]["pool_bytes"] and 0 < step["vmem_bytes"] < 8 << 20
    assert report["fit"]["largest_pages"] > 64


def test_a_model_that_does_not_fit_is_refused_before_it_is_compiled(capsys):
    arguments = ["compile", "--model=llama-3.1-8b", "--load_format=dummy", "--target=v5e:1x1", "--max_model_len=4096"]
    assert cli.main(arguments) == 1
    assert "weights take 14.96 GiB" in capsys.readouterr().err


def test_a_step_that_does_not_fit_is_refused_with_the_compilers_reason():
    program, limits = made("v6e:1x1", cut(LLAMA_8B, 1, vocab_size=4096), decode_buckets=(8, 64), token_buckets=(64,))
    too_large = dataclasses.replace(limits, num_pages=1 << 20)
    with pytest.raises(compile_target.DoesNotFit, match=r"8 decode: the compiler refuses it: .*exceeds available HBM"):
        compile_target.compile_step(program, Bucket(8, 8, True), too_large)


def test_a_wrong_name_is_refused():
    with pytest.raises(ConfigError, match=r"'v9:1x1' cannot be compiled for.*v6e:1x1.*h100"):
        open_target("v9:1x1")


def test_the_compiler_states_what_memory_there_is():
    assert 15 < open_target("v5e:1x1").hbm_bytes / 2**30 < 16
    assert 31 < open_target("v6e:1x1").hbm_bytes / 2**30 < 32
