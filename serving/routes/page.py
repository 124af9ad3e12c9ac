"""GET / and /page/*: a chat and a live view of the engine, as plain files of this package.

The page may load and call nothing but this server: see its Content-Security-Policy.
"""

from functools import partial
from importlib.resources import files

from aiohttp import web

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds the page's addresses, one for each file."""
    for file in files("serving").joinpath("page").iterdir():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            answer = partial(_file, body=file.read_bytes(), kind=kind)
            router.add_get("/" if file.name == "index.html" else f"/page/{file.name}", answer)


async def _file(request: web.Request, body: bytes, kind: str) -> web.Response:
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)
