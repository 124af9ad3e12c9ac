"""`jax-engine bench`: hands its arguments to benchmarks.offline, which lies in the source folder only."""

import importlib
import importlib.util
from collections.abc import Sequence

from absl import flags as absl_flags

from jax_engine import ConfigError
from serving import flags


def run(argv: Sequence[str]) -> int:
    """Runs the offline benchmark. See cli.main for what it raises and returns."""
    if not _found("benchmarks.offline"):
        raise ConfigError("the benchmarks are not installed; run this from the source folder of jax-engine")
    try:
        return importlib.import_module("benchmarks.offline").main(["jax-engine bench", *argv])
    except absl_flags.Error as error:
        raise flags.UsageError(" ".join(str(error).split())) from None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
