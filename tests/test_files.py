"""Files are whole or not there: whoever writes at the same time, is killed, or has no disk left."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import standins

from tangentfast import files
from tangentfast.files import link, replacing

# The file alone: torch takes a second to import.
IMPORT = f"import runpy, sys; replacing = runpy.run_path({files.__file__!r})['replacing']\n"
FOREVER = """
print("ready", flush=True)
i = 0
while True:
    i = (i + 1) % 256
    with replacing(sys.argv[1]) as file:
        for _ in range(8):
            file.write(bytes([i]) * 100_000)
"""


def write(path: Path | str, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


@pytest.fixture(params=["unnamed", "named"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With files without names, and as on a system that has none."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE")
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("Linux only")
    return request.param


def test_new_and_replaced(system: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"first", b"", b"second"):
        with replacing(path) as file:
            file.write(content)
            assert [p.suffix for p in tmp_path.iterdir() if p != path] == (
                [".part"] if system == "named" else []
            )
        assert path.read_bytes() == content
        assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file(system: str, tmp_path: Path) -> None:
    path = tmp_path / "a"

    def fails(error: type[BaseException]) -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise error

    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error):
            fails(error)
        assert not list(tmp_path.iterdir())
    write(path, b"old")
    with standins.largest_file(1000), pytest.raises(OSError, match="large"):
        write(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="absent"):
        write(tmp_path / "absent" / "a", b"")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        write(tmp_path, b"")


def test_file_systems_that_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return opened(path, flags, mode)

    monkeypatch.setattr(files.os, "open", refuse)
    write(tmp_path / "a", b"old")
    write(tmp_path / "a", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"new"]


def test_modes(system: str, tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    path = tmp_path / "a"
    write(path, b"")
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    for mode in (0o600, 0o664, 0o400):
        path.chmod(mode)
        write(path, b"new")
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_symbolic_links_stay(system: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    links = [tmp_path / "one", tmp_path / "two"]
    links[0].symlink_to("there/file")
    links[1].symlink_to(links[0])
    for content in (b"made by a dangling link", b"replaced"):
        write(links[1], content)
        assert (tmp_path / "there" / "file").read_bytes() == content
        assert all(path.is_symlink() for path in links)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        write(tmp_path / "loop", b"")


def test_names_as_long_as_the_file_system_allows(system: str, tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127 + "a")
    write(path, b"old")
    write(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"new"]


def test_pipes_and_devices_are_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    with replacing(pipe) as file:
        file.write(b"__cdef")
        file.seek(0)
        file.write(b"ab")
    reader.join()
    assert received == [b"abcdef"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    write("/dev/null", b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    code = IMPORT + "with replacing('/dev/stdout') as file: file.write(b'x')"
    for out in (subprocess.PIPE, (tmp_path / "out").open("wb")):
        done = subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
        assert (done.stdout or (tmp_path / "out").read_bytes()) == b"x"
    assert len(list(tmp_path.iterdir())) == 2


def test_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    target.write_bytes(b"old")
    for _ in range(2):  # renaming one name of a file to another of its names does nothing
        link(source, target)
        assert source.samefile(target)

    def no_links(*_: object) -> None:
        raise PermissionError

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(files.os, "link", no_links)
    target.unlink()
    link(source, target)
    assert target.read_bytes() == b"content"
    assert not source.samefile(target)
    assert len(list(tmp_path.iterdir())) == 2


def write_again_and_again(path: Path, byte: int, until: float) -> None:
    while time.time() < until:
        write(path, bytes([byte]) * 300_000)


def test_every_reader_meets_a_whole_file(system: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, bytes(300_000))
    end = time.time() + 1
    fork = multiprocessing.get_context("fork")
    writers: list = [
        kind(target=write_again_and_again, args=(path, i, end))
        for i, kind in enumerate([threading.Thread, threading.Thread, fork.Process, fork.Process])
    ]
    for writer in writers[::-1]:  # processes first: a fork of threads is no good one
        writer.start()
    seen = set()
    while time.time() < end:
        content = path.read_bytes()
        assert content == content[:1] * 300_000
        seen.add(content[:1])
    for writer in writers:
        writer.join()
    assert len(seen) > 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="elsewhere a part may be left")
def test_a_process_that_is_killed_leaves_a_whole_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for i in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", IMPORT + FOREVER, str(path)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.01 + 0.0123 * i)
            process.send_signal(signal.SIGKILL)
        # A file that takes another's place has a name for the instant between two system calls.
        left = [p for p in tmp_path.iterdir() if p != path]
        assert all(p.stat().st_size == 800_000 for p in left)
        if path.exists():
            content = path.read_bytes()
            assert content == content[:1] * 800_000
