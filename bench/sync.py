"""Send to MLflow what it lacks of a grid: after it was away, or into a new server; computes nothing.

python -m bench.sync [grid=NAME] [key=value ...]     the same settings as bench.run
"""

from __future__ import annotations

from pathlib import Path

from bench.door import enter, plan, report


def main(arguments: list[str]) -> int:
    opened = plan(arguments)
    from bench import tracking
    from bench.config import UserError
    from bench.messages import masked

    uri = masked(opened.tracking_uri)
    name, artifacts = str(opened.cfg.grid.name), Path(opened.cfg.results) / "mlflow"
    if opened.folder.is_dir():
        report(opened, again=False)  # a table that was damaged since it was written is not sent as it is
    try:
        sent = tracking.sync(opened.trials, opened.store, opened.tracking_uri, name, artifacts)
        if opened.folder.is_dir():
            tracking.log_files(opened.tracking_uri, name, artifacts, tracking.published(opened.folder))
    except Exception as error:
        raise UserError(f"could not log everything to MLflow at {uri} ({tracking.reason(error)})") from error
    print(f"{opened.title}: {sent} trials sent to {uri}")
    return 0


if __name__ == "__main__":
    enter(main, __doc__)
