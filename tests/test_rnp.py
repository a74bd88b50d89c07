import copy

import pytest
import torch
from torch import nn

from baselines.rnp import ReconstructiveNeuronPruning, Recover
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.pruning import Masked
from bench.engine.training import Diverged, TrainingLog
from defenses.base import NotApplicable, ReserveView

SHORT = {"unlearn_epochs": 1, "recover_epochs": 1, "batch_size": 10}


def timm_model(name: str) -> Classifier:
    stem = "small" if "convnext" in name else "stock"  # its kernels need maps of 2x2
    return ModelSpec(name, 4, 3, 16, (0.5,) * 3, (0.25,) * 3, stem).build(0).eval()


def noise(count: int, seed: int = 0) -> ImageSet:
    source = generator(seed, "noise")
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=source, dtype=torch.uint8)
    return ImageSet(images, torch.randint(0, 4, (count,), generator=source))


def view(model: Classifier, reserve: ImageSet, classes: int = 4) -> ReserveView:
    return ReserveView(
        copy.deepcopy(model),
        classes,
        0,
        torch.device("cpu"),
        TrainingLog(),
        reserve=reserve,
        augmentation=Augmentation(),
    )


def unlearned(model: Classifier, reserve: ImageSet, classes: int = 4, **settings) -> tuple[Classifier, list[float]]:
    given = view(model, reserve, classes)
    found = ReconstructiveNeuronPruning(**settings).unlearn(copy.deepcopy(model), reserve, given)
    return found, [value for _, value in given.log.curves["rnp/unlearned_accuracy"]]


def of_the_model(model: Classifier, count: int) -> ImageSet:
    """Images with the classes that the network gives them in train mode: its accuracy there is 1."""
    data = noise(count)
    with torch.no_grad():
        return ImageSet(data.images, copy.deepcopy(model).train()(data.images / 255).argmax(1))


def test_one_step_of_unlearning_climbs_the_clipped_gradient():
    model, data = timm_model("test_resnet"), noise(12)
    for clip in (1e-3, 1e6):
        found, _ = unlearned(model, data, unlearn_epochs=1, clip=clip, weight_decay=0.0, unlearn_lr=0.01)
        by_hand = copy.deepcopy(model).train()
        nn.functional.cross_entropy(by_hand(data.images / 255), data.labels).backward()
        gradient = {key: weight.grad for key, weight in by_hand.named_parameters()}
        norm = torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt()
        assert 1e-3 < norm < 1e6
        for key, weight in found.named_parameters():
            expected = by_hand.get_parameter(key) + 0.01 * gradient[key] * min(1.0, clip / norm.item())
            torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-7)


def test_unlearning_lowers_the_accuracy_and_stops_at_two_over_the_classes():
    model = timm_model("test_resnet")
    data = of_the_model(model, 40)
    _, curve = unlearned(model, data, batch_size=10, unlearn_lr=0.01)
    assert curve[0] > 0.5 >= curve[-1]  # 2 / 4
    assert all(value > 0.5 for value in curve[:-1])
    assert len(curve) < 20
    _, longer = unlearned(model, data, classes=20, batch_size=10, unlearn_lr=0.01)
    assert len(longer) > len(curve)  # 2 / 20 is further away
    assert longer[-1] <= 0.1
    _, asked = unlearned(model, data, batch_size=10, unlearn_lr=0.01, stop_accuracy=0.95)
    assert len(asked) <= len(curve)


def test_of_two_classes_unlearning_does_not_end_before_it_has_unlearned():
    model = timm_model("test_resnet")
    data = of_the_model(model, 40)
    _, curve = unlearned(model, data, classes=2, batch_size=40, unlearn_epochs=3, unlearn_lr=1e-9)
    assert curve == [1.0] * 3  # 2 / 2 would be reached at once


def test_the_rate_of_unlearning_falls_to_a_tenth_behind_ten_epochs(monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1])
    unlearned(timm_model("test_resnet"), noise(4), classes=10**6, unlearn_epochs=20, unlearn_lr=1e-6)
    assert rates == pytest.approx([1e-6] * 10 + [1e-7] * 10)


