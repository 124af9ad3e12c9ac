"""The borders of the house: the import contracts of pyproject.toml, and who may touch the device."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax_engine", "pallas_kernels", "checkpoints", "serving")

#: The only files that put data on a device. page_store.py moves it between device and host memory.
UPLOADERS = {"jax_engine/model_runner.py", "jax_engine/page_store.py", "checkpoints/loader.py"}
#: The only function that reads results back, and so the only wait of the engine's loop.
READ_BACK = ("jax_engine/model_runner.py", "StepHandle.result")
#: May wait for its own uploads, so that host copies of weights do not pile up.
WAITS_FOR_UPLOADS = "checkpoints/loader.py"


def dotted(node: ast.expr) -> str:
    """`jax.device_put` for that expression; the attribute alone where what is before it is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else node.attr
    return ""


def calls(tree: ast.AST, scope: str = "") -> Iterator[tuple[str, str, int]]:
    """(enclosing scope, what is named, line) of every name and attribute that a call could go through."""
    for node in ast.iter_child_nodes(tree):
        inner = scope
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{scope}.{node.name}" if scope else node.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield scope, alias.name, node.lineno
        elif isinstance(node, ast.Attribute):
            yield scope, dotted(node), node.lineno
        yield from calls(node, inner)


def imports_jax(tree: ast.AST) -> bool:
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(name.split(".")[0] in {"jax", "flax"} for name in names)


def violations(file: str, source: str) -> list[str]:
    """What a source file does with the device that is not its to do."""
    tree = ast.parse(source)
    read_back = {"device_get"} if file == WAITS_FOR_UPLOADS else {"device_get", "block_until_ready"}
    in_device_code = imports_jax(tree) and not file.startswith("checkpoints/")
    found = []
    for scope, name, line in calls(tree):
        last = name.rsplit(".", 1)[-1]
        reads = last in read_back or (name in {"np.asarray", "numpy.asarray"} and in_device_code)
        if last.startswith(("device_put", "make_array_from")) and file not in UPLOADERS:
            found.append(f"{file}:{line} puts data on a device; only {', '.join(sorted(UPLOADERS))} may")
        if reads and (file, scope) != READ_BACK:
            found.append(f"{file}:{line} reads back or waits ({name}); only {' '.join(READ_BACK)} may")
    return found


def test_import_contracts() -> None:
    # In a process of its own: it reconfigures logging.
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_who_touches_the_device() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert files
    found = [line for path in files for line in violations(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "count"),
    [
        ("jax_engine/engine.py", "import jax\njax.device_put(x)", 1),
        ("jax_engine/engine.py", "from jax import device_put", 1),
        ("jax_engine/engine.py", "import jax\njax.make_array_from_callback(x)", 1),
        ("checkpoints/loader.py", "import jax\njax.block_until_ready(jax.device_put(x))", 0),
        ("checkpoints/loader.py", "import jax\njax.device_get(x)", 1),
        ("jax_engine/engine.py", "def f(x):\n    return g(x).block_until_ready()", 1),
        ("jax_engine/engine.py", "import jax\ndef f(x): return jax.device_get(x)", 1),
        ("jax_engine/sampler.py", "import jax, numpy as np\ndef f(x): return np.asarray(x)", 1),
        ("jax_engine/batch.py", "import numpy as np\ndef f(x): return np.asarray(x)", 0),
        (
            "jax_engine/model_runner.py",
            "import jax, numpy as np\nclass StepHandle:\n    def result(self): return np.asarray(self.tokens)",
            0,
        ),
        ("jax_engine/model_runner.py", "import jax, numpy as np\ndef other(x): return np.asarray(x)", 1),
    ],
)
def test_the_scan_sees_what_it_looks_for(file: str, source: str, count: int) -> None:
    assert len(violations(file, source)) == count
