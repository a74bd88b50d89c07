"""The commands of Backdoor-Bench, with one line each.

python -m bench [NAME ...]
"""

from __future__ import annotations

import ast
import importlib
import sys
from difflib import get_close_matches
from pathlib import Path

from bench._command import run_command
from bench.engine.errors import UserError


def commands() -> dict[str, str]:
    """Each command and what it does, as its file says; imports none of them."""
    commands_by_name = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            commands_by_name[path.stem] = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return commands_by_name


def main(arguments: list[str]) -> int:
    known = commands()
    if arguments:
        near = get_close_matches(arguments[0], known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"write one of {', '.join(known)}"
        raise UserError(f"there is no command {arguments[0]!r}; {advice}")
    for name, text in known.items():
        print(f"python -m bench.{name:<11} {text}")
    print("\nEach explains itself with --help. `backdoor-bench NAME` and `python -m bench NAME` run it too.")
    return 0


def enter() -> None:
    """Run the command that the first word names, as `python -m bench.NAME` does; without one, list them."""
    word = next(iter(sys.argv[1:]), "")
    if word not in commands():
        run_command(main, str(__doc__))
    command = importlib.import_module(f"bench.{word}")
    sys.argv[:2] = [word]
    run_command(command.main, str(command.__doc__))


if __name__ == "__main__":
    enter()
