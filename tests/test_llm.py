"""LLM as scripts and notebooks use it: from several threads, and with Ctrl-C in between."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jax_engine import LLM, EngineStopped, InvalidRequest, SamplingParams
from tests.conftest import GOLDEN

PROMPTS = [[number + 1] * (number + 3) for number in range(6)]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)


def _tokens(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def llm() -> LLM:
    model = str(GOLDEN / "tiny/llama")
    sizes = {"page_size": 8, "max_model_len": 64, "max_num_seqs": 4, "token_buckets": (16,), "decode_buckets": ()}
    return LLM(model, compilation_cache_dir="", **sizes)


def test_calls_from_several_threads_wait_for_each_other(llm):
    wanted = _tokens(llm, PROMPTS)
    with ThreadPoolExecutor(3) as threads:
        answers = threads.map(lambda _: _tokens(llm, PROMPTS), range(6))
    assert list(answers) == [wanted] * 6


def test_ctrl_c_ends_a_call_and_the_next_one_is_served(llm, monkeypatch):
    wanted = _tokens(llm, PROMPTS)
    commit, steps = llm._engine._commit, []

    def interrupted(*args):
        steps.append(args)
        if len(steps) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return commit(*args)

    monkeypatch.setattr(llm._engine, "_commit", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
    try:
        with pytest.raises(KeyboardInterrupt):
            _tokens(llm, PROMPTS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert _tokens(llm, PROMPTS) == wanted
    llm._engine.scheduler.check()


def test_prompts_in_the_forms_of_vllm(llm):
    [wanted] = _tokens(llm, PROMPTS[:1])
    for prompt in ({"prompt_token_ids": PROMPTS[0]}, [{"prompt_token_ids": PROMPTS[0]}], tuple(PROMPTS[0])):
        [output] = llm.generate(prompt, PARAMS, use_tqdm=False)
        assert output.outputs[0].token_ids == wanted


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[1], [], [2]], PARAMS, "prompt 1 of 3: the prompt is empty"),
        ({"prompt": "a", "image": "b"}, PARAMS, "got prompt, image"),
        ([None], PARAMS, "got NoneType"),
        ([[1]], {"temperature": 0}, "SamplingParams are needed, got dict"),
        ([[1] * 64], PARAMS, "maximum context length is 64 tokens"),
    ],
)
def test_bad_calls_are_told_what_is_wrong(llm, prompts, params, message):
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert not llm._engine.has_work


def test_the_prefix_cache_can_be_emptied(llm):
    prompt = [list(range(40))]
    llm.generate(prompt, PARAMS, use_tqdm=False)
    assert llm.generate(prompt, PARAMS, use_tqdm=False)[0].num_cached_tokens
    assert llm.reset_prefix_cache()
    assert not llm.generate(prompt, PARAMS, use_tqdm=False)[0].num_cached_tokens


def test_after_a_step_that_failed_there_is_an_error_and_no_hang(llm, monkeypatch):
    """The last test of the module: the engine is spent."""

    def fail(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(llm._engine, "_commit", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        _tokens(llm, PROMPTS)
    monkeypatch.undo()
    with pytest.raises(EngineStopped, match="make a new LLM"):
        _tokens(llm, PROMPTS)
