"""Data sets as uint8 arrays, each decoded once into a cache; adding one is a class with a `read`."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from PIL import __version__ as pillow

from .data import Augmentation, ImageSet
from .files import share
from .images import DataError, LeftOut, fingerprint, images_in, is_folder, is_service, normal, printable, read_image
from .registry import Registry

dataset = Registry("data set")

# Goes up when the decoding below changes: caches made before are not used again.
CACHE_VERSION = 2

Array = NDArray[np.uint8]
CROP_AND_FLIP = Augmentation(crop=1 / 8, flip=True)


@dataclass(frozen=True)
class Splits:
    """What a data set reads: images as (N, H, W, C) or (N, H, W) uint8, labels as integers from 0.

    Attributes:
        notes: what a user should know of the reading, one line each, e.g. which files were left out.
        classes: their names, for messages; empty where they have none.
    """

    train_images: Array
    train_labels: NDArray[Any]
    test_images: Array
    test_labels: NDArray[Any]
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    classes: tuple[str, ...] = field(default=(), kw_only=True)


class DataSource:
    """A data set by name. `read` takes the folder that holds it, and may be slow: it runs once.

    Attributes:
        title: as printed.
        size: images are scaled to this many pixels a side; other shapes are stretched to a square.
        augmentation: what is usual for such images; `dataset.augmentation` overrides it.
        how: how to get it, one line.
        download: true if `read` can fetch or make it by itself.
        embedded: true if it needs no file under the root.
        channels, train_counts, test_counts: its published size, images of each class in each split, by which a grid is
            planned where the files are missing; no counts where nothing is published.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    size: ClassVar[int] = 32
    augmentation: ClassVar[Augmentation] = CROP_AND_FLIP
    how: ClassVar[str] = ""
    download: ClassVar[bool] = True
    embedded: ClassVar[bool] = False
    channels: ClassVar[int] = 3
    train_counts: ClassVar[tuple[int, ...]] = ()
    test_counts: ClassVar[tuple[int, ...]] = ()

    def paths(self, root: Path, size: int) -> Sequence[Path]:
        """The files and folders that `read` reads: when they change, they are decoded again."""
        return ()

    def read(self, root: Path, size: int, download: bool) -> Splits:
        """Raises FileNotFoundError or RuntimeError where the files are missing, DataError where they are wrong."""
        raise NotImplementedError


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set without loading an image.

    Attributes:
        digest: of the decoded arrays; part of the identity of every stage.
        shape: (C, H, W).
        train_counts, test_counts: images of each class.
        mean, std: per channel, of the training images in [0, 1].
        folder: of the cached arrays.
        augmentation: of training images.
        notes: what a user should know of the reading, one line each.
        root: the folder that it was read from; None for an embedded one.
    """

    name: str
    title: str
    digest: str
    shape: tuple[int, int, int]
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folder: Path
    augmentation: Augmentation = field(default_factory=Augmentation)
    notes: tuple[str, ...] = ()
    root: Path | None = None

    @property
    def num_classes(self) -> int:
        return len(self.train_counts)

    def augmented(self, **chosen: Any) -> DatasetInfo:
        """The same data set with these settings of its augmentation, by name, in place of its own."""
        return replace(self, augmentation=replace(self.augmentation, **chosen))

    def load(self, split: str) -> ImageSet:
        """`train` or `test`, on the CPU: the images are the file itself, mapped into memory that processes share.

        The first load of a file in a process verifies its checksum. Damaged arrays are set aside and decoded again.

        Raises:
            DataError: they are damaged, and the files that they were decoded from are gone or have changed.
        """
        folder = self.folder if self._is_intact(split) else self._decoded_again()
        # Copy on write: torch has no tensors that cannot be written to.
        images = np.load(folder / f"{split}_images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)
        return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))

    def _is_intact(self, split: str) -> bool:
        facts = facts_of(self.folder)
        if facts is None or facts["digest"] != self.digest:
            return False
        return all(_has_checksum(self.folder / name, facts["checksums"][name]) for name in _array_files(split))

    def _decoded_again(self) -> Path:
        aside = _set_aside(self.folder)
        try:
            again = prepare(self.name, self.root or Path(), self.folder.parent, self.shape[1])
        except FileNotFoundError as error:
            raise DataError(f"the cached images of {self.name} are damaged ({aside}), and {error}") from error
        if again.digest != self.digest:
            raise DataError(
                f"the cached images of {self.name} are damaged ({aside}), and the files under {self.root} have changed "
                f"since this command began (digest {self.digest}, now {again.digest}); run the same command again"
            )
        return again.folder

    def to_json(self) -> dict[str, Any]:
        """For a process on another machine: all paths are absolute."""
        root = str(self.root.resolve()) if self.root else None
        return {**asdict(self), "folder": str(self.folder.resolve()), "root": root}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> DatasetInfo:
        facts: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
        }
        facts["folder"] = Path(fields["folder"])
        facts["root"] = Path(fields["root"]) if fields["root"] else None
        facts["augmentation"] = Augmentation(**fields["augmentation"])
        return cls(**facts)


def source(name: str) -> DataSource:
    """The data set of this name; `folder:NAME` is any image folder.

    Raises:
        LookupError: there is none; the message lists the near names.
    """
    if name.startswith("folder:"):
        return ImageFolder(name.removeprefix("folder:"))
    instance: DataSource = dataset[name]()
    return instance


def as_published(name: str, size: int | None = None) -> DatasetInfo | None:
    """What is known of a data set without its files, for a plan; None where no size is published.

    It has no digest, so that no stored stage is found by it, and no folder to load from.

    Raises:
        LookupError: no such data set.
        DataError: no such size.
    """
    kind = source(name)
    if not kind.train_counts:
        return None
    pixels = _pixels(kind, size)
    channels = kind.channels
    return DatasetInfo(
        name=name,
        title=kind.title,
        digest="",
        shape=(channels, pixels, pixels),
        train_counts=kind.train_counts,
        test_counts=kind.test_counts,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        folder=Path(),
        augmentation=kind.augmentation,
    )


def _pixels(kind: DataSource, size: int | None) -> int:
    """Pixels a side: those that are asked for, or the data set's own."""
    if size is not None and size < 1:
        raise DataError(f"dataset.size is {size}; it must be at least 1 (null: the data set's own)")
    return kind.size if size is None else size


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def prepare(
    name: str,
    root: Path,
    cache: Path,
    size: int | None = None,
    download: bool = False,
    say: Callable[[str], None] = _warn,
) -> DatasetInfo:
    """Decode a data set into the cache, if it is not there, and say what it is.

    The cache is found by the data set, the root, and the names, sizes and times of the files beneath it. If these files
    are all gone, the images that were decoded from them last are used.

    Args:
        root: the folder under which data sets lie, each in a folder or an archive of its name.
        cache: where decoded arrays are kept.
        size: pixels a side; None takes the data set's own.
        say: takes a line for the user: files left out, a damaged cache, files that are gone.

    Raises:
        LookupError: no such data set.
        FileNotFoundError: it is not there; the message says how to get it.
        DataError: it is there and cannot be used.
    """
    kind = source(name)
    size = _pixels(kind, size)
    cached = _Cached(kind, name, root, cache, size)
    folder = cached.folder()
    facts = None if folder is None else facts_of(folder)
    if folder is not None and facts is None and os.path.lexists(folder):
        say(f"warning: the cached images of {name} are damaged and were set aside: {_set_aside(folder)}")
    if folder is None and not download and (last := cached.last()):
        folder, facts = last, facts_of(last)
        say(f"warning: {name} is no longer under {root}; the images decoded from there before are used ({folder})")
    if facts is None:
        try:
            splits = kind.read(root, size, download)
        except (FileNotFoundError, RuntimeError) as error:
            fetch = f"run `python -m bench.data {name}`" if kind.download else kind.how
            raise FileNotFoundError(
                f"data set {name} is not under {root} ({' '.join(str(error).split())}): {fetch}, "
                "or set dataset.root (or $BENCH_DATA) to the folder that holds it"
            ) from error
        # What was fetched changes what is there.
        folder = cached.folder() if download or folder is None else folder
        if folder is None:
            folder = cached.named("unknown")
        facts = _store(folder, splits, size, name)
        for note in facts["notes"]:
            say(f"{name}: {note}")
    assert folder is not None
    known: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    del known["checksums"]
    where = None if kind.embedded else root
    return DatasetInfo(name=name, title=kind.title, folder=folder, augmentation=kind.augmentation, root=where, **known)


