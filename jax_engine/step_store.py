"""StepStore: compiled steps kept on disk, so that a restart neither traces, lowers nor compiles them.

compilation.py asks it before it lowers a step, and gives it what was compiled. jax's own cache is keyed by the lowered
program, and lowering is Python: about 2 s for each of some 20 buckets of an 8B model. Here the key is everything that
the program is made from: the sources of this package and of the kernels, versions, flags, device, model and limits.

An entry runs as code, so only files that nobody else could have written are read.
"""

import hashlib
import importlib.metadata
import logging
import os
import pickle
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

_log = logging.getLogger(__name__)

#: Of the sources that make a step, and the packages that compile it.
_SOURCES = ("jax_engine", "pallas_kernels")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
#: Entries that nobody asked for this long are deleted.
_MAX_AGE_SECONDS = 30 * 24 * 3600


class StepStore:
    """Compiled programs for some devices.

    Args:
        folder: of the entries; made if it is not there.
        devices: what the programs run on.
        facts: whatever else the programs are made from; their `repr` tells them apart.
    """

    def __init__(self, folder: Path, devices: list[Any], *facts: Any):
        self._folder = folder
        self._devices = devices
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._trusted = _is_own(folder)
        if not self._trusted:
            _log.warning("compiled steps are not kept in %s: others than its owner can write there", folder)
        client, flags = devices[0].client, [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
        kinds = [device.device_kind for device in devices]
        self._common = repr((_digest(_sources()), _versions(), client.platform_version, kinds, flags, facts))
        self._delete_old()

    def load(self, name: str, arguments: Any, results: Any) -> jax.stages.Compiled | None:
        """A program, or None where it is not there or cannot be used.

        Args:
            name: of the program. arguments: what it takes, as jax.ShapeDtypeStructs. results: any pytree of the form of
                what it gives.
        """
        file = self._file(name, arguments)
        if not self._trusted or not file.exists() or not _is_own(file):
            return None
        try:
            compiled = serialize_executable.deserialize_and_load(
                file.read_bytes(),
                jax.tree.structure((arguments, {})),
                jax.tree.structure(results),
                backend=self._devices[0].client,
                execution_devices=self._devices,
            )
        except Exception as error:  # jax raises various kinds; whatever it is, compiling anew mends it
            _log.warning("the compiled step in %s cannot be read, it is compiled anew: %s", file, error)
            return None
        os.utime(file)
        return compiled

    def save(self, name: str, arguments: Any, results: Any, compiled: jax.stages.Compiled) -> None:
        """Keeps a program. One that could not be given back as it is, is not kept."""
        if not self._trusted or compiled.out_tree != jax.tree.structure(results):
            return
        try:
            content = serialize_executable.serialize(compiled)[0]
        except (ValueError, NotImplementedError, pickle.PicklingError, jax.errors.JaxRuntimeError) as error:
            _log.warning("the compiled step %s cannot be kept: %s", name, error)
            return
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as partial:  # its mode is 0600
            partial.write(content)
        os.replace(partial.name, self._file(name, arguments))

    def _file(self, name: str, arguments: Any) -> Path:
        shapes = [(a.shape, str(a.dtype), str(getattr(a, "sharding", None))) for a in jax.tree.leaves(arguments)]
        key = repr((self._common, name, str(jax.tree.structure(arguments)), shapes))
        return self._folder / f"{_digest([key.encode()])}.step"

    def _delete_old(self) -> None:
        for file in self._folder.glob("*.step"):
            try:
                if self._trusted and time.time() - file.stat().st_mtime > _MAX_AGE_SECONDS:
                    file.unlink()
            except FileNotFoundError:  # another process was faster
                continue


def _is_own(path: Path) -> bool:
    """Whether nobody but this process's user, or root, can have written there."""
    status = path.stat()
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def _sources() -> Iterable[bytes]:
    root = Path(__file__).resolve().parent.parent
    for package in _SOURCES:
        for file in sorted((root / package).rglob("*.py")):
            yield str(file.relative_to(root)).encode()
            yield file.read_bytes()


def _versions() -> list[str]:
    return [importlib.metadata.version(name) for name in _PACKAGES]


def _digest(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8) + part)
    return state.hexdigest()
