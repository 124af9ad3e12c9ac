"""KeptPrograms: what tracing and lowering make of a program, kept in a folder from one start to the next.

compilation.py asks it for every program of an engine. Tracing and lowering take the interpreter, one program after the
other, and no cache of jax's saves them; what they make, StableHLO, is written by jax.export and read in a hundredth of
the time. Compiling it is left to jax, whose own cache serves executables.

A program always goes through its exported form, read or just made, so that jax compiles, and finds, the same either
way. What cannot be read or written costs time and nothing else.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from jax_engine.compilation import Program

_log = logging.getLogger(__name__)

#: What files may take in all: some twenty configurations of an 8B model. The oldest are removed.
MAX_BYTES = 512 << 20
_SUFFIX = ".stablehlo"
#: Whose sources make the programs, and what else may: whichever of these differs, they are made again.
_OWN_PACKAGES = ("jax_engine", "pallas_kernels", "checkpoints")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_EXPORT_NAMES = {"gpu": "cuda"}
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "MOSAIC_")


class KeptPrograms:
    """Exported programs in a folder, each in a file named by what it was made of.

    Args:
        folder: need not exist. Who can write there decides what the engine runs, as with jax's compilation cache.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._keeps = True

    def lower(self, program: Program) -> jax.stages.Lowered:
        """The program, ready to be compiled; traced only if no exported form of it is kept."""
        key = program_key(program)
        exported = self._read(key) or self._make(key, program)
        return program.lower() if exported is None else _imported(program, exported).lower()

    def _read(self, key: str) -> jax.export.Exported | None:
        path = self._path(key)
        try:
            kept = path.read_bytes()
            os.utime(path)  # the latest that is of use
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            _log.warning("cannot read a lowered program, which is made again: %s", error)
            return None
        data = kept[hashlib.sha256().digest_size :]
        if kept != _digest(key, data) + data:
            _log.warning("a lowered program is damaged and is made again: %s", path)
            return None
        return jax.export.deserialize(bytearray(data))

    def _make(self, key: str, program: Program) -> jax.export.Exported | None:
        """Exports the program and keeps it; None where jax cannot export it."""
        try:
            exported = _exported(program)
            data = bytes(exported.serialize())
        except (ImportError, ValueError, NotImplementedError) as error:
            _log.warning("the program %s cannot be kept: %s", program.name, error)
            return None
        if self._keeps:
            self._write(key, data)
        return exported

    def _write(self, key: str, data: bytes) -> None:
        """Keeps one; where that fails, it is said once and not tried again."""
        path = self._path(key)
        unfinished = path.with_suffix(f"{_SUFFIX}.{os.getpid()}-{threading.get_ident()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(_digest(key, data) + data)
            unfinished.replace(path)
            self._prune()
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            self._keeps = False
            _log.warning("cannot keep lowered programs, which are made again at the next start: %s", error)

    def _prune(self) -> None:
        """Removes the files that were of no use for the longest time, until the others fit."""
        found = []
        for path in self._folder.glob(f"*{_SUFFIX}*"):
            if path.is_file():
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= MAX_BYTES:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


def program_key(program: Program) -> str:
    """A digest of all that a program's StableHLO depends on."""
    leaves, tree = jax.tree.flatten((program.arguments, program.results))
    parts = (
        program.name,
        program.made_of,
        program.donate,
        program.precision,
        program.mesh.shape,
        [str(device.device_kind) for device in program.mesh.devices.flat],
        tree,
        [_described(leaf) for leaf in leaves],
        _environment(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _described(leaf: Any) -> tuple:
    """An argument's shape and place, or a result's place."""
    sharding = getattr(leaf, "sharding", leaf)
    place = sharding.spec, sharding.memory_kind
    return (leaf.shape, str(leaf.dtype), *place) if isinstance(leaf, jax.ShapeDtypeStruct) else place


def _environment() -> tuple:
    """What all programs of this process depend on."""
    options = {name: value for name, value in jax.config.values.items() if name != "jax_compilation_cache_dir"}
    variables = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    return platform.python_version(), sorted(options.items()), sorted(variables.items()), _versions(), _sources()


@functools.cache
def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in _source_files():
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)} ".encode() + data)
    return digest.hexdigest()


def _source_files() -> Iterator[Path]:
    for name in _OWN_PACKAGES:
        found = importlib.util.find_spec(name)
        assert found is not None
        for folder in found.submodule_search_locations or ():
            yield from sorted(Path(folder).rglob("*.py"))


def _exported(program: Program) -> jax.export.Exported:
    """The program with its arguments as a flat list, as jax.export keeps no dicts of numbers."""
    leaves, tree = jax.tree.flatten(program.arguments)
    flat = _named(program.name, lambda *leaves: program.function(*jax.tree.unflatten(tree, leaves)))
    kind = str(program.mesh.devices.flat[0].platform)
    with program.context():
        made = jax.jit(flat, out_shardings=program.results)
        return jax.export.export(made, platforms=(_EXPORT_NAMES.get(kind, kind),))(*leaves)


def _imported(program: Program, exported: jax.export.Exported) -> Program:
    """The same program, lowered already."""

    def call(*arguments: Any) -> Any:
        # jit would hold every argument of an exported program for one that is of use, as all weights for the sampler.
        leaves = [
            leaf if number in exported.module_kept_var_idx else jnp.zeros(leaf.shape, leaf.dtype)
            for number, leaf in enumerate(jax.tree.leaves(arguments))
        ]
        return exported.call(*leaves)

    return replace(program, function=_named(program.name, call))


def _named(name: str, function: Callable) -> Callable:
    """Traces and the compilation cache's files show it."""
    function.__name__ = name
    return function


def _digest(key: str, data: bytes) -> bytes:
    return hashlib.sha256(key.encode() + data).digest()
