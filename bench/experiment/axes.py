"""The axes of a grid: names, seeds, sweeps, ablations and exceptions, and what is refused of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache, partial
from itertools import product
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attacks.base import attack
from bench.engine.datasets import dataset
from bench.engine.errors import UserError
from bench.engine.models import architectures
from bench.engine.registry import did_you_mean
from bench.engine.settings import check as check_settings
from bench.experiment.load import as_list, update
from bench.experiment.overrides import PER_CELL, to_override
from bench.experiment.schema import Config
from bench.measures.context import NEEDS_CONTROL, RELEARN_TABLE
from defenses.base import THREAT_MODELS, defense

T = TypeVar("T")


# Folders beside the grids' own under results/.
RESERVED = ("store", "mlflow", "checkpoints", "slurm", "tracking", "readme")


NAME_BYTES = 200  # of a grid's name: file systems take 255, and what is written beside its folder needs some


SEEDS = 2**32  # seeds are below it: table columns and NumPy take no larger ones


MANY_SEEDS = 10_000


MANY_NAMES = 100  # beyond so many a message lists the nearest alone


# The groups that have settings for each method.
METHODS = {"attack": attack, "defense": defense}


def seeds_of(value: Any) -> list[int]:
    """A number n is seeds 0 to n - 1; a list is itself. A number that arrives as text counts as a number.

    Raises:
        UserError: neither, none, two alike, or one that not every random source takes.
    """
    advice = "write a number (3 is seeds 0, 1, 2) or a list of different ones, e.g. 'grid.seeds=[0,5]'"

    def whole(number: Any) -> int:
        if isinstance(number, str) and re.fullmatch(r"-?[0-9]+", number):
            return int(number)
        if isinstance(number, int) and not isinstance(number, bool):
            return number
        raise UserError(f"grid.seeds is {value!r}, and {number!r} is not a whole number; {advice}")

    if OmegaConf.is_list(value) or isinstance(value, list | tuple):
        seeds = [whole(number) for number in value]
        odd = [seed for seed in seeds if not 0 <= seed < SEEDS]
        if odd:
            raise UserError(f"grid.seeds has {odd[0]}; a seed is a whole number from 0 to {SEEDS - 1}")
    else:
        count = whole(value)
        if not 1 <= count <= MANY_SEEDS:
            raise UserError(f"grid.seeds is {value!r}; as a number of seeds write 1 to {MANY_SEEDS}")
        seeds = list(range(count))
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"grid.seeds is {value!r}; {advice}")
    return seeds


def _distinct(values: Iterable[Any], key: str, known: Iterable[str] | None = None) -> list[str]:
    distinct = [str(value) for value in values]
    if not distinct or len(set(distinct)) < len(distinct):
        raise UserError(f"{key} is {distinct}; write at least one name, each once")
    for name in distinct:
        if known is not None and name not in list(known):
            kind = key.rsplit(".", 1)[-1].rstrip("s")
            advice = " A method of your own needs 'plugins=[its_module]'." if kind in METHODS else ""
            names_ = list(dict.fromkeys(known))
            close = get_close_matches(name, names_, n=3)
            # timm has more than a thousand.
            few = len(names_) <= MANY_NAMES
            hint = (
                did_you_mean(name, names_)
                if few
                else f" Did you mean {' or '.join(map(repr, close))}?"
                if close
                else ""
            )
            raise UserError(f"{key}: no {kind} is named {name!r}.{hint}{advice}")
    return distinct


def names(cfg: DictConfig) -> dict[str, list[str]]:
    """The names on each axis of the grid.

    Raises:
        UserError: one is not known; the message has the near ones.
    """
    grid = cfg.grid
    return {
        "datasets": _distinct(grid.datasets, "grid.datasets"),
        "models": _distinct(grid.models, "grid.models"),
        "attacks": _distinct(grid.attacks, "grid.attacks", attack),
        "defenses": _distinct(grid.defenses, "grid.defenses", [*defense, *ablations(cfg)]),
        "threat_models": _distinct(grid.threat_models, "grid.threat_models", THREAT_MODELS),
    }


def check(cfg: DictConfig) -> None:
    """What can be refused without looking at any data."""
    _check_ablations(cfg)  # first: they are names of the grid too
    names(cfg), seeds_of(cfg.grid.seeds)
    try:
        _check_ranges(cfg, Config)
    except ValueError as error:
        raise UserError(str(error)) from error
    reserve = cfg.reserve
    if reserve.size > reserve.held_out:
        raise UserError(
            f"reserve.size is {reserve.size:g}, more than reserve.held_out, {reserve.held_out:g}; the reserve is a "
            "part of what is held out: write size <= held_out"
        )
    counts = list(cfg.measure.relearn_poisoned)
    if RELEARN_TABLE not in counts or len(set(counts)) < len(counts):
        raise UserError(
            f"measure.relearn_poisoned is {counts}; write different numbers of images, {RELEARN_TABLE} among them (the "
            "paper's, which the table shows)"
        )
    _check_name(str(cfg.grid.name))
    results = os.path.abspath(cfg.results)
    if cfg.tracking.enabled and not cfg.tracking.uri and re.search(r"\?|%[0-9A-Fa-f]{2}", results):
        raise UserError(
            f"results is {cfg.results!r} ({results}), and MLflow would read ? or % in the address of its database as "
            "something else and open another file; write a folder without them, or tracking.enabled=false"
        )
    _check_exceptions(cfg)


def _check_ranges(values: Any, cls: type, prefix: str = "") -> None:
    """Refuse settings of the harness outside their declared ranges; each method checks its own when it is made.

    Raises:
        ValueError: with the setting, the value and what to write instead.
    """
    check_settings(cls, values, prefix)
    for group in fields(cls):
        if is_dataclass(group.default_factory):
            _check_ranges(values[group.name], group.default_factory, f"{prefix}{group.name}.")


def _check_name(name: str) -> None:
    """A grid's name is that of its folder under results/: it leads nowhere else, and takes no other folder's place."""
    if (
        not name.strip(". ")
        or name != name.strip()
        or "/" in name
        or name.lower() in RESERVED
        or name.lower().startswith("mlflow.")
    ):
        raise UserError(
            f"grid.name is {name!r}; it names a folder under results/: write another, without /, not only dots, "
            f"without blanks around it, and none of {', '.join(RESERVED)}, mlflow.*"
        )
    size = len(os.fsencode(name))
    if size > NAME_BYTES:
        raise UserError(f"grid.name is {name[:40]!r}... with {size} bytes; write at most {NAME_BYTES}")


def _check_ablations(cfg: DictConfig) -> None:
    """Every ablation has a name of its own, and changes settings that its defense has."""
    for name, entry in ablations(cfg).items():
        if name in defense:
            raise UserError(f"grid.ablations: {name!r} is a defense already; write another name")
        _distinct([entry["defense"]], f"grid.ablations.{name}.defense", defense)
        for key in entry["set"]:
            if key not in cfg.defense[entry["defense"]]:
                known = list(cfg.defense[entry["defense"]])
                raise UserError(
                    f"grid.ablations.{name}: {entry['defense']} has no setting {key!r}.{did_you_mean(key, known)}"
                )


def ablations(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The grid's ablations by name, each with its `defense` and what it `set`s.

    Raises:
        UserError: one lacks a part, or two have one name.
    """
    by_name: dict[str, dict[str, Any]] = {}
    for entry in cfg.grid.ablations:
        if (
            not OmegaConf.is_dict(entry)
            or set(entry) != {"name", "defense", "set"}
            or not OmegaConf.is_dict(entry["set"])
            or entry["name"] in by_name
        ):
            raise UserError(
                f"grid.ablations: {entry!r}; write {{name: fixed, defense: pbe, set: {{selection: false}}}}, "
                "each name once"
            )
        by_name[str(entry["name"])] = OmegaConf.to_container(entry, resolve=True)  # type: ignore[assignment]
    return by_name


