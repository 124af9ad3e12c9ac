"""config.json of published models, as their authors wrote them: each is read whole, with no field left over."""

import logging

import pytest

from jax_engine.errors import ConfigError
from jax_engine.model_config import ModelConfig
from jax_engine.models import model_class, read_config

#: Fields that nearly every file has and that say nothing about the function.
_SAVED = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu",
    "initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
}  # fmt: skip
_LLAMA = _SAVED | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "vocab_size": 128256, "pretraining_tp": 1, "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
_MISTRAL = _SAVED | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 32000, "max_position_embeddings": 32768,
    "sliding_window": 4096,
}  # fmt: skip
_QWEN2 = _SAVED | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
_QWEN3 = _QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None,
    "sliding_window": None, "vocab_size": 151936,
}  # fmt: skip
_EXPERTS = {
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip
_GEMMA2 = _SAVED | {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False,
    "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
    "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
_GEMMA3 = {name: value for name, value in _GEMMA2.items() if name != "hidden_act"} | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "num_attention_heads": 4, "num_key_value_heads": 1, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
_PHI3 = _SAVED | {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
    "vocab_size": 32064,
}  # fmt: skip
_LONG = {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"}
_GPT_OSS = _SAVED | {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4,
    "head_dim": 64, "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip
_DEEPSEEK_V3 = _SAVED | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
_DEEPSEEK_V2 = {name: _DEEPSEEK_V3[name] for name in _DEEPSEEK_V3.keys() - {"num_nextn_predict_layers"}} | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "topk_group": 1, "topk_method": "greedy",
    "rope_scaling": _DEEPSEEK_V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}, "vocab_size": 102400,
}  # fmt: skip

CONFIGS = {
    "Llama-2-7b": _LLAMA
    | {"num_key_value_heads": 32, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 32000}
    | {"intermediate_size": 11008, "max_position_embeddings": 4096},
    "Llama-3.1-8B": _LLAMA,
    "Llama-3.2-1B": _LLAMA
    | {"head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"rope_scaling": _LLAMA["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True},
    "Llama-3.3-70B": _LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "Mistral-7B-v0.1": _MISTRAL,
    "Mistral-7B-v0.3": _MISTRAL | {"rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768},
    "Mistral-Nemo-2407": _MISTRAL
    | {"head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40, "rope_theta": 1e6, "sliding_window": None}
    | {"max_position_embeddings": 1024000, "vocab_size": 131072},
    "Mistral-Small-24B-2501": _MISTRAL
    | {"head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "rope_theta": 1e8}
    | {"sliding_window": None, "vocab_size": 131072},
    "Mistral-Small-3.1-24B": {
        "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
        "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
        "text_config": {
            "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
            "initializer_range": 0.02, "intermediate_size": 32768, "max_position_embeddings": 131072,
            "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 1e9, "sliding_window": None, "use_cache": True, "vocab_size": 131072,
        },
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "vision_feature_layer": -1,
        "vision_config": {"hidden_size": 1024, "image_size": 1540, "model_type": "pixtral", "patch_size": 14},
    },
    "Qwen2.5-7B": _QWEN2,
    "Qwen2.5-0.5B": _QWEN2
    | {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24}
    | {"num_key_value_heads": 2, "tie_word_embeddings": True, "max_window_layers": 21, "vocab_size": 151936},
    "Qwen3-8B": _QWEN3,
    "Qwen3-0.6B": _QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28}
    | {"max_window_layers": 28, "tie_word_embeddings": True},
    "Qwen3-30B-A3B": _QWEN3
    | _EXPERTS
    | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048}
    | {"intermediate_size": 6144, "max_window_layers": 48, "moe_intermediate_size": 768, "num_experts": 128}
    | {"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4},
    "Gemma-2-2b": _GEMMA2,
    "Gemma-2-27b": _GEMMA2
    | {"head_dim": 128, "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32}
    | {"num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144},
    "Gemma-3-1b": _GEMMA3,
    "Gemma-3-4b": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
    },
    "Phi-3-mini-4k": _PHI3,
    "Phi-3-mini-128k": _PHI3 | {"max_position_embeddings": 131072, "rope_scaling": _LONG, "sliding_window": 262144},
    "Phi-4": _PHI3
    | {"hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384, "num_attention_heads": 40}
    | {"num_hidden_layers": 40, "num_key_value_heads": 10, "original_max_position_embeddings": 16384}
    | {"rope_theta": 250000, "sliding_window": None, "vocab_size": 100352},
    "Phi-4-mini": _PHI3
    | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "rope_scaling": _LONG}
    | {"max_position_embeddings": 131072, "num_attention_heads": 24, "num_key_value_heads": 8}
    | {"partial_rotary_factor": 0.75, "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064},
    "Mixtral-8x7B": _MISTRAL
    | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2}
    | {"num_local_experts": 8, "output_router_logits": False, "rope_theta": 1e6, "router_aux_loss_coef": 0.02}
    | {"sliding_window": None},
    "gpt-oss-20b": _GPT_OSS,
    "gpt-oss-120b": _GPT_OSS
    | {"layer_types": ["sliding_attention", "full_attention"] * 18, "num_hidden_layers": 36, "num_local_experts": 128},
    "OLMo-2-7B": _SAVED
    | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "hidden_size": 4096}
    | {"intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "pad_token_id": 100277}
    | {"num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": None}
    | {"rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352},
    "Granite-3.1-8b": _LLAMA
    | {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_multiplier": 0.0078125}
    | {"embedding_multiplier": 12.0, "intermediate_size": 12800, "logits_scaling": 16.0, "num_hidden_layers": 40}
    | {"residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 1e7, "vocab_size": 49155}
    | {"tie_word_embeddings": True},
    "Moonlight-16B-A3B": _DEEPSEEK_V3
    | {"aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264}
    | {"max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64}
    | {"n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27}
    | {"num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None, "rms_norm_eps": 1e-05}
    | {"rope_scaling": None, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "seq_aux": True, "topk_group": 1}
    | {"vocab_size": 163840},
    "DeepSeek-V2-Lite": _DEEPSEEK_V2,
    "DeepSeek-V2": _DEEPSEEK_V2
    | {"hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8, "topk_group": 3}
    | {"n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128}
    | {"q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy"},
    "DeepSeek-V3 in bfloat16": _DEEPSEEK_V3,
    "Qwen3-Next-80B-A3B": {name: _QWEN3[name] for name in _QWEN3.keys() - {"sliding_window", "max_window_layers"}}
    | _EXPERTS
    | {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "full_attention_interval": 4}
    | {"head_dim": 256, "hidden_size": 2048, "intermediate_size": 5120, "linear_conv_kernel_dim": 4}
    | {"linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32}
    | {"linear_value_head_dim": 128, "max_position_embeddings": 262144, "moe_intermediate_size": 512}
    | {"num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48}
    | {"num_key_value_heads": 2, "partial_rotary_factor": 0.25, "rope_theta": 1e7}
    | {"shared_expert_intermediate_size": 512},
    "SmolLM3-3B": _LLAMA
    | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "hidden_size": 2048, "rope_scaling": None}
    | {"intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536}
    | {"max_window_layers": 28, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "pad_token_id": 128004}
    | {"num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-06}
    | {"rope_theta": 5e6, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False},
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_read_with_no_field_left_over(name: str, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        config = read_config(CONFIGS[name])
    assert not caplog.records
    assert isinstance(config, ModelConfig) and len(config.layers) == config.num_hidden_layers
    assert model_class(config).weight_map(config)


#: Billions of weights, as their authors say.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama-3.1-8B", 8.03), ("Llama-3.2-1B", 1.24), ("Mistral-Nemo-2407", 12.2), ("Qwen2.5-7B", 7.62),
        ("Mistral-Small-3.1-24B", 23.6),
        ("Qwen3-0.6B", 0.596), ("Qwen3-30B-A3B", 30.5), ("Gemma-2-2b", 2.61), ("Gemma-3-1b", 1.0), ("Gemma-3-4b", 3.88),
        ("Phi-4-mini", 3.84), ("Phi-4", 14.7), ("Mixtral-8x7B", 46.7), ("OLMo-2-7B", 7.3), ("Granite-3.1-8b", 8.17),
        ("Moonlight-16B-A3B", 16.0), ("DeepSeek-V2-Lite", 15.7),
        ("DeepSeek-V2", 236.0), ("DeepSeek-V3 in bfloat16", 671.0), ("Qwen3-Next-80B-A3B", 80.0),
        ("SmolLM3-3B", 3.08), ("gpt2", 0.124),
    ],
)  # fmt: skip
def test_a_published_model_has_as_many_weights_as_its_authors_say(name: str, billions: float) -> None:
    config = read_config(CONFIGS[name])
    tensors: dict[str, int] = {}
    for source in model_class(config).weight_map(config).values():
        for tensor, shape in source.tensors:
            count = 1
            for size in shape:
                count *= size
            tensors[tensor] = count
    assert sum(tensors.values()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_weights_in_a_format_nobody_has_written_are_refused() -> None:
    fp8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(ConfigError, match="quantization_config"):
        read_config(_DEEPSEEK_V3 | {"quantization_config": fp8})
