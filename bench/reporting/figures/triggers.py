"""Pictures of triggers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.reporting.figures.style import WIDTH, add_title, paper_style, save_figure, short_name

if TYPE_CHECKING:
    from torch import Tensor


def gallery(drawn: dict[str, tuple[Tensor, Tensor]], rows: list[dict[str, Any]], folder: Path) -> Path:
    """`gallery.png`: a row for each attack with three images: clean, triggered, difference stretched to full contrast.

    Args:
        drawn: title -> clean and triggered images, (3, C, H, W) in [0, 1].
        rows: the scores of each, in the same order.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(drawn), 9, figsize=(11.5, 1.25 * len(drawn) + 0.3), squeeze=False, layout="constrained"
    )
    for line, (title, (clean, triggered)) in enumerate(drawn.items()):
        change = triggered - clean
        # The factor that fills the range stands in the title.
        shown, reach = _contrast(change)
        for index in range(len(clean)):
            for kind, images in enumerate((clean, triggered, shown)):
                axis = axes[line][3 * index + kind]
                picture = images[index].permute(1, 2, 0).cpu().numpy()
                axis.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
                axis.set_axis_off()
                if line == 0:
                    axis.set_title(("clean", "triggered", "difference")[kind], fontsize="small")
        score = rows[line]
        text = f"{title}\nL∞ {score['linf']:.0f}, SSIM {score['ssim']:.2f}\n×{1 / (2 * reach) if reach else 1:.1f}"
        axes[line][0].text(
            -0.1, 0.5, text, transform=axes[line][0].transAxes, ha="right", va="center", fontsize="small"
        )
    path = folder / "gallery.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def triggers(drawn: dict[str, tuple[Tensor, Tensor]], folder: Path, title: str) -> Path:
    """`triggers.png`: one image of each attack, clean, triggered, and the difference at full contrast.

    Args:
        drawn: title -> clean and triggered image, (C, H, W) in [0, 1].
    """
    with paper_style() as plt:
        across = 2 if len(drawn) > 1 else 1
        down = -(-len(drawn) // across)
        # An empty column between two attacks.
        ratios = [1.0, 1.0, 1.0, 0.12] * across
        figure, axes = plt.subplots(
            down,
            len(ratios) - 1,
            figsize=(WIDTH if across > 1 else WIDTH / 2, 0.72 * down),
            squeeze=False,
            layout="constrained",
            gridspec_kw={"width_ratios": ratios[:-1], "wspace": 0.02},
        )
        for axis in axes.flat:
            axis.set_axis_off()
        for index, (name, (clean, triggered)) in enumerate(drawn.items()):
            row, first = index // across, 4 * (index % across)
            shown, reach = _contrast(triggered - clean)
            for axis, image in zip(axes[row][first : first + 3], (clean, triggered, shown), strict=True):
                picture = image.permute(1, 2, 0).cpu().numpy()
                axis.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
            axes[row][first + 1].set_title(f"{short_name(name)}, L∞ {255 * reach:.0f}", fontsize=6)
        what = f"Clean image, triggered image, difference at full contrast; L∞ in levels of 255. {title}."
        return save_figure(add_title(figure, what), folder / "triggers.png")


def _contrast(change: Tensor) -> tuple[Tensor, float]:
    """A difference as an image, in which grey is no change, and the largest change."""
    reach = float(change.abs().amax())
    return (0.5 + 0.5 * change / (reach or 1.0)).clamp(0, 1), reach


def trigger_picture(clean: Tensor, triggered: Tensor, path: Path) -> None:
    """One image (C, H, W) in [0, 1] without and with a trigger, and the difference at full contrast, side by side.

    Small, for the page of the leaderboard; every pixel is shown as a square.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch

    shown, _ = _contrast(triggered - clean)
    gap = clean.new_ones(clean.shape[0], clean.shape[1], 1)
    strip = torch.cat([clean, gap, triggered, gap, shown], dim=2)
    zoom = max(1, 96 // clean.shape[1])
    picture = strip.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
    plt.imsave(path, picture.repeat(zoom, axis=0).repeat(zoom, axis=1))
