"""One file per address. Each has `add_routes(router)`; a new one is a file here and a name in ROUTES."""

from serving.routes import chat, completions, health, models

ROUTES = (models, completions, chat, health)
