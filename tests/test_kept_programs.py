"""Lowered programs that are kept between starts: they are those that tracing gives, and nothing else is ever taken."""

import dataclasses
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.formats import open_checkpoint
from checkpoints.loader import dummy
from jax_engine import kept_programs
from jax_engine.batch import BatchLayout, no_adjustments
from jax_engine.buckets import Bucket
from jax_engine.compilation import Program, memory
from jax_engine.config import EngineConfig, Limits, resolve
from jax_engine.constraints import unconstrained
from jax_engine.kept_programs import KeptPrograms, program_key
from jax_engine.model_runner import _cpu_pool_bytes
from jax_engine.models import read_config
from jax_engine.program import PROMPT_BLOCK, ModelProgram, Part, nested

TINY = Path(__file__).parent / "golden/tiny"
OPTIONS = EngineConfig(max_model_len=64, max_num_seqs=4, num_pages=20, token_buckets=(16,), decode_buckets=(4,))
#: One of each: plain layers, groups of them, recurrent ones, latent keys.
SOME = ("llama", "gpt_oss", "qwen3_next", "deepseek_v3")


def made(architecture: str = "llama", **options) -> tuple[ModelProgram, Limits]:
    model = read_config(open_checkpoint(str(TINY / architecture)).config)
    limits = resolve(OPTIONS, model, platform="cpu", num_pages=20)
    return ModelProgram(model.served(64), "float32", jax.devices()[:1], **options), limits


def unlike(program: Program) -> Program:
    """What must not be traced."""

    def fail(*_):
        raise AssertionError("it was traced")

    return dataclasses.replace(program, function=fail)


def small(function=jnp.sin, **changes) -> Program:
    """A program that is quick to make."""
    program, limits = made()
    pick = program.part(Part("pick", Bucket(16, 0, False)), limits)
    array = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=program.replicated)
    return dataclasses.replace(pick, **{"function": function, "arguments": (array,), **changes})


def is_traced(kept: KeptPrograms, program: Program) -> bool:
    """Whether it is, when it is asked for."""
    try:
        kept.lower(unlike(program))
    except AssertionError:
        return True
    return False


def the_file(folder: Path) -> Path:
    [path] = folder.iterdir()
    return path


@pytest.mark.parametrize(
    "architecture",
    [
        name if name in SOME else pytest.param(name, marks=pytest.mark.long)
        for name in sorted(path.name for path in TINY.iterdir())
    ],
)
def test_no_program_of_a_model_is_traced_twice(tmp_path, architecture):
    program, limits = made(architecture)
    parts = program.parts(limits)
    assert {part.kind for part in parts} == {"model", "likeliest", "sample", "pick", "score"}
    first = {part: KeptPrograms(tmp_path).lower(made) for part, made in parts.items()}
    for part, lowered in first.items():
        again = KeptPrograms(tmp_path).lower(unlike(parts[part]))
        assert again.as_text() == lowered.as_text(), "jax's cache would not find it"
        assert again.out_tree == lowered.out_tree


@pytest.mark.parametrize("form", [{}, {"quantization": "int8"}, {"kv_cache_dtype": "int8"}])
def test_a_kept_step_gives_the_same_bits_in_the_same_place(tmp_path, form):
    program, limits = made(**form)
    bucket = Bucket(16, 4, False)
    layout = BatchLayout.of(bucket, limits)
    weights = nested(dummy(program.wanted, 3))
    packed = np.zeros(layout.size, np.int32)
    parts = layout.unpack(packed)
    parts["token_ids"][:] = np.arange(16)
    parts["query_starts"][1:] = 5, 12, 16, 16
    parts["slots"][:] = 0, 1, 2, 4
    parts["stop_ids"][:] = -1
    parts["page_table"][:3, 0] = 3, 1, 2

    def run(lower) -> tuple:
        model, sample = (
            lower(program.part(Part(kind, size), limits)).compile()
            for kind, size in (("model", bucket), ("sample", Bucket(0, 4, False)))
        )
        cache = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), program.cache_shapes(limits))
        if cache.kv_scales is not None:
            cache = dataclasses.replace(cache, kv_scales=jnp.full_like(cache.kv_scales, 0.01))
        cache, output = model(weights, cache, jax.device_put(packed, program.replicated))
        changes = jax.device_put((no_adjustments(4), unconstrained(4, program.model_config.vocab_size)))
        sampled = sample(cache.last_tokens, output.rows, output.logits, cache.token_ids, *changes)
        return memory(model).aliased, cache.pool, output, sampled

    want = run(Program.lower)
    assert want[0] >= limits.num_pages * program.page_bytes(limits.page_size)
    kept = KeptPrograms(tmp_path)
    for _ in range(2):
        got = run(kept.lower)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(one, other)


def test_arguments_that_a_program_does_not_use_are_not_handed_to_it(tmp_path):
    """Scoring takes all weights, and uses those that logits are made with."""
    program, limits = made()
    score = program.part(Part("score", Bucket(PROMPT_BLOCK, 0, False)), limits)
    want = memory(score.lower().compile()).arguments
    assert memory(KeptPrograms(tmp_path).lower(score).compile()).arguments == want


