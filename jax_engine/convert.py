"""convert: any checkpoint to one of this project's own, whose parameters are stored as the model holds them.

Called by `jax-engine convert`. Works on the CPU whatever other devices there are; makes no cache and compiles no step.
"""

import logging
import math
import time
from pathlib import Path

import jax

from checkpoints import orbax_io
from checkpoints.formats import Checkpoint, open_checkpoint
from checkpoints.loader import load
from checkpoints.quantized_weight import FORMATS, split
from jax_engine.errors import ConfigError
from jax_engine.models import read_config
from jax_engine.program import ModelProgram

_log = logging.getLogger(__name__)

_FLOATS = ("float32", "bfloat16", "float16")


def convert(
    model: str,
    out: str | Path,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    tokenizer: str | None = None,
) -> Path:
    """Writes an Orbax checkpoint with config and tokenizer; the folder appears whole or not at all.

    Args:
        model, tokenizer: as in EngineConfig.
        out: a folder that does not exist yet.
        dtype: of the stored weights. auto: that of the source, or float32 where the source is quantised, so that
            nothing is lost.
        quantization: int8 or fp8: factors of products are stored in 8 bits, made of weights of `dtype`.

    Returns:
        The folder.

    Raises:
        ConfigError, CheckpointError: the model cannot be read, or the folder cannot be written.
    """
    folder = Path(out).absolute()
    if folder.exists():
        raise ConfigError(f"out: {folder} exists already; name a new folder")
    if dtype not in ("auto", *_FLOATS):
        raise ConfigError(f"dtype must be one of auto, {', '.join(_FLOATS)}; got {dtype!r}")
    if quantization not in (None, *FORMATS):
        raise ConfigError(f"quantization must be one of {', '.join(FORMATS)}; got {quantization!r}")
    started = time.monotonic()
    checkpoint = open_checkpoint(model, tokenizer=tokenizer)
    if checkpoint.format == "orbax":
        raise ConfigError(f"model: {checkpoint.path} is an Orbax checkpoint already")
    dtype = _stored_dtype(checkpoint) if dtype == "auto" else dtype
    model_config, devices = read_config(checkpoint.config), jax.devices("cpu")[:1]
    program = ModelProgram(model_config, dtype, devices, quantization=quantization)
    params = load(program.renamed(checkpoint), program.wanted, ignore=program.ignored_tensors)
    params = split(params)
    orbax_io.save(
        folder,
        params,
        config=checkpoint.config,
        generation_config=checkpoint.generation_config,
        tokenizer_files=checkpoint.tokenizer_files,
    )
    size = sum(array.nbytes for array in params.values())
    kind = f"{dtype}, {quantization}" if quantization else dtype
    _log.info("%s: %s, %.2f GiB, in %.1f s", folder, kind, size / 2**30, time.monotonic() - started)
    return folder


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The type of the largest tensor, if it is one that weights can have."""
    largest = max(checkpoint.tensors.values(), key=lambda info: math.prod(info.shape))
    stored = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(largest.dtype, largest.dtype)
    return stored if stored in _FLOATS else "float32"
