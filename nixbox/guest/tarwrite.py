"""Writes tar archives for the guest's GNU tar: the ustar format, and pax records where that cannot hold something.

Format: POSIX pax (pax(1), "ustar Interchange Format" and "pax Header Block"). Names are bytes, whatever their
encoding: GNU tar takes them as they are where its locale is UTF-8. Sparse files: "PAX Format, Version 1.0" of GNU
tar's manual. Python's tarfile writes no sparse files, and its names are text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from nixbox.guest import inside
from nixbox.guest.listing import Entry, changed

BLOCK: Final = 512
_BUFFER_BYTES: Final = 1 << 18
_PIECE_BYTES: Final = 1 << 20
_LARGEST: Final = 0o77777777777  # what eleven octal digits hold: sizes and times
_TYPES: Final = {"file": b"0", "hard link": b"1", "symlink": b"2", "directory": b"5"}
_ZEROES: Final = bytes(BLOCK)


def _padding(size: int) -> bytes:
    return _ZEROES[: -size % BLOCK]


def _record(key: str, value: bytes) -> bytes:
    """`LENGTH KEY=VALUE\\n`, where LENGTH counts itself."""
    rest = b" " + key.encode() + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def _block(name: bytes, kind: bytes, mode: int, size: int, mtime_s: int, target: bytes) -> bytes:
    """One ustar header; everything in it must fit. Owner and group stay 0: who unpacks is the owner."""
    head = b"%-100b%07o\0%07o\0%07o\0%011o\0%011o\0        %b%-100bustar\x0000" % (
        *(name.ljust(100, b"\0"), mode, 0, 0, size, mtime_s, kind, target.ljust(100, b"\0")),
    )
    head = head.ljust(BLOCK, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def seconds(mtime_ns: int) -> bytes:
    """Nanoseconds as the decimal seconds of a pax record."""
    whole, rest = divmod(abs(mtime_ns), 1_000_000_000)
    return b"%b%d.%09d" % (b"-" if mtime_ns < 0 else b"", whole, rest)


def header(
    name: bytes,
    kind: bytes,
    *,
    mode: int,
    mtime_ns: int,
    size: int = 0,
    target: bytes = b"",
    pax: Mapping[str, bytes] | None = None,
) -> bytes:
    """The header of a member of `size` bytes, with a pax header before it if it needs one; `kind` is its typeflag."""
    records = dict(pax or {})
    whole, rest = divmod(mtime_ns, 1_000_000_000)
    if rest or not 0 <= whole <= _LARGEST:
        records["mtime"] = seconds(mtime_ns)
        whole = min(max(whole, 0), _LARGEST)
    if len(name) > 100:
        records["path"] = name
        name = name[:100]
    if len(target) > 100:
        records["linkpath"] = target
        target = target[:100]
    if size > _LARGEST:
        records["size"] = str(size).encode()
    own = _block(name, kind, mode, size if size <= _LARGEST else 0, whole, target)
    if not records:
        return own
    text = b"".join(_record(key, value) for key, value in records.items())
    return _block(b"pax", b"x", 0o644, len(text), 0, b"") + text + _padding(len(text)) + own


def data_map(fd: int, size: int) -> list[tuple[int, int]]:
    """Where a file has data, by lseek(2): offsets and lengths."""
    found = []
    at = 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            break
        end = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        if begin >= size:
            break
        found.append((begin, end - begin))
        at = end
    return found


class TarWriter:
    """Writes members to a pipe. `files` and `bytes` count what has gone, for whoever watches from another thread."""

    def __init__(self, out: int) -> None:
        self.files = 0
        self.bytes = 0
        self._out = out
        self._below = inside.Below(-1)
        self._buffer = bytearray()

    def enter(self, base: int) -> None:
        """What is added from here on is below this directory, a descriptor that stays the caller's."""
        self._below.close()
        self._below = inside.Below(base)

    def add(self, entry: Entry) -> None:
        """One entry of a listing, below its base. Raises NixboxError when it is not as it was listed."""
        if entry.kind == "file":
            self._file(entry)
        else:
            target = entry.target
            name = entry.name + b"/" if entry.kind == "directory" else entry.name
            self._put(header(name, _TYPES[entry.kind], mode=entry.mode, mtime_ns=entry.mtime_ns, target=target))
        self.files += entry.kind != "directory"

    def data(self, name: bytes, content: bytes) -> None:
        """A file of our own."""
        self._put(header(name, b"0", mode=0o600, mtime_ns=0, size=len(content)))
        self._put(content)
        self._put(_padding(len(content)))

    def finish(self) -> None:
        """End the archive (two empty blocks)."""
        self._put(_ZEROES * 2)
        self._flush()

    def close(self) -> None:
        """Let go of the directories that are kept open."""
        self._below.close()

    def _file(self, entry: Entry) -> None:
        above, _, name = entry.path.rpartition(b"/")
        try:
            at = self._below.directory(above.split(b"/") if above else ())
            # O_NONBLOCK: were it a fifo by now, we would wait for its writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=at)
        except FileNotFoundError:
            raise changed(entry.path, "has vanished") from None
        except OSError as error:
            raise changed(entry.path, f"cannot be opened any more ({error.strerror})") from None
        with inside.closing(fd):
            if not entry.same(os.fstat(fd)):
                raise changed(entry.path, "was written to")
            self._content(entry, fd)
            if not entry.same(os.fstat(fd)):
                raise changed(entry.path, "was written to")

    def _content(self, entry: Entry, fd: int) -> None:
        mode, mtime = entry.mode, entry.mtime_ns
        parts = data_map(fd, entry.size) if entry.sparse else [(0, entry.size)]
        if parts == [(0, entry.size)] or entry.size == 0:
            self._put(header(entry.name, b"0", mode=mode, mtime_ns=mtime, size=entry.size))
            self._part(entry, fd, 0, entry.size)
            self._put(_padding(entry.size))
            return
        if sum(parts[-1:][0] if parts else (0, 0)) < entry.size:
            parts.append((entry.size, 0))  # so that the file gets its length
        numbers = [len(parts), *(number for part in parts for number in part)]
        text = b"".join(b"%d\n" % number for number in numbers)
        text += _padding(len(text))
        pax = {"major": b"1", "minor": b"0", "name": entry.name, "realsize": b"%d" % entry.size}
        pax = {f"GNU.sparse.{key}": value for key, value in pax.items()}
        size = len(text) + sum(length for _, length in parts)
        # The name that a tar without sparse files would unpack.
        plain = b"GNUSparseFile.0/" + entry.name.rpartition(b"/")[2][:60]
        self._put(header(plain, b"0", mode=mode, mtime_ns=mtime, size=size, pax=pax))
        self._put(text)
        for offset, length in parts:
            self._part(entry, fd, offset, length)
        self._put(_padding(size))
        self.bytes += entry.size - sum(length for _, length in parts)

    def _part(self, entry: Entry, fd: int, offset: int, length: int) -> None:
        """`length` bytes of a file."""
        while length > _BUFFER_BYTES:
            self._flush()
            sent = os.sendfile(self._out, fd, offset, min(length, _PIECE_BYTES))
            if sent == 0:
                raise changed(entry.path, "was cut off")
            offset, length = offset + sent, length - sent
            self.bytes += sent
        while length > 0:
            piece = os.pread(fd, length, offset)
            if not piece:
                raise changed(entry.path, "was cut off")
            self._put(piece)
            offset, length = offset + len(piece), length - len(piece)
            self.bytes += len(piece)

    def _put(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        with memoryview(self._buffer) as view:
            done = 0
            while done < len(view):
                done += os.write(self._out, view[done:])
        self._buffer.clear()


def check_unchanged(base: int, directories: tuple[Entry, ...]) -> None:
    """Look again at every directory that was listed: none has got or lost a file. Raises NixboxError."""
    below = inside.Below(base)
    try:
        for entry in directories:
            parts = () if entry.path == b"." else entry.path.split(b"/")
            try:
                now = os.fstat(below.directory(parts))
            except OSError:
                raise changed(entry.path, "has vanished") from None
            if (now.st_mtime_ns, now.st_dev, now.st_ino) != (entry.mtime_ns, entry.device, entry.inode):
                raise changed(entry.path, "got or lost files")
    finally:
        below.close()
