"""AutoAttack, standard: APGD-CE, targeted APGD-DLR, targeted FAB and Square, each on what the ones before left.

Papers: Croce and Hein, ICML 2020, arXiv:2003.01690 (AutoAttack, APGD); Croce and Hein, ICML 2020, arXiv:1907.02044
(FAB); Andriushchenko et al., ECCV 2020, arXiv:1912.00049 (Square).
Differs: nine target classes, or all others where there are fewer; with fewer than four classes the targeted loss is
the plain difference of logits, since the DLR needs the third and fourth. An image that is fooled leaves the batch at
once, which saves most of the time and changes no verdict. FAB stops at the radius instead of looking for the least
perturbation. Square draws a window for each image (L2: one for the batch, as the released code does for both); its
windows leave out the last row and column, as the released code's do and the paper's do not: see `_places`.
Ours in place of a package, because fooled images leave the batch, every draw comes of the trial's seed alone, and what
each attack leaves is kept for the signs of masked gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import ImageSet, generator
from .inference import under_attack

NORMS = ("linf", "l2")
TARGETS = 9
ITERATIONS = 100
QUERIES = 5000
VERSION = 2  # goes up when a change here can change a figure


@dataclass(frozen=True)
class Ball:
    """All images within `epsilon` of an image, in the L-infinity or L2 norm, values in [0, 1]."""

    norm: str
    epsilon: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}; write one of {', '.join(NORMS)}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon:g}; write a radius above 0, in pixel units (8 / 255 is usual)")

    def size(self, change: Tensor) -> Tensor:
        """(B, 1, 1, 1): the norm of each change."""
        flat = change.flatten(1)
        sizes = flat.abs().amax(1) if self.norm == "linf" else flat.square().sum(1).sqrt()
        return sizes.view(-1, 1, 1, 1)

    def into(self, points: Tensor, centre: Tensor) -> Tensor:
        """The points, moved into the ball and into [0, 1]."""
        if self.norm == "linf":
            return torch.clamp(points, (centre - self.epsilon).clamp_(min=0), (centre + self.epsilon).clamp_(max=1))
        change = points - centre
        return (centre + change * (self.epsilon / self.size(change).clamp_min(self.epsilon))).clamp_(0, 1)

    def direction(self, slope: Tensor) -> Tensor:
        """The step of length one that climbs fastest."""
        return slope.sign() if self.norm == "linf" else slope / self.size(slope).clamp_min(1e-12)

    def random(self, centre: Tensor, source: torch.Generator) -> Tensor:
        """A point on the edge of each ball, moved into [0, 1]."""
        draw = torch.rand if self.norm == "linf" else torch.randn
        noise = draw(centre.shape, generator=source, device=centre.device)
        noise = noise * 2 - 1 if self.norm == "linf" else noise
        return (centre + self.epsilon * noise / self.size(noise).clamp_min(1e-12)).clamp_(0, 1)


State = dict[str, Tensor]


class _Search:
    """The images of a batch that are not fooled yet, and the fooling ones of the others."""

    def __init__(self, images: Tensor) -> None:
        self.found = images.clone()
        self.fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def note(self, state: State, points: Tensor, wrong: Tensor) -> None:
        rows = state["row"][wrong]
        self.found[rows] = points[wrong]
        self.fooled[rows] = True

    def left(self, state: State) -> State:
        """The state of the images that are not fooled."""
        keep = ~self.fooled[state["row"]]
        return state if keep.all() else {name: value[keep] for name, value in state.items()}


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """(B,): the difference of logits ratio, to be raised; positive where the target is ahead of the label."""
    gap = logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])
    if logits.shape[1] < 4:
        return gap[:, 0]
    first, _, third, fourth = logits.topk(4, dim=1).values.unbind(1)
    return gap[:, 0] / (first - (third + fourth) / 2 + 1e-12)


def _climb(model: nn.Module, points: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its slope, and who is wrong, of each image."""
    leaf = points.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model(leaf)
        loss = (
            F.cross_entropy(logits, labels, reduction="none")
            if targets is None
            else dlr_targeted(logits, labels, targets)
        )
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), slope.nan_to_num_(0, 0, 0), logits.argmax(1) != labels


