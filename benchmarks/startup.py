"""Starts of a server, each in a process of its own: seconds until it serves, with what starts before it have kept.

    python -m benchmarks.startup --out=benchmarks/results/cpu_startup.json
    python -m benchmarks.startup --serve_flags="--model=llama-3.1-8b --load_format=dummy" --starts=empty,kept

Compiled and lowered programs are kept in a folder of this run, which is empty at first (see docs/operations.md). A
start is one of `empty`, with nothing kept; `kept`, with all that the starts before left; `compiled`, with jax's own
cache of compiled programs and without the lowered ones.
"""

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import program, report, server_process
from jax_engine import ConfigError

STARTS = ("empty", "kept", "compiled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Every field is a flag."""

    starts: tuple[str, ...] = dataclasses.field(
        default=("empty", "kept", "compiled", "kept"),
        metadata={"help": "One after the other: " + ", ".join(STARTS) + "."},
    )
    serve_flags: str = dataclasses.field(default="", metadata={"help": "Of the server, blank-separated."})
    out: str | None = dataclasses.field(default=None, metadata={"help": "Results file to write (JSON)."})


def main(argv: Sequence[str]) -> int:
    """Makes the starts, and prints a line for each."""
    options = program.read(Options, "benchmarks.startup", __doc__, argv[1:])
    if options is None:
        return 0
    for kind in options.starts:
        if kind not in STARTS:
            raise ConfigError(f"starts are of {', '.join(STARTS)}; got {kind!r}")
    with tempfile.TemporaryDirectory() as folder:
        starts = [_start(kind, Path(folder), options.serve_flags.split()) for kind in options.starts]
    print(report.table([list(starts[0]), *(list(map(str, start.values())) for start in starts)]))
    if options.out is not None:
        report.write(options.out, report.document("benchmarks.startup", argv, starts=starts))
    return 0


def _start(kind: str, folder: Path, words: Sequence[str]) -> dict[str, Any]:
    if kind == "empty":
        shutil.rmtree(folder)
    if kind == "compiled":
        shutil.rmtree(folder / "lowered", ignore_errors=True)
    with server_process.running([*words, f"--compilation_cache_dir={folder}"]) as server:
        return {"kind": kind, "serves_after_s": round(server.seconds, 1), **said(server.log())}


def said(log: str) -> dict[str, Any]:
    """What a server's log says of its start."""

    def find(pattern: str) -> tuple[str, ...]:
        found = re.search(pattern, log)
        if found is None:
            raise ConfigError(f"the server's log has nothing like {pattern!r}:\n{log}")
        return found.groups()

    programs, compile_s = find(r"compiled (\d+) programs in (\S+) s")
    [device] = find(r"replica\(s\) of \S+ on (.+?),")
    [ready_s] = find(r"engine ready in (\S+) s")
    return {
        "device": device,
        "programs": int(programs),
        "compile_s": float(compile_s),
        "engine_ready_after_s": float(ready_s),
    }


if __name__ == "__main__":
    program.run(main)
