"""Send to MLflow what it lacks of a grid: after it was away, or into a new server; computes nothing.

python -m bench.sync [grid=NAME] [key=value ...]     the same settings as bench.run
"""

from __future__ import annotations

from pathlib import Path

from bench._command import open_experiment, run_command


def main(arguments: list[str]) -> int:
    experiment = open_experiment(arguments)
    from bench.engine.errors import UserError
    from bench.engine.messages import masked
    from bench.reporting.mlflow import log_files, reason, report_files, sync
    from bench.reporting.report import write_report

    uri = masked(experiment.tracking_uri)
    name, artifacts = str(experiment.cfg.grid.name), Path(experiment.cfg.results) / "mlflow"
    if experiment.folder.is_dir():
        write_report(experiment, again=False)  # a table that was damaged since it was written is not sent as it is
    try:
        sent = sync(experiment.trials, experiment.store, experiment.tracking_uri, name, artifacts)
        if experiment.folder.is_dir():
            log_files(experiment.tracking_uri, name, artifacts, report_files(experiment.folder))
    except Exception as error:
        raise UserError(f"could not log everything to MLflow at {uri} ({reason(error)})") from error
    print(f"{experiment.title}: {sent} trials sent to {uri}")
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
