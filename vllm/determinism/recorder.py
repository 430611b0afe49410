"""Writing a record: answer by answer to the disk, and under its own name only once it is whole.

Until then it is FILE.partial, which a later run with --resume goes on with. What a line once held is never lost: a
line is on the disk before the next request is told of, and one that was cut in two is taken off.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .records import CutShort, Entry, Header, Reader, RecordError, State, sealed


def partial_name(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


class Recorder:
    """An unfinished record, open at its end. Nobody else writes to it meanwhile."""

    def __init__(self, path: Path, header: Header, state: State) -> None:
        """Open what `state` says is there of the record, or begin a new one with the initial state.

        Raises:
            RecordError: it cannot be written, or somebody else writes it.
        """
        self.path, self.header, self.state = path, header, state
        flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        with self._told():
            handle = os.open(partial_name(path), flags if state.lines else flags | os.O_CREAT, 0o644)
        self.file = os.fdopen(handle, "r+b", buffering=0)
        try:
            self._lock()
            with self._told():
                self.file.truncate(state.offset)
                self.file.seek(state.offset)
            if not state.lines:
                self._write(header.to_json())
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    @property
    def answers(self) -> int:
        return min(self.state.lines - 1, self.header.answers)

    def add(self, entry: Entry) -> None:
        """Put the next answer on the disk.

        Raises:
            RecordError: that failed; all before it stays.
        """
        self._write(entry.to_json(self.answers))

    def finish(self) -> str:
        """Write the end and give the file its name, where an older one is replaced; returns the record's checksum."""
        if not self.state.finished:
            self._write({"end": self.header.answers})
        with self._told():
            os.replace(partial_name(self.path), self.path)
            with contextlib.suppress(OSError):  # a folder cannot be synced everywhere
                folder = os.open(self.path.absolute().parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        return self.state.checksum

    def _write(self, content: dict) -> None:
        line, checksum = sealed(content, self.state.checksum)
        with self._told():
            try:
                written = 0
                while written < len(line):
                    written += self.file.write(line[written:]) or 0
                os.fsync(self.file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    self.file.truncate(self.state.offset)
                raise
        self.state = State(checksum, self.state.offset + len(line), self.state.lines + 1)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordError(self.path, "is being recorded by another process") from None
        except OSError:  # a file system without locks
            return

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"; {self.answers} answers are kept in {partial_name(self.path)}" if self.state.lines else ""
            raise RecordError(self.path, f"cannot be written: {error.strerror}{kept}") from None


def kept(path: Path) -> tuple[Header, State] | None:
    """The header of the unfinished record of that name and how far it goes; None where there is nothing of it.

    Raises:
        RecordError: it is not sound up to its end.
    """
    partial = partial_name(path)
    if not partial.exists():
        return None
    try:
        with Reader(partial) as reader:
            with contextlib.suppress(CutShort):
                reader.check()
            return reader.header, reader.state
    except CutShort:  # not even its first line
        return None
