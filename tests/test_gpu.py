"""The same claims on a GPU; skipped where torch sees none."""

from __future__ import annotations

import pytest
import torch

from attacks.base import attack
from bench.engine.adversarial import pgd
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.metrics import accuracy, predict
from bench.engine.models import ModelSpec
from bench.engine.training import Recipe, fit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def easy(count: int = 512) -> ImageSet:
    """Images whose class is how bright they are."""
    labels = torch.arange(count) % 4
    images = (labels * 60 + 20).view(-1, 1, 1, 1).expand(count, 3, 32, 32)
    noise = torch.randint(0, 20, (count, 3, 32, 32), generator=generator(0, "noise"))
    return ImageSet((images + noise).to(torch.uint8), labels).to("cuda")


def model():
    return ModelSpec("test_resnet", 4, 3, 32, (0.5,) * 3, (0.25,) * 3).build(0).cuda()


def test_autocast_training_learns_what_float32_learns():
    data = easy()
    for precision in ("auto", "float32"):
        recipe = Recipe(epochs=5, batch_size=64, precision=precision)
        trained = fit(model(), data, recipe, seed=0, augmentation=Augmentation(crop=1 / 8, flip=True))
        assert accuracy(predict(trained, data), data.labels) > 0.95


def test_a_set_that_stays_on_the_host_is_trained_on_and_poisoned_as_one_on_the_gpu(monkeypatch):
    here = easy()
    monkeypatch.setattr("bench.engine.data.RESIDENT", 0.0)
    there = ImageSet(here.images.cpu(), here.labels.cpu()).to("cuda")
    assert (there.images.device.type, there.device.type) == ("cpu", "cuda")
    recipe = Recipe(updates=3, batch_size=64, precision="float32")
    weights = [fit(model(), data, recipe, seed=0, augmentation=Augmentation(crop=1 / 8)) for data in (here, there)]
    for one, other in zip(*(net.state_dict().values() for net in weights), strict=True):
        torch.testing.assert_close(one, other)
    patch = {"patch": torch.ones(1, 3, 3, device="cuda")}
    poisoned = [attack["badnets"]().poison(data, patch, 4, 0)[0].images.cpu() for data in (here, there)]
    assert torch.equal(*poisoned)


def test_pgd_stays_in_its_ball_and_raises_the_loss():
    data, net = easy(), model().eval()
    images = data.images[:64].float() / 255
    found = pgd(net, images, data.labels[:64], epsilon=8 / 255, step_size=2 / 255, steps=5)
    assert (found - images).abs().max() <= 8 / 255 + 1e-6
    loss = torch.nn.functional.cross_entropy
    with torch.no_grad():
        assert loss(net(found), data.labels[:64]) > loss(net(images), data.labels[:64])


@pytest.mark.parametrize("name", ["badnets", "blended"])
def test_the_same_images_are_poisoned_as_on_a_cpu(name):
    settings = attack[name]()
    tensors = {"patch": torch.ones(1, 3, 3), "picture": torch.rand(3, 32, 32, generator=generator(1))}
    there = settings.poison(easy(), {key: value.cuda() for key, value in tensors.items()}, 4, 0)
    here = settings.poison(easy().to("cpu"), tensors, 4, 0)
    assert torch.equal(there[1].cpu(), here[1])
    assert (there[0].images.cpu().int() - here[0].images.int()).abs().max() <= 1  # rounding of a half


def test_a_grid_runs_on_the_gpu(run_grid):
    code, trials = run_grid("dispatch.device=cuda", "dispatch.workers=1")
    assert code == 0
    assert (trials.status == "done").all()
