"""Set-up on a fresh machine: which Python is found, and what a failed install leaves behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SYSTEM_PATH = "/usr/bin:/bin"

pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="no POSIX shell")


def find_python(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the finder where only the commands of `folder` and the system's are on PATH."""
    environment = {"PATH": f"{folder}:{SYSTEM_PATH}", "HOME": str(folder), **environment}
    command = ["sh", str(ROOT / ".ci" / "find_python.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def command(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def refuse(folder: Path, *names: str) -> None:
    """Puts commands in front of the system's own that fail, as a pyenv shim of a Python that is not active does."""
    for name in names:
        command(folder / name, "exit 127")


def test_named_python_is_taken(tmp_path: Path) -> None:
    found = find_python(tmp_path, PYTHON=sys.executable)
    assert (found.returncode, found.stdout.strip()) == (0, sys.executable)


def test_named_python_that_does_not_run_is_refused(tmp_path: Path) -> None:
    found = find_python(tmp_path, PYTHON="/no/such/python")
    assert found.returncode == 1
    assert "PYTHON=/no/such/python is no Python 3.12" in found.stderr


def test_a_command_that_exists_but_does_not_run_is_passed_over(tmp_path: Path) -> None:
    refuse(tmp_path, "python3.14", "python3.13")
    command(tmp_path / "python3.12", f'exec {sys.executable} "$@"')
    assert find_python(tmp_path).stdout.strip() == sys.executable


def test_pyenv_is_searched(tmp_path: Path) -> None:
    refuse(tmp_path, "python3.14", "python3.13", "python3.12", "python3")
    command(tmp_path / "root" / "versions" / "3.12.9" / "bin" / "python", f'exec {sys.executable} "$@"')
    assert find_python(tmp_path, PYENV_ROOT=str(tmp_path / "root")).stdout.strip() == sys.executable


def test_no_python_gives_a_message(tmp_path: Path) -> None:
    refuse(tmp_path, "python3.14", "python3.13", "python3.12", "python3")
    found = find_python(tmp_path)
    assert (found.returncode, found.stdout) == (1, "")
    assert "needs Python 3.12 or newer" in found.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_failed_install_leaves_no_stamp_and_a_good_one_is_not_repeated(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", ".ci"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    pip = tmp_path / ".venv" / "bin" / "python"
    command(pip, "exit 1")
    (tmp_path / ".venv" / ".created").touch()
    stamp = tmp_path / ".venv" / ".installed-base"

    def make() -> int:
        # Without what a make around this test passes on.
        environment = {"PATH": SYSTEM_PATH, "HOME": str(tmp_path)}
        words = ["make", "-C", str(tmp_path), ".venv/.installed-base"]
        return subprocess.run(words, env=environment, capture_output=True, timeout=60).returncode

    assert make() != 0
    assert not stamp.exists()
    command(pip, f'echo "$@" >> {tmp_path}/calls')
    for _ in range(2):
        assert make() == 0
    assert stamp.exists()
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
