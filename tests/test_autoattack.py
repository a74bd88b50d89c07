"""AutoAttack against closed forms: on a linear classifier every radius of every image is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from bench.engine import robustness
from bench.engine.autoattack import (
    ITERATIONS,
    QUERIES,
    TARGETS,
    Ball,
    _new_hills,
    _new_square,
    apgd,
    autoattack,
    checkpoints,
    dlr_targeted,
    fab,
    onto_plane,
    square,
    two_hills,
    window_share,
)
from bench.engine.data import ImageSet, generator
from bench.engine.models import ModelSpec


class Linear(nn.Module):
    """Logits W x with images so far from 0 and 1 that only the ball limits an attack."""

    def __init__(self, classes: int, shape: tuple[int, int, int] = (1, 6, 6)) -> None:
        super().__init__()
        weight = torch.randn(classes, int(np.prod(shape)), generator=generator(1, "weights"))
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.T


def grey(model: Linear, count: int = 120, shape: tuple[int, int, int] = (1, 6, 6)) -> ImageSet:
    """Images in the middle; every tenth has a wrong label."""
    images = torch.randint(90, 166, (count, *shape), generator=generator(0, "grey"), dtype=torch.uint8)
    with torch.no_grad():
        labels = model(images / 255).argmax(1)
    labels[::10] = (labels[::10] + 1) % len(model.weight)
    return ImageSet(images, labels)


def radii(model: Linear, data: ImageSet, norm: str) -> Tensor:
    """(N,): the distance to the nearest other class, 0 if it is wrong already."""
    with torch.no_grad():
        logits = model(data.images / 255).double()
        weight = model.weight.double()
    found = torch.full((len(data),), torch.inf, dtype=torch.float64)
    for other in range(len(weight)):
        gap = logits.gather(1, data.labels[:, None])[:, 0] - logits[:, other]
        slope = weight[data.labels] - weight[other]
        length = slope.abs().sum(1) if norm == "linf" else slope.square().sum(1).sqrt()
        found = torch.where(data.labels == other, found, torch.minimum(found, (gap / length).clamp_min(0)))
    return found


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_on_a_linear_classifier_what_is_robust_is_farther_from_every_other_class_than_the_radius(norm, classes):
    model = Linear(classes)
    data = grey(model)
    exact = radii(model, data, norm)
    epsilon = exact[exact > 0].median().item()
    found = autoattack(model, data, norm=norm, epsilon=epsilon, seed=0, iterations=30, queries=30)
    sure = (exact / epsilon - 1).abs() > 0.02  # the nearest few are decided by rounding
    assert sure.double().mean() > 0.9
    assert torch.equal(found.robust[sure], (exact > epsilon)[sure])
    assert found.behind["clean"] == pytest.approx((exact > 0).double().mean().item())
    assert list(found.behind) == ["clean", "apgd_ce", "apgd_t", "fab_t", "square"]
    assert sorted(found.behind.values(), reverse=True) == list(found.behind.values())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("name", "classes"), [("apgd_ce", 2), ("apgd_t", 3), ("fab_t", 3)])
def test_each_attack_with_gradients_alone_finds_what_lies_within_the_radius_and_nothing_beyond(norm, name, classes):
    # With three classes the cross-entropy may climb between two of them: only the targeted ones are exact there.
    model = Linear(classes)
    data = grey(model)
    data = data[radii(model, data, norm) > 0]
    exact = radii(model, data, norm)
    ball = Ball(norm, exact.median().item())
    images, labels, source = data.images / 255, data.labels, generator(0, "test")
    with torch.no_grad():
        order = model(images).argsort(1, descending=True)
    fooled = torch.zeros(len(data), dtype=torch.bool)
    for rank in range(1, classes):
        arguments = (model, images, labels, None if name == "apgd_ce" else order[:, rank], ball, source)
        found = (fab if name == "fab_t" else apgd)(*arguments, steps=50)
        assert (ball.size(found - images) <= ball.epsilon * (1 + 1e-5)).all()
        assert found.min() >= 0
        assert found.max() <= 1
        with torch.no_grad():
            fooled |= model(found).argmax(1) != labels
    sure = (exact / ball.epsilon - 1).abs() > 0.02
    assert torch.equal(fooled[sure], (exact < ball.epsilon)[sure])


class Wavy(nn.Module):
    """Class 0 of 2 by a margin that has hills and no other class within reach; keeps each image that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = torch.randn(36, dtype=torch.float64, generator=generator(2, "slopes")) * 10
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        margin = 3 + torch.sin(images.flatten(1) * self.slopes).mean(1)
        return torch.stack([margin, torch.zeros_like(margin)], dim=1)

    def climbed(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """The cross-entropy of one image and its slope, by hand."""
        slopes = self.slopes.numpy()
        margin = 3 + np.sin(point * slopes).mean()
        return np.log1p(np.exp(-margin)), -np.cos(point * slopes) * slopes / len(point) / (1 + np.exp(margin))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_goes_where_algorithm_1_of_its_paper_goes(norm):
    model, steps, epsilon = Wavy(), 60, 0.1
    image = torch.rand(1, 1, 6, 6, dtype=torch.float64, generator=generator(0, "image"))
    apgd(model, image, torch.tensor([0]), None, Ball(norm, epsilon), generator(0, "start"), steps)
    seen, origin = [points.flatten().numpy() for points in model.seen], image.flatten().numpy()
    assert len(seen) == steps + 1

    def project(point: np.ndarray) -> np.ndarray:
        if norm == "linf":
            return np.clip(np.clip(point, origin - epsilon, origin + epsilon), 0, 1)
        change = point - origin
        return np.clip(origin + change * min(1, epsilon / np.linalg.norm(change)), 0, 1)

    def step_from(point: np.ndarray, slope: np.ndarray, length: float) -> np.ndarray:
        return project(point + length * (np.sign(slope) if norm == "linf" else slope / np.linalg.norm(slope)))

    ends, length, halvings = checkpoints(steps), 2 * epsilon, 0
    before = now = best = seen[0]
    loss, slope = model.climbed(now)
    best_loss, best_slope, checked_loss, rises, last, halved = loss, slope, loss, 0, 0, False
    for step in range(1, steps + 1):
        moved = step_from(now, slope, length)
        if step > 1:
            moved = project(now + 0.75 * (moved - now) + 0.25 * (now - before))
        np.testing.assert_allclose(seen[step], moved, rtol=0, atol=1e-6)
        before, now, before_loss = now, seen[step], loss  # its own rounding is not carried on
        loss, slope = model.climbed(now)
        rises += loss > before_loss
        if loss > best_loss:
            best, best_loss, best_slope = now, loss, slope
        if step in ends:
            halved = rises <= 0.75 * (step - last) or (not halved and best_loss <= checked_loss)
            if halved:
                length, now, slope, halvings = length / 2, best, best_slope, halvings + 1
            checked_loss, rises, last = best_loss, 0, step
    assert halvings >= 2
    assert norm == "linf" or halvings < len(ends)  # both branches were taken


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_goes_where_its_paper_goes_between_a_plane_and_the_image(norm):
    model, seen = Linear(2).double(), []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().flatten().numpy()))
    image = torch.full((1, 1, 6, 6), 0.5, dtype=torch.float64)
    image[0, 0, 0, 0] = 0.7
    with torch.no_grad():
        label = model(image).argmax(1)
    seen.clear()
    out_of_reach = Ball(norm, 1e-6)
    fab(model, image, label, 1 - label, out_of_reach, generator(0, "start"), steps=6)
    slope = (model.weight[1 - label] - model.weight[label])[0].detach().numpy()
    origin = now = image.flatten().numpy()

    def onto(point: np.ndarray) -> np.ndarray:
        """The least change that ends on the plane where both classes are equal."""
        gain = -slope @ (point - 0.5)
        return gain * (np.sign(slope) / np.abs(slope).sum() if norm == "linf" else slope / (slope @ slope))

    size = {"linf": lambda change: np.abs(change).max(), "l2": np.linalg.norm}[norm]
    for looked, landed in zip(seen[::2], seen[1::2], strict=True):
        np.testing.assert_allclose(looked, now, atol=1e-9)
        here, there = onto(now), onto(origin)
        pull = min(max(size(here), 1e-8) / (max(size(here), 1e-8) + max(size(there), 1e-8)), 0.1)
        now = (1 - pull) * (now + 1.05 * here) + pull * (origin + 1.05 * there)
        np.testing.assert_allclose(landed, now, atol=1e-9)
        if slope @ (now - 0.5) > 0:
            now = origin + 0.9 * (now - origin)


