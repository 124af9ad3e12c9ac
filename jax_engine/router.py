"""Router: which replica of the model serves a request.

async_engine.py and llm.py have one in front of the engines of one process, and tell it what begins and what has ended.
It knows requests and counts tokens; it never asks an engine. Not for several threads at once.
"""

import numpy as np

from jax_engine.affinity import PrefixAffinity, chain
from jax_engine.config import Limits
from jax_engine.request import Request


class Router:
    """Sends a request where the beginning of its prompt lies, and else where the least work waits.

    Work is counted in tokens: those of the prompt, and the most that may come of it, until the request ends. A replica
    that has the beginning is chosen as long as it has no more work than the idlest one plus the tokens it would save.

    Args:
        limits: the sizes of each replica.
    """

    def __init__(self, num_replicas: int, limits: Limits):
        self._limits = limits
        self._loads = dict.fromkeys(range(num_replicas), 0)
        self._affinity = PrefixAffinity[int](slack=0, ratio=1.0, block_load=limits.page_size)

    def choose(self, request: Request) -> int:
        """The replica for a request; its work counts there until `release`."""
        if len(self._loads) == 1:
            return 0
        chosen = self._affinity.choose(self._digests(request), self._loads)
        self._loads[chosen] += self._work(request)
        return chosen

    def release(self, replica: int, request: Request) -> None:
        """A request that was sent to the replica has ended."""
        if len(self._loads) > 1:
            self._loads[replica] -= self._work(request)

    def _work(self, request: Request) -> int:
        params, prompt = request.sampling_params, len(request.prompt_token_ids)
        room = self._limits.max_model_len - prompt
        return prompt + params.n * (room if params.max_tokens is None else min(params.max_tokens, room))

    def _digests(self, request: Request) -> list[bytes]:
        """One for each whole page of the prompt, as only whole pages are found again."""
        if not self._limits.enable_prefix_caching:
            return []
        size, token_ids = self._limits.page_size, np.array(request.prompt_token_ids, np.int32)
        pages = (token_ids[start : start + size].tobytes() for start in range(0, len(token_ids) - size + 1, size))
        return chain(pages, start=(request.cache_salt or "").encode())
