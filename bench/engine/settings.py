"""Settings that declare their range and meaning beside the default; checks, documentation and tests read the same.

A method is a frozen dataclass of settings:

    epsilon: float = share(0.4, "radius of the noise, relative to scale and shift")
    steps: int = count(1, "steps of the ascent", at_least=1)

A subclass that only changes a default writes `epsilon: float = 0.2` and keeps the declaration. A setting without one is
checked by its name if that is one of `COMMON`, and otherwise by nothing but its type.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What is declared of one setting.

    Attributes:
        about: its meaning, in one line.
        at_least, above, at_most, below: the ends of its range; None is open.
        choices: the values that it takes; empty where it is a number or free.
        is_number, is_whole: must it be a finite number, and a whole one? Lists are checked element by element.
        unit: `share` or `pixels`, where a value outside the range is probably in percent, or in levels of 255.
    """

    about: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    is_number: bool = False
    is_whole: bool = False
    unit: str = ""

    def allows(self, value: Any) -> bool:
        """Does the setting take this value? None is left to the type."""
        if value is None:
            return True
        if isinstance(value, Sequence) and not isinstance(value, str):
            return all(map(self.allows, value))
        if self.choices:
            return value in self.choices
        if not self.is_number:
            return True
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if self.is_whole and not isinstance(value, int):
            return False
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    @property
    def range(self) -> str:
        """The values that it takes, as a reader of the documentation sees them; empty where every value does."""
        if self.choices:
            return ", ".join(f"`{choice}`" for choice in self.choices)
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        if low is None and high is None:
            return ""
        if high is None:
            return f"{'≥' if self.above is None else '>'} {low:g}"
        if low is None:
            return f"{'≤' if self.below is None else '<'} {high:g}"
        return f"{'[' if self.above is None else '('}{low:g}, {high:g}{']' if self.below is None else ')'}"

    def refusal(self, name: str, value: Any) -> str:
        """The line that refuses a value, with what to write instead."""
        if self.choices:
            match = get_close_matches(str(value), self.choices, n=1)
            hint = f" Did you mean {match[0]!r}?" if match else ""
            return f"{name} is {value!r}; write {' or '.join(self.choices)}.{hint}"
        wanted = ["a whole number" if self.is_whole else "a number"]
        wanted += [f"at least {self.at_least:g}"] if self.at_least is not None else []
        wanted += [f"above {self.above:g}"] if self.above is not None else []
        wanted += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        wanted += [f"below {self.below:g}"] if self.below is not None else []
        given = f"{value:g}" if isinstance(value, float) else repr(value)
        hint = ""
        if isinstance(value, int | float) and self.unit == "share" and 2 <= value <= 100:
            hint = f". For {value:g} % write {value / 100:g}"
        if isinstance(value, int | float) and self.unit == "pixels" and 2 <= value <= 255:
            hint = f". Pixels are in [0, 1]: for {value:g} levels write {value:g}/255 ({value / 255:.4g})"
        return f"{name} is {given}; write {', '.join(wanted)}{hint}"


def _declared(default: Any, setting: Setting, later: bool) -> Any:
    metadata = {"setting": setting, "later": later}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def number(
    default: Any,
    about: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    unit: str = "",
    whole: bool = False,
    later: bool = False,
) -> Any:
    """Declare a finite number, or a list of them.

    Args:
        unit: see `Setting`.
        later: it came after results had been computed; at its default the method does what it did before, and its
            identity does not name it, so that stored results stay found.
    """
    setting = Setting(about, at_least, above, at_most, below, is_number=True, is_whole=whole, unit=unit)
    return _declared(default, setting, later)


def share(
    default: Any, about: str, *, above: float | None = None, below: float | None = None, later: bool = False
) -> Any:
    """Declare a share in [0, 1]; `above=0` and `below=1` leave an end out."""
    return number(
        default,
        about,
        at_least=0.0 if above is None else None,
        above=above,
        at_most=1.0 if below is None else None,
        below=below,
        unit="share",
        later=later,
    )


def pixels(default: Any, about: str, *, above: float | None = None, later: bool = False) -> Any:
    """Declare a difference of pixel values, which are in [0, 1]."""
    least = 0.0 if above is None else None
    return number(default, about, at_least=least, above=above, at_most=1.0, unit="pixels", later=later)


def count(default: Any, about: str, *, at_least: int = 0, at_most: int | None = None, later: bool = False) -> Any:
    """Declare a whole number, or a list of them."""
    return number(default, about, at_least=at_least, at_most=at_most, whole=True, later=later)


def choice(default: str, about: str, options: Iterable[str], *, later: bool = False) -> Any:
    """Declare a setting that is one of a few names."""
    return _declared(default, Setting(about, choices=tuple(options)), later)


def plain(default: Any, about: str, *, later: bool = False) -> Any:
    """Declare a switch, a text, a list of texts, or a function that gives one."""
    return _declared(default, Setting(about), later)


def _common(declare: Callable[..., Any], about: str, **bounds: Any) -> Setting:
    setting: Setting = declare(None, about, **bounds).metadata["setting"]
    return setting


# What settings of these names mean wherever they appear; a declaration of a method's own takes precedence.
COMMON = {
    "epochs": _common(count, "passes over the images"),
    "updates": _common(count, "optimizer steps"),
    "batch_size": _common(count, "images in a step", at_least=1),
    "lr": _common(number, "learning rate", at_least=0),
    "momentum": _common(number, "momentum of SGD", at_least=0, below=1),
    "weight_decay": _common(number, "weight decay", at_least=0),
    "label_smoothing": _common(number, "label smoothing of the cross-entropy", at_least=0, below=1),
}


@functools.cache
def declared(cls: type) -> dict[str, Setting | None]:
    """What is declared of each setting of a dataclass, by itself or by the base whose default it changes."""
    settings: dict[str, Setting | None] = {}
    for each in fields(cls):
        owners = (own.__dataclass_fields__.get(each.name) for own in cls.__mro__ if is_dataclass(own))
        declarations = (owner.metadata.get("setting") for owner in owners if owner is not None)
        settings[each.name] = next(filter(None, declarations), COMMON.get(each.name))
    return settings


def check(cls: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse values outside the declared ranges.

    Args:
        values: by the names of the dataclass's settings.
        prefix: what goes before a name in the message, e.g. `defense.aft.`.

    Raises:
        ValueError: in one line, with the setting, the value and what to write instead.
    """
    for name, setting in declared(cls).items():
        if setting is not None and not setting.allows(values[name]):
            raise ValueError(setting.refusal(f"{prefix}{name}", values[name]))
