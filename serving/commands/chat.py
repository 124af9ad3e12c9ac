"""`jax-engine chat`: a conversation in the terminal, or one turn per line of a pipe.

Ctrl-C stops the current answer, which stays in the history as far as it came; at the prompt it ends the command.
"""

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from jax_engine import ConfigError, InvalidRequest, RequestOutputKind, SamplingParams
from serving import flags
from serving.cli import COMMANDS
from serving.commands import common

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

_HELP = "/reset forgets the conversation, /exit ends it"


def run(argv: Sequence[str]) -> int:
    """Talks until /exit or the end of input. See cli.main for what it raises and returns."""
    flag_values = common.engine_flags(log_level="warning")
    absl_flags.DEFINE_string(
        "system", None, "Message that opens it.", flag_values=flag_values, module_name="Conversation"
    )
    flags.define_sampling(flag_values)
    flag_values.set_default("max_tokens", None)
    if not common.parse(flag_values, "chat", COMMANDS["chat"], argv):
        return 0
    chosen = {"max_tokens": None, **flags.values(flag_values, SamplingParams)}
    if chosen.pop("n", 1) != 1:
        raise flags.UsageError("a conversation has one answer per turn: --n must be 1")
    params = SamplingParams(**chosen, output_kind=RequestOutputKind.DELTA)
    engine = common.build_engine(common.engine_config(flag_values), flags.non_defaults(flag_values))
    params = dataclasses.replace(params, **{**engine.sampling_defaults, **chosen})
    try:
        if engine.tokenizer is None:
            raise ConfigError(f"the model {engine.model_name} has no tokenizer, so it cannot chat")
        with asyncio.Runner() as runner:
            Conversation(engine, params, flag_values["system"].value).talk(runner)
    finally:
        engine.shutdown()
    return 0


class Conversation:
    """The messages so far.

    Args:
        engine: has a tokenizer.
        params: of every answer; output_kind DELTA.
        system: the system message, or None.
    """

    def __init__(self, engine: "AsyncEngine", params: SamplingParams, system: str | None):
        self._engine, self._params = engine, params
        self._tokenizer: Any = engine.tokenizer
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, Any]] = list(self._opening)

    def talk(self, runner: asyncio.Runner) -> None:
        """Reads turns from stdin until it ends or says /exit."""
        if sys.stdin.isatty():
            print(f"{self._engine.model_name}: {_HELP}")
        while (line := _read_line()) is not None:
            text = line.strip()
            if text == "/exit":
                return
            if text == "/reset":
                self.messages = list(self._opening)
            elif text.startswith("/"):
                print(f"unknown command {text}; {_HELP}")
            elif text:
                self._turn(runner, text)

    def _turn(self, runner: asyncio.Runner, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            runner.run(self._answer(pieces))
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        except InvalidRequest as error:  # forget the turn that cannot be answered
            self.messages.pop()
            print(f"{error}; {_HELP}")
            return
        print()
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    async def _answer(self, pieces: list[str]) -> None:
        """Prints the answer as it comes; `pieces` holds what came, also when it is stopped."""
        prompt = self._tokenizer.chat_prompt(self.messages, add_generation_prompt=True).token_ids
        outputs = self._engine.generate(prompt, self._params)
        async with contextlib.aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                if output.error is not None:
                    raise InvalidRequest(output.error)
                for completion in output.outputs:
                    pieces.append(completion.text)
                    print(completion.text, end="", flush=True)


def _read_line() -> str | None:
    """The next turn; None at the end of input."""
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            return input("> ")
        print()
        return None
    return sys.stdin.readline() or None
