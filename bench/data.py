"""Fetch a data set if it can be fetched, and decode it once into the cache.

python -m bench.data NAME [...] [dataset.root=DIR] [dataset.cache=DIR] [dataset.size=PIXELS]

Files that change later are not noticed: delete the data set's folder in the cache to decode it again.
"""

from __future__ import annotations

from pathlib import Path

from bench.door import enter


def main(arguments: list[str]) -> int:
    from bench.config import UserError, load, said
    from bench.engine.datasets import dataset, prepare

    wanted = [argument for argument in arguments if "=" not in argument]
    if not wanted:
        raise UserError(f"name a data set: {', '.join(sorted(dataset))}, or folder:NAME for any image folder")
    cfg = load([argument for argument in arguments if "=" in argument]).dataset
    for name in wanted:
        try:
            info = prepare(name, Path(cfg.root), Path(cfg.cache), cfg.size)
        except FileNotFoundError:
            try:
                info = prepare(name, Path(cfg.root), Path(cfg.cache), cfg.size, download=True)
            except (OSError, RuntimeError) as error:
                raise UserError(said(error)) from error
        except (LookupError, OSError) as error:
            raise UserError(said(error)) from error
        print(
            f"{info.title}: {sum(info.train_counts)} + {sum(info.test_counts)} images of {info.num_classes} classes, "
            f"{'x'.join(map(str, info.shape))}, digest {info.digest}, in {info.folder}"
        )
    return 0


if __name__ == "__main__":
    enter(main, __doc__)
