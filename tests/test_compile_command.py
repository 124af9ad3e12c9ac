"""`jax-engine compile` over a made-up compiler. tests/test_tpu_compile.py has the real one."""

import json
from types import SimpleNamespace

import pytest

from jax_engine import EngineConfig, compile_target, targets
from jax_engine.buckets import Bucket
from jax_engine.compile_target import DoesNotFit, Fit, StepReport
from jax_engine.config import resolve
from jax_engine.models import read_config
from jax_engine.models.shapes import NAMED_SHAPES
from serving import cli
from serving.commands import compile as command

ARGUMENTS = ["compile", "--model=llama-3.1-8b", "--target=v6e:2x2"]
DEVICES = [SimpleNamespace(device_kind="TPU v6 lite", platform="tpu", process_index=0)] * 4


def step(bucket: Bucket, **changes) -> StepReport:
    fields = {"lower_seconds": 0.5, "compile_seconds": 2.0, "argument_bytes": 9 << 30, "alias_bytes": 8 << 30}
    fields |= {"temp_bytes": 3 << 20, "output_bytes": 0, "code_bytes": 0, "vmem_bytes": 1 << 20, "collectives": {}}
    return StepReport(**{"kind": "model", "bucket": bucket} | fields | changes)


@pytest.fixture
def compiler(monkeypatch):
    """What the compiler is to report; an exception among it is raised. Keeps the target it was asked to fit."""
    model = read_config(NAMED_SHAPES["llama-3.1-8b"])
    limits = resolve(EngineConfig(max_model_len=4096), model, platform="tpu", num_pages=1024)
    fit = Fit(limits, 4 << 30, 1 << 30, 8 << 20, 4096, 2000)
    made = SimpleNamespace(steps=[], target=None)

    def fake_fit(config, model, target):
        made.target = target
        return None, fit

    def fake_parts(program, limits):
        for found in made.steps:
            if isinstance(found, Exception):
                raise found
            yield found

    monkeypatch.setattr(command, "_prepare", lambda name: None)
    monkeypatch.setattr(targets, "open_target", lambda name: targets.Target(name, DEVICES, 32 << 30))
    monkeypatch.setattr(compile_target, "fit", fake_fit)
    monkeypatch.setattr(compile_target, "compile_parts", fake_parts)
    return made


def test_the_table_says_what_fits_and_what_each_step_takes(compiler, capsys):
    compiler.steps = [
        step(Bucket(64, 64, True), collectives={"all-reduce": 65}),
        step(Bucket(512, 64, False), alias_bytes=1),
        step(Bucket(0, 64, False), kind="sample"),
    ]
    assert cli.main(ARGUMENTS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "v6e:2x2: 4 x TPU v6 lite, 32.00 GiB each"
    assert lines[2] == "largest pool that fits: 2000 pages = 128000 tokens"
    decode, mixed, sampling = (line.split() for line in lines[-3:])
    assert decode == ["64", "decode", "0.5", "2.0", "9.00", "3", "yes", "1.0", "65", "all-reduce"]
    assert mixed[:2] == ["512", "mixed"] and "NO" in mixed
    assert sampling[:2] == ["sample", "64"] and "yes" not in sampling


def test_json_holds_the_same(compiler, capsys):
    compiler.steps = [step(Bucket(64, 64, True))]
    assert cli.main([*ARGUMENTS, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fit"]["pool_bytes"] == 8 << 30 and document["num_devices"] == 4
    assert document["steps"][0]["bucket"] == {"num_tokens": 64, "num_seqs": 64, "decode_only": True}


def test_a_step_that_the_compiler_refuses_ends_the_table_with_its_reason(compiler, capsys):
    compiler.steps = [step(Bucket(64, 64, True)), DoesNotFit("512 mixed: the compiler refuses it: too much VMEM")]
    assert cli.main(ARGUMENTS) == 1
    captured = capsys.readouterr()
    assert "64 decode" in captured.out and "512 mixed: the compiler refuses it: too much VMEM" in captured.err


@pytest.mark.parametrize(("flags", "devices"), [([], 4), (["--tensor_parallel_size=2"], 2)])
def test_the_model_lies_on_all_devices_or_on_so_many(compiler, flags, devices):
    assert cli.main([*ARGUMENTS, *flags]) == 0
    assert len(compiler.target.devices) == devices


def test_without_a_target_nothing_is_done(capsys):
    assert cli.main(["compile", "--model=llama-3.1-8b"]) == 2
    assert "--target is missing" in capsys.readouterr().err
