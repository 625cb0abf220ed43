"""Unpacks a tar archive that a guest sends, of which nothing is believed.

Every number has a bound, every name is looked at, every component of a path is opened without following links, and
what the archive does not make itself it can neither write to nor link to. Format: see tarwrite; what GNU tar writes
with `--format=posix --sparse` is understood, with its long names of old.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from nixbox import paths
from nixbox.errors import NixboxError, TimeoutExpired
from nixbox.guest import inside
from nixbox.guest.tarwrite import BLOCK
from nixbox.report import harmless

_PIECE_BYTES: Final = 1 << 18
_MAX_REST_BYTES: Final = 1 << 20
_STALL_S: Final = 180.0
_MAX_PAX_BYTES: Final = 1 << 20
_MAX_NAME_BYTES: Final = 4096  # PATH_MAX
_MAX_MEMBERS: Final = 5_000_000
_MAX_HOLES: Final = 1 << 20
_MAX_SIZE: Final = (1 << 63) - 1
_MAX_SECONDS: Final = 1 << 40  # 34,000 years
_MODES: Final = 0o777  # no set-user-ID, set-group-ID or sticky bit
_LEFT_OUT: Final = {b"3": "device", b"4": "device", b"6": "fifo"}
_OURS: Final = b".nixbox"  # a workspace's: its hooks would run on the host


class Truncated(NixboxError):
    """The stream ended before the archive did."""


def hostile(what: str) -> NixboxError:
    """The error for an archive that no honest tar writes."""
    return NixboxError(
        f"the guest sent a damaged archive: {what}",
        hint="nothing was written outside of the target; look at the guest before you trust what came",
    )


def shown(name: bytes) -> str:
    """A name of the guest's that cannot drive a terminal."""
    return harmless(os.fsdecode(name[:200]).encode("utf-8", "replace").decode())


@dataclass(frozen=True, slots=True)
class Member:
    """One header, with its pax records taken in. `size` is that of the data in the archive."""

    name: bytes
    kind: bytes
    mode: int
    size: int
    mtime_ns: int
    target: bytes
    real_size: int | None = None  # of a sparse file, whose data begins with its map


class Source:
    """The stream: exact numbers of bytes, and an error where it ends before its time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._left = bytearray()

    def exactly(self, size: int) -> bytes:
        """`size` bytes. Raises NixboxError when there are fewer."""
        while len(self._left) < size:
            self._more()
        found = bytes(self._left[:size])
        del self._left[:size]
        return found

    def _more(self) -> None:
        piece = self._read()
        if not piece:
            raise Truncated("what the guest sends ends in the middle", hint="nixbox status shows how it is")
        self._left += piece

    def _read(self) -> bytes:
        ready, _, _ = select.select([self._fd], [], [], _STALL_S)
        if not ready:
            raise TimeoutExpired(f"the guest sent nothing for {_STALL_S:g} s")
        return os.read(self._fd, _PIECE_BYTES)

    def some(self, most: int) -> bytes:
        """At least one byte, and no more than `most`."""
        if not self._left:
            self._more()
        return self.exactly(min(most, len(self._left)))

    def skip(self, size: int) -> None:
        """Pass over so many bytes."""
        while size > 0:
            size -= len(self.some(size))

    def rest(self) -> None:
        """Read to the end: tar fills its last record up, and shall not be stopped at that by us."""
        extra = len(self._left)
        while piece := self._read():
            extra += len(piece)
            if extra > _MAX_REST_BYTES:
                raise hostile("it goes on after its end")


def _octal(data: bytes, what: str) -> int:
    text = data.rstrip(b"\0 ").lstrip(b" ")
    if data[:1] >= b"\x80":  # GNU's base 256, for what octal digits cannot hold: ours come as pax records
        raise hostile(f"{what} is no octal number")
    if text and not all(48 <= c < 56 for c in text):
        raise hostile(f"{what} is no octal number")
    return int(text, 8) if text else 0


def _decimal(data: bytes, what: str) -> int:
    if not (data.isdigit() and len(data) <= 20) or int(data) > _MAX_SIZE:
        raise hostile(f"{what} is out of range")
    return int(data)


def _time(data: bytes) -> int:
    """Nanoseconds of a pax time."""
    bare = data.removeprefix(b"-")
    whole, _, rest = bare.partition(b".")
    if not whole.isdigit() or len(whole) > 20 or (rest and not rest.isdigit()) or int(whole) > _MAX_SECONDS:
        raise hostile("a time is out of range")
    value = int(whole) * 1_000_000_000 + int(rest[:9].ljust(9, b"0"))
    return -value if bare != data else value


class Headers:
    """Reads one member's header after another."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._global: dict[bytes, bytes] = {}
        self._members = 0

    def next(self) -> Member | None:
        """The next member; None at the archive's end. Raises NixboxError for one that is damaged."""
        pax = dict(self._global)
        extensions = 0
        while True:
            self._members += 1
            extensions += 1
            if self._members > _MAX_MEMBERS:
                raise hostile(f"it has more than {_MAX_MEMBERS} members")
            if extensions > 8:
                raise hostile("headers without a member")
            block = self._source.exactly(BLOCK)
            if not any(block):
                return None
            kind, size = self._checked(block)
            if kind in (b"x", b"g", b"L", b"K"):
                self._extension(kind, size, pax)
                continue
            return _member(block, kind, size, pax)

    def _checked(self, block: bytes) -> tuple[bytes, int]:
        """A header's type and size, if its checksum is right."""
        said = _octal(block[148:156], "a checksum")
        if said != sum(block[:148]) + 8 * 32 + sum(block[156:]) or block[257:262] != b"ustar":
            raise hostile("a header is damaged")
        return block[156:157], _octal(block[124:136], "a size")

    def _extension(self, kind: bytes, size: int, pax: dict[bytes, bytes]) -> None:
        if size > _MAX_PAX_BYTES:
            raise hostile("an extended header is too large")
        data = self._source.exactly(size)
        self._source.skip(-size % BLOCK)
        if kind == b"L":
            pax[b"path"] = data.rstrip(b"\0")
        elif kind == b"K":
            pax[b"linkpath"] = data.rstrip(b"\0")
        else:
            found = _records(data)
            pax.update(found)
            if kind == b"g":
                self._global.update(found)


