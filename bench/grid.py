"""From a configuration to the list of trials; pure, and computes nothing."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attacks.base import Attack, attack
from bench.config import PER_CELL, UserError, as_list, attack_of, defense_of, to_override, update
from bench.engine import ENGINE_VERSION, autoattack, connection, reactivation
from bench.engine.counts import images_of, least_share, pool_of, reserve_of
from bench.engine.datasets import DatasetInfo, dataset
from bench.engine.models import ModelSpec, architectures
from bench.engine.registry import near
from bench.store import Identity, key_of
from defenses.base import SETTINGS, Defense, ReserveView, TrainsetView, defense, offered

T = TypeVar("T")

# Poisoned images of the retuning that the table shows: Min et al., arXiv:2410.09838.
RELEARN_TABLE = 5
# Measures that are read beside a clean twin.
CONTROLLED = ("relearn", "reactivate", "connection")
# Folders beside the grids' own under results/.
RESERVED = ("store", "mlflow", "checkpoints", "slurm", "tracking", "readme")
NAME_BYTES = 200  # of a grid's name: file systems take 255, and what is written beside its folder needs some
SEEDS = 2**32  # seeds are below it: table columns and NumPy take no larger ones
MANY_SEEDS = 10_000
MANY_NAMES = 100  # beyond so many a message lists the nearest alone
# The groups that have settings for each method.
METHODS = {"attack": attack, "defense": defense}


@dataclass(frozen=True)
class Trial:
    """One attack x defense x data set x architecture x setting x variant x seed.

    Attributes:
        variant: the swept settings of this trial as a command line has them, e.g. `reserve.contamination=0.1`; empty
            where nothing is swept.
        implant, defend, evaluate: the identities of its three stages. `defend` and `evaluate` are empty where the
            defense is not applicable in the setting; `reason` says why.
        inspect: the identity of what is measured once of the infected model, for all of its repairs.
        control: the identity of its clean twin: the same data set, architecture, recipe and seed without an attack.
            Empty where no measure asks for it.
    """

    dataset: str
    model: str
    attack: str
    defense: str
    setting: str
    seed: int
    implant: Identity
    defend: Identity
    evaluate: Identity
    reason: str = ""
    variant: str = ""
    inspect: Identity = field(default_factory=dict)
    control: Identity = field(default_factory=dict)

    def keys(self) -> tuple[str, str, str]:
        """The keys of the three stages."""
        return self._keys

    @cached_property
    def _keys(self) -> tuple[str, str, str]:
        return self._key(self.implant), self._key(self.defend), self._key(self.evaluate)

    def implants(self) -> tuple[str, ...]:
        """The keys of the models that must be there before it is repaired and measured: its own, and its clean twin."""
        return (self.keys()[0], *([self.inspect["control"]] if self.control else []))

    @property
    def surrogate(self) -> Identity:
        """The identity of the clean network that its attacker may optimise on: the implant's, but for the attack."""
        shared = {name: value for name, value in self.implant.items() if name != "attack"}
        return {**shared, "stage": "surrogate"}

    def twin(self) -> Trial:
        """The trial whose implant is the clean twin; nothing is done to it."""
        attack = self.control["attack"]["name"]
        return replace(self, attack=attack, implant=self.control, defend={}, evaluate={}, inspect={}, control={})

    def places(self) -> list[tuple[str, str]]:
        """Stage and key of all that is computed for it, in order."""
        _, defend, evaluate = self.keys()
        if not evaluate:
            return []
        others = [("defend", defend), ("inspect", self.evaluate["inspect"]), ("evaluate", evaluate)]
        return [*(("implant", key) for key in self.implants()), *others]

    def identities(self) -> list[Identity]:
        """The identities of `places`, in their order."""
        if not self.evaluate:
            return []
        implants = [self.implant, *([self.control] if self.control else [])]
        return [*implants, self.defend, self.inspect, self.evaluate]

    @staticmethod
    def _key(identity: Identity) -> str:
        return key_of(identity) if identity else ""

    @property
    def title(self) -> str:
        place = [self.dataset, self.model, self.attack, self.defense, self.setting]
        return "/".join([*place, *([self.variant] if self.variant else []), str(self.seed)])


