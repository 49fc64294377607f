"""A run as a file: a header line, then a line of JSON per step.

Lines are handed to the system whole, as the monitor makes its records, at least once a second: a process that is killed loses the last second at most, and leaves
at most one unfinished line behind, when the disk is full. A reader leaves that one out; appending cuts it off.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from ullage._errors import ArgumentError, MonitorError
from ullage._files import check_writable
from ullage.monitor._records import SCHEMA, Header, StepRecord

KEY = "monitor_schema"
_EXISTS = ("refuse", "overwrite", "append")
_encode = msgspec.json.Encoder().encode
_decode_step = msgspec.json.Decoder(StepRecord).decode


class JsonlWriter:
    """Writes a run's file.

    Args:
        path: the file; its folder must exist.
        exists: what to do with an existing file: "refuse", "overwrite" (it is emptied when the monitor starts) or "append"
            (another header and its steps are added).

    Raises:
        ArgumentError: it can't be written, or is there already, or is no Monitor's file to append to.
    """

    def __init__(self, path: str | Path, exists: str = "refuse") -> None:
        if exists not in _EXISTS:
            raise ArgumentError(f"exists={exists!r}: expected one of {', '.join(map(repr, _EXISTS))}")
        self.path = check_writable(path)
        self._lines: list[bytes] = []
        self._keep = 0  # bytes of the file that stay
        if exists == "append" and self.path.exists():
            self._keep = _whole_lines(self.path)
        elif exists != "overwrite" and self.path.exists():
            raise ArgumentError(f"{path}: is there already; give another name, or exists='overwrite' or 'append'")
        self._exclusive = exists == "refuse"
        self._file: Any = None

    def start(self, header: Header) -> None:
        """Open the file and write the header."""
        if self._exclusive:
            try:
                self._file = self.path.open("xb", buffering=0)
            except FileExistsError:
                raise ArgumentError(f"{self.path}: another run has just made it; give another name") from None
        else:
            # not truncated by opening it: what is kept stays there at every moment
            self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0)
            self._file.truncate(self._keep)
            self._file.seek(self._keep)
        self._lines.append(_encode(header))
        self.flush()

    def write(self, record: StepRecord) -> None:
        """Take a step."""
        self._lines.append(_encode(record))

    def flush(self) -> None:
        """Hand buffered lines to the system. OSError if the file can't be written."""
        if self._file is None or not self._lines:
            return
        data = memoryview(b"\n".join(self._lines) + b"\n")
        self._lines.clear()
        while data:  # a raw file may take less than it is given
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Flush and close; nothing the second time."""
        file = self._file
        if file is None:
            return
        try:
            self.flush()
        finally:
            self._file = None
            file.close()


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line. ArgumentError unless the file is a Monitor's, or empty."""
    data = path.read_bytes()
    if not data:
        return 0
    try:
        read_header(data.split(b"\n", 1)[0])
    except (msgspec.DecodeError, MonitorError) as error:
        raise ArgumentError(f"{path}: is no file of a Monitor to append to: {error}") from error
    return data.rfind(b"\n") + 1


def read_header(line: bytes) -> Header:
    """The header on a line. MonitorError: written by a newer ullage; msgspec.DecodeError: it is none."""
    version = msgspec.json.decode(line, type=_Version).monitor_schema
    if version > SCHEMA:
        raise MonitorError(f"written by a newer ullage ({KEY} {version}, this one knows {SCHEMA}); upgrade ullage")
    return msgspec.json.decode(line, type=Header)


class _Version(msgspec.Struct):
    monitor_schema: int


def read_run(path: str | Path) -> tuple[Header, list[StepRecord]]:
    """The last header of a Monitor's file, and all its steps.

    Raises:
        MonitorError: it can't be read, or is none.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise MonitorError(f"{path}: can't be read: {error}") from error
    lines.pop()  # "", or a line that was never finished
    header: Header | None = None
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            if line.startswith(b'{"' + KEY.encode()):
                header = read_header(line)
            elif header is None:
                raise MonitorError("the first line is no header of a Monitor")
            else:
                steps.append(_decode_step(line))
        except (msgspec.DecodeError, MonitorError) as error:
            raise MonitorError(f"{path}, line {number}: {error}") from error
    if header is None:
        raise MonitorError(f"{path}: has no header of a Monitor")
    return header, steps
