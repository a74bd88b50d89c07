import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import i_bau
from baselines.i_bau import (
    ImplicitBackdoorAdversarialUnlearning,
    Unlearning,
    hypergradient_loss,
    inner_objective,
    twice_differentiable,
    universal_perturbation,
)
from bench.engine.data import Augmentation, ImageSet, equal_batches, generator
from bench.engine.models import Classifier, ModelSpec
from bench.engine.training import TrainingLog
from defenses.base import NotApplicable, ReserveView

FAMILIES = ["test_vit", "mobilenetv3_small_050", "test_convnext", "test_efficientnet", "resnetv2_18"]


def model(name: str = "test_efficientnet") -> Classifier:
    return ModelSpec(name, 4, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0).eval()


def reserve(count: int = 20) -> ImageSet:
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator(0, "reserve"), dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 4)


def view(infected: Classifier, data: ImageSet, seed: int = 0) -> ReserveView:
    how = Augmentation(crop=1 / 8, flip=True)
    return ReserveView(
        copy.deepcopy(infected), 4, seed, torch.device("cpu"), TrainingLog(), reserve=data, augmentation=how
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    right = other.state_dict()
    return all(torch.equal(value, right[key]) for key, value in one.state_dict().items())


# A strongly convex inner problem: inner = d'Ad / 2 - t'Bd - c'd, whose minimiser is A^-1 (B't + c).
RNG = np.random.default_rng(0)
SPAN = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
CURVATURES = np.array([1.0, 2.0, 3.0, 4.0, 6.0])
A, B, C = SPAN @ np.diag(CURVATURES) @ SPAN.T, RNG.normal(size=(3, 5)), RNG.normal(size=5)
GOAL, MIX, THETA = RNG.normal(size=5), RNG.normal(size=(3, 5)), RNG.normal(size=3)


def quadratic(theta: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The outer and the inner objective; the outer one depends on the weights also directly."""
    a, b, c, goal, mix = (torch.from_numpy(value) for value in (A, B, C, GOAL, MIX))
    inner = delta @ a @ delta / 2 - theta @ b @ delta - c @ delta
    return (delta - goal).square().sum() / 2 + theta @ mix @ delta + theta.pow(3).sum(), inner


def minimiser(theta: np.ndarray) -> np.ndarray:
    return np.linalg.solve(A, B.T @ theta + C)


def whole(theta: np.ndarray) -> float:
    """The outer objective at the minimiser: a function of the weights alone."""
    delta = minimiser(theta)
    return float(((delta - GOAL) ** 2).sum() / 2 + theta @ MIX @ delta + (theta**3).sum())


def found(steps: int, rate: float) -> np.ndarray:
    theta = torch.tensor(THETA, requires_grad=True)
    delta = torch.tensor(minimiser(THETA), requires_grad=True)
    outer, inner = quadratic(theta, delta)
    loss = hypergradient_loss(outer, inner, delta, steps, rate)
    assert loss.item() == pytest.approx(outer.item())
    (gradient,) = torch.autograd.grad(loss, theta)
    return gradient.numpy()


def differences() -> np.ndarray:
    return np.array([(whole(THETA + h) - whole(THETA - h)) / 2e-5 for h in 1e-5 * np.eye(3)])


def test_the_hypergradient_converges_to_finite_differences_of_the_whole_problem():
    exact = differences()
    assert np.linalg.norm(found(200, 0.1) - exact) < 1e-6 * np.linalg.norm(exact)
    assert np.linalg.norm(found(60, 0.1) - exact) < 1e-2 * np.linalg.norm(exact)


def test_it_converges_to_the_exact_inverse_by_the_ratio_of_the_theory():
    delta = minimiser(THETA)
    slope = delta - GOAL + MIX.T @ THETA
    exact = MIX @ delta + 3 * THETA**2 + B @ np.linalg.solve(A, slope)
    np.testing.assert_allclose(exact, differences(), rtol=1e-6)
    # After K steps the error is B (I - rate A)^K A^-1 slope; in the end the flattest direction is all of it.
    for steps, rate in ((1, 0.1), (5, 0.1), (20, 0.05)):
        left = np.linalg.matrix_power(np.eye(5) - rate * A, steps)
        np.testing.assert_allclose(exact - found(steps, rate), B @ left @ np.linalg.solve(A, slope), atol=1e-9)
    errors = [np.linalg.norm(found(steps, 0.1) - exact) for steps in (60, 61, 62)]
    assert errors[1] / errors[0] == pytest.approx(0.9, abs=1e-3)
    assert errors[2] / errors[1] == pytest.approx(0.9, abs=1e-3)


def test_what_the_paper_s_five_steps_leave_out_is_as_the_header_says():
    # One direction of curvature c: a share |1 - 0.1 c|^5 of the correction is missing.
    for curvature, missing in ((1.0, 0.59), (0.01, 0.995)):
        theta, delta = torch.tensor(1.0, requires_grad=True), torch.tensor(1 / curvature, requires_grad=True)
        inner, outer = curvature * delta**2 / 2 - theta * delta, delta * 1.0
        (gradient,) = torch.autograd.grad(hypergradient_loss(outer, inner, delta, 5, 0.1), theta)
        assert 1 - gradient.item() * curvature == pytest.approx(missing, abs=0.001)


def test_one_step_of_the_fixed_point_needs_no_hessian():
    theta, delta = torch.tensor(THETA, requires_grad=True), torch.tensor(minimiser(THETA), requires_grad=True)
    outer, _ = quadratic(theta, delta)
    inner = -(theta @ torch.from_numpy(B) @ delta)  # no curvature at all
    (gradient,) = torch.autograd.grad(hypergradient_loss(outer, inner, delta, 1, 0.1), theta)
    slope = minimiser(THETA) - GOAL + MIX.T @ THETA
    np.testing.assert_allclose(gradient, MIX @ minimiser(THETA) + 3 * THETA**2 + 0.1 * B @ slope, rtol=1e-9)


def gradients(network: Classifier, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters()), materialize_grads=True))


def hooked(network: Classifier, data: ImageSet, **settings: object) -> Unlearning:
    hooks = Unlearning(ImplicitBackdoorAdversarialUnlearning(**settings), data)
    hooks.augmented(network, data.images / 255, data.labels, 0, generator(0, "source"))
    return hooks


def test_without_a_step_of_the_fixed_point_the_gradient_is_the_direct_one():
    network, data = model(), reserve(8)
    images = data.images / 255
    hooks = hooked(network, data, fixed_point_steps=0, patched=0.3)
    patched = images.clone()
    patched[:2] += hooks.delta  # 30 % of eight, rounded down
    direct = gradients(network, F.cross_entropy(network(patched), data.labels))
    for one, two in zip(gradients(network, hooks.loss(network, images, data.labels, 0.0)), direct, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_without_a_patched_image_the_gradient_is_the_direct_one():
    network, data = model(), reserve(8)
    images = data.images / 255
    delta = torch.zeros(1, 3, 16, 16, requires_grad=True)
    outer = F.cross_entropy(network(images), data.labels)
    inner = inner_objective(network, images, data.labels, delta)
    loss = hypergradient_loss(outer, inner, delta, 5, 0.1)
    direct = gradients(network, F.cross_entropy(network(images), data.labels))
    assert all(torch.equal(one, two) for one, two in zip(gradients(network, loss), direct, strict=True))


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    # 0.29 * 100 is 28.999... in floating point.
    [(8, 0.01, 1), (99, 0.01, 1), (100, 0.01, 1), (128, 0.01, 1), (250, 0.01, 2), (100, 0.29, 29), (8, 1.0, 8)],
)
def test_the_patched_share_is_rounded_down_but_not_to_none(count, share, expected):
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach())
            return self.fc(images.mean((2, 3)))

    network, data = Classifier(Watch(), [0.0] * 3, [1.0] * 3), reserve(count)
    hooks = hooked(network, data, patched=share, fixed_point_steps=0)
    hooks.loss(network, data.images / 255, data.labels, 0.0)
    changed = (seen[-1] - data.images / 255).flatten(1).abs().amax(1) > 1e-6
    assert int(changed.sum()) == expected


def test_the_products_agree_with_finite_differences():
    network, data = model("test_vit").double(), reserve(4)
    images, labels = data.images.double() / 255, data.labels
    with twice_differentiable(network):
        delta = torch.randn(1, 3, 16, 16, generator=generator(0, "delta"), dtype=torch.float64).mul_(0.1)
        v = torch.randn(1, 3, 16, 16, generator=generator(1, "v"), dtype=torch.float64)

        def slope(at: Tensor) -> Tensor:
            at = at.detach().requires_grad_(True)
            return torch.autograd.grad(inner_objective(network, images, labels, at), at, create_graph=True)[0]

        at = delta.clone().requires_grad_(True)
        inner = inner_objective(network, images, labels, at)
        (first,) = torch.autograd.grad(inner, at, create_graph=True)
        (product,) = torch.autograd.grad(first, at, v, retain_graph=True)
        h = 1e-5
        by_differences = (slope(delta + h * v) - slope(delta - h * v)) / (2 * h)
        assert (product - by_differences).norm() < 1e-5 * product.norm()
        # And the mixed product, in the direction u of one weight matrix.
        weight = network.head.weight
        (mixed,) = torch.autograd.grad((first * v).sum(), weight)
        u = torch.randn(weight.shape, generator=generator(2, "u"), dtype=torch.float64)
        with torch.no_grad():
            weight += h * u
        up = (slope(delta) * v).sum().item()
        with torch.no_grad():
            weight -= 2 * h * u
        down = (slope(delta) * v).sum().item()
        assert (up - down) / (2 * h) == pytest.approx((mixed * u).sum().item(), rel=1e-5)


def test_the_penalty_is_the_squared_length_and_has_a_second_derivative_at_zero():
    network, data = model(), reserve(4)
    images, labels = data.images / 255, data.labels
    delta = torch.full((1, 3, 16, 16), 0.1, requires_grad=True)
    expected = 0.001 * 0.01 * 768 - F.cross_entropy(network(images + 0.1), labels).item()
    assert inner_objective(network, images, labels, delta).item() == pytest.approx(expected, rel=1e-5)
    zero = torch.zeros(1, 3, 16, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(inner_objective(network, images, labels, zero), zero, create_graph=True)
    (product,) = torch.autograd.grad(slope, zero, torch.ones_like(zero))
    assert product.isfinite().all()


def test_the_perturbation_makes_the_predictions_worse_and_touches_no_buffer_and_no_gradient():
    network, data = model(), reserve(40)
    with torch.no_grad():
        network.head.weight.mul_(20)
    before = copy.deepcopy(network.state_dict())
    settings = ImplicitBackdoorAdversarialUnlearning(batch_size=8)
    delta = universal_perturbation(network, data, settings, generator(0))
    images = data.images / 255
    predicted = network(images).argmax(1)
    fall = F.cross_entropy(network(images + delta), predicted) - F.cross_entropy(network(images), predicted)
    assert fall > 0.01
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in network.parameters())
    assert not delta.requires_grad


def test_on_one_batch_the_perturbation_is_one_step_along_the_gradient():
    network, data = model(), reserve(8)
    images = data.images / 255
    zero = torch.zeros(1, 3, 16, 16, requires_grad=True)
    predicted = network(images).argmax(1)
    (slope,) = torch.autograd.grad(F.cross_entropy(network(images + zero), predicted), zero)
    free, held = (
        universal_perturbation(network, data, ImplicitBackdoorAdversarialUnlearning(radius=radius), generator(0))
        for radius in (0.0, 0.01)
    )
    torch.testing.assert_close(free, 10 * slope, atol=1e-6, rtol=1e-3)
    assert free.norm() > 0.01
    torch.testing.assert_close(held, free * 0.01 / free.norm(), atol=1e-7, rtol=1e-3)
    wide = ImplicitBackdoorAdversarialUnlearning(radius=1e6)
    assert torch.equal(universal_perturbation(network, data, wide, generator(0)), free)


def test_one_percent_of_a_usual_reserve_is_patched():
    # 2,500 images at the default batch size: 25 batches of 100 with one patched image each, as released.
    settings = ImplicitBackdoorAdversarialUnlearning()
    batches, size = equal_batches(2500, settings.batch_size)
    assert batches * max(1, math.floor(settings.patched * size)) == 25


def test_the_default_perturbation_stays_in_the_ball_of_the_released_notebooks():
    # On a steep network a rate of 10 leads far out; the notebooks scale by min(1, 10 / length).
    network, data = model(), reserve(8)
    with torch.no_grad():
        network.head.weight.mul_(1000)
    free, held = (
        universal_perturbation(network, data, ImplicitBackdoorAdversarialUnlearning(**setting), generator(0))
        for setting in ({"radius": 0.0}, {})
    )
    length = np.linalg.norm(free.numpy())
    assert length > 10
    np.testing.assert_allclose(held.numpy(), free.numpy() * min(1, 10 / length), rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_differentiated_twice_and_is_then_as_it_was(name):
    network, data = model(name), reserve(4)
    layers = list(network.modules())
    with torch.no_grad():
        before = network(data.images / 255)
    with twice_differentiable(network), torch.no_grad():
        torch.testing.assert_close(network(data.images / 255), before, atol=1e-6, rtol=1e-5)
    settings = ImplicitBackdoorAdversarialUnlearning(rounds=1, batch_size=4, fixed_point_steps=2)
    done = settings.defend(view(network, data)).model
    buffers = dict(network.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in done.named_buffers())  # batch norm is frozen
    moved = [key for key, value in network.named_parameters() if not torch.equal(value, done.get_parameter(key))]
    assert len(moved) > 0.9 * len(list(network.parameters()))
    assert [type(layer) for layer in done.modules()] == [type(layer) for layer in layers]
    assert all(value.isfinite().all() for value in done.state_dict().values())


@pytest.mark.parametrize("name", ["test_vit", "mobilenetv3_small_050"])
def test_these_families_need_it(name):
    network, data = model(name), reserve(4)
    delta = torch.zeros(1, 3, 16, 16, requires_grad=True)

    def twice() -> None:
        inner = inner_objective(network, data.images / 255, data.labels, delta)
        (slope,) = torch.autograd.grad(inner, delta, create_graph=True)
        torch.autograd.grad(slope, delta, torch.ones_like(delta))

    with pytest.raises(RuntimeError, match="is not implemented"):
        twice()
    with twice_differentiable(network):
        twice()


def test_a_layer_without_a_second_derivative_is_not_applicable():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(F.hardsigmoid(images.mean((2, 3))))

    with pytest.raises(NotApplicable, match=r"no second derivative.*hardsigmoid"):
        ImplicitBackdoorAdversarialUnlearning(rounds=1).defend(
            view(Classifier(Gate(), [0.0] * 3, [1.0] * 3), reserve())
        )


@pytest.mark.parametrize("kind", ["first", "random"])
def test_the_inner_problem_is_differentiated_on_the_batch_that_is_asked_for(monkeypatch, kind):
    seen: list[bytes] = []
    whole_objective = inner_objective

    def watch(network, images, labels, delta):
        if delta.requires_grad and not all(weight.requires_grad is False for weight in network.parameters()):
            seen.append(images.contiguous().numpy().tobytes())
        return whole_objective(network, images, labels, delta)

    monkeypatch.setattr(i_bau, "inner_objective", watch)
    settings = ImplicitBackdoorAdversarialUnlearning(rounds=2, batch_size=5, phi_batch=kind)
    settings.defend(view(model(), reserve(20)))
    steps, _ = equal_batches(20, 5)
    assert len(seen) == 2 * steps
    assert len(set(seen)) == (2 if kind == "first" else 2 * steps)


def test_it_repeats_under_a_seed_and_logs_the_outer_loss():
    settings = ImplicitBackdoorAdversarialUnlearning(rounds=2, batch_size=8)
    views = [view(model(), reserve(), seed) for seed in (1, 1, 2)]
    one, two, other = (settings.defend(given).model for given in views)
    assert same(one, two)
    assert not same(one, other)
    assert not one.training
    curve = views[0].log.curves["i_bau/loss"]
    assert len(curve) == 2
    assert curve[0][1] == pytest.approx(math.log(4), abs=0.5)  # of an untrained network of four classes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"phi_batch": "last"}, r"defense\.i_bau\.phi_batch is 'last'; write first or random"),
    ],
)
def test_a_wrong_setting_says_what_to_write(setting, message):
    with pytest.raises(ValueError, match=message):
        ImplicitBackdoorAdversarialUnlearning(**setting)


@pytest.mark.slow
def test_on_digits_it_removes_badnets(run_grid):
    # As many optimizer steps as 20 batches in 5 rounds take. An inner rate of 10 leads the perturbation of these tiny
    # images to the border of the ball, where hardly a pixel is left of them.
    _, trials = run_grid(
        "grid.attacks=[badnets]",
        "grid.defenses=[no_defense,i_bau]",
        "model.stem=half",
        "train.epochs=30",
        "defense.i_bau.batch_size=16",
        "defense.i_bau.rounds=20",
        "defense.i_bau.inner_lr=1",
    )
    mean = trials.set_index("defense")[["clean_accuracy", "asr"]]
    assert mean.asr["no_defense"] > 0.95
    assert mean.asr["i_bau"] < 0.2
    assert mean.clean_accuracy["i_bau"] > 0.9
