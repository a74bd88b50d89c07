"""Rebuild the tables and plots of a grid from what is finished; computes nothing.

python -m bench.report [grid=NAME] [key=value ...]     the same settings as bench.run
"""

from __future__ import annotations

from bench.door import enter, plan, report, show


def main(arguments: list[str]) -> int:
    opened = plan(arguments)
    boards, _ = report(opened)
    show(boards)
    print(f"Tables and plots: {opened.folder}/")
    return 0


if __name__ == "__main__":
    enter(main, __doc__)
