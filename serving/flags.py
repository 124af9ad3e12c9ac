"""Command line flags made from dataclass fields, and readable answers to wrong ones.

Called by the commands. Each command has a flag set of its own; absl's global one is left alone. Dashes and
underscores are the same: `--max-model-len` and `--max_model_len`, `--no-page` and `--nopage`.
"""

import dataclasses
import difflib
import re
import shlex
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from jax_engine import SamplingParams

_SAMPLING_HELP = {
    "n": "Completions per prompt.",
    "presence_penalty": "In [-2, 2]; above 0 discourages tokens already in the output.",
    "frequency_penalty": "In [-2, 2]; above 0 discourages tokens the more, the more often they are in the output.",
    "repetition_penalty": "In (0, 2]; above 1 discourages tokens already in prompt or output.",
    "temperature": "0 is greedy.",
    "top_p": "In (0, 1]: smallest set of tokens that holds this share of the probability.",
    "top_k": "Most likely tokens to choose from; 0 for all.",
    "min_p": "In [0, 1]: no token less likely than this share of the most likely one.",
    "stop": "Text that ends the output; may be repeated.",
    "stop_token_ids": "Token ids that end the output, comma-separated.",
    "include_stop_str_in_output": "Leave the stop text in the output.",
    "ignore_eos": "Go on after an end-of-sequence token.",
    "max_tokens": "Most tokens of output; `none` for as many as fit.",
    "min_tokens": "No end before this many tokens.",
    "logprobs": "With --json: how many of the most likely tokens to report.",
    "prompt_logprobs": "With --json: the same for the prompt's tokens.",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "bad_words": "Texts that the output must not hold, comma-separated.",
    "allowed_token_ids": "The only tokens that may be chosen, comma-separated.",
    "truncate_prompt_tokens": "Keep only so many of the prompt's last tokens; -1: as many as leave room for output.",
}

#: Decided by the command itself, or of no use on a command line. The engine's own seed is the one of these requests.
NOT_SAMPLING_FLAGS = ("seed", "detokenize", "output_kind", "logit_bias", "structured_outputs")


class UsageError(Exception):
    """The command line is wrong; the message is one line."""


class _OptionalInt(flags.ArgumentParser[int | None]):
    """An integer, or `none`."""

    syntactic_help = "an integer or none"

    def parse(self, argument: Any) -> int | None:
        if argument is None or (isinstance(argument, str) and argument.lower() == "none"):
            return None
        return int(argument)


class _TupleParser(flags.ArgumentParser[tuple]):
    """A comma list; an empty text is an empty list."""

    syntactic_help = "a comma-separated list"

    def __init__(self, item: type):
        self._item = item

    def parse(self, argument: Any) -> tuple:
        if not isinstance(argument, str):
            return tuple(argument)
        return tuple(self._item(part.strip()) for part in argument.split(",") if part.strip())


class _TupleSerializer(flags.ArgumentSerializer[tuple]):
    def serialize(self, value: tuple) -> str:
        return ",".join(map(str, value))


def define(flag_values: flags.FlagValues, kind: type, *, help: Mapping[str, str] | None = None, group: str) -> None:
    """One flag per field of a dataclass, with the field's default.

    Args:
        kind: the dataclass; its fields' metadata hold `help`, unless `help` does. A field without is no flag.
        group: the heading in the help listing.

    Raises:
        TypeError: a field has a type that no flag can hold.
    """
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        text = help.get(item.name) if help is not None else item.metadata["help"]
        if text is not None:
            _define(
                hints[item.name], name=item.name, default=item.default, help=text, flag_values=flag_values, group=group
            )


def define_sampling(flag_values: flags.FlagValues) -> None:
    """Flags for the fields of SamplingParams that make sense on a command line."""
    define(flag_values, SamplingParams, help=_SAMPLING_HELP, group="Sampling")


def _define(hint: Any, *, group: str, **args: Any) -> None:
    args["module_name"] = group
    members = [part for part in typing.get_args(hint) if part is not type(None)] if _is_union(hint) else [hint]
    optional = _is_union(hint) and type(None) in typing.get_args(hint)
    kind = members[-1]
    origin = typing.get_origin(kind)
    if kind is bool:
        flags.DEFINE_boolean(**args)
    elif kind is int and optional:
        flags.DEFINE(_OptionalInt(), serializer=flags.ArgumentSerializer(), **args)
    elif kind is int:
        flags.DEFINE_integer(**args)
    elif kind is float:
        flags.DEFINE_float(**args)
    elif kind is str and len(members) == 1:
        flags.DEFINE_string(**args)
    elif str in members:  # one text or several
        flags.DEFINE_multi_string(**args)
    elif origin is not None and issubclass(origin, Sequence):
        flags.DEFINE(_TupleParser(typing.get_args(kind)[0]), serializer=_TupleSerializer(), **args)
    else:
        raise TypeError(f"no flag can hold {args['name']}: {hint}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def parse(flag_values: flags.FlagValues, command: str, argv: Sequence[str]) -> list[str]:
    """Reads the arguments after the command's name.

    Returns:
        What is no flag.

    Raises:
        UsageError: an unknown flag or a value that does not fit.
    """
    try:
        return flag_values([command, *_underscored(flag_values, argv)])[1:]
    except flags.UnrecognizedFlagError as error:
        hint = nearest(error.flagname.replace("-", "_"), list(flag_values), "--")
        raise UsageError(f"unknown flag --{error.flagname} (see `{command} --help`){hint}") from None
    except flags.Error as error:
        raise UsageError(_in_words(" ".join(str(error).split()))) from None


def _in_words(message: str) -> str:
    """What Python says of a text that is no number, as a user would say it."""
    message = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", message)
    return re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", message)


def values(flag_values: flags.FlagValues, kind: type) -> dict[str, Any]:
    """The fields of a dataclass whose flags were given."""
    return {
        item.name: flag_values[item.name].value
        for item in dataclasses.fields(kind)
        if item.name in flag_values and flag_values[item.name].present
    }


def non_defaults(flag_values: flags.FlagValues) -> str:
    """The flags whose values differ from their defaults, as a command line gives them."""
    found = (flag_values[name] for name in flag_values)
    return shlex.join(flag.serialize() for flag in found if flag.value != flag.default)


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """`; did you mean ...?`, or nothing when no known name is near."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def listing(flag_values: flags.FlagValues) -> str:
    """All flags with defaults and help, by group."""
    lines = []
    for group, members in flag_values.flags_by_module_dict().items():
        lines.append(f"\n{group}:")
        for flag in members:
            default = _as_given(flag.default)
            lines.append(f"  --{'[no]' if flag.boolean else ''}{flag.name}" + (f" [{default}]" if default else ""))
            lines += textwrap.wrap(flag.help or "", 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _as_given(default: Any) -> str:
    """A default as a command line would give it; empty where there is none."""
    if isinstance(default, list | tuple):
        return ",".join(map(str, default))
    return "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _underscored(flag_values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Flags that are known when written with underscores, or with no- before them, are written as absl has them; values
    stay as they are."""
    known = set(flag_values)
    result = []
    for index, argument in enumerate(argv):
        if argument == "--":
            return [*result, *argv[index:]]
        name, equals, value = argument.partition("=")
        plain = name.lstrip("-").replace("-", "_")
        positive = re.sub("^no_?", "", plain)
        if name.startswith("-") and (plain in known or positive in known):
            argument = f"--{plain if plain in known else f'no{positive}'}{equals}{value}"
        result.append(argument)
    return result
