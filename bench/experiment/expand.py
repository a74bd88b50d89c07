"""From a configuration to the list of trials; pure, and computes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from operator import attrgetter
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attacks.base import Attack
from bench.engine import ENGINE_VERSION, autoattack, connection, reactivation
from bench.engine.counts import held_out_of, images_of, least_share, reserve_of
from bench.engine.datasets import DatasetInfo
from bench.engine.errors import UserError
from bench.engine.metrics import ROBUST_VERSION
from bench.experiment.axes import (
    Memo,
    ablations,
    cell_config,
    check,
    check_explicit,
    method_of,
    names,
    seeds_of,
    sweep_variants,
)
from bench.experiment.counts import Counts, counts_of
from bench.experiment.identity import adaptation_notes, attack_of, defense_of, identity_of, model_identity
from bench.experiment.overrides import to_override
from bench.experiment.schema import Config
from bench.experiment.trial import Keys, Trial
from bench.measures.context import NEEDS_CONTROL, RELEARN_TABLE
from bench.storage.store import Identity, key_of
from defenses.base import ReserveView, TrainsetView, offered


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
        key = trial.keys.implant
        if key not in implants:
            attacker = trial.implant["attack"]
            if counts.poisoned is not None:
                attacker = {**attacker, "poison_rate": counts.poisoned, "cover_rate": counts.covers}
            implants[key] = key_of({**trial.implant, "attack": attacker, "held_out": list(counts.held_out)})
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
    check_explicit(cfg, explicit)
    axes, seeds = names(cfg), seeds_of(cfg.grid.seeds)
    variants = sweep_variants(cfg, explicit)
    exceptions: list[dict[str, Any]] = OmegaConf.to_container(cfg.grid.exceptions, resolve=True)  # type: ignore[assignment]
    ablated = ablations(cfg)
    once = Memo()
    trials: list[Trial] = []
    for data in axes["datasets"]:
        for model in axes["models"]:
            adaptation_notes(cfg, infos[data], model)
            for attacker in axes["attacks"]:
                for defender in axes["defenses"]:
                    for threat_model in axes["threat_models"]:
                        cell = {
                            "dataset": data,
                            "model": model,
                            "attack": attacker,
                            "defense": defender,
                            "threat_model": threat_model,
                        }
                        for swept in variants:
                            settings = cell_config(cfg, cell, exceptions, ablated, explicit, swept, once)
                            trials += _trials(settings, infos[data], cell, seeds, precision, swept, once)
    if len(variants) > 1:
        _check_points(trials, infos, seeds[0])
    _check_used(cfg, trials, explicit)
    return trials


def _check_used(cfg: DictConfig, trials: list[Trial], explicit: frozenset[str]) -> None:
    """Refuse a setting of the command line that no trial of this grid reads, unless it is the default.

    Raises:
        UserError: with what reads it.
    """
    reserves = [trial.defend["reserve"] for trial in trials if "reserve" in trial.defend]
    readers = {
        "reserve.size": (bool(reserves), "a defense with a reserve (grid.threat_models=[reserve])"),
        "reserve.contamination": (
            any(reserve["contamination"] for reserve in reserves),
            "a defense with a reserve against an attack that poisons (grid.threat_models=[reserve])",
        ),
        "measure.relearn_poisoned": (
            any("relearn" in trial.inspect for trial in trials),
            "measure.relearn=true, of an attack that poisons",
        ),
    }
    defaults = Config()
    for path, (is_read, reader) in readers.items():
        value = OmegaConf.select(cfg, path)
        if path in explicit and not is_read and value != attrgetter(path)(defaults):
            raise UserError(f"{path}={to_override(value)} changes nothing here: it is read by {reader}; leave it out")


def _trials(
    cfg: DictConfig,
    info: DatasetInfo,
    cell: dict[str, str],
    seeds: list[int],
    precision: str,
    swept: dict[str, Any],
    once: Memo,
) -> Iterator[Trial]:
    """The trials of one cell, one for each seed."""
    where = (id(cfg), cell["dataset"], cell["model"], cell["attack"])
    implant, usual = once(("implant", *where), lambda: _implant(cfg, info, cell, precision))
    # Where nothing is poisoned there is no poison to taint a reserve with.
    tainted = cfg.reserve.contamination if implant["attack"]["poison_rate"] else 0.0
    row = ("defend", id(cfg), cell["defense"], cell["threat_model"], tainted)
    defend, reason = once(row, lambda: _defend(cfg, cell, usual, tainted))
    if "reserve" in defend:
        once(("reserve", *where), lambda: _check_reserve(cfg, info, attack_of(cfg, cell["attack"])))
    versions = {"robust_accuracy": ROBUST_VERSION}
    versions |= {"autoattack": autoattack.VERSION} if cfg.measure.autoattack_images else {}
    measure: Identity = once(
        ("measure", id(cfg)),
        lambda: {"stage": "evaluate", "engine": ENGINE_VERSION, **OmegaConf.to_container(cfg.measure), **versions},  # type: ignore[dict-item]
    )

    # Without a trigger there is nothing to wake.
    wanted = [name for name in NEEDS_CONTROL if measure[name] and implant["attack"]["poison_rate"]]
    clean_attack = once(("clean_control", id(cfg)), lambda: identity_of(attack_of(cfg, "none"))) if wanted else {}
    if "relearn" in wanted:
        once(("relearn", *where), lambda: _check_relearn(cfg, info, attack_of(cfg, cell["attack"])))
    variant = ", ".join(f"{key}={to_override(value)}" for key, value in swept.items())

    def infected(seed: int) -> tuple[Identity, str, Identity, Identity, str]:
        """What the trials on one infected model share: its identity, what is measured of it, its clean control."""
        identity = {**implant, "seed": seed}
        inspection = {"stage": "inspect", "engine": ENGINE_VERSION, "implant": key_of(identity)}
        control: Identity = {}
        if wanted:
            control = {**identity, "attack": clean_attack}
            inspection |= {name: measure[name] for name in wanted} | {"clean_control": key_of(control)}
            if "relearn" in wanted:
                inspection["relearn"] = measure["relearn_poisoned"]
            if "connection" in wanted:
                inspection["connection"] = connection.VERSION
        return identity, key_of(identity), inspection, control, key_of(inspection)

    for seed in seeds:
        identity, implant_key, inspection, control, inspect_key = once(
            ("infected", *where, seed), partial(infected, seed)
        )
        theirs = {**defend, "implant": implant_key} if defend else {}
        defend_key = key_of(theirs) if theirs else ""
        last = {**measure, "defend": defend_key, "inspect": inspect_key} if theirs else {}
        trial = Trial(
            **cell,
            seed=seed,
            implant=identity,
            defend=theirs,
            evaluate=last,
            reason=reason,
            variant=variant,
            inspect=inspection if theirs else {},
            clean_control=control if theirs else {},
        )
        # Known here, and asked for again and again.
        trial.__dict__["keys"] = Keys(implant_key, defend_key, key_of(last) if last else "")
        yield trial


def _implant(
    cfg: DictConfig, info: DatasetInfo, cell: dict[str, str], precision: str
) -> tuple[Identity, dict[str, Any]]:
    """The identity of an infected model but for its seed, and the training recipe that no attack has changed."""
    attacker = attack_of(cfg, cell["attack"])
    # The reserve is cut off before poisoning: what is left is what the attacker poisons.
    held_out = held_out_of(cfg.reserve.held_out, info.train_counts)
    if not sum(held_out):
        raise UserError(
            f"reserve.held_out is {cfg.reserve.held_out:g}, less than one image of each class of {info.name}"
        )
    left = [count - cut for count, cut in zip(info.train_counts, held_out, strict=True)]
    try:
        attacker.check(left, info.shape)
        recipe = asdict(attacker.recipe(OmegaConf.to_object(cfg.train)))  # type: ignore[arg-type]
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{cell['dataset']}: {error}") from error
    usual = asdict(OmegaConf.to_object(cfg.train))  # type: ignore[arg-type]
    for training in (recipe, usual):
        if training["precision"] == "auto":
            training["precision"] = precision
    implant: Identity = {
        "stage": "implant",
        "engine": ENGINE_VERSION,
        "dataset": {"name": info.name, "digest": info.digest, "augmentation": asdict(info.augmentation)},
        "model": model_identity(cfg, info, cell["model"]),
        "attack": identity_of(attacker),
        "train": recipe,
        "held_out": cfg.reserve.held_out,
    }
    return implant, usual


def _check_reserve(cfg: DictConfig, info: DatasetInfo, attacker: Attack) -> None:
    """Refuse a reserve without an image of a data set, and a contamination of no image or of more than there are.

    Raises:
        UserError: with the least share that comes to an image.
    """
    total = sum(info.train_counts)
    size = reserve_of(cfg.reserve.size, cfg.reserve.held_out, info.train_counts)
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
    of_target = size * info.train_counts[attacker.target_label] // total
    if attacker.label_mode == "clean_label" and tainted > of_target:
        raise UserError(
            f"reserve.contamination is {cfg.reserve.contamination:g}, but {attacker.name} can only poison images of "
            f"class {attacker.target_label}; write less, or another attack.{attacker.name}.label_mode"
        )


def _check_relearn(cfg: DictConfig, info: DatasetInfo, attacker: Attack) -> None:
    """Refuse a data set with fewer images to poison than the retuning that the table shows takes.

    Raises:
        UserError: whichever images its clean share takes.
    """
    held_out = held_out_of(cfg.reserve.held_out, info.train_counts)
    left = [count - cut for count, cut in zip(info.train_counts, held_out, strict=True)]
    victims = sum(left) - (0 if attacker.label_mode == "all_to_all" else left[attacker.target_label])
    victims -= max(1, images_of(reactivation.CLEAN_SHARE, sum(left)))
    if victims < RELEARN_TABLE:
        raise UserError(
            f"measure.relearn is true, but {info.name} has only {max(victims, 0)} training images to poison for it, "
            f"and the table shows {RELEARN_TABLE}; write measure.relearn=false, or take a larger data set"
        )


def _defend(cfg: DictConfig, cell: dict[str, str], usual: dict[str, Any], tainted: float) -> tuple[Identity, str]:
    """The identity of a defense in a setting but for its infected model; without one, the reason why.

    Args:
        usual: the training recipe that no attack has changed.
        tainted: the poisoned share of the reserve.
    """
    defender = defense_of(cfg, method_of(cfg, cell["defense"]))
    try:
        view = offered(type(defender), cell["threat_model"])
    except (TypeError, NameError) as error:  # a plug-in without a type, or with one that cannot be found
        raise UserError(str(error)) from error
    defend: Identity = {}
    reason = ""
    if view is None:
        reason = f"{cell['defense']} does not work in the threat model {cell['threat_model']!r}"
    else:
        defend = {
            "stage": "defend",
            "engine": ENGINE_VERSION,
            "defense": identity_of(defender),
            "view": view.__name__,
        }
        if issubclass(view, ReserveView):
            defend["reserve"] = {"size": cfg.reserve.size, "contamination": tainted}
        if issubclass(view, TrainsetView):
            defend["train"] = usual  # not the attack's own recipe: that would tell which attack it was
    return defend, reason