def checkpoints(steps: int) -> list[int]:
    """The steps after which APGD judges its step length: 22 % of all, then windows shorter by 3 %, at least 6 %."""
    ends, before, now = [], 0.0, 0.22
    while (end := math.ceil(now * steps - 1e-9)) <= steps:
        ends.append(end)
        before, now = now, now + max(now - before - 0.03, 0.06)
    return ends


@torch.no_grad()
def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    ball: Ball,
    source: torch.Generator,
    steps: int = ITERATIONS,
) -> Tensor:
    """PGD with momentum whose step halves, and which returns to its best point, where progress stalls.

    Args:
        targets: None climbs the cross-entropy; (B,) classes climb the targeted DLR.

    Returns:
        The images, those that could be fooled replaced by what fools the model.
    """
    search = _Search(images)
    start = ball.random(images, source)
    loss, slope, wrong = _climb(model, start, labels, targets)
    state = {
        "row": torch.arange(len(images), device=images.device),
        "origin": images,
        "label": labels,
        "now": start,
        "before": start,
        "loss": loss,
        "slope": slope,
        "best": start,
        "best_loss": loss,
        "best_slope": slope,
        "checked_loss": loss,
        "length": torch.full_like(loss, 2 * ball.epsilon).view(-1, 1, 1, 1),
        "rises": torch.zeros_like(loss),
        "halved": torch.zeros_like(wrong),
    }
    if targets is not None:
        state["target"] = targets
    search.note(state, start, wrong)
    ends, last = checkpoints(steps), 0
    for step in range(1, steps + 1):
        state = search.left(state) if step % 10 == 1 else state
        if not len(state["row"]):
            break
        now, before, origin = state["now"], state["before"], state["origin"]
        moved = ball.into(now + state["length"] * ball.direction(state["slope"]), origin)
        if step > 1:
            moved = ball.into(now + 0.75 * (moved - now) + 0.25 * (now - before), origin)
        loss, slope, wrong = _climb(model, moved, state["label"], state.get("target"))
        search.note(state, moved, wrong)
        state["rises"] = state["rises"] + (loss > state["loss"])
        better = loss > state["best_loss"]
        state |= {"before": now, "now": moved, "loss": loss, "slope": slope}
        _put(state, better, best=moved, best_loss=loss, best_slope=slope)
        if step in ends:
            stalls = state["rises"] <= 0.75 * (step - last)
            stays = ~state["halved"] & (state["best_loss"] <= state["checked_loss"])
            halve, last = stalls | stays, step
            _put(state, halve, length=state["length"] / 2, now=state["best"], slope=state["best_slope"])
            state |= {"halved": halve, "checked_loss": state["best_loss"], "rises": torch.zeros_like(loss)}
    return search.found


def _put(state: State, where: Tensor, **values: Tensor) -> None:
    for name, value in values.items():
        state[name] = torch.where(where.view(-1, *[1] * (value.ndim - 1)), value, state[name])


