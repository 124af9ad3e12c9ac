"""The default model through the library: the answers of another implementation, token for token, in every mode."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

import jax_engine.llm
from checkpoints.formats import open_checkpoint
from jax_engine.config import EngineConfig
from jax_engine.engine import Engine
from jax_engine.llm import LLM
from jax_engine.model_runner import ModelRunner
from jax_engine.request import RequestOutput
from jax_engine.sampling_params import SamplingParams
from jax_engine.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct"
OPTIONS = {"max_model_len": 176, "max_num_seqs": 16, "token_buckets": (64,), "decode_buckets": (1, 16)}
PARAMS = SamplingParams(temperature=0, max_tokens=96, logprobs=5, prompt_logprobs=0)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(EngineConfig(model=MODEL, **OPTIONS), open_checkpoint(MODEL))


@pytest.fixture
def make_llm(runner, monkeypatch):
    """LLMs over one set of compiled steps."""
    checkpoint, limits = open_checkpoint(MODEL), runner.limits

    def start(config: EngineConfig) -> list[Engine]:
        depth = config.max_inflight_steps if config.scheduling == "async" else 1
        runner.limits = dataclasses.replace(limits, scheduling=config.scheduling, max_inflight_steps=depth)
        engine = Engine(
            runner,
            load_tokenizer(checkpoint),
            vocab_size=runner.model_config.vocab_size,
            eos_token_ids=checkpoint.eos_token_ids,
            config=config,
        )
        return [engine]

    monkeypatch.setattr("jax_engine.llm.start_engines", start)
    yield lambda scheduling: LLM(MODEL, scheduling=scheduling, **OPTIONS)
    runner.limits = limits


def chosen(tokens: list[int], positions: list) -> list[float]:
    """The log-probabilities of the tokens themselves."""
    return [position[token].logprob for token, position in zip(tokens, positions, strict=True)]


def check(output: RequestOutput, case) -> None:
    (completion,) = output.outputs
    assert output.finished and output.prompt_token_ids == case["prompt_ids"]
    got = chosen(output.prompt_token_ids[1:], output.prompt_logprobs[1:])
    np.testing.assert_allclose(got, case["prompt_logprobs"][1:], rtol=0, atol=case.TOLERANCE)
    if not case.check(completion.token_ids, chosen(completion.token_ids, completion.logprobs)):
        return
    assert completion.text == case["text"] and completion.finish_reason == case["finish_reason"]
    for position, ids, logprobs in zip(completion.logprobs, case["top5_ids"], case["top5_logprobs"], strict=True):
        got = sorted((entry.logprob for entry in position.values()), reverse=True)
        np.testing.assert_allclose(got, logprobs, rtol=0, atol=case.TOLERANCE)
        assert len(set(position) ^ set(ids)) <= 2, "only a tie at the fifth place may fall the other way"


@pytest.mark.parametrize("scheduling", ["static", "sync", "async"])
def test_golden_answers_in_bulk(make_llm, golden_cases, scheduling):
    prompts = [case["prompt_ids"] if case["kind"] == "chat" else case["prompt"] for case in golden_cases]
    llm = make_llm(scheduling)
    assert llm.limits.scheduling == scheduling
    for output, case in zip(llm.generate(prompts, PARAMS, use_tqdm=False), golden_cases, strict=True):
        check(output, case)


def test_a_script_can_apply_the_chat_template_itself(make_llm, golden_cases):
    case = next(case for case in golden_cases if case["kind"] == "chat")
    llm = make_llm("async")
    tokenizer = llm.get_tokenizer()
    prompt = tokenizer.apply_chat_template(case.messages, add_generation_prompt=True)
    assert prompt == case["prompt_ids"]
    text = tokenizer.apply_chat_template(case.messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(text) == prompt
    assert len(tokenizer.apply_chat_template(case.messages)) < len(prompt), "no turn is begun unless asked for"


def test_the_scripts_of_the_documentation_run(make_llm, monkeypatch, capsys):
    """With the sizes of this module's compiled steps."""
    monkeypatch.setattr("jax_engine.async_engine.start_engines", jax_engine.llm.start_engines)
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/library.md")]
    scripts = [script for text in texts for script in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    ours = [script for script in scripts if "jax_engine" in script]
    assert len(ours) == 3
    for script in ours:
        exec(compile(script, "documentation", "exec"), {})
    assert "(576,)" in capsys.readouterr().out


def test_conversations_in_bulk(make_llm, golden_cases):
    cases = [case for case in golden_cases if case["kind"] == "chat" and len(case["output_ids"]) < 40]
    outputs = make_llm("async").chat([case.messages for case in cases], PARAMS, use_tqdm=False)
    for output, case in zip(outputs, cases, strict=True):
        check(output, case)


@pytest.mark.parametrize("number", [0, 5, 15])
def test_golden_answers_one_at_a_time(make_llm, golden_cases, number):
    case = golden_cases[number]
    llm = make_llm("async")
    prompt = case.messages if case["kind"] == "chat" else case["prompt"]
    (output,) = (llm.chat if case["kind"] == "chat" else llm.generate)(prompt, PARAMS, use_tqdm=False)
    check(output, case)


def test_answers_keep_the_order_of_the_prompts(make_llm, golden_cases):
    params = dataclasses.replace(PARAMS, prompt_logprobs=None, max_tokens=16)
    cases = [golden_cases[13], golden_cases[0]]
    outputs = make_llm("async").generate([case["prompt_ids"] for case in cases], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [case["output_ids"][:16] for case in cases]
