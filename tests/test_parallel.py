"""One model on several devices: the layout here, whole engines in a process of eight simulated CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_engine.config import EngineConfig
from jax_engine.errors import ConfigError
from jax_engine.model_config import ModelConfig
from jax_engine.sharding import choose_devices, copy_kv_heads, with_kv_copies

HERE = Path(__file__).resolve().parent


def model(num_heads: int, num_kv_heads: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=2,
        max_position_embeddings=8,
    )


@pytest.mark.parametrize("marks", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_on_eight_simulated_devices(marks: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    program = str(HERE / "on_eight_devices.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", "-m", marks, program],
        cwd=HERE.parent,
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "num_devices", "placed"),
    [
        (8, 2, 1, 2),
        (8, 2, 2, 2),
        (8, 2, 4, 4),
        (8, 2, 8, 8),
        (8, 1, 4, 4),
        (9, 3, 6, 3),  # three query heads cannot be dealt out to two
        (9, 3, 2, 3),
        (6, 2, 3, 2),
    ],
)
def test_kv_heads_are_copied_where_query_heads_divide(num_heads, num_kv_heads, num_devices, placed):
    assert with_kv_copies(model(num_heads, num_kv_heads), num_devices).num_key_value_heads == placed


def test_each_copy_of_a_kv_head_keeps_the_query_heads_that_use_it():
    stored, placed = model(8, 2), with_kv_copies(model(8, 2), 4)
    qkv = np.array([[0, 1, 2, 3, 100, 200], [4, 5, 6, 7, 101, 201]])[:, :, None]
    got = copy_kv_heads(qkv, ("kv_heads", "group", "head_dim"), stored, placed)[..., 0]
    np.testing.assert_array_equal(got, [[0, 1, 100, 200], [2, 3, 100, 200], [4, 5, 101, 201], [6, 7, 101, 201]])
    gated = np.array([[0, 1, 2, 3, 10, 11, 12, 13, 100, 200], [4, 5, 6, 7, 14, 15, 16, 17, 101, 201]])
    got = copy_kv_heads(gated, ("kv_heads", "group"), stored, placed)
    np.testing.assert_array_equal(got[:2], [[0, 1, 10, 11, 100, 200], [2, 3, 12, 13, 100, 200]])
    output = np.arange(8).reshape(1, 2, 4)
    got = copy_kv_heads(output, ("embed", "kv_heads", "group"), stored, placed)
    np.testing.assert_array_equal(got, np.arange(8).reshape(1, 4, 2))
    key_bias = np.array([[1.0, 2.0], [3.0, 4.0]])
    got = copy_kv_heads(key_bias, ("kv_heads", "head_dim"), stored, placed)
    np.testing.assert_array_equal(got, [[1, 2], [1, 2], [3, 4], [3, 4]])
    assert copy_kv_heads(qkv, ("mlp", "embed", None), stored, placed) is qkv


def test_too_few_devices_and_bad_sizes_are_refused():
    class Device:
        platform, process_index = "cpu", 0

    with pytest.raises(ConfigError, match="tensor_parallel_size 3 needs as many devices; 2 found"):
        choose_devices([Device(), Device()], 3)
    with pytest.raises(ConfigError, match="tensor_parallel_size must be at least 1"):
        EngineConfig(tensor_parallel_size=0)
