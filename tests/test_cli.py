"""The jax-engine command: flags from dataclasses, one line for every failure, and the commands on a fake engine."""

import asyncio
import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from absl import flags as absl_flags

import jax_engine
from jax_engine import EngineConfig, SamplingParams
from jax_engine.testing.fake_engine import FakeAsyncEngine, echo
from serving import flags
from serving.cli import COMMANDS, main
from serving.commands import common
from serving.commands.chat import Conversation
from serving.server import ServerOptions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def engines(monkeypatch):
    """AsyncEngine is a fake one; holds those that were made."""
    made = []

    def make(config):
        made.append(FakeAsyncEngine(config))
        return made[-1]

    monkeypatch.setitem(vars(jax_engine), "AsyncEngine", make)
    return made


def config_of(*argv):
    flag_values = common.engine_flags(log_level="error")
    assert common.parse(flag_values, "serve", "", argv)
    return common.engine_config(flag_values)


def test_every_engine_field_is_a_flag_with_its_default_and_help():
    flag_values = common.engine_flags(log_level="error")
    for field in dataclasses.fields(EngineConfig):
        assert flag_values[field.name].default == field.default
        assert flag_values[field.name].help == field.metadata["help"]


def test_every_sampling_field_is_a_flag_or_left_out_on_purpose():
    flag_values = absl_flags.FlagValues()
    flags.define_sampling(flag_values)
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(flag_values) == fields - set(flags.NOT_SAMPLING_FLAGS)


def test_every_server_option_is_a_flag():
    flag_values = absl_flags.FlagValues()
    flags.define(flag_values, ServerOptions, group="Server")
    assert flag_values["served_model_name"].default == () and flag_values["port"].default == 8000
    flags.parse(flag_values, "serve", ["--served-model-name=a,b/c", "--port", "9"])
    assert flags.values(flag_values, ServerOptions) == {"served_model_name": ("a", "b/c"), "port": 9}


def test_flags_become_the_configuration():
    assert config_of() == EngineConfig()
    assert config_of("some/model", "--max-model-len=64") == EngineConfig(model="some/model", max_model_len=64)
    assert config_of("--max_model_len", "64", "--decode-buckets=", "--token_buckets=8,16") == EngineConfig(
        max_model_len=64, decode_buckets=(), token_buckets=(8, 16)
    )
    assert not config_of("--no-enable-prefix-caching").enable_prefix_caching
    assert not config_of("--noenable_prefix_caching").enable_prefix_caching
    assert config_of("--max-model-len=none", "--gpu-memory-utilization=0.5").max_model_len is None


@pytest.mark.parametrize("spelt", ["noenable_prefix_caching", "no_enable_prefix_caching", "no-enable-prefix-caching"])
def test_a_flag_is_switched_off_in_every_spelling(spelt):
    assert config_of(f"--{spelt}") == EngineConfig(enable_prefix_caching=False)


def test_defaults_are_listed_as_a_command_line_gives_them(capsys):
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--slo_classes [default:1000:100]\n" in out and "--prompt\n" in out and "--workload [cpu8]\n" in out
    assert "--[no]page [true]\n" in out and "--[no]deterministic [false]\n" in out and "--port [8000]\n" in out


