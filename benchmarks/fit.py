"""What `jax-engine compile` says, kept as a results file: the memory, the seconds, or the reason of a refusal.

    python -m benchmarks.fit --out=FILE.json --model=llama-3.1-8b --target=v6e:1x1 [--flag=value ...]

All flags but --out are those of `jax-engine compile`. Nothing is run and no device is needed; the seconds are of the
machine that compiles.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from benchmarks import program, report
from serving.flags import UsageError


def main(argv: Sequence[str]) -> int:
    """Compiles, writes the file, and prints what was found. A refusal is a result too."""
    outs = [argument.removeprefix("--out=") for argument in argv[1:] if argument.startswith("--out=")]
    if len(outs) != 1:
        raise UsageError("--out=FILE.json is missing")
    options = [argument for argument in argv[1:] if not argument.startswith("--out=")]
    command = [sys.executable, "-m", "serving.cli", "compile", *options, "--json"]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        print(done.stderr, end="", file=sys.stderr)
        return done.returncode
    found = {"compiled": json.loads(done.stdout)} if done.returncode == 0 else {"refused": done.stderr.strip()}
    load = os.getloadavg()[1]
    report.write(outs[0], report.document("benchmarks.fit", argv, libtpu=_libtpu(), load_5_min=load, **found))
    print(json.dumps(found, indent=1))
    return 0


def _libtpu() -> str | None:
    try:
        return version("libtpu")
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    program.run(main)
