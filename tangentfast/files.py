"""Files that appear complete or not at all: whatever the package writes is written here."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["link", "replacing"]

_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file, to write and read back, that takes the place of `path` after the block.

    Any number of threads and processes may write one path at a time: the last one stays, and
    whoever reads it meets one whole file. After an error `path` is as it was. Until the end the
    file has no name where the system can do that (``O_TMPFILE`` of Linux), so that a process that
    is killed leaves nothing; elsewhere, and for the instant between two system calls in which a
    file takes another's place, its name is a random hidden one in the same folder.

    A symbolic link stays and what it points to is replaced. A file that is replaced leaves its
    mode and, where that is allowed, its owner; a new one gets the mode that the umask says. What
    is no file (a pipe, a device, a socket) is written into, after the block.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: the folder is not there or cannot be written, or the disk is full.
    """
    old = _status(path)
    if old is not None and stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if old is not None and (not stat.S_ISREG(old.st_mode) or _is_stream(path)):
        with tempfile.TemporaryFile() as content:
            yield content
            content.seek(0)
            with open(path, "ab") as stream:  # what a redirected output has already stays
                shutil.copyfileobj(content, stream)
        return
    target = Path(os.path.realpath(path))
    file, part = _open_beside(target)
    with file, _removed(part):
        yield file
        if old is not None:
            _give(file.fileno(), old)
        file.flush()
        os.fsync(file.fileno())
        if part is None:
            _name(file.fileno(), target)
        else:
            os.replace(part, target)
    _sync(target.parent)


def link(source: Path, target: Path) -> None:
    """Make `target` a second name of the file `source`; a copy where the system has no links."""
    part = _hidden(target)
    with _removed(part):
        try:
            os.link(source, part)
        except OSError:
            with replacing(target) as file, source.open("rb") as content:
                shutil.copyfileobj(content, file)
            return
        os.replace(part, target)
    _sync(target.parent)


def _status(path: str | os.PathLike[str]) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a name means what a process has open, be it a file."""
    return os.path.abspath(path).startswith(_STREAMS)


def _open_beside(target: Path) -> tuple[IO[bytes], Path | None]:
    """A new file in the folder of `target`, without a name or with that returned."""
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        try:
            return os.fdopen(os.open(target.parent, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b"), None
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise
    part = _hidden(target)
    return open(part, "x+b"), part


def _hidden(target: Path) -> Path:
    """A free name in the folder of `target`, of a length that every file system allows."""
    return target.with_name(f".{secrets.token_hex(8)}.part")


@contextmanager
def _removed(part: Path | None) -> Iterator[None]:
    try:
        yield
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _name(descriptor: int, target: Path) -> None:
    """Give a file without a name that of `target`."""
    try:
        _link_open(descriptor, target)
    except FileExistsError:
        part = _hidden(target)
        with _removed(part):
            _link_open(descriptor, part)
            os.replace(part, target)


def _link_open(descriptor: int, path: Path) -> None:
    # Python follows the link in /proc, as linkat can, only when it is given a folder's descriptor;
    # for an absolute path the system does not look at it.
    os.link(f"/proc/self/fd/{descriptor}", path, dst_dir_fd=descriptor)


def _give(descriptor: int, old: os.stat_result) -> None:
    """Owner, group and mode of the file that is replaced, as far as this user may."""
    if not hasattr(os, "fchown"):
        return
    new = os.fstat(descriptor)
    for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):
        if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
            with contextlib.suppress(OSError):
                os.fchown(descriptor, owner, group)
    with contextlib.suppress(OSError):  # last: a change of owner clears bits of the mode
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def _sync(folder: Path) -> None:
    """The new name survives a loss of power, where a folder can be opened and synchronised."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
