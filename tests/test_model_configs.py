"""What each architecture makes of a config.json and of a checkpoint's tensors: read, refused, or named in a warning."""

import fnmatch
import json
import logging
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints.formats import open_checkpoint
from jax_engine.errors import ConfigError
from jax_engine.layers.mlp import FUNCTIONS
from jax_engine.model_config import ACTIVATIONS, ModelConfig
from jax_engine.models import ARCHITECTURES, model_class, read_config

TINY = Path(__file__).parent / "golden/tiny"
FOLDERS = sorted(path.name for path in TINY.iterdir())
#: What a change of a config leaves out.
GONE = object()


def read(folder: str, **changes) -> ModelConfig:
    """The config of a tiny model with some fields changed."""
    config = json.loads((TINY / folder / "config.json").read_text(encoding="utf-8")) | changes
    return read_config({name: value for name, value in config.items() if value is not GONE})


def test_every_architecture_has_golden_answers() -> None:
    assert {read(folder).architecture for folder in FOLDERS} == set(ARCHITECTURES)


@pytest.mark.parametrize("folder", FOLDERS)
def test_weight_map_is_complete_both_ways(folder: str) -> None:
    config = read(folder)
    model = model_class(config)
    state = nnx.split(nnx.eval_shape(lambda: model(config, jnp.dtype(jnp.float32), False)))[1]
    sources = model.weight_map(config)
    assert {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)} == set(sources)
    tensors = open_checkpoint(str(TINY / folder)).tensors
    stored = {model.tensor_name(name): info.shape for name, info in tensors.items()}
    wanted = {name: shape for source in sources.values() for name, shape in source.tensors}
    ignored = {name for name in stored if any(fnmatch.fnmatchcase(name, each) for each in model.IGNORED_TENSORS)}
    assert wanted == {name: stored[name] for name in stored if name in wanted or name not in ignored}


def test_gpt2_of_the_first_release_has_no_prefix() -> None:
    model = ARCHITECTURES["GPT2LMHeadModel"]
    stored = open_checkpoint(str(TINY / "gpt2")).tensors
    assert [model.tensor_name(name.removeprefix("transformer.")) for name in stored] == list(stored)


@pytest.mark.parametrize("folder", ["gemma3_multimodal", "mistral3"])
def test_a_model_that_sees_has_its_text_half_in_one_of_two_places(folder: str) -> None:
    model = model_class(read(folder))
    stored = open_checkpoint(str(TINY / folder)).tensors
    names = {model.tensor_name(name) for name in stored}
    newer = {
        "lm_head.weight" if name == "language_model.lm_head.weight"
        else "model." + name.replace("language_model.model.", "language_model.")
        for name in stored
    }  # fmt: skip
    assert {model.tensor_name(name).replace("model.vision", "vision") for name in newer} == {
        name.replace("multi_modal", "model.multi_modal") for name in names
    }


