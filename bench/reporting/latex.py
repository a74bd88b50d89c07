"""A board as LaTeX: ready for \\input in a document that loads booktabs."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from bench.reporting.columns import COLUMN

if TYPE_CHECKING:
    from bench.reporting.board import Board, Entry

_SIGNS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "-": r"{-}",  # two in a row are one dash
    "±": r"$\pm$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "∞": r"$\infty$",
    "χ": r"$\chi$",
    "ε": r"$\varepsilon$",
    "²": r"$^2$",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "†": r"$^\dagger$",
    "’": r"'",
    "“": r"``",
    "”": r"''",
}
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
    "\u0328": "k",
}


def escape(text: str) -> str:
    """Text that LaTeX prints as it is; a sign that no standard font has is named by its number."""
    return "".join(_sign(sign) for sign in " ".join(text.split()))


def _sign(sign: str) -> str:
    if sign in _SIGNS:
        return _SIGNS[sign]
    if sign.isascii():
        return sign if sign.isprintable() else f"[U+{ord(sign):04X}]"
    base, *accents = list(unicodedata.normalize("NFD", sign))
    if base.isascii() and base.isalpha() and len(accents) == 1 and accents[0] in _ACCENTS:
        return f"\\{_ACCENTS[accents[0]]}{{{base}}}"
    return f"[U+{ord(sign):04X}]"


def latex(board: Board) -> str:
    """One `table*`; the caption names what the figures are, the notes stand beneath it as comments.

    A long table needs `\\usepackage{booktabs, textcomp}` and room; the font is small and the columns are narrow.
    """
    lines = [
        *(f"% {escape(note)}" for note in board.notes),
        r"\begin{table*}",
        r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{escape(board.title)}: {_caption(board)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(board.header) - 1)}}}",
        r"\toprule",
        " & ".join(escape(text) for text in board.header) + r" \\",
    ]
    for row in board.rows:
        if len(row) == 1:
            lines += [
                r"\midrule",
                rf"\multicolumn{{{len(board.header)}}}{{l}}{{\textit{{{escape(row[0].text)}}}}} \\",
                r"\midrule",
            ]
        else:
            lines.append(" & ".join(_entry(entry) for entry in row) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""])


def _entry(entry: Entry) -> str:
    around = {"best": r"\textbf{%s}", "alike": r"\underline{%s}", "": "{%s}"}
    # In braces: a cell that begins with [ would be read as an option of the line before.
    figures = " / ".join(around[mark].replace("%s", escape(text)) for text, mark in entry.parts)
    note = escape(entry.note)
    return f"{figures} ({note})" if figures and note else figures or note


def _caption(board: Board) -> str:
    measures = f"{COLUMN['clean_accuracy'].heading} / {COLUMN['asr'].heading}"
    data = next((note for note in board.notes if note.startswith("data: ")), "")
    text = (
        f"{measures} in percent. Bold: best of its setting among the defenses that are done there, and not worse than "
        f"without a defense; underlined: not significantly worse at 5 %. {data}"
    )
    return escape(text)
