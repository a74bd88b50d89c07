"""Rebuild the tables and plots of a grid from what is finished; computes nothing.

    python -m bench.report [grid=NAME] [key=value ...]     the same settings as bench.run
    python -m bench.report table=FILE                      the page of a published trials.csv, beside it

The first form writes into results/NAME/: leaderboard.html (one page with everything, opens offline; the
details of thousands of trials are in leaderboard_details_*.js beside it), leaderboard.md, leaderboard.tex,
leaderboard.csv (a row for each cell), wide.csv (a row for each defense), trials.csv (a row for each trial), steps.csv
(a row for each step of a progressive method), and plots (report.plots=false leaves them out).
report.reported=FILE.csv adds figures that others report: its columns are dataset, model, threat_model, attack,
defense, provenance and figures such as asr as shares in [0, 1]; they are never ranked.

The second form needs no store and writes leaderboard.html alone: figures, marks, statistics and the plots that lie
there. Curves, settings and commands of single trials are in the store only, and the page leaves them out.
"""

from __future__ import annotations

from pathlib import Path

from bench._command import open_experiment, run_command, show


def main(arguments: list[str]) -> int:
    if any(argument.startswith("table=") for argument in arguments):
        print(f"Page: {page_of_table(arguments)} (figures only: curves and settings of single trials are in the store)")
        return 0
    experiment = open_experiment(arguments)
    from bench.reporting.report import write_report

    boards, _ = write_report(experiment)
    show(boards)
    print(f"Tables and plots: {experiment.folder}/")
    return 0


def page_of_table(arguments: list[str]) -> Path:
    """Write the page of a published table beside it.

    Raises:
        UserError: there are other arguments, or the file is not a trials.csv.
    """
    from bench.engine.errors import UserError
    from bench.reporting import page
    from bench.reporting.trials import read_trials

    if len(arguments) > 1:
        other = next(argument for argument in arguments if not argument.startswith("table="))
        raise UserError(f"table=FILE stands alone: the file has its settings; leave {other!r} out")
    source = Path(arguments[0].partition("=")[2])
    trials = read_trials(source)
    name = source.resolve().parent.name
    notes = [f"from {source.name}; protocol and command: README.md and config.yaml beside it"]
    plots = [path for path in sorted(source.parent.glob("*.png")) if not path.name.startswith("trigger_")]
    return page.write(trials, [], notes, source.parent, f"Grid {name}", plots=plots)


if __name__ == "__main__":
    run_command(main, __doc__)
