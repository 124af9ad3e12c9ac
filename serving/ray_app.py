"""Several engines behind one address, by Ray Serve: `serve run serving.ray_app:app model=... max_replicas=4`.

Two deployments. Engines: each replica is an engine and the application of app.py, served to itself over a socket in a
private folder. Front: takes HTTP requests, chooses an engine by prefix and load, and passes answers on. Needs the extra
`ray`; nothing else imports this module.

What a lost engine means to its requests is decided in relay.py: those whose answer has not begun are asked again.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
from absl import flags as absl_flags
from aiohttp import web
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
from ray.serve.config import (  # pyright: ignore[reportMissingImports]
    AutoscalingConfig,
    AutoscalingContext,
    AutoscalingPolicy,
    RequestRouterConfig,
)
from ray.serve.exceptions import BackPressureError, RayServeException  # pyright: ignore[reportMissingImports]
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica  # pyright: ignore
from starlette.requests import Request  # pyright: ignore[reportMissingImports]
from starlette.responses import Response, StreamingResponse  # pyright: ignore[reportMissingImports]

from jax_engine import ConfigError
from jax_engine.affinity import PrefixAffinity
from serving import flags, front
from serving.app import AppSettings, create_app
from serving.commands import common
from serving.errors import ApiError
from serving.options import ServerOptions, admin_keys, api_keys
from serving.prefix_digests import prefix_digests
from serving.relay import EngineLost, Forwarded, Head, relay, whole_events
from serving.state import STATE
from serving.watchdog import dump_stacks, watch

if TYPE_CHECKING:
    from jax_engine import AsyncEngine

log = logging.getLogger("serving")

#: An engine takes a minute to start: waiting longer for a queue to go away by itself would not help it.
_UPSCALE_DELAY_S = 10.0
#: Requests that the front may have in hand beside those it has places for: to refuse them.
_REFUSALS = 64
#: Of ServerOptions: what Ray Serve's own configuration says.
_RAYS = (
    "host",
    "port",
    "api_processes",
    "tls_cert_file",
    "tls_key_file",
    "max_connections",
    "max_header_kib",
    "idle_timeout_s",
)
#: Addresses that tell of one engine, and would tell of any here.
_OF_ONE_ENGINE = ("/metrics", "/load", "/debug/", "/admin/")
#: Headers of a hop, not of the request.
_HOP = {"connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "date"}


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How many engines, and on what.

    Raises:
        ConfigError: a value is out of range.
    """

    min_replicas: int = _option(1, "Fewest engines.")
    max_replicas: int = _option(1, "Most engines.")
    requests_per_replica: float = _option(64.0, "Unfinished requests per engine that autoscaling aims at.")
    kv_use: float = _option(0.8, "Share of KV pages in use that autoscaling aims at.")
    max_ongoing_requests: int = _option(512, "Most unfinished requests of one engine; more wait in front.")
    max_waiting_requests: int = _option(1024, "Most that wait in front; more are answered 429.")
    num_cpus: float = _option(1.0, "CPUs of one engine, as Ray counts them.")
    num_gpus: float = _option(0.0, "GPUs of one engine, as Ray counts them.")

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"1 <= min_replicas <= max_replicas is needed, got {self.min_replicas} and {self.max_replicas}"
            )
        if self.requests_per_replica <= 0 or not 0 < self.kv_use <= 1:
            raise ConfigError(
                "requests_per_replica must be above 0 and kv_use in (0, 1], "
                f"got {self.requests_per_replica} and {self.kv_use}"
            )
        if self.max_ongoing_requests < 1 or self.max_waiting_requests < 0:
            raise ConfigError(
                "max_ongoing_requests must be at least 1 and max_waiting_requests at least 0, "
                f"got {self.max_ongoing_requests} and {self.max_waiting_requests}"
            )


