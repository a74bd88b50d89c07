"""Spectral Signatures: remove the images of each class that lie furthest along its leading singular vector.

Paper: Tran, Li and Madry, NeurIPS 2018, arXiv:1811.00636.
Differs: the assumed number of poisoned images follows from an assumed poison rate of the whole training set, and is
capped in each class (see `assumed_poison`); the paper is given the number. As in the paper every class is filtered,
since the target is unknown: with the defaults half of each class of 500 images or more goes. Scores are divided by
their median in the class, so that they compare across classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.engine.metrics import features
from bench.engine.settings import number, share
from defenses.base import Filter, TrainsetView, assumed_poison, defense


@defense("spectral_signatures")
@dataclass(frozen=True)
class SpectralSignatures(Filter):
    """Flag in each class 1.5 times the assumed number of poisoned images, then train a fresh network on the rest."""

    paper: ClassVar[str] = "arXiv:1811.00636"
    poison_rate: float = share(
        0.1,
        "assumed poisoned / all training images, as if all were in the class at hand",
        above=0,
        below=1,
    )
    margin: float = number(1.5, "flagged / assumed poisoned images", above=0, at_most=3)

    def inspect(self, view: TrainsetView) -> tuple[Tensor, Tensor]:
        rows, labels = features(view.model, view.trainset), view.trainset.labels
        suspicion = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        flagged = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().flatten()
            score = outlyingness(rows[members])
            # More than half of a class at the very mean would make the unit zero.
            unit = score.median() if score.median() > 0 else score.mean()
            suspicion[members] = score / unit if unit > 0 else score
            count = round(self.margin * assumed_poison(self.poison_rate, len(rows), len(members)))
            if len(members) > 1:  # a class of one image has no spectrum
                flagged[members[score.argsort(descending=True, stable=True)[:count]]] = True
        return suspicion, flagged


def outlyingness(features: Tensor) -> Tensor:
    """(n,) float64: squared projection of each centred row of (n, d) on the leading right singular vector."""
    centred = features.double() - features.double().mean(dim=0)
    if centred.shape[1] > centred.shape[0]:
        # The same numbers from the smaller Gram matrix: squared left singular vectors times the squared value.
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        return vectors[:, -1].square() * values[-1].clamp(min=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return (centred @ vectors[:, -1]).square()
