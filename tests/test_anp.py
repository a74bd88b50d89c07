import copy

import pytest
import torch
from torch import Tensor, nn

from baselines.anp import AdversarialNeuronPruning, Perturbed
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.pruning import Masked
from bench.engine.training import TrainingLog
from defenses.base import NotApplicable, ReserveView

FAMILIES = ["test_resnet", "resnetv2_18", "test_efficientnet", "test_convnext", "test_vit"]


def timm_model(name: str) -> Classifier:
    return ModelSpec(name, 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0).eval()


def noise(count: int, seed: int = 0) -> ImageSet:
    source = generator(seed, "noise")
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=source, dtype=torch.uint8)
    return ImageSet(images, torch.randint(0, 4, (count,), generator=source))


def view(model: Classifier, reserve: ImageSet, seed: int = 0) -> ReserveView:
    return ReserveView(
        copy.deepcopy(model), 4, seed, torch.device("cpu"), TrainingLog(), reserve=reserve, augmentation=Augmentation()
    )


def ascended(settings: AdversarialNeuronPruning, name: str = "test_resnet", seed: int = 0) -> tuple[Tensor, Tensor]:
    """(2, U) noise where the ascent starts, and where it ends."""
    model, data = timm_model(name), noise(8)
    masked = Masked(model, model.norms()).train()
    source = generator(seed, "ascent")
    start = torch.rand(2, len(masked.mask), generator=generator(seed, "ascent")) * 2 * settings.epsilon
    ends = Perturbed(settings, settings.epsilon).ascend(masked, data.images / 255, data.labels, source)
    return start - settings.epsilon, torch.stack(ends)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_of_the_ascent_moves_each_unit_by_epsilon_up_the_loss(name):
    settings = AdversarialNeuronPruning()
    start, end = ascended(settings, name)
    model, data = timm_model(name), noise(8)
    masked = Masked(model, model.norms()).train()
    at = start.clone().requires_grad_(True)
    nn.functional.cross_entropy(masked(data.images / 255, *at), data.labels).backward()
    torch.testing.assert_close(end, start + 0.4 * at.grad.sign(), atol=1e-6, rtol=0)
    assert 0.4 < end.abs().max() <= 0.8  # as released: the random start is not taken back
    assert masked.mask.requires_grad


@pytest.mark.parametrize("steps", [1, 3])
def test_projected_noise_stays_in_the_ball(steps):
    _, end = ascended(AdversarialNeuronPruning(steps=steps, project=True))
    assert end.abs().max() <= 0.4 + 1e-6


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_noise_never_exceeds_twice_epsilon_however_many_steps(steps):
    start, end = ascended(AdversarialNeuronPruning(steps=steps))
    assert (end - start).abs().max() <= 0.4 + 1e-6
    assert end.abs().max() <= 0.8 + 1e-6


@torch.no_grad()
def test_the_loss_is_alpha_clean_and_the_rest_perturbed():
    model, data = timm_model("test_efficientnet"), noise(8)
    masked, images = Masked(model, model.norms()).eval(), data.images / 255
    hooks = Perturbed(AdversarialNeuronPruning(alpha=0.3), 0.4)
    scale, shift = torch.rand(2, len(masked.mask), generator=generator(0, "noise")) - 0.5
    hooks.noise = (scale, shift)
    clean, dirty = (
        -torch.log_softmax(logits.double(), 1)[torch.arange(8), data.labels].mean()
        for logits in (masked(images), masked(images, scale, shift))
    )
    found = hooks.loss(masked, images, data.labels, 0.0)
    assert found.item() == pytest.approx((0.3 * clean + 0.7 * dirty).item(), rel=1e-5)
    assert abs(clean - dirty) > 1e-3


@torch.no_grad()
def test_without_noise_both_losses_are_one():
    model, data = timm_model("test_resnet"), noise(8)
    masked, images = Masked(model, model.norms()).eval(), data.images / 255
    hooks = Perturbed(AdversarialNeuronPruning(), 0.0)
    hooks.augmented(masked, images, data.labels, 0, generator(0, "x"))
    clean = nn.functional.cross_entropy(model(images), data.labels)
    assert hooks.loss(masked, images, data.labels, 0.0).item() == pytest.approx(clean.item())
    nothing = torch.zeros_like(masked.mask)
    hooks.noise = (nothing, nothing)
    assert hooks.loss(masked, images, data.labels, 0.0).item() == pytest.approx(clean.item(), rel=1e-6)


def test_masks_stay_in_zero_to_one_although_the_rate_throws_them_out(monkeypatch):
    seen = []
    step = Perturbed.after_step

    def watched(self, model, *args):
        before = model.mask.detach().clone()
        step(self, model, *args)
        seen.append((before, model.mask.detach().clone()))

    monkeypatch.setattr(Perturbed, "after_step", watched)
    AdversarialNeuronPruning(updates=6, lr=20.0).defend(view(timm_model("test_resnet"), noise(30)))
    assert len(seen) == 6
    assert any((before < 0).any() for before, _ in seen)
    assert any((before > 1).any() for before, _ in seen)
    assert all(((behind >= 0) & (behind <= 1)).all() for _, behind in seen)
    assert all(torch.equal(before.clamp(0, 1), behind) for before, behind in seen)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_it_changes_scales_to_zero_and_no_other_weight_or_statistic(name):
    model = timm_model(name)
    settings = AdversarialNeuronPruning(updates=2, prune_by="count", count=17)
    found = settings.defend(view(model, noise(30))).model.state_dict()
    scales = {f"{norm.name}.weight" for norm in model.norms()}
    zeroed = 0
    for key, value in model.state_dict().items():
        changed = found[key] != value
        if key in scales:
            assert (found[key][changed] == 0).all()
            zeroed += int(changed.sum())
        else:
            assert not changed.any(), key
    assert zeroed == 17