def method_of(cfg: DictConfig, name: str) -> str:
    """The registered defense behind a name of the grid: itself, or the one that an ablation changes."""
    return str(ablations(cfg).get(name, {"defense": name})["defense"])


def _check_exceptions(cfg: DictConfig) -> None:
    """Every exception has what it needs, and matches by names that exist.

    A name need not be on an axis of the grid: a grid that ships is narrowed on the command line.
    """
    known: dict[str, Callable[[], Iterable[str]]] = {
        "dataset": lambda: [*cfg.grid.datasets, *dataset, *_folders(str(cfg.dataset.root))],
        "model": lambda: [*cfg.grid.models, *architectures()],
        "attack": lambda: attack,
        "defense": lambda: [*defense, *ablations(cfg)],
        "threat_model": lambda: THREAT_MODELS,
    }
    for exception in cfg.grid.exceptions:
        complete = OmegaConf.is_dict(exception) and {"set", "why"} <= set(exception) <= {*known, "set", "why"}
        if not complete or not OmegaConf.is_dict(exception["set"]):
            raise UserError(
                f"grid.exceptions: {exception!r} needs `set` (a dictionary), `why` and any of "
                f"{', '.join(sorted(known))} to match, e.g. {{attack: sig, set: {{attack.poison_rate: 0.05}}, "
                'why: "..."}'
            )
        for axis, names_ in known.items():
            if axis in exception:
                _distinct(as_list(exception[axis]), f"grid.exceptions.{axis}s", names_())
        for key in exception["set"]:
            if str(key).partition(".")[0] not in PER_CELL:
                raise UserError(
                    f"grid.exceptions: {key!r} cannot be set for single cells; keys begin with {', '.join(PER_CELL)}, "
                    "e.g. attack.poison_rate"
                )


