"""GET /openapi.json: the addresses of this server and the bodies they take, made from the types that check them."""

from typing import Any

import msgspec
from aiohttp import web

from serving.chat_schema import ChatRequest
from serving.errors import json_response
from serving.messages_schema import CountTokensRequest, MessagesRequest
from serving.responses_schema import ResponsesRequest
from serving.routes.embeddings import EmbeddingsRequest
from serving.routes.health import package_version
from serving.routes.tokens import DetokenizeRequest, TokenizeRequest
from serving.schema import CompletionRequest

#: address -> (type of the body, what it does, whether the answer may be a stream)
_POSTS: dict[str, tuple[type, str, bool]] = {
    "/v1/completions": (CompletionRequest, "Continues prompts.", True),
    "/v1/chat/completions": (ChatRequest, "Answers a conversation.", True),
    "/v1/responses": (ResponsesRequest, "Answers a conversation, with typed events; keeps nothing.", True),
    "/v1/messages": (MessagesRequest, "Answers a conversation, as Anthropic's API does.", True),
    "/v1/messages/count_tokens": (CountTokensRequest, "Counts a conversation's tokens.", False),
    "/v1/embeddings": (EmbeddingsRequest, "Turns texts into vectors.", False),
    "/tokenize": (TokenizeRequest, "Turns a text or a conversation into token ids.", False),
    "/detokenize": (DetokenizeRequest, "Turns token ids into text.", False),
}
_GETS = {
    "/v1/models": "Lists the served models.",
    "/v1/models/{id}": "Describes one served model.",
    "/health": "Whether requests are taken.",
    "/version": "The version of the server.",
    "/openapi.json": "This document.",
}
_ERROR_STATUSES = {
    "400": "A field is wrong; `param` names it.",
    "401": "A key is needed.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too many requests; Retry-After says when to ask again.",
    "500": "A failure inside.",
    "503": "No requests are taken now.",
}
_TEMPLATE = "#/components/schemas/{name}"


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses."""
    router.add_get("/openapi.json", openapi)


async def openapi(request: web.Request) -> web.Response:
    """The document."""
    return json_response(document())


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of all addresses for clients."""
    bodies, components = msgspec.json.schema_components([entry[0] for entry in _POSTS.values()], ref_template=_TEMPLATE)
    components |= {"Error": _error_schema()}
    paths: dict[str, Any] = {}
    for (path, (_, summary, streams)), body in zip(_POSTS.items(), bodies, strict=True):
        content = {"application/json": {"schema": body}}
        paths[path] = {"post": _operation(summary, streams, {"required": True, "content": content})}
    for path, summary in _GETS.items():
        paths[path] = {"get": _operation(summary, False, None)}
        if "{id}" in path:
            parameter = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
            paths[path]["get"]["parameters"] = [parameter]
    return {
        "openapi": "3.1.0",
        "info": {"title": "jax-engine", "version": package_version()},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(summary: str, streams: bool, body: dict[str, Any] | None) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"application/json": {"schema": {"$ref": _TEMPLATE.format(name="Error")}}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    responses |= {status: {"description": text, "content": error} for status, text in _ERROR_STATUSES.items()}
    return {"summary": summary, "responses": responses} | ({"requestBody": body} if body else {})


def _error_schema() -> dict[str, Any]:
    optional = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": optional, "code": optional}
    inner = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "object", "properties": {"error": inner}, "required": ["error"]}
