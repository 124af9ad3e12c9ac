"""Every decision of every policy, with swapping and a bound on decode gaps, is decided again from a step log."""

import random

import pytest

from jax_engine.config import EngineConfig
from jax_engine.engine import Engine
from jax_engine.replay import Replay
from jax_engine.sampling_params import SamplingParams
from jax_engine.step_log import Header, LogReader, StepLog
from jax_engine.testing.fake_runner import FakeRunner
from tests.scheduling import EOS, VOCAB, make_limits


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair", "slo"])
@pytest.mark.parametrize("num_swap_pages", [0, 64])
def test_a_log_is_replayed_decision_for_decision(tmp_path, policy, num_swap_pages):
    chance = random.Random(f"{policy} {num_swap_pages}")
    limits = make_limits(
        num_pages=18,
        max_inflight_steps=chance.randint(1, 4),
        num_swap_pages=num_swap_pages,
        token_seconds=1.0,
        swap_page_seconds=0.1,
        max_decode_gap_s=1e-4,
        slo_classes={"hasty": (1e-3, 1e-4), "patient": (1.0, 0.5)},
    )
    config = EngineConfig(policy=policy)
    header = Header(
        version="x",
        platform="cpu",
        device="cpu",
        vocab_size=VOCAB,
        max_position_embeddings=64,
        started=0.0,
        config=config,
        limits=limits,
    )
    path = str(tmp_path / "log")
    log = StepLog(header=header, path=path)
    engine = Engine(FakeRunner(limits, VOCAB), None, vocab_size=VOCAB, eos_token_ids=[EOS], config=config, step_log=log)
    for number in range(40):
        params = SamplingParams(temperature=0, max_tokens=chance.randint(1, 20), n=chance.choice([1, 3]))
        user, slo_class = chance.choice(["ann", "bob"]), chance.choice(["hasty", "patient", None])
        prompt = [chance.randrange(3)] * chance.randint(1, 30)
        priority = chance.randint(-1, 1)
        engine.submit(engine.make_request(str(number), prompt, params, priority, user=user, slo_class=slo_class))
        if chance.random() < 0.2:
            engine.abort(str(chance.randrange(number + 1)))
        for _ in range(chance.randint(0, 4)):
            engine.step()
    while engine.has_work:
        engine.step()
    log.close()
    replay = Replay(LogReader(path))
    assert replay.run() is None
    assert replay.num_steps == engine.metrics.steps.total() and engine.metrics.preemptions > 0