class _Cached:
    """Where the decoded arrays of a data set lie: the folder's name has the root and the state of its files in it."""

    def __init__(self, kind: DataSource, name: str, root: Path, cache: Path, size: int) -> None:
        self.kind, self.root, self.cache, self.size = kind, root.resolve(), cache, size
        origin = "" if kind.embedded else "-" + hashlib.sha256(f"{self.root}\0{name}".encode()).hexdigest()[:8]
        self.prefix = f"{quote(name, safe='')[:80]}{origin}"

    def named(self, state: str) -> Path:
        return self.cache / f"{self.prefix}{state and '-'}{state}-{self.size}px-v{CACHE_VERSION}"

    def folder(self) -> Path | None:
        """For the files as they are now; None: there are none."""
        paths = self.kind.paths(self.root, self.size)
        if not paths:
            return self.named("" if self.kind.embedded else "unknown")
        state = fingerprint(paths, self.root)
        return None if state is None else self.named(state)

    def last(self) -> Path | None:
        """The latest intact folder that was decoded from this root."""
        folders = self.cache.glob(f"{self.prefix}-*-{self.size}px-v{CACHE_VERSION}")
        return max(
            (folder for folder in folders if facts_of(folder)), key=lambda path: path.stat().st_mtime, default=None
        )


