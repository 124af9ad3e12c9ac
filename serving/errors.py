"""What a client sees when something goes wrong: ApiError, its JSON body, and the middleware that makes all failures so.

Called by all routes. Never puts a traceback, a path or an exception's text of unknown origin into an answer; those go
to the log.
"""

import logging
import math
from typing import Any

import msgspec
from aiohttp import web

from jax_engine import EngineStopped, InvalidRequest, QueueFull, SlowReader

log = logging.getLogger("serving")

#: Seconds after which a client should ask again when the server is leaving or its engine is gone.
RETRY_AFTER_STOPPED_S = 5.0


class ApiError(Exception):
    """A failure with an HTTP status and an OpenAI error body.

    Args:
        retry_after: seconds, sent as Retry-After, rounded up.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer, or of an event in a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        """The answer."""
        response = json_response(self.body(), status=self.status)
        if self.retry_after is not None:
            response.headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response


def json_response(body: Any, *, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400: a field is wrong."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str) -> ApiError:
    """Status 503: not now, or not here."""
    return ApiError(503, message, type="service_unavailable", code=code, retry_after=RETRY_AFTER_STOPPED_S)


def internal_error() -> ApiError:
    """Status 500, saying nothing of the inside."""
    return ApiError(
        500,
        "The server failed to process the request; its log says more.",
        type="server_error",
        code="internal_error",
    )


def to_api_error(error: Exception) -> ApiError:
    """The ApiError for anything that a handler or the engine raised. Logs what is not the client's doing."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return bad_request(str(error), error.param, error.code)
        case QueueFull():
            return ApiError(429, str(error), type="rate_limit_error", code="queue_full", retry_after=error.retry_after)
        case SlowReader():
            return ApiError(408, str(error), code="slow_reader")
        case EngineStopped():
            return unavailable("The server is shutting down or its engine has stopped.", "engine_stopped")
        case web.HTTPException():
            return _from_http(error)
        case web.RequestPayloadError():
            return bad_request("The request body could not be read.")
    log.error("request failed", exc_info=error)
    return internal_error()


_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}


def _from_http(error: web.HTTPException) -> ApiError:
    message = error.text or error.reason
    if isinstance(error, web.HTTPMethodNotAllowed):
        message = f"{error.method} is not allowed here; allowed: {', '.join(sorted(error.allowed_methods))}."
    elif error.status == 404:
        message = "There is nothing at this address; those of the API begin with /v1."
    elif error.status == 413:
        message = "The request body is larger than this server allows."
    return ApiError(error.status, message, code=_HTTP_CODES.get(error.status))


@web.middleware
async def error_middleware(request: web.Request, handler: Any) -> web.StreamResponse:
    """Turns every failure into a JSON error body; aiohttp's own are text."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        response = to_api_error(error).response()
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionError:
        raise  # the client went away; there is nobody to tell
    except Exception as error:
        return to_api_error(error).response()