def onto_plane(points: Tensor, slope: Tensor, need: Tensor, norm: str) -> Tensor:
    """The least change of each point that gains `need` along `slope` and stays in [0, 1]; the farthest if none does.

    Args:
        points, slope: (B, D), points in [0, 1].
        need: (B,): <slope, change> is to be this.
        norm: in which the change is least, `linf` or `l2`.

    Every coordinate moves at its speed (one; for L2 its share of the slope) until it meets 0 or 1, so that the gain
    is a rising broken line in time: it is cut at the need.
    """
    slope = slope * torch.where(need < 0, -1.0, 1.0)[:, None]
    weight, goal = slope.abs(), need.abs()
    room = torch.where(slope > 0, 1 - points, points)
    speed = weight if norm == "l2" else torch.ones_like(weight)
    meets, order = torch.where(weight > 0, room / speed.clamp_min(1e-30), 0.0).sort(dim=1)
    full = (weight * room).gather(1, order).cumsum(1)  # gained by those that have met the wall
    pace = (weight * speed).gather(1, order)
    rest = pace.flip(1).cumsum(1).flip(1)  # pace of those that have not, this one included
    gain = full + meets * F.pad(rest[:, 1:], (0, 1))
    index = (gain < goal[:, None]).sum(1, keepdim=True)
    enough = index < gain.shape[1]
    index = index.clamp(max=gain.shape[1] - 1)
    before = F.pad(full[:, :-1], (1, 0)).gather(1, index)
    time = (goal[:, None] - before) / rest.gather(1, index).clamp_min(1e-30)
    change = torch.where(enough, torch.minimum(time.clamp_min(0) * speed, room), room)
    return change * slope.sign()


@torch.no_grad()
def fab(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    ball: Ball,
    source: torch.Generator,
    steps: int = ITERATIONS,
) -> Tensor:
    """Steps onto the linear boundary to the target class, drawn towards the image; as `apgd` in what it returns."""
    search = _Search(images)
    state = {
        "row": torch.arange(len(images), device=images.device),
        "origin": images,
        "label": labels,
        "target": targets,
        "now": images.clone(),
    }
    for step in range(steps):
        state = search.left(state) if step % 10 == 0 else state
        if not len(state["row"]):
            break
        now, origin = state["now"], state["origin"]
        leaf = now.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = model(leaf)
            pair = torch.stack([state["target"], state["label"]], dim=1)
            ahead = logits.gather(1, pair) @ torch.tensor([1.0, -1.0], device=logits.device, dtype=logits.dtype)
            (slope,) = torch.autograd.grad(ahead.sum(), leaf)
        flat, gap = slope.flatten(1), ahead.detach()
        need = torch.cat([-gap, -gap + (flat * (now - origin).flatten(1)).sum(1)])
        both = torch.cat([now, origin]).flatten(1)
        change = onto_plane(both, torch.cat([flat, flat]), need, ball.norm).view(2, *now.shape)
        here, distance_there = (ball.size(part).clamp_min(1e-8) for part in change)
        pull = (here / (here + distance_there)).clamp(max=0.1)
        now = ((1 - pull) * (now + 1.05 * change[0]) + pull * (origin + 1.05 * change[1])).clamp_(0, 1)
        wrong = model(now).argmax(1) != state["label"]
        search.note(state, now, wrong & (ball.size(now - origin).flatten() <= ball.epsilon))
        # Back towards the image: the boundary is looked for nearer to it.
        state["now"] = torch.where(wrong.view(-1, 1, 1, 1), origin + 0.9 * (now - origin), now)
    return search.found


