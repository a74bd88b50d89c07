"""The names of this project's own packages."""

from __future__ import annotations

OURS = ("attacks", "baselines", "bench", "defenses", "slurm")
