"""Steps of the 8B shape through the real compilers for an H100 that is not here: needs the CUDA plugin (extra `gpu`).

What is proven: ptxas spills nothing in the attention kernels, the pool is updated in place, a step needs less memory
beside its arguments than one layer of the pool. No speed, no values. Two layers stand for all: they are compiled alike.
"""

import dataclasses
import importlib.util
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_engine import peer_memory
from jax_engine.batch import Bucket
from jax_engine.compilation import memory
from jax_engine.compile_target import compile_step
from jax_engine.config import EngineConfig, Limits, resolve
from jax_engine.kept_programs import KeptPrograms
from jax_engine.models import read_config
from jax_engine.models.shapes import NAMED_SHAPES
from jax_engine.program import ModelProgram, Part
from jax_engine.targets import open_target
from pallas_kernels.ragged_paged_attention import Device, Ragged, plan, pool_shape, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.gpu_tiles import HOPPER

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="needs the CUDA compilers: pip install '.[gpu]'",
)

LAYERS, PAGES = 2, 4096


def _step_program(target: str = "h100", **options: Any) -> tuple[ModelProgram, Limits]:
    """Steps of the 8B shape's first layers, on such H100s."""
    whole = read_config(NAMED_SHAPES["llama-3.1-8b"])
    model = dataclasses.replace(whole, num_hidden_layers=LAYERS, layers=whole.layers[:LAYERS])
    limits = resolve(EngineConfig(), model, platform="gpu", num_pages=PAGES)
    return ModelProgram(model, "bfloat16", open_target(target).devices, **options), limits


