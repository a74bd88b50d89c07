"""Files that outlive this process, and that other people read."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path, notes: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is on the disk when this returns, and readable to whom the umask lets in."""
    save_file(tensors, path, notes)
    share(path, 0o666)  # safetensors makes its files the owner's alone
    with path.open("rb") as file:
        os.fsync(file.fileno())


def share(path: Path, mode: int) -> None:
    """Give a file or folder the rights that `open` or `mkdir` would have given it."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)
