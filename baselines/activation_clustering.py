"""Activation Clustering: split the activations of each class in two; a small, well separated part is poison.

Paper: Chen et al., SafeAI workshop at AAAI 2019, arXiv:1811.03728.
Differs: the paper offers the size of the smaller cluster and the silhouette as two ways to judge a class; here both
must speak against it, as in the authors' Adversarial Robustness Toolbox. The third way, a network trained to judge the
clusters, is left out. Activations are reduced by principal components before the independent ones are found, as
FastICA's own whitening would do, which also serves features of low rank.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bench.engine.data import generator
from bench.engine.metrics import features
from bench.engine.settings import choice, count, number
from defenses.base import Filter, TrainsetView, defense


@defense("activation_clustering")
@dataclass(frozen=True)
class ActivationClustering(Filter):
    """Two clusters in each class; the smaller is flagged if it is small enough and stands apart.

    An image's suspicion is where it lies between the two centres, -1 at the larger cluster's and 1 at the smaller's,
    times the silhouette of its class.
    """

    paper: ClassVar[str] = "arXiv:1811.03728"
    components: int = count(10, "dimensions that the activations are reduced to", at_least=1)
    reduction: str = choice("ica", "`ica` (independent components, the paper's) or `pca`", ("ica", "pca"))
    largest_share: float = number(
        0.35,
        "share of a class below which its smaller cluster may be poison",
        above=0,
        at_most=0.5,
    )
    least_silhouette: float = number(
        0.1,
        "mean silhouette of a class above which it may be poisoned; the paper finds 0.10 to 0.15 for "
        "a class that is poisoned",
        at_least=-1,
        below=1,
    )

    def inspect(self, view: TrainsetView) -> tuple[Tensor, Tensor]:
        rows, labels = features(view.model, view.trainset).cpu().double().numpy(), view.trainset.labels.cpu()
        suspicion = torch.zeros(len(rows), dtype=torch.float64)
        flagged = torch.zeros(len(rows), dtype=torch.bool)
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().flatten()
            state = generator(view.seed, "activation clustering", label).initial_seed() % 2**32
            split = two_clusters(rows[members.numpy()], self.components, self.reduction, state)
            if split is None:
                continue
            towards, small, silhouette = split
            view.log.record("activation_clustering/silhouette", silhouette, label)
            view.log.record("activation_clustering/smaller", small.mean(), label)
            suspicion[members] = torch.from_numpy(towards * max(silhouette, 0.0))
            if silhouette > self.least_silhouette and small.mean() < self.largest_share:
                flagged[members] = torch.from_numpy(small)
        return suspicion.to(view.device), flagged.to(view.device)


def two_clusters(
    rows: np.ndarray, components: int, reduction: str, state: int
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Reduce (n, d) activations and split them in two.

    Returns:
        (n,) position between the centres, from -1 at the larger cluster's to 1 at the smaller's; (n,) bool, the
        members of the smaller; the mean silhouette in [-1, 1]. None if there are too few or no different rows.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA, FastICA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import silhouette_score

    if len(rows) < 4 or np.ptp(rows, axis=0).max() == 0:
        return None
    projector = PCA(min(components, len(rows) - 1, rows.shape[1]), random_state=state).fit(rows)
    rank = int((projector.explained_variance_ > 1e-10 * projector.explained_variance_[0]).sum())
    reduced = projector.transform(rows)[:, :rank]
    with warnings.catch_warnings():
        # Components that turn within their space after 200 iterations leave distances, and so the clusters, alone.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if reduction == "ica":
            reduced = FastICA(rank, whiten="unit-variance", random_state=state).fit_transform(reduced)
        fitted = KMeans(2, n_init=10, random_state=state).fit(reduced)
    members = fitted.labels_
    sizes = np.bincount(members, minlength=2)
    if sizes.min() == 0:
        return None
    smaller = int(sizes.argmin())
    distance = np.linalg.norm(reduced[:, None] - fitted.cluster_centers_, axis=2)
    towards = (distance[:, 1 - smaller] - distance[:, smaller]) / np.maximum(distance.sum(axis=1), 1e-300)
    return towards, members == smaller, float(silhouette_score(reduced, members))
