"""Write the pages of bench/docs that come from the code: columns.md, methods.md and settings.md.

python -m bench.docs
"""

from __future__ import annotations

from bench.docs import HERE, pages
from bench.door import enter


def main(arguments: list[str]) -> int:
    for name, text in pages().items():
        (HERE / name).write_text(text)
        print(HERE / name)
    return 0


if __name__ == "__main__":
    enter(main, __doc__)