def app(args: Mapping[str, str]) -> serve.Application:
    """What `serve run` and Serve's config files name: flags of `jax-engine serve` and fields of RayOptions, by name.

    Raises:
        UsageError, ConfigError: an argument is unknown or out of range, or belongs into Serve's own configuration.
    """
    flag_values = absl_flags.FlagValues()
    flags.define(flag_values, RayOptions, group="Ray")
    flags.define(flag_values, ServerOptions, group="Server")
    flags.define(flag_values, common.EngineConfig, group="Engine")
    others = flags.parse(flag_values, "serving.ray_app", [f"--{name}={value}" for name, value in args.items()])
    if refused := [name for name in _RAYS if flag_values[name].present]:
        raise flags.UsageError(f"{', '.join(refused)}: set by Ray Serve's own http_options, not here")
    assert not others, "every argument is written as a flag"
    build = functools.partial(common.build_engine, common.engine_config(flag_values), flags.non_defaults(flag_values))
    options = ServerOptions(**flags.values(flag_values, ServerOptions))
    return deployment(build, options, RayOptions(**flags.values(flag_values, RayOptions)))


def deployment(build: Callable[[], "AsyncEngine"], options: ServerOptions, scaling: RayOptions) -> serve.Application:
    """The application.

    Args:
        build: makes an engine, in the replica's process; pickled.
    """
    engines = serve.deployment(
        Engines,
        max_ongoing_requests=scaling.max_ongoing_requests,
        max_queued_requests=scaling.max_waiting_requests,
        autoscaling_config=AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            upscale_delay_s=_UPSCALE_DELAY_S,
            policy=AutoscalingPolicy(
                policy_function=f"{__name__}:QueueAndPages",
                policy_kwargs={"requests_per_replica": scaling.requests_per_replica, "kv_use": scaling.kv_use},
            ),
        ),
        request_router_config=RequestRouterConfig(request_router_class=f"{__name__}:PrefixRouter"),
        ray_actor_options={"num_cpus": scaling.num_cpus, "num_gpus": scaling.num_gpus},
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=options.drain_timeout_s,
    )
    most = scaling.max_replicas * scaling.max_ongoing_requests + scaling.max_waiting_requests
    ingress = serve.deployment(Front, max_ongoing_requests=most + _REFUSALS, ray_actor_options={"num_cpus": 0.1})
    return ingress.bind(engines.bind(build, options), options.max_body_mib * 2**20)


