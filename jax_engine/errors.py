"""The exceptions that leave the engine. Callers (library users, the HTTP layer) catch these and no others."""


class EngineError(Exception):
    """Base of every error the engine raises on purpose."""


class ConfigError(EngineError, ValueError):
    """A configuration value is out of range, or two values contradict each other."""


class InvalidRequest(EngineError, ValueError):
    """A request that can never be served: a bad parameter, an empty or over-long prompt.

    Args:
        message: what was wrong, what was got, what is allowed.
        param: the name of the offending field, or None when no single field is at fault.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class QueueFull(EngineError):
    """The waiting queue is at its bound; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class EngineStopped(EngineError):
    """The engine is shutting down, or its thread has died; no request can be served any more."""


class SlowReader(EngineError):
    """Outputs came faster than they were read, until max_unread_outputs of them lay there; the request was aborted."""
