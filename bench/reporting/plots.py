"""The figures of a grid, as PNG files. matplotlib is imported here, and only when a figure is due."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from bench.reporting.table import cells

if TYPE_CHECKING:
    from torch import Tensor


def write(trials: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Draw what the grid has data for, and never an empty axis.

    `asr_heatmap.png`: mean ASR, defenses down, attacks across. `accuracy_against_asr.png`: each cell as a point.
    """
    table = cells(trials[trials.poison_rate > 0])
    if table.empty or table.asr_mean.notna().sum() == 0:
        for name in ("asr_heatmap.png", "accuracy_against_asr.png"):
            (folder / name).unlink(missing_ok=True)  # of an earlier run: not of this table
        return []
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [_heatmap(table, folder, title), _scatter(table, folder, title)]


def _caption(table: pd.DataFrame, title: str) -> str:
    seeds = sorted({int(count) for count in table.done if count})
    return f"{title}; mean over {'–'.join(map(str, {min(seeds), max(seeds)}))} seed{'' if seeds == [1] else 's'}"


def _heatmap(table: pd.DataFrame, folder: Path, title: str) -> Path:
    import matplotlib.pyplot as plt
    import seaborn as sns

    places = list(table.groupby(["dataset", "model", "setting"], sort=False))
    attacks, defenses = table.attack.nunique(), table.defense.nunique()
    figure, axes = plt.subplots(
        1,
        len(places),
        figsize=(2.2 + len(places) * (1.0 + 0.85 * attacks), 1.4 + 0.42 * defenses),
        squeeze=False,
        layout="constrained",
    )
    for axis, (place, part) in zip(axes[0], places, strict=True):
        wide = 100 * part.pivot(index="defense", columns="attack", values="asr_mean")
        wide = wide.reindex(index=part.defense.unique(), columns=part.attack.unique())
        # A cell without a figure stays grey; a white one would read as an ASR of zero.
        axis.set_facecolor("0.85")
        sns.heatmap(
            wide,
            annot=True,
            fmt=".1f",
            vmin=0,
            vmax=100,
            cmap="rocket_r",
            ax=axis,
            cbar_kws={"label": "ASR (%)"},
        )
        axis.set(title=", ".join(map(str, place)), xlabel="", ylabel="")
        axis.tick_params(axis="y", rotation=0)
    figure.suptitle(f"Attack success rate: {_caption(table, title)}", fontsize="medium")
    return _save(figure, folder / "asr_heatmap.png")


def _scatter(table: pd.DataFrame, folder: Path, title: str) -> Path:
    import matplotlib.pyplot as plt
    import seaborn as sns

    points = table.dropna(subset=["asr_mean", "clean_accuracy_mean"]).copy()
    points["ASR (%)"], points["clean accuracy (%)"] = 100 * points.asr_mean, 100 * points.clean_accuracy_mean
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    sns.scatterplot(
        points,
        x="ASR (%)",
        y="clean accuracy (%)",
        hue="defense",
        hue_order=list(table.defense.unique()),
        style="attack",
        palette="colorblind",
        s=70,
        ax=axis,
    )
    axis.set_xlim(-3, 103)
    low, high = axis.get_ylim()
    # At least ten points high: a tenth of a point must not fill the figure.
    axis.set_ylim(min(low, max(high - 10, 0)), high + 0.5)
    axis.set_title(f"Upper left is best: {_caption(table, title)}", fontsize="medium")
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _save(figure, folder / "accuracy_against_asr.png")


def _save(figure, path: Path) -> Path:  # type: ignore[no-untyped-def]
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


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
        reach = float(change.abs().amax())
        # Grey is no change; the factor that fills the range stands in the title.
        shown = (0.5 + 0.5 * change / reach).clamp(0, 1) if reach else change + 0.5
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
    return _save(figure, folder / "gallery.png")
