"""Files that outlive this process, and that other people read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path, notes: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is on the disk when this returns, and readable to whom the umask lets in.

    Raises:
        OSError: it cannot be written, e.g. because the disk is full.
    """
    try:
        save_file(tensors, path, notes)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    share(path, 0o666)  # safetensors makes its files the owner's alone
    with path.open("rb") as file:
        os.fsync(file.fileno())


def digest_of(tensors: dict[str, Tensor], notes: dict[str, str]) -> str:
    """SHA-256 over the names, types, shapes and values of tensors, and over the notes beside them."""
    total = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def disk_is_full(error: BaseException | None) -> bool:
    """Is a full disk, or a used-up quota, behind this error?"""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def share(path: Path, mode: int) -> None:
    """Give a file or folder the rights that `open` or `mkdir` would have given it."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)


def check_writable(folder: Path) -> None:
    """Make a folder if there is none, and write a small file there, which is removed.

    Raises:
        OSError: it cannot be made or written; `filename` says where.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe.") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(folder)) from error
