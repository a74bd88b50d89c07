import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from bench import data as command
from bench.engine import datasets
from bench.engine.data import Augmentation
from bench.engine.datasets import DataError, Digits, Splits, dataset, prepare, source
from bench.engine.errors import UserError
from bench.experiment.experiment import load_experiment
from bench.reporting.protocol import protocol


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def animals(folder: Path, test: str = "test") -> dict[str, np.ndarray]:
    """Two classes: files of noise at 32x32, one of them grey."""
    files = {
        f"train/cat/{name}.png": noise(seed, *shape)
        for seed, (name, shape) in enumerate([("a", (32, 32, 3)), ("b", (32, 32))])
    }
    files |= {"train/ant/z.png": noise(5, 32, 32, 3), f"{test}/cat/q.png": noise(6, 32, 32, 3)}
    files |= {f"{test}/ant/{name}.png": noise(7 + seed, 32, 32, 3) for seed, name in enumerate("qr")}
    for name, pixels in files.items():
        save(folder / name, pixels)
    return files


def pack(folder: Path, archive: Path, mode: str) -> None:
    with tarfile.open(archive, mode) as file:
        for path in sorted(folder.iterdir()):
            file.add(path, arcname=path.name)


# Digits -----------------------------------------------------------------------------------------------------


def test_digits_are_the_1797_of_scikit_learn_each_in_exactly_one_split(tmp_path):
    info = prepare("digits", tmp_path, tmp_path / "cache", size=8)
    train, test = info.load("train"), info.load("test")
    found = sorted(
        (*image.flatten().tolist(), int(label))
        for part in (train, test)
        for image, label in zip(part.images, part.labels, strict=True)
    )
    known = load_digits()
    # 17 levels, 0 to 16, spread over 0 to 255.
    expected = sorted(
        (*(int(level * 255 / 16 + 0.5) for level in image.flatten()), int(label))
        for image, label in zip(known.images, known.target, strict=True)
    )
    # Half levels: the package's rounding and the one above may differ by one.
    assert np.abs(np.array(found) - np.array(expected)).max() <= 1
    assert (len(train), len(test)) == (1438, 359)
    assert np.array_equal(np.array(info.train_counts) + np.array(info.test_counts), np.bincount(known.target))


def test_digits_are_scaled_to_16_pixels_as_bilinear_interpolation_does(tmp_path):
    own = prepare("digits", tmp_path, tmp_path / "cache", size=8).load("train").images
    info = prepare("digits", tmp_path, tmp_path / "cache")
    scaled = F.interpolate(own.double(), scale_factor=2, mode="bilinear", align_corners=False)
    assert info.shape == (1, 16, 16)
    assert (info.load("train").images.double() - scaled).abs().max() <= 1


def test_facts_of_a_data_set_are_those_of_its_arrays(tmp_path):
    info = prepare("digits", tmp_path, tmp_path / "cache")
    train, test = info.load("train"), info.load("test")
    pixels = train.images.numpy() / 255
    assert info.num_classes == 10
    assert info.title == "digits"
    assert info.train_counts == tuple(np.bincount(train.labels))
    assert info.test_counts == tuple(np.bincount(test.labels))
    assert info.mean == pytest.approx([pixels.mean()], abs=1e-6)
    assert info.std == pytest.approx([pixels.std()], abs=1e-6)
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64


def test_mirrored_digits_and_signs_and_house_numbers_are_not_trained_on():
    assert not any(source(name).augmentation.flip for name in ("digits", "gtsrb", "svhn"))
    assert source("cifar10").augmentation.flip


def test_the_digest_follows_the_pixels(tmp_path):
    first = prepare("digits", tmp_path, tmp_path / "one")
    assert first.digest == prepare("digits", tmp_path, tmp_path / "two").digest
    assert first.digest != prepare("digits", tmp_path, tmp_path / "one", size=8).digest


# The cache --------------------------------------------------------------------------------------------------


def test_a_data_set_is_decoded_once(tmp_path, monkeypatch):
    first = prepare("digits", tmp_path, tmp_path / "cache")

    def read_again(*_: object) -> Splits:
        raise AssertionError("decoded twice")

    monkeypatch.setattr(Digits, "read", read_again)
    assert prepare("digits", tmp_path / "moved", tmp_path / "cache") == first
    with pytest.raises(AssertionError, match="decoded twice"):
        prepare("digits", tmp_path, tmp_path / "other")


def test_changed_decoding_does_not_use_old_caches(tmp_path, monkeypatch):
    old = prepare("digits", tmp_path, tmp_path / "cache")
    monkeypatch.setattr(datasets, "CACHE_VERSION", datasets.CACHE_VERSION + 1)
    assert prepare("digits", tmp_path, tmp_path / "cache").folder != old.folder


