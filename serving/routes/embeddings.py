"""POST /v1/embeddings: texts or token ids as vectors, the model's last hidden state of each text's last token."""

import asyncio
import base64
from typing import Annotated, Any, Literal

import numpy as np
from aiohttp import web
from msgspec import Meta

from jax_engine import RequestOutput
from serving.errors import bad_request, json_response
from serving.generation import read_request, tokenize
from serving.schema import Body, prompt_list
from serving.state import STATE


class EmbeddingsRequest(Body, kw_only=True):
    """Body of POST /v1/embeddings. `dimensions` keeps the first so many numbers, and makes the length 1 again."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=-1)] | None = None
    user: str | None = None


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_post("/v1/embeddings", create_embeddings)


async def create_embeddings(request: web.Request) -> web.Response:
    """One vector per text, in their order."""
    state = request.app[STATE]
    body, model = await read_request(request, EmbeddingsRequest)
    prompts = await tokenize(state, prompt_list(body.input, "input"), add_special_tokens=True)
    truncate = body.truncate_prompt_tokens is not None
    tasks = [asyncio.ensure_future(state.engine.embed(prompt.token_ids, truncate=truncate)) for prompt in prompts]
    try:
        outputs = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    count = sum(len(output.prompt_token_ids) for output in outputs)
    return json_response(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _vector(output, body)}
                for index, output in enumerate(outputs)
            ],
            "model": model,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
    )


def _vector(output: RequestOutput, body: EmbeddingsRequest) -> Any:
    vector = output.embedding
    assert vector is not None
    if body.dimensions is not None:
        if body.dimensions > len(vector):
            raise bad_request(
                f"dimensions must be at most the model's {len(vector)}, got {body.dimensions}", "dimensions"
            )
        vector = vector[: body.dimensions]
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
