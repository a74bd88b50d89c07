"""Rebuild the tables and plots of a grid from what is finished; computes nothing.

    python -m bench.report [grid=NAME] [key=value ...]     the same settings as bench.run

Writes into results/NAME/: leaderboard.html (one page with everything, opens offline; the
details of thousands of trials are in leaderboard_details_*.js beside it), leaderboard.md, leaderboard.tex,
leaderboard.csv (a row for each cell), wide.csv (a row for each defense), trials.csv (a row for each trial), steps.csv
(a row for each step of a progressive method), and plots (report.plots=false leaves them out).
report.reported=FILE.csv adds figures that others report: its columns are dataset, model, setting, attack, defense,
provenance and figures such as asr as shares in [0, 1]; they are never ranked.
"""

from __future__ import annotations

from bench._command import open_experiment, run_command, show


def main(arguments: list[str]) -> int:
    opened = open_experiment(arguments)
    from bench.reporting.report import write_report

    boards, _ = write_report(opened)
    show(boards)
    print(f"Tables and plots: {opened.folder}/")
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
