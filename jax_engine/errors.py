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
        code: OpenAI's word for it, where it has one.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


def prompt_too_long(num_tokens: int, longest: int) -> InvalidRequest:
    """The error for a prompt that leaves no room for an output, in the words by which clients know it."""
    return InvalidRequest(
        f"the prompt has {num_tokens} tokens; this model's maximum context length is {longest} tokens, for prompt and "
        "output together",
        "prompt",
        "context_length_exceeded",
    )


class QueueFull(EngineError):
    """The waiting queue is at its bound; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class EngineStopped(EngineError):
    """The engine is shutting down, or its thread has died; no request can be served any more."""


class SlowReader(EngineError):
    """Outputs came faster than they were read, until max_unread_outputs of them lay there; the request was aborted."""
