"""How much of a guest's memory is still that of what it began with: a template's file, or a fork's (Linux: /proc).

A guest maps the file privately: a page that it has written is a copy of its own, every other one is the file's.
"""

from __future__ import annotations

import mmap
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

from nixbox import sparse

# Of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
_PRESENT, _SWAPPED, _FILE_OR_SHARED = 1 << 63, 1 << 62, 1 << 61


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of /proc/PID/maps: addresses and the offset into the file in bytes, `device` as it stands there."""

    start: int
    end: int
    writable: bool
    private: bool
    offset: int
    device: str
    inode: int
    path: str


@dataclass(frozen=True, slots=True)
class Share:
    """Pages that hold data in the file which the guest began with, and those of them that it has copied since."""

    touched_pages: int
    copied_pages: int

    @property
    def shared(self) -> float:
        """The part that is not copied, from 0 to 1."""
        return 1 - self.copied_pages / self.touched_pages


def mappings(text: str) -> list[Mapping]:
    """Parse /proc/PID/maps (proc(5))."""
    found = []
    for line in text.splitlines():
        addresses, flags, offset, device, inode, *path = line.split(maxsplit=5)
        start, _, end = addresses.partition("-")
        writable, private = flags[1] == "w", flags[3] == "p"
        name = path[0] if path else ""
        found.append(
            Mapping(int(start, 16), int(end, 16), writable, private, int(offset, 16), device, int(inode), name)
        )
    return found


def guest_memory(found: list[Mapping], size_bytes: int) -> list[Mapping]:
    """The parts, one after the other, of the one private file mapping of this size: the guest's memory.

    Its file is a fork's (`/memfd:nixbox-fork`), or the `memory` of a template or a snapshot, removed
    meanwhile or not. Raises LookupError when there is none.
    """
    files: dict[tuple[str, int], list[Mapping]] = {}
    for mapping in found:
        name = mapping.path.removesuffix(" (deleted)")
        if mapping.writable and mapping.private and (name == "/memfd:nixbox-fork" or name.endswith("/memory")):
            files.setdefault((mapping.device, mapping.inode), []).append(mapping)
    for parts in files.values():
        if sum(part.end - part.start for part in parts) == size_bytes:
            return parts
    raise LookupError(f"no private mapping of {size_bytes} bytes of a template's or a fork's memory")


def copied(entries: array[int]) -> list[bool]:
    """For each entry of a pagemap whether the page is the process's own: anonymous, in memory or swapped out."""
    return [bool(entry & (_PRESENT | _SWAPPED)) and not entry & _FILE_OR_SHARED for entry in entries]


def of(pid: int, memory_mib: int) -> Share:
    """The share of a guest with this much memory, from its QEMU's process id. Raises LookupError, OSError."""
    process = Path(f"/proc/{pid}")
    parts = guest_memory(mappings((process / "maps").read_text()), memory_mib << 20)
    page = mmap.PAGESIZE
    own: dict[int, bool] = {}  # by the page's number in the file
    with (process / "pagemap").open("rb", buffering=0) as pagemap:
        for part in parts:
            count = (part.end - part.start) // page
            entries = array("Q", os.pread(pagemap.fileno(), count * 8, part.start // page * 8))
            own.update(enumerate(copied(entries), part.offset // page))
    fd = _open_backing(process, parts[0])
    try:
        touched = [n for start, end in sparse.extents(fd) for n in range(start // page, -(-end // page)) if n in own]
    finally:
        os.close(fd)
    return Share(len(touched), sum(own[number] for number in touched))


def _open_backing(process: Path, mapping: Mapping) -> int:
    """Open the file behind a mapping by the descriptor that the process has of it: its name may be gone."""
    for link in (process / "fd").iterdir():
        try:
            if str(link.readlink()) == mapping.path and link.stat().st_ino == mapping.inode:
                return os.open(link, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # closed meanwhile
            continue
    raise LookupError(f"process {process.name} has no descriptor of {mapping.path}")
