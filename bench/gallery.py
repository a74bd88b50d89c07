"""A picture of every trigger: clean image, triggered image, the difference made visible, and how large it is.

    python -m bench.gallery [grid=NAME] [key=value ...]     the same settings as bench.run

Drawn from the infected models that are in the store, with the tensors of the trigger that they were trained with;
computes nothing else. Writes gallery.png and gallery.csv beside the leaderboard. The scores are means over 100 test
images: L0 (share of pixels changed), L2 (norm, pixels in [0, 1]), L-infinity (levels of 255) and SSIM (1: no
difference). Where the grid has the clean model (attack `none`) of the same seed, `clean_model_asr` is the ASR of the
trigger on it, `clean_model_recovery` the share of the same images that it still knows, and `clean_model_floor` the ASR
without any trigger: a trigger far above its floor moves every model, and its ASR is not that of a backdoor alone. Where
another seed is stored, `other_seed_asr` is the infected model's ASR under that seed's trigger: has it learned this
trigger or any of the kind?
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._command import open_experiment, run_command

if TYPE_CHECKING:
    from torch import Tensor


IMAGES = 100  # of each attack, for the scores


def main(arguments: list[str]) -> int:
    experiment = open_experiment(arguments)
    import pandas as pd

    from bench.engine.errors import UserError
    from bench.reporting.figures.triggers import gallery
    from bench.reporting.page import swept
    from bench.reporting.spreadsheet import write_csv
    from bench.reporting.triggers import on_clean_model, runner_of, scores, stamped, title_of, with_another_trigger

    bench = runner_of(experiment)
    drawn: dict[str, tuple[Tensor, Tensor]] = {}
    rows: list[dict[str, Any]] = []
    for trial, images, triggered in stamped(experiment, bench, IMAGES):
        drawn[title_of(experiment, trial)] = images[:3], triggered[:3]
        labels = {"attack": trial.attack, "dataset": trial.dataset, "model": trial.model}
        labels |= {"variant": swept(trial.variant)} if swept(trial.variant) else {}
        figures = on_clean_model(experiment, bench, trial) | with_another_trigger(experiment, bench, trial)
        rows.append({**labels, **scores(images, triggered), **figures})
    if not rows:
        raise UserError(
            f"no infected model of grid {experiment.cfg.grid.name} is stored yet; run it with bench.run first"
        )
    experiment.folder.mkdir(parents=True, exist_ok=True)
    write_csv(pd.DataFrame(rows), experiment.folder / "gallery.csv")
    path: Path = gallery(drawn, rows, experiment.folder)
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"))
    print(f"Gallery: {path}")
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
