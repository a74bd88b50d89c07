"""Write the pages of bench/docs that come from the code: columns.md, methods.md and settings.md.

python -m bench.docs
"""

from __future__ import annotations

from bench._command import run_command
from bench.docs import HERE, pages


def main(arguments: list[str]) -> int:
    for name, text in pages().items():
        (HERE / name).write_text(text)
        print(HERE / name)
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
