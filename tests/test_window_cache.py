"""Layers with sliding windows that keep only their window: the same answers from less memory."""

import json
from pathlib import Path

import numpy as np
import pytest

from jax_engine.config import EngineConfig, resolve
from jax_engine.errors import ConfigError
from jax_engine.kv_cache import page_bytes, slot_bytes
from jax_engine.models import read_config
from jax_engine.request import RequestOutput
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from pallas_kernels.ragged_paged_attention import Device

TINY = Path(__file__).parent / "golden/tiny"
OPTIONS = {
    "max_model_len": 128, "page_size": 4, "max_num_seqs": 3, "token_buckets": (16,), "decode_buckets": (),
    "num_pages": 64, "window_cache": "slots",
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["gemma3", "mistral"])
def test_answers_are_those_of_full_pages(make_modes, architecture):
    modes = make_modes(model=str(TINY / architecture), **OPTIONS)
    window = max(layer.sliding_window or 0 for layer in modes.runner.model_config.layers)
    assert modes.limits.ring_pages * 4 < 128, "a ring must come round"
    assert modes.limits.ring_pages * 4 >= window + 16
    expected = np.load(TINY / architecture / "expected.npz")
    params = SamplingParams(
        temperature=0, max_tokens=24, logprobs=5, prompt_logprobs=5, ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    # 72 tokens take 18 pages each; 32 pages let two sequences join, but do not hold them to their end.
    engine = modes.engine("async", 3, num_pages=32)
    for number, prompt in enumerate(expected["tokens"].tolist()):
        engine.submit(engine.make_request(str(number), prompt, params))
    outputs: dict[str, RequestOutput] = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step()}
    assert engine.metrics.preemptions > 0
    for number in range(3):
        output = outputs[str(number)]
        for position, entries in enumerate(output.prompt_logprobs[1:]):
            got = [entry.logprob for entry in entries.values()]
            np.testing.assert_allclose(got, expected["logprobs"][number, position, list(entries)], rtol=0, atol=2e-3)
        for got, want, entries in zip(
            output.outputs[0].token_ids, expected["greedy"][number], output.outputs[0].logprobs, strict=True
        ):
            if got != want:
                assert entries[got].logprob - entries[want].logprob < 0.02, "another token, and no near-tie"
                break


def test_a_long_context_costs_what_its_window_holds():
    config = json.loads((TINY / "gemma3" / "config.json").read_text(encoding="utf-8"))
    options = {"page_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 64, "token_buckets": (64,)}
    cpu = Device("cpu")

    def bytes_of(window_cache: str, max_model_len: int) -> tuple[int, int]:
        """Of a page, and of everything for four sequences of full length."""
        model = read_config(config | {"max_position_embeddings": max_model_len})
        limits = resolve(
            EngineConfig(max_model_len=max_model_len, window_cache=window_cache, **options),
            model,
            platform="cpu",
            num_pages=1,
        )
        model = model.served(max_model_len, limits.ring_pages > 0)
        page = page_bytes(model, 16, np.dtype(np.float32), cpu)
        return page, slot_bytes(
            model, limits, np.dtype(np.float32), np.dtype(np.float32), cpu
        ) + 4 * page * limits.max_pages_per_seq

    full_page, full = bytes_of("pages", 8192)
    own_page, own = bytes_of("slots", 8192)
    assert full_page - 16 * 4 == 7 * (own_page - 16 * 4), "one of seven layers has pages"
    assert own < 0.16 * full


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("llama", {}, "no layer of LlamaForCausalLM has a sliding window"),
        ("mistral", {"max_num_batched_tokens": 128, "token_buckets": (128,)}, "saves nothing: a window of 19"),
    ],
)
def test_no_use(architecture, options, message):
    model = read_config(json.loads((TINY / architecture / "config.json").read_text(encoding="utf-8")))
    with pytest.raises(ConfigError, match=message):
        resolve(EngineConfig(**(OPTIONS | options)), model, platform="cpu", num_pages=64)
