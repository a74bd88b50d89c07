"""SPECTRE: whiten each class's features by a robust covariance, score by quantum entropy, train anew on the rest.

Paper: Hayase, Kong, Somani and Oh, ICML 2021, arXiv:2104.11315.
Differs: features are what the head reads; the released code takes a map inside the third stage. The top eigenpair of
the fourth moment is found by Lanczos steps on k x k matrices, never from the k^2 x k^2 one. A trimming round drops at
least a twelfth of its budget (`fast`): a class takes at most twelve rounds, where the released code may take dozens.
The eigenpair is taken to a residual of 1e-10, as the order of the rows depends on it (released: KrylovKit's default).
One component is not a candidate, since trimming tails alone raises its strength. The assumed poison is at most a third
of a class, and eight surviving rows are asked for each component, because in a small class any direction looks strong.
The defender does not know the target label: classes are compared at equal size, only the one that `strongest_class`
names is filtered, and if it names none, nothing is.
Limits: where poison is the larger part of its class, as at 10 % all-to-one on ten classes, the robust estimate settles
on the poison and the clean images are flagged. Features of trained networks have heavy tails, and clean classes differ
in strength by more than the least ratio: on a clean model one class may still be named, and loses images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.engine.data import generator
from bench.engine.metrics import features
from bench.engine.settings import choice, count, number, plain, share
from defenses.base import Filter, TrainsetView, assumed_poison, defense

FLOOR = 1e-10  # eigenvalues below this share of the largest are rounding
CENTERS = ("overall", "robust")
TOO_FEW = 50  # rows of a class with which its strength says nothing


@defense("spectre")
@dataclass(frozen=True)
class Spectre(Filter):
    """Name the class whose flagged images stand out most, filter it, and train a fresh network on the rest.

    Each image is scored within the class of its label: by the budget of the search, but in the class that is named by
    that of `poison_rate`. Scores are in units of the class's clean images, whose mean is near 1 in every class, so they
    compare across classes.
    """

    paper: ClassVar[str] = "arXiv:2104.11315"
    version: ClassVar[int] = 2  # eigenpairs to 1e-10; the strength from unbiased covariances
    poison_rate: float = share(
        0.1,
        "assumed poisoned / all training images, all in the target class; see `assumed_poison`",
        above=0,
        below=1,
    )
    search_share: float = number(
        0.12,
        "assumed share of poison in a class while the target is searched",
        above=0,
        at_most=0.33,
    )
    search_ratio: float = number(
        1.3,
        "least strength of the target, in medians over the classes, at least 1",
        at_least=1,
    )
    alpha: float = number(4.0, "`alpha` of `quantum_scores`", at_least=0)
    components: int = count(100, "most principal components that it tries", at_least=1)
    fast: bool = plain(True, "its faster form")
    center: str = choice("overall", "centre of the images: their `overall` mean or a `robust` one", CENTERS, later=True)
    skip_k1: bool = plain(True, "leave out a single component", later=True)

    def inspect(self, view: TrainsetView) -> tuple[Tensor, Tensor]:
        rows, labels = features(view.model, view.trainset), view.trainset.labels
        how = {key: getattr(self, key) for key in ("alpha", "components", "fast", "center", "skip_k1")}
        strengths = class_strengths(rows, labels, seed=view.seed, share=self.search_share, **how)
        for label, value in strengths.items():
            view.log.record("spectre/strength", value, label)
        target = strongest_class(strengths, self.search_ratio)
        suspicion = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        flagged = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().flatten()
            if len(members) < 4:
                continue
            budget = max(1, round(self.search_share * len(members)))
            if label == target:
                budget = assumed_poison(self.poison_rate, len(rows), len(members))
            filtered = quantum_scores(rows[members], budget, **how)
            suspicion[members] = filtered.scores
            if label == target:
                flagged[members] = filtered.flagged
        return suspicion, flagged


@dataclass(frozen=True)
class Filtered:
    """What the filter says of the n images of one class.

    Attributes:
        scores: (n,) float64, >= 0, higher = more suspicious; in units in which clean images have a mean near 1.
        flagged: (n,) bool, the round(1.5 budget) highest scores.
        strength: how far the flagged images stand out, >= about 1: what chose `components`, and what compares classes.
        components: number of principal components behind the scores.
    """

    scores: Tensor
    flagged: Tensor
    strength: float
    components: int


def quantum_scores(
    features: Tensor,
    budget: int,
    *,
    alpha: float = 4.0,
    tail: float = 0.1,
    components: int = 100,
    center: str = "overall",
    skip_k1: bool = True,
    fast: bool = True,
) -> Filtered:
    """Score the images of one class by SPECTRE's filter, for the number of components that makes them stand out most.

    Deterministic; computed in float64 on the features' device. The scores do not change when the rows are permuted
    or the features rotated, shifted or scaled as a whole.

    Args:
        features: (n, d), finite, of images with one label.
        budget: assumed number of poisoned rows; lowered to 0.33 n, beyond which no robust estimate exists.
        alpha: sharpness of the quantum entropy matrix, >= 0; at 0 the score is the mean squared whitened coordinate.
        tail: probability with which the norm test may drop a clean row.
        components: most principal components; lowered to the features' rank and to an eighth of the n - 2 budget
            rows that trimming leaves at the least.
        center: whiten around the `overall` mean, as the released code does, or around the `robust` one.
        skip_k1: leave out one component as a candidate.
        fast: a trimming round drops at least a twelfth of its whole budget; False follows the released code.

    Raises:
        ValueError: fewer than four rows, a budget below 1, features that are not finite, or an unknown `center`.
    """
    if features.ndim != 2 or len(features) < 4:
        raise ValueError(f"features are {tuple(features.shape)}; give (n, d) with n of 4 or more")
    if budget < 1:
        raise ValueError(f"budget is {budget}; write the assumed number of poisoned images, 1 or more")
    if center not in CENTERS:
        raise ValueError(f"center is {center!r}; write {' or '.join(CENTERS)}")
    if not torch.isfinite(features).all():
        raise ValueError("features hold a value that is not finite; look at the model's weights")
    count = len(features)
    budget = max(1, min(budget, int(0.33 * count)))
    points = principal(features, min(components, max(1, (count - 2 * budget) // 8)))
    flags = min(count, round(1.5 * budget))
    best: Filtered | None = None
    for k in candidates(points.shape[1], skip_k1):
        scores = scores_of(points[:, :k], budget, alpha=alpha, tail=tail, center=center, fast=fast)
        flagged = torch.zeros(count, dtype=torch.bool, device=points.device)
        flagged[scores.argsort(descending=True, stable=True)[:flags]] = True
        strength_here = strength(points, flagged, alpha)
        if best is None or strength_here > best.strength:
            best = Filtered(scores, flagged, strength_here, k)
    assert best is not None
    return best


def class_strengths(
    features: Tensor, labels: Tensor, *, seed: int, share: float = 0.12, **settings: Any
) -> dict[int, float]:
    """SPECTRE's strength of each class, with this share of it assumed poisoned: the target's is the largest.

    Each class is judged by as many rows, drawn at random, as the smallest has: the strength of clean rows goes up as
    they get fewer, and would name the rarest class. Classes of fewer than 50 rows are left out.

    Args:
        features: (N, d), of a whole set.
        labels: (N,) int64, as shipped.
        settings: of `quantum_scores`.
    """
    members = {label: (labels == label).nonzero().flatten() for label in labels.unique().tolist()}
    members = {label: rows for label, rows in members.items() if len(rows) >= TOO_FEW}
    size = min(map(len, members.values()), default=0)
    strengths = {}
    for label, rows in members.items():
        drawn = torch.randperm(len(rows), generator=generator(seed, "spectre", label))[:size].to(rows.device)
        strengths[label] = quantum_scores(features[rows[drawn]], max(1, round(share * size)), **settings).strength
    return strengths


def strongest_class(strengths: Mapping[int, float], ratio: float = 1.3) -> int | None:
    """The class of the largest strength; None if that is below `ratio` times the median: no single target."""
    if not strengths:
        return None
    top = max(strengths, key=lambda label: strengths[label])
    return top if strengths[top] >= ratio * median(strengths.values()) else None


def oversized_class(labels: Tensor, num_classes: int, ratio: float = 1.5) -> int | None:
    """The only class of more than `ratio` times the median number of images; None if there is none, or are several.

    Means something only where classes were balanced before poisoning and the attack changed labels: several large
    classes are a set that was never balanced.
    """
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    large = [label for label in range(num_classes) if counts[label] > ratio * median(counts)]
    return large[0] if len(large) == 1 else None


def candidates(most: int, skip_k1: bool = True) -> list[int]:
    """Ten numbers of components up to `most`, their square roots evenly spaced: 1, 4, 9, ... 100."""
    roots = [1 + (math.sqrt(most) - 1) * step / 9 for step in range(10)]
    counts = sorted({round(root * root) for root in roots})
    return [k for k in counts if k > 1 or not skip_k1] or counts


def principal(features: Tensor, components: int) -> Tensor:
    """(n, K) float64: the centred rows on their leading principal axes, not scaled; K <= components and <= rank."""
    rows = features.detach().double()
    rows = rows - rows.mean(dim=0)
    # The smaller of the two Gram matrices has the same non-zero spectrum.
    wide = rows.shape[1] > rows.shape[0]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = max(1, int((values > FLOOR * values[0]).sum()))
    dimensions = min(components, rank)
    axes = vectors[:, :dimensions]
    return axes * values[:dimensions].clamp(min=0).sqrt() if wide else rows @ axes


def scores_of(
    points: Tensor, budget: int, *, alpha: float = 4.0, tail: float = 0.1, center: str = "overall", fast: bool = True
) -> Tensor:
    """(n,) scores from (n, k) centred points: w^T M w with w whitened robustly and M the quantum entropy matrix.

    On one component, as in the released code, nothing is trimmed; the mean is 1 there too, for classes to compare.
    """
    if points.shape[1] == 1:
        squares = points[:, 0].square()
        return squares / squares.mean().clamp(min=torch.finfo(squares.dtype).tiny)
    core = points[robust_rows(points, budget, tail=tail, fast=fast)]
    shift = core.mean(dim=0) if center == "robust" else torch.zeros_like(core[0])
    white = (points - shift) @ inverse_root(covariance(core, 0))
    matrix = quantum_matrix(covariance(white, 1), alpha)
    return ((white @ matrix) * white).sum(dim=1)


def robust_rows(points: Tensor, budget: int, *, tail: float = 0.1, fast: bool = True) -> Tensor:
    """(n,) bool: the rows that survive trimming by the fourth moment; at least n - round(2 budget) of them.

    A robust covariance estimate in the manner of arXiv:1703.00893, with the stop and tail rules of SPECTRE's code.
    """
    count, k = points.shape
    share = budget / count
    left = round(2 * budget)
    least = math.ceil(left / 12) if fast else 0
    remaining = torch.arange(count, device=points.device)
    while left > 0:
        rows = points[remaining]
        # The second moment, not re-centred: the released code's choice.
        white = rows @ inverse_root(rows.T @ rows / len(rows))
        far = white.square().sum(dim=1)
        beyond = int((far >= 10 * k * math.log(len(rows) / tail)).sum())
        if beyond:
            drop = far.argsort(descending=True, stable=True)[: min(beyond, left)]
        else:
            value, form = widest_form(white)
            if value <= most_variance(share):
                break
            projected = (((white @ form) * white).sum(dim=1) - form.trace()) / math.sqrt(2)
            # The middle of the two middle values: torch's own median takes the lower one.
            spread = (projected - projected.quantile(0.5)).abs()
            cut = tail_cut(spread.sort().values, share)
            if cut is None:
                break
            outside = int((spread > cut).sum())
            drop = spread.argsort(descending=True, stable=True)[: min(max(outside, least), left)]
        stays = torch.ones(len(remaining), dtype=torch.bool, device=points.device)
        stays[drop] = False
        remaining = remaining[stays]
        left -= len(drop)
    mask = torch.zeros(count, dtype=torch.bool, device=points.device)
    mask[remaining] = True
    return mask


def most_variance(share: float) -> float:
    """The variance of a quadratic form up to which rows with this share of poison pass as Gaussian."""
    return 1 + 10 * share * math.log(1 / share) ** 2


def tail_cut(spread: Tensor, share: float) -> float | None:
    """The deviation above which rows are dropped, from (n,) deviations sorted upwards; None: no row deviates enough.

    The share of rows *below* a deviation is held against the tail bound, as in the released code. The textbook's
    direction, the share above it, drops nothing at the sizes of image classes.
    """
    excess = spread - 3
    limit = 10 * math.log(1 / share)
    beyond = excess.clamp(min=math.e)  # keeps the logarithm positive where the bound is not used anyway
    bound = torch.where(excess <= limit, 1.0, 3 * share / (beyond * beyond.log()).square())
    below = torch.arange(1, len(spread) + 1, device=spread.device) / len(spread)
    passing = excess[(excess > 0) & (below >= bound)]
    return passing[0].item() if len(passing) else None


def widest_form(white: Tensor, *, tolerance: float = 1e-10) -> tuple[float, Tensor]:
    """The quadratic form y^T V y of largest variance over whitened rows, |V| = 1 in the Frobenius norm.

    Lanczos iteration with full reorthogonalisation on the operator V -> mean((y^T V y) y y^T) - tr(V) I, whose matrix
    would have k^4 entries. The number of iterations has no limit of its own: the largest eigenvalues of clean rows lie
    close together, and an iteration cut short returns a mixture of their forms, which drops other rows.

    Args:
        white: (n, k), with second moment the identity.
        tolerance: of the residual, as a share of the eigenvalue.

    Returns:
        The eigenvalue, and V (k, k), symmetric.
    """
    from scipy.linalg import eigh_tridiagonal

    count, k = white.shape
    eye = torch.eye(k, dtype=white.dtype, device=white.device)

    def operator(form: Tensor) -> Tensor:
        weight = ((white @ form) * white).sum(dim=1)
        return white.T @ (white * weight[:, None]) / count - form.trace() * eye

    # The start turns with the features, so the result does too; the noise only serves data with an exact symmetry,
    # which such a start can never leave.
    noise = torch.randn(k, k, dtype=torch.float64, generator=generator(0, "spectre", k)).to(white)
    noise = (noise + noise.T) / noise.norm()
    start = operator(eye)
    start = start + noise * (1e-6 * start.norm() + 1e-12)
    basis = (start / start.norm()).view(1, -1)  # doubled when full, so that a step copies nothing
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    whole = k * (k + 1) // 2  # the dimension of the symmetric forms, all that the iteration can span
    for at in range(whole):
        step = operator(basis[at].view(k, k)).flatten()
        diagonal.append(float(step @ basis[at]))
        span = basis[: at + 1]
        for _ in range(2):  # once leaves rounding that brings found directions back
            step = step - span.T @ (span @ step)
        size = float(step.norm())
        (largest,), vector = eigh_tridiagonal(diagonal, off_diagonal, select="i", select_range=(at, at))
        # An operator that is zero has nothing to converge to.
        if size * abs(vector[-1, 0]) <= tolerance * largest or size <= 1e-12 * max(largest, 1.0) or at + 1 == whole:
            break
        off_diagonal.append(size)
        if at + 1 == len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)])
        basis[at + 1] = step / size
    form = (span.T @ torch.from_numpy(vector[:, 0]).to(span)).view(k, k)
    form = (form + form.T) / 2
    return float(largest), form / form.norm()


def covariance(rows: Tensor, correction: int) -> Tensor:
    """(k, k): centred second moment of (n, k) rows, divided by n - correction."""
    centred = rows - rows.mean(dim=0)
    return centred.T @ centred / (len(rows) - correction)


def inverse_root(moment: Tensor) -> Tensor:
    """The symmetric inverse square root of a positive semi-definite matrix, its small eigenvalues floored."""
    values, vectors = torch.linalg.eigh(moment)
    floor = max(FLOOR * float(values[-1]), torch.finfo(moment.dtype).tiny)
    return (vectors / values.clamp(min=floor).sqrt()) @ vectors.T


def quantum_matrix(moment: Tensor, alpha: float) -> Tensor:
    """M proportional to the *matrix* exponential of alpha (moment - I) / (|moment| - 1), with trace 1."""
    k = len(moment)
    values, vectors = torch.linalg.eigh(moment)
    above = float(values[-1]) - 1
    if above < 1e-8:  # nothing exceeds the clean rows: every direction counts the same
        return torch.eye(k, dtype=moment.dtype, device=moment.device) / k
    weights = (alpha * (values - values[-1]) / above).exp()
    return (vectors * (weights / weights.sum())) @ vectors.T


def strength(points: Tensor, flagged: Tensor, alpha: float) -> float:
    """How far all rows exceed the unflagged ones: tr(S M), S their covariance in the unflagged rows' units.

    Both covariances are the unbiased ones, as in the released code; the scores whiten by the biased one, as it does.
    """
    moment = covariance(points @ inverse_root(covariance(points[~flagged], 1)), 1)
    return float((moment * quantum_matrix(moment, alpha)).sum())
