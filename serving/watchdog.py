"""The watchdog: finds out that the engine is dead or hangs, says what every thread was doing, and has the process end.

A process that cannot serve must not stay: its supervisor (systemd, Kubernetes) can start a new one only when it ends.
Run by server.py beside the application.
"""

import asyncio
import contextlib
import faulthandler
import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

log = logging.getLogger("serving")

_POLL_S = 0.25


async def watch(engine: "AsyncEngine", step_timeout_s: float) -> str:
    """Returns why the engine cannot be trusted any more, as soon as that is so; until then it never returns.

    As long as it runs, a second watch stands over it that needs neither this event loop nor Python's lock: if both
    are stuck for twice the limit, faulthandler dumps the stacks and ends the process.

    Args:
        step_timeout_s: longest turn of the engine's loop; 0 for no limit.
    """
    try:
        while True:
            if not engine.is_alive:
                return "the engine's thread has ended"
            if 0 < step_timeout_s < engine.turn_seconds:
                return f"a step has taken {engine.turn_seconds:.1f} s, the limit is {step_timeout_s:g} s"
            if step_timeout_s:
                with contextlib.suppress(AttributeError, ValueError, OSError):  # stderr is no file
                    faulthandler.dump_traceback_later(2 * step_timeout_s + 1, exit=True)
            await asyncio.sleep(min(_POLL_S, step_timeout_s / 4 or _POLL_S))
    finally:
        faulthandler.cancel_dump_traceback_later()


def dump_stacks() -> None:
    """Writes the stacks of all threads to stderr."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