@pytest.mark.parametrize(
    ("bucket", "kv_cache_dtype"),
    [
        pytest.param(Bucket(1, 1, True), "auto", marks=pytest.mark.long),
        (Bucket(32, 32, True), "auto"),
        (Bucket(32, 32, True), "fp8"),
        pytest.param(Bucket(32, 32, True), "int8", marks=pytest.mark.long),
        pytest.param(Bucket(256, 256, True), "auto", marks=pytest.mark.long),
        pytest.param(Bucket(256, 256, True), "fp8", marks=pytest.mark.long),
        pytest.param(Bucket(512, 256, False), "auto", marks=pytest.mark.long),
        pytest.param(Bucket(8192, 256, False), "auto", marks=pytest.mark.long),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.num_tokens}x{value.num_seqs}",
)
def test_a_step_compiles_in_place_and_without_spills(bucket, kv_cache_dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    program, limits = _step_program(kv_cache_dtype=kv_cache_dtype)
    assert program.device.platform == "gpu"
    lowered = program.lower(bucket, limits)[1]
    memory = lowered.compile(compiler_options=program.compiler_options(bucket)).memory_analysis()
    pool = program.cache_shapes(limits).pool
    pool_bytes = math.prod(pool.shape) * pool.dtype.itemsize
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / LAYERS
    reports = [file.read_text() for file in tmp_path.glob("*.ptxas")]
    assert reports
    if any("'setmaxnreg' ignored" in report for report in reports):
        pytest.skip("nvJitLink, which jax 0.12 takes where it is installed, gives all warpgroups as many registers")
    assert all("0 bytes spill stores, 0 bytes spill loads" in report for report in reports)


@pytest.mark.parametrize(("rows", "taken"), [(16, True), (8, False)])
def test_layers_behind_attention_are_one_kernel_where_that_is_faster(rows, taken):
    program, limits = _step_program()
    lowered = program.lower(Bucket(rows, rows, True), limits)[1]
    assert ("block_tail" in lowered.as_text()) == taken


def test_a_step_that_was_kept_is_the_same_for_the_compiler(tmp_path):
    """Its Pallas kernels, and the pool updated in place; see kept_programs.py."""
    whole, limits = _step_program()
    program = whole.part(Part("model", Bucket(512, 256, False)), limits)
    KeptPrograms(tmp_path).lower(program)
    kept = KeptPrograms(tmp_path).lower(dataclasses.replace(program, function=None))
    want, got = (lowered.compile(compiler_options=program.options) for lowered in (program.lower(), kept))
    assert memory(got) == dataclasses.replace(memory(want), code=memory(got).code)
    kernels = [compiled.as_text().count('custom_call_target="mosaic_gpu') for compiled in (want, got)]
    assert kernels[0] == kernels[1] > 0


def test_the_model_of_a_decode_step_is_one_graph_without_conditions(tmp_path):
    program, limits = _step_program()
    bucket = Bucket(32, 32, True)
    options = {**(program.compiler_options(bucket) or {}), "xla_dump_to": str(tmp_path)}
    program.lower(bucket, limits)[1].compile(compiler_options=options)
    [dumped] = tmp_path.glob("*.thunk_sequence_after_thunk_passes.txt")
    first, *others = dumped.read_text().splitlines()
    assert "kCommandBuffer" in first
    assert all(line.startswith(" ") for line in others if line), "something is launched beside the graph"
    assert not any("kConditional" in line or "kWhile" in line for line in others)


@pytest.mark.parametrize(("devices", "bucket"), [(2, Bucket(32, 32, True)), (8, Bucket(1, 1, True))])
def test_sums_over_gpus_are_nodes_of_the_graph_of_a_decode_step(devices, bucket, tmp_path, monkeypatch):
    """Two a layer, with residual sum and norm, and the embedding's: kernels of our own, which spill nothing."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setattr(peer_memory, "MOST_DEVICES", devices)
    launches, lowered = launched(devices, bucket, tmp_path)
    assert "all_reduce_mosaic" in lowered and "all_reduce_add_norm_mosaic" in lowered
    kinds = [kind for _, kind in launches]
    assert not {"kCollectiveKernel", "kAllReduce"} & set(kinds) and kinds.count("kCommandBuffer") == 1
    calls = [in_graph for in_graph, kind in launches if kind == "kCustomCall"]
    assert all(calls) and len(calls) > 2 * LAYERS + 1
    reports = [file.read_text() for file in tmp_path.glob("all_reduce*.ptxas")]
    assert reports and all("0 bytes spill stores, 0 bytes spill loads" in report for report in reports)


def test_a_report_of_a_step_counts_its_sums():
    program, limits = _step_program("h100:2")
    report = compile_step(program, Bucket(32, 32, True), limits)
    assert report.collectives == {"all-gather": 1, "all-reduce": 2 * LAYERS + 1}


def test_sums_of_a_step_with_prompts_are_left_to_xla(tmp_path):
    launches, lowered = launched(2, Bucket(512, 256, False), tmp_path)
    assert "all_reduce_mosaic" not in lowered and "all_reduce_add_norm" not in lowered
    sums = [kind for _, kind in launches if kind in ("kCollectiveKernel", "kAllReduce")]
    assert len(sums) >= 2 * LAYERS + 1


def test_sums_over_more_gpus_than_the_kernel_has_run_on_are_left_to_xla(tmp_path):
    launches, lowered = launched(4, Bucket(1, 1, True), tmp_path)
    assert "all_reduce_mosaic" not in lowered and "all_reduce_add_norm" not in lowered
    assert sum(kind in ("kCollectiveKernel", "kAllReduce") for _, kind in launches) >= 2 * LAYERS + 1


def launched(num_devices, bucket, folder):
    """What is launched for a step on so many H100s: whether in a graph, and its kind; and the lowered program."""
    program, limits = _step_program(f"h100:{num_devices}")
    options = {**(program.compiler_options(bucket) or {}), "xla_dump_to": str(folder)}
    lowered = program.lower(bucket, limits)[1]
    lowered.compile(compiler_options=options)
    [dumped] = folder.glob("*.thunk_sequence_after_thunk_passes.txt")
    found = re.findall(r"^( *)\d+: (k\w+)", dumped.read_text(), re.MULTILINE)
    return [(bool(indent), kind) for indent, kind in found], lowered.as_text()


@pytest.mark.parametrize(
    ("format", "rows"), [pytest.param("int8", 32, marks=pytest.mark.long), ("fp8", 32), ("fp8", 128)]
)
def test_products_take_weights_of_8_bits_as_they_are(format, rows):
    """No whole weight is converted on the way: converted inside the products, or multiplied with fp8 as it is."""
    device = open_target("h100").devices[0]
    model = dataclasses.replace(read_config(NAMED_SHAPES["llama-3.1-8b"]), num_hidden_layers=1, vocab_size=4096)
    limits = resolve(EngineConfig(), model, platform="gpu", num_pages=PAGES)
    program = ModelProgram(model, "bfloat16", [device], quantization=format)
    bucket = Bucket(rows, rows, True)
    compiled = program.lower(bucket, limits)[1].compile(program.compiler_options(bucket))
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    # Bytes of attention's output product in bfloat16. At more rows the feed-forward's own numbers take as many.
    smallest = 2 * 4096 * 4096
    assert memory.temp_size_in_bytes < smallest
    found = text.count('custom_call_target="__cublas$lt$matmul$f8"')
    assert found >= 5 if rows == 128 else found == 0


@pytest.mark.parametrize("rows", [1, 32, 256])
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_attention_of_decodes_is_one_kernel(rows, sinks):
    """Though rows may be cut: no call needs another kernel, before or after it, that the first one does not."""
    pages, page_size = 4096, 64
    place = jax.sharding.SingleDeviceSharding(open_target("h100").devices[0])

    def array(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    q = array((rows, 32, 128), jnp.bfloat16)
    pool = array(pool_shape(1, pages, page_size, 8, 128, device=Device("gpu")), jnp.bfloat16)
    ragged = Ragged(array((rows, 128)), array((rows,)), array((rows + 1,)), array(()))
    by_head = array((32,), jnp.bfloat16) if sinks else None

    def kernels(calls: int) -> int:
        def attend(q, pool, ragged, sinks):
            sizes = {"num_tokens": rows, "num_pages": pages, "page_size": page_size}
            shared = plan(ragged, decode_only=True, device=Device("gpu"), **sizes)
            for _ in range(calls):
                q = ragged_paged_attention(q, pool, shared, jnp.int32(0), scale=0.125, sinks=sinks)
            return q

        text = jax.jit(attend).lower(q, pool, ragged, by_head).compile().as_text()
        assert text is not None
        return len(re.findall(r"^ .* (?:fusion|custom-call|copy|while|conditional)\(", text.split("\nENTRY ")[1], re.M))

    assert kernels(3) == kernels(1) + 2


def _compiled_attention(tokens: int, head_dim: int = 128, pool_dtype=jnp.bfloat16):
    """A mixed step's attention by itself, of so many tokens and of short rows, so many that none is cut and merged."""
    rows, pages, page_size = HOPPER.split_rows, 64, 64
    place = jax.sharding.SingleDeviceSharding(open_target("h100").devices[0])

    def array(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def attend(q, pool, ragged):
        shared = plan(ragged, num_tokens=tokens, num_pages=pages, page_size=page_size, device=Device("gpu"))
        return ragged_paged_attention(q, pool, shared, jnp.int32(0), scale=0.125)

    q = array((tokens, 8, head_dim), jnp.bfloat16)
    pool = array(pool_shape(1, pages, page_size, 4, head_dim, device=Device("gpu")), pool_dtype)
    ragged = Ragged(array((rows, 16)), array((rows,)), array((rows + 1,)), array(()))
    return jax.jit(attend).lower(q, pool, ragged).compile()


@pytest.mark.parametrize(
    ("head_dim", "pool_dtype", "spilled"),
    [
        (128, jnp.float8_e4m3fn, 0),
        pytest.param(128, jnp.int8, 0, marks=pytest.mark.long),
        pytest.param(96, jnp.float8_e4m3fn, 0, marks=pytest.mark.long),
        pytest.param(64, jnp.int8, 0, marks=pytest.mark.long),
        (256, jnp.bfloat16, 4),
        pytest.param(256, jnp.float8_e4m3fn, 4, marks=pytest.mark.long),
    ],
)
def test_attention_of_prompts_fits_registers_and_shared_memory(head_dim, pool_dtype, spilled, tmp_path, monkeypatch):
    """Bytes that ptxas spills, at most: for heads of 256 the address of a barrier."""
    if head_dim > HOPPER.max_head_dim:
        pytest.skip("with this jax heads of 256 go through XLA")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    _compiled_attention(512, head_dim, pool_dtype)
    [report] = [file.read_text() for file in tmp_path.glob("attention_prefill*.ptxas")]
    if "'setmaxnreg' ignored" in report:
        pytest.skip("nvJitLink, which jax 0.12 takes where it is installed, gives all warpgroups as many registers")
    stored = re.findall(r"(\d+) bytes spill stores", report)
    assert stored and max(map(int, stored)) <= spilled


def test_results_of_prompts_stay_where_their_kernel_wrote_them():
    """What comes behind it writes the decodes' tokens among them, in place, and makes no pass over all tokens."""
    text = _compiled_attention(1024).as_text()
    entry = text[text.index("\nENTRY") :]
    of_all_tokens = re.findall(r"%(\S+) = bf16\[1024,8,128\]\S* (custom-call|fusion|copy)\(", entry)
    assert [kind for _, kind in of_all_tokens] == ["custom-call", "fusion"]
    assert "scatter" in of_all_tokens[1][0]


def test_scores_are_rounded_alike_with_a_mask_and_without(tmp_path, monkeypatch):
    """The product and the difference in front of every exp2 of a score are one instruction, in every tile: where they
    were two in the tiles that have a mask, a token's bits depended on where its block of queries began."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    _compiled_attention(256)
    found = {file.name: file.read_text() for file in tmp_path.glob("attention_*.ptx")}
    assert len(found) == 2
    for name, text in found.items():
        made_by = {to: operation for operation, to in re.findall(r"\b([a-z]+)[.a-z0-9]*\s+(%r\d+),", text)}
        sources = [made_by[register] for register in re.findall(r"ex2\.approx\S*\s+%r\d+, (%r\d+);", text)]
        assert sources.count("fma") >= 32 and "sub" not in sources, (name, sources)
