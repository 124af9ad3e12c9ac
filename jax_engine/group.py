"""Group: several processes, on one host or more, that hold one model between them and run the same steps.

Process 0 leads: it has the scheduler, and sends each step's batch to the others before it dispatches the step itself.
The others follow: they dispatch what they are sent. start.py joins a group; model_runner.py and loader.py need to know
only that some devices are not this process's own. The messages travel over plain TCP beside jax.distributed's own
connections, and deserve the same trust: the network between the hosts must be the operator's.

A process that loses another cannot go on, as its next sum over devices would never end. Each tells the others every
second that it lives; one that hears nothing for a few seconds says so and ends with EXIT_CODE, for a supervisor to
start the whole group again.
"""

import atexit
import logging
import os
import queue
import socket
import struct
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_engine.batch import Batch, StepResult
from jax_engine.config import EngineConfig, Limits
from jax_engine.errors import ConfigError
from jax_engine.plan_codec import Order, Sampling, decode, encode
from jax_engine.schedule import Copies

_log = logging.getLogger(__name__)

#: What a process ends with when another is lost.
EXIT_CODE = 70
_HELLO = b"jax-engine plans 1"
_LENGTH = struct.Struct(">I")
_MAX_MESSAGE_BYTES = 64 << 20
_JOIN_SECONDS = 120.0
_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 6.0
_ALIVE, _STOP = b"", b"stop"


def join(config: EngineConfig) -> "Leader | Follower":
    """Joins the group that the configuration names; blocks until all processes have. Before anything else of jax.

    Raises:
        ConfigError: the others do not come.
    """
    assert config.coordinator_address is not None
    host, port = config.coordinator_address.rsplit(":", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            initialization_timeout=int(_JOIN_SECONDS),
        )
        address = (host, int(port) + 1)
        if config.process_id == 0:
            return Leader(_accept(address, config.num_processes - 1))
        return Follower(_connect(address, config.process_id))
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"process {config.process_id} of {config.num_processes} cannot join the group at "
            f"{config.coordinator_address} (and the port above it): {error}"
        ) from error


def least(value: int) -> int:
    """The least of the processes' values. All of them have to ask."""
    if jax.process_count() == 1:
        return value
    return int(np.min(multihost_utils.process_allgather(np.array([value], np.int64))))


class Leader:
    """Process 0's side.

    Args:
        peers: a connection to every other process, by its number.
    """

    def __init__(self, peers: dict[int, socket.socket]):
        self._lines = [_Line(peer, f"process {number}") for number, peer in sorted(peers.items())]
        atexit.register(self.stop)

    def send(self, order: Order) -> None:
        """Sends an order to all others."""
        message = encode(order)
        for line in self._lines:
            line.send(message)

    def stop(self) -> None:
        """Lets the others end, as this process does."""
        for line in self._lines:
            line.stop()


class Follower:
    """Any other process's side."""

    def __init__(self, leader: socket.socket):
        self._line = _Line(leader, "process 0")

    def run(self, runner: Any) -> None:
        """Dispatches what process 0 sends, until it stops."""
        handle = None
        while (message := self._line.receive()) != _STOP:
            order = decode(message)
            if isinstance(order, Sampling):
                runner.sample(handle, order.batch, order.mask)
            elif isinstance(order, Copies):
                runner.copy_pages(order)
            else:
                handle = runner.dispatch(order)


class LeadingRunner:
    """The Runner of a group's process 0: what it dispatches, all processes do."""

    def __init__(self, runner: Any, leader: Leader):
        self.limits: Limits = runner.limits
        self._runner = runner
        self._leader = leader

    def dispatch(self, batch: Batch) -> Any:
        """Enqueues a step everywhere and returns at once."""
        self._leader.send(batch)
        return _Handle(self._runner.dispatch(batch))

    def sample(self, handle: Any, batch: Batch, mask: np.ndarray) -> None:
        """Enqueues the sampling of a structured step everywhere and returns at once."""
        self._leader.send(Sampling(batch, mask))
        self._runner.sample(handle.own, batch, mask)

    def copy_pages(self, copies: Copies) -> None:
        """Enqueues the copies everywhere and returns at once."""
        self._leader.send(copies)
        self._runner.copy_pages(copies)


class _Handle:
    """A step in flight everywhere. `own`: this process's handle of it."""

    def __init__(self, own: Any):
        self.own = own

    def is_ready(self) -> bool:
        return self.own.is_ready()

    def result(self) -> StepResult:
        try:
            return self.own.result()
        except Exception:
            # A sum over the devices fails when a process is lost. The line to it notices too, and ends this process
            # with a message that says so, before this wait is over.
            time.sleep(_SILENCE_SECONDS + _BEAT_SECONDS)
            raise


class _Line:
    """A connection to one process: messages with their length before them, and signs of life.

    Losing the other process ends this one.
    """

    def __init__(self, connection: socket.socket, other: str):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_SILENCE_SECONDS)
        self._connection = connection
        self._other = other
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        for work in (self._beat, self._listen):
            threading.Thread(target=work, name=f"line to {other}", daemon=True).start()

    def send(self, message: bytes) -> None:
        try:
            with self._lock:
                self._connection.sendall(_LENGTH.pack(len(message)) + message)
        except OSError as error:
            self._lose(error)

    def receive(self) -> bytes:
        return self._received.get()

    def stop(self) -> None:
        """Tells the other side to end, once."""
        if not self._closed.is_set():
            self._closed.set()
            self.send(_STOP)

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            self.send(_ALIVE)

    def _listen(self) -> None:
        try:
            while True:
                (length,) = _LENGTH.unpack(_read(self._connection, _LENGTH.size))
                if length > _MAX_MESSAGE_BYTES:
                    raise OSError(f"a message of {length} bytes; at most {_MAX_MESSAGE_BYTES} are allowed")
                message = _read(self._connection, length)
                if message == _STOP:
                    self._closed.set()
                if message != _ALIVE:
                    self._received.put(message)
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if self._closed.is_set():
            return
        # Straight to the file: whoever reads the log may be the thread that hangs in a step.
        print(
            f"jax-engine: lost {self._other} of the group ({error}); this process ends, start the group again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)


def _read(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise ConnectionError("it closed the connection")
        parts += part
    return bytes(parts)


def _accept(address: tuple[str, int], count: int) -> dict[int, socket.socket]:
    """A connection from each of the other processes."""
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _JOIN_SECONDS
    with socket.create_server(address) as server:
        while len(peers) < count:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            connection, _ = server.accept()
            connection.settimeout(_SILENCE_SECONDS)
            hello = _read(connection, len(_HELLO) + 4)
            number = int.from_bytes(hello[-4:], "big")
            if hello[:-4] != _HELLO or not 1 <= number <= count or number in peers:
                connection.close()
                raise ConnectionError("somebody connected who is no other process of this group")
            peers[number] = connection
    return peers


def _connect(address: tuple[str, int], number: int) -> socket.socket:
    deadline = time.monotonic() + _JOIN_SECONDS
    while True:
        try:
            connection = socket.create_connection(address, timeout=_SILENCE_SECONDS)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
            continue
        connection.sendall(_HELLO + number.to_bytes(4, "big"))
        return connection