CHANGES = {
    "made of": lambda: small(made_of="something else"),
    "precision": lambda: small(precision="default"),
    "donation": lambda: small(donate=0),
    "shape": lambda: small(arguments=(jax.ShapeDtypeStruct((5,), jnp.float32, sharding=made()[0].replicated),)),
    "type": lambda: small(arguments=(jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=made()[0].replicated),)),
    "tree": lambda: small(arguments=({"x": small().arguments[0]},)),
    "name": lambda: small(name="other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_program_has_another_key(change):
    assert program_key(small()) == program_key(small())
    assert program_key(CHANGES[change]()) != program_key(small())


def test_what_a_model_was_made_with_is_in_the_key():
    def key(architecture: str = "llama", kind: str = "model", tokens: int = 16, changes=(), **options) -> str:
        program, limits = made(architecture, **options)
        part = Part(kind, Bucket(tokens, 4, False))
        return program_key(program.part(part, dataclasses.replace(limits, **dict(changes))))

    keys = [
        key(),
        key("qwen2"),
        key("mistral"),
        key(changes={"num_pages": 21}),
        key(changes={"page_size": 8, "num_pages": 40}),
        key(changes={"decode_buckets": ()}),  # one way for all
        key(kind="sample"),
        key(tokens=8),
        key(quantization="int8"),
        key(quantization="fp8"),
        key(kv_cache_dtype="fp8"),
    ]
    assert len(set(keys)) == len(keys)


def test_what_the_process_has_is_in_the_key(monkeypatch):
    before = program_key(small())
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_fast_math=false")
    flags = program_key(small())
    monkeypatch.setattr(kept_programs, "_versions", lambda: ["jax 99"])
    versions = program_key(small())
    monkeypatch.setattr(kept_programs, "_sources", lambda: "edited")
    sources = program_key(small())
    with jax.numpy_dtype_promotion("strict"):
        options = program_key(small())
    assert len({before, flags, versions, sources, options}) == 5


def test_an_edited_source_is_another(tmp_path, monkeypatch):
    """Also one that only moved code from one file to another."""
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    monkeypatch.setattr(kept_programs, "_source_files", lambda: files)

    def digest(*texts: str) -> str:
        for path, text in zip(files, texts, strict=True):
            path.write_text(text)
        kept_programs._sources.cache_clear()
        return kept_programs._sources()

    try:
        assert len({digest("xy", "z"), digest("x", "yz"), digest("xy", "z ")}) == 3
    finally:
        kept_programs._sources.cache_clear()


def test_the_sources_are_those_of_the_packages_that_programs_are_made_by():
    names = {"/".join(path.parts[-2:]) for path in kept_programs._source_files()}
    assert {"jax_engine/step.py", "layers/linear.py", "ragged_paged_attention/xla.py"} <= names


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-1], lambda data: b"", lambda data: bytes(len(data))])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    kept = KeptPrograms(tmp_path)
    kept.lower(small())
    path = the_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert is_traced(kept, small())
    kept.lower(small())
    assert the_file(tmp_path) == path
    assert not is_traced(kept, small())


def test_the_file_of_another_program_is_not_taken(tmp_path):
    kept = KeptPrograms(tmp_path)
    kept.lower(small())
    the_file(tmp_path).rename(kept._path(program_key(small(made_of="other"))))
    assert is_traced(kept, small(made_of="other"))


def test_without_a_folder_to_write_to_programs_are_lowered_all_the_same_and_it_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    kept = KeptPrograms(tmp_path / "file")
    for made_of in ("one", "other"):
        assert kept.lower(small(made_of=made_of)).compile()(jnp.ones(4)).shape == (4,)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "cannot keep lowered programs, which are made again at the next start"
    ]
    assert (tmp_path / "file").read_text() == "not a folder"


def test_what_jax_cannot_export_is_lowered_as_it_is(tmp_path):
    def asks_the_host(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    lowered = KeptPrograms(tmp_path).lower(small(asks_the_host))
    np.testing.assert_allclose(lowered.compile()(jnp.ones(4)), np.sin(np.ones(4)), rtol=1e-6)
    assert not list(tmp_path.iterdir())


def test_the_files_that_were_of_no_use_for_longest_are_removed(tmp_path, monkeypatch):
    (tmp_path / "jit_step-cache").write_bytes(b"of jax's cache")
    (tmp_path / "gone.stablehlo.7-7").write_bytes(bytes(10_000))  # of a process that was killed while it wrote
    os.utime(tmp_path / "gone.stablehlo.7-7", (0, 0))
    kept = KeptPrograms(tmp_path)
    programs = [small(made_of=str(number)) for number in range(4)]
    paths = [kept._path(program_key(program)) for program in programs]
    for age, (program, path) in enumerate(zip(programs[:3], paths, strict=False)):
        kept.lower(program)
        os.utime(path, (age + 1, age + 1))
    kept.lower(programs[0])  # of use again
    size = paths[0].stat().st_size
    monkeypatch.setattr(kept_programs, "MAX_BYTES", 3 * size + size // 2)
    kept.lower(programs[3])
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "jit_step-cache", paths[0], paths[2], paths[3]])


def test_programs_are_named_in_traces_as_their_functions(tmp_path):
    program, limits = made()
    lower = partial(KeptPrograms(tmp_path).lower, program.part(Part("likeliest", Bucket(0, 4, False)), limits))
    for lowered in (lower(), lower()):
        assert "@jit_choose_likeliest" in lowered.as_text()


def test_free_memory_of_a_cpu_seldom_changes_the_pool_and_so_the_programs(monkeypatch):
    def pool(available: int) -> int:
        monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": available >> 12, "SC_PAGE_SIZE": 4096}.get)
        return _cpu_pool_bytes()

    gib = 1 << 30
    assert pool(9 * gib) == pool(15 * gib) == 2 * gib
    assert pool(300 * gib) == 4 * gib