def test_an_aborted_decoding_is_no_cache(tmp_path, monkeypatch):
    save_array = np.save

    def full_disk(path: Path, array: np.ndarray) -> None:
        if "test" in Path(path).name:
            raise OSError("No space left on device")
        save_array(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            prepare("digits", tmp_path, tmp_path / "cache")
    assert len(prepare("digits", tmp_path, tmp_path / "cache").load("test")) == 359


def test_two_at_once_get_the_same_arrays_and_leave_one_folder(tmp_path, monkeypatch):
    both_have_read, read = threading.Barrier(2, timeout=20), Digits.read

    def read_together(self: Digits, root: Path, size: int, download: bool) -> Splits:
        splits = read(self, root, size, download)
        both_have_read.wait()  # neither sees the other's cache
        return splits

    monkeypatch.setattr(Digits, "read", read_together)
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare("digits", tmp_path, tmp_path / "cache"))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [found[0].folder.name]


def test_a_cache_can_be_read_by_whom_the_umask_allows(tmp_path):
    # One cache serves a group on a cluster.
    before = os.umask(0o027)
    try:
        folder = prepare("digits", tmp_path, tmp_path / "cache").folder
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_caches_of_other_names_are_other_folders(tmp_path):
    for name in ("a/b", "a-b"):
        animals(tmp_path / name)
    (tmp_path / "a-b" / "train" / "ant" / "z.png").unlink()
    save(tmp_path / "a-b" / "train" / "ant" / "other.png", noise(99, 32, 32, 3))
    one, other = (prepare(f"folder:{name}", tmp_path, tmp_path / "cache") for name in ("a/b", "a-b"))
    assert one.digest != other.digest


