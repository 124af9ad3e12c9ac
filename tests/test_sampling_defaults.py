"""A model's own generation_config: what is taken over, and who prevails."""

import json
import shutil
from pathlib import Path

import pytest

from jax_engine import sampling_defaults
from jax_engine.llm import LLM
from jax_engine.sampling_params import SamplingParams
from serving.schema import CompletionRequest, parse

TINY = Path(__file__).parent / "golden" / "tiny" / "llama"


def test_known_fields_are_taken_over_and_bad_ones_left_out(caplog):
    config = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "max_new_tokens": 512,
        "min_p": "much",
        "do_sample": True,
        "eos_token_id": 2,
    }
    assert sampling_defaults.read(config) == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "max_tokens": 512,
    }
    assert "min_p is left out" in caplog.text
    assert sampling_defaults.read({"temperature": None, "top_p": 7}) == {}


def test_a_request_prevails_over_the_model_and_the_model_over_us():
    defaults = {"temperature": 0.6, "top_k": 20, "max_tokens": 512}
    body = parse(json.dumps({"prompt": "a", "top_k": 5}).encode(), CompletionRequest)
    params = body.to_sampling_params(detokenize=False, defaults=defaults)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.6, 5, 1.0, 16)
    assert body.sampling_params(detokenize=False, defaults=defaults).max_tokens == 512
    assert body.sampling_params(detokenize=False).max_tokens is None


@pytest.mark.parametrize(("choice", "temperature"), [("auto", 0.25), ("engine", 1.0)])
def test_a_script_that_says_nothing_gets_the_models(tmp_path, choice, temperature):
    copy = Path(shutil.copytree(TINY, tmp_path / "model"))
    (copy / "generation_config.json").write_text('{"temperature": 0.25}')
    llm = LLM(model=str(copy), max_num_seqs=1, max_model_len=32, token_buckets=(8,), generation_config=choice)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=temperature)
