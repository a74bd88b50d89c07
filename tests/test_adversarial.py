import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.engine.adversarial import clamped, pgd
from bench.engine.data import generator
from bench.engine.inference import under_attack
from bench.engine.models import ModelSpec

EPSILON = 8 / 255


class Linear(nn.Module):
    """Logits W x: the gradient of the loss is known, its sign does not change on the way for two classes."""

    def __init__(self, classes: int = 2, shape: tuple[int, int, int] = (3, 4, 4)) -> None:
        super().__init__()
        count = shape[0] * shape[1] * shape[2]
        self.weight = nn.Parameter(torch.randn(classes, count, generator=generator(0, "weights")) * 0.1)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


def middle(count: int = 20, shape: tuple[int, int, int] = (3, 4, 4)) -> tuple[Tensor, Tensor]:
    """Images so far from 0 and 1 that only the ball limits the attack."""
    images = torch.rand(count, *shape, generator=generator(0, "middle")) * 0.5 + 0.25
    return images, torch.arange(count) % 2


def normed() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with batch norm, and images that reach 0 and 1."""
    model = ModelSpec("test_efficientnet", 5, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0)
    images = (torch.rand(12, 3, 16, 16, generator=generator(0, "images")) * 1.4 - 0.2).clamp(0, 1)
    return model, images, torch.arange(12) % 5


@pytest.mark.parametrize("random_start", [False, True])
def test_on_a_linear_classifier_of_two_classes_it_ends_at_epsilon_times_the_sign(random_start):
    model, (images, labels) = Linear(), middle()
    found = pgd(
        model,
        images,
        labels,
        epsilon=EPSILON,
        step_size=EPSILON / 4,
        steps=9,  # from the far corner of the ball it takes 8
        random_start=generator(0, "start") if random_start else None,
    )
    # The loss grows along the other class's weights minus the own.
    slope = (model.weight[1 - labels] - model.weight[labels]).detach().view_as(images)
    torch.testing.assert_close(found, images + EPSILON * slope.sign(), atol=1e-6, rtol=0)


def test_targeted_it_goes_the_other_way():
    model, (images, target_labels) = Linear(), middle()
    found = pgd(model, images, target_labels, epsilon=EPSILON, step_size=EPSILON, steps=1, targeted=True)
    slope = (model.weight[target_labels] - model.weight[1 - target_labels]).detach().view_as(images)
    torch.testing.assert_close(found, images + EPSILON * slope.sign(), atol=1e-6, rtol=0)


def test_each_step_is_as_long_as_asked_and_the_ball_stops_it():
    model, (images, labels) = Linear(), middle()
    lengths = [
        (pgd(model, images, labels, epsilon=0.05, step_size=0.02, steps=steps) - images).abs().amax().item()
        for steps in range(5)
    ]
    assert lengths == pytest.approx([0, 0.02, 0.04, 0.05, 0.05], abs=1e-6)


def test_several_steps_equal_a_plain_loop_on_a_deep_network():
    model, images, labels = normed()
    model.eval()
    by_hand = images.clone()
    for _ in range(3):
        leaf = by_hand.clone().requires_grad_(True)
        # Per image, so that no reduction over the batch can matter.
        gradient = torch.stack(
            [
                torch.autograd.grad(F.cross_entropy(model(leaf[i : i + 1]), labels[i : i + 1]), leaf)[0][i]
                for i in range(len(leaf))
            ]
        )
        moved = by_hand + 0.01 * gradient.sign()
        by_hand = torch.minimum(torch.maximum(moved, images - 0.02), images + 0.02).clamp(0, 1)
    found = pgd(model, images, labels, epsilon=0.02, step_size=0.01, steps=3)
    # A gradient of nearly nothing may get either sign.
    assert ((found - by_hand).abs() < 1e-6).double().mean() > 0.999


@pytest.mark.parametrize("epsilon", [0.0, 2 / 255, 8 / 255, 1.0])
@pytest.mark.parametrize("random_start", [False, True])
def test_the_images_found_are_in_the_ball_and_are_images(epsilon, random_start):
    model, images, labels = normed()
    start = generator(1, "start") if random_start else None
    found = pgd(model, images, labels, epsilon=epsilon, step_size=epsilon / 2 + 0.01, steps=4, random_start=start)
    assert found.shape == images.shape
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert (found - images).abs().max() <= epsilon + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_loss_is_higher_at_the_end_for_nearly_all_images_and_lower_if_targeted():
    model, images, labels = normed()
    model.eval()
    arguments = {"epsilon": EPSILON, "step_size": EPSILON / 4, "steps": 7}
    before = F.cross_entropy(model(images), labels, reduction="none")
    away = F.cross_entropy(model(pgd(model, images, labels, **arguments)), labels, reduction="none")
    towards = F.cross_entropy(model(pgd(model, images, labels, **arguments, targeted=True)), labels, reduction="none")
    assert (away > before).double().mean() >= 0.9
    assert (towards < before).double().mean() >= 0.9


def test_no_step_returns_the_images_themselves_as_another_tensor():
    model, images, labels = normed()
    found = pgd(model, images, labels, epsilon=EPSILON, step_size=0.1, steps=0)
    assert torch.equal(found, images)
    assert found.data_ptr() != images.data_ptr()


def test_a_random_start_fills_the_ball_evenly_and_repeats_under_a_seed():
    images = torch.full((50, 3, 16, 16), 0.5)
    labels = torch.zeros(50, dtype=torch.int64)
    model = Linear(shape=(3, 16, 16))
    starts = [
        pgd(model, images, labels, epsilon=0.1, step_size=0.1, steps=0, random_start=generator(seed, "start"))
        for seed in (0, 0, 1)
    ]
    noise = starts[0] - images
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    # Uniform in +-0.1: mean 0, variance 0.01 / 3, and it comes close to both ends.
    assert abs(noise.mean().item()) < 0.002
    assert noise.var().item() == pytest.approx(0.01 / 3, rel=0.03)
    assert noise.min() < -0.099
    assert noise.max() > 0.099


def test_the_attack_of_an_image_does_not_depend_on_its_batch():
    model, images, labels = normed()
    whole = pgd(model, images, labels, epsilon=EPSILON, step_size=EPSILON / 4, steps=1)
    parts = [
        pgd(model, images[i : i + 1], labels[i : i + 1], epsilon=EPSILON, step_size=EPSILON / 4, steps=1)
        for i in range(len(images))
    ]
    assert ((whole - torch.cat(parts)).abs() < 1e-6).double().mean() > 0.999


def test_weights_buffers_gradients_modes_and_flags_are_as_before():
    model, images, labels = normed()
    model.train()
    first, second = list(model.net.children())[:2]
    second.eval()  # a defense may have frozen a part
    frozen = next(first.parameters())
    frozen.requires_grad_(False)
    held = next(weight for weight in model.parameters() if weight.requires_grad)
    held.grad = torch.full_like(held, 3.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [weight.requires_grad for weight in model.parameters()]

    pgd(model, images, labels, epsilon=EPSILON, step_size=EPSILON / 4, steps=3)

    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert torch.equal(held.grad, torch.full_like(held, 3.0))
    assert all(weight.grad is None for weight in model.parameters() if weight is not held)


def test_it_attacks_the_network_in_eval_mode():
    model, images, labels = normed()
    arguments = {"epsilon": EPSILON, "step_size": EPSILON / 4, "steps": 2}
    assert torch.equal(pgd(model.train(), images, labels, **arguments), pgd(model.eval(), images, labels, **arguments))


def test_it_leaves_the_images_it_was_given_and_the_global_random_state():
    model, images, labels = normed()
    kept, state = images.clone(), torch.get_rng_state()
    pgd(model, images, labels, epsilon=0.1, step_size=0.05, steps=2, random_start=generator(0, "s"))
    assert torch.equal(images, kept)
    assert not images.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_and_flags_come_back_when_the_attack_fails():
    model, _, _ = normed()
    model.train()

    def attack_that_fails() -> None:
        with under_attack(model):
            assert not any(module.training for module in model.modules())
            assert not any(weight.requires_grad for weight in model.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attack_that_fails()
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_slope_of_the_clamp_is_one_on_the_bounds_and_none_beyond():
    points = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1], requires_grad=True)
    kept = clamped(points)
    assert torch.equal(kept, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    kept.sum().backward()
    assert torch.equal(points.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))


def test_a_random_start_on_black_and_white_pixels_is_an_image():
    images = torch.tensor([0.0, 1.0]).repeat(24).view(1, 3, 4, 4)
    found = pgd(
        Linear(), images, torch.tensor([0]), epsilon=0.1, step_size=0.1, steps=0, random_start=generator(0, "start")
    )
    assert found.min() == 0
    assert found.max() == 1
    assert (found != images).float().mean() > 0.2  # about half of them moved inwards
