"""Image files: which ones are read, and the pixels that come of them, against NumPy by hand and torchvision."""

import io
import os
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from bench import data as command
from bench.engine.datasets import DataError, prepare
from bench.engine.errors import UserError
from bench.engine.images import SUFFIXES, read_image

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
ALPHA[0], ALPHA[1] = 0, 255
DEEP = RNG.integers(0, 65536, (6, 5), dtype=np.uint16)
FEW = RNG.integers(0, 4, (6, 5), dtype=np.uint8)  # entries of a palette
PALETTE = np.array([[0, 0, 0], [250, 10, 20], [30, 240, 50], [60, 70, 230]], dtype=np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=-1)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(colour * share + 255 * (1 - share)).astype(np.uint8)


def png(pixels: bytes, width: int, height: int, depth: int, colour_type: int, **chunks: bytes) -> bytes:
    """A PNG by hand, for what Pillow cannot write; `pixels` are its packed rows."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    stride = len(pixels) // height
    rows = b"".join(b"\0" + pixels[row * stride : (row + 1) * stride] for row in range(height))
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", head), *((name.encode(), body) for name, body in chunks.items())]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def saved(image: Image.Image | np.ndarray, kind: str = "PNG", **how: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **how)
    return file.getvalue()


def paletted() -> Image.Image:
    image = Image.fromarray(FEW).copy()
    image.putpalette(PALETTE.tobytes())
    return image


def packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of samples below eight bits."""
    spread = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(spread.reshape(len(values), -1), axis=1).tobytes()


