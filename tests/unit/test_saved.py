"""Saved guests on the disk: what was changed is seen, and a copy is whole, sparse and private, or not there."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nixbox import sparse
from nixbox.errors import NixboxError
from nixbox.machine import saved

MIB = 1 << 20
BLOCK = 4096
NAMES = ["memory", "state"]


def write_at(path: Path, *parts: tuple[int, bytes], size: int | None = None) -> Path:
    """A sparse file with these bytes at these offsets."""
    with path.open("wb") as file:
        for offset, data in parts:
            file.seek(offset)
            file.write(data)
        if size is not None:
            file.truncate(size)
    return path


def change_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def tick() -> None:
    """Past one step of the clock that older kernels take a file's times from."""
    time.sleep(0.02)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A large file and a small one, as a hypervisor leaves them."""
    directory = tmp_path / "sealed"
    directory.mkdir(mode=0o700)
    write_at(directory / "memory", (0, b"first"), (3 * MIB, b"m" * 5000), (7 * MIB, b"x"), size=8 * MIB)
    write_at(directory / "state", (0, b"device state" * 1000))
    saved.seal(directory, NAMES)
    tick()
    return directory


# --- sealed ----------------------------------------------------------------------------------------------


def test_what_is_whole_is_silent(sealed: Path) -> None:
    assert saved.faults(sealed) == []
    assert stat.S_IMODE((sealed / saved.SEAL).stat().st_mode) == 0o600


def test_reading_and_renaming_change_nothing(sealed: Path) -> None:
    with (sealed / "memory").open("r+b") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as private:
        private[0:5] = b"other"  # as a guest does
    (sealed / "state").read_bytes()
    moved = sealed.rename(sealed.with_name("moved"))
    assert saved.faults(moved) == []


def test_a_large_file_that_nobody_touched_is_not_read(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def digest(path: Path, real: Callable[[Path], str] = saved._digest) -> str:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(saved, "_digest", digest)
    assert saved.faults(sealed) == []
    assert read == ["state"]
    (sealed / "memory").touch()
    assert saved.faults(sealed) == []
    assert read == ["state", "memory", "state"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def change_the_first_byte(path: Path) -> None:
    change_byte(path, 0)


def change_the_last_byte(path: Path) -> None:
    change_byte(path, path.stat().st_size - 1)


def change_a_byte_behind_its_time(path: Path) -> None:
    before = path.stat()
    change_byte(path, 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ctime_ns != before.st_ctime_ns


def shift(path: Path) -> None:
    """The same bytes, elsewhere."""
    data = path.read_bytes()
    path.write_bytes(data[-BLOCK:] + data[:-BLOCK])


def empty(path: Path) -> None:
    os.truncate(path, 0)


def make_a_hole_of_it(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def link_elsewhere(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGE = (
    *(truncate, grow, empty, change_the_first_byte, change_the_last_byte, change_a_byte_behind_its_time),
    *(shift, make_a_hole_of_it, link_elsewhere),
)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_what_was_changed_is_named(sealed: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(sealed / name)
    (fault,) = saved.faults(sealed)
    assert fault.startswith(f"{name} ")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_missing_is_named(sealed: Path, name: str) -> None:
    (sealed / name).unlink()
    assert saved.faults(sealed) == [f"{name} is missing"]


def test_the_same_bytes_at_another_place_are_not_the_same(sealed: Path) -> None:
    write_at(sealed / "memory", (0, b"first"), (4 * MIB, b"m" * 5000), (7 * MIB, b"x"), size=8 * MIB)
    assert saved.faults(sealed) == ["memory is not what was saved"]


def test_every_file_is_looked_at(sealed: Path) -> None:
    for name in NAMES:
        truncate(sealed / name)
    assert [fault.split()[0] for fault in saved.faults(sealed)] == NAMES


def test_a_size_is_told_in_numbers(sealed: Path) -> None:
    os.truncate(sealed / "memory", 5)
    assert saved.faults(sealed) == [f"memory has 5 bytes instead of {8 * MIB}"]


@pytest.mark.parametrize("name", NAMES)
def test_an_equal_file_in_its_place_is_as_good(sealed: Path, name: str) -> None:
    old = (sealed / name).stat()
    saved.copy(sealed / name, sealed / name)
    assert (sealed / name).stat().st_ino != old.st_ino
    assert saved.faults(sealed) == []
    change_byte(sealed / name, 0)
    assert saved.faults(sealed) == [f"{name} is not what was saved"]


def test_no_seal(sealed: Path) -> None:
    (sealed / saved.SEAL).unlink()
    assert saved.faults(sealed) == [f"{saved.SEAL} is missing"]
    assert saved.faults(sealed / "nowhere") == [f"{saved.SEAL} is missing"]


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"null", b"1", b"\xff", b'{"memory": 1}', b'{"memory": null}', b'{"memory": {}}'),
        *(b'{"memory": {"sha256": "x"}}', b'{"memory": {"size": 8388608}}', b'{"memory": ["size"]}'),
    ],
)
def test_a_seal_that_says_nothing_is_damaged(sealed: Path, data: bytes) -> None:
    (sealed / saved.SEAL).write_bytes(data)
    assert saved.faults(sealed) == [f"{saved.SEAL} is damaged"]


def test_a_seal_that_was_cut_off_is_damaged(sealed: Path) -> None:
    text = (sealed / saved.SEAL).read_text()
    for length in range(0, len(text.rstrip()), 37):
        (sealed / saved.SEAL).write_text(text[:length])
        assert saved.faults(sealed) == [f"{saved.SEAL} is damaged"]


def test_a_seal_with_another_digest_is_not_believed(sealed: Path) -> None:
    seal = json.loads((sealed / saved.SEAL).read_text())
    seal["state"]["sha256"] = "0" * 64
    (sealed / saved.SEAL).write_text(json.dumps(seal))
    assert saved.faults(sealed) == ["state is not what was saved"]


def test_nothing_is_sealed_through_a_link_or_in_vain(sealed: Path) -> None:
    (sealed / "other").symlink_to("memory")
    for name in ("other", "nothing"):
        with pytest.raises(OSError):
            saved.seal(sealed, [*NAMES, name])
    assert saved.faults(sealed) == []  # the old seal stays


# --- copies ----------------------------------------------------------------------------------------------


def check_copy(source: Path, target: Path) -> None:
    """Equal, holes included, private, and nothing else beside it."""
    assert target.read_bytes() == source.read_bytes()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    # Room for what a file system itself needs to know of the extents.
    assert target.stat().st_blocks * 512 <= source.stat().st_blocks * 512 + 16 * BLOCK
    assert not list(target.parent.glob(".*"))


SPARSE = {
    "empty": write_at,
    "one_hole": lambda path: write_at(path, size=64 * MIB),
    "a_hole_first": lambda path: write_at(path, (60 * MIB, b"end")),
    "a_hole_last": lambda path: write_at(path, (0, b"begin"), size=64 * MIB + 1),
    "holes_everywhere": lambda path: write_at(path, *((i * MIB + 17, b"x") for i in range(1, 60)), size=64 * MIB),
    "dense": lambda path: write_at(path, (0, os.urandom(3 * MIB + 5))),
}


@pytest.mark.parametrize("make", SPARSE.values(), ids=SPARSE.keys())
def test_a_copy_is_as_sparse_as_its_source(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path / "source")
    source.chmod(0o644)
    old = os.umask(0)
    try:
        saved.copy(source, tmp_path / "target")
    finally:
        os.umask(old)
    check_copy(source, tmp_path / "target")


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(parts=[(BLOCK - 1, b"xy"), (3 * BLOCK, b"\0" * BLOCK)], size=4 * BLOCK)
@given(
    parts=st.lists(
        st.tuples(
            st.integers(0, 40).map(lambda block: block * BLOCK) | st.integers(0, 40 * BLOCK),
            st.binary(min_size=1, max_size=20).map(lambda data: data * 500) | st.binary(min_size=1, max_size=9),
        ),
        max_size=8,
    ),
    size=st.integers(0, 60 * BLOCK),
)
def test_any_file_is_copied_as_it_is(tmp_path: Path, parts: list[tuple[int, bytes]], size: int) -> None:
    source = write_at(tmp_path / "source", *parts, size=size)
    saved.copy(source, tmp_path / "target")
    check_copy(source, tmp_path / "target")
    # What tells a copy from another file takes it for the same.
    assert saved._digest(tmp_path / "target") == saved._digest(source)


def test_a_copy_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    source = write_at(tmp_path / "source", (5000, b"new"))
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "target").symlink_to("precious")
    (tmp_path / ".target.new").write_text("left over")
    for _ in range(2):
        saved.copy(source, tmp_path / "target")
        assert not (tmp_path / "target").is_symlink()
        check_copy(source, tmp_path / "target")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_file_that_was_removed_is_copied_from_its_descriptor(tmp_path: Path) -> None:
    content = write_at(tmp_path / "source", (MIB, b"data"), size=2 * MIB).read_bytes()
    fd = os.open(tmp_path / "source", os.O_RDONLY)
    try:
        (tmp_path / "source").unlink()
        for name in ("first", "second"):
            saved.copy(Path(f"/proc/self/fd/{fd}"), tmp_path / name)
            assert (tmp_path / name).read_bytes() == content
    finally:
        os.close(fd)


def no_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that shares no blocks."""

    def refuse(*args: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "ioctl", refuse)


