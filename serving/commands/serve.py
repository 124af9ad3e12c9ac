"""`jax-engine serve`: the HTTP server around one engine."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serving import flags
from serving.cli import COMMANDS
from serving.commands import common
from serving.options import ServerOptions, admin_keys, api_keys

if TYPE_CHECKING:
    from jax_engine import AsyncEngine


def run(argv: Sequence[str]) -> int:
    """Serves until a signal. See cli.main for what it raises and returns."""
    flag_values = common.engine_flags(log_level="info")
    flags.define(flag_values, ServerOptions, group="Server")
    if not common.parse(flag_values, "serve", COMMANDS["serve"], argv):
        return 0
    from serving import front, server
    from serving.event_loop import loop_factory
    from serving.remote import supervisor
    from serving.tracing import Tracing

    options = ServerOptions(**flags.values(flag_values, ServerOptions))
    config = common.engine_config(flag_values)
    if config.process_id:
        common.build_engine(config, flags.non_defaults(flag_values))  # follows until process 0 ends; then so does this
    keys, admin = api_keys(options), admin_keys(options)
    options.ssl_context()  # a certificate that is of no use is told before weights are loaded
    options.check_trace_file()
    if options.otel:
        Tracing().shutdown()  # so is a missing extra

    def build() -> "AsyncEngine":
        return common.build_engine(config, flags.non_defaults(flag_values))

    with contextlib.ExitStack() as opened:
        listeners = [opened.enter_context(each) for each in front.bind_all(options, max(1, options.api_processes))]
        runner = opened.enter_context(asyncio.Runner(loop_factory=loop_factory()))
        if options.api_processes:
            logging = str(flag_values["log_level"].value), str(flag_values["log_format"].value)
            runner.run(supervisor.run_processes(build, options, listeners, keys, admin, *logging))
        else:
            runner.run(server.run_server(build, options, listeners[0], keys, admin))
    return 0
