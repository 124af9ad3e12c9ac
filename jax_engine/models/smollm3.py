"""SmolLM3 (Hugging Face, 2025): Llama's layer; every fourth layer has no rotary positions."""

from jax_engine.hf_config import HFConfig
from jax_engine.model_config import LayerConfig, ModelConfig
from jax_engine.models.decoder import Decoder


class SmolLM3(Decoder):
    """Pre-norm decoder; layers without positions may have a sliding window."""

    @classmethod
    def read_config(cls, hf: HFConfig) -> ModelConfig:
        """See Decoder. In no_rope_layers, 1 means that the layer does turn."""
        base = hf.base(tied=True)
        num_layers, interval = base["num_hidden_layers"], hf.size("no_rope_layer_interval", 4)
        turning = hf.raw("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(num_layers)]
        if not isinstance(turning, list) or len(turning) != num_layers:
            hf.problem(f"no_rope_layers must be a list of {num_layers} numbers, got {str(turning)[:80]}")
            turning = [1] * num_layers
        window = hf.optional_size("sliding_window") if hf.flag("use_sliding_window") else hf.ignore("sliding_window")
        types = ["full_attention" if turns or window is None else "sliding_attention" for turns in turning]
        hf.ignore("max_window_layers")
        bias = hf.flag("attention_bias")
        return hf.finish(
            **base,
            ropes=(hf.rope(base["head_dim"], default_theta=2e6),),
            layers=tuple(
                LayerConfig(sliding_window=layer.sliding_window, rope=0 if turns else None)
                for layer, turns in zip(hf.windows(window, types), turning, strict=True)
            ),
            attention_bias=bias,
            output_bias=bias,
            mlp_bias=hf.flag("mlp_bias"),
        )
