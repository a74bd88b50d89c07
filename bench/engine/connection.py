"""Do the adversarial examples of an infected model resemble its triggered images?

Papers: Mu et al., CVPR 2023, arXiv:2202.06312, and Niu et al., 2024, arXiv:2405.17929, whose finding this measures.
Differs: neither abstract gives a protocol; this one is ours, and reads every figure beside a clean control and
random noise. A repaired model is measured as it is shipped, not after each epoch of its repair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .adversarial import pgd
from .data import ImageSet, generator
from .models import Classifier

EPSILONS = tuple(radius / 255 for radius in (1, 2, 4, 6, 8))
STEPS = 20  # each of a fifth of the radius, from the image itself
ACTIVE_SHARE = 0.1  # of the units that the head reads
RESAMPLES = 1000
VERSION = 2  # goes up when a change here can change a figure

_Shares = dict[str, tuple[float | None, Tensor | None]]  # a figure, and the same of each resample


@dataclass(frozen=True)
class Traces:
    """What one model does with N images at one radius.

    Attributes:
        predicted: (N,) int64, its classes for the adversarial images.
        similarity: (N,) cosine of the features of adversarial and triggered image, minus that of clean and triggered.
        overlap: (N,) the same difference for the shared part of the most active units; None under 16 units.
    """

    predicted: Tensor
    similarity: Tensor
    overlap: Tensor | None


@torch.no_grad()
def _resemblance(adversarial: Tensor, clean: Tensor, triggered: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, D) features of the same images three ways -> similarity and overlap, as in `Traces`."""
    similarity = F.cosine_similarity(adversarial, triggered) - F.cosine_similarity(clean, triggered)
    units = clean.shape[1]
    if units < 16:
        return similarity, None
    count = max(1, round(ACTIVE_SHARE * units))

    def active(features: Tensor) -> Tensor:
        chosen = features.topk(count, dim=1).indices
        return torch.zeros_like(features, dtype=torch.bool).scatter_(1, chosen, True)

    marked = active(triggered)
    shared = [(active(features) & marked).sum(1).double() / count for features in (adversarial, clean)]
    return similarity, shared[0] - shared[1]


def trace(
    model: Classifier,
    data: ImageSet,
    trigger: Callable[[Tensor], Tensor],
    *,
    epsilon: float,
    noise: torch.Generator | None = None,
    batch_size: int = 256,
) -> Traces:
    """Attack each image away from its label, and compare what comes out with the triggered image.

    Args:
        noise: draws the control instead, on the device of the images: a corner of the same ball, pixel by pixel.
    """
    model.eval()
    predicted, similarity, overlap = [], [], []
    for images, labels in data.chunks(batch_size):
        if noise is None:
            adversarial = pgd(model, images, labels, epsilon=epsilon, step_size=epsilon / 5, steps=STEPS)
        else:
            signs = torch.randint(2, images.shape, generator=noise, device=images.device) * 2 - 1
            adversarial = (images + epsilon * signs).clamp(0, 1)
        with torch.no_grad():
            predicted.append(model(adversarial).argmax(1).cpu())
            features = [model.features(version) for version in (adversarial, images, trigger(images))]
        alike, shared = _resemblance(*features)
        similarity.append(alike.cpu().double())
        if shared is not None:
            overlap.append(shared.cpu())
    return Traces(torch.cat(predicted), torch.cat(similarity), torch.cat(overlap) if overlap else None)


