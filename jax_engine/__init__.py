"""Asynchronous continuous batching for large language models in JAX.

Everything that users import is here; the modules below may move. What needs jax or heavy libraries is imported on first
use, so that reading the configuration, checking sampling parameters and `jax-engine --help` stay quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jax_engine.config import EngineConfig, Limits
from jax_engine.errors import ConfigError, EngineError, EngineStopped, InvalidRequest, QueueFull, SlowReader
from jax_engine.request import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from checkpoints.errors import CheckpointError
    from jax_engine.async_engine import AsyncEngine
    from jax_engine.llm import LLM
    from jax_engine.tokenizer import ChatTemplateError

__all__ = [
    "LLM",
    "AsyncEngine",
    "ChatTemplateError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineError",
    "EngineStopped",
    "FinishReason",
    "InvalidRequest",
    "Limits",
    "Logprob",
    "QueueFull",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SlowReader",
    "StructuredOutputsParams",
]

_LAZY = {
    "AsyncEngine": "jax_engine.async_engine",
    "LLM": "jax_engine.llm",
    "CheckpointError": "checkpoints.errors",
    "ChatTemplateError": "jax_engine.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jax_engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