def sendfile_fails(monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]) -> None:
    """Something happens in the middle of a copy."""
    calls = 0

    def sendfile(*args: int, real: Callable[..., int] = os.sendfile) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            fail()
        return real(*args)

    no_clone(monkeypatch)
    monkeypatch.setattr(os, "sendfile", sendfile)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A source of two extents, and a target that is there already."""
    (tmp_path / "target").write_text("old")
    return write_at(tmp_path / "source", (0, b"a" * 5000), (2 * MIB, b"b" * 5000)), tmp_path / "target"


def check_untouched(target: Path) -> None:
    assert target.read_text() == "old"
    assert {path.name for path in target.parent.iterdir()} <= {"source", "target"}


def test_a_source_that_is_gone_leaves_the_target(pair: tuple[Path, Path]) -> None:
    source, target = pair
    source.unlink()
    with pytest.raises(NixboxError, match=r"cannot copy .*/source to .*/target: No such file"):
        saved.copy(source, target)
    check_untouched(target)


def test_a_source_that_is_a_loop_leaves_the_target(pair: tuple[Path, Path]) -> None:
    source, target = pair
    source.unlink()
    source.symlink_to(source)
    with pytest.raises(NixboxError, match=r"cannot copy .*/source to .*/target: Too many levels"):
        saved.copy(source, target)
    check_untouched(target)


def test_a_source_that_shrinks_leaves_the_target(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = pair
    sendfile_fails(monkeypatch, lambda: os.truncate(source, 10))
    with pytest.raises(NixboxError, match="cannot copy"):
        saved.copy(source, target)
    check_untouched(target)


SPACE = "free some space and try again"


@pytest.mark.parametrize(
    ("error", "raised", "words", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), NixboxError, "no space left to write .*/target", SPACE),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), NixboxError, "no space left to write .*/target", SPACE),
        (
            OSError(errno.EIO, "Input/output error"),
            NixboxError,
            "cannot copy .*/source to .*/target: Input/output",
            None,
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None, None),
    ],
    ids=["full", "quota", "broken", "interrupted"],
)
def test_a_copy_that_fails_leaves_the_target(
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    words: str | None,
    hint: str | None,
) -> None:
    def fail() -> None:
        raise error

    sendfile_fails(monkeypatch, fail)
    with pair[0].open("rb") as opened, pytest.raises(raised, match=words) as failed:
        saved.copy(Path(f"/proc/self/fd/{opened.fileno()}"), pair[1])  # as a template's disk is given
    assert getattr(failed.value, "hint", None) == hint
    check_untouched(pair[1])


def test_no_directory_for_a_copy(pair: tuple[Path, Path]) -> None:
    with pytest.raises(NixboxError, match="cannot copy"):
        saved.copy(pair[0], pair[0].parent / "nowhere" / "target")


def test_memory_without_a_file_system_takes_a_copy(tmp_path: Path) -> None:
    source = write_at(tmp_path / "source", (MIB, b"data"), size=4 * MIB)
    memory = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        with source.open("rb") as file:
            sparse.copy_data(file.fileno(), memory)
        assert os.pread(memory, 5 * MIB, 0) == source.read_bytes()
        assert os.fstat(memory).st_blocks * 512 <= 8 * BLOCK
    finally:
        os.close(memory)


def test_a_new_file_is_private_and_new(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with saved.create(tmp_path / "memory") as file:
            file.write(b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "memory").stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("memory", "link"):
        with pytest.raises(FileExistsError):
            saved.create(tmp_path / name)
    assert (tmp_path / "memory").read_bytes() == b"x"
