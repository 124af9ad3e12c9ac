"""The frequencies of rotary positions (arXiv 2104.09864) under every known way of scaling them to longer contexts.

`read_rope` turns one object of a Hugging Face config into plain numbers; hf_config.py calls it. Never imports jax.
"""

import math
from collections.abc import Mapping
from typing import Any

from jax_engine.model_config import Rope

#: Fields that each kind may have besides those of all kinds.
_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        "original_max_position_embeddings",
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"},
}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


def read_rope(fields: Mapping[str, Any], head_dim: int, max_positions: int) -> tuple[Rope, list[str]]:
    """Rotary positions from the fields of `rope_parameters` (transformers 5) or `rope_scaling` (4).

    Args:
        head_dim: size of a head. max_positions: the model's longest context.

    Returns:
        The positions, and what is wrong with the fields.
    """
    kind = fields.get("rope_type", fields.get("type", "default"))
    if not isinstance(kind, str) or kind not in _FIELDS:
        return Rope(frequencies=()), [f"rope type {kind!r} is not supported; supported: {', '.join(_FIELDS)}"]
    problems = [f"rope type {kind}: field {name} is not known" for name in fields if _unknown(name, kind)]
    reader = _Reader(fields, kind, problems)
    theta, partial = reader.number("rope_theta"), reader.number("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        problems.append(f"rotary positions need an even part of the head, got {rotary_dim} of {head_dim} dimensions")
    if problems:
        return Rope(frequencies=()), problems
    plain = [theta ** (-i / rotary_dim) for i in range(0, rotary_dim, 2)]
    original = reader.number("original_max_position_embeddings", max_positions)
    if kind == "linear":
        factor = reader.number("factor")
        rope = Rope(frequencies=tuple(frequency / factor for frequency in plain))
    elif kind == "llama3":
        rope = _llama3(reader, plain, original)
    elif kind == "yarn":
        rope = _yarn(reader, plain, theta, original, max_positions)
    elif kind == "longrope":
        rope = _longrope(reader, plain, original, max_positions)
    else:
        # `dynamic` changes nothing before max_position_embeddings, and no sequence gets longer than that here.
        rope = Rope(frequencies=tuple(plain))
    return rope, problems


def _unknown(name: str, kind: str) -> bool:
    if name == "original_max_position_embeddings":
        return False  # some configs say it whatever the kind
    return name not in _COMMON and name not in _FIELDS[kind]


class _Reader:
    """Reads numbers and notes what is wrong."""

    def __init__(self, fields: Mapping[str, Any], kind: str, problems: list[str]):
        self._fields, self._kind, self._problems = fields, kind, problems

    def get(self, name: str) -> Any:
        return self._fields.get(name)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._fields.get(name, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        self._problems.append(f"rope type {self._kind}: {name} must be a positive number, got {str(value)[:80]}")
        return 1.0

    def numbers(self, name: str, count: int) -> list[float]:
        value = self._fields.get(name)
        if (
            isinstance(value, list)
            and len(value) == count
            and all(isinstance(each, int | float) and each > 0 for each in value)
        ):
            return [float(each) for each in value]
        self._problems.append(f"rope type {self._kind}: {name} must be a list of {count} positive numbers")
        return [1.0] * count


def _llama3(reader: _Reader, plain: list[float], original: float) -> Rope:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones are not, those between in part."""
    factor, low, high = (reader.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))

    def scale(frequency: float) -> float:
        turns = original * frequency / (2 * math.pi)
        share = min(max((turns - low) / (high - low), 0.0), 1.0) if high != low else float(turns > low)
        return frequency * (share + (1 - share) / factor)

    return Rope(frequencies=tuple(map(scale, plain)))


def _yarn(reader: _Reader, plain: list[float], theta: float, original: float, max_positions: int) -> Rope:
    """YaRN (arXiv 2309.00071): interpolates the slow dimensions, keeps the fast ones, and sharpens attention."""
    factor = reader.number("factor", max_positions / original)
    size = 2 * len(plain)

    def turning_dimension(turns: float) -> float:
        """The dimension that turns this many times over the original context."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = turning_dimension(reader.number("beta_fast", 32.0))
    high = turning_dimension(reader.number("beta_slow", 1.0))
    if reader.get("truncate") is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high if high != low else high + 0.001

    def scale(index: int, frequency: float) -> float:
        interpolated = min(max((index - low) / (high - low), 0.0), 1.0)
        return frequency * (interpolated / factor + 1 - interpolated)

    amplitude = reader.get("attention_factor")
    if amplitude is None:
        mscale, all_dim = reader.get("mscale"), reader.get("mscale_all_dim")
        if mscale and all_dim:
            amplitude = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
        else:
            amplitude = yarn_mscale(factor, 1.0)
    return Rope(frequencies=tuple(scale(i, f) for i, f in enumerate(plain)), amplitude=float(amplitude))


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature: by how much attention is sharpened for a context `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(reader: _Reader, plain: list[float], original: float, max_positions: int) -> Rope:
    """LongRoPE (arXiv 2402.13753): a divisor for each dimension, one set for short and one for long contexts."""
    short, long = (reader.numbers(name, len(plain)) for name in ("short_factor", "long_factor"))
    factor = reader.number("factor", max_positions / original)
    amplitude = reader.get("attention_factor")
    if amplitude is None:
        amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(
        frequencies=tuple(frequency / divisor for frequency, divisor in zip(plain, short, strict=True)),
        long_frequencies=tuple(frequency / divisor for frequency, divisor in zip(plain, long, strict=True)),
        short_length=int(original),
        amplitude=float(amplitude),
    )
