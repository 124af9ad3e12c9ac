"""Reads a Hugging Face config.json, field by field, and gathers all that is wrong with it.

The files in models/ say which fields their architecture has. A field that nobody asked for is named in a warning, and
one that would change the answers in a way nobody wrote is refused: nothing is silently ignored. Never imports jax.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jax_engine.errors import ConfigError
from jax_engine.model_config import ACTIVATIONS, LayerConfig, ModelConfig, Rope
from jax_engine.rope_scaling import read_rope

_log = logging.getLogger(__name__)

#: Fields that say nothing about the model's function: training, token ids (read elsewhere), how it was saved.
_NEUTRAL = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout attn_pdrop auto_map bos_token_id
    cache_implementation dtype embd_pdrop eos_token_id hidden_dropout id2label initializer_range is_decoder label2id
    model_type num_labels output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp
    problem_type resid_pdrop return_dict router_aux_loss_coef router_jitter_noise task_specific_params torch_dtype
    transformers_version unsloth_fixed unsloth_version use_cache
    """.split()  # noqa: SIM905
)
#: Fields that, unless the architecture reads them, must not be there or hold one of the named values.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "use_bidirectional_attention": (None, False),
    "vision_config": (None,),
    "per_layer_config": (None,),
}


class HFConfig:
    """A config.json under inspection. Each method reads a field; what is wrong is kept until `finish`.

    A field whose value is null counts as missing.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values = values
        self._problems: list[str] = []
        self._seen: set[str] = set(_NEUTRAL)

    def _get(self, name: str) -> Any:
        self._seen.add(name)
        return self._values.get(name)

    def problem(self, message: str) -> None:
        """Notes that something is wrong."""
        self._problems.append(message)

    def raw(self, name: str) -> Any:
        """The field as it is; None where it is missing."""
        return self._get(name)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; required unless there is a default."""
        value = self._get(name)
        if value is None and default is not None:
            return default
        if type(value) is int and 0 < value < 2**31:
            return value
        self.problem(f"{name} must be a positive integer, got {_shown(value)}")
        return default or 1

    def optional_size(self, name: str, missing: int | None = None) -> int | None:
        """A positive integer, or None where it is null; `missing` where the field is not there at all."""
        value = self._get(name)
        if value is None:
            return None if name in self._values else missing
        return self.size(name, 1)

    def count(self, name: str, default: int) -> int:
        """An integer, zero or more."""
        value = self._get(name)
        if value is None or (type(value) is int and 0 <= value < 2**31):
            return default if value is None else value
        self.problem(f"{name} must be an integer of at least 0, got {_shown(value)}")
        return default

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.optional_number(name)
        return default if value is None else value

    def optional_number(self, name: str, missing: float | None = None) -> float | None:
        """A positive number, or None where it is null; `missing` where the field is not there at all."""
        value = self._get(name)
        if value is None:
            return None if name in self._values else missing
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
            return float(value)
        self.problem(f"{name} must be a positive number, got {_shown(value)}")
        return None

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._get(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.problem(f"{name} must be true or false, got {_shown(value)}")
        return default

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        """One of the allowed words."""
        value = self._get(name)
        if value is None or value in allowed:
            return default if value is None else value
        self.problem(f"{name} {_shown(value)} is not supported; supported: {', '.join(allowed)}")
        return default

    def choices(self, name: str, allowed: Sequence[str], default: Sequence[str]) -> list[str]:
        """A list of allowed words, as long as the default."""
        value = self._get(name)
        if value is None:
            return list(default)
        if not isinstance(value, list) or len(value) != len(default):
            self.problem(f"{name} must be a list of {len(default)} words, got {_shown(value)}")
        elif unknown := sorted({str(word) for word in value if word not in allowed}):
            self.problem(f"{name}: {', '.join(unknown)[:80]} not supported; supported: {', '.join(allowed)}")
        else:
            return value
        return list(default)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses the field unless it is missing or has one of these values: nothing else has been written."""
        value = self._get(name)
        if value is not None and value not in allowed:
            wanted = " or ".join(_shown(other) for other in allowed)
            self.problem(f"{name} {_shown(value)} is not supported, only {wanted}")

    def flat(self, name: str, defaults: Mapping[str, Any]) -> "HFConfig":
        """The same with the fields of the object in one of its fields, or else these defaults, beside its own."""
        values = self._values.get(name)
        inner = values if isinstance(values, Mapping) else {}
        outer = {field: value for field, value in self._values.items() if field != name}
        flat = HFConfig({**defaults, **outer, **inner, "architectures": self._values["architectures"]})
        if inner is not values:
            flat.problem(f"{name} must be an object, got {_shown(values)}")
        return flat

    def ignore(self, *names: str) -> None:
        """Fields that have no part in this architecture's function, whatever their values."""
        self._seen.update(names)

    def windows(
        self, window: int | None, default: Sequence[str], *, full_rope: int = 0, sliding_rope: int = 0
    ) -> tuple[LayerConfig, ...]:
        """A LayerConfig per layer from layer_types; `default` says the types where the field is missing.

        Args:
            window: of the layers of type sliding_attention. full_rope, sliding_rope: which rotary positions they take.
        """
        kinds = {
            "full_attention": LayerConfig(rope=full_rope),
            "sliding_attention": LayerConfig(rope=sliding_rope, sliding_window=window),
        }
        types = self.choices("layer_types", tuple(kinds), default)
        if window is None and "sliding_attention" in types:
            self.problem("layer_types has sliding_attention, but there is no sliding_window")
        return tuple(kinds[name] for name in types)

    def rope(
        self,
        head_dim: int,
        *,
        default_theta: float = 10000.0,
        partial: float | None = None,
        names: Mapping[str, str] | None = None,
    ) -> Rope:
        """The one kind of rotary positions of a model; see rope_scaling.read_rope.

        Args:
            partial: the share of a head that turns by default; None: the architecture turns whole heads only.
            names: other names of the kinds of scaling.
        """
        values = self._get("rope_scaling") or self._get("rope_parameters") or {}
        if not isinstance(values, Mapping):
            self.problem(f"rope_parameters must be an object, got {_shown(values)}")
            values = {}
        defaults: dict[str, Any] = {"rope_theta": self.number("rope_theta", default_theta)}
        if share := self.optional_number("partial_rotary_factor") or partial:
            defaults["partial_rotary_factor"] = share
        merged = defaults | {name: value for name, value in values.items() if value is not None}
        for field in ("rope_type", "type"):
            if field in merged:
                merged[field] = (names or {}).get(merged[field], merged[field])
        rope = self.rope_from(merged, head_dim)
        if partial is None and rope.frequencies and rope.rotary_dim != head_dim:
            self.problem(f"partial_rotary_factor is not supported here: all {head_dim} dimensions of a head must turn")
        return rope

    def rope_from(self, fields: Mapping[str, Any], head_dim: int) -> Rope:
        """Rotary positions from one object of fields."""
        fields = {name: value for name, value in fields.items() if value is not None}
        if original := self._get("original_max_position_embeddings"):
            fields["original_max_position_embeddings"] = original
        rope, problems = read_rope(fields, head_dim, self.size("max_position_embeddings", 2048))
        self._problems += problems
        return rope

    @property
    def architecture(self) -> str:
        """The class that the file names."""
        return self._values["architectures"][0]

    def base(
        self,
        *,
        head_dim: int | None = None,
        norm_eps: float = 1e-6,
        activation: str = "silu",
        activation_field: str = "hidden_act",
        tied: bool = False,
    ) -> dict[str, Any]:
        """The fields that nearly every architecture has, as arguments of ModelConfig.

        Args:
            head_dim: default; None: hidden_size over heads. norm_eps, activation, tied: other defaults.
            activation_field: name of the field that names the activation function.
        """
        num_heads = self.size("num_attention_heads")
        hidden_size = self.size("hidden_size")
        num_kv_heads = self.size("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            self.problem(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
        return {
            "architecture": self.architecture,
            "vocab_size": self.size("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": self.size("intermediate_size"),
            "num_hidden_layers": self.size("num_hidden_layers"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": self.size("head_dim", head_dim or max(hidden_size // num_heads, 1)),
            "max_position_embeddings": self.size("max_position_embeddings", 2048),
            "norm_eps": self.number("rms_norm_eps", norm_eps),
            "activation": self.choice(activation_field, ACTIVATIONS, activation),
            "tie_word_embeddings": self.flag("tie_word_embeddings", tied),
        }

    def finish(self, **fields: Any) -> ModelConfig:
        """The config, if nothing was wrong.

        Raises:
            ConfigError: fields are missing or of no use; all of them are named.
        """
        for name, allowed in _REFUSED.items():
            if name not in self._seen:
                self.only(name, *allowed)
        if self._problems:
            raise ConfigError("config.json: " + "; ".join(self._problems))
        if unknown := sorted(name for name in self._values if name not in self._seen):
            _log.warning("config.json: no part of %s, ignored: %s", fields["architecture"], ", ".join(unknown))
        return ModelConfig(**fields)


def _shown(value: Any) -> str:
    return repr(value)[:80]
