"""What is measured of a model: shares in [0, 1], each with its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import ImageSet, generator, to_float
from .inference import inference_model, under_attack
from .models import Classifier

ROBUST_VERSION = 2  # of robust accuracy: every iterate counts, not the last one alone


@torch.no_grad()  # not inference mode: a method may train on what it predicted
def predict(model: nn.Module, data: ImageSet, batch_size: int = 1024) -> Tensor:
    """(N,) int64: the model's classes for a whole set, in eval mode and without augmentation."""
    fast = inference_model(model)
    predictions = [fast(images).argmax(dim=1) for images, _ in data.chunks(batch_size)]
    return torch.cat(predictions) if predictions else torch.empty(0, dtype=torch.int64)


@torch.no_grad()
def features(model: Classifier, data: ImageSet, batch_size: int = 1024) -> Tensor:
    """(N, D): what the classifier head reads, for a whole set, in eval mode and without augmentation."""
    fast = inference_model(model)
    return torch.cat([fast.features(images) for images, _ in data.chunks(batch_size)])


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
    """Share of images that are classified correctly, and so is every iterate of PGD from a random start.

    An image is left alone as soon as it is misclassified: that of a standard model takes a few passes in place of
    2 x steps. It is at most the accuracy of the last iterates, and never rises with more steps.

    Raises:
        ValueError: there is no image.
    """
    if not len(data):
        raise ValueError("robust accuracy of no image at all is undefined")
    return int(
        robust_images(
            model, data, epsilon=epsilon, step_size=step_size, steps=steps, seed=seed, batch_size=batch_size
        ).sum()
    ) / len(data)


def robust_images(
    model: nn.Module,
    data: ImageSet,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    seed: int,
    batch_size: int = 512,
) -> Tensor:
    """(N,) bool: the images that `robust_accuracy` counts.

    As many images as `batch_size` are under attack: one that is fooled, or has taken all steps, makes room for another.
    The start of each image depends on the seed and on its index alone.
    """
    clean = predict(model, data) == data.labels
    waiting = clean.nonzero().flatten()
    starts = _Starts(data, epsilon, seed)
    robust = torch.zeros_like(clean)
    index = torch.empty(0, dtype=torch.int64, device=data.device)
    taken = index.clone()  # steps of each image under attack
    images = current = torch.empty(0, *data.images.shape[1:], device=data.device)
    with under_attack(model) as attacked, torch.enable_grad():
        while len(index) or len(waiting):
            new, waiting = waiting[: batch_size - len(index)], waiting[batch_size - len(index) :]
            if len(new):
                fresh = to_float(data.batch(new))
                index, taken = torch.cat([index, new]), torch.cat([taken, torch.zeros_like(new)])
                images, current = torch.cat([images, fresh]), torch.cat([current, starts.of(new, fresh)])
            labels = data.labels[index]
            logits = attacked(current.requires_grad_(True))
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), current)
            with torch.no_grad():
                right = logits.argmax(1) == labels
                robust[index[right & (taken == steps)]] = True
                left = right & (taken < steps)
                index, taken, images = index[left], taken[left] + 1, images[left]
                moved = current[left] + step_size * gradient[left].sign()
                current = torch.clamp(moved, (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1))
    return robust


class _Starts:
    """A random point of the ball around each image, drawn for blocks of images in the order of the set."""

    BLOCK = 512

    def __init__(self, data: ImageSet, epsilon: float, seed: int) -> None:
        self.data, self.epsilon, self.seed = data, epsilon, seed
        self.blocks: dict[int, Tensor] = {}

    def of(self, index: Tensor, images: Tensor) -> Tensor:
        """The starts of some images, whose indices rise from call to call."""
        numbers = (index // self.BLOCK).tolist()
        noise = torch.empty_like(images)
        for number in dict.fromkeys(numbers):
            if number not in self.blocks:
                self.blocks = {number: self._drawn(number, images)}
            rows = (index // self.BLOCK) == number
            noise[rows] = self.blocks[number][index[rows] % self.BLOCK]
        return (images + noise.mul_(2).sub_(1).mul_(self.epsilon)).clamp_(0, 1)

    def _drawn(self, number: int, images: Tensor) -> Tensor:
        source = generator(self.seed, "robust accuracy", number, device=self.data.device)
        return torch.rand((self.BLOCK, *images.shape[1:]), generator=source, device=images.device)
