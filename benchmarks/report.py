"""What every benchmark writes down beside its numbers, and how numbers are shown.

A result without its machine, versions, commit and command cannot be compared with another; `document` adds them.
"""

import datetime
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from jax_engine.text_table import table as table

ROOT = Path(__file__).resolve().parent.parent
PERCENTILES = (50, 90, 99)


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """p50, p90, p99, mean and maximum; None where there are no values."""
    array = np.fromiter(values, np.float64)
    if not array.size:
        return None
    marks = {f"p{mark}": float(np.percentile(array, mark)) for mark in PERCENTILES}
    return marks | {"mean": float(array.mean()), "max": float(array.max())}


def document(program: str, argv: Sequence[str], **fields: Any) -> dict[str, Any]:
    """The head of a results file (date, command, commit, versions, processor), followed by `fields`."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python -m {program} {shlex.join(argv[1:])}".strip(),
        "git": _git_state(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("jax-engine", "jax", "jaxlib", "numpy")},
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count()},
        **fields,
    }


def jax_device() -> dict[str, Any]:
    """What jax runs on."""
    import jax  # Not at the top: the scheduler benchmark runs without it.

    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


def write(path: str, results: Mapping[str, Any]) -> None:
    """Writes a results file, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(results, indent=1, sort_keys=False) + "\n")
    partial.replace(target)
    print(f"wrote {target}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """The commit, and whether tracked files differ from it; None outside a checkout."""
    try:
        commit, status = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
