"""Image files: which ones a folder holds, and their pixels as 8-bit RGB."""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

# torchvision's IMG_EXTENSIONS; importing torchvision for them would slow down every command.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What operating systems and network drives leave in folders, in lower case; so is every name that begins with a dot.
SERVICE_NAMES = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "@tmp",
    "@recycle",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "lost+found",
    "network trash folder",
    "temporary items",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
}
WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
EIGHT_BITS = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"} | WITH_ALPHA


class DataError(ValueError):
    """Data that are there and cannot be used; the message is one line that names the file or folder."""


class LeftOut:
    """What a reader passes over, by kind; `line` says how much of each and gives examples."""

    def __init__(self) -> None:
        self.kinds: dict[str, Counter[str]] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        self.kinds.setdefault(kind, Counter())[example] += count

    def line(self) -> str:
        """Empty where nothing was left out."""
        parts = []
        for kind, examples in sorted(self.kinds.items()):
            names = [printable(name) for name, _ in sorted(examples.items())]
            more = ", ..." if len(names) > 5 else ""
            parts.append(f"{sum(examples.values())} {kind} ({', '.join(names[:5])}{more})")
        return f"left out: {'; '.join(parts)}" if parts else ""


def printable(name: str | Path) -> str:
    """A name for a message; bytes that are not UTF-8 and control characters are escaped."""
    text = str(name).encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_service(name: str) -> bool:
    """Is this the name of a file or folder that no person put there?"""
    return name[:1] == "." or name.lower() in SERVICE_NAMES


def normal(name: str) -> str:
    """One spelling of a name: macOS decomposes accented letters (NFD) that others write as one (NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def walk(folder: Path, left_out: LeftOut | None = None) -> list[os.DirEntry[str]]:
    """All files of a folder and its sub-folders, links followed, in the order in which torchvision reads them.

    Service files and folders, and links to a folder above them, are added to `left_out`.

    Raises:
        OSError: a folder cannot be read.
    """
    left_out = left_out or LeftOut()
    files: list[tuple[str, str, os.DirEntry[str]]] = []

    def visit(directory: str, above: frozenset[tuple[int, int]]) -> None:
        name = normal(directory)
        with os.scandir(directory) as entries:
            for entry in entries:
                if is_service(entry.name):
                    left_out.add("service files or folders", entry.name)
                elif not is_folder(entry):
                    files.append((name, normal(entry.name), entry))
                elif (inode := _inode(entry.path)) in above:
                    left_out.add("links to a folder above them", entry.name)
                else:
                    visit(entry.path, above | {inode})

    visit(str(folder), frozenset(map(_inode, [folder, *folder.resolve().parents])))
    return [entry for _, _, entry in sorted(files, key=lambda file: file[:2])]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """A folder or a link to one; a link that leads nowhere or to itself is a file, whose decoding names it."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _inode(path: Path | str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def images_in(folder: Path, left_out: LeftOut, expected: tuple[str, ...] = ()) -> list[Path]:
    """The image files of a folder and its sub-folders, by their suffixes.

    Args:
        expected: suffixes of other files that belong there, and are not counted as left out.
    """
    images = []
    for entry in walk(folder, left_out):
        if entry.name.lower().endswith(SUFFIXES):
            images.append(Path(entry.path))
        elif not entry.name.lower().endswith(expected):
            left_out.add("files of another type", Path(entry.name).suffix.lower() or entry.name)
    return images


def fingerprint(paths: Iterable[Path], root: Path) -> str | None:
    """A hash of the names, sizes and times of all files at these paths under `root`; None: there are none.

    Opens no file: about 0.6 s for 60,000 of them.
    """
    states, above = [], str(root)
    for path in paths:
        files = [(file.path, file.stat(follow_symlinks=False)) for file in walk(path)] if path.is_dir() else []
        if path.is_file():
            files = [(str(path), path.stat())]
        states += [f"{name.removeprefix(above)}\0{at.st_size} {at.st_mtime_ns}\0" for name, at in files]
    return hashlib.sha256("".join(states).encode(errors="surrogateescape")).hexdigest()[:8] if states else None


