"""SSBA (ISSBA): an encoder hides one bit string in each image, so that the change depends on the image.

Paper: Li, Li, Wu, Li, He and Lyu, ICCV 2021, arXiv:2012.03816.
Differs: encoder, decoder and loss are those of BackdoorBench's variant (StegaStamp, arXiv:1904.05343,
without its print-and-camera noise and its critic; the secret is the same for all images). The secret is a
seeded random string, not an error-correcting code of a word: nobody reads it. The waits of the schedule are
shares of the updates, and the image loss comes in by the middle at the latest, so that a small budget also
gives recognisable images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.data import generator, to_float
from bench.engine.settings import count, number
from bench.engine.training import Tensors

from .base import Attack, Setup, attack

USUAL_UPDATES = 15_000  # 20 epochs of CIFAR-10 at batch size 64


@attack("ssba")
@dataclass(frozen=True)
class SSBA(Attack):
    """What the encoder makes of the image and the secret."""

    paper: ClassVar[str] = "arXiv:2012.03816"
    secret_bits: int = count(100, "length of the secret", at_least=1)
    updates: int = count(
        0,
        "optimizer steps of encoder and decoder; 0 takes 15,000, or fewer if the victim's training "
        "sees fewer images than that. With a few hundred the bits stay unread (see the curve "
        "ssba/bit_accuracy) and the trigger is a mere blur, which a victim learns all the same",
    )
    batch_size: int = count(64, "images a step", at_least=1)
    learning_rate: float = number(1e-4, "learning rate of Adam", above=0)
    image_weight: float = number(
        10.0,
        "final weight of the mean squared error of the image against the loss of the bits",
        at_least=0,
    )

    def prepare(self, setup: Setup) -> Tensors:
        data, device = setup.trainset, setup.device
        shape = tuple(data.images.shape[1:])
        source = generator(setup.seed, "ssba")
        secret = torch.randint(0, 2, (self.secret_bits,), generator=source).float()
        with torch.device("meta"):  # torch would draw the first weights from its global source
            shells = Encoder(shape[0], self.secret_bits), Decoder(shape, self.secret_bits)
        encoder, decoder = (_initialised(shell, source).to(device) for shell in shells)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=self.learning_rate)
        updates = self.updates or self._affordable(setup)
        ramp = Ramp(updates)
        for update in range(updates):
            chosen = torch.randint(0, len(data), (self.batch_size,), generator=source).to(device)
            bits = torch.randint(0, 2, (self.batch_size, self.secret_bits), generator=source)
            secrets = bits.float().to(device)
            plain = to_float(data.batch(chosen))
            encoded = encoder(plain, secrets)
            logits = decoder(encoded)
            image_loss = F.mse_loss(encoded, plain)
            weight = self.image_weight * ramp(update)
            loss = F.binary_cross_entropy_with_logits(logits, secrets) + weight * image_loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if update % 20 == 0 or update == updates - 1:  # seldom: reading a number waits for the device
                accuracy = ((logits > 0) == secrets.bool()).float().mean().item()
                ramp.note(accuracy, update)
                setup.log.record("ssba/bit_accuracy", accuracy, update)
                setup.log.record("ssba/image_loss", image_loss.item(), update)
        learned = {"secret": secret.to(device)}
        for name, network in (("encoder", encoder), ("decoder", decoder)):
            learned |= {f"{name}.{key}": value.clone() for key, value in network.state_dict().items()}
        return learned

    def _affordable(self, setup: Setup) -> int:
        recipe = setup.recipe
        seen = recipe.updates * recipe.batch_size or recipe.epochs * len(setup.trainset)
        return max(1, min(USUAL_UPDATES, seen // self.batch_size))

    def stamp(self, images: Tensor, tensors: Tensors) -> Tensor:
        encoder_names = [name for name in tensors if name.startswith("encoder.")]
        weights = {name.removeprefix("encoder."): tensors[name] for name in encoder_names}
        encoder = _encoder(images.shape[1], len(tensors["secret"]))
        # The widest layer has about 70 channels: parts keep the memory of large images bounded.
        parts = images.split(max(1, 2**20 // (images.shape[-2] * images.shape[-1])))
        secret = tensors["secret"].expand(len(images), -1)
        apply = torch.func.functional_call
        return torch.cat([apply(encoder, weights, (chunk, secret[: len(chunk)])) for chunk in parts])


class Ramp:
    """The weight of the image loss, from 0 to 1: none until the bits are read, a wait, then a straight rise.

    BackdoorBench waits 1,000 and rises over 3,000 of 15,000 updates; these shares are kept.
    """

    def __init__(self, updates: int) -> None:
        self.wait, self.rise = updates / 15, updates / 5
        self.start = updates / 2  # the latest

    def note(self, bit_accuracy: float, update: int) -> None:
        if bit_accuracy > 0.9:
            self.start = min(self.start, update + self.wait)

    def __call__(self, update: int) -> float:
        return min(1.0, max(0.0, (update - self.start) / self.rise))


class Encoder(nn.Module):
    """(B, C, H, W) images in [0, 1] and (B, bits) secrets -> images that carry them."""

    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        self.channels, mixed = channels, 2 * channels
        self.secret = nn.Linear(bits, 16 * 16 * channels)
        strides = [(mixed, 32, 1), (32, 32, 2), (32, 64, 2), (64, 128, 2), (128, 256, 2)]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=stride, padding=1) for a, b, stride in strides)
        widths = [(256, 128), (128, 64), (64, 32), (32, 32)]
        self.up = nn.ModuleList(nn.Conv2d(before, after, 2) for before, after in widths)
        joined = [(256, 128), (128, 64), (64, 32), (64 + mixed, 32)]
        self.join = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in joined)
        self.last = nn.Conv2d(32, 32, 3, padding=1)
        self.image = nn.Conv2d(32, channels, 1)

    def forward(self, images: Tensor, secrets: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        # Four halvings must meet again on the way up: work on multiples of 16, and cut back.
        padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
        carried = F.relu(self.secret(secrets)).view(-1, self.channels, 16, 16)
        mixed = torch.cat([F.interpolate(carried, size=padded.shape[-2:], mode="nearest"), padded], dim=1)
        now, levels = mixed, []
        for conv in self.down:
            now = F.relu(conv(now))
            levels.append(now)
        levels.pop()
        levels[0] = torch.cat([levels[0], mixed], dim=1)
        for up, join, level in zip(self.up, self.join, reversed(levels), strict=True):
            # One row and column more, for a kernel of two.
            now = F.relu(up(F.pad(F.interpolate(now, scale_factor=2, mode="nearest"), (0, 1, 0, 1))))
            now = F.relu(join(torch.cat([now, level], dim=1)))
        return self.image(F.relu(self.last(now)))[..., :height, :width].sigmoid()


class Decoder(nn.Module):
    """(B, C, H, W) images -> (B, bits) logits of the secret."""

    def __init__(self, shape: tuple[int, ...], bits: int) -> None:
        super().__init__()
        channels, height, width = shape
        first = [(channels, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        widths = [*first, (64, 64, 2), (64, 128, 2), (128, 128, 2)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=stride, padding=1) for a, b, stride in widths)
        self.hidden = nn.Linear(128 * -(-height // 32) * -(-width // 32), 512)
        self.bits = nn.Linear(512, bits)

    def forward(self, images: Tensor) -> Tensor:
        for conv in self.convs:
            images = F.relu(conv(images))
        return self.bits(F.relu(self.hidden(images.flatten(1))))


def _initialised(network: nn.Module, source: torch.Generator) -> nn.Module:
    for weight in network.to_empty(device="cpu").parameters():
        with torch.no_grad():
            if weight.ndim > 1:
                nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=source)
            else:
                weight.zero_()
    return network


@lru_cache
def _encoder(channels: int, bits: int) -> nn.Module:
    """The shell that stored weights are put into; it has none of its own."""
    with torch.device("meta"):
        return Encoder(channels, bits).eval().requires_grad_(False)
