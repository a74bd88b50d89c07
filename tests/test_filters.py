"""The methods that look for poisoned training images: their scores by hand, and what becomes of the flagged ones."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import defenses.base
from baselines.activation_clustering import ActivationClustering, two_clusters
from baselines.spectral_signatures import SpectralSignatures, outlyingness
from baselines.strip import Strip, lower_quantile, overlaid_entropy
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.metrics import features
from bench.engine.models import Classifier
from bench.engine.training import Recipe, TrainingLog
from defenses.base import TrainsetView, assumed_poison
from defenses.spectre import Spectre, class_strengths, quantum_scores, strongest_class

CLASSES, CLEAN, POISON = 4, 150, 18


class Pixels(nn.Module):
    """A head on the pixels themselves, so that the features are known."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(pixels, CLASSES)
        nn.init.zeros_(self.fc.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))

    def get_classifier(self) -> nn.Linear:
        return self.fc


def pixels(seed: int = 0, size: int = 4) -> Classifier:
    return Classifier(Pixels(size * size), [0.0], [1.0]).eval()


def poisoned_set(poison: int = POISON) -> tuple[ImageSet, Tensor]:
    """Dark noise in four classes; the last images of class 2 have a bright corner."""
    count = CLASSES * CLEAN + poison
    images = torch.randint(0, 100, (count, 1, 4, 4), generator=generator(0, "images"), dtype=torch.uint8)
    labels = torch.cat([torch.arange(CLASSES).repeat_interleave(CLEAN), torch.full((poison,), 2)])
    truth = torch.arange(count) >= CLASSES * CLEAN
    images[truth, :, -2:, -2:] = 255
    order = torch.randperm(count, generator=generator(0, "order"))
    return ImageSet(images[order], labels[order]), truth[order]


def view(trainset: ImageSet) -> TrainsetView:
    return TrainsetView(
        pixels(),
        CLASSES,
        0,
        torch.device("cpu"),
        TrainingLog(),
        trainset=trainset,
        augmentation=Augmentation(),
        fresh_model=pixels,
        recipe=Recipe(epochs=1, batch_size=64),
    )


# What the methods share --------------------------------------------------------------------------------------------


def test_features_are_what_the_head_reads_of_every_image_in_order():
    data, _ = poisoned_set()
    assert torch.equal(features(pixels(), data, 7), data.images.flatten(1).float() / 255)


@pytest.mark.parametrize(
    ("rate", "images", "in_class", "expected"),
    [
        (0.1, 50_000, 9_500, 3_135),  # a third of the class, and not 5,000
        (0.01, 50_000, 5_450, 500),
        (0.1, 50_000, 499, 49),
        (0.1, 50_000, 3, 1),
    ],
)
def test_the_assumed_poison_of_a_class(rate, images, in_class, expected):
    assert assumed_poison(rate, images, in_class) == expected


METHODS = [
    Spectre(components=9),
    SpectralSignatures(),
    ActivationClustering(reduction="pca"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_bright_corner_is_found(method):
    data, truth = poisoned_set()
    verdict = replace(method, retrain=False).defend(view(data))
    assert verdict.suspicion.shape == verdict.flagged.shape == truth.shape
    assert torch.isfinite(verdict.suspicion).all()
    assert roc_auc_score(truth.numpy(), verdict.suspicion.numpy()) > 0.99
    assert verdict.flagged[truth].all()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_given_model_comes_back_where_only_detection_is_asked_for(method):
    given = view(poisoned_set()[0])
    verdict = replace(method, retrain=False).defend(given)
    assert verdict.model is given.model


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_fresh_model_is_trained_on_the_images_that_were_not_flagged(method, monkeypatch):
    seen = []

    def fit(model, data, recipe, **settings):
        seen.append((model, data, recipe))
        return model

    monkeypatch.setattr(defenses.base, "fit", fit)
    given = view(poisoned_set()[0])
    verdict = method.defend(given)
    ((model, data, recipe),) = seen
    assert verdict.model is model
    assert model is not given.model
    assert recipe is given.recipe
    assert torch.equal(data.images, given.trainset.images[~verdict.flagged])
    assert torch.equal(data.labels, given.trainset.labels[~verdict.flagged])


@pytest.mark.parametrize("method", [Spectre(components=9), ActivationClustering()], ids=lambda method: method.name)
def test_on_a_clean_set_nothing_is_flagged_and_the_given_model_comes_back(method):
    given = view(poisoned_set(poison=0)[0])
    before = copy.deepcopy(given.model.state_dict())
    verdict = method.defend(given)
    assert not verdict.flagged.any()
    assert torch.isfinite(verdict.suspicion).all()
    assert verdict.model is given.model
    assert all(torch.equal(value, before[name]) for name, value in verdict.model.state_dict().items())


@pytest.mark.parametrize(
    "method",
    [Spectre(), SpectralSignatures(), ActivationClustering(), Strip(overlays=2)],
    ids=lambda method: method.name,
)
def test_tiny_and_uniform_classes_give_finite_scores(method):
    images = torch.zeros(70, 1, 4, 4, dtype=torch.uint8)
    images[:6] = torch.randint(0, 255, (6, 1, 4, 4), generator=generator(0, "few"), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 2, 2, 2] + [3] * 64)
    verdict = replace(method, retrain=False).defend(view(ImageSet(images, labels)))
    assert torch.isfinite(verdict.suspicion).all()
    assert verdict.flagged.shape == (70,)


# Spectral Signatures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_outlyingness_is_the_squared_projection_on_numpys_singular_vector(shape):
    rows = torch.randn(*shape, generator=generator(0, "rows"))
    plain = rows.double().numpy()
    centred = plain - plain.mean(0)
    _, _, vectors = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(outlyingness(rows).numpy(), (centred @ vectors[0]) ** 2, rtol=1e-8, atol=1e-12)


def test_spectral_signatures_flags_one_and_a_half_times_the_assumed_poison_in_every_class():
    data, _ = poisoned_set()
    verdict = SpectralSignatures(retrain=False, poison_rate=0.01).defend(view(data))
    # 0.01 of 618 images is 6, in each class: 9 flags.
    assert torch.bincount(data.labels[verdict.flagged], minlength=CLASSES).tolist() == [9] * CLASSES
    for label in range(CLASSES):
        scores, flags = (part[data.labels == label] for part in (verdict.suspicion, verdict.flagged))
        assert scores[flags].min() >= scores[~flags].max()


def test_spectral_scores_are_in_units_of_their_class():
    data, _ = poisoned_set(poison=0)
    dark = data.images.clone()
    dark[data.labels == 1] //= 2
    scores = SpectralSignatures(retrain=False).defend(view(ImageSet(dark, data.labels))).suspicion
    for label in range(CLASSES):
        assert scores[data.labels == label].median().item() == 1.0


# Activation Clustering ---------------------------------------------------------------------------------------------


def blobs(small: int = 20, large: int = 80, apart: float = 30.0) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(small + large, 12))
    rows[:small, 3] += apart
    return rows


