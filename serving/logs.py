"""Log lines as text or JSON, each with the id of the HTTP request it belongs to.

Set up once by the commands; observe.py sets the id for the time a request is handled.
"""

import logging
import sys
import time
from contextvars import ContextVar
from typing import Any

import msgspec

#: Id of the HTTP request that is being handled; empty outside of one.
request_id: ContextVar[str] = ContextVar("request_id", default="")

FORMATS = ("text", "json")


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, and the request's id where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        line = super().formatMessage(record)
        identifier = request_id.get()
        return f"{line} [{identifier}]" if identifier else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message; request_id and exception where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identifier := request_id.get():
            fields["request_id"] = identifier
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def set_up(level: str, format: str) -> None:
    """Sends the process's log to stderr.

    Args:
        level: debug, info, warning or error.
        format: text or json.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)  # jax's, which would not be JSON otherwise
    if level == "info":
        # They say at this level which platforms jax did not find, and each step of Orbax's reading and writing.
        for name in ("jax", "absl"):
            logging.getLogger(name).setLevel(logging.WARNING)
