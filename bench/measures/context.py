"""An infected model with its attack, trigger and test set, as the evaluator has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from attacks.base import Attack
from bench.engine.data import Augmentation, ImageSet, generator, to_uint8
from bench.engine.inference import inference_model
from bench.engine.metrics import attack_success_rate, predict
from bench.engine.models import Classifier
from bench.engine.training import Tensors

PROBE_IMAGES = 1000  # at most, of those that a re-activation looks at in between, or that a connection is shown on


@dataclass(frozen=True)
class EvaluationContext:
    """One implant as the evaluator has it.

    Attributes:
        tensors: of the attack's trigger.
        test: the scored images.
        train: gives the training images before poisoning, the held-out share left out: where probes take theirs from.
        infected: loads the infected model.
    """

    attacker: Attack
    tensors: Tensors
    num_classes: int
    seed: int
    test: ImageSet
    train: Callable[[], ImageSet]
    augmentation: Augmentation
    precision: str
    infected: Callable[[], Classifier]

    def trigger(self, images: Tensor) -> Tensor:
        return self.attacker.trigger(images, self.tensors)

    def target_labels(self, labels: Tensor) -> Tensor:
        return self.attacker.target_labels(labels, self.num_classes)

    def eligible(self, data: ImageSet) -> ImageSet:
        """The images on which the attack can succeed."""
        return data[self.attacker.eligible(data.labels)]

    @cached_property
    def triggered(self) -> ImageSet:
        """The test images with the trigger as bytes: exact for an attack that rounds to them.

        Made once for all repairs of an implant: a trigger that is a network costs more than the model it fools.
        """
        return self._stamped(self.trigger)

    @cached_property
    def wrongly_triggered(self) -> ImageSet:
        """The test images with a trigger that must not work, as bytes."""
        source = generator(self.seed, "wrong trigger", device=self.test.device)
        return self._stamped(lambda images: self.attacker.wrong_trigger(images, self.tensors, source))

    @torch.no_grad()
    def _stamped(self, stamp: Callable[[Tensor], Tensor]) -> ImageSet:
        device = self.test.images.device
        return ImageSet(
            torch.cat([to_uint8(stamp(images)).to(device) for images, _ in self.test.chunks()]), self.test.labels
        )

    @torch.no_grad()
    def predict_triggered(self, model: nn.Module, data: ImageSet, shift: Tensor | float = 0.0) -> Tensor:
        """(N,) int64, the classes of a set with the trigger, `shift` added behind it."""
        is_stamped = data is self.test and self.attacker.quantise
        if is_stamped and isinstance(shift, float) and shift == 0:
            return predict(model, self.triggered)
        fast = inference_model(model)
        chunks = (
            self.triggered.chunks() if is_stamped else ((self.trigger(images), None) for images, _ in data.chunks())
        )
        predictions = [fast((images + shift).clamp(0, 1)).argmax(1) for images, _ in chunks]
        return torch.cat(predictions) if predictions else torch.empty(0, dtype=torch.int64)

    def success(self, model: nn.Module, data: ImageSet, shift: Tensor | float = 0.0) -> float | None:
        """The ASR on a set; None if no image of it can be judged."""
        eligible = self.attacker.eligible(data.labels)
        if not eligible.any():
            return None
        # The whole set, not the judged part: the triggered images of the test set are made once.
        return attack_success_rate(
            self.predict_triggered(model, data, shift), self.target_labels(data.labels), eligible
        )


def fixed_part(data: ImageSet, count: int | None) -> ImageSet:
    """The same images for every model; files often lie in the order of their classes. None is all of them."""
    if count is None:
        return data
    chosen = torch.randperm(len(data), generator=generator(0, "robust images"))[:count]
    return data[chosen.to(data.device)]


# Poisoned images of the retuning that the table shows: Min et al., arXiv:2410.09838.
RELEARN_TABLE = 5


# Measures that are read beside a clean control.
NEEDS_CONTROL = ("relearn", "reactivate", "connection")