class Engines:
    """One replica: an engine and its application. Made and called by Ray Serve."""

    async def __init__(self, build: Callable[[], "AsyncEngine"], options: ServerOptions):
        self._engine = await asyncio.to_thread(build)
        self._folder = tempfile.TemporaryDirectory(prefix="jax-engine-")  # nobody else may enter it
        socket = str(Path(self._folder.name, "http"))
        app = create_app(self._engine, AppSettings.of(options, api_keys(options), admin_keys(options)))
        self._state, self._runner = app[STATE], front.make_runner(app, options)
        await self._runner.setup()
        await web.UnixSite(self._runner, socket).start()
        self._session = aiohttp.ClientSession(
            "http://engine",
            connector=aiohttp.UnixConnector(socket, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )
        self._watching = asyncio.create_task(self._watch(options.step_timeout_s))

    async def answer(self, request: Forwarded) -> AsyncGenerator[Head | bytes, None]:
        """A Head, then whole events, if it is a stream. Closing this closes the request, which aborts it."""
        async with self._session.request(
            request.method, request.path, headers=request.headers, data=request.body
        ) as response:
            headers = [(name, value) for name, value in response.headers.items() if name.lower() not in _HOP]
            if response.content_type != "text/event-stream":
                yield Head(response.status, headers, await response.read())
                return
            yield Head(response.status, headers, None)
            async for events in whole_events(response.content.iter_any()):
                yield events

    async def _watch(self, step_timeout_s: float) -> str:
        reason = await watch(self._engine, step_timeout_s)
        log.critical("%s; Ray Serve will replace this replica. What its threads are doing:", reason)
        dump_stacks()
        self._engine.fail()
        return reason

    def check_health(self) -> None:
        """Called by Ray Serve every few seconds; a replica that raises is replaced."""
        if self._watching.done():
            raise RuntimeError(self._watching.result())

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve; what QueueAndPages decides by."""
        gauges = self._engine.gauges
        return {"unfinished": float(self._engine.num_requests), "kv_use": gauges.used_pages / gauges.num_pages}

    async def __del__(self) -> None:
        self._state.draining = True
        self._watching.cancel()
        await self._session.close()
        await self._runner.cleanup()
        self._engine.shutdown()
        self._folder.cleanup()


class QueueAndPages:
    """How many engines there should be, so that neither requests nor KV pages are more than aimed at. Called by Ray
    Serve, which keeps to the bounds and waits before it acts.

    Args:
        requests_per_replica, kv_use: see RayOptions.
    """

    def __init__(self, requests_per_replica: float, kv_use: float):
        self._requests, self._kv_use = requests_per_replica, kv_use

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """(engines that should run, state: none)"""
        figures = context.aggregated_metrics or {}
        unfinished, kv_use = (list((figures.get(name) or {}).values()) for name in ("unfinished", "kv_use"))
        if not unfinished:
            return context.target_num_replicas, {}
        queued = sum(unfinished) + context.total_queued_requests
        return max(queued / self._requests, sum(kv_use) / self._kv_use), {}


class PrefixRouter(RequestRouter):
    """Sends a request to the engine that PrefixAffinity chooses, or to another if that one takes no more. Made by Ray
    Serve where the front's handle lives; the base class counts each engine's requests."""

    def initialize_state(self, **_: Any) -> None:
        """Called once."""
        self._affinity = PrefixAffinity[str]()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The chosen engine, then all others."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        names = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        cache = self.replica_queue_len_cache
        loads = {name: cache.get(replica.replica_id) or 0 for name, replica in names.items()}
        digests = pending_request.args[0].digests if pending_request.args else ()
        chosen = names[self._affinity.choose(digests, loads)]
        return [[chosen], [replica for replica in candidate_replicas if replica is not chosen]]


class Front:
    """Takes HTTP requests for all engines. Made and called by Ray Serve.

    Args:
        engines: Ray's handle of the deployment Engines.
        max_body_bytes: of one request.
    """

    def __init__(self, engines: Any, max_body_bytes: int):
        self._answer = engines.options(stream=True).answer
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """One request; what fails is told as app.py tells it."""
        try:
            pieces = relay(self._ask, await self._forwarded(request))
            head = await anext(pieces)
        except ApiError as error:
            refusal = error.response()
            return Response(refusal.body, refusal.status, dict(refusal.headers))  # type: ignore[arg-type]
        assert isinstance(head, Head)
        response = Response(head.body, head.status) if head.body is not None else StreamingResponse(pieces, head.status)
        for name, value in head.headers:
            response.headers[name] = value
        return response

    async def _forwarded(self, request: Request) -> Forwarded:
        path = request.url.path
        if path.startswith(_OF_ONE_ENGINE):
            raise ApiError(404, f"{path} tells of one engine; here are several. Ray's metrics tell of all.")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise ApiError(413, "The request body is larger than this server allows.", code="request_too_large")
        digests = ()
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError, AttributeError):
            digests = prefix_digests(msgspec.json.decode(body)) if body else ()
        headers = [(name, value) for name, value in request.headers.items() if name not in _HOP]
        return Forwarded(
            request.method, path + (f"?{request.url.query}" if request.url.query else ""), headers, body, digests
        )

    async def _ask(self, request: Forwarded) -> AsyncGenerator[Head | bytes, None]:
        """One engine's answer, in the words of relay.py. Closing this closes the request."""
        pieces = self._answer.remote(request)
        try:
            async for piece in pieces:
                yield piece
        except BackPressureError:
            raise ApiError(
                429, "All engines are busy.", type="rate_limit_error", code="queue_full", retry_after=2.0
            ) from None
        except (RayError, RayServeException) as error:
            raise EngineLost(str(error)) from error
        finally:
            pieces.cancel()