def test_channels_have_means_of_their_own_also_over_many_images(tmp_path, monkeypatch):
    level = np.array([10, 100, 200])

    class Bands(datasets.DataSource):
        title, size = "bands", 2

        def read(self, root: Path, size: int, download: bool) -> Splits:
            images = np.broadcast_to(level, (12_001, 2, 2, 3)).astype(np.uint8).copy()
            images[::2, ..., 0] += 20  # the only channel that is not constant
            return Splits(images, np.arange(12_001) % 3, images[:7], np.arange(7) % 3)

    monkeypatch.setitem(dataset, "bands", Bands)
    info = prepare("bands", tmp_path, tmp_path / "cache")
    red = np.where(np.arange(12_001) % 2 == 0, 30, 10) / 255
    assert info.mean == pytest.approx([red.mean(), 100 / 255, 200 / 255], abs=1e-6)
    assert info.std[0] == pytest.approx(red.std(), abs=1e-6)
    assert info.std[1] > 0  # dividing by it gives numbers
    assert info.shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("train", "test", "empty"),
    [
        ([0, 1, 2, 2], [1, 2], "0"),
        ([0, 1, 2, 2], [0, 2], "1"),
        ([0, 1, 2, 2], [0, 1], "2"),
        ([0, 0, 1], [0, 1, 2], "2"),  # the last: the labels of the training images do not show it
        ([1, 2, 2], [0, 1, 2], "0"),
        ([0, 1], [], "0 test"),
        ([], [0, 1], "0 training"),
    ],
)
def test_a_class_without_an_image_in_a_split_is_refused_whatever_the_data_set(
    tmp_path, monkeypatch, train, test, empty
):
    class Gaps(datasets.DataSource):
        title, size = "gaps", 2

        def read(self, root: Path, size: int, download: bool) -> Splits:
            images = [noise(0, len(labels), 2, 2) for labels in (train, test)]
            return Splits(images[0], np.array(train, int), images[1], np.array(test, int))

    monkeypatch.setitem(dataset, "gaps", Gaps)
    with pytest.raises(DataError, match=f"gaps.*{empty}"):
        prepare("gaps", tmp_path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_digits_keep_the_digest_of_the_stored_results(tmp_path):
    assert prepare("digits", tmp_path, tmp_path / "cache").digest == "09e602bd1751e4e9"


@pytest.mark.parametrize("name", ["folder:cifar10_jpeg", "cifar10_jpeg"])
def test_another_root_is_another_source(tmp_path, name):
    for number, root in enumerate(("one", "two")):
        animals(tmp_path / root / "cifar10_jpeg")
        save(tmp_path / root / "cifar10_jpeg" / "train" / "cat" / "a.png", noise(90 + number, 32, 32, 3))
    one, two = (prepare(name, tmp_path / root, tmp_path / "cache") for root in ("one", "two"))
    assert one.digest != two.digest
    assert prepare(name, tmp_path / "one", tmp_path / "cache") == one
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        prepare(name, tmp_path / "empty", tmp_path / "cache")
    # The identity of a trial is that of the images, wherever they lie.
    (tmp_path / "one").rename(tmp_path / "moved")
    assert prepare(name, tmp_path / "moved", tmp_path / "cache").digest == one.digest


def changed(folder: Path, how: str) -> None:
    image = folder / "train" / "cat" / "a.png"
    if how == "added":
        save(image.with_name("new.png"), noise(90, 32, 32, 3))
    elif how == "removed":
        image.unlink()
    elif how == "renamed":
        image.rename(image.with_name("z.png"))
    elif how == "rewritten":
        save(image, noise(91, 32, 32, 3))
    else:  # of the same size
        content = image.read_bytes()
        image.unlink()
        image.write_bytes(content)
        os.utime(image, (1, 1))


@pytest.mark.parametrize("how", ["added", "removed", "renamed", "rewritten", "touched"])
def test_changed_files_are_decoded_again(tmp_path, how):
    animals(tmp_path / "animals")
    before = prepare("folder:animals", tmp_path, tmp_path / "cache")
    changed(tmp_path / "animals", how)
    after = prepare("folder:animals", tmp_path, tmp_path / "cache")
    assert after.folder != before.folder
    assert (after.digest == before.digest) == (how == "touched")
    assert after.digest == prepare("folder:animals", tmp_path, tmp_path / "fresh").digest


def test_a_replaced_archive_is_decoded_again(tmp_path):
    animals(tmp_path / "a" / "animals")
    (tmp_path / "root").mkdir()
    pack(tmp_path / "a" / "animals", tmp_path / "root" / "animals.tar", "w")
    before = prepare("folder:animals", tmp_path / "root", tmp_path / "cache")
    changed(tmp_path / "a" / "animals", "rewritten")
    pack(tmp_path / "a" / "animals", tmp_path / "root" / "animals.tar", "w")
    assert prepare("folder:animals", tmp_path / "root", tmp_path / "cache").digest != before.digest


def test_images_whose_files_are_gone_are_used_with_a_word(tmp_path):
    animals(tmp_path / "animals")
    before = prepare("folder:animals", tmp_path, tmp_path / "cache")
    shutil.rmtree(tmp_path / "animals")
    said: list[str] = []
    assert prepare("folder:animals", tmp_path, tmp_path / "cache", say=said.append) == before
    assert "folder:animals" in said[0]


def test_a_damaged_archive_is_named(tmp_path):
    animals(tmp_path / "a" / "animals")
    (tmp_path / "root").mkdir()
    archive = tmp_path / "root" / "animals.tar.gz"
    pack(tmp_path / "a" / "animals", archive, "w:gz")
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(DataError, match=str(archive)):
        prepare("folder:animals", tmp_path / "root", tmp_path / "cache")


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "absent":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "zeros":
        path.write_bytes(bytes(len(content)))
    elif how == "foreign":
        path.write_bytes(b'{"digest": 1}\n\xff')
    else:
        content[-3] ^= 1
        path.write_bytes(content)


DAMAGES = ["absent", "a folder", "truncated", "empty", "zeros", "foreign", "one bit"]


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy", "meta.json"])
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("when", ["before the command", "while it runs"])
def test_a_damaged_cache_is_set_aside_and_decoded_again(tmp_path, monkeypatch, file, how, when):
    animals(tmp_path / "animals")
    info = prepare("folder:animals", tmp_path, tmp_path / "cache")
    whole = [info.load(split) for split in ("train", "test")]
    whole = [(part.images.clone(), part.labels.clone()) for part in whole]
    damaged(info.folder / file, how)
    monkeypatch.setattr(datasets, "_verified", set())  # as in another process
    if when == "before the command":
        info = prepare("folder:animals", tmp_path, tmp_path / "cache")
    for split, (images, labels) in zip(("train", "test"), whole, strict=True):
        part = info.load(split)
        assert torch.equal(part.images, images)
        assert torch.equal(part.labels, labels)
    aside = [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("damaged")]
    assert len(aside) == 1
    assert prepare("folder:animals", tmp_path, tmp_path / "cache") == info


def test_a_damaged_figure_of_a_data_set_is_noticed(tmp_path):
    info = prepare("digits", tmp_path, tmp_path / "cache")
    meta = info.folder / "meta.json"
    meta.write_text(meta.read_text().replace("0.304974", "0.904974"))
    assert prepare("digits", tmp_path, tmp_path / "cache") == info


def test_a_damaged_cache_whose_source_is_gone_or_changed_is_refused(tmp_path):
    animals(tmp_path / "animals")
    for how in ("changed", "gone"):
        info = prepare("folder:animals", tmp_path, tmp_path / "cache")
        damaged(info.folder / "train_images.npy", "one bit")
        if how == "gone":
            shutil.rmtree(tmp_path / "animals")
            shutil.rmtree(tmp_path / "changed")
            for other in set((tmp_path / "cache").iterdir()) - {info.folder}:
                shutil.rmtree(other)
        else:
            shutil.copytree(tmp_path / "animals", tmp_path / "changed")
            changed(tmp_path / "animals", "rewritten")
        with pytest.raises(DataError, match="folder:animals") as caught:
            info.load("train")
        assert "\n" not in str(caught.value)


def test_a_file_is_verified_once(tmp_path, monkeypatch):
    info = prepare("digits", tmp_path, tmp_path / "cache")
    monkeypatch.setattr(datasets, "_verified", set())
    hashed, checksum = [], datasets._checksum
    monkeypatch.setattr(datasets, "_checksum", lambda path: hashed.append(path.name) or checksum(path))
    for _ in range(3):
        info.load("train")
    assert sorted(hashed) == ["train_images.npy", "train_labels.npy"]


def test_facts_come_back_from_json_as_they_were(tmp_path):
    animals(tmp_path / "animals")
    for name in ("digits", "folder:animals"):
        info = prepare(name, tmp_path, tmp_path / "cache").augmented(flip=True, rotation=3)
        assert datasets.DatasetInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


# Image folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["test", "val"])
def test_an_image_folder_has_its_classes_in_alphabetical_order_and_its_pixels_unchanged(tmp_path, test):
    files = animals(tmp_path / "animals", test)
    info = prepare("folder:animals", tmp_path, tmp_path / "cache")
    assert info.shape == (3, 32, 32)
    assert info.title == "animals"
    for split, order in {"train": ["ant/z", "cat/a", "cat/b"], "test": ["ant/q", "ant/r", "cat/q"]}.items():
        data = info.load(split)
        assert data.labels.tolist() == [["ant", "cat"].index(name[:3]) for name in order]
        for image, name in zip(data.images, order, strict=True):
            pixels = files[f"{test if split == 'test' else split}/{name}.png"]
            pixels = pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1)  # grey: three equal channels
            assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_images_of_any_size_and_format_are_scaled(tmp_path):
    colours = {"red": (200, 30, 40), "teal": (10, 120, 130)}
    for split in ("train", "test"):
        for name, colour in colours.items():
            for number, (suffix, shape) in enumerate([("jpg", (48, 64)), ("JPEG", (20, 20)), ("png", (7, 31))]):
                pixels = np.broadcast_to(np.array(colour, dtype=np.uint8), (*shape, 3))
                save(tmp_path / "plain" / split / name / f"{number}.{suffix}", np.ascontiguousarray(pixels))
    (tmp_path / "plain" / "train" / "red" / "notes.txt").write_text("no image")
    info = prepare("folder:plain", tmp_path, tmp_path / "cache", size=24)
    data = info.load("train")
    assert info.shape == (3, 24, 24)
    assert info.train_counts == (3, 3)
    expected = torch.tensor([colours["red"], colours["teal"]])[data.labels][:, :, None, None]
    assert (data.images.int() - expected).abs().max() <= 3  # JPEG rounds