@dataclass(frozen=True)
class Counts:
    """The numbers of images that the shares of a trial come to.

    Attributes:
        train, pool: training images of the data set, and those of them that are set aside.
        poisoned, covers: training images that the attack stamps; None where it owns the training, and each batch has
            its own.
        reserve, tainted: images of the defender's reserve, and the poisoned ones among them; None without a reserve.
        robust, autoattack: test images that robust accuracy is measured on.
    """

    train: int
    pool: tuple[int, ...]
    poisoned: int | None
    covers: int | None
    reserve: int | None
    tainted: int | None
    test: int
    robust: int
    autoattack: int


def counts_of(trial: Trial, info: DatasetInfo) -> Counts:
    """What the shares in a trial's identities come to on its data set."""
    attacker, train, test = trial.implant["attack"], sum(info.train_counts), sum(info.test_counts)
    pool = pool_of(trial.implant["pool"], info.train_counts)
    left = train - sum(pool)
    is_fixed = attacker["regime"] == "static"
    share = trial.defend.get("reserve")
    reserve = reserve_of(share["size"], trial.implant["pool"], info.train_counts) if share else None
    robust = trial.evaluate.get("pgd_images")
    return Counts(
        train=train,
        pool=tuple(pool),
        poisoned=images_of(attacker["poison_rate"], left) if is_fixed else None,
        covers=images_of(attacker["cover_rate"], left) if is_fixed else None,
        reserve=reserve,
        tainted=images_of(share["contamination"], reserve) if share and reserve is not None else None,
        test=test,
        robust=test if robust is None else min(robust, test),
        autoattack=min(trial.evaluate.get("autoattack_images", 0), test),
    )


def _check_points(trials: list[Trial], infos: dict[str, DatasetInfo], seed: int) -> None:
    """Refuse two points of a sweep that are one and the same on a data set: equal stages, or shares of equal counts.

    Raises:
        UserError: it names the two, and what they come to.
    """
    digests: dict[tuple[str, str], Any] = {}
    implants: dict[str, str] = {}
    seen: dict[tuple[str, str], Counts] = {}
    for trial in trials:
        if trial.seed != seed:
            continue
        counts = counts_of(trial, infos[trial.dataset])
        key = trial.keys()[0]
        if key not in implants:
            attacker = trial.implant["attack"]
            if counts.poisoned is not None:
                attacker = {**attacker, "poison_rate": counts.poisoned, "cover_rate": counts.covers}
            implants[key] = key_of({**trial.implant, "attack": attacker, "pool": list(counts.pool)})
        defend = {**trial.defend, "implant": "", "reserve": [counts.reserve, counts.tainted]}
        evaluate = {name: value for name, value in trial.evaluate.items() if name not in ("defend", "inspect")}
        evaluate |= {"pgd_images": counts.robust, "autoattack_images": counts.autoattack}
        point = trial.dataset, trial.variant
        digest = digests.setdefault(point, hashlib.sha256())
        digest.update(repr((implants[key], sorted(defend.items()), sorted(evaluate.items()))).encode())
        if counts.reserve is not None or point not in seen:
            seen[point] = counts
    points: dict[tuple[str, bytes], str] = {}
    for (name, variant), digest in digests.items():
        same = points.setdefault((name, digest.digest()), variant)
        if same != variant:
            counts = seen[name, variant]
            reserve = "" if counts.reserve is None else f", a reserve of {counts.reserve} ({counts.tainted} poisoned)"
            poisoned = "" if counts.poisoned is None else f", {counts.poisoned} poisoned training images"
            raise UserError(
                f"grid.sweep: {same} and {variant} are the same experiment on {name} ({counts.train} training images"
                f"{poisoned}{reserve}, {counts.robust} test images for robust accuracy); leave one of them out"
            )


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
        found = [whole(number) for number in value]
        odd = [seed for seed in found if not 0 <= seed < SEEDS]
        if odd:
            raise UserError(f"grid.seeds has {odd[0]}; a seed is a whole number from 0 to {SEEDS - 1}")
    else:
        count = whole(value)
        if not 1 <= count <= MANY_SEEDS:
            raise UserError(f"grid.seeds is {value!r}; as a number of seeds write 1 to {MANY_SEEDS}")
        found = list(range(count))
    if not found or len(set(found)) < len(found):
        raise UserError(f"grid.seeds is {value!r}; {advice}")
    return found