def test_a_count_of_zero_prunes_nothing():
    model = timm_model("test_resnet")
    settings = AdversarialNeuronPruning(updates=3, lr=50.0, prune_by="count", count=0)
    found = settings.defend(view(model, noise(30))).model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


def test_the_held_out_images_are_not_learned_from():
    model, reserve = timm_model("test_resnet"), noise(40)
    order = torch.randperm(40, generator=generator(0, "held out"))
    other = ImageSet(reserve.images.clone(), reserve.labels)
    other.images[order[:10]] = 255 - other.images[order[:10]]
    settings = AdversarialNeuronPruning(updates=3, held_out=0.25, prune_by="count", count=100)
    one, two = (settings.defend(view(model, data)).model.state_dict() for data in (reserve, other))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_epsilon_stays_as_published_where_statistics_are_stored():
    given = view(timm_model("test_resnet"), noise(30))
    AdversarialNeuronPruning(updates=1).defend(given)
    assert given.log.curves["anp/epsilon"] == [(0, 0.4)]


def test_epsilon_is_halved_on_layer_norms_until_random_noise_is_bearable():
    model = timm_model("test_vit")
    data = noise(30)
    with torch.no_grad():
        reserve = ImageSet(data.images, model(data.images / 255).argmax(1))
    epsilons = []
    for tolerance in (0.1, 1.0):
        given = view(model, reserve)
        AdversarialNeuronPruning(updates=0, held_out=0.9, noise_tolerance=tolerance).defend(given)
        epsilons.append(given.log.curves["anp/epsilon"][0][1])
    assert epsilons[-1] == 0.4
    assert epsilons == sorted(epsilons)
    assert epsilons[0] < 0.4
    assert all((0.4 / epsilon).is_integer() and int(0.4 / epsilon).bit_count() == 1 for epsilon in epsilons)
    # The one before the last halving was too much, and this one is not: by other draws, so with a margin.
    masked, norms = Masked(model, model.norms()).eval(), model.norms()
    source = generator(9, "draws")
    for epsilon, low, high in ((epsilons[0], 0.0, 0.15), (2 * epsilons[0], 0.05, 1.0)):
        losses = []
        for _ in range(4):
            scale, shift = (torch.rand(2, sum(len(n.layer.weight) for n in norms), generator=source) * 2 - 1) * epsilon
            with torch.no_grad():
                losses.append((masked(reserve.images / 255, scale, shift).argmax(1) != reserve.labels).double().mean())
        assert low <= torch.stack(losses).mean() <= high


class Planted(nn.Module):
    """Two detectors of each of four patterns, and a ninth unit that clean images leave asleep just below zero."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        source = generator(seed, "planted")
        self.patterns = torch.randn(4, 16, generator=source)
        trigger = torch.randn(16, generator=source)
        self.conv, self.norm, self.fc = nn.Conv2d(1, 9, 4, bias=False), nn.BatchNorm2d(9), nn.Linear(9, 4, bias=False)
        with torch.no_grad():
            rows = torch.cat([self.patterns, self.patterns, trigger[None]])
            self.conv.weight.copy_((rows / rows.norm(dim=1, keepdim=True)).view(9, 1, 4, 4))
            self.norm.bias[8] = -2.2
            self.fc.weight.copy_(torch.cat([torch.eye(4), torch.eye(4), torch.zeros(1, 4)]).T * 2)
            self.fc.weight[0, 8] = 12.0

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(nn.functional.relu(self.norm(self.conv(images))).flatten(1))

    def get_classifier(self) -> nn.Linear:
        return self.fc


def test_a_planted_trigger_unit_gets_a_mask_below_the_others():
    found = 0
    for seed in range(5):
        net = Planted(seed)
        labels = torch.arange(200) % 4
        draws = torch.randn(200, 16, generator=generator(seed, "images")) * 0.3
        images = ((net.patterns[labels] + draws) * 40 + 128).clamp(0, 255).to(torch.uint8).view(200, 1, 4, 4)
        model = Classifier(net, [0.5], [0.16], image_size=4)
        model.train()
        net.norm.momentum = None  # the plain mean of all batches
        with torch.no_grad():
            model(images / 255)
        model.eval()
        settings = AdversarialNeuronPruning(updates=60, prune_by="count", count=1)
        weights = settings.defend(view(model, ImageSet(images, labels), seed)).model.net.norm.weight
        found += (weights == 0).nonzero().flatten().tolist() == [8]
    assert found >= 4


def test_it_repeats_under_a_seed():
    model, reserve = timm_model("test_resnet"), noise(40)
    settings = AdversarialNeuronPruning(updates=2, prune_by="count", count=50)
    one, two = (settings.defend(view(model, reserve)).model.state_dict() for _ in range(2))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_network_without_norm_layers_is_not_applicable():
    net = Planted(0)
    net.norm = nn.Identity()
    with pytest.raises(NotApplicable, match="no norm layer"):
        AdversarialNeuronPruning().defend(view(Classifier(net, [0.5], [0.2], image_size=4), noise(4)))
