"""POST /tokenize and /detokenize: texts or conversations as token ids, and back. As in vLLM."""

from typing import Annotated, Any

from aiohttp import web
from msgspec import Meta

from jax_engine import InvalidRequest
from serving.chat import prepare
from serving.chat_schema import ChatRequest, Message, Tool
from serving.errors import bad_request, json_response
from serving.generation import off_loop, read_request, tokenize
from serving.schema import Body
from serving.state import STATE, ServerState


class TokenizeRequest(Body, kw_only=True):
    """Body of POST /tokenize: a prompt or messages."""

    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, str | bool | int | float | None] | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """See Body.check."""
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("give either prompt or messages", "prompt")


class DetokenizeRequest(Body, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[int]


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_post("/tokenize", tokenize_text)
    router.add_post("/detokenize", detokenize)


async def tokenize_text(request: web.Request) -> web.Response:
    """The token ids of a text or of a conversation."""
    state = request.app[STATE]
    body, _ = await read_request(request, TokenizeRequest)
    if body.messages is None:
        (prompt,) = await tokenize(state, [body.prompt or ""], body.add_special_tokens is not False)
    else:
        names = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        chat = ChatRequest(**{name: getattr(body, name) for name in names})
        chat.check()
        prompt = (await prepare(state, chat, "", num_bytes=len(await request.read()))).prompt
    answer: dict[str, Any] = {
        "count": len(prompt.token_ids),
        "max_model_len": state.engine.limits.max_model_len,
        "tokens": prompt.token_ids,
    }
    if body.return_token_strs:
        answer["token_strs"] = [_tokenizer(state).token_text(token) for token in prompt.token_ids]
    return json_response(answer)


async def detokenize(request: web.Request) -> web.Response:
    """The text of token ids, special tokens included."""
    state = request.app[STATE]
    body, _ = await read_request(request, DetokenizeRequest)
    tokenizer = _tokenizer(state)
    wrong = next((token for token in body.tokens if not 0 <= token < tokenizer.vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(f"tokens: ids are in [0, {tokenizer.vocab_size}), got {wrong}", "tokens")
    text = await off_loop(lambda: tokenizer.decode(body.tokens, False), len(body.tokens))
    return json_response({"prompt": text})


def _tokenizer(state: ServerState) -> Any:
    if state.engine.tokenizer is None:
        raise bad_request("This model has no tokenizer.", "model")
    return state.engine.tokenizer
