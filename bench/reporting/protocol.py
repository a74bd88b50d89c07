"""The lines beneath every table, and the command that computes one cell again."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

from bench.engine.messages import masked
from bench.experiment.experiment import LOCAL, Experiment

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bench.experiment.trial import Trial


def protocol(experiment: Experiment) -> list[str]:
    """The lines printed beneath every table: what the numbers mean, and every setting that is not a default."""
    from bench.experiment.axes import ablations, effective_exceptions, seeds_of
    from bench.experiment.overrides import to_override

    cfg, infos = experiment.cfg, experiment.infos
    measure = cfg.measure
    used = _counts(experiment)
    sets = [
        f"{info.title} ({sum(info.train_counts)} + {sum(info.test_counts)} images of {info.num_classes} classes, "
        f"digest {info.digest or 'unknown'})"
        for info in infos.values()
    ]
    augmented = [f"{info.title}: {info.augmentation}" for info in infos.values()]
    lines = [
        f"data: {', '.join(sets)}; seeds: {', '.join(map(str, seeds_of(cfg.grid.seeds)))}; "
        "mean ± sample standard deviation over seeds, in percent",
        f"augmentation of training images: {'; '.join(augmented)}",
        f"reserve: {used['reserve']}; cut off before poisoning, never trained on by the attacker",
        "ACC: clean test accuracy. ASR: share of triggered test images of other classes sent to the target "
        "(all-to-all: of all, to the next class). recovery: share of the same images given their true label",
        f"robust: images that no iterate of PGD-{measure.pgd_steps} fools, L∞ {measure.pgd_epsilon * 255:.3g}/255, "
        f"step {measure.pgd_step_size * 255:.3g}/255, one random start, on {used['robust']}",
        "the last checkpoint is measured; nothing is chosen on test data or by ASR",
        "means: over all attacks, and over the clean model for figures that need no trigger",
        "seconds and MiB: of the defense alone, mean seconds and largest peak memory over attacks (on a CPU: of the "
        "whole process, interpreter and data included)",
        f"infected models: stem {cfg.model.stem}; train: "
        + ", ".join(f"{key} {value}" for key, value in cfg.train.items() if key not in ("updates",) or value),
        f"settings that are not the methods' defaults: {_changed(cfg) or 'none'}",
    ]
    if used["poisoned"]:
        lines.append(f"poisoned training images, where the nearest whole number is another share: {used['poisoned']}")
    if experiment.reused:
        lines.append(f"computed elsewhere, each row with its commit in trials.csv: trials of {', '.join(cfg.reuse)}")
    words = [word for word in experiment.arguments if not LOCAL.match(word.lstrip("+"))]
    lines.append(f"command: {masked(shlex.join(['python', '-m', 'bench.run', *words]))}")

    def settings(changed: dict[str, Any]) -> str:
        return ", ".join(f"{key}={to_override(value)}" for key, value in changed.items())

    for name, entry in ablations(cfg).items():
        if name in cfg.grid.defenses:
            lines.append(f"{name}: {entry['defense']} with {settings(entry['set'])}")
    for exception in cfg.grid.exceptions:
        for where, changed in effective_exceptions(cfg, exception, experiment.explicit).items():
            lines.append(f"exception for {', '.join(where) or 'all cells'}: {settings(changed)}: {exception['why']}")
    return lines


def _counts(experiment: Experiment) -> dict[str, str]:
    """The images that the shares of a grid come to on its data sets, in words: `reserve`, `robust`, `poisoned`."""
    from bench.experiment.counts import Counts, counts_of

    named = len(experiment.infos) > 1
    cells: dict[tuple[Any, ...], tuple[Trial, Counts]] = {}
    for trial in experiment.trials:
        attacker, measure = trial.implant["attack"], trial.evaluate
        shares = trial.implant["held_out"], attacker["poison_rate"], attacker["cover_rate"]
        reserve = tuple(trial.defend.get("reserve", {}).values())
        settings = (trial.dataset, trial.attack, *shares, reserve, measure.get("pgd_images"))
        within = (*settings, measure.get("autoattack_images"), bool(trial.defend))
        if within not in cells:
            cells[within] = trial, counts_of(trial, experiment.infos[trial.dataset])
    texts: dict[str, dict[str, None]] = {"reserve": {}, "held_out": {}, "robust": {}, "poisoned": {}}
    # On a clean model the reserve is clean; the line is about the others.
    backdoored = any(trial.implant["attack"]["poison_rate"] for trial, _ in cells.values())
    for trial, counts in cells.values():
        where = f" of {trial.dataset}" if named else ""
        attacker = trial.implant["attack"]
        if counts.reserve is not None and (attacker["poison_rate"] or not backdoored):
            share = trial.defend["reserve"]
            text = f"{counts.reserve} of {counts.train} training images{where} ({counts.reserve / counts.train:.2%}"
            text += f", for reserve.size={share['size']:g})"
            if share["contamination"]:
                assert counts.tainted is not None
                text += f", {counts.tainted} of them poisoned ({counts.tainted / counts.reserve:.2%}"
                text += f", for reserve.contamination={share['contamination']:g})"
            texts["reserve"][text] = None
        held_out = sum(counts.held_out)
        text = f"{held_out} of {counts.train} training images{where} ({held_out / counts.train:.2%}"
        texts["held_out"][
            f"{text}, for reserve.held_out={trial.implant['held_out']:g}), which no defense of this grid uses"
        ] = None
        if trial.evaluate:
            whole = f"the whole test set{where} ({counts.test} images)"
            text = whole if counts.robust == counts.test else f"{counts.robust} fixed test images{where}"
            if counts.autoattack:
                images = whole if counts.autoattack == counts.test else f"{counts.autoattack} fixed test images{where}"
                text += f" (AutoAttack: on {images})"
            texts["robust"][text] = None
        left = counts.train - sum(counts.held_out)
        for kind, count in (("poison_rate", counts.poisoned), ("cover_rate", counts.covers)):
            # Equal in print is equal.
            if count is not None and f"{count / left:.1%}" != f"{attacker[kind]:.1%}":
                text = f"{trial.attack}{where}: {count} of {left} ({count / left:.2%}, for {kind}={attacker[kind]:g})"
                texts["poisoned"][text] = None
    return {
        "reserve": ", ".join(texts["reserve"] or texts["held_out"]),
        "robust": ", ".join(texts["robust"]) or "test images",
        "poisoned": ", ".join(texts["poisoned"]),
    }


def _changed(cfg: DictConfig) -> str:
    """Settings of the grid's methods that differ from their classes' defaults."""
    from dataclasses import asdict

    from attacks.base import attack
    from bench.experiment.axes import method_of
    from bench.experiment.identity import attack_of, defense_of
    from defenses.base import defense

    settings = []
    for group, names, registry, of in (
        ("attack", cfg.grid.attacks, attack, attack_of),
        ("defense", {method_of(cfg, name): None for name in cfg.grid.defenses}, defense, defense_of),
    ):
        for name in names:
            defaults = asdict(registry[name]())
            for key, value in asdict(of(cfg, name)).items():
                if value != defaults[key]:
                    settings.append(f"{group}.{name}.{key}={value}")
    return ", ".join(settings)


def command(experiment: Experiment, trial: Trial) -> str:
    """The line for a shell that computes one cell anew, apart from what is stored; its last word names the seed.

    The precision is named: on another kind of device `auto` would be another one.
    """
    from bench.experiment.axes import method_of, swept_path
    from bench.experiment.overrides import PER_CELL, to_override

    axes = ("dataset", "model", "attack", "defense", "threat_model")
    mine = (*(f"grid.{axis}s=" for axis in axes), "grid.seeds=", "train.precision=")
    # Of where things lie and run a cell needs its data, and its device: the precision may not exist elsewhere.
    always = ("dataset.", "dispatch.device=")
    words = [
        word
        for word in experiment.arguments
        if not (bare := word.lstrip("+")).startswith(mine) and (bare.startswith(always) or not LOCAL.match(bare))
    ]
    # A grid of one cell refuses the settings of other methods.
    methods = {"attack": trial.attack, "defense": method_of(experiment.cfg, trial.defense)}
    others = [f"{group}.{name}." for group in methods for name in experiment.cfg[group] if name != methods[group]]
    if trial.clean_control:
        others.remove("attack.none.")
    words = [word for word in words if not word.lstrip("+").startswith(tuple(others))]
    if experiment.cfg.dispatch.threads != 1:
        words.append(f"dispatch.threads={experiment.cfg.dispatch.threads}")
    if trial.variant:
        words = [word for word in words if not word.startswith("grid.sweep=")]
        pairs = re.split(rf", (?=(?:{'|'.join(PER_CELL)})\.[\w.]+=)", trial.variant)
        swept = [pair.partition("=") for pair in pairs]
        swept = [entry for entry in swept if swept_path(experiment.cfg, entry[0], methods)]
        words.append("grid.sweep=[" + ",".join(f"{{key:{key},values:[{value}]}}" for key, _, value in swept) + "]")
    words += [f"grid.{axis}s=[{to_override(getattr(trial, axis))}]" for axis in axes]
    words.append("results=reproduced")
    if "train.precision=" not in trial.variant:  # what is swept cannot be set beside the sweep
        words.append(f"train.precision={trial.implant['train']['precision']}")
    return masked(shlex.join(["python", "-m", "bench.run", *words, f"grid.seeds=[{trial.seed}]"]))
