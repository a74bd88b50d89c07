"""Data sets as uint8 arrays, each decoded once into a cache; adding one is a class with a `read`."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .data import Augmentation, ImageSet
from .files import share
from .registry import Registry

dataset = Registry("data set")

# Goes up when the decoding below changes: caches made before are not used again.
CACHE_VERSION = 1

Array = NDArray[np.uint8]
CROP_AND_FLIP = Augmentation(crop=1 / 8, flip=True)


@dataclass(frozen=True)
class Splits:
    """What a data set reads: images as (N, H, W, C) or (N, H, W) uint8, labels as integers from 0."""

    train_images: Array
    train_labels: NDArray[Any]
    test_images: Array
    test_labels: NDArray[Any]


class DataSource:
    """A data set by name. `read` takes the folder that holds it, and may be slow: it runs once.

    Attributes:
        title: as printed.
        size: images are scaled to this many pixels a side.
        augmentation: what is usual for such images.
        how: how to get it, one line.
        download: true if `read` can fetch it by itself.
        channels, train_counts, test_counts: its published size, images of each class in each split, by which a grid is
            planned where the files are missing; no counts where nothing is published.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    size: ClassVar[int] = 32
    augmentation: ClassVar[Augmentation] = CROP_AND_FLIP
    how: ClassVar[str] = ""
    download: ClassVar[bool] = True
    channels: ClassVar[int] = 3
    train_counts: ClassVar[tuple[int, ...]] = ()
    test_counts: ClassVar[tuple[int, ...]] = ()

    def read(self, root: Path, size: int, download: bool) -> Splits:
        """Raises FileNotFoundError or RuntimeError where the files are missing."""
        raise NotImplementedError


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set without loading an image.

    Attributes:
        digest: of the decoded arrays; part of the identity of every stage.
        shape: (C, H, W).
        train_counts, test_counts: images of each class.
        mean, std: per channel, of the training images in [0, 1].
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

    @property
    def num_classes(self) -> int:
        return len(self.train_counts)

    @property
    def augmentation(self) -> Augmentation:
        return source(self.name).augmentation

    def load(self, split: str) -> ImageSet:
        """`train` or `test`, on the CPU: the images are the file itself, mapped into memory that processes share."""
        # Copy on write: torch has no tensors that cannot be written to.
        images = np.load(self.folder / f"{split}_images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(self.folder / f"{split}_labels.npy", allow_pickle=False)
        return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))


def source(name: str) -> DataSource:
    """The data set of this name; `folder:NAME` is any image folder.

    Raises:
        LookupError: there is none; the message lists the near names.
    """
    if name.startswith("folder:"):
        return ImageFolder(name.removeprefix("folder:"))
    found: DataSource = dataset[name]()
    return found


def as_published(name: str, size: int | None = None) -> DatasetInfo | None:
    """What is known of a data set without its files, for a plan; None where no size is published.

    It has no digest, so that no stored stage is found by it, and no folder to load from.

    Raises:
        LookupError: no such data set.
    """
    kind = source(name)
    if not kind.train_counts:
        return None
    pixels = size or kind.size
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
    )


def prepare(name: str, root: Path, cache: Path, size: int | None = None, download: bool = False) -> DatasetInfo:
    """Decode a data set into the cache, if it is not there, and say what it is.

    Args:
        root: the folder under which data sets lie, each in a folder or an archive of its name.
        cache: where decoded arrays are kept.
        size: pixels a side; None takes the data set's own.

    Raises:
        LookupError: no such data set.
        FileNotFoundError: it is not there; the message says how to get it.
    """
    kind = source(name)
    size = size or kind.size
    # Any folder can have this name: which one is meant depends on the root.
    place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8] + "-" if name.startswith("folder:") else ""
    folder = cache / f"{quote(name, safe='')}-{place}{size}px-v{CACHE_VERSION}"
    if not (folder / "meta.json").exists():
        try:
            splits = kind.read(root, size, download)
        except (FileNotFoundError, RuntimeError) as error:
            fetch = f"run `python -m bench.data {name}`" if kind.download else kind.how
            raise FileNotFoundError(
                f"data set {name} is not under {root} ({' '.join(str(error).split())}): {fetch}, "
                "or set dataset.root (or $BENCH_DATA) to the folder that holds it"
            ) from error
        _store(folder, splits, size)
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    facts: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in meta.items()}
    return DatasetInfo(name=name, title=kind.title, folder=folder, **facts)


