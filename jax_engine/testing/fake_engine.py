"""FakeAsyncEngine: AsyncEngine's face over a function that names the next token. No jax, no threads.

Owns nothing real: the tests of the HTTP server and the command line use it to see what a request becomes and to make an
engine refuse, fail, stall or die on demand.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jax_engine.config import EngineConfig, Limits
from jax_engine.engine_view import EngineView, look
from jax_engine.errors import ConfigError, EngineStopped, InvalidRequest, QueueFull, prompt_too_long
from jax_engine.metrics import Gauges, Metrics
from jax_engine.request import CompletionOutput, FinishReason, Logprob, PositionLogprobs, RequestMetrics, RequestOutput
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.testing.byte_tokenizer import EOS, ByteTokenizer
from jax_engine.timeline import Timeline
from jax_engine.tokenizer import Tokenizer

_BYTES = ByteTokenizer()

#: (prompt ids, index of the completion, position in the output) -> token id
NextToken = Callable[[Sequence[int], int, int], int]


def alphabet(prompt: Sequence[int], index: int, position: int) -> int:
    """abc... for completion 0, bcd... for completion 1, and so on."""
    return ord("a") + (index + position) % 26


def echo(prompt: Sequence[int], index: int, position: int) -> int:
    """The prompt again, then end of sequence."""
    return prompt[position] if position < len(prompt) else EOS


@dataclass
class _Live:
    """One unfinished request."""

    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    failed: bool = False


class FakeAsyncEngine:
    """The public face of AsyncEngine, deterministic.

    Args:
        tokenizer: bytes by default; None for a model without one.
        next_token: what is generated; `alphabet` by default.
        delay_s: seconds before each token.
        max_waiting: live requests beyond which QueueFull is raised.
        fail_after: a request ends with an internal error after this many tokens.
        stall: no token ever comes; requests end only by abort.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = _BYTES,
        next_token: NextToken = alphabet,
        delay_s: float = 0.0,
        max_waiting: int = 1000,
        max_model_len: int = 256,
        fail_after: int | None = None,
        stall: bool = False,
    ):
        self.config = config or EngineConfig(model="fake-model")
        if self.config.max_model_len is not None and self.config.max_model_len > 100_000:
            raise ConfigError(f"max_model_len {self.config.max_model_len} is more than the model's 100000 positions")
        self.model_name = self.config.model
        self.tokenizer = tokenizer
        self.sampling_defaults: dict[str, object] = {}
        self.limits = _limits(self.config.max_model_len or max_model_len)
        self.next_token, self.delay_s, self.max_waiting = next_token, delay_s, max_waiting
        self.fail_after, self.stall = fail_after, stall
        self.metrics, self.timeline = Metrics(), Timeline()
        self.is_alive = True
        self.turn_seconds = 0.0
        self.num_aborted = self.max_live = self.num_resets = 0
        self.submitted: list[tuple[str, list[int], SamplingParams, int]] = []
        self.scheduling: list[dict[str, str | None]] = []  # the other arguments of each
        self._live: dict[str, _Live] = {}
        self._draining = False
        self._ids = itertools.count()

    @property
    def num_requests(self) -> int:
        return len(self._live)

    @property
    def gauges(self) -> Gauges:
        """See AsyncEngine.gauges; every request counts as running."""
        limits = self.limits
        return Gauges(
            running=len(self._live),
            waiting=0,
            inflight_steps=min(len(self._live), limits.max_inflight_steps),
            max_inflight_steps=limits.max_inflight_steps,
            used_pages=min(len(self._live), limits.num_pages),
            num_pages=limits.num_pages,
        )

    @property
    def replicas(self) -> list["FakeAsyncEngine"]:
        """See AsyncEngine.replicas; there is one."""
        return [self]

    def page_references(self) -> list[int]:
        """See Engine.page_references."""
        gauges = self.gauges
        return [int(page < gauges.used_pages) for page in range(gauges.num_pages)]

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        user: str | None = None,
        slo_class: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """See AsyncEngine.generate."""
        ids = _BYTES.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._admit(ids, sampling_params)
        request_id = request_id or f"fake-{next(self._ids)}"
        self.submitted.append((request_id, ids, sampling_params, priority))
        self.scheduling.append({"user": user, "slo_class": slo_class, "cache_salt": cache_salt})
        self._live[request_id] = live = _Live(ids, sampling_params)
        self.max_live = max(self.max_live, len(self._live))
        finished = False
        try:
            async for output in self._run(request_id, live):
                finished = output.finished
                yield output
        finally:
            del self._live[request_id]
            self.num_aborted += not finished

    def _admit(self, ids: Sequence[int], params: SamplingParams) -> None:
        if not self.is_alive or self._draining:
            raise EngineStopped("the engine is shutting down")
        if not ids:
            raise InvalidRequest("the prompt is empty; at least one token is needed", "prompt")
        if len(ids) >= self.limits.max_model_len:
            raise prompt_too_long(len(ids), self.limits.max_model_len)
        if any(not 0 <= token < ByteTokenizer.vocab_size for token in ids):
            raise InvalidRequest(f"prompt token ids must be in [0, {ByteTokenizer.vocab_size})", "prompt")
        if len(self._live) >= self.max_waiting:
            raise QueueFull(f"{len(self._live)} requests are waiting", retry_after=2.5)

    async def _run(self, request_id: str, live: _Live) -> AsyncIterator[RequestOutput]:
        params = live.sampling_params
        rows = [_Completion(self, live, index) for index in range(params.n)]
        metrics = RequestMetrics(arrival_time=time.monotonic())
        first = True
        while not all(row.finish_reason for row in rows):
            await self._pause(live)
            if live.failed:
                raise EngineStopped("the engine has stopped")
            changed = [row for row in rows if not row.finish_reason]
            failed = self.fail_after is not None and len(rows[0].token_ids) >= self.fail_after
            for row in changed:
                if live.aborted.is_set() or failed:
                    row.finish_reason = FinishReason.ERROR if failed else FinishReason.ABORT
                else:
                    row.step()
            finished = all(row.finish_reason for row in rows)
            self.num_aborted += live.aborted.is_set()
            if params.output_kind is RequestOutputKind.FINAL_ONLY and not finished:
                continue
            delta = params.output_kind is RequestOutputKind.DELTA
            yield RequestOutput(
                request_id=request_id,
                prompt=None,
                prompt_token_ids=live.prompt_token_ids,
                outputs=[row.output(delta) for row in (changed if delta else rows)],
                finished=finished,
                metrics=metrics,
                prompt_logprobs=_prompt_logprobs(live) if first or not delta else None,
                num_cached_tokens=min(4, len(live.prompt_token_ids) - 1),
                error="Traceback: /secret/path/step.py blew up" if failed else None,
            )
            first = False

    async def _pause(self, live: _Live) -> None:
        """One step's time, cut short by an abort."""
        if not self.stall:
            await asyncio.sleep(self.delay_s)
            return
        await live.aborted.wait()

    async def embed(self, prompt: str | Sequence[int], *, truncate: bool = False) -> RequestOutput:
        """A vector of four numbers that depends on the prompt."""
        ids = _BYTES.encode(prompt) if isinstance(prompt, str) else list(prompt)
        ids = ids[1 - self.limits.max_model_len :] if truncate else ids
        self._admit(ids, SamplingParams())
        vector = np.array([len(ids), sum(ids), ids[0], ids[-1]], np.float32)
        return RequestOutput("", None, ids, [], True, RequestMetrics(0.0), embedding=vector / np.linalg.norm(vector))

    async def view(self, seconds: float = 0.0) -> EngineView:
        """See AsyncEngine.view."""
        return look(self, seconds)

    async def reset_prefix_cache(self) -> None:
        """Counts the calls."""
        self.num_resets += 1

    async def abort(self, request_id: str) -> None:
        """See AsyncEngine.abort."""
        if request_id in self._live:
            self._live[request_id].aborted.set()

    async def drain(self, timeout_s: float) -> None:
        """See AsyncEngine.drain."""
        self._draining = True
        deadline = time.monotonic() + timeout_s
        while self._live and time.monotonic() < deadline:
            await asyncio.sleep(0.005)

    def fail(self) -> None:
        """See AsyncEngine.fail."""
        self.is_alive = False
        for live in self._live.values():
            live.failed = True
            live.aborted.set()

    def shutdown(self) -> None:
        """See AsyncEngine.shutdown."""
        self.is_alive = False