def _records(data: bytes) -> dict[bytes, bytes]:
    """`LENGTH KEY=VALUE\\n` …, to the end of `data`."""
    found = {}
    at = 0
    while at < len(data):
        digits, space, _ = data[at : at + 8].partition(b" ")
        if not space or not digits.isdigit():
            raise hostile("an extended header is damaged")
        end = at + int(digits)
        key, equals, value = data[at + len(digits) + 1 : end - 1].partition(b"=")
        if end > len(data) or end <= at + len(digits) + 2 or data[end - 1 : end] != b"\n" or not equals:
            raise hostile("an extended header is damaged")
        found[key] = value
        at = end
    return found


def _member(block: bytes, kind: bytes, size: int, pax: dict[bytes, bytes]) -> Member:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    name = pax.get(b"path", prefix + b"/" + name if prefix else name)
    target = pax.get(b"linkpath", block[157:257].partition(b"\0")[0])
    if b"size" in pax:
        size = _decimal(pax[b"size"], "a size")
    mtime = _time(pax[b"mtime"]) if b"mtime" in pax else _octal(block[136:148], "a time") * 1_000_000_000
    real_size = None
    if any(key.startswith(b"GNU.sparse.") for key in pax):
        if (pax.get(b"GNU.sparse.major"), pax.get(b"GNU.sparse.minor")) != (b"1", b"0"):
            raise hostile("a sparse file of an unknown format")
        name = pax.get(b"GNU.sparse.name", name)
        real_size = _decimal(pax.get(b"GNU.sparse.realsize", b""), "a size")
    if len(name) > _MAX_NAME_BYTES or len(target) > _MAX_NAME_BYTES or b"\0" in name or b"\0" in target:
        raise hostile("a name is too long, or none")
    if kind not in (b"0", b"\0", b"7") and real_size is not None:
        raise hostile("a sparse file that is no file")
    return Member(name, kind, _octal(block[100:108], "a mode") & 0o7777, size, mtime, target, real_size)


def components(name: bytes) -> tuple[bytes, ...]:
    """A relative name's parts. Raises NixboxError for one that could lead anywhere else."""
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if name.startswith(b"/") or b".." in parts:
        raise hostile(f"the name {shown(name)!r} leads out of what is copied")
    if any(len(part) > 255 for part in parts):
        raise hostile("a name is too long")
    return parts