@pytest.mark.parametrize("reduction", ["ica", "pca"])
def test_two_blobs_are_told_apart_and_the_smaller_is_named(reduction):
    towards, small, silhouette = two_clusters(blobs(), 3, reduction, 0)
    assert small.tolist() == [True] * 20 + [False] * 80
    assert ((towards > 0) == small).all()
    assert np.abs(towards).max() <= 1
    assert silhouette > 0.3


def test_the_silhouette_of_two_pairs_is_that_worked_out_by_hand():
    # On a line at 0, 1 | 9, 10: a = 1; b = 9.5, 8.5, 8.5, 9.5, so the mean of 1 - a / b is (17/19 + 15/17) / 2.
    towards, _, silhouette = two_clusters(np.array([[0.0], [1.0], [9.0], [10.0]]), 1, "pca", 0)
    assert silhouette == pytest.approx((17 / 19 + 15 / 17) / 2)
    # The first is 0.5 from its centre and 9.5 from the other; which is called the smaller of two equals is open.
    assert abs(towards[0]) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("changes", "flagged"), [({}, 18), ({"largest_share": 0.1}, 0), ({"least_silhouette": 0.9}, 0)]
)
def test_both_the_size_and_the_silhouette_must_speak_against_a_class(changes, flagged):
    # 18 of the 168 images of class 2 are poisoned: a share of 0.107.
    data, truth = poisoned_set()
    verdict = ActivationClustering(retrain=False, reduction="pca", **changes).defend(view(data))
    assert int(verdict.flagged.sum()) == flagged
    assert not verdict.flagged[~truth].any()


# STRIP -------------------------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """Two classes with logits (0, a): a = ln 3 if the first pixel is above 0.9, and 0 otherwise."""

    def forward(self, images: Tensor) -> Tensor:
        bright = (images[:, 0, 0, 0] > 0.9).float() * math.log(3)
        return torch.stack([torch.zeros_like(bright), bright], dim=1)


def flat(*levels: int) -> ImageSet:
    images = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return ImageSet(images, torch.zeros(len(levels), dtype=torch.int64))


def test_the_entropy_is_in_bits_of_the_class_chances_under_the_sum_of_two_images():
    # Chances 1/2 and 1/2: one bit. Chances 1/4 and 3/4: 2 - 3/4 log2(3) bits.
    skewed = 2 - 0.75 * math.log2(3)
    model, source = Brightness(), generator(0, "strip")
    # 150 + 60 stays below 0.9 * 255 = 229.5, 200 + 60 exceeds it, and is clipped.
    entropy = overlaid_entropy(model, flat(150, 200, 60), flat(60), 5, source, batch_size=2)
    assert entropy.tolist() == pytest.approx([1.0, skewed, 1.0], abs=1e-6)


def test_sums_of_images_stay_in_the_range_of_pixels():
    seen = []

    class Watch(Brightness):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    overlaid_entropy(Watch(), flat(200, 10), flat(250, 240), 3, generator(0, "strip"))
    assert torch.cat(seen).max() == 1.0
    assert torch.cat(seen).min() > 0.9