def test_the_budget_is_that_of_the_standard_version():
    assert (ITERATIONS, TARGETS, QUERIES) == (100, 9, 5000)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_fools_without_gradients_what_is_well_within_the_radius_and_nothing_beyond(norm):
    model = Linear(3)
    with torch.no_grad():  # the last row and column are out of its reach, and do not matter here
        model.weight.view(3, 6, 6)[:, -1] = 0
        model.weight.view(3, 6, 6)[:, :, -1] = 0
    data = grey(model, 60)
    data = data[radii(model, data, norm) > 0]
    exact = radii(model, data, norm)
    ball = Ball(norm, exact.median().item())
    images = data.images / 255
    with torch.no_grad():
        found = square(model, images, data.labels, ball, generator(0, "test"), queries=2000)
        fooled = model(found).argmax(1) != data.labels
    assert (ball.size(found - images) <= ball.epsilon * (1 + 1e-5)).all()
    assert not fooled[exact > 1.001 * ball.epsilon].any()
    assert fooled[exact < 0.5 * ball.epsilon].all()
    assert fooled[exact < ball.epsilon].double().mean() > 0.6


def test_the_least_change_onto_a_plane_is_that_of_a_linear_program_and_of_a_quadratic_one():
    source = np.random.default_rng(0)
    points, slope = source.random((30, 5)), source.normal(size=(30, 5))
    slope[3, 2] = 0
    need = source.normal(size=30)
    for norm in ("linf", "l2"):
        found = onto_plane(*(torch.from_numpy(value) for value in (points, slope, need)), norm).numpy()
        for x, w, c, d in zip(points, slope, need, found, strict=True):
            far = np.where(w * np.sign(c) > 0, 1 - x, -x) * (w != 0)
            assert (x + d > -1e-9).all()
            assert (x + d < 1 + 1e-9).all()
            if abs(w @ far) < abs(c):  # the plane does not meet the box
                np.testing.assert_allclose(d, far, atol=1e-9)
                continue
            assert w @ d == pytest.approx(c, abs=1e-8)
            if norm == "linf":
                one = np.ones((5, 1))
                best = linprog(
                    [0] * 5 + [1],
                    A_ub=np.block([[np.eye(5), -one], [-np.eye(5), -one]]),
                    b_ub=np.zeros(10),
                    A_eq=[[*w, 0]],
                    b_eq=[c],
                    bounds=[*zip(-x, 1 - x, strict=True), (0, None)],
                ).fun
                assert np.abs(d).max() == pytest.approx(best, abs=1e-7)
            else:
                best = minimize(
                    lambda v: v @ v,
                    d * 0,
                    jac=lambda v: 2 * v,
                    bounds=list(zip(-x, 1 - x, strict=True)),
                    constraints={"type": "eq", "fun": lambda v, w=w, c=c: w @ v - c, "jac": lambda v, w=w: w},
                    method="SLSQP",
                ).fun
                assert d @ d == pytest.approx(best, abs=1e-5)


