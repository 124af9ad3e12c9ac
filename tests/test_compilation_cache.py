"""A compilation cache that was damaged, as by a full disk, costs time and nothing else."""

import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from jax_engine import model_runner

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
from jax_engine import LLM, SamplingParams
llm = LLM(model="tests/golden/tiny/llama", max_model_len=64, max_num_seqs=2, token_buckets=(16,), decode_buckets=(2,),
          compilation_cache_dir=sys.argv[1])
print(llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids)
"""


def answer(folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder that holds the cache of one start, and that start's answer."""
    folder = tmp_path_factory.mktemp("cache")
    wanted = answer(folder)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) > 10_000
    return folder, wanted


def one_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: random.Random(0).randbytes(len(data)),
    "backwards": lambda data: data[::-1],
    "one bit": one_bit,
}


@pytest.mark.long
@pytest.mark.parametrize("damage", [*DAMAGES, "folders", "unreadable"])
def test_damaged_entries(tmp_path, filled, damage):
    if damage == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    folder = shutil.copytree(filled[0], tmp_path / "cache")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if damage == "folders":
            path.unlink()
            path.mkdir()
        elif damage == "unreadable":
            path.chmod(0)
        else:
            path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert answer(folder) == filled[1]


@pytest.mark.long
def test_a_file_where_the_folder_should_be(tmp_path, filled):
    (tmp_path / "cache").write_text("not a folder")
    assert answer(tmp_path / "cache") == filled[1]


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model_runner._use_compilation_cache(tmp_path)
        warnings.warn("Error writing persistent compilation cache entry for 'step': disk", stacklevel=1)
    assert not told and [record.message.partition(":")[0] for record in caplog.records] == [
        f"{tmp_path} cannot be written"
    ]