@cache
def _folders(root: str) -> list[str]:
    """The image folders under a root, as a grid names them."""
    try:
        return [f"folder:{entry.name}" for entry in os.scandir(root) if entry.is_dir()]
    except OSError:
        return []


def check_explicit(cfg: DictConfig, explicit: frozenset[str]) -> None:
    """Refuse a setting of the command line that no cell has: it would change nothing.

    Raises:
        UserError: it belongs to a method that is not on the grid's axis.
    """
    rows = {"attack": list(cfg.grid.attacks), "defense": [method_of(cfg, name) for name in cfg.grid.defenses]}
    if any(cfg.measure[name] for name in NEEDS_CONTROL):
        rows["attack"].append("none")  # the clean control
    for path in sorted(explicit):
        group, _, rest = path.partition(".")
        method = rest.partition(".")[0]
        if group in METHODS and method and method not in rows[group]:
            raise UserError(
                f"{path} changes nothing, since grid.{group}s has no {method!r} (it is "
                f"{to_override(list(cfg.grid[f'{group}s']))}); leave it out, or add {method} there"
            )


def cell_path(key: str, methods: dict[str, str]) -> str | None:
    """Where a key of an exception or a sweep lies among the settings of a cell; None: it is another method's.

    `defense.epochs` is that of the cell's own defense, `defense.aft.epochs` AFT's and nobody else's. The clean model
    has no rate.

    Args:
        methods: the registered attack and defense of the cell, by `attack` and `defense`.
    """
    head, _, rest = key.partition(".")
    if head not in METHODS:
        return key
    name, _, setting = rest.partition(".")
    if setting and name in METHODS[head]:
        return key if name == methods[head] else None
    if head == "attack" and methods[head] == "none" and rest in ("poison_rate", "cover_rate"):
        return None
    return f"{head}.{methods[head]}.{rest}"


def swept_keys(cfg: DictConfig) -> set[str]:
    """The settings that the grid sweeps, as its sweep names them."""
    return {str(entry["key"]) for entry in cfg.grid.sweep}


