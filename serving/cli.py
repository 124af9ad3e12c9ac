"""The `jax-engine` command: finds the subcommand and turns expected failures into one line and an exit code.

0: done. 1: it failed. 2: the command line is wrong. 130: interrupted. jax is imported only by commands that run a
model.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

import jax_engine
from jax_engine import EngineError
from serving import flags

COMMANDS = {
    "serve": "Serve a model over HTTP, with the OpenAI protocol.",
    "generate": "Continue prompts given on the command line or in a file.",
    "chat": "Talk to a model in the terminal.",
    "convert": "Write a model as an Orbax checkpoint, for quick and parallel loading.",
    "bench": "Measure throughput offline; `bench serve` puts load on a server.",
    "replay": "Check that the decisions of a step log are made again.",
    "trace": "Make a trace of requests, or take one from a step log.",
    "fit": "Fit a cost model from a step log.",
    "simulate": "Predict what an engine would do with a trace.",
    "plan": "Find the cheapest configuration that meets latency targets.",
    "compile": "Compile a model's steps for a device that is not here, and say what fits.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; those of the process when None.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("", "help", "--help", "-h", "-help"):
        print(_overview())
        return 0 if command else 2
    if command == "--version":
        print(f"jax-engine {metadata.version('jax-engine')}")
        return 0
    try:
        if command not in COMMANDS:
            hint = flags.nearest(command, list(COMMANDS))
            raise flags.UsageError(f"unknown command {command!r}{hint or '; known: ' + ', '.join(COMMANDS)}")
        return importlib.import_module(f"serving.commands.{command}").run(rest)
    except flags.UsageError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return _fail("the output was closed", 1)
    except EngineError as error:
        return _fail(error, 1)
    except jax_engine.CheckpointError as error:
        return _fail(error, 1)


def _fail(error: object, code: int) -> int:
    print(f"jax-engine: {error}", file=sys.stderr)
    return code


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jax-engine COMMAND [MODEL] [--flag=value ...]",
            "",
            *lines,
            "",
            "`jax-engine COMMAND --help` lists the flags of a command; `jax-engine --version` says which this is.",
            "Flags may be written with - or with _; --no-NAME is --NAME=false.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
