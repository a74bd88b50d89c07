"""Every setting that declares a range takes its ends and refuses what lies beyond, by name."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass, replace

import pytest

from attacks.base import Attack, attack
from bench.engine import settings
from bench.engine.settings import COMMON, Setting, count, declared, number
from bench.engine.training import Recipe
from bench.experiment.schema import Config
from defenses.base import Defense, defense


def groups(cls: type, prefix: str = ""):
    """The dataclasses of the harness's settings, by the path of each."""
    yield prefix, cls
    for each in fields(cls):
        if is_dataclass(each.default_factory):
            yield from groups(each.default_factory, f"{prefix}{each.name}.")


METHODS = {f"attack.{name}.": cls for name, cls in attack.items()}
METHODS |= {f"defense.{name}.": cls for name, cls in defense.items()}
CLASSES = METHODS | dict(groups(Config))
DECLARED = [
    pytest.param(prefix, cls, name, setting, id=f"{prefix}{name}")
    for prefix, cls in CLASSES.items()
    for name, setting in declared(cls).items()
    if setting is not None and (setting.is_number or setting.choices)
]


def default_of(cls: type, name: str):
    each = cls.__dataclass_fields__[name]
    return each.default_factory() if each.default_factory is not MISSING else each.default


def is_whole(cls: type, name: str) -> bool:
    kind = str(cls.__dataclass_fields__[name].type)
    return "int" in kind and "float" not in kind


def beyond(end: float, direction: float, whole: bool) -> float:
    return end + int(direction) if whole else math.nextafter(end, direction * math.inf)


def within_and_outside(setting: Setting, whole: bool):
    """The extreme values that a setting takes, and the nearest ones that it must not."""
    within, outside = [], []
    for end, direction in ((setting.at_least, -1), (setting.at_most, 1)):
        if end is not None:
            value = int(end) if whole else end
            within.append(value)
            outside.append(beyond(value, direction, whole))
    for end, direction in ((setting.above, 1), (setting.below, -1)):
        if end is not None:
            value = int(end) if whole else end
            outside.append(value)
            within.append(beyond(value, direction, whole))
    return within, outside


def refused(prefix: str, cls: type, name: str, value) -> str:
    """The message by which a value is refused; empty where it is taken. A list has it as its first element."""
    default = default_of(cls, name)
    if isinstance(default, list):
        value = [value, *default[1:]]
    values = {each.name: default_of(cls, each.name) for each in fields(cls)} | {name: value}
    try:
        settings.check(cls, values, prefix)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("prefix", "cls", "name", "setting"), DECLARED)
def test_a_setting_takes_the_ends_of_its_range_and_refuses_what_lies_beyond(prefix, cls, name, setting):
    assert not refused(prefix, cls, name, default_of(cls, name))
    within, outside = within_and_outside(setting, is_whole(cls, name))
    for value in (*within, *setting.choices):
        assert not refused(prefix, cls, name, value), value
    outside += [math.nan, math.inf, -math.inf, True, "1"] if setting.is_number else [f"{setting.choices[0]}x", 1]
    outside += [2.5] if is_whole(cls, name) else []
    for value in outside:
        message = refused(prefix, cls, name, value)
        assert f"{prefix}{name} is " in message, value
        assert "\n" not in message


@pytest.mark.parametrize(("prefix", "cls"), METHODS.items())
def test_a_method_checks_its_settings_when_it_is_made(prefix, cls):
    method = cls()
    for name, setting in declared(cls).items():
        _, outside = within_and_outside(setting, is_whole(cls, name))
        for value in outside[:1]:
            wrong = [value] if isinstance(default_of(cls, name), list) else value
            with pytest.raises(ValueError, match=name):
                replace(method, **{name: wrong})


@pytest.mark.parametrize(("prefix", "cls"), CLASSES.items())
def test_every_setting_says_what_it_means(prefix, cls):
    nested = {each.name for each in fields(cls) if is_dataclass(each.default_factory)} | {"attack", "defense"}
    for name, setting in declared(cls).items():
        assert setting is not None or name in nested, name
        assert setting is None or setting.about.strip(), name


def test_a_wrong_choice_is_answered_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"optimizer is 'sdg'.*'sgd'"):
        Recipe(optimizer="sdg")


@pytest.mark.parametrize(
    ("setting", "value", "advice"),
    [
        ("attack.badnets.poison_rate", 10, "0.1"),
        ("defense.aft.epsilon", 6, "6/255"),
        ("attack.lira.epsilon", 4.0, "4/255"),
    ],
)
def test_percent_and_levels_are_answered_with_what_they_come_to(setting, value, advice):
    group, name, key = setting.split(".")
    cls = METHODS[f"{group}.{name}."]
    with pytest.raises(ValueError, match=rf"{key} is {value:g};.* write {advice}"):
        cls(**{key: value})


def test_a_subclass_that_changes_a_default_keeps_the_range():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Base:
        strength: float = number(0.5, "strength", at_least=0)
        length: int = count(2, "length", at_least=1)

    @dataclass(frozen=True)
    class Stronger(Base):
        strength: float = 0.75

    assert Stronger().strength == 0.75
    assert declared(Stronger) == declared(Base)
    with pytest.raises(ValueError, match=r"^x\.strength is -1"):
        settings.check(Stronger, {"strength": -1, "length": 2}, "x.")


def test_a_method_that_declares_nothing_is_checked_by_the_names_that_all_share():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Plain(Defense):
        epochs: int = 3
        factor: float = -7.0

    assert Plain().factor == -7.0
    assert declared(Plain)["epochs"] is COMMON["epochs"]
    with pytest.raises(ValueError, match="epochs is -1"):
        Plain(epochs=-1)


def test_lists_and_dictionaries_are_not_shared_between_two_of_a_kind():
    one, two = Config(), Config()
    assert one.grid.datasets is not two.grid.datasets
    assert one.dispatch.slurm.additional is not two.dispatch.slurm.additional
    assert issubclass(attack["badnets"], Attack)