def leads_out(place: tuple[bytes, ...], target: bytes) -> bool:
    """Whether a symbolic link at `place` could lead out of the tree that it is in.

    It may go up, by no more than there is above it, and then down. `..` after a name is refused: the name may be
    a link itself, and its `..` is elsewhere then.
    """
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    up = 0
    while up < len(parts) and parts[up] == b"..":
        up += 1
    return not target or target.startswith(b"/") or up > len(place) - 1 or b".." in parts[up:]


@dataclass(slots=True)
class Unpacked:
    """What came: files and bytes of them, and how many of each kind were left out."""

    files: int = 0
    bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class _Made(inside.Below):
    """Directories below the target, which remembers those that it made: only these get modes and times."""

    def __init__(self, root: int) -> None:
        super().__init__(root)
        self.ours: set[tuple[int, int]] = set()

    def made(self, part: bytes, at: int) -> None:
        info = os.lstat(part, dir_fd=at)
        self.ours.add((info.st_dev, info.st_ino))


class Unpacker:
    """Unpacks into the directory `root`, a descriptor; with `only`, one regular file, to be called that.

    `fresh` says that the directory was made for this: then it gets the mode and times of the archive's own top.
    """

    def __init__(self, root: int, *, only: bytes | None = None, fresh: bool = False) -> None:
        self.done = Unpacked()
        self._only = only
        self._below = _Made(root)
        self._files: dict[tuple[bytes, ...], tuple[int, int]] = {}
        self._links: dict[tuple[bytes, ...], bytes] = {}
        self._directories: dict[tuple[bytes, ...], Member] = {}
        if fresh:
            info = os.fstat(root)
            self._below.ours.add((info.st_dev, info.st_ino))

    def unpack(self, source: Source, tick: Callable[[], None]) -> None:
        """Take everything up to the archive's end; `tick` is called after each piece. Raises NixboxError.

        What had come by then stays, but the file that was being written.
        """
        headers = Headers(source)
        try:
            while (member := headers.next()) is not None:
                try:
                    self._one(member, source, tick)
                except OSError as error:
                    raise _words(member, error) from None
                tick()
            for parts in sorted(self._directories, key=len, reverse=True):
                self._finish_directory(parts, self._directories[parts])
        finally:
            self._below.close()

    def _one(self, member: Member, source: Source, tick: Callable[[], None]) -> None:
        parts = components(member.name)
        if self._only is not None:
            if member.kind not in (b"0", b"\0", b"7") or self.done.files:
                raise hostile("it was to be one regular file")
            parts = (self._only,)
        data = member.size if member.kind in (b"0", b"\0", b"7") else 0
        if _OURS in parts:
            self.done.skipped["nixbox's own"] += 1
            source.skip(data + -data % BLOCK)
            return
        match member.kind:
            case b"0" | b"\0" | b"7":
                self._file(parts, member, source, tick)
            case b"5":
                self._below.directory(parts, make=True)
                self._directories[parts] = member
            case b"1":
                self._hard_link(parts, member)
            case b"2":
                self._symlink(parts, member)
            case b"3" | b"4" | b"6":
                self.done.skipped[_LEFT_OUT[member.kind]] += 1
            case _:
                raise hostile(f"a member of the unknown type {member.kind!r}")

    def _place(self, parts: tuple[bytes, ...]) -> tuple[int, bytes]:
        """The directory that a file is to be in, and its name there, where nothing is any more."""
        if not parts:
            raise hostile("a file without a name")
        at = self._below.directory(parts[:-1], make=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(parts[-1], dir_fd=at)
        self._files.pop(parts, None)
        self._links.pop(parts, None)
        return at, parts[-1]

    def _file(self, parts: tuple[bytes, ...], member: Member, source: Source, tick: Callable[[], None]) -> None:
        at, name = self._place(parts)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=at)
        try:
            with inside.closing(fd):
                if member.real_size is None:
                    self._data(fd, 0, member.size, source, tick)
                else:
                    self._sparse(fd, member, source, tick)
                source.skip(-member.size % BLOCK)
                os.fchmod(fd, member.mode & _MODES)
                os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))
                info = os.fstat(fd)
        except BaseException:
            os.unlink(name, dir_fd=at)
            raise
        self._files[parts] = (info.st_dev, info.st_ino)
        self.done.files += 1

    def _data(self, fd: int, offset: int, size: int, source: Source, tick: Callable[[], None]) -> None:
        while size > 0:
            piece = source.some(size)
            done = os.pwrite(fd, piece, offset)
            while done < len(piece):
                done += os.pwrite(fd, piece[done:], offset + done)
            offset, size = offset + len(piece), size - len(piece)
            self.done.bytes += len(piece)
            tick()

    def _sparse(self, fd: int, member: Member, source: Source, tick: Callable[[], None]) -> None:
        assert member.real_size is not None
        text = b""
        numbers: list[int] = []
        read = 0
        # The map: its length, then offsets and sizes, a decimal number a line, filled up to whole blocks.
        while not numbers or len(numbers) < 1 + 2 * numbers[0]:
            if b"\n" not in text:
                if read + BLOCK > member.size or len(text) > BLOCK:
                    raise hostile("the map of a sparse file is damaged")
                text += source.exactly(BLOCK)
                read += BLOCK
                continue
            line, _, text = text.partition(b"\n")
            numbers.append(_decimal(line, "the map of a sparse file"))
            if numbers[0] > _MAX_HOLES:
                raise hostile("a sparse file with too many holes")
        end, left = 0, member.size - read
        parts = list(zip(numbers[1::2], numbers[2::2], strict=True))
        for offset, size in parts:
            if offset < end or size > left or offset + size > member.real_size:
                raise hostile("the map of a sparse file is out of range")
            end, left = offset + size, left - size
        if left != 0:
            raise hostile("a sparse file has more data than its map")
        os.ftruncate(fd, member.real_size)
        for offset, size in parts:
            self._data(fd, offset, size, source, tick)

    def _hard_link(self, parts: tuple[bytes, ...], member: Member) -> None:
        """A further name for a file that this archive brought, and for no other."""
        other = components(member.target)
        if other in self._links:
            # One of a symbolic link is a link of its own: from here it may lead elsewhere.
            self._symlink(parts, replace(member, target=self._links[other]))
            return
        ident = self._files.get(other)
        if ident is None or other == parts:
            raise hostile(f"{shown(member.name)!r} links to {shown(member.target)!r}, which it did not bring")
        self._place(parts)
        beside = inside.Below(self._below.root)
        try:
            there = beside.directory(other[:-1])
            info = os.lstat(other[-1], dir_fd=there)
            if (info.st_dev, info.st_ino) != ident or not stat.S_ISREG(info.st_mode):
                raise hostile(f"{shown(member.target)!r} was replaced meanwhile")
            at = self._below.directory(parts[:-1])
            os.link(other[-1], parts[-1], src_dir_fd=there, dst_dir_fd=at, follow_symlinks=False)
        finally:
            beside.close()
        self._files[parts] = ident
        self.done.files += 1

    def _symlink(self, parts: tuple[bytes, ...], member: Member) -> None:
        if leads_out(parts, member.target):
            self._links[parts] = member.target
            self.done.skipped["symbolic link that leads out"] += 1
            return
        at, name = self._place(parts)
        os.symlink(member.target, name, dir_fd=at)
        self._links[parts] = member.target
        os.utime(name, ns=(member.mtime_ns, member.mtime_ns), dir_fd=at, follow_symlinks=False)
        self.done.files += 1

    def _finish_directory(self, parts: tuple[bytes, ...], member: Member) -> None:
        """Its own mode and times, if it is one of ours."""
        try:
            fd = self._below.directory(parts)
            info = os.fstat(fd)
            if (info.st_dev, info.st_ino) in self._below.ours:
                os.fchmod(fd, member.mode & _MODES)
                os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))
        except OSError as error:
            raise _words(member, error) from None


def _words(member: Member, error: OSError) -> NixboxError:
    """What it means that a member cannot be unpacked."""
    name = shown(member.name)
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return NixboxError(
            f"{name!r} would be written through a symbolic link, or through something that is no directory",
            hint="copy to a new directory",
        )
    if error.errno in paths.FULL:
        return NixboxError(f"no space left on this host for {name!r}", hint="free some space and try again")
    if error.errno == errno.EISDIR:
        return NixboxError(f"{name!r} is a directory here, and a file in the guest", hint="move it away first")
    return NixboxError(f"{name!r} cannot be written: {error.strerror}")
