"""The file of a store: without a name, its space taken before first use, read and written past the page cache.

The file never has a name (O_TMPFILE); where a filesystem can't do that it is made with mode 0600 and unlinked at once,
while it is still empty. Either way the system frees it when the process ends, however it ends, and after a power cut.

Why threads with preadv and pwritev, and not io_uring, libaio or GPUDirect: the two calls release the GIL, and with
transfers of 2 MiB two threads keep a drive busy. `liburing` (PyPI) has no build for arm64, and io_uring is denied by the
default seccomp profile of common container runtimes; `libaio` comes as C source that needs a compiler and headers;
`kvikio` is for CUDA. Each would need this path beside it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ullage._bytes import format_bytes
from ullage._errors import OffloadError
from ullage.offload._extents import BLOCK

IDLE_TRIES = 4  # calls in a row that move nothing before a transfer is given up

_NO_ANONYMOUS = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}
_HINTS = {
    errno.ENOSPC: "free space there, lower the capacity or name another directory",
    errno.EDQUOT: "the disk quota is used up: lower the capacity or name another directory",
    errno.EIO: "the drive reports an error, see the kernel's log (dmesg): name a directory on another drive",
    errno.EROFS: "the filesystem is read-only: name another directory",
    errno.EACCES: "give yourself write permission there or name another directory",
    errno.EPERM: "give yourself write permission there or name another directory",
    errno.ENOENT: "make the directory first or name another one",
    errno.ENOTDIR: "name a directory",
    errno.EFBIG: "files may not be that large (see `ulimit -f`): lower the capacity",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
}


class TransferError(Exception):
    """A transfer that the system did not call an error; carries what to do."""

    def __init__(self, cause: str, hint: str) -> None:
        super().__init__(cause)
        self.hint = hint


def hint_for(error: BaseException) -> str:
    """Advice for an error of the system or a transfer."""
    if isinstance(error, TransferError):
        return error.hint
    number = error.errno if isinstance(error, OSError) else None
    return _HINTS.get(number or 0, "name another directory")


def cause_of(error: BaseException) -> str:
    """An error in words."""
    if isinstance(error, OSError) and error.errno:
        return f"{error.strerror} ({errno.errorcode.get(error.errno, error.errno)})"
    return str(error) or type(error).__name__


@dataclass(frozen=True)
class StoreFile:
    """An open file without a name.

    Attributes:
        fd: its descriptor.
        directory: where it lies.
        capacity: its bytes, all of them allocated.
        direct: whether the page cache is bypassed (O_DIRECT).
        notes: sentences for the user about it.
    """

    fd: int
    directory: str
    capacity: int
    direct: bool
    notes: tuple[str, ...]


def open_file(directory: str, capacity: int, buffer: np.ndarray) -> StoreFile:
    """Make the file and take its space.

    Args:
        directory: where; it must be there.
        capacity: bytes, in whole blocks.
        buffer: uint8, at least a block, page-aligned; direct I/O is tried with it.

    Raises:
        OffloadError: the directory is missing or not writable, or has too little space.
    """
    fd: int | None = None
    doing = "make a file there"
    try:
        _check_space(directory, capacity)
        fd, notes = _anonymous(directory)
        doing = f"allocate {format_bytes(capacity)} ({capacity} bytes) there, {_available(directory)} bytes being free"
        os.posix_fallocate(fd, 0, capacity)
        doing = "write to a file there"
        direct = _go_direct(fd, buffer)
    except OSError as error:
        _close(fd)
        message = f"offload directory {directory}: can't {doing}: {cause_of(error)}; {hint_for(error)}"
        raise OffloadError(message, path=directory, nbytes=capacity) from error
    except BaseException:
        _close(fd)
        raise
    if not direct:
        notes.append(f"{directory} refuses direct I/O: what is offloaded passes through the page cache")
    if _filesystem(directory) in ("tmpfs", "ramfs"):
        notes.append(f"{directory} is in memory ({_filesystem(directory)}): offloading there frees nothing")
    return StoreFile(fd, directory, capacity, direct, tuple(notes))


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _available(directory: str) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _check_space(directory: str, capacity: int) -> None:
    available = _available(directory)
    if available < capacity:
        needed = (
            f"needs {format_bytes(capacity)} ({capacity} bytes), {format_bytes(available)} ({available} bytes) are free"
        )
        raise OffloadError(
            f"offload directory {directory}: {needed}; {_HINTS[errno.ENOSPC]}", path=directory, nbytes=capacity
        )


def _anonymous(directory: str) -> tuple[int, list[str]]:
    """A new file that has no name, or had one for an instant."""
    flags = os.O_TMPFILE | os.O_EXCL | os.O_RDWR  # O_EXCL: no one can give it a name through /proc
    try:
        return os.open(directory, flags, 0o600), []
    except OSError as error:
        # EISDIR and ENOENT come from old kernels too, so a missing directory is looked for again by mkstemp
        if error.errno not in _NO_ANONYMOUS:
            raise
    fd, name = tempfile.mkstemp(prefix=".ullage-offload-", dir=directory)
    try:
        Path(name).unlink()
    except BaseException:
        os.close(fd)
        raise
    return fd, [f"{directory} has no files without a name: the file was made and unlinked at once"]


def _go_direct(fd: int, buffer: np.ndarray) -> bool:
    """Turn direct I/O on if the filesystem takes it; try the file with one block either way."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    block = buffer[:BLOCK].data
    for direct in (True, False):
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags)
            os.pwritev(fd, [block], 0)  # some filesystems take the flag and refuse the transfer
            os.preadv(fd, [block], 0)
            return direct
        except OSError as error:
            if not direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    raise AssertionError("unreachable")