def _array_files(split: str) -> tuple[str, str]:
    return f"{split}_images.npy", f"{split}_labels.npy"


def _store(folder: Path, splits: Splits, size: int, name: str) -> dict[str, Any]:
    """Write arrays and facts into a folder that appears by one rename; returns the facts.

    Raises:
        DataError: a class has no image in a split.
    """
    counts = _counts(splits, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary_folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    digest = hashlib.sha256()
    facts: dict[str, Any] = {**counts, "notes": list(splits.notes), "checksums": {}}
    for split in ("train", "test"):
        images = _channels_first(getattr(splits, f"{split}_images"), size)
        labels = np.ascontiguousarray(getattr(splits, f"{split}_labels"), dtype=np.int64)
        arrays: tuple[NDArray[Any], NDArray[Any]] = (images, labels)
        for file, array in zip(_array_files(split), arrays, strict=True):
            np.save(temporary_folder / file, array)
            facts["checksums"][file] = _checksum(temporary_folder / file)
        digest.update(repr(images.shape).encode() + images.tobytes() + labels.tobytes())
        if split == "train":
            # By parts: float64 of a whole large set would not fit.
            total = np.zeros(images.shape[1])
            square = np.zeros(images.shape[1])
            for chunk in np.array_split(images, max(1, len(images) // 5000)):
                scaled = chunk.astype(np.float64) / 255
                total += scaled.sum((0, 2, 3))
                square += (scaled**2).sum((0, 2, 3))
            count = images.size / images.shape[1]
            mean = total / count
            facts |= {"shape": list(images.shape[1:]), "mean": mean.round(6).tolist()}
            # A constant channel would divide by zero.
            facts["std"] = np.sqrt(np.maximum(square / count - mean**2, 1e-6)).round(6).tolist()
    share(temporary_folder, 0o777)  # a temporary folder is its owner's alone; a cache is for everybody
    facts["digest"] = digest.hexdigest()[:16]
    write_facts(temporary_folder, facts)
    try:
        os.rename(temporary_folder, folder)
    except OSError:
        shutil.rmtree(temporary_folder)  # another process was faster, with the same arrays
        if facts_of(folder) is None:
            raise
    return facts


def _counts(splits: Splits, name: str) -> dict[str, list[int]]:
    """Images of each class in each split.

    Raises:
        DataError: a class has none.
    """
    both = (splits.train_labels, splits.test_labels)
    if not all(len(labels) for labels in both):
        raise DataError(f"data set {name} has {len(both[0])} training and {len(both[1])} test images")
    classes = max(len(splits.classes), *(int(labels.max()) + 1 for labels in both))
    counts = {}
    for split, labels in zip(("train", "test"), both, strict=True):
        per_class = np.bincount(labels, minlength=classes)
        for label in np.flatnonzero(per_class == 0)[:1]:
            title = f"{printable(splits.classes[label])!r}" if splits.classes else str(label)
            kind = {"train": "training", "test": "test"}[split]
            raise DataError(f"data set {name}: class {title} has no {kind} image; add images, or remove the class")
        counts[f"{split}_counts"] = per_class.tolist()
    return counts


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write `meta.json`: the facts of a cached data set, with their own checksum."""
    text = json.dumps(facts, sort_keys=True)
    whole = {"facts": facts, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(whole))


def facts_of(folder: Path) -> dict[str, Any] | None:
    """The facts of a cached data set; None where they are missing, damaged or somebody else's."""
    try:
        whole = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        facts: dict[str, Any] = whole["facts"]
        text = json.dumps(facts, sort_keys=True)
        return facts if hashlib.sha256(text.encode()).hexdigest() == whole["sha256"] else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Files whose checksum this process has verified: path, inode, size, time.
_verified: set[tuple[str, int, int, int]] = set()


def _has_checksum(path: Path, checksum: str) -> bool:
    """Is the file the one that was written? Hashed once per process: about 0.4 s for 60,000 images of 32x32."""
    try:
        status = path.stat()
        version = (str(path.absolute()), status.st_ino, status.st_size, status.st_mtime_ns)
        if version not in _verified:
            if _checksum(path) != checksum:
                return False
            _verified.add(version)
        return True
    except OSError:
        return False


def _set_aside(folder: Path) -> Path:
    """Rename a damaged cache, so that nothing reads it and whoever cares can look at it."""
    aside = folder.with_name(f"damaged-{time.time_ns()}-{folder.name}")
    with contextlib.suppress(FileNotFoundError):  # another process has done it, or somebody deleted the folder
        os.rename(folder, aside)
    return aside


def _channels_first(images: Array, size: int) -> Array:
    """(N, H, W[, C]) -> (N, C, size, size)."""
    images = images[..., None] if images.ndim == 3 else images
    if images.shape[1:3] != (size, size):
        flat = images.squeeze(-1) if images.shape[-1] == 1 else images
        scaled = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in flat]
        images = np.stack(scaled)
        images = images[..., None] if images.ndim == 3 else images
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _decode(paths: Sequence[Path], size: int, left_out: LeftOut | None = None) -> Array:
    """Image files as one (N, size, size, 3) array, decoded by all cores.

    Raises:
        DataError: a file cannot be decoded.
    """

    def one(path: Path) -> tuple[Array, bool]:
        image, has_more = read_image(path)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image), has_more

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `read_image` refuses what this warns of
        arrays = []
        for path, (array, has_more) in zip(paths, pool.map(one, paths), strict=True):
            arrays.append(array)
            if has_more and left_out:
                left_out.add("files with more frames than the first, which is read", path.suffix.lower())
    return np.stack(arrays)


def _stored(root: Path, name: str) -> Path | None:
    """The folder `root/name`, or the archive `root/name.tar.*`; None: neither is there."""
    archives = [path for ending in ("tar", "tar.*", "tgz") for path in sorted(root.glob(f"{name}.{ending}"))]
    return root / name if (root / name).is_dir() else next(iter(archives), None)


def _unpacked(root: Path, name: str, read: Callable[[Path], Splits]) -> Splits:
    """Read the folder `root/name`, or the archive `root/name.tar.*` unpacked for the moment.

    Raises:
        FileNotFoundError: neither is there.
        DataError: the archive is damaged, or would write outside its folder.
    """
    stored = _stored(root, name)
    if stored is None:
        raise FileNotFoundError(f"neither {root / name}/ nor {root / name}.tar* exists")
    if stored.is_dir():
        return read(stored)
    with tempfile.TemporaryDirectory() as unpacked:
        try:
            with tarfile.open(stored) as archive:
                # Nothing outside the folder, no device files; Python before 3.11.4 may lack the filter.
                archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
                archive.extractall(unpacked)
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
            raise DataError(f"{printable(stored)} cannot be unpacked: {' '.join(str(error).split())}") from error
        return read(Path(unpacked))


def _names_in(folder: Path) -> str:
    """What a folder holds, for messages."""
    names = sorted(path.name for path in folder.iterdir() if not is_service(path.name))
    return ", ".join(map(printable, names[:8])) + (", ..." if len(names) > 8 else "") if names else "nothing"


@dataset("digits")
class Digits(DataSource):
    """1,797 grey handwritten digits of scikit-learn, inside the package; every fifth image is a test image."""

    title = "digits"
    size = 16  # twice their own: at 8x8 a patch would be a single pixel
    augmentation = Augmentation(crop=1 / 16)  # a mirrored digit is another or none
    download = False
    embedded = True

    def read(self, root: Path, size: int, download: bool) -> Splits:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        # Drawn, not cut: neighbours in the file were written by one hand.
        order = np.random.default_rng(0).permutation(len(images))
        test, train = order[: len(order) // 5], order[len(order) // 5 :]
        return Splits(images[train], digits.target[train], images[test], digits.target[test])


def _torchvision(kind: str, root: Path, download: bool, size: int, **by_split: tuple[Any, Any]) -> Splits:
    """Both splits of a torchvision class that holds its images as one array."""
    import torchvision.datasets

    (key, (train, test)) = next(iter(by_split.items()))
    arrays = []
    for split in (train, test):
        split_set = getattr(torchvision.datasets, kind)(str(root), download=download, **{key: split})
        labels = split_set.targets if hasattr(split_set, "targets") else split_set.labels
        images = np.asarray(split_set.data)
        # SVHN alone keeps channels first.
        images = images.transpose(0, 2, 3, 1) if images.ndim == 4 and images.shape[1] == 3 else images
        arrays += [images, np.asarray(labels)]
    return Splits(*arrays)


@dataset("cifar10")
class Cifar10(DataSource):
    """60,000 photographs of ten things, 32x32."""

    title = "CIFAR-10"
    train_counts = (5_000,) * 10
    test_counts = (1_000,) * 10

    def paths(self, root: Path, size: int) -> Sequence[Path]:
        return [root / "cifar-10-batches-py"]

    def read(self, root: Path, size: int, download: bool) -> Splits:
        return _torchvision("CIFAR10", root, download, size, train=(True, False))


@dataset("cifar100")
class Cifar100(DataSource):
    """60,000 photographs of a hundred things, 32x32."""

    title = "CIFAR-100"
    train_counts = (500,) * 100
    test_counts = (100,) * 100

    def paths(self, root: Path, size: int) -> Sequence[Path]:
        return [root / "cifar-100-python"]

    def read(self, root: Path, size: int, download: bool) -> Splits:
        return _torchvision("CIFAR100", root, download, size, train=(True, False))


@dataset("svhn")
class Svhn(DataSource):
    """99,289 house numbers, 32x32."""

    title = "SVHN"
    train_counts = (4_948, 13_861, 10_585, 8_497, 7_458, 6_882, 5_727, 5_595, 5_045, 4_659)
    test_counts = (1_744, 5_099, 4_149, 2_882, 2_523, 2_384, 1_977, 2_019, 1_660, 1_595)
    augmentation = Augmentation(crop=1 / 8)

    def paths(self, root: Path, size: int) -> Sequence[Path]:
        return [root / f"{split}_32x32.mat" for split in ("train", "test")]

    def read(self, root: Path, size: int, download: bool) -> Splits:
        return _torchvision("SVHN", root, download, size, split=("train", "test"))


@dataset("fashion_mnist")
class FashionMnist(DataSource):
    """70,000 grey pictures of clothes, 28x28."""

    title = "Fashion-MNIST"
    channels = 1
    train_counts = (6_000,) * 10
    test_counts = (1_000,) * 10
    size = 28

    def paths(self, root: Path, size: int) -> Sequence[Path]:
        return [root / "fashion-mnist", root / "FashionMNIST" / "raw"]

    def read(self, root: Path, size: int, download: bool) -> Splits:
        # Debian's package dataset-fashion-mnist has the files packed, which torchvision does not read.
        packed = root / "fashion-mnist"
        if packed.is_dir():
            return Splits(*(_idx(packed / f"{name}-ubyte.gz") for name in _IDX))
        return _torchvision("FashionMNIST", root, download, size, train=(True, False))


_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def _idx(path: Path) -> Array:
    """An array in the IDX format of MNIST, gzipped: two zero bytes, type, rank, the sizes, the bytes.

    Raises:
        DataError: the file is damaged.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
        rank = raw[3]
        shape = np.frombuffer(raw, dtype=">u4", count=rank, offset=4).astype(int)
        return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (gzip.BadGzipFile, zlib.error, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{printable(path)} cannot be used: {error}") from error


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


@dataset("gtsrb")
class Gtsrb(DataSource):
    """51,839 German traffic signs of 43 classes, scaled to 32x32.

    Read as published or as torchvision lays it out. Its download is not torchvision's, which is the competition's
    training set: 26,640 of the 39,209 images.
    """

    title = "GTSRB"
    train_counts = _numbers(
        "210 2220 2250 1410 1980 1860 420 1440 1410 1470 2010 1320 2100 2160 780 630 420 1110 1200 210 360 "
        "330 390 510 270 1500 600 240 540 270 450 780 240 689 420 1200 390 210 2070 300 360 240 240"
    )
    test_counts = _numbers(
        "60 720 750 450 660 630 150 450 450 480 660 420 690 720 270 210 150 360 390 60 90 90 120 150 90 480 "
        "180 60 150 90 150 270 60 210 120 390 120 60 690 90 90 60 90"
    )
    images: ClassVar[tuple[int, int]] = (39_209, 12_630)
    url = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
    archives: ClassVar[dict[str, str]] = {
        "GTSRB_Final_Training_Images.zip": "f33fd80ac59bff73c82d25ab499e03a3",
        "GTSRB_Final_Test_Images.zip": "c7e4e6327067d32654124b0fe9e82185",
        "GTSRB_Final_Test_GT.zip": "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
    }
    augmentation = Augmentation(crop=1 / 16, rotation=10)  # a mirrored sign is another sign

    def paths(self, root: Path, size: int) -> Sequence[Path]:
        stored = _stored(root, self._name(root, size))
        return [stored or root / "gtsrb"]

    def read(self, root: Path, size: int, download: bool) -> Splits:
        if download:
            from torchvision.datasets.utils import download_and_extract_archive

            for name, md5 in self.archives.items():
                download_and_extract_archive(f"{self.url}/{name}", str(root / "gtsrb"), md5=md5)
        return _unpacked(root, self._name(root, size), lambda folder: self._read(folder, size))

    def _name(self, root: Path, size: int) -> str:
        """An archive of images that were scaled to this size serves as well as the whole set."""
        scaled = f"gtsrb{size}"
        return scaled if not (root / "gtsrb").is_dir() and list(root.glob(f"{scaled}.tar.*")) else "gtsrb"

    def _read(self, folder: Path, size: int) -> Splits:
        folder = folder / "gtsrb" if (folder / "gtsrb").is_dir() else folder  # an archive holds the folder itself
        train = folder / "GTSRB" / "Final_Training" / "Images"
        if not train.is_dir():
            train = folder / "GTSRB" / "Training"
        truth = folder / "GT-final_test.csv"
        if not train.is_dir() or not truth.is_file():
            raise FileNotFoundError(
                f"{folder} holds {_names_in(folder)}; as published it has GTSRB/Final_Training/Images (or "
                f"GTSRB/Training) and {truth.name}, and other sites arrange it differently"
            )
        left_out = LeftOut()
        files: list[list[tuple[Path, int]]] = [[], []]
        for path in images_in(train, left_out, expected=(".csv",)):
            label = path.relative_to(train).parts[0]
            if not (label.isascii() and label.isdecimal()):
                raise DataError(f"{printable(path)}: the folders of {train} are numbers of classes")
            files[0].append((path, int(label)))
        with truth.open(newline="", encoding="utf-8", errors="replace") as rows:
            for number, row in enumerate(csv.DictReader(rows, delimiter=";"), 2):
                try:
                    files[1].append((folder / "GTSRB" / "Final_Test" / "Images" / row["Filename"], int(row["ClassId"])))
                except (KeyError, TypeError, ValueError):
                    raise DataError(
                        f"{printable(truth)}, line {number}: needs the columns Filename and ClassId, separated by ;"
                    ) from None
        _check_whole(
            folder,
            files,
            self.images,
            "; GTSRB_Final_Training_Images.zip has the training images (26640: "
            "the competition's, as torchvision fetches it)",
        )
        return _splits(files, size, left_out)


def _check_whole(folder: Path, files: Sequence[Sequence[Any]], images: tuple[int, int], advice: str) -> None:
    """Raises FileNotFoundError where a published data set is not all there."""
    counts = (len(files[0]), len(files[1]))
    if counts != images:
        raise FileNotFoundError(
            f"{folder} holds {counts[0]} + {counts[1]} images; the whole set has {images[0]} + {images[1]}{advice}"
        )


def _splits(
    files: Sequence[Sequence[tuple[Path, int]]], size: int, left_out: LeftOut, classes: Sequence[str] = ()
) -> Splits:
    """Decode the training and test files, each with its label."""
    arrays: list[Any] = []
    for split in files:
        arrays += [_decode([path for path, _ in split], size, left_out), np.array([label for _, label in split])]
    return Splits(*arrays, notes=(line,) if (line := left_out.line()) else (), classes=tuple(classes))


class ImageFolder(DataSource):
    """Any folder of `train/<class>/**` and `test/<class>/**` (or `val`), classes in alphabetical order.

    Reads what torchvision's ImageFolder reads, except for service files and folders (`bench.engine.images`).
    """

    augmentation = Augmentation(crop=1 / 8)  # a mirrored image may be of another class: letters, arrows, sides
    download = False

    def __init__(self, folder: str) -> None:
        self.folder = folder
        parts = PurePosixPath(folder).parts
        if str(PurePosixPath(folder)) != folder or not parts or parts[0] == "/" or {".", ".."} & {folder, *parts}:
            raise LookupError(
                f"'folder:{printable(folder)}': write folder:NAME for the folder NAME under dataset.root, without "
                "/ at either end and without . and ..; what lies above it goes into dataset.root"
            )

    @property
    def title(self) -> str:  # type: ignore[override]
        return self.folder

    @property
    def how(self) -> str:  # type: ignore[override]
        return (
            f"put it there as {self.folder}/train/<class>/* and {self.folder}/test/<class>/*, or as a .tar of the two"
        )

    def paths(self, root: Path, size: int) -> Sequence[Path]:
        return [_stored(root, self.folder) or root / self.folder]

    def read(self, root: Path, size: int, download: bool) -> Splits:
        return _unpacked(root, self.folder, lambda folder: self._read(folder, size))

    def _read(self, folder: Path, size: int) -> Splits:
        if (folder / self.folder / "train").is_dir():
            folder = folder / self.folder  # many archives hold the folder itself, not what is in it
        left_out = LeftOut()
        # An unlabelled test/ may lie beside a labelled val/.
        names = [name for name in ("test", "val") if (folder / name).is_dir()]
        test = next((name for name in names if _classes_in(folder / name)), "")
        if not (folder / "train").is_dir() or not test:
            raise FileNotFoundError(
                f"{folder} holds {_names_in(folder)}; it needs train/<class>/ and test/<class>/ (or val/<class>/), in "
                "lower case"
            )
        for entry in folder.iterdir():
            if is_service(entry.name):
                left_out.add("service files or folders", entry.name)
            elif entry.name not in ("train", test):
                left_out.add(f"files or folders beside train/ and {test}/", entry.name)
        by_split = {split: _classes_in(folder / split, left_out) for split in ("train", test)}
        classes = sorted(by_split["train"])
        strangers = sorted(set(classes) ^ set(by_split[test]))
        if strangers:
            some = ", ".join(map(printable, strangers[:5]))
            raise DataError(f"{folder}: the classes of train/ and {test}/ differ: {some}")
        files: list[list[tuple[Path, int]]] = []
        for split, folders in by_split.items():
            images = {name: [path for part in folders[name] for path in images_in(part, left_out)] for name in classes}
            if not any(images.values()):
                raise FileNotFoundError(f"no image under {folder / split}/<class>/")
            empty = [printable(name) for name in classes if not images[name]]
            if empty:
                raise DataError(
                    f"{folder / split}: no image in {', '.join(empty[:5])}; add images, or remove the class from both "
                    "splits"
                )
            files.append([(path, label) for label, name in enumerate(classes) for path in images[name]])
        return _splits(files, size, left_out, classes)


def _classes_in(folder: Path, left_out: LeftOut | None = None) -> dict[str, list[Path]]:
    """The folders of each class, by its name in NFC; links to folders count."""
    left_out = left_out or LeftOut()
    folders_of: dict[str, list[Path]] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_service(entry.name):
                left_out.add("service files or folders", entry.name)
            elif is_folder(entry):
                folders_of.setdefault(normal(entry.name), []).append(Path(entry.path))
            else:
                left_out.add("files outside the folders of classes", entry.name)
    return folders_of


@dataset("cifar10_jpeg")
class Cifar10Jpeg(ImageFolder):
    """CIFAR-10 with every image saved once as JPEG: clean accuracy is a little lower than on CIFAR-10.

    Read from the folder or archive `cifar10_jpeg`, or else made from CIFAR-10 under the same root. The published tables
    have the digest 68bbfc5b79429794; their files have this quality and subsampling.
    """

    title = "CIFAR-10 (JPEG)"
    train_counts = (5_000,) * 10
    test_counts = (1_000,) * 10
    augmentation = CROP_AND_FLIP
    download = True
    encoding: ClassVar[dict[str, Any]] = {"quality": 75, "subsampling": "4:2:0"}

    def __init__(self) -> None:
        super().__init__("cifar10_jpeg")

    def paths(self, root: Path, size: int) -> Sequence[Path]:
        stored = _stored(root, self.folder)
        return [stored] if stored else Cifar10().paths(root, size)

    def read(self, root: Path, size: int, download: bool) -> Splits:
        if _stored(root, self.folder):
            return super().read(root, size, download)
        try:
            original = Cifar10().read(root, size, download)
        except (FileNotFoundError, RuntimeError) as error:
            raise FileNotFoundError(
                f"neither {self.folder}/train/<class>/* nor {self.folder}.tar*, nor CIFAR-10 to make it from: {error}"
            ) from error
        arrays: list[Any] = []
        for split in ("train", "test"):
            images, labels = getattr(original, f"{split}_images"), getattr(original, f"{split}_labels")
            order = np.argsort(labels, kind="stable")  # as an image folder has them: class by class
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                arrays += [np.stack(list(pool.map(self._encoded, images[order]))), labels[order]]
        settings = ", ".join(f"{key} {value}" for key, value in self.encoding.items())
        jpeg = features.version("libjpeg_turbo") or features.version("jpg")
        note = f"made from CIFAR-10 with Pillow {pillow} and libjpeg {jpeg}: {settings}"
        return Splits(*arrays, notes=(note,))

    def _encoded(self, image: Array) -> Array:
        """An image as it comes back from a JPEG file."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", **self.encoding)
        return np.asarray(Image.open(file))


@dataset("tiny_imagenet")
class TinyImageNet(DataSource):
    """110,000 photographs of 200 things, 64x64, as `tiny-imagenet-200/` is unpacked."""

    title = "Tiny-ImageNet"
    train_counts = (500,) * 200
    test_counts = (50,) * 200
    size = 64
    images: ClassVar[tuple[int, int]] = (100_000, 10_000)
    download = False
    how = "unpack tiny-imagenet-200.zip there"

    def paths(self, root: Path, size: int) -> Sequence[Path]:
        folder = root / "tiny-imagenet-200"
        return [folder / name for name in ("wnids.txt", "train", "val")]

    def read(self, root: Path, size: int, download: bool) -> Splits:
        folder, left_out = root / "tiny-imagenet-200", LeftOut()
        classes = (folder / "wnids.txt").read_text(encoding="utf-8", errors="replace").split()
        label = {name: index for index, name in enumerate(classes)}
        train: list[tuple[Path, int]] = []
        by_class = _classes_in(folder / "train", left_out)
        for name in classes:
            paths = [
                path
                for class_folder in by_class.get(name, [])
                for path in images_in(class_folder, left_out, expected=(".txt",))
            ]
            train += [(path, label[name]) for path in paths]
        test = self._test(folder / "val", label, left_out)
        _check_whole(folder, (train, test), self.images, "; unpack tiny-imagenet-200.zip again")
        return _splits((train, test), size, left_out, classes)

    def _test(self, folder: Path, label: dict[str, int], left_out: LeftOut) -> list[tuple[Path, int]]:
        """The test images, as the list has them; without it by the folder of a class that they were moved to.

        Raises:
            DataError: a line of the list is wrong.
        """
        images, listed = images_in(folder, left_out, expected=(".txt",)), folder / "val_annotations.txt"
        if not listed.exists():
            moved = [(path, path.relative_to(folder).parts[0]) for path in images]
            strangers = sorted({name for _, name in moved} - set(label))
            if strangers:
                raise DataError(f"{listed} is missing, and {strangers[0]} in {folder} is not a class of wnids.txt")
            # The order of the list: val_0, val_1, ..., val_10.
            moved.sort(key=lambda image: (len(image[0].name), image[0].name))
            return [(path, label[name]) for path, name in moved]
        by_name, test = {path.name: path for path in images}, []
        lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name, _, rest = line.partition("\t")
            wnid = rest.partition("\t")[0].strip()
            if wnid not in label:
                raise DataError(f"{listed}, line {number}: {printable(wnid)!r} is not a class of wnids.txt")
            if name not in by_name:
                raise DataError(f"{listed}, line {number}: {printable(name)} is not under {folder}")
            test.append((by_name[name], label[wnid]))
        return test
