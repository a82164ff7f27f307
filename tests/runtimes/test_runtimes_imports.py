"""Who may import whom: the runtime and the lowering run on devices that have neither PyTorch nor transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "runtimes"
TORCH = {"torch", "torchvision", "transformers", "safetensors", "huggingface_hub"}

# package → (its folder, what nothing in it may import)
RULES = {
    "vlm_edge_runtime": (RUNTIME / "vlm_edge_runtime", TORCH | {"vlm_edge", "onnx", "onnx_ir", "onnxscript"}),
    "vlm_edge.passes": (ROOT / "vlm_edge" / "passes", TORCH | {"onnxscript"}),
    "vlm_edge.targets": (ROOT / "vlm_edge" / "targets", TORCH | {"onnxscript"}),
    "vlm_edge.quantize": (ROOT / "vlm_edge" / "quantize", TORCH | {"onnxscript"}),
}

_BLOCKED_IMPORT = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not to be imported here")

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
for module in sys.argv[2:]:
    importlib.import_module(module)
loaded = sorted({name.split(".")[0] for name in sys.modules} & BLOCKED)
assert not loaded, loaded
"""


def modules(package: str, folder: Path) -> list[str]:
    """Every module of a package, by name, without running any."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        parts = list(file.relative_to(folder).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append(".".join([package, *parts]))
    return found


def imported(file: Path) -> set[tuple[str, int]]:
    """(top-level package, line) of every absolute import in a file, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".")[0], node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add((node.module.split(".")[0], node.lineno))
    return found


@pytest.mark.parametrize("package", RULES)
def test_sources_never_name_them(package) -> None:
    folder, forbidden = RULES[package]
    files = sorted(folder.rglob("*.py"))
    assert files
    wrong = [f"{file.relative_to(ROOT)}:{line}: {name}" for file in files for name, line in imported(file) if name in forbidden]
    assert not wrong, wrong


@pytest.mark.parametrize("package", RULES)
def test_everything_imports_where_they_are_missing(package) -> None:
    folder, forbidden = RULES[package]
    run = [sys.executable, "-c", _BLOCKED_IMPORT, ",".join(sorted(forbidden)), *modules(package, folder)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_loads_next_to_nothing() -> None:
    heavy = ["onnxruntime", "numpy", "PIL", "tokenizers", "jinja2", "msgspec", "vlm_edge_runtime._native"]
    code = (
        "import sys, vlm_edge_runtime; "
        f"print([name for name in {heavy!r} if name in sys.modules]); "
        "vlm_edge_runtime.load, vlm_edge_runtime.BundleError; "
        "print('onnxruntime' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=_environment(), check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def test_every_public_name_is_there() -> None:
    import vlm_edge_runtime

    for name in vlm_edge_runtime.__all__:
        assert getattr(vlm_edge_runtime, name) is not None
    assert set(vlm_edge_runtime.__all__) <= set(dir(vlm_edge_runtime))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vlm_edge_runtime.no_such_name


def test_the_version_is_the_projects() -> None:
    import tomllib

    import vlm_edge_runtime

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert vlm_edge_runtime.__version__ == project["version"]


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{RUNTIME}"}
