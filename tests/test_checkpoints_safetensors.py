"""Safetensors folders: what is read, and that no damaged file gets past the header check or crashes it."""

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.numpy import load_file, save_file

from checkpoints import safetensors_io
from checkpoints.errors import CheckpointError
from checkpoints.formats import open_checkpoint

TINY = Path(__file__).parent / "golden" / "tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of the tiny llama."""
    return Path(shutil.copytree(TINY / "llama", tmp_path / "llama"))


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


@pytest.mark.parametrize("name", ["llama", "llama3_rope"])
def test_reads_what_the_safetensors_library_reads(name: str) -> None:
    checkpoint = open_checkpoint(str(TINY / name))
    expected = load_file(TINY / name / "model.safetensors")
    assert checkpoint.format == "safetensors"
    assert set(checkpoint.tensors) == set(expected)
    for tensor, values in expected.items():
        info = checkpoint.tensors[tensor]
        assert (info.shape, info.dtype) == (values.shape, "bfloat16")
        np.testing.assert_array_equal(info.read(), values)


def test_config_and_ids_without_a_tokenizer() -> None:
    checkpoint = open_checkpoint(str(TINY / "llama"))
    assert checkpoint.config["hidden_size"] == 64
    assert checkpoint.load_tokenizer() is None
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id, checkpoint.chat_template) == ((2,), 1, None)


def test_every_dtype(tmp_path: Path) -> None:
    dtypes = [
        np.float64,
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        np.int64,
        np.uint8,
        np.bool_,
    ]
    arrays = {str(i): np.arange(6).reshape(2, 3).astype(dtype) for i, dtype in enumerate(dtypes)}
    arrays |= {"empty": np.zeros((0, 4), np.float32), "scalar": np.array(3.5, np.float32)}
    save_file(arrays, tmp_path / "x.safetensors")
    for name, info in safetensors_io.read_header(tmp_path / "x.safetensors").items():
        assert info.dtype == arrays[name].dtype.name
        np.testing.assert_array_equal(info.read(), arrays[name])


def shard(folder: Path) -> dict[str, np.ndarray]:
    """Splits the model into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(2):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        names = sorted(tensors)[part::2]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_shards(folder: Path) -> None:
    tensors = shard(folder)
    checkpoint = open_checkpoint(str(folder))
    assert set(checkpoint.tensors) == set(tensors)
    for name, values in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), values)


def test_missing_and_cut_shards_are_reported_together(folder: Path) -> None:
    shard(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-10])
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "generation_config.json" in text and "model-00001-of-00002.safetensors" in text
    assert "model-00002-of-00002.safetensors: tensor model." in text


def test_index_that_points_outside_is_refused(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors", "b": 3}}))
    with pytest.raises(CheckpointError, match=r"tensor a: the shard must be") as caught:
        open_checkpoint(str(folder))
    assert len(caught.value.problems) == 2


def test_tensor_the_index_places_in_the_wrong_shard(folder: Path) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"extra.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors: tensor extra.weight: missing"):
        open_checkpoint(str(folder))


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": F32}, bytes(7), "tensor a: lies at bytes 0 to 8 of 7 bytes"),
        ({"a": F32 | {"shape": [3]}}, bytes(8), "tensor a: F32 of shape .3. takes 12 bytes"),
        ({"a": F32 | {"shape": [2**62, 2**62]}}, bytes(8), "tensor a: F32 of shape"),
        ({"a": F32 | {"shape": [-2]}}, bytes(8), "tensor a: shape must be"),
        ({"a": F32 | {"shape": [True]}}, bytes(8), "tensor a: shape must be"),
        ({"a": F32 | {"dtype": "F31"}}, bytes(8), "tensor a: dtype 'F31' is not supported"),
        ({"a": F32 | {"dtype": []}}, bytes(8), "tensor a: dtype .. is not supported"),
        ({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8), "tensor a: data_offsets must be"),
        ({"a": [1]}, bytes(8), "tensor a: its header entry must be an object"),
        ({"a": F32, "b": F32}, bytes(8), "tensor b: begins at byte 0 of the data, expected 8"),
        ({"a": F32}, bytes(9), "1 bytes after the last tensor"),
        ([], b"", "must be a JSON object"),
        (b"[" * 10**5, b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "occurs twice"),
        (b"\xff\xfe", b"", "not valid JSON"),
    ],
)
def test_lying_headers(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        safetensors_io.read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**40, 99_000_000])
def test_absurd_header_length_takes_no_memory(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=f"claims {length} bytes"):
        safetensors_io.read_header(write(tmp_path / "x.safetensors", {}, b"", length))


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": F32 | {"shape": [9]}, "b": F32 | {"dtype": "?"}, "c": F32}, bytes(8))
    with pytest.raises(CheckpointError) as caught:
        safetensors_io.read_header(path)
    assert [problem.split(": ")[1] for problem in caught.value.problems] == ["tensor a", "tensor b"]


def test_file_cut_after_opening_is_an_error_not_a_crash(folder: Path) -> None:
    info = open_checkpoint(str(folder)).tensors["model.norm.weight"]
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"tensor model.norm.weight: cannot be read"):
        info.read()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_an_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    whole = write(
        tmp_path / "x.safetensors", {"a": F32, "b": F32 | {"data_offsets": [8, 16]}, "__metadata__": {}}, bytes(16)
    ).read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "y.safetensors"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        tensors = safetensors_io.read_header(path)
    except CheckpointError:
        return
    for info in tensors.values():
        assert info.read().shape == info.shape
