"""ServerOptions: what the operator chooses about the server, and the keys it reads from files and environment.

Every field is a flag of `jax-engine serve`. Made by the serve command, read by server.py. All bounds of the HTTP side
stand here; those of the engine are in EngineConfig, those of one request in SamplingParams.
"""

import math
import os
import re
import ssl
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jax_engine import ConfigError
from serving.tools.formats import REASONING_MARKS, TOOL_FORMATS

MAX_API_PROCESSES = 64
_HASHED_KEY = re.compile(r"sha256:[0-9a-f]{64}")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The operator's choices about the server, as against the engine.

    Raises:
        ConfigError: a value is out of range.
    """

    host: str = _option("127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
    port: int = _option(8000, "Port to listen on; 0 for any free one.")
    served_model_name: tuple[str, ...] = _option((), "Names that clients may use for the model. Default: its own.")
    api_processes: int = _option(
        0, "Processes for HTTP, templates, tokenizing and detokenizing, beside the engine's; 0: the engine's own."
    )
    page: bool = _option(True, "Serve the page at /: a chat and a live view of the engine.")

    api_key_file: str | None = _option(
        None, "File of accepted API keys, one per line, plain or as sha256:HEX; also JAX_ENGINE_API_KEY."
    )
    admin_key_file: str | None = _option(
        None, "File of keys for the /admin addresses, which are off without one; also JAX_ENGINE_ADMIN_KEY."
    )
    tls_cert_file: str | None = _option(None, "Certificate chain (PEM); serves HTTPS, with --tls_key_file.")
    tls_key_file: str | None = _option(None, "Private key (PEM) of the certificate.")
    cors_origins: tuple[str, ...] = _option((), "Web origins that may call from a browser. Default: none but our own.")

    tool_call_parser: str = _option(
        "auto", "How the model writes tool calls: auto (by its chat template), none, hermes, ..."
    )
    reasoning_parser: str = _option("auto", "How the model marks its reasoning: auto, none, think (<think>), mistral.")

    max_body_mib: int = _option(16, "Largest request body, in MiB.")
    max_header_kib: int = _option(16, "Largest single header or request line, in KiB.")
    max_connections: int = _option(4096, "Most open connections; one more is answered 503 and closed.")
    max_requests_per_client: int = _option(
        0, "Most requests of one API key (without keys: of one address) at a time; 0 for no limit."
    )
    body_timeout_s: float = _option(60.0, "Seconds a client may take to send a request's body.")
    write_timeout_s: float = _option(60.0, "Seconds a client may leave a full socket unread before it is dropped.")
    idle_timeout_s: float = _option(75.0, "Seconds a connection may stay open without a request.")

    drain_timeout_s: float = _option(30.0, "Seconds that running requests may go on after SIGTERM.")
    step_timeout_s: float = _option(
        300.0, "Seconds one step may take before the engine counts as hung and the process ends; 0 for no limit."
    )
    log_interval_s: float = _option(10.0, "Seconds between two lines of figures in the log; 0 for none.")
    vllm_metrics: bool = _option(False, "Export metrics under vLLM's names too.")
    otel: bool = _option(False, "Send a span of each request as the OTEL_* variables say; needs the extra otel.")
    trace_file: str | None = _option(None, "Write the last steps there when the server ends, as a trace for Perfetto.")
    profile_dir: str | None = _option(None, "Folder that /admin/start_profile lets jax write to; off without it.")

    def __post_init__(self) -> None:
        for name, allowed in (("tool_call_parser", TOOL_FORMATS), ("reasoning_parser", REASONING_MARKS)):
            if getattr(self, name) not in ("auto", "none", *allowed):
                raise ConfigError(f"{name} must be auto, none, {', '.join(allowed)}; got {getattr(self, name)!r}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {self.port}")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type is float and not 0 <= value < math.inf:
                raise ConfigError(f"{item.name} must be finite and at least 0, got {value}")
        for name, least in (("max_body_mib", 1), ("max_header_kib", 1), ("max_connections", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_requests_per_client < 0:
            raise ConfigError(f"max_requests_per_client must be at least 0, got {self.max_requests_per_client}")
        if not 0 <= self.api_processes <= MAX_API_PROCESSES:
            raise ConfigError(f"api_processes must be in [0, {MAX_API_PROCESSES}], got {self.api_processes}")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ConfigError("TLS needs both tls_cert_file and tls_key_file")
        for origin in self.cors_origins:
            if not re.fullmatch(r"https?://[^/\s,*]+", origin):
                raise ConfigError(f"cors_origins are of the form https://host[:port], without a path; got {origin!r}")

    def ssl_context(self) -> ssl.SSLContext | None:
        """What TLS is served with, or None.

        Raises:
            ConfigError: the files cannot be read or do not belong together.
        """
        if self.tls_cert_file is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.tls_cert_file, self.tls_key_file)
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or type(error).__name__
            raise ConfigError(f"tls_cert_file and tls_key_file cannot be used: {reason}") from None
        return context

    def check_trace_file(self) -> None:
        """Finds out before the model is loaded that there is no place for what is written at the end.

        Raises:
            ConfigError: the folder of trace_file is none, or cannot be written to.
        """
        if self.trace_file is not None:
            folder = Path(self.trace_file).absolute().parent
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                raise ConfigError(f"trace_file {self.trace_file!r} cannot be written: there is no writable {folder}")


def read_keys(path: str | None, flag: str, variable: str) -> list[str]:
    """Keys from an environment variable and a file, plain or hashed.

    Raises:
        ConfigError: the file cannot be read, holds no key, or a line is no key.
    """
    keys = [key] if (key := os.environ.get(variable, "").strip()) else []
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{flag} cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ConfigError(f"{flag} {path} holds no key")
        keys += found
    for number, key in enumerate(keys):
        if key.startswith("sha256:") and not _HASHED_KEY.fullmatch(key):
            raise ConfigError(f"key {number + 1} of {flag}: after sha256: come 64 digits of lower-case hexadecimal")
    return keys


def api_keys(options: ServerOptions) -> list[str]:
    """The accepted keys. See read_keys."""
    return read_keys(options.api_key_file, "api_key_file", "JAX_ENGINE_API_KEY")


def admin_keys(options: ServerOptions) -> list[str]:
    """The keys for the /admin addresses. See read_keys."""
    return read_keys(options.admin_key_file, "admin_key_file", "JAX_ENGINE_ADMIN_KEY")