def test_sampling_flags_become_parameters():
    flag_values = absl_flags.FlagValues()
    flags.define_sampling(flag_values)
    flags.parse(
        flag_values, "generate", ["--stop=a,b", "--stop", "--c-d", "--noignore-eos", "--top-k=3", "--max-tokens=none"]
    )
    assert SamplingParams(**flags.values(flag_values, SamplingParams)) == SamplingParams(
        stop=["a,b", "--c-d"], top_k=3, max_tokens=None
    )


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["sevre"], "jax-engine: unknown command 'sevre'; did you mean serve?"),
        (["xyzzy"], f"jax-engine: unknown command 'xyzzy'; known: {', '.join(COMMANDS)}"),
        (
            ["serve", "--max-modle-len=4"],
            "jax-engine: unknown flag --max-modle-len (see `jax-engine serve --help`); did you mean --max_model_len?",
        ),
        (["bench", "--enforce-eager"], "jax-engine: unknown flag --enforce-eager (see `jax-engine bench --help`)"),
        (
            ["serve", "--prot", "80"],
            "jax-engine: unknown flag --prot (see `jax-engine serve --help`); did you mean --port?",
        ),
        (
            ["serve", "--no-port"],
            "jax-engine: unknown flag --noport (see `jax-engine serve --help`); did you mean --port?",
        ),
        (["serve", "--port=x"], "jax-engine: flag --port=x: 'x' is not a whole number"),
        (["serve", "--token_buckets=8,x"], "jax-engine: flag --token_buckets=8,x: 'x' is not a whole number"),
        (["serve", "--drain_timeout_s=soon"], "jax-engine: flag --drain_timeout_s=soon: 'soon' is not a number"),
        (["serve", "a", "b"], "jax-engine: one model is expected, got 'a b' beside the flags"),
        (
            ["generate", "a", "b"],
            "jax-engine: one model is expected, got 'a b' beside the flags; a text to continue is given with --prompt",
        ),
        (["generate"], "jax-engine: nothing to continue: give --prompt or --prompt_file"),
        (["chat", "--n=2"], "jax-engine: a conversation has one answer per turn: --n must be 1"),
    ],
)
def test_wrong_command_lines(argv, line, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        (["serve", "--page-size=3"], "jax-engine: page_size must be a power of two"),
        (["serve", "--port=70000"], "jax-engine: port must be in [0, 65535], got 70000"),
        (["serve", "--max-body-mib=0"], "jax-engine: max_body_mib must be"),
        (["serve", "--drain-timeout-s=-1"], "jax-engine: drain_timeout_s must be"),
        (["serve", "--api-key-file=/no/such/file"], "jax-engine: api_key_file cannot be read"),
        (["serve", "--trace-file=/no/such/trace"], "jax-engine: trace_file '/no/such/trace' cannot be written"),
        (["serve", "--port=0", "--max-model-len=1000000"], "jax-engine: max_model_len 1000000 is more than"),
        (["generate", "--prompt=x", "--temperature=-1"], "jax-engine: temperature must be in"),
        (["generate", "--prompt=x", "--max-model-len=2"], "jax-engine: the prompt has 2 tokens"),
    ],
)
def test_expected_failures_are_one_line(argv, start, capsys, engines):
    assert main(argv) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if " INFO " not in line]
    assert len(errors) == 1 and errors[0].startswith(start)


def test_checkpoint_errors_are_one_line(monkeypatch, capsys):
    def refuse(config):
        raise jax_engine.CheckpointError("no such model")

    monkeypatch.setitem(vars(jax_engine), "AsyncEngine", refuse)
    assert main(["generate", "--prompt=x"]) == 1
    assert capsys.readouterr().err == "jax-engine: no such model\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jax-engine {metadata.version('jax-engine')}\n"


