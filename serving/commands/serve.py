"""`jax-engine serve`: the HTTP server around one engine."""

import asyncio
from collections.abc import Callable, Sequence

from serving import flags
from serving.cli import COMMANDS
from serving.commands import common


def run(argv: Sequence[str]) -> int:
    """Serves until a signal. See cli.main for what it raises and returns."""
    from serving import server

    flag_values = common.engine_flags(log_level="info")
    flags.define(flag_values, server.ServerOptions, group="Server")
    if not common.parse(flag_values, "serve", COMMANDS["serve"], argv):
        return 0
    options = server.ServerOptions(**flags.values(flag_values, server.ServerOptions))
    config = common.engine_config(flag_values)
    keys = server.api_keys(options)
    with server.bind(options) as listener:
        engine = common.build_engine(config, flags.non_defaults(flag_values))
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(server.run_server(engine, options, listener, keys))
        finally:
            engine.shutdown()
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's event loop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