class _Completion:
    """The tokens of one completion so far, and what of them has been handed out."""

    def __init__(self, engine: FakeAsyncEngine, live: _Live, index: int):
        self._engine, self._live, self._index = engine, live, index
        self._params = live.sampling_params
        self._text_stream = None
        if engine.tokenizer is not None and self._params.detokenize:
            self._text_stream = engine.tokenizer.stream(self._params.skip_special_tokens)
        self._sent_ids = self._sent_text = 0
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    def step(self) -> None:
        live, params, engine = self._live, self._params, self._engine
        token = engine.next_token(live.prompt_token_ids, self._index, len(self.token_ids))
        self.token_ids.append(token)
        if self._text_stream is not None:
            self.text += self._text_stream.push(token)
        stop_ids, stops = params.stop_token_ids or (), params.stop or ()
        if token in stop_ids or (token == EOS and not params.ignore_eos):
            self.finish_reason = FinishReason.STOP
            self.stop_reason = token if token in stop_ids else None
        elif hit := next((stop for stop in stops if stop in self.text), None):
            self.finish_reason, self.stop_reason = FinishReason.STOP, hit
            self.text = self.text[: self.text.index(hit) + len(hit) * params.include_stop_str_in_output]
        elif len(self.token_ids) in (params.max_tokens, engine.limits.max_model_len - len(live.prompt_token_ids)):
            self.finish_reason = FinishReason.LENGTH

    def output(self, delta: bool) -> CompletionOutput:
        ids, text = self._sent_ids * delta, self._sent_text * delta
        output = CompletionOutput(
            index=self._index,
            text=self.text[text:],
            token_ids=self.token_ids[ids:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        if self._params.logprobs is not None:
            output.logprobs = [_logprobs(token, self._params.logprobs) for token in self.token_ids[ids:]]
        self._sent_ids, self._sent_text = len(self.token_ids), len(self.text)
        return output


def _logprobs(token: int, num_top: int) -> PositionLogprobs:
    """The chosen token first and most likely; the least likely of several has probability zero."""
    entries = {token: Logprob(-0.5, rank=1, decoded_token=_BYTES.token_text(token))}
    for rank in range(2, num_top + 1):
        other = (token + rank) % ByteTokenizer.vocab_size
        value = float("-inf") if rank == num_top and num_top > 2 else -float(rank)
        entries[other] = Logprob(value, rank=rank, decoded_token=_BYTES.token_text(other))
    return entries


def _prompt_logprobs(live: _Live) -> list[PositionLogprobs | None] | None:
    count = live.sampling_params.prompt_logprobs
    if count is None:
        return None
    return [None, *(_logprobs(token, count) for token in live.prompt_token_ids[1:])]


def _limits(max_model_len: int) -> Limits:
    return Limits(
        max_model_len=max_model_len,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        page_size=16,
        num_pages=64,
        scheduling="async",
        max_inflight_steps=2,
        token_buckets=(64,),
        decode_buckets=(8,),
    )
