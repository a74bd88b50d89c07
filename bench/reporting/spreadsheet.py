"""CSV that a spreadsheet can open without running it: no cell of text begins like a formula.

Spreadsheets compute cells that begin with =, +, -, @, a tab or a line end, whatever the file's quotes are. Such a text
gets an apostrophe in front, which `literal` takes off again; numbers stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

# Apostrophes that are there already count, so that every text has one form and comes back from it.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")  # spreadsheets read the wide signs too
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def neutral(value: Any) -> Any:
    """A text that begins like a formula with an apostrophe in front; every other value as it is."""
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def literal(value: Any) -> Any:
    """What `neutral` was given."""
    return value[1:] if isinstance(value, str) and value[:1] == "'" and _FORMULA.match(value) else value


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table with its headings, neutralised, for spreadsheets."""
    texts = table.select_dtypes(exclude="number").columns
    written = table.assign(**{name: table[name].map(neutral) for name in texts})
    written.rename(columns=neutral).to_csv(path, index=False)
