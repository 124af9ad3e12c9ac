"""`jax-engine convert`: what it writes loads bit for bit, and an interrupted conversion leaves nothing that loads."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints import orbax_io
from checkpoints.errors import CheckpointError
from checkpoints.formats import open_checkpoint
from checkpoints.loader import load
from jax_engine.models import read_config
from jax_engine.program import ModelProgram
from serving.cli import main

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "golden" / "tiny" / "llama"


def parameters(path: Path, dtype: str) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(str(path))
    program = ModelProgram(read_config(checkpoint.config), dtype, jax.devices()[:1])
    loaded = load(program.renamed(checkpoint), program.wanted, ignore=program.ignored_tensors, progress=False)
    return jax.device_get(loaded)


@pytest.mark.parametrize(("flags", "dtype"), [((), "bfloat16"), (("--dtype=float32",), "float32")])
def test_a_converted_model_is_the_same_bit_for_bit(tmp_path, capsys, flags, dtype):
    assert main(["convert", str(TINY), f"--out={tmp_path / 'out'}", *flags]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    converted = open_checkpoint(str(tmp_path / "out"))
    assert converted.format == "orbax" and {info.dtype for info in converted.tensors.values()} == {dtype}
    source = open_checkpoint(str(TINY))
    assert (converted.config, converted.generation_config) == (source.config, source.generation_config)
    want, got = parameters(TINY, dtype), parameters(tmp_path / "out", dtype)
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert value.dtype == got[name].dtype and value.tobytes() == got[name].tobytes()


def test_the_log_of_a_conversion_is_one_line(tmp_path):
    command = [sys.executable, "-m", "serving.cli", "convert", str(TINY), f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    [line] = [line for line in done.stderr.splitlines() if " INFO " in line]
    assert " INFO jax_engine.convert: " in line


def test_what_cannot_be_converted_is_told(tmp_path, capsys):
    assert main(["convert", str(TINY)]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["convert", str(TINY), f"--out={tmp_path}"]) == 1
    assert "exists already; name a new folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nothing"), f"--out={tmp_path / 'out'}"]) == 1
    assert not (tmp_path / "out").exists()


STOPS = """
import os, signal, sys
from checkpoints import orbax_io
from jax_engine.convert import convert

name, stop_at = sys.argv[3], int(sys.argv[4])
reached = 0
function = getattr(orbax_io, name)

def stopping(*args):
    global reached
    reached += 1
    if reached == stop_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)

setattr(orbax_io, name, stopping)
convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize(
    ("function", "stop_at"),
    [pytest.param("_write_parameters", 1, marks=pytest.mark.long), ("_write_json", 1), ("_write_json", 3)],
)
def test_a_killed_conversion_leaves_nothing_that_loads(tmp_path, function, stop_at):
    """Killed before the parameters, after them, and when only the marker is missing."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", STOPS, str(TINY), str(out), function, str(stop_at)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and not (left[0] / orbax_io.MARKER_NAME).exists()
    with pytest.raises(CheckpointError, match="not a model"):
        open_checkpoint(str(left[0]))
    with pytest.raises(CheckpointError, match="is not a model"):
        open_checkpoint(str(out))
