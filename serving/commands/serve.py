"""`jax-engine serve`: the HTTP server around one engine."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from serving import flags
from serving.cli import COMMANDS
from serving.commands import common
from serving.options import ServerOptions, admin_keys, api_keys

if TYPE_CHECKING:
    from jax_engine import AsyncEngine


def run(argv: Sequence[str]) -> int:
    """Serves until a signal. See cli.main for what it raises and returns."""
    from serving import server

    flag_values = common.engine_flags(log_level="info")
    flags.define(flag_values, ServerOptions, group="Server")
    if not common.parse(flag_values, "serve", COMMANDS["serve"], argv):
        return 0
    options = ServerOptions(**flags.values(flag_values, ServerOptions))
    config = common.engine_config(flag_values)
    if config.process_id:
        common.build_engine(config, flags.non_defaults(flag_values))  # follows until process 0 ends; then so does this
    keys, admin = api_keys(options), admin_keys(options)
    options.ssl_context()  # a certificate that is of no use is told before weights are loaded
    with server.bind(options) as listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:

        def build() -> "AsyncEngine":
            return common.build_engine(config, flags.non_defaults(flag_values))

        runner.run(server.run_server(build, options, listener, keys, admin))
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's event loop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