SIXTEEN = RNG.integers(0, 16, (6, 5), dtype=np.uint8)
CASES = {
    "RGB": (saved(COLOUR), COLOUR),
    "L": (saved(GREY), grey(GREY)),
    "L in TIFF": (saved(GREY, "TIFF"), grey(GREY)),
    "L in PGM": (saved(GREY, "PPM"), grey(GREY)),
    "1": (saved(Image.fromarray(GREY > 127)), grey(np.where(GREY > 127, 255, 0).astype(np.uint8))),
    "P": (saved(paletted()), PALETTE[FEW]),
    "4-bit grey": (png(packed(SIXTEEN, 4), 5, 6, 4, 0), grey(SIXTEEN * 17)),
    "16-bit PNG": (saved(DEEP), grey((DEEP >> 8).astype(np.uint8))),
    "16-bit TIFF": (saved(DEEP, "TIFF"), grey((DEEP >> 8).astype(np.uint8))),
    "16-bit TIFF, big-endian": (
        saved(Image.frombytes("I;16B", (5, 6), DEEP.astype(">u2").tobytes()), "TIFF"),
        grey((DEEP >> 8).astype(np.uint8)),
    ),
    "16-bit PGM": (b"P5\n5 6\n65535\n" + DEEP.astype(">u2").tobytes(), grey((DEEP >> 8).astype(np.uint8))),
    "16-bit RGB": (
        png(np.stack([DEEP] * 3, axis=-1).astype(">u2").tobytes(), 5, 6, 16, 2),
        grey((DEEP >> 8).astype(np.uint8)),
    ),
    "RGBA": (saved(np.dstack([COLOUR, ALPHA])), on_white(COLOUR, ALPHA)),
    "RGBA in WebP": (
        # A pixel without any alpha has no colour there; the others keep theirs.
        saved(np.dstack([COLOUR, ALPHA]), "WEBP", lossless=True, exact=True),
        on_white(COLOUR, ALPHA),
    ),
    "LA": (saved(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])), on_white(grey(GREY), ALPHA)),
    "16-bit grey and alpha": (
        png(np.stack([DEEP, np.full_like(DEEP, 65535)], axis=-1).astype(">u2").tobytes(), 5, 6, 16, 4),
        grey((DEEP >> 8).astype(np.uint8)),
    ),
    "P, one entry transparent": (
        saved(paletted(), transparency=2),
        on_white(PALETTE[FEW], np.where(FEW == 2, 0, 255)),
    ),
    "P, alpha of each entry": (
        saved(paletted(), transparency=bytes([255, 0, 100, 200])),
        on_white(PALETTE[FEW], np.array([255, 0, 100, 200])[FEW]),
    ),
    "P in GIF": (saved(paletted(), "GIF", transparency=1), on_white(PALETTE[FEW], np.where(FEW == 1, 0, 255))),
    "L, one level transparent": (
        saved(GREY, transparency=int(GREY[2, 3])),
        on_white(grey(GREY), np.where(GREY[2, 3] == GREY, 0, 255)),
    ),
    "4-bit grey, one level transparent": (
        png(packed(SIXTEEN, 4), 5, 6, 4, 0, tRNS=struct.pack(">H", int(SIXTEEN[1, 1]))),
        on_white(grey(SIXTEEN * 17), np.where(SIXTEEN[1, 1] == SIXTEEN, 0, 255)),
    ),
    "2-bit grey, one level transparent": (
        png(packed(FEW, 2), 5, 6, 2, 0, tRNS=struct.pack(">H", 1)),
        on_white(grey(FEW * 85), np.where(FEW == 1, 0, 255)),
    ),
    "1, white transparent": (
        png(packed(FEW & 1, 1), 5, 6, 1, 0, tRNS=struct.pack(">H", 1)),
        on_white(grey((FEW & 1) * 255), np.where(FEW & 1, 0, 255)),
    ),
    "RGB, one colour transparent": (
        saved(COLOUR, transparency=tuple(map(int, COLOUR[4, 4]))),
        on_white(COLOUR, np.where((COLOUR[4, 4] == COLOUR).all(axis=-1), 0, 255)),
    ),
    "16-bit grey, one level transparent": (
        png(DEEP.astype(">u2").tobytes(), 5, 6, 16, 0, tRNS=struct.pack(">H", int(DEEP[3, 3]))),
        on_white(grey((DEEP >> 8).astype(np.uint8)), np.where(DEEP[3, 3] == DEEP, 0, 255)),
    ),
    "CMYK": (
        saved(Image.merge("CMYK", [*Image.fromarray(255 - COLOUR).split(), Image.new("L", (5, 6))]), "TIFF"),
        COLOUR,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_any_mode_has_the_pixels_that_a_person_sees(tmp_path, name):
    content, expected = CASES[name]
    (tmp_path / "image.png").write_bytes(content)
    image, has_more = read_image(tmp_path / "image.png")
    assert image.mode == "RGB"
    assert not has_more
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= (1 if "WebP" in name else 0)


# What EXIF's numbers say of the first row and column, undone by hand.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_an_image_is_upright(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"lossless": True} if kind == "WEBP" else {}
    (tmp_path / "a.jpg").write_bytes(saved(COLOUR, kind, exif=exif, **how))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.jpg")[0]), UPRIGHT[orientation](COLOUR))


def test_a_palette_with_transparency_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.png").write_bytes(saved(paletted(), transparency=2, exif=exif))
    expected = np.rot90(on_white(PALETTE[FEW], np.where(FEW == 2, 0, 255)), -1)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")[0]), expected)


def huge() -> bytes:
    side = 20_000
    return png(bytes(side // 8 * side), side, side, 1, 0)


WRONG = {
    "float": (saved(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), "mode F"),
    "32-bit integer": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "mode I"),
    "16-bit colour with a transparent one": (
        png(np.stack([DEEP] * 3, axis=-1).astype(">u2").tobytes(), 5, 6, 16, 2, tRNS=bytes(6)),
        "",
    ),
    "empty": (b"", ""),
    "text": (b"<html>404</html>", ""),
    "half a JPEG": (saved(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")[:1500], "truncated"),
    "half a PNG": (saved(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))[:6000], ""),
    "half a PGM": (b"P5\n32 32\n255\n" + bytes(100), ""),
    "half a BMP": (saved(COLOUR, "BMP")[:80], ""),
    "a BMP of zeros": (b"BM" + bytes(60), ""),
    "a WebP of zeros": (b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(20), ""),
    "half a TIFF": (saved(COLOUR, "TIFF")[:60], ""),
    "a damaged chunk": (png(GREY.tobytes(), 5, 6, 8, 0, **{"\1\2\3\4": b"junk"}), ""),
    "too large": (huge(), "400000000"),
}


def picture(path: Path, seed: int = 0, shape: tuple[int, ...] = (8, 8, 3), **how: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path, **how)


def two_classes(folder: Path, names: tuple[str, ...] = ("ant", "cat")) -> Path:
    for split in ("train", "test"):
        for label, name in enumerate(names):
            for number in range(2):
                picture(folder / split / name / f"{number}.png", seed=len(split) + 10 * label + number)
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path, name):
    content, said = WRONG[name]
    two_classes(tmp_path / "toy")
    bad = tmp_path / "toy" / "train" / "cat" / "zz.png"
    bad.write_bytes(content)
    with pytest.raises(UserError, match=said or "cannot be used") as caught:
        command.main(["folder:toy", f"dataset.root={tmp_path}", f"dataset.cache={tmp_path}/cache"])
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path).glob("cache/*"))