def test_where_unlearning_never_gets_there_the_repair_goes_on():
    model = timm_model("test_resnet")
    given = view(model, of_the_model(model, 30))
    ReconstructiveNeuronPruning(**SHORT, unlearn_lr=1e-9).defend(given)
    assert given.log.curves["rnp/unlearned_accuracy"][-1][1] > 0.5
    assert "rnp/threshold" in given.log.curves


def test_masks_start_at_one_on_the_unlearned_network_and_stay_in_zero_to_one(monkeypatch):
    seen = []
    step, loss = Recover.after_step, Recover.loss

    def first(self, model, images, labels, smoothing):
        seen.append((model.mask.detach().clone(), copy.deepcopy(model.network.state_dict())))
        return loss(self, model, images, labels, smoothing)

    def watched(self, model, *args):
        step(self, model, *args)
        assert ((model.mask >= 0) & (model.mask <= 1)).all()

    monkeypatch.setattr(Recover, "loss", first)
    monkeypatch.setattr(Recover, "after_step", watched)
    model = timm_model("test_resnet")
    ReconstructiveNeuronPruning(**SHORT, recover_lr=50.0, prune_by="count").defend(view(model, noise(40)))
    assert (seen[0][0] == 1).all()
    assert (seen[-1][0] == 0).any()
    # What is recovered is the unlearned network, and its weights are frozen.
    weights = dict(model.named_parameters())
    assert not any(torch.equal(weights[key], seen[0][1][key]) for key in weights if weights[key].ndim == 4)
    assert all(torch.equal(seen[0][1][key], seen[-1][1][key]) for key in weights)


@torch.no_grad()
def test_the_recovery_minimises_alpha_times_the_cross_entropy():
    model, data = timm_model("test_resnet"), noise(8)
    masked, images = Masked(model, model.norms()).eval(), data.images / 255
    expected = 0.2 * -torch.log_softmax(model(images).double(), 1)[torch.arange(8), data.labels].mean()
    found = Recover(ReconstructiveNeuronPruning().alpha).loss(masked, images, data.labels, 0.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_the_network_as_it_came_loses_scales_and_nothing_else(name):
    model = timm_model(name)
    settings = ReconstructiveNeuronPruning(**SHORT, prune_by="count", count=13)
    found = settings.defend(view(model, noise(20))).model.state_dict()
    scales = {f"{norm.name}.weight" for norm in model.norms()}
    zeroed = 0
    for key, value in model.state_dict().items():
        changed = found[key] != value
        assert not changed.any() or key in scales, key
        assert (found[key][changed] == 0).all()
        zeroed += int(changed.sum())
    assert zeroed == 13


def test_only_as_many_images_are_learned_from_as_the_paper_takes():
    given = view(timm_model("test_resnet"), noise(60))
    ReconstructiveNeuronPruning(**SHORT, images=20, stop_accuracy=1.0).defend(given)
    assert given.log.images == 20 + 20
    given = view(timm_model("test_resnet"), noise(60))
    ReconstructiveNeuronPruning(**SHORT, images=0, stop_accuracy=1.0).defend(given)
    assert given.log.images == 54 + 54  # a tenth judges


def test_an_ascent_out_of_all_bounds_says_that_it_diverged():
    with pytest.raises(Diverged, match=r"unlearned loss.*defense\.rnp\.unlearn_lr"):
        unlearned(timm_model("test_vit"), noise(40), classes=10**6, clip=1e30, unlearn_lr=1e25, batch_size=10)


def test_it_repeats_under_a_seed():
    model, reserve = timm_model("test_resnet"), noise(40)
    settings = ReconstructiveNeuronPruning(**SHORT, prune_by="count", count=50)
    one, two = (settings.defend(view(model, reserve)).model.state_dict() for _ in range(2))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_network_without_norm_layers_is_not_applicable():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    with pytest.raises(NotApplicable, match="no norm layer"):
        ReconstructiveNeuronPruning().defend(view(Classifier(net, [0.5] * 3, [0.2] * 3, image_size=16), noise(4)))
