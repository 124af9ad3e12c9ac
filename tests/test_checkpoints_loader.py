"""Weights onto devices: assembled, checked, cast, restored from Orbax, or made up."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from checkpoints import loader, orbax_io
from checkpoints.errors import CheckpointError
from checkpoints.formats import Checkpoint, open_checkpoint
from checkpoints.weight_map import Wanted, check, fuse, take, transpose

TINY = Path(__file__).parent / "golden" / "tiny" / "llama"
LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(str(TINY))


@pytest.fixture(scope="module")
def sharding() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def wanted(sharding: jax.sharding.Sharding) -> dict[str, Wanted]:
    def concatenate(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([part.T for part in parts], axis=1)

    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64)}
    qkv = fuse(concatenate, *((f"{LAYER}self_attn.{name}_proj.weight", shape) for name, shape in shapes.items()))
    return {
        "embed": Wanted((320, 64), jnp.float32, sharding, take("model.embed_tokens.weight", (320, 64))),
        "qkv": Wanted((64, 128), jnp.bfloat16, sharding, qkv),
        "down": Wanted((112, 64), "float16", sharding, transpose(f"{LAYER}mlp.down_proj.weight", (64, 112))),
        "norm": Wanted((64,), jnp.float32, sharding, take("model.norm.weight", (64,)), init="ones"),
    }


def test_parameters_are_assembled_and_cast(checkpoint: Checkpoint, wanted: dict[str, Wanted]) -> None:
    stored = load_file(TINY / "model.safetensors")
    params = loader.load(checkpoint, wanted, ignore=["model.layers.*"], progress=False)
    assert {name: (p.shape, p.dtype) for name, p in params.items()} == {
        name: (w.shape, jnp.dtype(w.dtype)) for name, w in wanted.items()
    }
    q, k, v = (stored[f"{LAYER}self_attn.{name}_proj.weight"] for name in "qkv")
    np.testing.assert_array_equal(params["qkv"], np.concatenate([q, k, v]).T)
    np.testing.assert_array_equal(params["down"], stored[f"{LAYER}mlp.down_proj.weight"].T.astype(np.float16))
    np.testing.assert_array_equal(params["embed"], stored["model.embed_tokens.weight"].astype(np.float32))


def test_device_arrays_do_not_depend_on_the_file(tmp_path: Path, sharding: jax.sharding.Sharding) -> None:
    copy = Path(shutil.copytree(TINY, tmp_path / "llama"))
    want = {"embed": Wanted((320, 64), jnp.bfloat16, sharding, take("model.embed_tokens.weight", (320, 64)))}
    param = loader.load(open_checkpoint(str(copy)), want, ignore=["*"], progress=False)["embed"]
    before = np.array(param)
    with (copy / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    np.testing.assert_array_equal(param, before)


def test_everything_that_does_not_fit_is_named_at_once(
    checkpoint: Checkpoint, sharding: jax.sharding.Sharding, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {
        "gone": Wanted((1,), jnp.float32, sharding, take("model.gone.weight", (1,))),
        "embed": Wanted((320, 65), jnp.float32, sharding, take("model.embed_tokens.weight", (320, 65))),
    }
    monkeypatch.setattr(jax, "device_put", None)
    with pytest.raises(CheckpointError) as caught:
        loader.load(checkpoint, wanted, ignore=["model.layers.*"], progress=False)
    problems = caught.value.problems
    assert len(problems) == 3 and all(str(TINY) in problem for problem in problems)
    assert "tensor model.gone.weight: missing; parameter gone" in problems[0]
    assert "tensor model.embed_tokens.weight: shape must be (320, 65), got (320, 64)" in problems[1]
    assert "tensor model.norm.weight: unexpected" in problems[2]


def test_ignored_names_are_patterns(checkpoint: Checkpoint) -> None:
    assert check({}, checkpoint.tensors, ["model.*"]) == []
    left = check({}, checkpoint.tensors, ["*_proj.weight", "*norm.weight"])
    assert len(left) == 1 and "model.embed_tokens.weight" in left[0]


def test_assembled_shape_is_checked(checkpoint: Checkpoint, sharding: jax.sharding.Sharding) -> None:
    want = {"down": Wanted((64, 112), jnp.float32, sharding, transpose(f"{LAYER}mlp.down_proj.weight", (64, 112)))}
    with pytest.raises(CheckpointError, match="parameter down: shape must be"):
        loader.load(checkpoint, want, ignore=["*"], progress=False)


@pytest.fixture
def saved(tmp_path: Path, checkpoint: Checkpoint, wanted: dict[str, Wanted]) -> tuple[Path, dict[str, jax.Array]]:
    params = loader.load(checkpoint, wanted, ignore=["*"], progress=False)
    orbax_io.save(tmp_path / "saved", params, config=checkpoint.config, generation_config={"eos_token_id": [5]})
    return tmp_path / "saved", params


def test_orbax_round_trip(saved: tuple[Path, dict[str, jax.Array]], wanted: dict[str, Wanted]) -> None:
    folder, params = saved
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.format, checkpoint.eos_token_ids) == ("orbax", (2, 5))
    assert checkpoint.config["hidden_size"] == 64
    assert not list(folder.parent.glob(".*"))
    restored = loader.load(checkpoint, wanted, progress=False)
    for name, param in params.items():
        assert restored[name].dtype == param.dtype and restored[name].sharding == wanted[name].sharding
        assert np.asarray(restored[name]).tobytes() == np.asarray(param).tobytes()
        assert checkpoint.tensors[name].read().tobytes() == np.asarray(param).tobytes()


def test_orbax_casts_and_checks(saved: tuple[Path, dict[str, jax.Array]], sharding: jax.sharding.Sharding) -> None:
    folder, params = saved
    checkpoint = open_checkpoint(str(folder))
    want = {name: Wanted(p.shape, jnp.float32, sharding, take("elsewhere", (1,))) for name, p in params.items()}
    restored = loader.load(checkpoint, want, progress=False)
    np.testing.assert_array_equal(restored["qkv"], params["qkv"].astype(jnp.float32))
    want["extra"] = want.pop("embed")
    with pytest.raises(CheckpointError) as caught:
        loader.load(checkpoint, want, progress=False)
    assert len(caught.value.problems) == 2


def test_orbax_keeps_the_tokenizer(tmp_path: Path, checkpoint: Checkpoint) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": "T"}))
    files = open_checkpoint(str(source)).tokenizer_files
    orbax_io.save(tmp_path / "saved", {"a": np.ones(2)}, config=checkpoint.config, tokenizer_files=files)
    back = open_checkpoint(str(tmp_path / "saved"))
    tokenizer = back.load_tokenizer()
    assert tokenizer is not None and tokenizer.encode("a").ids == [0]
    assert (back.eos_token_ids, back.chat_template, back.special_tokens) == ((1, 2), "T", {"eos_token": "</s>"})


def test_orbax_damage(saved: tuple[Path, dict[str, jax.Array]], wanted: dict[str, Wanted]) -> None:
    folder, params = saved
    with pytest.raises(CheckpointError, match="exists already"):
        orbax_io.save(folder, params, config={})
    for data in folder.glob("parameters/**/d/*"):
        data.write_bytes(data.read_bytes()[:10])
    with pytest.raises(CheckpointError, match="cannot be restored"):
        loader.load(open_checkpoint(str(folder)), wanted, progress=False)
    shutil.rmtree(folder / "parameters")
    with pytest.raises(CheckpointError, match="parameters: missing"):
        open_checkpoint(str(folder))
    (folder / orbax_io.MARKER_NAME).write_text('{"format_version": 99}')
    with pytest.raises(CheckpointError, match="format_version must be 1, got 99"):
        open_checkpoint(str(folder))


def test_failed_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        orbax_io.save(tmp_path / "saved", {"a": np.ones(2)}, config={"not json": object()})
    assert list(tmp_path.iterdir()) == []


def test_dummy_weights(wanted: dict[str, Wanted], sharding: jax.sharding.Sharding) -> None:
    zeros = Wanted((3,), jnp.float32, sharding, take("z", (3,)), init="zeros")
    with jax.transfer_guard("disallow"):
        first = loader.dummy({**wanted, "zeros": zeros}, 0)
        again = loader.dummy({"embed": wanted["embed"]}, 0)
        other = loader.dummy({"embed": wanted["embed"], "embed2": wanted["embed"]}, 1)
    assert first["embed"].sharding == sharding and first["qkv"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(first["norm"], np.ones(64))
    np.testing.assert_array_equal(first["zeros"], np.zeros(3))
    embed = np.asarray(first["embed"])
    assert np.std(embed) == pytest.approx(0.02, rel=0.05) and abs(np.mean(embed)) < 1e-3
    np.testing.assert_array_equal(first["embed"], again["embed"])
    assert not np.array_equal(first["embed"], other["embed"])
    assert not np.array_equal(other["embed2"], other["embed"])


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from checkpoints import loader, orbax_io
from checkpoints.formats import open_checkpoint
from checkpoints.weight_map import Wanted, take

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
checkpoint = open_checkpoint(sys.argv[1])

def wanted(*spec):
    specs = {1: PartitionSpec(), 2: PartitionSpec(*spec)}
    tensors = {name: info for name, info in checkpoint.tensors.items() if ".1." not in name and ".2." not in name}
    return {
        name: Wanted(info.shape, jnp.bfloat16, NamedSharding(mesh, specs[len(info.shape)]), take(name, info.shape))
        for name, info in tensors.items()
    }

first, second = wanted("a", "b"), wanted(None, "a")
with jax.transfer_guard("disallow"):
    params = loader.load(checkpoint, first, ignore=["*.1.*", "*.2.*"], progress=False)
    dummies = loader.dummy(first, 0), loader.dummy(second, 0)
orbax_io.save(sys.argv[2], params, config=checkpoint.config)
restored = loader.load(open_checkpoint(sys.argv[2]), second, progress=False)
for name in first:
    assert params[name].sharding == dummies[0][name].sharding == first[name].sharding
    assert restored[name].sharding == second[name].sharding
    np.testing.assert_array_equal(params[name], checkpoint.tensors[name].read())
    np.testing.assert_array_equal(restored[name], params[name])
    np.testing.assert_array_equal(dummies[0][name], dummies[1][name])
"""


def test_on_a_mesh_of_four_devices(tmp_path: Path) -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", SHARDED, str(TINY), str(tmp_path / "saved")]
    subprocess.run(command, check=True, cwd=root, env=env, timeout=120)
