"""What is measured of a model: shares in [0, 1], each with its definition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .adversarial import pgd
from .data import ImageSet, generator
from .models import Classifier


@torch.no_grad()  # not inference mode: a method may train on what it predicted
def predict(model: nn.Module, data: ImageSet, batch_size: int = 1024) -> Tensor:
    """(N,) int64: the model's classes for a whole set, in eval mode and without augmentation."""
    model.eval()
    predictions = [model(images).argmax(dim=1) for images, _ in data.chunks(batch_size)]
    return torch.cat(predictions) if predictions else torch.empty(0, dtype=torch.int64)


@torch.no_grad()
def features(model: Classifier, data: ImageSet, batch_size: int = 1024) -> Tensor:
    """(N, D): what the classifier head reads, for a whole set, in eval mode and without augmentation."""
    model.eval()
    return torch.cat([model.features(images) for images, _ in data.chunks(batch_size)])


def accuracy(predicted: Tensor, true: Tensor) -> float:
    """Share of images given their true label.

    Raises:
        ValueError: there is no image.
    """
    if not len(true):
        raise ValueError("accuracy of no image at all is undefined")
    return (predicted == true).double().mean().item()


def attack_success_rate(predicted: Tensor, target_labels: Tensor, eligible: Tensor) -> float:
    """Share of the eligible triggered test images that the model sends where the attacker wants them.

    Args:
        predicted: (N,) int64, the model's classes for the triggered images.
        target_labels: (N,) int64, the class that the attacker wants for each.
        eligible: (N,) bool. All-to-one leaves out images whose true class is the target: a good clean model also
            sends them there, and counted, that alone would be an ASR of 0.1 on ten classes.

    Raises:
        ValueError: no image is eligible.
    """
    if not eligible.any():
        raise ValueError(f"none of {len(eligible)} images is eligible: all are of the target class")
    return (predicted == target_labels)[eligible].double().mean().item()


def recovery_accuracy(predicted: Tensor, true: Tensor, eligible: Tensor) -> float:
    """Share of the same eligible triggered images that get their true label back. ASR + recovery <= 1.

    Raises:
        ValueError: no image is eligible.
    """
    if not eligible.any():
        raise ValueError(f"none of {len(eligible)} images is eligible: all are of the target class")
    return (predicted == true)[eligible].double().mean().item()


def accuracy_by_class(predicted: Tensor, true: Tensor, num_classes: int) -> list[float | None]:
    """The accuracy of each class; None where it has no image. A pruned model may have lost one class alone."""
    return [_share(predicted == true, true == label) for label in range(num_classes)]


def success_by_class(
    predicted: Tensor, target_labels: Tensor, true: Tensor, eligible: Tensor, num_classes: int
) -> list[float | None]:
    """The ASR on the eligible images of each source class; None where there is none (all-to-one: the target class)."""
    return [_share(predicted == target_labels, eligible & (true == label)) for label in range(num_classes)]


def attack_figures(
    *, clean: Tensor, triggered: Tensor, true: Tensor, target_labels: Tensor, eligible: Tensor
) -> dict[str, float | None]:
    """What a trigger still does to a model; every figure is None if no image is eligible, and never 0.

    Args:
        clean, triggered: (N,) int64, the model's classes for the test images without and with the trigger.
        true, target_labels: (N,) int64, their true classes and those that the attacker wants.
        eligible: (N,) bool, as for `attack_success_rate`.

    Returns:
        `asr` and `recovery_accuracy`; `asr_all_images`, the target class counted too, as some toolkits do (a perfect
        model then has 0.1 on ten classes); `false_target_rate`, the floor below which no ASR can fall: eligible images
        sent to the target without any trigger; `worst_source_asr`, the highest of a source class; `consistency`,
        the share of eligible images that get one class with and without the trigger.
    """
    names = (
        "asr",
        "asr_all_images",
        "recovery_accuracy",
        "false_target_rate",
        "worst_source_asr",
        "consistency",
    )
    if not eligible.any():
        return dict.fromkeys(names)
    classes = int(true.max()) + 1
    by_class = success_by_class(triggered, target_labels, true, eligible, classes)
    values = (
        attack_success_rate(triggered, target_labels, eligible),
        attack_success_rate(triggered, target_labels, torch.ones_like(eligible)),
        recovery_accuracy(triggered, true, eligible),
        attack_success_rate(clean, target_labels, eligible),
        max(value for value in by_class if value is not None),
        _share(clean == triggered, eligible),
    )
    return dict(zip(names, values, strict=True))