def effective_exceptions(
    cfg: DictConfig, exception: Any, explicit: frozenset[str]
) -> dict[tuple[str, ...], dict[str, Any]]:
    """What an exception still sets beside the command line and the sweep: its settings by the names they hold for.

    The names are those of the grid that the exception matches, in the order of the axes, less the methods whose
    setting the command line has; none at all: every cell. Empty where nothing of it is left.
    """
    axes = {axis: list(cfg.grid[f"{axis}s"]) for axis in ("dataset", "model", "attack", "defense", "threat_model")}
    ablated, swept = ablations(cfg), swept_keys(cfg)

    def told(axis: str, row: str) -> str | None:
        """The name by which the exception matches a row; that of its method, where the row is an ablation."""
        if axis not in exception:
            return row
        names_ = (row, method_of(cfg, row) if axis == "defense" else row)
        return next((name for name in names_ if name in as_list(exception[axis])), None)

    def is_left(key: str, head: str, row: str) -> bool:
        """Does what goes before an exception leave this key of a row's method to it?"""
        method = {head: method_of(cfg, row)}
        path = cell_path(key, method)
        of_row = {f"defense.{method[head]}.{name}" for name in ablated.get(row, {"set": {}})["set"]}
        taken = {cell_path(other, method) for other in swept if other.startswith(f"{head}.")}
        return path is not None and path not in explicit | of_row | taken

    rows = {axis: [row for row in axes[axis] if told(axis, row)] for axis in axes}
    effective: dict[tuple[str, ...], dict[str, Any]] = {}
    if not all(rows.values()):
        return effective
    for key, value in exception["set"].items():
        head, where = str(key).partition(".")[0], {axis: rows[axis] for axis in axes if axis in exception}
        if head in METHODS:
            left = [row for row in rows[head] if is_left(str(key), head, row)]
            if not left:
                continue
            if len(left) < len(rows[head]):
                where[head] = left
        elif key in explicit | swept:
            continue
        matched: list[str] = []
        for axis, left in where.items():
            names_ = {told(axis, row) for row in left}
            matched += [
                name for name in (as_list(exception[axis]) if axis in exception else axes[axis]) if name in names_
            ]
        effective.setdefault(tuple(matched), {})[str(key)] = value
    return effective


def sweep_variants(cfg: DictConfig, explicit: frozenset[str]) -> list[dict[str, Any]]:
    """Every combination of the swept values; one empty one where nothing is swept.

    Raises:
        UserError: a key cannot be swept, or has no values.
    """
    axes: dict[str, list[Any]] = {}
    for entry in cfg.grid.sweep:
        if not OmegaConf.is_dict(entry) or set(entry) != {"key", "values"} or not OmegaConf.is_list(entry["values"]):
            raise UserError(f"grid.sweep: {entry!r} needs `key` and a list of `values`")
        key, values = str(entry["key"]), list(entry["values"])
        if key.partition(".")[0] not in PER_CELL:
            raise UserError(
                f"grid.sweep: {key!r} cannot differ from cell to cell; sweep a key of {', '.join(PER_CELL)}"
            )
        if any(OmegaConf.is_dict(value) for value in values) or key in PER_CELL:
            raise UserError(f"grid.sweep: {key!r} is a group of settings; sweep one of them, e.g. train.epochs")
        if key in explicit:
            raise UserError(f"{key} is swept by this grid; leave it out, or write grid.sweep=[]")
        group, _, rest = key.partition(".")
        rows = {"attack": list(cfg.grid.attacks), "defense": [method_of(cfg, name) for name in cfg.grid.defenses]}
        if group in METHODS and not any(swept_path(cfg, key, {group: method}) for method in rows[group]):
            settings = sorted({str(setting) for method in rows[group] for setting in cfg[group][method]})
            raise UserError(f"grid.sweep: no {group} of this grid has the setting {key}.{did_you_mean(rest, settings)}")
        paths = (swept_path(cfg, key, {group: method}) for method in rows.get(group, ("",)))
        path = next(path for path in paths if path)
        typed = [OmegaConf.select(_with(cfg, [("sweep", path, value)]), path) for value in values]
        if not values or len({str(value) for value in typed}) < len(values) or key in axes:
            raise UserError(f"grid.sweep: {key} is swept over {values}; write different values, each key once")
        # A number that came as text (8/255, or from the environment) is one from here on.
        axes[key] = [
            number if isinstance(value, str) and isinstance(number, int | float) else value
            for value, number in zip(values, typed, strict=True)
        ]
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def swept_path(cfg: DictConfig, key: str, methods: dict[str, str]) -> str | None:
    """Where a swept key lies in a cell; None where its attack or defense has no such setting."""
    path = cell_path(key, methods)
    if path is None or key.partition(".")[0] not in METHODS:
        return path
    group, method, setting = path.split(".", 2)
    return path if setting in cfg[group][method] else None