def _distinct(values: Iterable[Any], key: str, known: Iterable[str] | None = None) -> list[str]:
    found = [str(value) for value in values]
    if not found or len(set(found)) < len(found):
        raise UserError(f"{key} is {found}; write at least one name, each once")
    for name in found:
        if known is not None and name not in list(known):
            kind = key.rsplit(".", 1)[-1].rstrip("s")
            own = " A method of your own needs 'plugins=[its_module]'." if kind in METHODS else ""
            names_ = list(dict.fromkeys(known))
            close = get_close_matches(name, names_, n=3)
            # timm has more than a thousand.
            few = len(names_) <= MANY_NAMES
            hint = near(name, names_) if few else f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise UserError(f"{key}: no {kind} is named {name!r}.{hint}{own}")
    return found


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
        "settings": _distinct(grid.settings, "grid.settings", SETTINGS),
    }


def check(cfg: DictConfig) -> None:
    """What can be refused without looking at any data."""
    _check_ablations(cfg)  # first: they are names of the grid too
    names(cfg), seeds_of(cfg.grid.seeds)
    reserve = cfg.reserve
    if not 0 < reserve.size <= reserve.pool < 1 or not 0 <= reserve.contamination <= 1:
        raise UserError(
            f"reserve.size is {reserve.size:g} and reserve.pool {reserve.pool:g}; both are shares of the training "
            "split, 0 < size <= pool < 1, and reserve.contamination is a share of the reserve in [0, 1]"
        )
    measure, dispatch = cfg.measure, cfg.dispatch
    if measure.pgd_steps < 0 or (measure.pgd_images is not None and measure.pgd_images < 1):
        raise UserError("measure.pgd_steps is at least 0, and measure.pgd_images at least 1 (null: all test images)")
    if not 0 <= measure.pgd_epsilon <= 1 or not 0 < measure.pgd_step_size <= 1:
        raise UserError(
            f"measure.pgd_epsilon is {measure.pgd_epsilon:g} and measure.pgd_step_size {measure.pgd_step_size:g}; "
            "pixels are in [0, 1]. For 8 levels write 8/255 (0.03137)."
        )
    if measure.autoattack_images < 0:
        raise UserError(f"measure.autoattack_images is {measure.autoattack_images}; write 0 for none, or more")
    counts = list(measure.relearn_poisoned)
    if RELEARN_TABLE not in counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise UserError(
            f"measure.relearn_poisoned is {counts}; write different numbers of images from 1 up, "
            f"{RELEARN_TABLE} among them (the paper's, which the table shows)"
        )
    for name, most, example in (("crop", 0.5, "0.125 for four pixels of 32"), ("rotation", 180, "10 for ten degrees")):
        value = cfg.dataset.augmentation[name]
        if value is not None and not 0 <= value <= most:
            raise UserError(
                f"dataset.augmentation.{name} is {value:g}; write a number from 0 to {most:g}, e.g. {example}"
            )
    if dispatch.threads < 1 or (dispatch.workers is not None and dispatch.workers < 0):
        raise UserError("dispatch.threads is at least 1, and dispatch.workers at least 0 (null: one for each core)")
    if dispatch.kind not in ("local", "slurm"):
        raise UserError(f"dispatch.kind is {dispatch.kind!r}; write local or slurm")
    for name in ("max_tries", "trials_per_job", "trials_per_gpu", "max_jobs"):
        if dispatch[name] < 1:
            raise UserError(f"dispatch.{name} is {dispatch[name]}; write at least 1")
    _check_name(str(cfg.grid.name))
    results = os.path.abspath(cfg.results)
    if cfg.tracking.enabled and not cfg.tracking.uri and re.search(r"\?|%[0-9A-Fa-f]{2}", results):
        raise UserError(
            f"results is {cfg.results!r} ({results}), and MLflow would read ? or % in the address of its database as "
            "something else and open another file; write a folder without them, or tracking.enabled=false"
        )
    _check_exceptions(cfg)


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
                raise UserError(f"grid.ablations.{name}: {entry['defense']} has no setting {key!r}.{near(key, known)}")