def defense_effectiveness(*, accuracy: tuple[float, float], asr: tuple[float, float]) -> float:
    """The defense effectiveness rating: 0.5 for a defense that does nothing, 1 for a perfect one.

    (max(0, fall of the ASR) - max(0, fall of the accuracy) + 1) / 2, each pair being (infected, repaired). A model
    that names one class only still gets 0.585 on ten classes: never read it without ACC and ASR, nor choose by it.
    """
    gain, loss = max(0.0, asr[0] - asr[1]), max(0.0, accuracy[0] - accuracy[1])
    return (gain - loss + 1) / 2


def _share(hits: Tensor, among: Tensor) -> float | None:
    return hits[among].double().mean().item() if among.any() else None


def detection(
    *, poisoned: Tensor, suspicion: Tensor | None = None, flagged: Tensor | None = None
) -> dict[str, float | None]:
    """How well poisoned images are told from the others; None where a figure is undefined.

    Args:
        poisoned: (N,) bool, the truth.
        suspicion: (N,) scores, higher = more suspicious; ties count half.
        flagged: (N,) bool, what the method itself called poisoned. No threshold is chosen here.

    Returns:
        From the scores `detection_auroc`, `detection_auprc` (average precision) and `detection_tpr_at_fpr_5` (the
        largest share found while at most 5 % of the others are); from the flags `detection_tpr`, `detection_fpr`
        and `detection_precision`.
    """
    figures: dict[str, float | None] = {}
    both = bool(poisoned.any() and not poisoned.all())
    if suspicion is not None:
        figures |= dict.fromkeys(("detection_auroc", "detection_auprc", "detection_tpr_at_fpr_5"))
        if both:  # with one kind of image only there is nothing to tell apart
            from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

            truth, score = poisoned.cpu().numpy(), suspicion.cpu().double().numpy()
            false, true, _ = roc_curve(truth, score, drop_intermediate=False)
            figures["detection_auroc"] = float(roc_auc_score(truth, score))
            figures["detection_auprc"] = float(average_precision_score(truth, score))
            figures["detection_tpr_at_fpr_5"] = float(true[false <= 0.05].max())
    if flagged is not None:
        is_poisoned, chosen = poisoned.cpu(), flagged.cpu()
        for key, of, among in (
            ("tpr", chosen, is_poisoned),
            ("fpr", chosen, ~is_poisoned),
            ("precision", is_poisoned, chosen),
        ):
            figures[f"detection_{key}"] = of[among].double().mean().item() if among.any() else None
    return figures


def robust_accuracy(
    model: nn.Module,
    data: ImageSet,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    seed: int,
    batch_size: int = 512,
) -> float:
    """Accuracy under PGD from one random start in the L-infinity ball; images already wrong count as wrong."""
    model.eval()
    source = generator(seed, "robust accuracy", device=data.device)
    right = 0
    for images, labels in data.chunks(batch_size):
        adversarial = pgd(model, images, labels, epsilon=epsilon, step_size=step_size, steps=steps, random_start=source)
        with torch.inference_mode():
            survives = (model(adversarial).argmax(1) == labels) & (model(images).argmax(1) == labels)
        right += int(survives.sum())
    if not len(data):
        raise ValueError("robust accuracy of no image at all is undefined")
    return right / len(data)