def test_experts_in_mxfp4_are_unpacked() -> None:
    config = read("gpt_oss", quantization_config={"quant_method": "mxfp4"}, intermediate_size=32)
    sources = model_class(config).weight_map(config)
    rng = np.random.default_rng(0)
    arrays = {}
    for parameter in ("gate_up", "down"):
        source = sources[f"layers.0.mlp.{parameter}"]
        (_, shape), (_, scales_shape) = source.tensors
        assert [name.rsplit("_", 1)[1] for name, _ in source.tensors] == ["blocks", "scales"]
        blocks = rng.integers(0, 256, shape, np.uint8)
        scales = rng.integers(117, 137, scales_shape, np.uint8)
        arrays[parameter] = blocks, scales, source.assemble(blocks, scales)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]

    def stored(blocks: np.ndarray, scales: np.ndarray, expert: int, row: int, column: int) -> float:
        block, place = divmod(column, 32)
        code = int(blocks[expert, row, block, place // 2]) >> (4 * (place % 2)) & 15
        return (-1 if code & 8 else 1) * values[code & 7] * 2.0 ** (int(scales[expert, row, block]) - 127)

    blocks, scales, down = arrays["down"]
    assert down.shape == (4, 64, 32)
    for expert, row, column in [(0, 0, 0), (3, 63, 31), (1, 17, 9), (2, 40, 30)]:
        assert float(down[expert, row, column]) == stored(blocks, scales, expert, row, column)
    blocks, scales, gate_up = arrays["gate_up"]
    assert gate_up.shape == (4, 2, 32, 64)
    for expert, part, row, column in [(0, 0, 0, 0), (3, 1, 31, 63), (1, 0, 7, 33), (2, 1, 12, 40)]:
        assert float(gate_up[expert, part, row, column]) == stored(blocks, scales, expert, 2 * row + part, column)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_field_of_a_saved_config_is_unknown(folder: str, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        read(folder)
    assert not caplog.records


def test_a_field_nobody_knows_is_named(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        read("llama", brand_new_trick=3)
    assert "brand_new_trick" in caplog.text and "LlamaForCausalLM" in caplog.text


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        ("llama", {"hidden_size": 0, "vocab_size": "big"}, "vocab_size must be a positive integer, got 'big'"),
        ("llama", {"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported: silu"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ("llama", {"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "method 'fp8' is not supported, only 'mxfp4'"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}, "hidden_size": 72}, "multiples of 32"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "spiral"}},
            "rope type 'spiral' is not supported; supported: default",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": -1}}, "yarn: factor must be a positive number"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2, "twist": 1}}, "field twist is not known"),
        ("llama", {"partial_rotary_factor": 0.5}, "all 16 dimensions of a head must turn"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1]}},
            "short_factor must be a list of 8",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must be a list of 3 words"),
        ("qwen2", {"layer_types": ["a", "b", "full_attention"]}, "layer_types: a, b not supported"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "but there is no sliding_window"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers must be a list of layer numbers"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported, only 'sigmoid'"),
        ("deepseek_v3", {"n_group": 3}, "8 experts cannot be chosen from 1 of 3 equal groups"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported; supported: greedy"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True is not supported, only False"),
        ("gemma3_multimodal", {"text_config": None}, "text_config must be an object, got None"),
        ("gemma3_multimodal", {"text_config": {"use_bidirectional_attention": True}}, "bidirectional_attention True"),
        ("qwen3_next", {"linear_num_value_heads": 3}, "3 value heads are no multiple of 2 key heads"),
        ("qwen3_next", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim must be at least 2"),
    ],
)
def test_what_is_not_supported_is_refused(folder: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(folder, **changes)
    assert message in str(error.value)


def test_all_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        read("llama", hidden_size=GONE, num_hidden_layers=0, rms_norm_eps="tiny", hidden_act="mish")
    for name in ("hidden_size", "num_hidden_layers", "rms_norm_eps", "hidden_act"):
        assert name in str(error.value)


@pytest.mark.parametrize("architectures", [GONE, [], ["A", "B"], "LlamaForCausalLM", [3]])
def test_architectures_must_name_one(architectures) -> None:
    with pytest.raises(ConfigError, match="must name one class"):
        read("llama", architectures=architectures)


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as error:
        read("llama", architectures=["MambaForCausalLM"])
    message = str(error.value)
    assert all(name in message for name in ARCHITECTURES)
    assert "jax_engine/models/" in message and "docs/adding-a-model.md" in message


def test_windows_by_layer() -> None:
    def windows(folder: str, **changes) -> list:
        return [layer.sliding_window for layer in read(folder, **changes).layers]

    assert windows("mistral") == [19] * 3
    assert windows("mistral", sliding_window=None) == [None] * 3
    assert windows("mistral", sliding_window=GONE) == [4096] * 3, "as in the first release, whose file lacks it"
    on = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}
    assert windows("qwen2", **on) == [None, 8, 8]
    assert windows("qwen2", **(on | {"use_sliding_window": False})) == [None] * 3
    assert windows("gemma2", layer_types=GONE) == [12, None, 12]
    assert windows("gemma3", layer_types=GONE, sliding_window_pattern=3) == [12, 12, None, 12, 12, None, 12]
    assert windows("gpt_oss", layer_types=GONE) == [16, None, 16]


def test_rotary_positions_of_transformers_4() -> None:
    old = read("llama3_rope", rope_parameters=GONE, rope_theta=500000.0, rope_scaling={
        "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    })  # fmt: skip
    assert old.ropes == read("llama3_rope").ropes
    gemma = read("gemma3", rope_parameters=GONE, rope_theta=1e6, rope_local_base_freq=1e4)
    assert gemma.ropes == read("gemma3").ropes
    assert [layer.rope for layer in gemma.layers] == [1, 1, 1, 1, 1, 0, 1]


def test_longrope_takes_the_long_divisors_where_sequences_may_be_long() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = read("phi3", rope_parameters=rope, original_max_position_embeddings=128)
    short, long = config.served(128).ropes[0], config.served(129).ropes[0]
    assert [a / b for a, b in zip(short.frequencies, long.frequencies, strict=True)] == pytest.approx([4.0] * 8)
    assert short.amplitude == long.amplitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(128)))


def test_sparse_layers() -> None:
    def sparse(folder: str, **changes) -> list[bool]:
        return [layer.sparse for layer in read(folder, **changes).layers]

    assert sparse("qwen3_moe", decoder_sparse_step=2) == [False, True, False]
    assert sparse("qwen3_moe", mlp_only_layers=[1]) == [True, False, True]
    assert sparse("deepseek_v3", first_k_dense_replace=0) == [True] * 3
    assert sparse("deepseek_v3", first_k_dense_replace=9) == [False] * 3
    assert read("qwen3_moe", num_local_experts=GONE, num_experts=6).moe.num_experts == 6, "transformers 4's name"
    assert read("qwen3_moe", norm_topk_prob=GONE).moe.normalize is False


def test_activations_have_functions() -> None:
    assert set(FUNCTIONS) == set(ACTIVATIONS)
