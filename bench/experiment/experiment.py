"""An experiment: a configuration, its trials, its data sets and its store."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.engine.errors import UserError
from bench.engine.messages import masked

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from bench.engine.datasets import DatasetInfo
    from bench.experiment.trial import Trial
    from bench.storage.store import Store


# Where things lie and run: nothing that a figure depends on.
LOCAL = re.compile(r"(results|reuse|dry_run|dataset\.(root|cache)|(dispatch|tracking|report)(\..*)?)=")


@dataclass
class Experiment:
    """A grid, worked out: its trials, and the store that knows which are finished.

    Attributes:
        missing: data sets whose files are not here, each with how to get it; they are planned by their published sizes,
            and stages of theirs in the store are not recognised.
        reused: rows of `reuse=FILE` by the key of the evaluation, which a command adds; the store takes precedence.
    """

    cfg: DictConfig
    trials: list[Trial]
    infos: dict[str, DatasetInfo]
    store: Store
    device: torch.device
    explicit: frozenset[str]
    arguments: list[str]
    missing: dict[str, str] = field(default_factory=dict)
    reused: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def own(self) -> list[Trial]:
        """The trials that this store has to compute: all but the reused ones."""
        return [trial for trial in self.trials if trial.keys.evaluate not in self.reused]

    @property
    def folder(self) -> Path:
        """Where the tables and plots of this grid go."""
        return Path(self.cfg.results) / str(self.cfg.grid.name)

    @property
    def tracking_uri(self) -> str:

        return self.cfg.tracking.uri or default_uri(Path(self.cfg.results))

    @property
    def title(self) -> str:
        return f"Grid {self.cfg.grid.name}" + (f": {self.cfg.grid.purpose}" if self.cfg.grid.purpose else "")


def load_experiment(arguments: list[str], dry: bool = False) -> Experiment:
    """Load the configuration of these overrides and expand its grid; reads no results table and asks no Slurm.

    Args:
        dry: nothing will be computed, whatever `dry_run` says: the data need not be here.

    Raises:
        UserError: something is wrong with the command line, the grid or the data.
    """
    from bench.experiment.load import load

    return planned(load(arguments), arguments, dry)


def planned(cfg: DictConfig, arguments: list[str], dry: bool = False) -> Experiment:
    """`load_experiment` for a configuration that is loaded already."""
    from bench.experiment.axes import check
    from bench.experiment.expand import expand
    from bench.experiment.overrides import explicit_in, separated
    from bench.storage.store import Store

    arguments = separated(arguments)
    check(cfg)
    _check_address(cfg)
    store = Store(Path(cfg.results) / "store")
    try:
        store.check_readable()
    except OSError as error:
        raise UserError(f"results={cfg.results} cannot be read: {error.strerror}: {error.filename}") from error
    from bench.engine.devices import pick_device

    infos, missing = _data(cfg, dry)
    try:
        device = planned_device(cfg, pick_device)
    except ValueError as error:
        raise UserError(str(error)) from error
    explicit = explicit_in(arguments)
    trials = expand(cfg, infos, "bfloat16" if device.type == "cuda" else "float32", explicit)
    return Experiment(cfg, trials, infos, store, device, explicit, arguments, missing)


def _data(cfg: DictConfig, dry: bool) -> tuple[dict[str, DatasetInfo], dict[str, str]]:
    """What is known of each data set of the grid, and of those whose files are missing how to get them.

    Raises:
        UserError: a data set has an unknown name, or its files are missing and needed; the message lists all of them.
    """
    from bench.engine.datasets import DataError, as_published, prepare
    from bench.engine.errors import message_of
    from bench.experiment.axes import names

    infos: dict[str, DatasetInfo] = {}
    missing: dict[str, str] = {}
    needed = False
    chosen = {key: value for key, value in cfg.dataset.augmentation.items() if value is not None}
    for name in names(cfg)["datasets"]:
        try:
            infos[name] = prepare(name, Path(cfg.dataset.root), Path(cfg.dataset.cache), cfg.dataset.size)
        except FileNotFoundError as error:
            missing[name] = message_of(error)
            info = as_published(name, cfg.dataset.size) if dry else None
            needed = needed or info is None
            if info is not None:
                infos[name] = info
        except (LookupError, OSError, DataError) as error:
            raise UserError(message_of(error)) from error
    if needed:
        count = f"{len(missing)} data sets are missing:\n  " if len(missing) > 1 else ""
        raise UserError(count + "\n  ".join(missing.values()))
    return {name: info.augmented(**chosen) for name, info in infos.items()}, missing


def _check_address(cfg: DictConfig) -> None:
    """Refuse a tracking server's address that a sign in its password makes another one.

    Raises:
        UserError: it has no host, no port where one should be, or an @ behind them.
    """
    from urllib.parse import urlsplit

    uri = cfg.tracking.uri or ""
    try:
        parts = urlsplit(uri)
        port_is_number = parts.port is None or parts.port >= 0
    except ValueError:
        parts, port_is_number = None, False
    after = f"{parts.path}{parts.query}{parts.fragment}" if parts and parts.netloc else ""
    if not port_is_number or "@" in after or (uri.startswith("http") and not (parts and parts.hostname)):
        raise UserError(
            f"tracking.uri is {masked(uri)!r}, which has no valid host and port; write http://HOST:PORT, and signs "
            "such as / ? # @ in a user name or password as %2F %3F %23 %40"
        )


def planned_device(cfg: DictConfig, pick: Callable[[str], torch.device]) -> torch.device:
    """What the trials are computed on. A login node need not have what its cluster's jobs have."""
    import torch

    wanted = cfg.dispatch.device
    if cfg.dispatch.kind == "local" or wanted not in ("auto", "cuda"):
        return pick(wanted)
    return torch.device("cuda" if wanted == "cuda" or cfg.dispatch.slurm.gpus else "cpu")


def default_uri(results: Path) -> str:
    """A sqlite file under the results, by its absolute path: a relative one would depend on the folder of a process."""
    return f"sqlite:///{(results / 'mlflow.db').resolve()}"