class Memo:
    """What cells share is worked out for the first of them: a grid may have 100,000.

    A configuration counts by its identity: each stays in here, so that none takes another's place.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, question: tuple[Any, ...], make: Callable[[], T]) -> T:
        if question not in self.known:
            self.known[question] = make()
        answer: T = self.known[question]
        return answer


def cell_config(
    cfg: DictConfig,
    cell: dict[str, str],
    exceptions: list[dict[str, Any]],
    ablated: dict[str, dict[str, Any]],
    explicit: frozenset[str],
    swept: dict[str, Any],
    once: Memo,
) -> DictConfig:
    """The configuration of one cell: every exception that matches is set, in order; the command line wins.

    Behind them comes what the row of an ablation is named for, and what is swept is set last.

    Keys are read as `cell_path` reads them. An exception that matches a defense matches its ablations too, and a swept
    setting that the cell's method does not have changes nothing in it.

    Raises:
        UserError: what an ablation changes or the grid sweeps is set by something else too.
    """
    name = cell["defense"]
    ablation = ablated.get(name, {"defense": name, "set": {}})
    methods = {**cell, "defense": ablation["defense"]}
    fitting = (
        exception
        for exception in exceptions
        if all({cell[axis], methods[axis]} & set(as_list(value)) for axis, value in exception.items() if axis in cell)
    )
    settings: list[tuple[str, str, Any]] = []
    for exception in fitting:
        for key, value in exception["set"].items():
            path = cell_path(str(key), methods)
            if path and path not in explicit:
                settings.append(("exceptions", path, value))
    of_row = {f"defense.{ablation['defense']}.{key}": value for key, value in ablation["set"].items()}
    settings += [("ablations", path, value) for path, value in of_row.items()]
    for path in explicit & set(of_row):
        raise UserError(f"{path} is what the row {name!r} of this grid changes; leave it out, or the row")
    for key, value in swept.items():
        path = swept_path(cfg, key, methods)
        if path in explicit:
            raise UserError(f"{path} is swept by this grid (as {key}); leave it out, or write grid.sweep=[]")
        if path in of_row:
            raise UserError(f"{path} is what the row {name!r} of this grid changes, and {key} is swept; leave one out")
        if path:
            settings.append(("sweep", path, value))
    if not settings:
        return cfg
    return once(("cfg", json.dumps(settings, default=str)), partial(_changed, cfg, settings))


def _changed(cfg: DictConfig, settings: list[tuple[str, str, Any]]) -> DictConfig:
    cfg = _with(cfg, settings)
    check(cfg)
    return cfg


def _with(cfg: DictConfig, settings: list[tuple[str, str, Any]]) -> DictConfig:
    """A copy with these settings, each told by where it comes from, its path and its value.

    Raises:
        UserError: there is no such setting, or the value has another type.
    """
    cfg = cfg.copy()
    for source, path, value in settings:
        try:
            update(cfg, path, value)
        except (OmegaConfBaseException, ValueError) as error:
            group, _, name = path.rpartition(".")
            known = [str(key) for key in OmegaConf.select(cfg, group) or ()]
            why = (
                " ".join(str(error).split())
                if name in known
                else f"there is no such setting.{did_you_mean(name, known)}"
            )
            raise UserError(f"grid.{source}: {path}={value!r}: {why}") from error
    return cfg
