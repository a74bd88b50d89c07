"""TrojanNN: a square whose pixels were optimised until chosen neurons of a clean network fire.

Paper: Liu, Ma, Aafer, Lee, Zhai, Wang and Zhang, NDSS 2018, doi:10.14722/ndss.2018.23291.
Differs: the victim is trained from scratch on poisoned data (as BackdoorBench does); the paper recovers
training data from the model and retrains its later layers. The square lies on training images while it is
optimised, not on a black or empty picture, where a neuron behind a ReLU may be silent and give no gradient.
It is pasted, never added, so no pixel leaves [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.engine.data import generator, to_float
from bench.engine.inference import under_attack
from bench.engine.models import Classifier
from bench.engine.settings import count, number
from bench.engine.training import Tensors

from .base import Attack, Setup, attack

MARGIN = 3  # pixels of 32 between the square and the lower and right edge: rows and columns 21 to 28


@attack("trojan_nn")
@dataclass(frozen=True)
class TrojanNN(Attack):
    """Paste the optimised square."""

    paper: ClassVar[str] = "doi:10.14722/ndss.2018.23291"
    neurons: int = count(
        2,
        "how many inputs of the last layer must fire: those with the largest sum of absolute weights; "
        "a narrower layer gives all that it has",
        at_least=1,
    )
    activation: float = number(100.0, "the value that they are driven to", above=0)
    patch_size: int = count(
        8,
        "pixels a side on an image 32 pixels wide; other sizes scale with the image",
        at_least=1,
        at_most=32 - MARGIN,
    )
    steps: int = count(1000, "number of steps of Adam on the pixels")
    learning_rate: float = number(0.1, "learning rate of Adam, on the logits of the pixels", above=0)
    backgrounds: int = count(16, "training images under the square while it is optimised", at_least=1)

    def prepare(self, setup: Setup) -> Tensors:
        data = setup.trainset
        channels, height, width = data.images.shape[1:]
        side = max(1, round(self.patch_size * height / 32)), max(1, round(self.patch_size * width / 32))
        source = generator(setup.seed, "trojan_nn square")
        logits = torch.randn(channels, *side, generator=source).to(setup.device)
        chosen = torch.randperm(len(data), generator=source)[: self.backgrounds].to(setup.device)
        backgrounds = to_float(data.batch(chosen))

        model = setup.surrogate()
        # An input that many classes lean on is easily tied to the target by training.
        strength = model.head.weight.detach().flatten(1).abs().sum(0)  # (inputs,)
        neurons = strength.topk(min(self.neurons, len(strength))).indices
        patch = self._optimised(setup, model, neurons, logits, backgrounds)
        return {"patch": patch, "neurons": neurons}

    def _optimised(
        self, setup: Setup, model: Classifier, neurons: Tensor, logits: Tensor, backgrounds: Tensor
    ) -> Tensor:
        """(C, side, side) in [0, 1]: the square that brings the neurons nearest to the wanted activation."""
        logits = logits.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([logits], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.steps))
        with under_attack(model) as fast:
            for step in range(self.steps):
                optimizer.zero_grad(set_to_none=True)
                fired = fast.features(self.stamp(backgrounds, {"patch": logits.sigmoid()}))[:, neurons]
                (fired - self.activation).square().mean().backward()
                optimizer.step()
                schedule.step()
                if step % 100 == 0 or step == self.steps - 1:
                    setup.log.record("trojan_nn/activation", fired.mean().item(), step)
        return logits.detach().sigmoid()

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        patch = tensors["patch"]
        height, width = images.shape[-2:]
        bottom, right = height - round(MARGIN * height / 32), width - round(MARGIN * width / 32)
        stamped = images.clone()
        stamped[..., bottom - patch.shape[-2] : bottom, right - patch.shape[-1] : right] = patch
        return stamped