def test_the_steps_at_which_apgd_judges_itself_are_those_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_the_targeted_ratio_of_logits_by_hand_and_its_freedom_from_scale():
    logits, label, target = torch.tensor([[4.0, 1.0, 3.0, 0.0]]), torch.tensor([0]), torch.tensor([2])
    assert dlr_targeted(logits, label, target).item() == pytest.approx(-1 / (4 - (1 + 0) / 2))
    assert dlr_targeted(7 * logits + 3, label, target).item() == pytest.approx(-1 / 3.5)
    assert dlr_targeted(logits[:, :3], label, target).item() == -1  # no fourth logit: the plain difference


@pytest.mark.parametrize(("norm", "propose"), [("linf", _new_square), ("l2", _new_hills)])
def test_windows_of_square_reach_all_but_the_last_row_and_column_as_those_of_the_released_code(norm, propose):
    # It draws floor(U * (length - side)), U in [0, 1): Andriushchenko et al. have one place more.
    grey, source = torch.full((1, 1, 8, 8), 0.5), generator(0, "windows")
    moved = torch.zeros(8, 8, dtype=torch.bool)
    for _ in range(300):
        moved |= (propose(grey, grey, Ball(norm, 0.5), 1 / 64, source) != grey)[0, 0]
    assert moved[:-1, :-1].all()
    assert not moved[-1].any()
    assert not moved[:, -1].any()