def _filesystem(directory: str) -> str:
    """The type of the filesystem, '' where the system does not say."""
    device = Path(directory).stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), Path("/proc/self/mountinfo").open(encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            fields, _, kind = line.partition(" - ")
            if fields.split()[2] == wanted:
                return kind.split()[0]
    return ""


def write_all(file: StoreFile, buffer: np.ndarray, offset: int) -> None:
    """Write a buffer whose length, address and offset are in whole blocks; short writes are continued.

    Raises:
        OSError, TransferError: the system refuses, or takes nothing several times in a row.
    """
    done, idle, view = 0, 0, buffer.data
    while done < len(view):
        moved = os.pwritev(file.fd, [view[done:]], offset + done)
        done, idle = _progress(file, done, moved, len(view), idle)
        if idle == IDLE_TRIES:
            raise TransferError(f"only {done} of {len(view)} bytes were taken at offset {offset}", _HINTS[errno.ENOSPC])


def read_all(file: StoreFile, buffer: np.ndarray, offset: int) -> None:
    """Fill a buffer whose length, address and offset are in whole blocks; short reads are continued.

    Raises:
        OSError, TransferError: the system refuses, or the file ends early.
    """
    done, idle, view = 0, 0, buffer.data
    while done < len(view):
        moved = os.preadv(file.fd, [view[done:]], offset + done)
        done, idle = _progress(file, done, moved, len(view), idle)
        if idle == IDLE_TRIES:
            cause = f"only {done} of {len(view)} bytes came back at offset {offset}, as if the file had been cut short"
            raise TransferError(cause, "check the filesystem or name a directory on another drive")


def _progress(file: StoreFile, done: int, moved: int, length: int, idle: int) -> tuple[int, int]:
    """Bytes moved so far by a transfer, and how many calls in a row moved nothing.

    Direct I/O must go on at a whole block, so what lies beyond the last one is transferred again.
    """
    kept = moved if done + moved >= length or not file.direct else moved // BLOCK * BLOCK
    return done + kept, 0 if kept > 0 else idle + 1
