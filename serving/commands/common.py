"""What the commands that run a model share: the model argument, help, logging, building the engine.

Imports jax only inside build_engine, after the first line is on the screen.
"""

import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from jax_engine import EngineConfig
from serving import flags

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

log = logging.getLogger("serving")

LOG_LEVELS = ("debug", "info", "warning", "error")


def engine_flags(*, log_level: str) -> absl_flags.FlagValues:
    """A flag set with the engine's flags, --log_level and --help."""
    flag_values = absl_flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "General"}
    absl_flags.DEFINE_boolean("help", False, "This listing.", short_name="h", **here)
    absl_flags.DEFINE_enum("log_level", log_level, LOG_LEVELS, "Of the log on stderr.", **here)
    flags.define(flag_values, EngineConfig, group="Engine")
    return flag_values


def parse(flag_values: absl_flags.FlagValues, command: str, about: str, argv: Sequence[str]) -> bool:
    """Reads the arguments and sets up logging.

    Returns:
        False when only help was asked for, and has been printed.

    Raises:
        UsageError: the command line is wrong.
    """
    positional = flags.parse(flag_values, f"jax-engine {command}", argv)
    if flag_values["help"].value:
        print(f"usage: jax-engine {command} [MODEL] [--flag=value ...]\n\n{about}\n{flags.listing(flag_values)}")
        return False
    if len(positional) > 1 or (positional and flag_values["model"].present):
        raise flags.UsageError(f"one model is expected, got {' '.join(positional)!r} beside the flags")
    if positional:
        flag_values["model"].parse(positional[0])
        flag_values["model"].using_default_value = False
    logging.basicConfig(
        level=str(flag_values["log_level"].value).upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if flag_values["log_level"].value == "info":
        # Says at this level which platforms it did not find.
        logging.getLogger("jax").setLevel(logging.WARNING)
    return True


def engine_config(flag_values: absl_flags.FlagValues) -> EngineConfig:
    """The engine's configuration.

    Raises:
        ConfigError: a value is out of range.
    """
    return EngineConfig(**flags.values(flag_values, EngineConfig))


def build_engine(config: EngineConfig, non_defaults: dict[str, Any]) -> "AsyncEngine":
    """Loads the model and compiles its steps; takes seconds to minutes.

    Raises:
        ConfigError, CheckpointError: the model cannot be served.
    """
    log.info("starting %s; flags: %s", config.model, _shown(non_defaults) or "all at their defaults")
    start = time.monotonic()
    from jax_engine import AsyncEngine

    engine = AsyncEngine(config)
    log.info("ready in %.1f s", time.monotonic() - start)
    return engine


def _shown(values: dict[str, Any]) -> str:
    return " ".join(f"--{name}={value}" for name, value in values.items())