def test_the_window_of_square_halves_as_in_the_paper():
    assert [window_share(query) for query in (0, 10, 11, 50, 51, 201, 501, 4001)] == pytest.approx(
        [0.8, 0.8, 0.4, 0.4, 0.2, 0.1, 0.05, 0.8 / 128]
    )


@pytest.mark.parametrize("side", [1, 3, 5, 8])
def test_the_hills_of_square_have_length_one_a_rise_and_a_fall_and_can_be_turned(side):
    hills = two_hills(side, False, torch.device("cpu"))
    assert hills.square().sum().item() == pytest.approx(1)
    assert (hills[: side // 2] > 0).all()
    assert (hills[side // 2 :] < 0).all()
    assert torch.equal(two_hills(side, True, torch.device("cpu")), hills.T)


def test_hills_fall_by_the_squares_of_whole_numbers():
    # The lower half of five rows is three high: rings at 0, 1 and 2 hold 1 + 1/4 + 1/9, 1/4 + 1/9 and 1/9.
    row = two_hills(5, False, torch.device("cpu"))[3]
    assert (row[1] / row[2]).item() == pytest.approx((1 / 4 + 1 / 9) / (1 + 1 / 4 + 1 / 9))
    assert (row[0] / row[2]).item() == pytest.approx((1 / 9) / (1 + 1 / 4 + 1 / 9))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_points_end_in_the_ball_and_are_images(norm):
    ball, source = Ball(norm, 0.3), generator(0, "ball")
    centre = torch.rand(20, 3, 5, 5, generator=source)
    wild = centre + torch.randn(centre.shape, generator=source)
    for points in (ball.into(wild, centre), ball.random(centre, source)):
        assert (ball.size(points - centre) <= 0.3 + 1e-6).all()
        assert points.min() >= 0
        assert points.max() <= 1
    inside = ball.into(centre, centre)
    torch.testing.assert_close(inside, centre)


@pytest.mark.parametrize(("norm", "epsilon", "words"), [("l1", 1.0, "linf, l2"), ("linf", 0.0, "above 0")])
def test_a_ball_that_is_none_is_refused(norm, epsilon, words):
    with pytest.raises(ValueError, match=words):
        Ball(norm, epsilon)


def test_no_image_is_refused():
    model = Linear(3)
    with pytest.raises(ValueError, match="no image"):
        autoattack(model, grey(model)[:0], norm="linf", epsilon=0.1, seed=0)


def test_it_repeats_itself_and_leaves_the_model_and_the_global_random_state_alone():
    model = ModelSpec("test_efficientnet", 5, 3, 16, (0.5,) * 3, (0.25,) * 3).build(0).train()
    images = torch.randint(0, 256, (12, 3, 16, 16), generator=generator(0, "images"), dtype=torch.uint8)
    with torch.no_grad():
        data = ImageSet(images, model.eval()(images / 255).argmax(1))
    model.train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = [autoattack(model, data, norm="l2", epsilon=0.05, seed=0, iterations=5, queries=5).robust for _ in range(2)]
    assert torch.equal(*found)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_images_outside_those_asked_for_count_as_fooled():
    model = Linear(3)
    data = grey(model)
    among = torch.arange(len(data)) < 20
    found = autoattack(model, data, norm="linf", epsilon=1e-6, seed=0, among=among, iterations=2, queries=2)
    assert int(found.robust.sum()) == 18  # of the first twenty, two have a wrong label


# The curve, and what hides gradients --------------------------------------------------------------------------------


def test_the_curve_falls_with_the_radius_to_the_closed_form():
    model = Linear(3)
    data = grey(model, 60)
    rows = robustness.curve(model, data, seed=0, iterations=20, queries=10)
    assert [(row["norm"], round(row["epsilon"] * 255, 4)) for row in rows[:6]] == [
        ("linf", radius) for radius in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    ]
    for row in rows:
        exact = radii(model, data, row["norm"])
        low, high = ((exact > factor * row["epsilon"]).double().mean().item() for factor in (1.02, 0.98))
        assert low <= row["accuracy"] <= high
    assert 0 < rows[3]["accuracy"] < rows[1]["accuracy"] < 0.9


class Stairs(nn.Module):
    """The same network behind pixels rounded to a few values, through which no gradient comes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images * 32).round() / 32) + 0 * images.sum()


class Noisy(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) + 0.01 * torch.randn(len(images), 1)


class Certain(Linear):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(1)


def warned(model: nn.Module, data: ImageSet, infected: nn.Module) -> list[str]:
    return robustness.masking_warnings(
        model, data, infected=infected, epsilon=8 / 255, step_size=2 / 255, steps=10, seed=0
    )


def test_an_honest_model_gets_no_warning():
    model = Linear(3)
    assert warned(model, grey(model), model) == []


def test_a_model_that_hides_its_gradients_is_found_out_by_images_made_for_another():
    model = Linear(3)
    lines = warned(Stairs(model), grey(model), model)
    assert any(line.startswith("images made for the infected model leave") for line in lines)
    assert any("120 of 120 images have no gradient" in line for line in lines)
    assert any("which can make every image grey" in line for line in lines)


def test_a_random_model_and_one_that_gives_probabilities_are_named():
    model = Linear(3)
    assert any("the model is random" in line for line in warned(Noisy(model), grey(model), model))
    assert any("need logits" in line for line in warned(Certain(3), grey(model), model))


def test_square_alone_finding_more_is_a_warning():
    row = {"norm": "linf", "epsilon": 8 / 255, "accuracy": 0.3}
    assert robustness.square_warnings([row | {"behind": {"fab_t": 0.3015, "square": 0.3}}]) == []
    (line,) = robustness.square_warnings([row | {"behind": {"fab_t": 0.31, "square": 0.3}}])
    assert "another 1.0%" in line


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_agrees_with_the_released_code_on_three_trained_models(norm, cache):
    pytest.importorskip("pyautoattack", reason="pip install pyautoattack to compare with the released code")
    path = Path(__file__).parents[1] / "results" / "autoattack_agreement" / "compare.py"
    spec = importlib.util.spec_from_file_location("compare", path)
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    models, data = compare.models(str(cache))
    for name, model in models.items():
        epsilon = compare.RADII[name][norm]
        ours, theirs = (run(model, data[:200], norm, epsilon, 200)["square"] for run in (compare.ours, compare.theirs))
        assert ours == pytest.approx(theirs, abs=0.0051), name
