"""One file per address. Each has `add_routes(router)`; a new one is a file here and a name in ROUTES."""

from serving.routes import (
    admin,
    chat,
    completions,
    debug,
    embeddings,
    health,
    messages,
    metrics,
    models,
    openapi,
    responses,
    tokens,
)

ROUTES = (models, completions, chat, responses, messages, embeddings, tokens, health, openapi, metrics, debug, admin)
