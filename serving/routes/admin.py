"""POST to addresses under /admin/: for operators with an admin key; without one they do not exist."""

from aiohttp import web

from serving.errors import bad_request, json_response
from serving.state import STATE


def add_routes(router: web.UrlDispatcher) -> None:
    """Adds this file's addresses; keys.py guards all of /admin/."""
    router.add_post("/admin/start_profile", start_profile)
    router.add_post("/admin/stop_profile", stop_profile)
    router.add_post("/admin/reset_prefix_cache", reset_prefix_cache)


async def start_profile(request: web.Request) -> web.Response:
    """Begins to record host and device into the operator's --profile_dir."""
    folder = _folder(request)
    await request.app[STATE].engine.start_profile(folder)
    return json_response({"status": "recording"})


async def stop_profile(request: web.Request) -> web.Response:
    """Ends the recording and writes it."""
    _folder(request)
    await request.app[STATE].engine.stop_profile()
    return json_response({"status": "written"})


async def reset_prefix_cache(request: web.Request) -> web.Response:
    """Forgets all cached prefixes; running requests go on."""
    await request.app[STATE].engine.reset_prefix_cache()
    return json_response({"status": "reset"})


def _folder(request: web.Request) -> str:
    folder = request.app[STATE].profile_dir
    if folder is None:
        raise bad_request("Profiling is off: start the server with --profile_dir.")
    return folder
