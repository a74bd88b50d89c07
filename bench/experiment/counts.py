"""The numbers of images that the shares of a trial come to."""

from __future__ import annotations

from dataclasses import dataclass

from bench.engine.counts import held_out_of, images_of, reserve_of
from bench.engine.datasets import DatasetInfo
from bench.experiment.trial import Trial


@dataclass(frozen=True)
class Counts:
    """The numbers of images that the shares of a trial come to.

    Attributes:
        train, held_out: training images of the data set, and those of them that are set aside.
        poisoned, covers: training images that the attack stamps; None where it owns the training, and each batch has
            its own.
        reserve, tainted: images of the defender's reserve, and the poisoned ones among them; None without a reserve.
        robust, autoattack: test images that robust accuracy is measured on.
    """

    train: int
    held_out: tuple[int, ...]
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
    held_out = held_out_of(trial.implant["held_out"], info.train_counts)
    left = train - sum(held_out)
    is_fixed = attacker["regime"] == "static"
    share = trial.defend.get("reserve")
    reserve = reserve_of(share["size"], trial.implant["held_out"], info.train_counts) if share else None
    robust = trial.evaluate.get("pgd_images")
    return Counts(
        train=train,
        held_out=tuple(held_out),
        poisoned=images_of(attacker["poison_rate"], left) if is_fixed else None,
        covers=images_of(attacker["cover_rate"], left) if is_fixed else None,
        reserve=reserve,
        tainted=images_of(share["contamination"], reserve) if share and reserve is not None else None,
        test=test,
        robust=test if robust is None else min(robust, test),
        autoattack=min(trial.evaluate.get("autoattack_images", 0), test),
    )
