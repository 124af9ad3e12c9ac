"""What the tests of scheduling share: small limits, sequences, engines over a fake device, and answers by hand."""

from collections.abc import Sequence as AbstractSequence

from jax_engine.config import EngineConfig, Limits
from jax_engine.engine import Engine
from jax_engine.request import Request, RequestOutput
from jax_engine.sampling_params import SamplingParams
from jax_engine.sequence import Sequence
from jax_engine.testing.fake_runner import FakeRunner, next_token

VOCAB = 23
EOS = 3


def make_limits(**changes) -> Limits:
    """Limits of a few pages, four slots and two buckets."""
    values = {
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "page_size": 4,
        "num_pages": 24,
        "scheduling": "async",
        "max_inflight_steps": 2,
        "token_buckets": (8, 16),
        "decode_buckets": (1, 2, 4),
    }
    return Limits(**(values | changes))


def make_engine(limits: Limits, policy: str = "fcfs") -> Engine:
    """An engine over a device whose answers can be computed by hand."""
    runner = FakeRunner(limits, VOCAB)
    return Engine(runner, None, vocab_size=VOCAB, eos_token_ids=[EOS], config=EngineConfig(policy=policy))


def make_sequence(prompt: int | AbstractSequence[int], max_tokens: int, stop: bool = True, **request) -> Sequence:
    """The one sequence of a request; `prompt` may be a length."""
    tokens = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    made = Request(**({"request_id": "r", "prompt_token_ids": tokens, "sampling_params": params} | request))
    return Sequence(made, 0, len(tokens) + max_tokens, frozenset({EOS} if stop else ()), 0)


def expected(prompt: list[int], max_tokens: int, limit: int, ignore_eos: bool = False) -> list[int]:
    """The output that the fake device gives a request alone."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, limit):
        tokens.append(next_token(tokens, VOCAB))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


def run(engine: Engine) -> dict[str, RequestOutput]:
    """Runs what was submitted to its end, with all invariants checked after every step."""
    outputs = {}
    for _ in range(100_000):
        if not engine.has_work:
            break
        for output in engine.step():
            outputs[output.request_id] = output
        engine.scheduler.check()
    assert not engine.has_work, "the engine did not come to an end"
    assert engine.scheduler.pool.num_free == engine.limits.num_pages, "pages are missing from an idle engine"
    return outputs