def window_share(query: int) -> float:
    """The share of the image that Square changes in this query."""
    halvings = sum(query > end for end in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return 0.8 / 2**halvings


def _margin(model: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    """(B,): how far the label is ahead of the best other class; 0 or below is fooled."""
    logits = model(points)
    of_label = logits.gather(1, labels[:, None])
    return (of_label - logits.scatter(1, labels[:, None], -math.inf).amax(1, keepdim=True))[:, 0]


def _bump(height: int, width: int, device: torch.device) -> Tensor:
    """(height, width): a hill of squares, each ring out lower, that Square adds in L2."""
    rings = max(height // 2, width // 2) + 1
    fall = torch.arange(1, rings + 1, dtype=torch.float64).pow(-2).flip(0).cumsum(0).flip(0)
    rows, columns = (torch.arange(size) - size // 2 for size in (height, width))
    ring = torch.maximum(rows.abs()[:, None], columns.abs()[None, :])
    return fall[ring.clamp(max=rings - 1)].float().to(device)


def two_hills(side: int, turned: bool, device: torch.device) -> Tensor:
    """(side, side) of L2 norm one: one half a hill, the other its negative."""
    half = side // 2
    hills = torch.cat([_bump(half, side, device), -_bump(side - half, side, device)])
    hills = hills / hills.square().sum().sqrt()
    return hills.T if turned else hills


@torch.no_grad()
def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    source: torch.Generator,
    queries: int = QUERIES,
) -> Tensor:
    """Random search without any gradient: keeps each change of a window that lowers the margin; returns as `apgd`."""
    search = _Search(images)
    points = (_stripes if ball.norm == "linf" else _tiles)(images, ball, source)
    margin = _margin(model, points, labels)
    state = {
        "row": torch.arange(len(images), device=images.device),
        "origin": images,
        "label": labels,
        "now": points,
        "margin": margin,
    }
    search.note(state, points, margin <= 0)
    propose = _new_square if ball.norm == "linf" else _new_hills
    for query in range(1, queries):
        state = search.left(state) if query % 10 == 1 else state
        if not len(state["row"]):
            break
        points = propose(state["now"], state["origin"], ball, window_share(query - 1), source)
        margin = _margin(model, points, state["label"])
        search.note(state, points, margin <= 0)
        _put(state, margin < state["margin"], now=points, margin=margin)
    return search.found


def _signs(shape: tuple[int, ...], source: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(0, 2, shape, generator=source, device=device).float() * 2 - 1


def _places(length: int, side: int) -> int:
    """How many places a window has along an axis.

    One more fits. The released code never draws it, and the figures that are quoted as AutoAttack's are its: with the
    last place, Square alone took 3 more points off a network on 16x16 images.
    """
    return max(1, length - side)


def _stripes(images: Tensor, ball: Ball, source: torch.Generator) -> Tensor:
    count, channels, _, width = images.shape
    return (images + ball.epsilon * _signs((count, channels, 1, width), source, images.device)).clamp_(0, 1)


def _new_square(now: Tensor, origin: Tensor, ball: Ball, share: float, source: torch.Generator) -> Tensor:
    count, channels, height, width = now.shape
    device = now.device
    side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
    top = torch.randint(0, _places(height, side), (count, 1), generator=source, device=device)
    left = torch.randint(0, _places(width, side), (count, 1), generator=source, device=device)
    rows = torch.arange(height, device=device) - top
    columns = torch.arange(width, device=device) - left
    inside = ((rows >= 0) & (rows < side))[:, None, :, None] & ((columns >= 0) & (columns < side))[:, None, None, :]
    corner = ball.into(origin + ball.epsilon * _signs((count, channels, 1, 1), source, device), origin)
    return torch.where(inside, corner, now)


def _tiles(images: Tensor, ball: Ball, source: torch.Generator) -> Tensor:
    count, channels, height, width = images.shape
    side = max(1, min(height, width) // 5)
    change = torch.zeros_like(images)
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            hills = two_hills(side, _coin(source), images.device)
            signs = _signs((count, channels, 1, 1), source, images.device)
            change[:, :, top : top + side, left : left + side] = hills * signs
    return (images + ball.epsilon * change / ball.size(change).clamp_min(1e-12)).clamp_(0, 1)


def _new_hills(now: Tensor, origin: Tensor, ball: Ball, share: float, source: torch.Generator) -> Tensor:
    """New hills in one window, paid for by what is flattened in another and by what the ball has to spare."""
    count, channels, height, width = now.shape
    side = max(round(math.sqrt(share * height * width)), 3)
    side = min(side + (side % 2 == 0), height, width)
    change = now - origin
    window_at, other = (
        (..., slice(top, top + side), slice(left, left + side))
        for top, left in (
            (_whole(_places(height, side), source), _whole(_places(width, side), source)),
            (_whole(_places(height, side), source), _whole(_places(width, side), source)),
        )
    )
    marked = torch.zeros(height, width, dtype=torch.bool, device=now.device)
    marked[window_at] = marked[other] = True
    spent = (change * marked).square().sum((2, 3), keepdim=True)  # (B, C, 1, 1)
    spare = (ball.epsilon**2 - ball.size(change).square()).clamp_min(0) / channels
    window = change[window_at]
    hills = two_hills(side, _coin(source), now.device) * _signs((count, channels, 1, 1), source, now.device)
    hills = hills + window / _length(window).clamp_min(1e-12)
    hills = hills / _length(hills).clamp_min(1e-12) * (spent + spare).sqrt()
    change = change.clone()
    change[other] = 0
    change[window_at] = hills
    return (origin + ball.epsilon * change / ball.size(change).clamp_min(1e-12)).clamp_(0, 1)


def _length(windows: Tensor) -> Tensor:
    return windows.square().sum((2, 3), keepdim=True).sqrt()


def _whole(limit: int, source: torch.Generator) -> int:
    return int(torch.randint(0, limit, (), generator=source, device=source.device))


def _coin(source: torch.Generator) -> bool:
    return bool(_whole(2, source))


@dataclass(frozen=True)
class Outcome:
    """What AutoAttack left.

    Attributes:
        robust: (N,) bool, the images that no attack could fool.
        behind: the share that was robust after each attack, in order; `clean` comes first.
    """

    robust: Tensor
    behind: dict[str, float]


def autoattack(
    model: nn.Module,
    data: ImageSet,
    *,
    norm: str,
    epsilon: float,
    seed: int,
    among: Tensor | None = None,
    batch_size: int = 250,
    iterations: int = ITERATIONS,
    queries: int = QUERIES,
) -> Outcome:
    """The standard AutoAttack: images that are classified wrongly, or can be fooled in the ball, are not robust.

    Args:
        norm, epsilon: of the ball; epsilon above 0, in pixel units.
        among: (N,) bool, the images to look at; the others count as fooled (within a smaller radius, say).

    Raises:
        ValueError: there is no image, or the ball is none.
    """
    if not len(data):
        raise ValueError("robust accuracy of no image at all is undefined")
    ball, device = Ball(norm, epsilon), data.device
    source = generator(seed, "autoattack", norm, device=device)
    with under_attack(model) as fast, torch.no_grad():
        attacks: tuple[tuple[str, Callable[[Tensor, Tensor, Tensor | None], Tensor], bool], ...] = (
            ("apgd_ce", lambda x, y, _: apgd(fast, x, y, None, ball, source, iterations), False),
            ("apgd_t", lambda x, y, t: apgd(fast, x, y, t, ball, source, iterations), True),
            ("fab_t", lambda x, y, t: fab(fast, x, y, t, ball, source, iterations), True),  # type: ignore[arg-type]
            ("square", lambda x, y, _: square(fast, x, y, ball, source, queries), False),
        )
        logits = torch.cat([fast(images) for images, _ in data.chunks(batch_size)])
        robust = logits.argmax(1) == data.labels
        robust = robust if among is None else robust & among
        robust_after = {"clean": robust.double().mean().item()}
        order = logits.argsort(dim=1, descending=True)
        for name, run, targeted in attacks:
            for rank in range(1, min(TARGETS, logits.shape[1] - 1) + 1) if targeted else (0,):
                for rows in robust.nonzero().flatten().split(batch_size):
                    batch = data[rows]
                    images = batch.batch(slice(None)).float() / 255
                    adversarial = run(images, batch.labels, order[rows, rank] if targeted else None)
                    # Judged anew, and in the ball: an attack's own word is not taken.
                    adversarial = ball.into(adversarial, images)
                    robust[rows] = fast(adversarial).argmax(1) == batch.labels
            robust_after[name] = robust.double().mean().item()
    return Outcome(robust, robust_after)
