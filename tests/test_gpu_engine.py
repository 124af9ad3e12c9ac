"""An engine over the Hopper kernels in GPU interpret mode, against one over XLA's forms.

Its warm-up runs every bucket on nothing but padding, which no case of a kernel by itself does.
"""

import json

import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_engine.engine import Engine
from jax_engine.request import RequestOutput
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from pallas_kernels.ragged_paged_attention import api, gpu_decode, gpu_prefill
from tests.conftest import GOLDEN

#: A prompt of one token, one so short that each of its keys matters, and one that is cut and comes beside decodes.
PROMPTS = [[7], [40, 41, 42], list(range(90))]
GREEDY = SamplingParams(
    temperature=0, max_tokens=4, ignore_eos=True, logprobs=1, output_kind=RequestOutputKind.FINAL_ONLY
)
TOLERANCE = 0.02


def _serve(engine: Engine) -> list[RequestOutput]:
    for number, prompt in enumerate(PROMPTS):
        engine.submit(engine.make_request(str(number), prompt, GREEDY))
    outputs = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step()}
    return [outputs[str(number)] for number in range(len(PROMPTS))]


@pytest.fixture
def folder(tmp_path) -> str:
    """A model without weights, of a shape that the kernels take."""
    config = json.loads((GOLDEN / "tiny/llama/config.json").read_text(encoding="utf-8"))
    config |= {"head_dim": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_tokens_are_those_of_an_engine_over_xla(folder, make_modes, monkeypatch):
    options = {
        "model": folder,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "page_size": 16,
        "max_num_seqs": 3,
        "num_pages": 24,
        "token_buckets": (160,),  # of padding alone: more blocks than the interpreter has workers
        "decode_buckets": (3,),
    }
    wanted = _serve(make_modes(**options).engine("sync", max_num_batched_tokens=64))
    monkeypatch.setitem(api._PREFERRED, "cpu", "gpu")
    kernels = []
    for module, name in ((gpu_decode, "_entry"), (gpu_prefill, "_entry")):
        entry = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, entry=entry: (kernels.append(entry), entry(*args))[1])
    with plgpu.force_gpu_interpret_mode():
        got = _serve(make_modes(**options).engine("async", max_num_batched_tokens=64))
    assert len(set(kernels)) == 2, "attention did not go through both kernels"
    for ours, theirs in zip(got, wanted, strict=True):
        (ours,), (theirs,) = ours.outputs, theirs.outputs
        assert ours.token_ids == theirs.token_ids
        chosen = [
            [entries[token].logprob for token, entries in zip(of.token_ids, of.logprobs, strict=True)]
            for of in (ours, theirs)
        ]
        np.testing.assert_allclose(*chosen, rtol=0, atol=TOLERANCE)
