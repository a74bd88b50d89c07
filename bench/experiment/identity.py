"""What identifies a stage: written from the settings, and read back into methods and networks."""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attacks.base import Attack, attack
from bench.engine.datasets import DatasetInfo
from bench.engine.errors import UserError
from bench.engine.models import ModelSpec
from bench.engine.registry import Registry
from bench.storage.store import Identity, key_of
from defenses.base import Defense, defense


def attack_of(cfg: DictConfig, name: str) -> Attack:
    """The settings of one attack as its dataclass; a wrong value is refused by the class itself."""
    return _method_of(cfg, "attack", attack, name)


def defense_of(cfg: DictConfig, name: str) -> Defense:
    return _method_of(cfg, "defense", defense, name)


def _method_of(cfg: DictConfig, group: str, registry: Registry, name: str) -> Any:
    try:
        cls = registry[name]  # first: an unknown name gets the list of known ones
        method = OmegaConf.to_object(cfg[group][name])
        return method
    except FrozenInstanceError as error:  # a key was added with +, which typed nodes accept
        raise UserError(f"{group}.{name}: {error}: {cls.__name__} has no such setting") from error
    except (LookupError, ValueError, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from error


def model_identity(cfg: DictConfig, info: DatasetInfo, name: str) -> dict[str, str]:
    """An architecture's part of an identity; that of a plug-in has its code too."""
    model = {"name": name, "stem": str(cfg.model.stem)}
    try:
        _, source = spec_of(info, model).examined(Path(cfg.dataset.cache))
    except (LookupError, ValueError) as error:
        raise UserError(str(error.args[0])) from error
    return {**model, **({"source": source} if source else {})}


def identity_of(method: Attack | Defense) -> Identity:
    """Name, version and settings; for a method that is not ours, its source too, whose version nobody here raises."""
    settings = asdict(method)
    for setting in fields(method):
        if setting.metadata.get("later") and settings[setting.name] == setting.default:
            del settings[setting.name]  # what was computed before it came was computed so
    identity = {"name": method.name, "version": method.version, **settings}
    if type(method).__module__.partition(".")[0] not in ("attacks", "baselines", "defenses"):
        source = inspect.getsource(sys.modules[type(method).__module__])
        identity["source"] = hashlib.sha256(source.encode()).hexdigest()[:16]
    try:
        key_of(identity)
    except (TypeError, ValueError) as error:
        raise UserError(f"{method.name}: settings must be numbers, texts, or lists of them ({error})") from error
    return identity


def adaptation_notes(cfg: DictConfig, info: DatasetInfo, model: str) -> tuple[str, ...]:
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


def attack_from(identity: Identity) -> Attack:
    """The attack of an implant's identity."""
    method: Attack = _method_from(attack, identity["attack"])
    return method


def defense_from(identity: Identity) -> Defense:
    """The defense of a defend stage's identity."""
    method: Defense = _method_from(defense, identity["defense"])
    return method


def _method_from(registry: Registry, settings: dict[str, Any]) -> Any:
    values = {key: value for key, value in settings.items() if key not in ("name", "version", "source")}
    return registry[settings["name"]](**values)