def _store(folder: Path, splits: Splits, size: int) -> None:
    """Write arrays and facts into a folder that appears by one rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    digest = hashlib.sha256()
    facts: dict[str, Any] = {}
    classes = int(splits.train_labels.max()) + 1
    for split in ("train", "test"):
        images = _channels_first(getattr(splits, f"{split}_images"), size)
        labels = np.ascontiguousarray(getattr(splits, f"{split}_labels"), dtype=np.int64)
        np.save(beside / f"{split}_images.npy", images)
        np.save(beside / f"{split}_labels.npy", labels)
        digest.update(repr(images.shape).encode() + images.tobytes() + labels.tobytes())
        facts[f"{split}_counts"] = np.bincount(labels, minlength=classes).tolist()
        if split == "train":
            # By parts: float64 of a whole large set would not fit.
            total = np.zeros(images.shape[1])
            square = np.zeros(images.shape[1])
            for part in np.array_split(images, max(1, len(images) // 5000)):
                scaled = part.astype(np.float64) / 255
                total += scaled.sum((0, 2, 3))
                square += (scaled**2).sum((0, 2, 3))
            count = images.size / images.shape[1]
            mean = total / count
            facts |= {"shape": list(images.shape[1:]), "mean": mean.round(6).tolist()}
            # A constant channel would divide by zero.
            facts["std"] = np.sqrt(np.maximum(square / count - mean**2, 1e-6)).round(6).tolist()
    share(beside, 0o777)  # a temporary folder is its owner's alone; a cache is for everybody
    facts["digest"] = digest.hexdigest()[:16]
    (beside / "meta.json").write_text(json.dumps(facts))
    try:
        os.rename(beside, folder)
    except OSError:
        shutil.rmtree(beside)  # another process was faster, with the same arrays
        if not (folder / "meta.json").exists():
            raise


def _channels_first(images: Array, size: int) -> Array:
    """(N, H, W[, C]) -> (N, C, size, size)."""
    images = images[..., None] if images.ndim == 3 else images
    if images.shape[1:3] != (size, size):
        flat = images.squeeze(-1) if images.shape[-1] == 1 else images
        scaled = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in flat]
        images = np.stack(scaled)
        images = images[..., None] if images.ndim == 3 else images
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _decode(paths: Sequence[Path], size: int, grey: bool = False) -> Array:
    """Image files as one (N, size, size[, 3]) array, decoded by all cores."""

    def one(path: Path) -> Array:
        with Image.open(path) as file:
            image = file.convert("L" if grey else "RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(one, paths, chunksize=256)))


def _unpacked(root: Path, name: str, read: Callable[[Path], Splits]) -> Splits:
    """Read the folder `root/name`, or the archive `root/name.tar.*` unpacked for the moment."""
    if (root / name).is_dir():
        return read(root / name)
    archives = [path for ending in ("tar", "tar.*", "tgz") for path in sorted(root.glob(f"{name}.{ending}"))]
    if not archives:
        raise FileNotFoundError(f"neither {root / name}/ nor {root / name}.tar* exists")
    with tempfile.TemporaryDirectory() as unpacked, tarfile.open(archives[0]) as archive:
        # Nothing outside the folder, no device files; Python before 3.11.4 may lack the filter.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        archive.extractall(unpacked)
        return read(Path(unpacked))


@dataset("digits")
class Digits(DataSource):
    """1,797 grey handwritten digits of scikit-learn, inside the package; every fifth image is a test image."""

    title = "digits"
    size = 16  # twice their own: at 8x8 a patch would be a single pixel
    augmentation = Augmentation(crop=1 / 16)  # a mirrored digit is another or none
    download = False

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
    found = []
    for split in (train, test):
        part = getattr(torchvision.datasets, kind)(str(root), download=download, **{key: split})
        labels = part.targets if hasattr(part, "targets") else part.labels
        images = np.asarray(part.data)
        # SVHN alone keeps channels first.
        images = images.transpose(0, 2, 3, 1) if images.ndim == 4 and images.shape[1] == 3 else images
        found += [images, np.asarray(labels)]
    return Splits(*found)


@dataset("cifar10")
class Cifar10(DataSource):
    """60,000 photographs of ten things, 32x32."""

    title = "CIFAR-10"
    train_counts = (5_000,) * 10
    test_counts = (1_000,) * 10

    def read(self, root: Path, size: int, download: bool) -> Splits:
        return _torchvision("CIFAR10", root, download, size, train=(True, False))


@dataset("cifar100")
class Cifar100(DataSource):
    """60,000 photographs of a hundred things, 32x32."""

    title = "CIFAR-100"
    train_counts = (500,) * 100
    test_counts = (100,) * 100

    def read(self, root: Path, size: int, download: bool) -> Splits:
        return _torchvision("CIFAR100", root, download, size, train=(True, False))


@dataset("svhn")
class Svhn(DataSource):
    """99,289 house numbers, 32x32."""

    title = "SVHN"
    train_counts = (4_948, 13_861, 10_585, 8_497, 7_458, 6_882, 5_727, 5_595, 5_045, 4_659)
    test_counts = (1_744, 5_099, 4_149, 2_882, 2_523, 2_384, 1_977, 2_019, 1_660, 1_595)
    augmentation = Augmentation(crop=1 / 8)

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

    def read(self, root: Path, size: int, download: bool) -> Splits:
        # Debian's package dataset-fashion-mnist has the files packed, which torchvision does not read.
        packed = root / "fashion-mnist"
        if packed.is_dir():
            return Splits(*(_idx(packed / f"{part}-ubyte.gz") for part in _IDX))
        return _torchvision("FashionMNIST", root, download, size, train=(True, False))


_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def _idx(path: Path) -> Array:
    """An array in the IDX format of MNIST, gzipped: two zero bytes, type, rank, the sizes, the bytes."""
    import gzip

    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=rank, offset=4).astype(int)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


@dataset("gtsrb")
class Gtsrb(DataSource):
    """51,839 German traffic signs of 43 classes, scaled to 32x32.

    Read as published or as torchvision lays it out. Its download is not torchvision's, which is the competition's
    training set: 26,640 of the 39,209 images.
    """

    title = "GTSRB"
    train_counts = _counts(
        "210 2220 2250 1410 1980 1860 420 1440 1410 1470 2010 1320 2100 2160 780 630 420 1110 1200 210 360 "
        "330 390 510 270 1500 600 240 540 270 450 780 240 689 420 1200 390 210 2070 300 360 240 240"
    )
    test_counts = _counts(
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

    def read(self, root: Path, size: int, download: bool) -> Splits:
        def both(folder: Path) -> Splits:
            folder = folder / "gtsrb"
            train = folder / "GTSRB" / "Final_Training" / "Images"
            if not train.is_dir():
                train = folder / "GTSRB" / "Training"
            files = [[(path, int(path.parent.name)) for path in sorted(train.glob("[0-9]*/*.ppm"))], []]
            with (folder / "GT-final_test.csv").open(newline="") as rows:
                for row in csv.DictReader(rows, delimiter=";"):
                    files[1].append((folder / "GTSRB" / "Final_Test" / "Images" / row["Filename"], int(row["ClassId"])))
            counts = (len(files[0]), len(files[1]))
            if counts != self.images:
                raise FileNotFoundError(
                    f"{folder} holds {counts[0]} + {counts[1]} images; the whole set has {self.images[0]} + "
                    f"{self.images[1]}, with GTSRB_Final_Training_Images.zip (26640: the competition's, as torchvision "
                    "fetches it)"
                )
            found: list[Any] = []
            for split in files:
                found += [_decode([path for path, _ in split], size), np.array([label for _, label in split])]
            return Splits(*found)

        if download:
            from torchvision.datasets.utils import download_and_extract_archive

            for name, md5 in self.archives.items():
                download_and_extract_archive(f"{self.url}/{name}", str(root / "gtsrb"), md5=md5)
        if (root / "gtsrb").is_dir():
            return both(root)
        return _unpacked(root, f"gtsrb{size}" if list(root.glob(f"gtsrb{size}.tar.*")) else "gtsrb", both)


class ImageFolder(DataSource):
    """Any folder of `train/<class>/*` and `test/<class>/*` (or `val`), classes in alphabetical order."""

    download = False

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @property
    def title(self) -> str:  # type: ignore[override]
        return self.folder

    @property
    def how(self) -> str:  # type: ignore[override]
        return (
            f"put it there as {self.folder}/train/<class>/* and {self.folder}/test/<class>/*, or as a .tar of the two"
        )

    def read(self, root: Path, size: int, download: bool) -> Splits:
        return _unpacked(root, self.folder, lambda folder: self._read(folder, size))

    def _read(self, folder: Path, size: int) -> Splits:
        found: list[Any] = []
        if (folder / self.folder / "train").is_dir():
            folder = folder / self.folder  # many archives hold the folder itself, not what is in it
        classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
        test = "test" if (folder / "test").is_dir() else "val"
        for split in ("train", test):
            strangers = sorted({path.name for path in (folder / split).iterdir() if path.is_dir()} ^ set(classes))
            if strangers:
                raise FileNotFoundError(f"the classes of train/ and {split}/ differ: {', '.join(strangers[:5])}")
            files = [(path, label) for label, name in enumerate(classes) for path in _files(folder / split / name)]
            if not files:
                raise FileNotFoundError(f"no image under {folder / split}/<class>/")
            found += [_decode([path for path, _ in files], size), np.array([label for _, label in files])]
        return Splits(*found)


def _files(folder: Path) -> list[Path]:
    """The images of one class, in the order of their names; Tiny-ImageNet has a folder more."""
    inner = folder / "images"
    return sorted(path for path in (inner if inner.is_dir() else folder).iterdir() if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")  # `._a.png` is a note that macOS leaves


_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp"}


@dataset("cifar10_jpeg")
class Cifar10Jpeg(ImageFolder):
    """CIFAR-10 with every image saved once as JPEG: clean accuracy is a little lower than on CIFAR-10."""

    title = "CIFAR-10 (JPEG)"
    train_counts = (5_000,) * 10
    test_counts = (1_000,) * 10

    def __init__(self) -> None:
        super().__init__("cifar10_jpeg")

    @property
    def how(self) -> str:  # type: ignore[override]
        return f"{super().how}; write CIFAR-10 as JPEG, in any quality (the published tables: digest 68bbfc5b79429794)"


@dataset("tiny_imagenet")
class TinyImageNet(DataSource):
    """110,000 photographs of 200 things, 64x64, as `tiny-imagenet-200/` is unpacked."""

    title = "Tiny-ImageNet"
    train_counts = (500,) * 200
    test_counts = (50,) * 200
    size = 64
    download = False
    how = "unpack tiny-imagenet-200.zip there"

    def read(self, root: Path, size: int, download: bool) -> Splits:
        folder = root / "tiny-imagenet-200"
        classes = (folder / "wnids.txt").read_text().split()
        label = {name: index for index, name in enumerate(classes)}
        train = [(path, label[name]) for name in classes for path in _files(folder / "train" / name)]
        lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
        test = [(folder / "val" / "images" / (row := line.split("\t"))[0], label[row[1]]) for line in lines]
        found: list[Any] = []
        for files in (train, test):
            found += [_decode([path for path, _ in files], size), np.array([label for _, label in files])]
        return Splits(*found)