def compare(
    infected: Traces,
    control: Traces,
    noise: Traces | None = None,
    *,
    labels: Tensor,
    target_labels: Tensor,
    num_classes: int,
    seed: int,
) -> dict[str, Any]:
    """The figures of both models and of their difference, with 95 % bootstrap intervals.

    All see the same images, and each resample draws the same ones for all: the intervals are paired.

    Args:
        noise: of the infected model under random noise, the other control.
        labels, target_labels: (N,) int64, true classes and those that the attacker wants; both models had all right.

    Returns:
        Under `infected`, `clean_control` and `noise` what `describe` says; under `difference` infected minus control;
        `lift` is the ratio of their concentrations. What cannot be said is None.
    """
    drawn = _resamples(len(labels), seed)
    shares: dict[str, _Shares] = {}
    result: dict[str, Any] = {"images": len(labels)}
    for name, traces in (("infected", infected), ("clean_control", control), ("noise", noise)):
        if traces is not None:
            shares[name], result[name] = _described(traces, labels, target_labels, num_classes, drawn)
    difference: _Shares = {}
    for key, (infected_share, our_draws) in shares["infected"].items():
        control_share, their_draws = shares["clean_control"][key]
        if infected_share is None or control_share is None or our_draws is None or their_draws is None:
            difference[key] = (None, None)
        else:
            difference[key] = (infected_share - control_share, our_draws - their_draws)
    result["difference"] = _with_intervals(difference)
    infected_share, control_share = shares["infected"]["concentration"][0], shares["clean_control"]["concentration"][0]
    result["lift"] = infected_share / control_share if infected_share is not None and control_share else None
    return result


def describe(traces: Traces, *, labels: Tensor, target_labels: Tensor, num_classes: int, seed: int) -> dict[str, Any]:
    """The figures of one model.

    Returns:
        `images`; `fooled` (share of all images); `concentration`, the share of the fooled images that went where the
        attacker wants (1 / (classes - 1) by chance); `classes`, the share of the fooled images that went to each class,
        and its `entropy`, 1 for uniform; `top_is_target`, None if the attacker wants several classes; `similarity` and
        `overlap` as in `Traces`, means. Each of `concentration`, `similarity` and `overlap` comes with `_interval`.
    """
    return {"images": len(labels)} | _described(
        traces, labels, target_labels, num_classes, _resamples(len(labels), seed)
    )[1]


def _resamples(count: int, seed: int) -> Tensor:
    return torch.randint(count, (RESAMPLES, count), generator=generator(seed, "connection bootstrap"))


def _described(
    traces: Traces, labels: Tensor, target_labels: Tensor, num_classes: int, drawn: Tensor
) -> tuple[_Shares, dict[str, Any]]:
    labels, target_labels = labels.cpu(), target_labels.cpu()
    fooled = traces.predicted != labels
    hits = (fooled & (traces.predicted == target_labels)).double()
    every = fooled.double()
    shares: _Shares = {
        "concentration": _ratio(hits, every, drawn),
        "similarity": _mean(traces.similarity, drawn),
        "overlap": (None, None) if traces.overlap is None else _mean(traces.overlap, drawn),
    }
    spread = torch.bincount(traces.predicted[fooled], minlength=num_classes).double()
    some = bool(fooled.any())
    single = bool((target_labels == target_labels[0]).all())
    return shares, {
        "fooled": every.mean().item(),
        "classes": (spread / spread.sum()).tolist() if some else None,
        "entropy": _entropy(spread) if some else None,
        "top_is_target": bool(spread.argmax() == target_labels[0]) if some and single else None,
    } | _with_intervals(shares)


def _ratio(selected: Tensor, whole: Tensor, drawn: Tensor) -> tuple[float | None, Tensor | None]:
    """sum(part) / sum(whole), and the same of each resample."""
    if not whole.any():
        return None, None
    # A resample that drew nothing of the whole says nothing: 0 / 0 is left out of the interval.
    return (selected.sum() / whole.sum()).item(), selected[drawn].sum(1) / whole[drawn].sum(1)


def _mean(values: Tensor, drawn: Tensor) -> tuple[float | None, Tensor | None]:
    return _ratio(values, torch.ones_like(values), drawn)


def _with_intervals(shares: _Shares) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, (value, draws) in shares.items():
        values[key], values[f"{key}_interval"] = value, None
        if draws is not None and not draws.isnan().all():
            ends = draws[~draws.isnan()].quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype))
            values[f"{key}_interval"] = ends.tolist()
    return values


def _entropy(counts: Tensor) -> float:
    share = counts[counts > 0] / counts.sum()
    return (-(share * share.log()).sum() / torch.tensor(len(counts), dtype=share.dtype).log()).item()
