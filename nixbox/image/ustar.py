"""Archives with one possible form: plain ustar files, each member in its place, every other bit fixed.

What is written depends on the members alone. What is read must be what would have been written: another name, order,
owner, time, type or a byte too many is refused, so that nothing in an archive goes unlooked at.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from typing import BinaryIO

from nixbox.errors import NixboxError
from nixbox.report import harmless

BLOCK = 512
END = bytes(2 * BLOCK)
MOST_BYTES = 8**11 - 1  # of a member: eleven octal digits
_PIECE = 1 << 20


class ArchiveError(NixboxError):
    """An archive is damaged, was changed, or is none."""


def header(name: str, size: int) -> bytes:
    """The block before a member (POSIX pax(1), "ustar Interchange Format"): mode 0644, root's, of 1970.

    `name` has at most 100 bytes, `size` is in bytes. Raises ValueError for what the format cannot say.
    """
    encoded = name.encode("ascii")
    if len(encoded) > 100 or not 0 <= size <= MOST_BYTES:
        raise ValueError(f"ustar has no place for {name} of {size} bytes")
    block = bytearray(BLOCK)
    fields = (
        (0, encoded),
        (100, b"0000644"),  # mode
        (108, b"0000000"),  # uid
        (116, b"0000000"),  # gid
        (124, b"%011o" % size),
        (136, b"00000000000"),  # time
        (148, b" " * 8),  # the sum, as it counts in itself
        (156, b"0"),  # a plain file
        (257, b"ustar\x0000"),
    )
    for offset, value in fields:
        block[offset : offset + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padding(size: int) -> bytes:
    """What fills a member's last block."""
    return bytes(-size % BLOCK)


def length(sizes: Iterable[int]) -> int:
    """Bytes of an archive whose members have these sizes."""
    return sum(BLOCK + size + -size % BLOCK for size in sizes) + len(END)


def write(file: BinaryIO, name: str, data: bytes) -> None:
    """Write a small member."""
    file.write(header(name, len(data)) + data + padding(len(data)))


class Reader:
    """Reads an archive from its beginning to its end; `what` is what errors call it."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        self.file = file
        self.what = what
        self.bytes = os.fstat(file.fileno()).st_size

    def error(self, why: str) -> ArchiveError:
        """What is wrong with the archive, and what to do."""
        return ArchiveError(f"{self.what}: {why}", hint="fetch or export it again: nothing of it was used")

    def _block(self, name: str) -> bytes:
        block = self.file.read(BLOCK)
        if len(block) < BLOCK:
            raise self.error(f"it ends before {name}")
        return block

    def small(self, name: str, most: int) -> bytes:
        """The next member, which must be called `name`; its size is not known, and at most `most` bytes."""
        block = self._block(name)
        digits = block[124:135]
        size = int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else -1
        self._check(block, name, size)
        if size > most:
            raise self.error(f"{name} claims {size} bytes; {most} is the most")
        data = self.file.read(size)
        self._filled(name, size, len(data))
        return data

    def copy(self, name: str, size: int, sha256: str, sink: Callable[[bytes], object]) -> None:
        """Hand the next member, of which name, size and hash are known, to `sink` piece by piece.

        Raises ArchiveError at its end when the hash is another one: until then nothing may be believed.
        """
        self._check(self._block(name), name, size)
        digest, left = hashlib.sha256(), size
        while left:
            piece = self.file.read(min(_PIECE, left))
            if not piece:
                raise self.error(f"it ends within {name}")
            digest.update(piece)
            sink(piece)
            left -= len(piece)
        self._filled(name, size, size)
        if digest.hexdigest() != sha256:
            raise self.error(f"{name} is damaged, or was changed: its SHA-256 is {digest.hexdigest()}, not {sha256}")

    def _check(self, block: bytes, name: str, size: int) -> None:
        if 0 <= size <= MOST_BYTES and block == header(name, size):
            return
        said = block[:100].rstrip(b"\0")
        if said != name.encode():
            if not any(block):
                raise self.error(f"it ends before {name}")
            raise self.error(f"{harmless(said.decode(errors='replace'))!r} is where {name} belongs")
        raise self.error(f"the header of {name} is damaged, or was changed")

    def _filled(self, name: str, size: int, got: int) -> None:
        rest = self.file.read(-size % BLOCK)
        if got < size or len(rest) < -size % BLOCK:
            raise self.error(f"it ends within {name}")
        if any(rest):
            raise self.error(f"there is something behind {name}")

    def end(self) -> None:
        """The archive ends here, with nothing behind it."""
        if self.file.read(len(END) + 1) != END:
            raise self.error("it does not end where it should")
