"""Imports go one way: doors -> harness -> methods -> engine."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path for folder in ("bench", "attacks", "baselines", "defenses", "slurm") for path in (ROOT / folder).rglob("*.py")
]


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            found.add(".".join(part for part in (base, node.module) if part))
    return {name for name in found if name.split(".")[0] in ("bench", "attacks", "baselines", "defenses", "slurm")}


def allowed(path: Path) -> tuple[str, ...]:
    place = path.relative_to(ROOT).parts
    if place[:2] == ("bench", "engine"):
        return ("bench.engine",)
    if place[0] == "attacks":
        return ("attacks", "bench.engine")
    if place[0] == "defenses":
        return ("defenses", "bench.engine")
    if place[0] == "baselines":
        return ("defenses.base", "bench.engine")
    return ("bench", "attacks.base", "defenses.base", "slurm")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below_it(path):
    for name in imports(path):
        assert any(name == root or name.startswith(root + ".") for root in allowed(path)), name


def test_the_engine_knows_no_hydra():
    for path in (ROOT / "bench" / "engine").glob("*.py"):
        assert "hydra" not in path.read_text().replace("no Hydra", "")