def test_help_is_quick_and_needs_no_jax():
    program = (
        "import sys; from serving.cli import main; code = [main(a) for a in (['--help'], ['serve', '--help'], "
        "['generate', '-h'], ['chat', '--help'])]; heavy = {'jax', 'jaxlib', 'flax', 'tokenizers'} & set(sys.modules); "
        "assert not heavy, heavy; assert code == [0, 0, 0, 0]"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=20,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    for text in (*COMMANDS.values(), "--max_model_len", "--drain_timeout_s [30.0]", "--temperature [1.0]", "--system"):
        assert text in done.stdout


def test_generate_streams_text(engines, capsys):
    assert main(["generate", "--prompt", "hi", "--max-tokens=4"]) == 0
    assert capsys.readouterr().out == "abcd\n"
    assert not engines[0].is_alive


def test_generate_from_file_as_json(engines, capsys, tmp_path):
    (tmp_path / "prompt").write_text("from a file")
    argv = ["generate", "--prompt=one", f"--prompt_file={tmp_path / 'prompt'}", "--json", "--n=2", "--max_tokens=2"]
    assert main([*argv, "--logprobs=1"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("one", "from a file")
    assert [output["text"] for output in first["outputs"]] == ["ab", "bc"]
    assert first["outputs"][0]["logprobs"][0]["97"]["logprob"] == -0.5
    assert main(["generate", "--prompt=x", "--prompt_file=/no/such/file"]) == 2


def test_generate_several(engines, capsys):
    assert main(["generate", "--prompt=one", "--prompt=two", "--max_tokens=2"]) == 0
    assert capsys.readouterr().out == "--- 'one', completion 0 (length)\nab\n--- 'two', completion 0 (length)\nab\n"


def test_start_shows_flags_that_differ(engines, caplog):
    caplog.set_level(logging.INFO)
    assert main(["generate", "m", "--prompt=x", "--token-buckets=32,64", "--log-level=info", "--max-tokens=1"]) == 0
    err = caplog.text
    assert "--model=m" in err and "--token_buckets=32,64" in err and "--max_num_seqs" not in err and "ready in" in err


def test_chat_from_a_pipe(engines, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n/what\nagain\n/reset\nnew\n/exit\nnever\n"))
    assert main(["chat", "--system=S", "--max-tokens=2"]) == 0
    out = capsys.readouterr().out
    assert out == "ab\nunknown command /what; /reset forgets the conversation, /exit ends it\nab\nab\n"
    prompts = [bytes(ids[1:]).decode() for _, ids, _, _ in engines[0].submitted]
    assert prompts == [
        "system: S\nuser: hi\nassistant: ",
        "system: S\nuser: hi\nassistant: ab\nuser: again\nassistant: ",
        "system: S\nuser: new\nassistant: ",
    ]


def test_chat_answers_are_as_long_as_fits(engines, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main(["chat", "--max-model-len=50"]) == 0
    assert engines[0].submitted[0][2].max_tokens is None


def test_interrupt_stops_the_answer_and_keeps_what_came(capsys):
    engine = FakeAsyncEngine(next_token=echo, delay_s=0.002)

    def interrupt(prompt, index, position):
        if position == 3:
            raise KeyboardInterrupt
        return ord("x")

    engine.next_token = interrupt
    with asyncio.Runner() as runner:
        conversation = Conversation(engine, SamplingParams(output_kind=jax_engine.RequestOutputKind.DELTA), None)
        conversation._turn(runner, "hi")
    assert conversation.messages[-1] == {"role": "assistant", "content": "xxx"}
    assert "(stopped)" in capsys.readouterr().out and engine.num_requests == 0


def test_chat_goes_on_after_a_refused_turn(capsys):
    engine = FakeAsyncEngine(max_model_len=40)
    with asyncio.Runner() as runner:
        conversation = Conversation(engine, SamplingParams(output_kind=jax_engine.RequestOutputKind.DELTA), None)
        conversation._turn(runner, "x" * 100)
        assert conversation.messages == [] and "the prompt has" in capsys.readouterr().out
        conversation._turn(runner, "hi")
    assert len(conversation.messages) == 2


def test_bench_without_the_source_folder(capsys, monkeypatch):
    monkeypatch.setattr("serving.commands.bench._found", lambda module: False)
    assert main(["bench"]) == 1
    assert "source folder" in capsys.readouterr().err


def test_bench_passes_its_arguments_on(monkeypatch):
    import types

    seen = []
    module = types.ModuleType("benchmarks.offline")
    module.main = lambda argv: seen.append(argv) or 7
    monkeypatch.setattr("serving.commands.bench._found", lambda name: True)
    monkeypatch.setitem(sys.modules, "benchmarks.offline", module)
    assert main(["bench", "--workload=chat"]) == 7
    assert seen == [["jax-engine bench", "--workload=chat"]]
