"""What the commands that run a model share: the model argument, help, logging, building the engine.

Imports jax only inside build_engine, after the first line is on the screen.
"""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from jax_engine import EngineConfig
from serving import flags, logs
from serving.cli import COMMANDS

if TYPE_CHECKING:
    from jax_engine import AsyncEngine
    from jax_engine.planning.cost_model import CostModel
    from jax_engine.planning.trace import TraceRequest

log = logging.getLogger("serving")

LOG_LEVELS = ("debug", "info", "warning", "error")


def engine_flags(*, log_level: str) -> absl_flags.FlagValues:
    """A flag set with the engine's flags, and what general_flags has."""
    flag_values = general_flags(log_level=log_level)
    flags.define(flag_values, EngineConfig, group="Engine")
    return flag_values


def general_flags(*, log_level: str) -> absl_flags.FlagValues:
    """A flag set with --help and the log's flags."""
    flag_values = absl_flags.FlagValues()
    here = {"flag_values": flag_values, "module_name": "General"}
    absl_flags.DEFINE_boolean("help", False, "This listing.", short_name="h", **here)
    absl_flags.DEFINE_enum("log_level", log_level, LOG_LEVELS, "Of the log on stderr.", **here)
    absl_flags.DEFINE_enum("log_format", "text", logs.FORMATS, "Lines of text, or one JSON object each.", **here)
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
        hint = "; a text to continue is given with --prompt" if "prompt" in flag_values else ""
        raise flags.UsageError(f"one model is expected, got {' '.join(positional)!r} beside the flags{hint}")
    if positional:
        flag_values["model"].parse(positional[0])
        flag_values["model"].using_default_value = False
    logs.set_up(str(flag_values["log_level"].value), str(flag_values["log_format"].value))
    return True


def tool_flags() -> absl_flags.FlagValues:
    """A flag set for a command that runs no model: --help only."""
    flag_values = absl_flags.FlagValues()
    absl_flags.DEFINE_boolean(
        "help", False, "This listing.", short_name="h", flag_values=flag_values, module_name="General"
    )
    return flag_values


def parse_tool(
    flag_values: absl_flags.FlagValues, command: str, argument: str | None, argv: Sequence[str]
) -> str | None:
    """Reads the arguments of a command that runs no model.

    Args:
        argument: what the one argument that is no flag is called; None where there is none.

    Returns:
        That argument, or an empty text where there is none; None when only help was asked for, and has been printed.

    Raises:
        UsageError: the command line is wrong.
    """
    positional = flags.parse(flag_values, f"jax-engine {command}", argv)
    if flag_values["help"].value:
        words = [command, argument or "", "[--flag=value ...]"]
        print(f"usage: jax-engine {' '.join(filter(None, words))}\n\n{COMMANDS[command]}\n{flags.listing(flag_values)}")
        return None
    if len(positional) != (argument is not None):
        wanted = f"one {argument}" if argument else "only flags"
        given = repr(" ".join(positional)) if positional else "none"
        raise flags.UsageError(f"{command}: {wanted} expected, got {given}")
    return positional[0] if argument else ""


def options(flag_values: absl_flags.FlagValues) -> dict[str, Any]:
    """Every flag's value by its name."""
    return {name: flag_values[name].value for name in flag_values}


def planning_flags() -> absl_flags.FlagValues:
    """What `simulate` and `plan` have in common: trace, cost model and the engine's flags."""
    flag_values = tool_flags()
    here = {"flag_values": flag_values, "module_name": "Planning"}
    absl_flags.DEFINE_string("trace", None, "Trace to read; see `jax-engine trace`.", **here)
    absl_flags.DEFINE_string("model_cost", None, "Cost model to read; see `jax-engine fit`.", **here)
    flags.define(flag_values, EngineConfig, group="Engine; the default is what the measured engine had")
    return flag_values


def trace_and_cost(flag_values: absl_flags.FlagValues, command: str) -> "tuple[list[TraceRequest], CostModel]":
    """Reads both files.

    Raises:
        UsageError: one was not given. ConfigError: one cannot be read.
    """
    from jax_engine.planning import cost_model, trace

    given = options(flag_values)
    for name in ("trace", "model_cost"):
        if given[name] is None:
            raise flags.UsageError(f"{command}: --{name} is missing")
    return trace.read(given["trace"]), cost_model.read(given["model_cost"])


def engine_config(flag_values: absl_flags.FlagValues) -> EngineConfig:
    """The engine's configuration.

    Raises:
        ConfigError: a value is out of range.
    """
    return EngineConfig(**flags.values(flag_values, EngineConfig))


def build_engine(config: EngineConfig, given: str) -> "AsyncEngine":
    """Loads the model and compiles its steps; takes seconds to minutes. `given`: flags, for the log.

    Raises:
        ConfigError, CheckpointError: the model cannot be served.
    """
    log.info("starting %s; flags: %s", config.model, given or "all at their defaults")
    start = time.monotonic()
    from jax_engine import AsyncEngine

    engine = AsyncEngine(config)
    log.info("ready in %.1f s", time.monotonic() - start)
    return engine