@pytest.mark.parametrize("kind", ["dead link", "link to itself", "pipe"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, kind):
    bad = two_classes(tmp_path / "toy") / "test" / "ant" / "zz.png"
    if kind == "pipe":
        os.mkfifo(bad)
    else:
        bad.symlink_to(tmp_path / "nowhere.png" if kind == "dead link" else bad)
    with pytest.raises(DataError, match=str(bad)):
        prepare("folder:toy", tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(("suffix", "how"), [("png", {}), ("webp", {"lossless": True}), ("tif", {})])
def test_of_several_frames_the_first_is_read_and_the_file_counted(tmp_path, suffix, how):
    folder, said = two_classes(tmp_path / "toy"), []
    frames = [Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)) for level in (40, 90)]
    frames[0].save(folder / "train" / "ant" / f"a.{suffix}", save_all=True, append_images=frames[1:], **how)
    info = prepare("folder:toy", tmp_path, tmp_path / "cache", size=8, say=said.append)
    assert (info.load("train").images[2] == 40).all()
    (line,) = said
    assert "1 files with more frames" in line


# Which files ------------------------------------------------------------------------------------------------


def test_the_suffixes_are_those_of_torchvision():
    assert set(SUFFIXES) == set(IMG_EXTENSIONS)


def messy(root: Path) -> Path:
    """A tree as people have them: sub-folders, links to files and folders, every suffix, names in an odd order."""
    folder = root / "toy"
    for split in ("train", "test"):
        place = folder / split
        for number, suffix in enumerate(SUFFIXES):
            picture(place / "kinds" / f"{number}{suffix}", seed=number)
        picture(place / "kinds" / "UPPER.PNG", seed=20)
        picture(place / "deep" / "b" / "c" / "1.png", seed=21)
        picture(place / "deep" / "b-c" / "1.png", seed=22)
        picture(place / "deep" / "b" / "1.png", seed=23)
        picture(place / "deep" / "9.png", seed=24)
        picture(place / "both" / "1.png", seed=25)
        picture(place / "both" / "images" / "2.png", seed=26)
        picture(place / "images" / "1.png", seed=27)  # a class of this name
        picture(root / "elsewhere" / split / "x" / "1.png", seed=28)
        (place / "linked").symlink_to(root / "elsewhere" / split)
        (place / "kinds" / "link.png").symlink_to(root / "elsewhere" / split / "x" / "1.png")
    return folder


def test_what_torchvision_reads_is_read_in_its_order(tmp_path):
    folder = messy(tmp_path)
    info = prepare("folder:toy", tmp_path, tmp_path / "cache", size=8)
    for split in ("train", "test"):
        expected = ImageFolder(folder / split)
        images = info.load(split)
        assert images.labels.tolist() == expected.targets
        for image, (theirs, _) in zip(images.images, expected, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(theirs))
    assert not info.notes


