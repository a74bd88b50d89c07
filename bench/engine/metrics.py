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
    found = [model(images).argmax(dim=1) for images, _ in data.chunks(batch_size)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


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


def attack_success_rate(predicted: Tensor, wanted: Tensor, judged: Tensor) -> float:
    """Share of the judged triggered test images that the model sends where the attacker wants them.

    Args:
        predicted: (N,) int64, the model's classes for the triggered images.
        wanted: (N,) int64, the class that the attacker wants for each.
        judged: (N,) bool. All-to-one leaves out images whose true class is the target: a good clean model also
            sends them there, and counted, that alone would be an ASR of 0.1 on ten classes.

    Raises:
        ValueError: no image is judged.
    """
    if not judged.any():
        raise ValueError(f"none of {len(judged)} images can be judged: all are of the target class")
    return (predicted == wanted)[judged].double().mean().item()


def recovery_accuracy(predicted: Tensor, true: Tensor, judged: Tensor) -> float:
    """Share of the same judged triggered images that get their true label back. ASR + recovery <= 1.

    Raises:
        ValueError: no image is judged.
    """
    if not judged.any():
        raise ValueError(f"none of {len(judged)} images can be judged: all are of the target class")
    return (predicted == true)[judged].double().mean().item()


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
    source = generator(seed, "robust accuracy", device=data.images.device)
    right = 0
    for images, labels in data.chunks(batch_size):
        found = pgd(model, images, labels, epsilon=epsilon, step_size=step_size, steps=steps, random_start=source)
        with torch.inference_mode():
            survives = (model(found).argmax(1) == labels) & (model(images).argmax(1) == labels)
        right += int(survives.sum())
    if not len(data):
        raise ValueError("robust accuracy of no image at all is undefined")
    return right / len(data)
