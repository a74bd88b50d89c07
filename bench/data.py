"""Fetch a data set if it can be fetched, and decode it once into the cache.

python -m bench.data NAME [...] [dataset.root=DIR] [dataset.cache=DIR] [dataset.size=PIXELS]

Files that are added, removed or changed later are decoded again; the digest says whether the images are the same.
"""

from __future__ import annotations

from pathlib import Path

from bench._command import run_command


def main(arguments: list[str]) -> int:
    from bench.engine.datasets import DataError, dataset, prepare, source
    from bench.engine.errors import UserError, message_of
    from bench.experiment.load import load

    wanted = [argument for argument in arguments if "=" not in argument]
    if not wanted:
        raise UserError(f"name a data set: {', '.join(sorted(dataset))}, or folder:NAME for any image folder")
    cfg = load([argument for argument in arguments if "=" in argument]).dataset
    for name in wanted:
        root, cache = Path(cfg.root), Path(cfg.cache)
        told: list[str] = []
        try:
            try:
                info = prepare(name, root, cache, cfg.size, say=told.append)
            except FileNotFoundError as missing:
                if not source(name).download:
                    raise
                try:
                    info = prepare(name, root, cache, cfg.size, download=True, say=told.append)
                except (OSError, RuntimeError) as error:
                    raise UserError(f"{message_of(missing)}; fetching it failed: {message_of(error)}") from error
            for split in ("train", "test"):
                info.load(split)  # verifies what is in the cache
        except (LookupError, OSError, RuntimeError, DataError) as error:
            raise UserError(message_of(error)) from error
        print(
            f"{info.title}: {sum(info.train_counts)} + {sum(info.test_counts)} images of {info.num_classes} classes, "
            f"{'x'.join(map(str, info.shape))}, digest {info.digest}, in {info.folder}"
        )
        for line in dict.fromkeys([*told, *(f"{name}: {note}" for note in info.notes)]):
            print(line)
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
