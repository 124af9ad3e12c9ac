"""What makes a module of this folder a program: flags with --help, and one line instead of a traceback.

benchmarks.offline is a command of `jax-engine` and needs none of this.
"""

import sys
from collections.abc import Callable, Sequence

from absl import flags as absl_flags

from jax_engine import ConfigError
from serving import flags


def parse(flag_values: absl_flags.FlagValues, name: str, about: str | None, argv: Sequence[str]) -> bool:
    """Reads the arguments. False when only help was asked for, and has been printed.

    Raises:
        UsageError: an unknown flag, a value that does not fit, or an argument that is no flag.
    """
    absl_flags.DEFINE_boolean("help", False, "This listing.", flag_values=flag_values, module_name=name)
    others = flags.parse(flag_values, name, argv)
    if flag_values["help"].value:
        print(f"usage: python -m {name} [--flag=value ...]\n\n{about}\n{flags.listing(flag_values)}")
        return False
    if others:
        raise flags.UsageError(f"only flags are expected, got {' '.join(others)!r}")
    return True


def read[Options](kind: type[Options], name: str, about: str | None, argv: Sequence[str]) -> Options | None:
    """The arguments of a program whose flags are the fields of a dataclass. None when only help was asked for.

    Raises:
        UsageError: see parse.
    """
    flag_values = absl_flags.FlagValues()
    flags.define(flag_values, kind, group="Benchmark")
    return kind(**flags.values(flag_values, kind)) if parse(flag_values, name, about, argv) else None


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Runs a program's main with the process's arguments and exits."""
    try:
        sys.exit(main(sys.argv))
    except flags.UsageError as error:
        code, message = 2, error
    except ConfigError as error:
        code, message = 1, error
    print(f"{sys.argv[0]}: {message}", file=sys.stderr)
    sys.exit(code)
