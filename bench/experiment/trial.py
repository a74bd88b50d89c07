"""One trial of a grid, with the identities and keys of its stages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from bench.storage.store import Identity, key_of


class Keys(NamedTuple):
    """The store's names for the three stages of a trial."""

    implant: str
    defend: str
    evaluate: str


@dataclass(frozen=True)
class Trial:
    """One attack x defense x data set x architecture x setting x variant x seed.

    Attributes:
        variant: the swept settings of this trial as a command line has them, e.g. `reserve.contamination=0.1`; empty
            where nothing is swept.
        implant, defend, evaluate: the identities of its three stages. `defend` and `evaluate` are empty where the
            defense is not applicable in the setting; `reason` says why.
        inspect: the identity of what is measured once of the infected model, for all of its repairs.
        clean_control: the identity of its clean control: the same data set, architecture, recipe and seed without an
            attack. Empty where no measure asks for it.
    """

    dataset: str
    model: str
    attack: str
    defense: str
    threat_model: str
    seed: int
    implant: Identity
    defend: Identity
    evaluate: Identity
    reason: str = ""
    variant: str = ""
    inspect: Identity = field(default_factory=dict)
    clean_control: Identity = field(default_factory=dict)

    @cached_property
    def keys(self) -> Keys:
        """The keys of its three stages; empty where the defense is not applicable."""
        return Keys(self._key(self.implant), self._key(self.defend), self._key(self.evaluate))

    def implants(self) -> tuple[str, ...]:
        """The keys of the models that must exist before it is repaired and measured: its own and its clean control."""
        return (self.keys.implant, *([self.inspect["clean_control"]] if self.clean_control else []))

    @property
    def surrogate(self) -> Identity:
        """The identity of the clean network that its attacker may optimise on: the implant's, but for the attack."""
        shared = {name: value for name, value in self.implant.items() if name != "attack"}
        return {**shared, "stage": "surrogate"}

    def control_trial(self) -> Trial:
        """The trial whose implant is the clean control; nothing is done to it."""
        attack = self.clean_control["attack"]["name"]
        return replace(
            self, attack=attack, implant=self.clean_control, defend={}, evaluate={}, inspect={}, clean_control={}
        )

    def stage_keys(self) -> list[tuple[str, str]]:
        """Stage and key of all that is computed for it, in order."""
        _, defend, evaluate = self.keys
        if not evaluate:
            return []
        others = [("defend", defend), ("inspect", self.evaluate["inspect"]), ("evaluate", evaluate)]
        return [*(("implant", key) for key in self.implants()), *others]

    def identities(self) -> list[Identity]:
        """The identities of `places`, in their order."""
        if not self.evaluate:
            return []
        implants = [self.implant, *([self.clean_control] if self.clean_control else [])]
        return [*implants, self.defend, self.inspect, self.evaluate]

    @staticmethod
    def _key(identity: Identity) -> str:
        return key_of(identity) if identity else ""

    @property
    def title(self) -> str:
        cell = [self.dataset, self.model, self.attack, self.defense, self.threat_model]
        return "/".join([*cell, *([self.variant] if self.variant else []), str(self.seed)])
