"""LLM: the offline facade. Prompts in, outputs out, in order."""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, cast

from tqdm import tqdm

from jax_engine.config import EngineConfig, Limits
from jax_engine.engine import Engine
from jax_engine.errors import EngineStopped, InvalidRequest
from jax_engine.metrics import Metrics
from jax_engine.request import Request, RequestOutput
from jax_engine.router import Router
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.start import start_engines
from jax_engine.tokenizer import Tokenizer

#: A text, token ids, or one of these in a dict as vLLM takes it: {"prompt": text} or {"prompt_token_ids": ids}.
Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model for use in a script. Calls from several threads wait for each other; after Ctrl-C it can be used again.

    Args:
        model: see EngineConfig.model; the other fields of EngineConfig are taken by keyword.

    Raises:
        ConfigError, CheckpointError: the model cannot be run.
    """

    def __init__(self, model: str = EngineConfig.model, **options: Any):
        self.config = EngineConfig(model=model, **options)
        self._engines = start_engines(self.config)
        self._engine = self._engines[0]  # for what they have alike
        self._router = Router(len(self._engines), self.limits)
        self._num_requests = 0
        self._one_call = threading.Lock()  # an engine is driven by one thread at a time
        self._failure: Exception | None = None  # of a step, after which nobody knows what state the engines are in

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None."""
        return self._engine.tokenizer

    @property
    def limits(self) -> Limits:
        """The sizes in force, of each replica."""
        return self._engine.limits

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._engine.vocab_size

    @property
    def metrics(self) -> Metrics:
        """Counters of the engine; those of several replicas added up as they are now."""
        return Metrics.total([engine.metrics for engine in self._engines])

    def reset_metrics(self) -> None:
        """Starts counting anew."""
        for engine in self._engines:
            engine.metrics.reset()

    def reset_prefix_cache(self) -> bool:
        """Lets no later prompt use what the KV pages hold now. Returns True, as vLLM does where it could."""
        with self._one_call:
            for engine in self._engines:
                engine.reset_prefix_cache()
        return True

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none: the model's generation_config, over our defaults."""
        return SamplingParams(**self._engine.sampling_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts.

        Args:
            prompts: texts, lists of token ids or dicts, or one of them; see Prompt.
            sampling_params: one for all, or one per prompt; None for the defaults.
            use_tqdm: show a progress bar.
            cache_salt: these prompts share cached prefixes only with prompts of the same salt.

        Returns:
            One output per prompt, in their order.

        Raises:
            InvalidRequest: a prompt or parameter is wrong; none of the prompts is run.
            EngineStopped: a step failed in a call before.
        """
        return self._generate(prompts, sampling_params, use_tqdm, cache_salt=cache_salt)

    def _generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        *,
        embed: bool = False,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]  # type: ignore[list-item]
        params = sampling_params if sampling_params is not None else self.get_default_sampling_params()
        all_params = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(all_params) != len(prompts):
            raise InvalidRequest(f"{len(prompts)} prompts but {len(all_params)} sampling_params", "sampling_params")
        with self._one_call:
            if self._failure is not None:
                raise EngineStopped("a step failed in a call before; make a new LLM") from self._failure
            requests = []
            for number, (prompt, own) in enumerate(zip(prompts, all_params, strict=True)):
                try:
                    request = self._make_request(prompt, own, embed=embed, cache_salt=cache_salt)  # type: ignore[arg-type]
                except InvalidRequest as error:
                    where = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
                    raise InvalidRequest(f"{where}{error}", error.param, error.code) from error
                requests.append(request)
            outputs = self._serve(requests, use_tqdm)
        return [outputs[request.request_id] for request in requests]

    def _make_request(self, prompt: Prompt, params: SamplingParams, **options: Any) -> Request:
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"SamplingParams are needed, got {type(params).__name__}", "sampling_params")
        request_id = str(self._num_requests)
        self._num_requests += 1
        params = dataclasses.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
        return self._engine.make_request(request_id, _plain(prompt), params, **options)

    def _serve(self, requests: Sequence[Request], use_tqdm: bool) -> dict[str, RequestOutput]:
        placed = [(self._router.choose(request), request) for request in requests]
        try:
            for replica, request in placed:
                # Seeds come in the order of the requests, so that they do not depend on the replica.
                self._engines[replica].submit(request, seed=self._engine.draw_seed(request))
            return self._run(len(requests), use_tqdm)
        finally:
            for replica, request in placed:
                self._router.release(replica, request)
                self._engines[replica].abort(request.request_id)  # on an error or Ctrl-C something is left to abort

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Completes one conversation, or several, through the model's chat template.

        Args:
            messages: dicts with `role` and `content`, or a list of such lists.
            add_generation_prompt, continue_final_message, tools: see Tokenizer.chat_prompt.

        Raises:
            InvalidRequest, EngineStopped: as for generate; or the model has no tokenizer.
            ChatTemplateError: the model has no template, or it refuses the messages.
        """
        if self.tokenizer is None:
            raise InvalidRequest("the model has no tokenizer, so it cannot chat", "messages")
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Messages], [messages] if one else messages)
        prompts = [
            self.tokenizer.chat_prompt(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
            ).token_ids
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def embed(self, prompts: Prompt | Sequence[Prompt], use_tqdm: bool = True) -> list[RequestOutput]:
        """Turns prompts into vectors: the `embedding` of each output, the prompt's last hidden state, of length 1.

        Raises:
            InvalidRequest, EngineStopped: as for generate.
        """
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        return self._generate(prompts, params, use_tqdm, embed=True)

    def _run(self, num_requests: int, use_tqdm: bool) -> dict[str, RequestOutput]:
        """Drives each engine in a thread of its own, where no Ctrl-C can break off a step halfway."""
        outputs: dict[str, RequestOutput] = {}
        ended = threading.Event()
        with (
            tqdm(total=num_requests, desc="requests", disable=not use_tqdm) as progress,
            ThreadPoolExecutor(len(self._engines)) as threads,
        ):

            def run(engine: Engine) -> None:
                while engine.has_work and not ended.is_set():
                    for output in engine.step():
                        outputs[output.request_id] = output
                        progress.update()

            try:
                for running in as_completed([threads.submit(run, engine) for engine in self._engines]):
                    running.result()
            except Exception as error:
                self._failure = error
                raise
            finally:
                ended.set()  # after an error or Ctrl-C the others do not go on
        return outputs


def _plain(prompt: Prompt) -> str | Sequence[int]:
    """The text or the token ids of a prompt."""
    if isinstance(prompt, Mapping):
        if len(prompt) != 1 or not prompt.keys() & {"prompt", "prompt_token_ids"}:
            keys = ", ".join(map(str, prompt))
            raise InvalidRequest(
                f"a dict has either prompt or prompt_token_ids, and nothing else; got {keys}", "prompt"
            )
        [prompt] = prompt.values()
    if not isinstance(prompt, str | Sequence):
        kind = type(prompt).__name__
        raise InvalidRequest(
            f"a prompt is a text, a list of token ids or a dict with one of them; got {kind}", "prompt"
        )
    return prompt
