"""`jax-engine bench` and `jax-engine bench serve`: hand their arguments to programs in benchmarks/, which lies in the
source folder only."""

import importlib
import importlib.util
from collections.abc import Sequence

from absl import flags as absl_flags

from jax_engine import ConfigError
from serving import flags


def run(argv: Sequence[str]) -> int:
    """Runs a benchmark: the offline one, or with `serve` as first word load on a server. See cli.main for what it
    raises and returns."""
    serve = list(argv[:1]) == ["serve"]
    module, command = (
        ("benchmarks.serve", "jax-engine bench serve") if serve else ("benchmarks.offline", "jax-engine bench")
    )
    if not _found(module):
        raise ConfigError("the benchmarks are not installed; run this from the source folder of jax-engine")
    try:
        return importlib.import_module(module).main([command, *argv[serve:]])
    except absl_flags.Error as error:
        raise flags.UsageError(" ".join(str(error).split())) from None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
