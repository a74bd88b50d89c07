"""The names of this project's own packages, and the files that ship with them."""

from __future__ import annotations

from pathlib import Path

OURS = ("attacks", "baselines", "bench", "defenses", "slurm")


def shipped(path: Path) -> Path:
    """`path`; where nothing is there and the package has a file of that name (claims, reported figures), that one."""
    copy = Path(__file__).parents[1] / path
    return copy if path.parts[:1] == ("results",) and not path.exists() and copy.is_file() else path
