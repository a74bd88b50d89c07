"""No defense: the infected model as it is, the first row of every table.

Paper: none.
Differs: none known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from defenses.base import DefenderView, Defense, DefenseResult, defense


@defense("no_defense")
@dataclass(frozen=True)
class NoDefense(Defense):
    """Returns the model that it was given."""

    paper: ClassVar[str] = "none"

    def defend(self, view: DefenderView) -> DefenseResult:
        return DefenseResult(view.model)
