"""A compilation cache that was damaged, as by a full disk, costs time and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.long
@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "not a file"])
def test_a_damaged_compilation_cache(tmp_path, damage):
    wanted = answer(tmp_path)
    entries = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in entries) > 10_000
    for path in entries:
        data = path.read_bytes()
        if damage == "not a file":
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes({"cut": data[: len(data) // 2], "changed": data[::-1], "emptied": b""}[damage])
    assert answer(tmp_path) == wanted
