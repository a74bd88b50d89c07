"""The finding behind PBE and PUD: do adversarial examples of an infected model resemble its triggered images?

    python -m bench.connection [grid=NAME] [key=value ...]     the same settings as bench.run

Computes nothing: it reads what `python -m bench.run ... measure.connection=true` left in the store. For each infected
model, its clean control, random noise, and each repaired model, it reports the share of the untargeted adversarial
examples that are classified as the target (1 / (classes - 1) by chance), and how much closer than the clean image they
are to the triggered one: by cosine similarity of the features, and by overlap of the most active tenth of the units.

Writes into results/NAME/: connection.csv (every radius and seed, with 95 % intervals over images and the distribution
over classes), connection.md, and as PNG and PDF connection, connection_repaired and connection_classes.
"""

from __future__ import annotations

from bench._command import open_experiment, run_command, show


def main(arguments: list[str]) -> int:
    experiment = open_experiment(arguments)
    from bench.engine.errors import UserError
    from bench.reporting import page
    from bench.reporting.connection import boards, connections, rank_correlation
    from bench.reporting.figures.draw import draw_connection
    from bench.reporting.protocol import command
    from bench.reporting.spreadsheet import write_csv
    from bench.reporting.trials import of_trials
    from bench.storage.index import CachedStore

    store = CachedStore(experiment.store)
    trials = of_trials(experiment.trials, store)
    details = [page.details_of(trial, store, command(experiment, trial)) for trial in experiment.trials]
    table = connections(trials, details)
    if table.empty:
        raise UserError(
            f"no finished trial of grid {experiment.cfg.grid.name} has this measure with these settings; run it with "
            "measure.connection=true first, and give the same settings here"
        )
    built = boards(table)
    lines = rank_correlation(trials, table)
    for board in built:
        board.notes += lines
    experiment.folder.mkdir(parents=True, exist_ok=True)
    write_csv(table, experiment.folder / "connection.csv")
    (experiment.folder / "connection.md").write_text("\n".join(board.markdown() for board in built))
    drawn = draw_connection(trials, experiment.folder, f"Grid {experiment.cfg.grid.name}", details)
    show(built)
    print(f"Table and figures: {experiment.folder}/connection.md, {', '.join(path.name for path in drawn)}")
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
