from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from baselines.npd import NeuralPolarizer, Polarized, Polarizing, place, runner_up, unlikely
from bench.engine.data import Augmentation, ImageSet, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import TrainingLog
from defenses.base import NotApplicable, ReserveView

# The first layer of the last block, or what comes nearest to it, by reading each network.
PLACES = {
    "resnet18": "net.layer4.1.conv1",
    "test_vit": "net.blocks.5.mlp.fc1",
    "test_convnext": "net.stages.3.blocks.1.mlp.fc1",
}


def model(name: str = "test_efficientnet", size: int = 16) -> Classifier:
    return ModelSpec(name, 4, 3, size, (0.5,) * 3, (0.25,) * 3).build(0).eval()


def images(count: int = 8, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=generator(0, "images"))


def view(infected: Classifier) -> ReserveView:
    data = ImageSet((images(24) * 255).to(torch.uint8), torch.arange(24) % 4)
    return ReserveView(
        copy.deepcopy(infected), 4, 0, torch.device("cpu"), TrainingLog(), reserve=data, augmentation=Augmentation()
    )


@pytest.mark.parametrize("name", PLACES)
def test_the_place_is_the_first_layer_of_the_last_block(name):
    assert place(model(name), images(2)) == PLACES[name]


def test_the_place_is_no_gate_of_squeeze_and_excitation():
    # In its last block both layers of the gate come last, and scale the channels of the map alone.
    assert place(model("seresnet18", 32), images(2, 32)) == "net.layer4.1.conv1"


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_the_folded_weights_are_the_model_with_the_layer_put_in(name):
    infected = model(name)
    with torch.no_grad():
        for weight in infected.parameters():
            if weight.ndim == 1:  # a new network's last scales are zero or tiny, and would hide any change
                weight.uniform_(0.5, 1.5, generator=generator(0, weight.numel()))
    before = copy.deepcopy(infected)
    layer = place(infected, images(2))
    polarized = Polarized(copy.deepcopy(infected), layer)
    with torch.no_grad():
        polarized.matrix.add_(torch.randn(polarized.matrix.shape, generator=generator(0, "matrix")) * 0.1)
    put_in = copy.deepcopy(infected)
    follows = put_in.get_submodule(layer)
    channels = len(polarized.matrix)
    if isinstance(follows, nn.Conv2d):
        mix: nn.Module = nn.Conv2d(channels, channels, 1, bias=False)
        assert name != "test_resnet" or follows.padding == (1, 1)  # the case in which a shift would not fold
    else:
        mix = nn.Linear(channels, channels, bias=False)
    mix.weight.data.copy_(polarized.matrix.detach().view_as(mix.weight))
    put_in.set_submodule(layer, nn.Sequential(mix, follows))
    infected.load_state_dict(polarized.folded(), strict=False)
    with torch.no_grad():
        found, expected, old = infected(images()), put_in(images()), before(images())
    error, change = (found - expected).abs().max(), (found - old).abs().max()
    assert error < 1e-5 * found.abs().max()
    assert change > 100 * error  # or nothing was shown


def test_it_starts_as_the_identity_and_only_the_matrix_learns():
    infected = model()
    polarized = Polarized(copy.deepcopy(infected), place(infected, images(2)))
    ((name, weight),) = polarized.folded().items()
    assert torch.equal(weight, infected.get_parameter(name))
    polarized.train()
    assert not any(layer.training for layer in polarized.model.modules())
    Polarizing(NeuralPolarizer()).loss(polarized, images(), torch.arange(8) % 4, 0.0).backward()
    assert polarized.matrix.grad.abs().max() > 0
    assert all(weight.grad is None for weight in polarized.model.parameters())


def test_the_repaired_model_differs_in_one_weight():
    infected = model()
    done = NeuralPolarizer(epochs=1, batch_size=8).defend(view(infected)).model
    changed = [name for name, value in done.state_dict().items() if not torch.equal(value, infected.state_dict()[name])]
    assert changed == [f"{place(infected, images(2))}.weight"]
    assert not done.training
    assert all(weight.requires_grad for weight in done.parameters())


