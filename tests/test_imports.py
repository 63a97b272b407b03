"""Tests that optional dependencies are imported only where needed, and that light commands start fast."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("xla_ops", "sparse_xmc", "experiments")
# Names of packages on PyPI whose modules have another name.
MODULES = {"absl-py": "absl", "orbax-checkpoint": "orbax", "scikit-learn": "sklearn"}
# The packages that take longest to import.
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "scipy", "sklearn", "numpy", "matplotlib"}


def imports_of(source: str, *, at_start_up: bool) -> list[ast.Import | ast.ImportFrom]:
    """Return the import statements of a module.

    Args:
      source: the source of the module.
      at_start_up: leave out imports within functions and for type checkers.
    """
    found = []
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if at_start_up and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_start_up and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        nodes += ast.iter_child_nodes(node)
    return found


def imports_at_start_up(source: str) -> set[str]:
    """Return the top-level names of absolute imports that run when a module is imported."""
    found = set()
    for node in imports_of(source, at_start_up=True):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_imports_at_start_up_finds_nested_imports():
    source = """
import a.b
from c.d import e
from . import f
if TYPE_CHECKING:
    import g
else:
    import h
try:
    import i
except ImportError:
    pass
class C:
    import j
    def method(self):
        import k
"""
    assert imports_at_start_up(source) == {"a", "c", "h", "i", "j"}


def test_start_up_imports_only_required_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    allowed = {MODULES.get(name, name).replace("-", "_") for name in required}
    allowed |= {*PACKAGES, *sys.stdlib_module_names}
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    paths.remove(ROOT / "experiments" / "measure" / "pytest_rows.py")  # a plugin, loaded only by pytest
    assert len(paths) > 80
    forbidden = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in paths
        for name in imports_at_start_up(path.read_text()) - allowed
    }
    assert not forbidden


def imported_modules(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Return the modules among `modules` that a module imports, anywhere in its code."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in imports_of(path.read_text(), at_start_up=False):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        parents = package[: len(package) + 1 - node.level] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        members = {f"{base}.{alias.name}" for alias in node.names}
        # A name that is no module is an attribute of the package or module.
        found |= members & modules.keys()
        if members - modules.keys():
            found.add(base)
    return found & modules.keys() - {name}


def test_no_modules_import_each_other_in_a_cycle():
    modules = {}
    for package in PACKAGES:
        # Stubs come first, so that only those of native modules remain.
        for path in [*(ROOT / package).rglob("*.pyi"), *(ROOT / package).rglob("*.py")]:
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    remaining = {name: imported_modules(name, path, modules) for name, path in modules.items()}
    while leaves := {name for name, imported in remaining.items() if not imported}:
        remaining = {name: found - leaves for name, found in remaining.items() if name not in leaves}
    assert not remaining  # each remaining module is in a cycle, or imports a module that is


@pytest.mark.parametrize(
    "code",
    ["import sparse_xmc", "from sparse_xmc.cli.__main__ import main; main()"],
    ids=["import sparse_xmc", "sparse-xmc --help"],
)
def test_light_commands_import_no_heavy_packages(code):
    code += "\nimport sys; print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stderr.split())
    assert "sparse_xmc" in loaded
    assert not loaded & HEAVY
    assert len(loaded) < 250


def test_error_without_matplotlib_says_how_to_install_it(monkeypatch):
    from experiments import figures

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'sparse-xmc\[experiments\]'"):
        figures._new_figure()
