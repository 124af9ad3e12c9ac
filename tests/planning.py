"""What the tests of planning share: a cost model whose steps can be computed by hand, and traces."""

import numpy as np

from jax_engine.buckets import buckets
from jax_engine.config import EngineConfig, resolve
from jax_engine.model_config import ModelConfig
from jax_engine.planning import trace
from jax_engine.planning.cost_model import BucketCost, CostModel, HostCost, Stalls
from jax_engine.planning.trace import TraceRequest
from jax_engine.step_log import Header

VOCAB = 1000
MODEL = ModelConfig.placeholder(VOCAB, 2048)


def make_cost(host_ms: float = 0.0, **options) -> CostModel:
    """1 ms for each decode step and sequence, 10 ms and 0.1 ms per token slot for each other step."""
    config = EngineConfig(
        **({"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 1024, "num_pages": 512} | options)
    )
    limits = resolve(config, MODEL, platform="cpu", num_pages=512)
    header = Header(
        version="1",
        platform="cpu",
        device="made up",
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        started=0.0,
        config=config,
        limits=limits,
    )
    costs = []
    for bucket in buckets(limits):
        base = 1e-3 * bucket.num_tokens if bucket.decode_only else 10e-3 + 1e-4 * bucket.num_tokens
        costs.append(BucketCost(bucket, base, 0.0, 1e-6, 2e-7, steps=100, error=0.0))
    host = dict.fromkeys(("schedule", "build", "dispatch", "commit"), HostCost(host_ms * 1e-3 / 4, 0.0))
    return CostModel(header, costs, host, turn=0.0, stalls=Stalls(), num_steps=100, num_exact=100)


def requests_of(*triples: tuple[float, int, int], **fields) -> list[TraceRequest]:
    return [TraceRequest(arrival_s=at, prompt_tokens=p, output_tokens=o, **fields) for at, p, o in triples]


def random_trace(count: int, rate: float, seed: int = 0, **fields) -> list[TraceRequest]:
    chance = np.random.default_rng(seed)
    return trace.make(
        trace.poisson(rate, count, chance),
        trace.lengths(60, 0.8, count, chance),
        trace.lengths(20, 0.8, count, chance),
        chance=chance,
        **fields,
    )