def read_image(path: Path) -> tuple[Image.Image, bool]:
    """The first frame of an image file as 8-bit RGB, upright; true if the file has more frames.

    - 16 bits: the upper eight. EXIF orientation is applied. Grey becomes three equal channels.
    - Alpha, a transparent colour and a transparent palette entry: on white.

    Raises:
        DataError: the file is damaged, too large, or of a mode whose range of values is not known (32-bit integers,
            floats).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError("it is not a regular file")  # opening a pipe would wait for ever
        with Image.open(path) as file:
            if Image.MAX_IMAGE_PIXELS and file.width * file.height > Image.MAX_IMAGE_PIXELS:
                raise DataError(f"{file.width} x {file.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
            frames = getattr(file, "n_frames", 1)
            file.load()
            return _rgb(file, path), frames > 1
    except UnidentifiedImageError as error:
        raise DataError(f"{printable(path)} cannot be used: it is not an image, or damaged at its beginning") from error
    except Exception as error:  # Pillow's readers raise almost anything on damaged bytes
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{printable(path)} cannot be used: {' '.join(text.split())}") from error


def _rgb(file: Image.Image, path: Path) -> Image.Image:
    """A loaded file as upright 8-bit RGB.

    Raises:
        DataError: see `read_image`.
    """
    image = ImageOps.exif_transpose(file)
    transparent = file.info.get("transparency")
    # Pillow gives 16-bit PGM, and older releases 16-bit PNG, as 32-bit integers.
    if file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
        values = np.asarray(image)
        bits, inverted = _tiff_grey(file)
        grey = (values >> (bits - 8)).astype(np.uint8)
        grey = 255 - grey if inverted else grey
        return _on_white(grey, values != transparent) if transparent is not None else _stacked(grey)
    if file.mode not in EIGHT_BITS:
        raise DataError(f"mode {file.mode} has no fixed range of values; save the image with 8 or 16 bits a channel")
    if transparent is not None and file.mode in ("1", "L", "RGB"):
        # Pillow compares 8-bit pixels with a transparent colour of the file's own bit depth.
        depth = _png_depth(path) if file.format == "PNG" else 8
        if depth > 8:
            raise DataError("a transparent colour of 16 bits a channel; save the image with an alpha channel")
        pixels = np.asarray(image.convert("RGB"))
        scale = 255 // (2**depth - 1) if file.mode == "L" else 1
        return _on_white(pixels, (pixels != np.multiply(transparent, scale)).any(axis=-1))
    if file.has_transparency_data:
        straight = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        rgba = np.asarray(straight)
        return _on_white(rgba[..., :3], rgba[..., 3])
    return image.convert("RGB")


def _stacked(grey: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.stack([grey] * 3, axis=-1))


def _on_white(colour: NDArray[np.uint8], alpha: NDArray[np.uint8] | NDArray[np.bool_]) -> Image.Image:
    """Composite (H, W[, 3]) on white; alpha (H, W) is 0 to 255, or true where opaque."""
    colour = np.stack([colour] * 3, axis=-1) if colour.ndim == 2 else colour
    weight = (np.where(alpha, 255, 0) if alpha.dtype == bool else alpha).astype(np.uint32)[..., None]
    return Image.fromarray(((colour * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8))


def _tiff_grey(file: Image.Image) -> tuple[int, bool]:
    """Bits of a sample, and whether 0 is white: Pillow keeps both as a TIFF has them where samples exceed 8 bits."""
    tags = getattr(file, "tag_v2", {})
    bits_per_sample, photometric = 258, 262
    return tags.get(bits_per_sample, (16,))[0], tags.get(photometric, 1) == 0


def _png_depth(path: Path) -> int:
    """Bits of a sample: the byte behind width and height in a PNG's first chunk."""
    with path.open("rb") as file:
        return file.read(25)[24]