SERVICE = [".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", ".git", "#recycle"]


@pytest.mark.parametrize("name", SERVICE)
def test_a_service_folder_is_no_class_and_no_part_of_one_and_is_counted(tmp_path, name, capsys):
    two_classes(tmp_path / "toy")
    clean = prepare("folder:toy", tmp_path, tmp_path / "one")
    for split in ("train", "test"):
        picture(tmp_path / "toy" / split / name / "0.png", seed=90)
        picture(tmp_path / "toy" / split / "cat" / name / "0.png", seed=91)
    (tmp_path / "toy" / "train" / "cat" / "._0.png").write_bytes(b"Mac OS X")
    for _ in range(2):  # when it is decoded, and from the cache
        words = ["folder:toy", f"dataset.root={tmp_path}", f"dataset.cache={tmp_path}/two"]
        assert command.main(words) == 0
        first, second = capsys.readouterr().out.strip().split("\n")
        assert clean.digest in first
        assert "5 service" in second
        assert name in second


def test_every_other_file_is_counted(tmp_path):
    folder = two_classes(tmp_path / "toy")
    (folder / "train" / "cat" / "notes.txt").write_text("")
    (folder / "test" / "ant" / "list.csv").write_text("")
    picture(folder / "train" / "loose.png")
    (folder / "extra").mkdir()
    (folder / "test" / "ant" / "loop").symlink_to(folder / "test")
    info = prepare("folder:toy", tmp_path, tmp_path / "cache", say=[].append)
    (line,) = info.notes
    for part in ("2 files of another type (.csv, .txt)", "1 files outside", "(loose.png)", "(extra)", "(loop)"):
        assert part in line
    assert info.train_counts == info.test_counts == (2, 2)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["ant", "zebra"])
def test_a_class_that_is_empty_in_a_split_is_refused_by_name(tmp_path, split, name):
    folder = two_classes(tmp_path / "toy", ("ant", "cat", "zebra"))
    for path in (folder / split / name).iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(DataError, match=f"{split}.*{name}"):
        prepare("folder:toy", tmp_path, tmp_path / "cache")


def test_two_spellings_of_an_accent_are_one_class(tmp_path):
    two_classes(tmp_path / "toy", ("café", "cafz"))
    one = prepare("folder:toy", tmp_path, tmp_path / "cache")
    path = tmp_path / "toy" / "test" / "café"
    path.rename(path.with_name(unicodedata.normalize("NFD", "café")))
    assert prepare("folder:toy", tmp_path, tmp_path / "cache").digest == one.digest


def test_a_val_beside_an_unlabelled_test_is_the_test_split(tmp_path):
    folder = two_classes(tmp_path / "toy")
    (folder / "test").rename(folder / "val")
    picture(folder / "test" / "1.png")
    info = prepare("folder:toy", tmp_path, tmp_path / "cache", say=[].append)
    assert info.test_counts == (2, 2)
    assert "(test)" in info.notes[0]


@pytest.mark.parametrize("name", ["", "/abs", "..", ".", "../toy", "toy/..", "toy/", "a//b", "./toy", "a/../toy"])
def test_a_folder_has_one_name_below_the_root(tmp_path, name):
    two_classes(tmp_path / "toy")
    with pytest.raises(LookupError, match=r"dataset\.root"):
        prepare(f"folder:{name}", tmp_path, tmp_path / "cache")


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_a_name_that_is_not_utf_8_is_printed_escaped(tmp_path):
    folder = two_classes(tmp_path / "toy")
    bad = os.fsencode(folder / "train" / "cat") + b"/\xff\n.png"
    Path(os.fsdecode(bad)).write_bytes(b"")
    with pytest.raises(DataError, match=r"cat/\\udcff\\n\.png") as caught:
        prepare("folder:toy", tmp_path, tmp_path / "cache")
    str(caught.value).encode()
