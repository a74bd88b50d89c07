"""The commands of Backdoor-Bench, with one line each.

python -m bench
"""

from __future__ import annotations

import ast
from difflib import get_close_matches
from pathlib import Path

from bench._command import run_command
from bench.engine.errors import UserError


def commands() -> dict[str, str]:
    """Each command and what it does, as its file says; imports none of them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return found


def main(arguments: list[str]) -> int:
    known = commands()
    if arguments:
        word = arguments[0]
        near = word if word in known else next(iter(get_close_matches(word, known, n=1)), "run")
        raise UserError(f"python -m bench takes no argument, and got {word!r}; write e.g. python -m bench.{near}")
    for name, text in known.items():
        print(f"python -m bench.{name:<11} {text}")
    print("\nEach explains itself with --help.")
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