def test_a_shrunk_checkerboard_is_grey_and_not_a_random_pick_of_pixels(tmp_path):
    board = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    for split in ("train", "test"):
        save(tmp_path / "board" / split / "only" / "a.png", board)
    image = prepare("folder:board", tmp_path, tmp_path / "cache", size=16).load("train").images.float()
    assert (image[:, :, 2:-2, 2:-2] - 127.5).abs().max() < 2


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.xz", "tgz", "tar"])
def test_an_archive_is_the_same_data_set_as_its_folder(tmp_path, suffix):
    animals(tmp_path / "a" / "animals")
    expected = prepare("folder:animals", tmp_path / "a", tmp_path / "cache_a")
    (tmp_path / "b").mkdir()
    mode = {"tar.gz": "w:gz", "tgz": "w:gz", "tar.xz": "w:xz", "tar": "w"}[suffix]
    pack(tmp_path / "a" / "animals", tmp_path / "b" / f"animals.{suffix}", mode)
    assert prepare("folder:animals", tmp_path / "b", tmp_path / "cache_b").digest == expected.digest
    assert [path.name for path in (tmp_path / "b").iterdir()] == [f"animals.{suffix}"]  # nothing stays unpacked


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as file:
        entry = tarfile.TarInfo("../../escaped.txt")
        entry.size = 4
        file.addfile(entry, io.BytesIO(b"evil"))
    with pytest.raises(DataError, match=r"evil\.tar\.gz"):
        prepare("folder:evil", tmp_path, tmp_path / "cache")


def test_jpeg_cifar_is_an_image_folder_with_a_title(tmp_path):
    animals(tmp_path / "cifar10_jpeg")
    info = prepare("cifar10_jpeg", tmp_path, tmp_path / "cache")
    assert info.title == "CIFAR-10 (JPEG)"
    assert info.train_counts == (1, 2)
    assert info.augmentation.flip


CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def few_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """CIFAR-10 as torchvision has it: pickled batches of rows of 3,072 bytes, channels first; 50 + 20 images."""
    from torchvision.datasets import CIFAR10

    folder, splits = root / "cifar-10-batches-py", {}
    folder.mkdir(parents=True)
    sums = {}
    for split, names, count in (("train", [f"data_batch_{n}" for n in range(1, 6)], 10), ("test", ["test_batch"], 20)):
        images = noise(len(names), len(names) * count, 32, 32, 3)
        labels = np.random.default_rng(len(names)).permutation(len(images)) % 10
        splits[split] = images, labels
        for number, name in enumerate(names):
            rows = slice(number * count, (number + 1) * count)
            data = images[rows].transpose(0, 3, 1, 2).reshape(count, -1)
            content = pickle.dumps({"data": data, "labels": labels[rows].tolist()})
            (folder / name).write_bytes(content)
            sums[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": CIFAR})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in sums if name != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()})
    return splits


def test_jpeg_cifar_is_made_from_cifar_as_from_files_of_its_quality(tmp_path, monkeypatch, capsys):
    splits = few_cifar(tmp_path / "cifar", monkeypatch)
    for split, (images, labels) in splits.items():
        seen = dict.fromkeys(range(10), 0)
        for image, label in zip(images, labels.tolist(), strict=True):
            place = tmp_path / "files" / "cifar10_jpeg" / split / CIFAR[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{seen[label]:04}.jpg", quality=75, subsampling=2)
            seen[label] += 1
    files = prepare("cifar10_jpeg", tmp_path / "files", tmp_path / "cache")
    words = ["cifar10_jpeg", f"dataset.root={tmp_path / 'cifar'}", f"dataset.cache={tmp_path / 'cache'}"]
    assert command.main(words) == 0
    first, second = capsys.readouterr().out.strip().split("\n")
    assert files.digest in first
    for part in ("CIFAR-10", "quality 75", "4:2:0"):
        assert part in second
    made = prepare("cifar10_jpeg", tmp_path / "cifar", tmp_path / "cache")
    assert (made.digest, made.train_counts, made.notes[0] in second) == (files.digest, (5,) * 10, True)


# Augmentation -----------------------------------------------------------------------------------------------


def test_an_image_folder_is_not_mirrored_unless_that_is_said(tmp_path):
    animals(tmp_path / "animals")
    own = ["grid.datasets=[digits,folder:animals]", f"dataset.root={tmp_path}", f"dataset.cache={tmp_path}/cache"]
    own += ["grid.attacks=[none]", "grid.defenses=[no_defense]", "grid.seeds=1", "train.batch_size=2"]
    own += [f"results={tmp_path}/results", "reserve.held_out=0.5", "grid.models=[test_resnet]"]
    usual = {"digits": {"crop": 1 / 16, "flip": False, "rotation": 0}}
    usual["folder:animals"] = {"crop": 1 / 8, "flip": False, "rotation": 0}
    cases = [([], {}), (["flip=true", "rotation=7"], {"flip": True, "rotation": 7}), (["crop=0"], {"crop": 0})]
    keys = set()
    for settings, chosen in cases:
        experiment = load_experiment([*own, *(f"dataset.augmentation.{setting}" for setting in settings)])
        lines = "\n".join(protocol(experiment))
        for trial in experiment.trials:
            assert trial.implant["dataset"]["augmentation"] == {**usual[trial.dataset], **chosen}
            assert str(Augmentation(**trial.implant["dataset"]["augmentation"])) in lines
            keys.add(trial.keys.implant)
        assert all(info.digest in lines for info in experiment.infos.values())
    assert len(keys) == 6
    # What a data set has anyway changes no key.
    same = load_experiment([*own, "dataset.augmentation.flip=false"])
    assert {trial.keys.implant for trial in same.trials} < keys


@pytest.mark.parametrize("setting", ["crop=0.6", "crop=-0.1", "crop=nan", "rotation=181", "rotation=-1"])
def test_an_impossible_augmentation_is_refused(tmp_path, setting):
    name, _, value = setting.partition("=")
    with pytest.raises(UserError, match=rf"dataset\.augmentation\.{name}.*{value}"):
        load_experiment([f"dataset.augmentation.{setting}", f"dataset.cache={tmp_path}"])


@pytest.mark.parametrize("size", [0, -8])
def test_an_impossible_size_is_refused(tmp_path, size):
    with pytest.raises(UserError, match=rf"dataset\.size.*{size}"):
        load_experiment([f"dataset.size={size}", f"dataset.cache={tmp_path}"])


# Published layouts ------------------------------------------------------------------------------------------


@pytest.fixture
def few_signs(monkeypatch):
    monkeypatch.setattr(datasets.Gtsrb, "images", (6, 4))


def signs(folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """GTSRB as published: training folders by class, test images in one folder with a list."""
    rng = np.random.default_rng(0)
    train, test = [], []
    for label in range(3):
        for number in range(2):
            shape = (32, 32, 3) if number == 0 else (int(rng.integers(15, 60)), int(rng.integers(15, 60)), 3)
            pixels = np.full(shape, 60 * label + 20 + number, dtype=np.uint8)
            save(folder / "gtsrb" / "GTSRB" / "Training" / f"{label:05}" / f"00000_{number:05}.ppm", pixels)
            train.append(pixels)
    (folder / "gtsrb" / "GTSRB" / "Training" / "00000" / "GT-00000.csv").write_text("Filename;Width\n")
    labels = [2, 0, 1, 1]
    for number, label in enumerate(labels):
        pixels = noise(number, 32, 32, 3)
        save(folder / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / f"{number:05}.ppm", pixels)
        test.append((f"{number:05}.ppm", label, pixels))
    with open(folder / "gtsrb" / "GT-final_test.csv", "w", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
        rows.writerows([name, 32, 32, 5, 5, 27, 27, label] for name, label, _ in test)
    return train, np.stack([pixels for _, _, pixels in test])


@pytest.mark.parametrize("place", ["Training", "Final_Training/Images"])
def test_traffic_signs_are_read_as_published_and_scaled(tmp_path, few_signs, place):
    train, test = signs(tmp_path)
    where = tmp_path / "gtsrb" / "GTSRB" / place
    where.parent.mkdir(exist_ok=True)
    (tmp_path / "gtsrb" / "GTSRB" / "Training").rename(where)
    info = prepare("gtsrb", tmp_path, tmp_path / "cache")
    assert info.train_counts == (2, 2, 2)
    assert info.load("test").labels.tolist() == [2, 0, 1, 1]
    assert np.array_equal(info.load("test").images.permute(0, 2, 3, 1).numpy(), test)
    expected = np.array([pixels.flat[0] for pixels in train])
    assert np.array_equal(info.load("train").images[:, 1].flatten(1).double().mean(1).numpy(), expected)


@pytest.mark.parametrize("name", ["gtsrb.tar.gz", "gtsrb32.tar.gz"])
def test_traffic_signs_are_read_from_an_archive(tmp_path, few_signs, name):
    signs(tmp_path / "plain")
    expected = prepare("gtsrb", tmp_path / "plain", tmp_path / "cache_a")
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "plain", tmp_path / "packed" / name, "w:gz")
    assert prepare("gtsrb", tmp_path / "packed", tmp_path / "cache_b").digest == expected.digest


def test_traffic_signs_that_are_not_all_there_are_refused(tmp_path):
    signs(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds 6 \+ 4 images; the whole set has 39209 \+ 12630"):
        prepare("gtsrb", tmp_path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_traffic_signs_are_fetched_whole(tmp_path, few_signs, monkeypatch):
    import torchvision.datasets.utils

    fetched = []

    def fetch(url, root, md5):
        if not fetched:
            signs(tmp_path)
            (tmp_path / "gtsrb" / "GTSRB" / "Final_Training").mkdir()
            (tmp_path / "gtsrb" / "GTSRB" / "Training").rename(Path(root) / "GTSRB" / "Final_Training" / "Images")
        fetched.append((url.rpartition("/")[2], len(md5)))

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", fetch)
    assert prepare("gtsrb", tmp_path, tmp_path / "cache", download=True).train_counts == (2, 2, 2)
    # The competition's training set, which torchvision fetches, is a part of the published one.
    assert fetched[0] == ("GTSRB_Final_Training_Images.zip", 32)
    assert len(fetched) == 3


def test_a_note_that_macos_leaves_beside_an_image_is_no_image(tmp_path):
    animals(tmp_path / "zoo")
    before = prepare("folder:zoo", tmp_path, tmp_path / "one")
    image = next((tmp_path / "zoo" / "train").glob("*/*.*"))
    image.with_name(f"._{image.name}").write_bytes(b"Mac OS X")
    assert prepare("folder:zoo", tmp_path, tmp_path / "two").digest == before.digest


def test_an_archive_of_32_pixels_is_not_used_for_64(tmp_path):
    signs(tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "plain", tmp_path / "packed" / "gtsrb32.tar.gz", "w:gz")
    with pytest.raises(FileNotFoundError, match=r"bench\.data gtsrb"):
        prepare("gtsrb", tmp_path / "packed", tmp_path / "cache", size=64)


def test_tiny_imagenet_takes_its_classes_from_wnids_and_its_test_set_from_the_list(tmp_path, monkeypatch):
    folder = tmp_path / "tiny-imagenet-200"
    classes = ["n03", "n01", "n02"]  # the order of the file, not of the alphabet
    pixels = {}
    for name in classes:
        for number in range(2):
            pixels[name, number] = noise(len(pixels), 64, 64, 3)
            path = folder / "train" / name / "images" / f"{name}_{number}.png"
            save(path, pixels[name, number])
        (folder / "train" / name / f"{name}_boxes.txt").write_text("")
    (folder / "wnids.txt").write_text("\n".join(classes) + "\n")
    target_labels = ["n02", "n02", "n03", "n01"]
    for number in range(4):
        save(folder / "val" / "images" / f"val_{number}.png", noise(50 + number, 64, 64, 3))
    (folder / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{number}.png\t{name}\t0\t32\t44\t62\n" for number, name in enumerate(target_labels))
    )
    monkeypatch.setattr(datasets.TinyImageNet, "images", (6, 4))
    info = prepare("tiny_imagenet", tmp_path, tmp_path / "cache")
    train, test = info.load("train"), info.load("test")
    assert info.shape == (3, 64, 64)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert test.labels.tolist() == [2, 2, 0, 1]
    assert np.array_equal(train.images[2].permute(1, 2, 0).numpy(), pixels["n01", 0])
    assert np.array_equal(test.images[1].permute(1, 2, 0).numpy(), noise(51, 64, 64, 3))


def few_things(root: Path, ending: str = "\n", after: str = "") -> Path:
    """Tiny-ImageNet with two classes of eight training images and eleven test images."""
    folder = root / "tiny-imagenet-200"
    lines = []
    for label, name in enumerate(("n02", "n01")):
        for number in range(8):
            save(folder / "train" / name / "images" / f"{name}_{number}.JPEG", noise(20 * label + number, 64, 64, 3))
    for number in range(11):
        save(folder / "val" / "images" / f"val_{number}.JPEG", noise(50 + number, 64, 64, 3))
        lines.append(f"val_{number}.JPEG\t{('n01', 'n02')[number % 2]}\t0\t0\t1\t1")
    (folder / "val" / "val_annotations.txt").write_bytes((ending.join(lines) + after).encode())
    (folder / "wnids.txt").write_text(ending.join(["n02", "n01"]))
    return folder


@pytest.fixture
def few_things_are_whole(monkeypatch):
    monkeypatch.setattr(datasets.TinyImageNet, "images", (16, 11))


@pytest.mark.parametrize(("ending", "after"), [("\r\n", "\r\n"), ("\n", "\n\n  \n")])
def test_line_ends_and_blank_lines_of_tiny_imagenet_change_nothing(tmp_path, few_things_are_whole, ending, after):
    few_things(tmp_path / "plain")
    few_things(tmp_path / "other", ending, after)
    one, other = (prepare("tiny_imagenet", tmp_path / root, tmp_path / "cache") for root in ("plain", "other"))
    assert one.digest == other.digest
    assert one.test_counts == (5, 6)


@pytest.mark.parametrize("keeps_list", [True, False])
@pytest.mark.parametrize("below", ["", "images"])
def test_test_images_that_were_moved_into_folders_of_classes_are_the_same(
    tmp_path, few_things_are_whole, keeps_list, below
):
    few_things(tmp_path / "plain")
    val = few_things(tmp_path / "moved") / "val"
    for number in range(11):
        place = val / ("n01", "n02")[number % 2] / below
        place.mkdir(parents=True, exist_ok=True)
        (val / "images" / f"val_{number}.JPEG").rename(place / f"val_{number}.JPEG")
    (val / "images").rmdir()
    if not keeps_list:
        (val / "val_annotations.txt").unlink()
    one, other = (prepare("tiny_imagenet", tmp_path / root, tmp_path / "cache") for root in ("plain", "moved"))
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("val_0.JPEG\tn03\t0\t0\t1\t1", "line 12.*n03"),
        ("val_0.JPEG", "line 12"),
        ("val_99.JPEG\tn01\t0", r"line 12.*val_99\.JPEG"),
    ],
)
def test_a_wrong_line_of_tiny_imagenet_is_named(tmp_path, few_things_are_whole, wrong, said):
    few_things(tmp_path, after="\n" + wrong)
    with pytest.raises(DataError, match=said):
        prepare("tiny_imagenet", tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("lost", ["train", "test", "a class", "the list", "the classes"])
def test_tiny_imagenet_that_is_not_all_there_is_refused(tmp_path, few_things_are_whole, lost):
    folder = few_things(tmp_path)
    if lost == "train":
        next((folder / "train" / "n01" / "images").iterdir()).unlink()
    elif lost == "test":
        listed = folder / "val" / "val_annotations.txt"
        listed.write_text("\n".join(listed.read_text().split("\n")[:3]))
    elif lost == "a class":
        shutil.rmtree(folder / "train" / "n01" / "images")
    elif lost == "the list":
        (folder / "val" / "val_annotations.txt").unlink()
    else:
        (folder / "wnids.txt").unlink()
    expected = {"train": r"15 \+ 11.*16 \+ 11", "test": r"16 \+ 3", "a class": r"8 \+ 11", "the classes": "wnids"}
    with pytest.raises((FileNotFoundError, DataError), match=expected.get(lost, "val_annotations")):
        prepare("tiny_imagenet", tmp_path, tmp_path / "cache")


def test_traffic_signs_as_another_site_has_them_are_refused_with_what_is_there(tmp_path, few_signs):
    save(tmp_path / "gtsrb" / "Train" / "0" / "a.png", noise(0, 32, 32, 3))
    (tmp_path / "gtsrb" / "Test.csv").write_text("Width,Height,ClassId,Path\n")
    with pytest.raises(FileNotFoundError, match=r"Test\.csv, Train.*GTSRB/"):
        prepare("gtsrb", tmp_path, tmp_path / "cache")


def test_a_wrong_list_of_traffic_signs_is_named(tmp_path, few_signs):
    signs(tmp_path)
    listed = tmp_path / "gtsrb" / "GT-final_test.csv"
    listed.write_text(listed.read_text().replace(";", ","))
    with pytest.raises(DataError, match=r"GT-final_test\.csv, line 2"):
        prepare("gtsrb", tmp_path, tmp_path / "cache")


def test_a_damaged_idx_file_is_named(tmp_path):
    (tmp_path / "fashion-mnist").mkdir()
    for part in datasets._IDX:
        (tmp_path / "fashion-mnist" / f"{part}-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\3\0"))
    with pytest.raises(DataError, match="train-images-idx3"):
        prepare("fashion_mnist", tmp_path, tmp_path / "cache")


def test_fashion_mnist_is_read_from_packed_idx_files(tmp_path):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    arrays = {
        "train-images-idx3": noise(0, 30, 28, 28),
        "train-labels-idx1": (np.arange(30) % 10).astype(np.uint8),
        "t10k-images-idx3": noise(1, 11, 28, 28),
        "t10k-labels-idx1": (np.arange(11)[::-1] % 10).astype(np.uint8),
    }
    for name, array in arrays.items():
        # Two zero bytes, 8 for unsigned byte, the rank, the sizes as big-endian words, the bytes.
        head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    info = prepare("fashion_mnist", tmp_path, tmp_path / "cache")
    assert info.shape == (1, 28, 28)
    assert np.array_equal(info.load("train").images[:, 0].numpy(), arrays["train-images-idx3"])
    assert np.array_equal(info.load("test").images[:, 0].numpy(), arrays["t10k-images-idx3"])
    assert info.load("test").labels.tolist() == arrays["t10k-labels-idx1"].tolist()


class FakeTorchvision:
    """Stands for the CIFAR and SVHN classes, which check the md5 sums of the real files."""

    def __init__(self, channels_first: bool) -> None:
        self.channels_first = channels_first

    def __call__(self, root: str, download: bool, train: bool | None = None, split: str | None = None) -> object:
        first = train if train is not None else split == "train"
        images, labels = noise(int(first), 20 if first else 11, 32, 32, 3), np.arange(20 if first else 11) % 10
        images = images.transpose(0, 3, 1, 2) if self.channels_first else images
        return type("Part", (), {"data": images, ("labels" if self.channels_first else "targets"): labels.tolist()})()


@pytest.mark.parametrize(("name", "kind"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("svhn", "SVHN")])
def test_torchvision_sets_keep_their_splits_and_pixels_whatever_the_order_of_axes(tmp_path, monkeypatch, name, kind):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, kind, FakeTorchvision(channels_first=kind == "SVHN"))
    info = prepare(name, tmp_path, tmp_path / "cache")
    assert np.array_equal(info.load("train").images.permute(0, 2, 3, 1).numpy(), noise(1, 20, 32, 32, 3))
    assert np.array_equal(info.load("test").images.permute(0, 2, 3, 1).numpy(), noise(0, 11, 32, 32, 3))
    assert info.train_counts == (2,) * 10


# Mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion_mnist", "gtsrb", "cifar10_jpeg"])
def test_missing_data_that_can_be_fetched_names_the_command_and_the_setting(tmp_path, name):
    with pytest.raises(FileNotFoundError) as caught:
        prepare(name, tmp_path, tmp_path / "cache")
    message = str(caught.value)
    assert message.startswith(f"data set {name} is not under {tmp_path} (")
    assert f"`python -m bench.data {name}`" in message
    assert "dataset.root (or $BENCH_DATA)" in message
    assert "\n" not in message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("tiny_imagenet", "unpack tiny-imagenet-200.zip there"),
        ("folder:mine", "mine/train/<class>/* and mine/test/<class>/*"),
    ],
)
def test_missing_data_that_cannot_be_fetched_says_where_to_put_it(tmp_path, name, advice):
    with pytest.raises(FileNotFoundError) as caught:
        prepare(name, tmp_path, tmp_path / "cache")
    message = str(caught.value)
    assert advice in message
    assert "dataset.root (or $BENCH_DATA)" in message
    assert "bench.data" not in message