def ablations(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The grid's ablations by name, each with its `defense` and what it `set`s.

    Raises:
        UserError: one lacks a part, or two have one name.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in cfg.grid.ablations:
        if (
            not OmegaConf.is_dict(entry)
            or set(entry) != {"name", "defense", "set"}
            or not OmegaConf.is_dict(entry["set"])
            or entry["name"] in found
        ):
            raise UserError(
                f"grid.ablations: {entry!r}; write {{name: fixed, defense: pbe, set: {{selection: false}}}}, "
                "each name once"
            )
        found[str(entry["name"])] = OmegaConf.to_container(entry, resolve=True)  # type: ignore[assignment]
    return found


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
        "setting": lambda: SETTINGS,
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


def _check_explicit(cfg: DictConfig, explicit: frozenset[str]) -> None:
    """Refuse a setting of the command line that no cell has: it would change nothing.

    Raises:
        UserError: it belongs to a method that is not on the grid's axis.
    """
    rows = {"attack": list(cfg.grid.attacks), "defense": [method_of(cfg, name) for name in cfg.grid.defenses]}
    if any(cfg.measure[name] for name in CONTROLLED):
        rows["attack"].append("none")  # the clean twin
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


def applies(cfg: DictConfig, exception: Any, explicit: frozenset[str]) -> dict[tuple[str, ...], dict[str, Any]]:
    """What an exception still sets beside the command line and the sweep: its settings by the names they hold for.

    The names are those of the grid that the exception matches, in the order of the axes, less the methods whose
    setting the command line has; none at all: every cell. Empty where nothing of it is left.
    """
    axes = {axis: list(cfg.grid[f"{axis}s"]) for axis in ("dataset", "model", "attack", "defense", "setting")}
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
        own = {f"defense.{method[head]}.{name}" for name in ablated.get(row, {"set": {}})["set"]}
        taken = {cell_path(other, method) for other in swept if other.startswith(f"{head}.")}
        return path is not None and path not in explicit | own | taken

    rows = {axis: [row for row in axes[axis] if told(axis, row)] for axis in axes}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    if not all(rows.values()):
        return found
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
        place: list[str] = []
        for axis, left in where.items():
            names_ = {told(axis, row) for row in left}
            place += [
                name for name in (as_list(exception[axis]) if axis in exception else axes[axis]) if name in names_
            ]
        found.setdefault(tuple(place), {})[str(key)] = value
    return found


def expand(
    cfg: DictConfig, infos: dict[str, DatasetInfo], precision: str, explicit: frozenset[str] = frozenset()
) -> list[Trial]:
    """All trials of a grid, in the order of its axes, each with the identities of its stages.

    Args:
        infos: what is known of each data set, by name.
        precision: what `train.precision=auto` is on the devices that will train.
        explicit: keys set on the command line; no exception of the grid overrides them.

    Raises:
        UserError: a setting is wrong, or an attack or architecture is impossible on a data set.
    """
    check(cfg)
    _check_explicit(cfg, explicit)
    axes, seeds = names(cfg), seeds_of(cfg.grid.seeds)
    variants = _variants(cfg, explicit)
    exceptions: list[dict[str, Any]] = OmegaConf.to_container(cfg.grid.exceptions, resolve=True)  # type: ignore[assignment]
    ablated = ablations(cfg)
    once = _Once()
    trials: list[Trial] = []
    for data in axes["datasets"]:
        for model in axes["models"]:
            fits(cfg, infos[data], model)
            for attacker in axes["attacks"]:
                for defender in axes["defenses"]:
                    for setting in axes["settings"]:
                        place = {
                            "dataset": data,
                            "model": model,
                            "attack": attacker,
                            "defense": defender,
                            "setting": setting,
                        }
                        for swept in variants:
                            own = _with_exceptions(cfg, place, exceptions, ablated, explicit, swept, once)
                            trials += _trials(own, infos[data], place, seeds, precision, swept, once)
    if len(variants) > 1:
        _check_points(trials, infos, seeds[0])
    return trials


def _variants(cfg: DictConfig, explicit: frozenset[str]) -> list[dict[str, Any]]:
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
            raise UserError(f"grid.sweep: no {group} of this grid has the setting {key}.{near(rest, settings)}")
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


class _Once:
    """What cells share is worked out for the first of them: a grid may have 100,000.

    A configuration counts by its identity: each stays in here, so that none takes another's place.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, place: tuple[Any, ...], make: Callable[[], T]) -> T:
        if place not in self.known:
            self.known[place] = make()
        found: T = self.known[place]
        return found


def _trials(
    cfg: DictConfig,
    info: DatasetInfo,
    place: dict[str, str],
    seeds: list[int],
    precision: str,
    swept: dict[str, Any],
    once: _Once,
) -> Iterator[Trial]:
    """The trials of one cell, one for each seed."""
    where = (id(cfg), place["dataset"], place["model"], place["attack"])
    implant, usual = once(("implant", *where), lambda: _implant(cfg, info, place, precision))
    # Where nothing is poisoned there is no poison to taint a reserve with.
    tainted = cfg.reserve.contamination if implant["attack"]["poison_rate"] else 0.0
    row = ("defend", id(cfg), place["defense"], place["setting"], tainted)
    defend, reason = once(row, lambda: _defend(cfg, place, usual, tainted))
    once(("reserve", *where), lambda: _check_reserve(cfg, info, attack_of(cfg, place["attack"])))
    versions = {"autoattack": autoattack.VERSION} if cfg.measure.autoattack_images else {}
    measure: Identity = once(
        ("measure", id(cfg)),
        lambda: {"stage": "evaluate", "engine": ENGINE_VERSION, **OmegaConf.to_container(cfg.measure), **versions},  # type: ignore[dict-item]
    )

    # Without a trigger there is nothing to wake.
    wanted = [name for name in CONTROLLED if measure[name] and implant["attack"]["poison_rate"]]
    twin = once(("twin", id(cfg)), lambda: _identity_of(attack_of(cfg, "none"))) if wanted else {}
    if "relearn" in wanted:
        once(("relearn", *where), lambda: _check_relearn(cfg, info, attack_of(cfg, place["attack"])))
    variant = ", ".join(f"{key}={to_override(value)}" for key, value in swept.items())

    def infected(seed: int) -> tuple[Identity, str, Identity, Identity, str]:
        """What the trials on one infected model share: its identity, what is measured of it, its clean twin."""
        ours = {**implant, "seed": seed}
        inspection = {"stage": "inspect", "engine": ENGINE_VERSION, "implant": key_of(ours)}
        control: Identity = {}
        if wanted:
            control = {**ours, "attack": twin}
            inspection |= {name: measure[name] for name in wanted} | {"control": key_of(control)}
            if "relearn" in wanted:
                inspection["relearn"] = measure["relearn_poisoned"]
            if "connection" in wanted:
                inspection["connection"] = connection.VERSION
        return ours, key_of(ours), inspection, control, key_of(inspection)

    for seed in seeds:
        ours, implant_key, inspection, control, inspect_key = once(("infected", *where, seed), partial(infected, seed))
        theirs = {**defend, "implant": implant_key} if defend else {}
        defend_key = key_of(theirs) if theirs else ""
        last = {**measure, "defend": defend_key, "inspect": inspect_key} if theirs else {}
        trial = Trial(
            **place,
            seed=seed,
            implant=ours,
            defend=theirs,
            evaluate=last,
            reason=reason,
            variant=variant,
            inspect=inspection if theirs else {},
            control=control if theirs else {},
        )
        # Known here, and asked for again and again.
        trial.__dict__["_keys"] = (implant_key, defend_key, key_of(last) if last else "")
        yield trial


def _implant(
    cfg: DictConfig, info: DatasetInfo, place: dict[str, str], precision: str
) -> tuple[Identity, dict[str, Any]]:
    """The identity of an infected model but for its seed, and the training recipe that no attack has changed."""
    attacker = attack_of(cfg, place["attack"])
    # The pool is cut off before poisoning: what is left is what the attacker poisons.
    pool = pool_of(cfg.reserve.pool, info.train_counts)
    if not sum(pool):
        raise UserError(f"reserve.pool is {cfg.reserve.pool:g}, less than one image of each class of {info.name}")
    left = [count - own for count, own in zip(info.train_counts, pool, strict=True)]
    try:
        attacker.check(left, info.shape)
        recipe = asdict(attacker.recipe(OmegaConf.to_object(cfg.train)))  # type: ignore[arg-type]
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{place['dataset']}: {error}") from error
    usual = asdict(OmegaConf.to_object(cfg.train))  # type: ignore[arg-type]
    for kept in (recipe, usual):
        if kept["precision"] == "auto":
            kept["precision"] = precision
    implant: Identity = {
        "stage": "implant",
        "engine": ENGINE_VERSION,
        "dataset": {"name": info.name, "digest": info.digest, "augmentation": asdict(info.augmentation)},
        "model": _model(cfg, info, place["model"]),
        "attack": _identity_of(attacker),
        "train": recipe,
        "pool": cfg.reserve.pool,
    }
    return implant, usual


def _model(cfg: DictConfig, info: DatasetInfo, name: str) -> dict[str, str]:
    """An architecture's part of an identity; that of a plug-in has its code too."""
    model = {"name": name, "stem": str(cfg.model.stem)}
    try:
        _, source = spec_of(info, model).examined(Path(cfg.dataset.cache))
    except (LookupError, ValueError) as error:
        raise UserError(str(error.args[0])) from error
    return {**model, **({"source": source} if source else {})}


def _check_reserve(cfg: DictConfig, info: DatasetInfo, attacker: Attack) -> None:
    """Refuse a reserve without an image of a data set, and a contamination of no image or of more than there are.

    Raises:
        UserError: with the least share that comes to an image.
    """
    total = sum(info.train_counts)
    size = reserve_of(cfg.reserve.size, cfg.reserve.pool, info.train_counts)
    if not size:
        raise UserError(
            f"reserve.size is {cfg.reserve.size:g}, less than one of the {total} training images of {info.name}; write "
            f"at least {least_share(total):g}"
        )
    if not attacker.poison_rate:
        return  # where nothing is poisoned there is no poison to taint a reserve with
    tainted = images_of(cfg.reserve.contamination, size)
    if cfg.reserve.contamination and not tainted:
        raise UserError(
            f"reserve.contamination is {cfg.reserve.contamination:g}, less than one of the {size} images of the "
            f"reserve of {info.name}; write at least {least_share(size):g}, or 0"
        )
    # The reserve has the classes in their proportions.
    own = size * info.train_counts[attacker.target_label] // total
    if attacker.label_mode == "clean_label" and tainted > own:
        raise UserError(
            f"reserve.contamination is {cfg.reserve.contamination:g}, but {attacker.name} can only poison images of "
            f"class {attacker.target_label}; write less, or another attack.{attacker.name}.label_mode"
        )


def _check_relearn(cfg: DictConfig, info: DatasetInfo, attacker: Attack) -> None:
    """Refuse a data set with fewer images to poison than the retuning that the table shows takes.

    Raises:
        UserError: whichever images its clean share takes.
    """
    pool = pool_of(cfg.reserve.pool, info.train_counts)
    left = [count - own for count, own in zip(info.train_counts, pool, strict=True)]
    victims = sum(left) - (0 if attacker.label_mode == "all_to_all" else left[attacker.target_label])
    victims -= max(1, images_of(reactivation.CLEAN_SHARE, sum(left)))
    if victims < RELEARN_TABLE:
        raise UserError(
            f"measure.relearn is true, but {info.name} has only {max(victims, 0)} training images to poison for it, "
            f"and the table shows {RELEARN_TABLE}; write measure.relearn=false, or take a larger data set"
        )


def _defend(cfg: DictConfig, place: dict[str, str], usual: dict[str, Any], tainted: float) -> tuple[Identity, str]:
    """The identity of a defense in a setting but for its infected model; without one, the reason why.

    Args:
        usual: the training recipe that no attack has changed.
        tainted: the poisoned share of the reserve.
    """
    defender = defense_of(cfg, method_of(cfg, place["defense"]))
    try:
        view = offered(type(defender), place["setting"])
    except (TypeError, NameError) as error:  # a plug-in without a type, or with one that cannot be found
        raise UserError(str(error)) from error
    defend: Identity = {}
    reason = ""
    if view is None:
        reason = f"{place['defense']} does not work in the setting {place['setting']!r}"
    else:
        defend = {
            "stage": "defend",
            "engine": ENGINE_VERSION,
            "defense": _identity_of(defender),
            "view": view.__name__,
        }
        if issubclass(view, ReserveView):
            defend["reserve"] = {"size": cfg.reserve.size, "contamination": tainted}
        if issubclass(view, TrainsetView):
            defend["train"] = usual  # not the attack's own recipe: that would tell which attack it was
    return defend, reason


def _identity_of(method: Attack | Defense) -> Identity:
    """Name, version and settings; for a method that is not ours, its source too, whose version nobody here raises."""
    settings = asdict(method)
    for setting in fields(method):
        if setting.metadata.get("later") and settings[setting.name] == setting.default:
            del settings[setting.name]  # what was computed before it came was computed so
    found = {"name": method.name, "version": method.version, **settings}
    if type(method).__module__.partition(".")[0] not in ("attacks", "baselines", "defenses"):
        source = inspect.getsource(sys.modules[type(method).__module__])
        found["source"] = hashlib.sha256(source.encode()).hexdigest()[:16]
    try:
        key_of(found)
    except (TypeError, ValueError) as error:
        raise UserError(f"{method.name}: settings must be numbers, texts, or lists of them ({error})") from error
    return found


def _with_exceptions(
    cfg: DictConfig,
    place: dict[str, str],
    exceptions: list[dict[str, Any]],
    ablated: dict[str, dict[str, Any]],
    explicit: frozenset[str],
    swept: dict[str, Any],
    once: _Once,
) -> DictConfig:
    """The configuration of one cell: every exception that matches is set, in order; the command line wins.

    Behind them comes what the row of an ablation is named for, and what is swept is set last.

    Keys are read as `cell_path` reads them. An exception that matches a defense matches its ablations too, and a swept
    setting that the cell's method does not have changes nothing in it.

    Raises:
        UserError: what an ablation changes or the grid sweeps is set by something else too.
    """
    name = place["defense"]
    ablation = ablated.get(name, {"defense": name, "set": {}})
    methods = {**place, "defense": ablation["defense"]}
    fitting = (
        exception
        for exception in exceptions
        if all({place[axis], methods[axis]} & set(as_list(value)) for axis, value in exception.items() if axis in place)
    )
    settings: list[tuple[str, str, Any]] = []
    for exception in fitting:
        for key, value in exception["set"].items():
            path = cell_path(str(key), methods)
            if path and path not in explicit:
                settings.append(("exceptions", path, value))
    own = {f"defense.{ablation['defense']}.{key}": value for key, value in ablation["set"].items()}
    settings += [("ablations", path, value) for path, value in own.items()]
    for path in explicit & set(own):
        raise UserError(f"{path} is what the row {name!r} of this grid changes; leave it out, or the row")
    for key, value in swept.items():
        path = swept_path(cfg, key, methods)
        if path in explicit:
            raise UserError(f"{path} is swept by this grid (as {key}); leave it out, or write grid.sweep=[]")
        if path in own:
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
            why = " ".join(str(error).split()) if name in known else f"there is no such setting.{near(name, known)}"
            raise UserError(f"grid.{source}: {path}={value!r}: {why}") from error
    return cfg


def fits(cfg: DictConfig, info: DatasetInfo, model: str) -> tuple[str, ...]:
    """How an architecture is fitted to the images of a data set, one line each.

    Raises:
        UserError: timm has no such architecture, or it cannot take such images.
    """
    try:
        notes, _ = spec_of(info, {"name": model, "stem": cfg.model.stem}).examined(Path(cfg.dataset.cache))
    except (LookupError, ValueError) as error:
        raise UserError(str(error.args[0])) from error
    return notes


def spec_of(info: DatasetInfo, model: dict[str, str]) -> ModelSpec:
    """The network of a trial on its data set."""
    return ModelSpec(
        name=model["name"],
        stem=model["stem"],
        num_classes=info.num_classes,
        channels=info.shape[0],
        image_size=info.shape[1],
        mean=info.mean,
        std=info.std,
    )
