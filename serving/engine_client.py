"""EngineClient: what the HTTP side needs of an engine, which may be in this process or in another.

AsyncEngine is one, and so is remote.client.RemoteEngine; tests have a third. Only what is read on the way of each
request is a plain attribute: it never changes while the server runs.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from jax_engine import Limits, RequestOutput, SamplingParams
from jax_engine.engine_view import EngineView
from jax_engine.tokenizer import Tokenizer


class EngineClient(Protocol):
    """An engine as the routes see it. See AsyncEngine for each of them."""

    @property
    def model_name(self) -> str: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def sampling_defaults(self) -> Mapping[str, Any]: ...

    @property
    def is_alive(self) -> bool: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        embed: bool = False,
        **who: str | None,
    ) -> AsyncIterator[RequestOutput]: ...

    async def embed(self, prompt: str | Sequence[int], *, truncate: bool = False) -> RequestOutput: ...

    async def abort(self, request_id: str) -> None: ...

    async def view(self, seconds: float = 0.0) -> EngineView: ...

    async def start_profile(self, folder: str) -> None: ...

    async def stop_profile(self) -> None: ...

    async def reset_prefix_cache(self) -> None: ...