def test_a_folder_without_images_is_missing_data(tmp_path):
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "test" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no image under .*train/<class>/"):
        prepare("folder:empty", tmp_path, tmp_path / "cache")


def test_missing_data_is_not_remembered(tmp_path):
    with pytest.raises(FileNotFoundError):
        prepare("folder:late", tmp_path, tmp_path / "cache")
    animals(tmp_path / "late")
    assert prepare("folder:late", tmp_path, tmp_path / "cache").num_classes == 2


def test_an_unknown_data_set_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(LookupError, match=r"no data set is named 'cifar-10'\. Did you mean 'cifar10'"):
        prepare("cifar-10", tmp_path, tmp_path / "cache")


def test_the_cache_holds_no_pickle(tmp_path):
    folder = prepare("digits", tmp_path, tmp_path / "cache").folder
    for path in folder.glob("*.npy"):
        np.load(path, allow_pickle=False)
    assert json.loads((folder / "meta.json").read_text())["facts"]["shape"] == [1, 16, 16]


# Images, classes, channels and pixels as the publications of the data sets give them.
PUBLISHED = {
    "cifar10": (50_000, 10_000, 10, 3, 32),
    "cifar10_jpeg": (50_000, 10_000, 10, 3, 32),
    "cifar100": (50_000, 10_000, 100, 3, 32),
    "svhn": (73_257, 26_032, 10, 3, 32),
    "fashion_mnist": (60_000, 10_000, 10, 1, 28),
    "gtsrb": (39_209, 12_630, 43, 3, 32),
    "tiny_imagenet": (100_000, 10_000, 200, 3, 64),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_size_of_a_data_set_is_known_without_it(name):
    train, test, classes, channels, pixels = PUBLISHED[name]
    info = datasets.as_published(name)
    assert (sum(info.train_counts), sum(info.test_counts)) == (train, test)
    assert (len(info.train_counts), len(info.test_counts), info.num_classes) == (classes, classes, classes)
    assert info.shape == (channels, pixels, pixels)
    assert datasets.as_published(name, 48).shape == (channels, 48, 48)
    assert not info.digest  # it names no stored stage


def test_of_a_folder_of_images_no_size_is_known():
    assert datasets.as_published("folder:anything") is None
