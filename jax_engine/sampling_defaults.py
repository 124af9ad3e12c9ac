"""What a model's own generation_config.json says of sampling, for requests that do not say. Read once, by start.py."""

import logging
from collections.abc import Mapping
from typing import Any

from jax_engine.errors import InvalidRequest
from jax_engine.sampling_params import SamplingParams

_log = logging.getLogger(__name__)

#: Names in generation_config.json -> fields of SamplingParams; the same as vLLM takes over.
_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def read(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams -> the model's values; what is of no use is left out, with a warning."""
    defaults: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        value = generation_config.get(name)
        if value is None:
            continue
        try:
            SamplingParams(**{field: value})
        except (InvalidRequest, TypeError, ValueError) as error:
            _log.warning("generation_config.json: %s is left out: %s", name, error)
        else:
            defaults[field] = value
    return defaults
