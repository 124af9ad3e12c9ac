"""A server under test in a process of its own, on the loopback interface."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks import report
from jax_engine import ConfigError

POLL_S = 0.05


class ServerProcess(NamedTuple):
    """A server that accepts requests. seconds: from the process's beginning until then. log: reads what it has said."""

    pid: int
    url: str
    seconds: float
    log: Callable[[], str]


@contextlib.contextmanager
def running(words: Sequence[str]) -> Iterator[ServerProcess]:
    """`jax-engine serve` with the flags `words` on a free port, ended with the context.

    Raises:
        ConfigError: it ended before it served.
    """
    with tempfile.TemporaryFile("w+") as file:

        def log() -> str:
            file.seek(0)
            return file.read()

        command = [sys.executable, "-m", "serving.cli", "serve", "--port=0", *words]
        path = os.pathsep.join((str(report.ROOT), os.environ.get("PYTHONPATH", "")))
        started = time.perf_counter()
        process = subprocess.Popen(command, stderr=file, cwd=report.ROOT, env=os.environ | {"PYTHONPATH": path})
        try:
            while (found := re.search(r"serving \S+ at (http://\S+)", log())) is None:
                if process.poll() is not None:
                    raise ConfigError(f"the server did not start:\n{log()}")
                time.sleep(POLL_S)
            yield ServerProcess(process.pid, found[1], time.perf_counter() - started, log)
        finally:
            process.terminate()
            process.wait(60)