def test_the_entropy_is_the_mean_over_random_overlays():
    skewed = 2 - 0.75 * math.log2(3)
    # Half of the overlays lift an image of 150 over the bound: the mean lies half way, within three standard errors.
    entropy = overlaid_entropy(Brightness(), flat(*[150] * 20), flat(0, 100), 200, generator(0, "strip"))
    error = 3 * (1 - skewed) / 2 / math.sqrt(20 * 200)
    assert entropy.mean().item() == pytest.approx((1 + skewed) / 2, abs=error)


def test_the_threshold_is_the_quantile_of_the_normal_law_of_most_values():
    # Median 5, absolute deviations 0, 1, 1, 2, 2: median 1, so sigma is 1 / 0.67449; the 1 % point is -2.32635 sigma.
    assert lower_quantile(torch.tensor([3.0, 4.0, 5.0, 6.0, 7.0]), 0.01) == pytest.approx(
        5 - 2.32635 / 0.67449, abs=1e-4
    )


def test_a_tenth_of_poison_moves_the_threshold_little():
    clean = torch.randn(9000, generator=generator(0, "entropies"), dtype=torch.float64)
    both = torch.cat([clean, torch.full((1000,), -9.0, dtype=torch.float64)])
    assert (clean < lower_quantile(clean, 0.01)).double().mean().item() == pytest.approx(0.01, abs=0.004)
    assert both[both < lower_quantile(both, 0.01)].max() > -4
    assert (both < lower_quantile(both, 0.01))[-1000:].all()


def test_strip_flags_the_images_that_no_overlay_can_change():
    """A model whose class follows the corner if that is white, and is unsure in all other cases."""

    class Cornered(Pixels):
        def forward(self, images: Tensor) -> Tensor:
            corner = (images[:, 0, -2:, -2:].flatten(1).amin(1) > 0.95).float()[:, None]
            return self.fc(images.flatten(1)) * 0.2 * (1 - corner) + corner * torch.tensor([0.0, 0.0, 30.0, 0.0])

    data, truth = poisoned_set()
    net = Cornered(16)
    with torch.no_grad():
        net.fc.weight.copy_(torch.randn(4, 16, generator=generator(0, "weights")))
    given = replace(view(data), model=Classifier(net, [0.0], [1.0]).eval())
    verdict = Strip(retrain=False, overlays=40).defend(given)
    assert roc_auc_score(truth.numpy(), verdict.suspicion.numpy()) == 1.0
    assert verdict.flagged[truth].all()
    assert verdict.flagged[~truth].double().mean() < 0.05
    assert verdict.model is given.model


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        (SpectralSignatures, {"poison_rate": 0}, r"spectral_signatures\.poison_rate"),
        (SpectralSignatures, {"margin": 4}, r"spectral_signatures\.margin"),
        (ActivationClustering, {"components": 0}, r"activation_clustering\.components"),
        (ActivationClustering, {"reduction": "tsne"}, "write ica or pca"),
        (ActivationClustering, {"largest_share": 0.6}, r"activation_clustering\.largest_share"),
        (ActivationClustering, {"least_silhouette": 1.0}, r"activation_clustering\.least_silhouette"),
        (Strip, {"overlays": 0}, r"strip\.overlays"),
        (Strip, {"false_rejection": 1}, r"strip\.false_rejection"),
    ],
)
def test_wrong_settings_are_refused_before_any_compute(method, settings, words):
    with pytest.raises(ValueError, match=words):
        method(**settings)


def test_spectre_gives_an_image_of_a_tiny_class_the_score_of_a_clean_one():
    data, _ = poisoned_set()
    labels = data.labels.clone()
    labels[labels == 3] = 0
    labels[:3] = 3
    verdict = Spectre(components=9, retrain=False).defend(view(ImageSet(data.images, labels)))
    assert verdict.suspicion[:3].tolist() == [1.0] * 3
    assert not verdict.flagged[:3].any()


def test_spectre_flags_one_and_a_half_times_the_assumed_poison_of_the_whole_set_in_the_target_class_alone():
    data, _ = poisoned_set()
    verdict = Spectre(components=9, poison_rate=0.01, retrain=False).defend(view(data))
    # 0.01 of 618 images is 6.
    assert torch.bincount(data.labels[verdict.flagged], minlength=CLASSES).tolist() == [0, 0, 9, 0]


@pytest.mark.parametrize(
    "settings",
    [{"center": "robust"}, {"skip_k1": False}, {"alpha": 0.0}, {"fast": False, "components": 16}, {"components": 4}],
    ids=str,
)
def test_spectre_scores_and_compares_classes_with_the_settings_given(settings):
    data, _ = poisoned_set()
    given, how = view(data), {"components": 9, **settings}
    verdict = Spectre(**how, retrain=False).defend(given)
    rows = features(given.model, data)
    strengths = class_strengths(rows, data.labels, seed=given.seed, **how)
    assert dict(given.log.curves["spectre/strength"]) == strengths
    for label in set(range(CLASSES)) - {strongest_class(strengths)}:
        members = (data.labels == label).nonzero().flatten()
        found = quantum_scores(rows[members], round(0.12 * len(members)), **how)
        assert torch.equal(verdict.suspicion[members], found.scores)
