"""A step writes into the KV pool where it lies: whatever a model's layers are, no step needs a second pool."""

from pathlib import Path

import jax
import pytest

from checkpoints.formats import open_checkpoint
from jax_engine.buckets import buckets
from jax_engine.config import EngineConfig, resolve
from jax_engine.layers.stack import _stretches
from jax_engine.models import read_config
from jax_engine.program import ModelProgram

TINY = Path(__file__).parent / "golden/tiny"
OPTIONS = EngineConfig(max_model_len=64, max_num_seqs=8, num_pages=2000, token_buckets=(16,), decode_buckets=(8,))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_no_step_copies_the_pool(architecture):
    """deepseek_v3 did, in each layer: its dense layers and those of experts were branches of one loop."""
    config = read_config(open_checkpoint(str(TINY / architecture)).config)
    limits = resolve(OPTIONS, config, platform="cpu", num_pages=2000)
    program = ModelProgram(config, "float32", jax.devices()[:1])
    pool_bytes = program.page_bytes(limits.page_size) * limits.num_pages
    for bucket in buckets(limits):
        memory = program.lower(bucket, limits)[1].compile().memory_analysis()
        assert memory is not None
        assert memory.alias_size_in_bytes >= pool_bytes
        assert memory.temp_size_in_bytes < pool_bytes / config.num_hidden_layers


@pytest.mark.parametrize(
    ("kind_of", "ranges"),
    [
        ([0, 0, 0], [(0, 3)]),
        ([0, 1, 1], [(0, 1), (1, 3)]),
        ([0, 1, 0, 1], [(0, 4)]),
        ([0, 1, 0, 2, 2], [(0, 3), (3, 5)]),
        ([0], [(0, 1)]),
    ],
)
def test_layers_that_share_no_kind_are_loops_of_their_own(kind_of, ranges):
    assert list(_stretches(kind_of)) == ranges
