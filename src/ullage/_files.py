"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from ullage._errors import ArgumentError


def check_writable(path: str | Path) -> Path:
    """Return the path; ArgumentError if no file can be written there. Nothing is created."""
    path = Path(path)
    if path.is_dir():
        raise ArgumentError(f"{path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ArgumentError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ArgumentError(f"{path}: no permission to write there")
    return path


def write_whole(path: str | Path, data: bytes) -> None:
    """Write beside the file and rename: a reader, or a crash, sees the old file or the new one."""
    target = check_writable(path)
    if target.is_symlink():
        target = target.resolve()
    if target.exists() and not target.is_file():  # a pipe, /dev/stdout
        target.write_bytes(data)
        return
    mode = target.stat().st_mode & 0o777 if target.exists() else None
    name = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    # the kernel takes off what the process's umask says, which nobody can read from Python without setting it for all threads
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            name.chmod(mode)
        name.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            name.unlink()
        raise
