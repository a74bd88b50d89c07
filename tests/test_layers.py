"""In `bench/` a file is a command and a folder is a part; parts import downwards, and nothing imports a command."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground floor up; what stands in one tuple knows nothing of its neighbours.
ORDER = [
    ("bench.engine",),
    ("attacks",),
    ("defenses",),
    ("baselines",),
    ("bench.storage",),
    ("bench.measures",),
    ("bench.experiment",),
    ("bench.pipeline",),
    ("bench.dispatch",),
    ("slurm",),
    ("bench.reporting",),
    ("bench.docs", "bench.conf"),
]
SHARED = "bench._command"  # what the commands have in common is theirs to import


def files() -> dict[str, Path]:
    """Module name -> file, of everything that ships."""
    found = {}
    for folder in ("bench", "attacks", "baselines", "defenses", "slurm"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def is_command(module: str) -> bool:
    return module.startswith("bench.") and module.count(".") == 1 and FILES[module].name != "__init__.py"


def imports(module: str) -> set[str]:
    """The modules of ours that a module imports, anywhere in it."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            named = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in named}
    return {name for name in found if name in FILES} - {module}


def floor(module: str) -> int:
    """How high a module stands; commands stand on top."""
    for height, parts in enumerate(ORDER):
        if any(module == part or module.startswith(part + ".") for part in parts):
            return height
    return len(ORDER)


PARTS = sorted(module for module in FILES if module != "bench" and not is_command(module))


@pytest.mark.parametrize("module", PARTS)
def test_a_part_imports_only_what_stands_below_it(module):
    # A command may live in a part's folder (`python -m bench.docs`), and starts as all commands do.
    above = {name for name in imports(module) if floor(name) > floor(module) and name != "bench"}
    assert above <= ({SHARED} if module.endswith("__main__") else set())


def test_nothing_imports_a_command():
    for module in FILES:
        for name in imports(module) - {SHARED}:
            assert not is_command(name), f"{module} imports {name}"


def test_every_file_of_bench_is_a_command_with_a_help_text():
    for module in filter(is_command, FILES):
        if module in (SHARED, "bench.__main__"):
            continue
        tree = ast.parse(FILES[module].read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body), module
        assert f"python -m {module}" in (ast.get_docstring(tree) or ""), module


def test_no_modules_import_each_other_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(imports(module)):
                visit(name, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


@pytest.mark.parametrize("folder", ["attacks", "defenses", "baselines"])
def test_a_method_imports_the_engine_its_contract_and_its_own_kind_alone(folder):
    own = {"attacks": ("attacks",), "defenses": ("defenses",), "baselines": ("defenses.base",)}[folder]
    for module in FILES:
        if module.split(".")[0] == folder:
            for name in imports(module):
                assert name.startswith(("bench.engine", *own)), f"{module} imports {name}"


def test_the_engine_knows_no_hydra():
    for module in FILES:
        if module.startswith("bench.engine"):
            assert "hydra" not in FILES[module].read_text().replace("no Hydra", "")