def test_the_attack_stays_in_its_ball_among_images_and_nears_its_aim():
    infected, given, settings = model(), images(), NeuralPolarizer(epsilon=1.0, attack_steps=5, enough=1.0)
    polarized = Polarized(infected, place(infected, images(2)))
    labels = infected(given).argmax(1)
    aim = runner_up(infected(given), labels)
    found = Polarizing(settings).attack(polarized.model, polarized.folded(), given, aim)
    assert (found - given).flatten(1).norm(dim=1).max() <= 1 + 1e-5
    assert 0 <= found.min() <= found.max() <= 1
    loss = nn.functional.cross_entropy
    assert loss(infected(found), aim) < loss(infected(given), aim)


def test_the_attack_moves_black_and_white_pixels_too():
    class Brightness(nn.Module):
        """Class 0 for dark images, class 1 for bright ones."""

        def forward(self, images: Tensor) -> Tensor:
            mean = images.mean(dim=(1, 2, 3))
            return torch.stack([-mean, mean], dim=1)

    black_and_white = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    settings = NeuralPolarizer(epsilon=100.0, step_size=0.125, attack_steps=2, enough=1.0)
    found = Polarizing(settings).attack(Brightness(), {}, black_and_white, torch.tensor([1, 0]))
    assert torch.equal(found, torch.stack([torch.full((3, 4, 4), 0.25), torch.full((3, 4, 4), 0.75)]))


def test_an_attack_that_has_arrived_stops():
    infected, given = model(), images()
    polarized = Polarized(infected, place(infected, images(2)))
    aim = infected(given).argmax(1)  # where all of the batch is from the start
    hooks = {steps: Polarizing(NeuralPolarizer(attack_steps=steps, epsilon=0.01)) for steps in (0, 1, 2, 4)}
    found = {steps: hook.attack(polarized.model, polarized.folded(), given, aim) for steps, hook in hooks.items()}
    assert torch.equal(found[0], given)
    assert not torch.equal(found[1], given)  # whether it has arrived is asked behind the first step
    assert torch.equal(found[2], found[1])
    assert torch.equal(found[4], found[1])


def test_the_aim_is_the_likeliest_class_but_the_label():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [-1e3, -2e3, -3e3]])
    assert runner_up(logits, torch.tensor([0, 1, 0])).tolist() == [1, 0, 1]


def test_the_penalty_is_minus_the_log_of_what_is_left():
    probabilities = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    found = unlikely(probabilities, torch.tensor([0, 0]))
    assert found.item() == pytest.approx(-(math.log(0.5001) + math.log(1e-4)) / 2, rel=1e-2)


def test_a_network_without_two_layers_that_mix_channels_is_not_applicable():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = nn.Linear(768, 5), nn.Linear(5, 4)

        def forward(self, given: Tensor) -> Tensor:
            return self.fc(self.first(given.flatten(1)).relu())

        def get_classifier(self) -> nn.Linear:
            return self.fc

    with pytest.raises(NotApplicable, match="there are 1"):
        NeuralPolarizer().defend(view(Classifier(Flat(), [0.0] * 3, [1.0] * 3)))


def test_it_repeats_under_a_seed():
    settings = NeuralPolarizer(epochs=1, batch_size=8)
    one, two = (settings.defend(view(model())).model.state_dict() for _ in range(2))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.slow
def test_on_digits_it_removes_badnets_where_its_attack_can_draw_a_stroke(run_grid):
    # Digits have full contrast: two steps of 0.1 change no pixel from black to white, and leave the backdoor.
    status, trials = run_grid(
        *("train.epochs=30", "train.batch_size=64", "model.stem=half", "grid.attacks=[badnets]"),
        *("grid.defenses=[no_defense,npd]", "defense.npd.step_size=0.5", "defense.npd.epsilon=4", "defense.npd.lr=0.1"),
        *("defense.npd.epochs=120", "defense.npd.batch_size=16"),
    )
    assert status == 0
    found = trials.set_index("defense")
    assert found.asr["no_defense"] > 0.9
    assert found.asr["npd"] < 0.2
    assert found.clean_accuracy["npd"] > 0.95
