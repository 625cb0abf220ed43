"""What is in a file or a directory, entry by entry: to say in which files two builds of the same thing differ.

File systems (erofs, squashfs) and initrds (cpio) are looked into: owner, mode and time of each entry from the image's
own tables, the contents by the unpackers that the image was built with.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from nixbox import run
from nixbox.errors import NixboxError
from nixbox.values import dataclass, fields

_TIMEOUT_S = 600.0
_EROFS_MAGIC = 0xE0F5E1E2
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
_MOST_ENTRIES = 5_000_000


class Unreadable(Exception):
    """An image's tables are not what its format says."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, a directory or a link. `content` is a file's SHA-256 or a link's text; what a format lacks is None."""

    kind: str
    mode: str
    owner: str | None = None
    time: str | None = None
    size: int | None = None
    content: str | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two builds differ: `path` in the output (`root.erofs:/etc/x`: in the image), `what`, and
    the two values as `built` (what the store has) and `again` (the second build).
    """

    path: str
    what: str
    built: str
    again: str

    def line(self) -> str:
        """For people."""
        return f"{self.path}: {self.what}: {self.built} / {self.again}"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(one: Path, other: Path, name: str, tools: Path | None) -> list[Difference]:
    """In what two builds of a store path differ, as Nix sees them: kind, executability, contents.

    `name` is what the output is called; `tools` a tree with the unpackers, if there is one (else the host's serve).
    """
    found = []
    before, after = dict(_tree(one)), dict(_tree(other))
    for path, a, b in _pairs(before, after):
        shown = f"{name}{path}"
        inner: list[Difference] = []
        if a and b and a.kind == b.kind == "file" and a.content != b.content:
            inner = _inside(one / path[1:] if path else one, other / path[1:] if path else other, shown, tools)
        found += inner or _entry(shown, a, b)
    return found


def _pairs(
    before: Mapping[str, Entry], after: Mapping[str, Entry]
) -> Iterator[tuple[str, Entry | None, Entry | None]]:
    for path in sorted(before.keys() | after.keys()):
        a, b = before.get(path), after.get(path)
        if a != b:
            yield path, a, b


def _entry(path: str, a: Entry | None, b: Entry | None) -> list[Difference]:
    if a is None or b is None:
        return [Difference(path, "is there", "yes" if a else "no", "yes" if b else "no")]
    return [
        Difference(path, field.name, str(was), str(is_now))
        for field in fields(Entry)
        for was, is_now in [(getattr(a, field.name), getattr(b, field.name))]
        if was != is_now
    ]


def _tree(root: Path) -> Iterator[tuple[str, Entry]]:
    """A store path's entries as a NAR has them: no owners, no times, no mode but executability."""
    info = root.lstat()
    if not stat.S_ISDIR(info.st_mode):
        yield "", _plain(root, info)
        return
    for place, directories, files in os.walk(root):
        for entry in [*directories, *files]:
            path = Path(place) / entry
            yield "/" + str(path.relative_to(root)), _plain(path, path.lstat())


def _plain(path: Path, info: os.stat_result) -> Entry:
    if stat.S_ISLNK(info.st_mode):
        return Entry("link", "-", content=str(path.readlink()))
    if stat.S_ISDIR(info.st_mode):
        return Entry("directory", "-")
    executable = "executable" if info.st_mode & 0o111 else "-"
    return Entry("file", executable, size=info.st_size, content=sha256(path))


# --- inside of images ---


def _inside(one: Path, other: Path, name: str, tools: Path | None) -> list[Difference]:
    """The entries in which two images differ; nothing for files that are no image, or that cannot be unpacked."""
    try:
        with tempfile.TemporaryDirectory(prefix="nixbox-check-") as scratch:
            before = _image(one, Path(scratch) / "built", tools)
            after = _image(other, Path(scratch) / "again", tools)
    except (Unreadable, NixboxError):
        return []
    if before is None or after is None:
        return []
    found = [d for path, a, b in _pairs(before, after) for d in _entry(f"{name}:{path}", a, b)]
    if not found:  # order, padding, compression: no file tells of it
        place = _first_difference(one, other)
        found = [Difference(name, "layout, with the same files in it", f"byte {place}", "another one")]
    return found


def _first_difference(one: Path, other: Path) -> int:
    place = 0
    with one.open("rb") as a, other.open("rb") as b:
        while True:
            x, y = a.read(1 << 20), b.read(1 << 20)
            if x != y or not x:
                return place + next(
                    (i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y))
                )
            place += len(x)


def _image(path: Path, scratch: Path, tools: Path | None) -> dict[str, Entry] | None:
    with path.open("rb") as file:
        head = file.read(2048)
    if head[:4] == b"hsqs":
        argv = [*_program("unsquashfs", tools), "-q", "-n", "-no-xattrs", "-d", str(scratch), str(path)]
        entries = dict(_squashfs(path, tools))
    elif len(head) == 2048 and struct.unpack_from("<I", head, 1024)[0] == _EROFS_MAGIC:
        argv = [*_program("fsck.erofs", tools), f"--extract={scratch}", "--no-preserve", str(path)]
        entries = dict(_erofs(path))
    elif head[:6] == b"070701":
        return dict(_cpio(path.read_bytes()))
    else:
        return None
    run.run(argv, timeout_s=_TIMEOUT_S)
    return {name: _with_content(entry, scratch / name[1:]) for name, entry in entries.items()}


def _with_content(entry: Entry, path: Path) -> Entry:
    if entry.kind == "link":
        content: str | None = str(path.readlink())
    elif entry.kind == "file":
        path.chmod(0o600)  # as its mode was, not even its owner may have read it
        content = sha256(path)
    else:
        return entry
    return Entry(entry.kind, entry.mode, entry.owner, entry.time, entry.size, content)


def _program(name: str, tools: Path | None) -> list[str]:
    """How to run an unpacker: of the tree the image was built with (by its own loader), else of this host."""
    if tools is not None and (program := tools / "usr/bin" / name).exists():
        loaders = sorted(tools.glob("usr/lib/*-linux-gnu/ld-linux*.so.*"))
        if loaders:
            return [str(loaders[0]), "--library-path", str(loaders[0].parent), str(program)]
    return [run.tool(name)]


def _squashfs(path: Path, tools: Path | None) -> Iterator[tuple[str, Entry]]:
    """The table of a squashfs: `drwxr-xr-x 0/0   269 2023-11-14 22:13 squashfs-root/etc`."""
    argv = [*_program("unsquashfs", tools), "-lln", str(path)]
    listed = run.run(argv, timeout_s=_TIMEOUT_S, env={"TZ": "UTC", "LC_ALL": "C.UTF-8"}).stdout
    line = re.compile(r"([a-z-])(\S{9}) +(\d+/\d+) +(\d+) (\S+ \S+) squashfs-root(/[^\n]*)?")
    for found in line.finditer(listed):
        letter, mode, owner, size, time, name = found.groups()
        kind = {"-": "file", "d": "directory", "l": "link"}.get(letter, "device")
        name = name or "/"
        if kind == "link":
            name = name.partition(" -> ")[0]
        yield name, Entry(kind, mode, owner, time, int(size) if kind == "file" else None)


def _cpio(data: bytes) -> Iterator[tuple[str, Entry]]:
    """The members of a cpio archive (newc: 13 numbers of 8 hex digits after the magic)."""
    at = 0
    while data[at : at + 6] == b"070701":
        try:
            numbers = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        except ValueError:
            raise Unreadable("a header of the cpio archive") from None
        mode, size, length = numbers[1], numbers[6], numbers[11]
        name = data[at + 110 : at + 110 + length - 1].decode(errors="replace")
        begin = at + (110 + length + 3) // 4 * 4
        if name == "TRAILER!!!":
            return
        content = data[begin : begin + size]
        kind = _KINDS.get(stat.S_IFMT(mode), "device")
        said = content.decode(errors="replace") if kind == "link" else hashlib.sha256(content).hexdigest()
        owner = f"{numbers[2]}/{numbers[3]}"
        bits = f"{stat.S_IMODE(mode):04o}"
        yield (
            f"/{name}",
            Entry(
                kind,
                bits,
                owner,
                str(numbers[5]),
                size if kind == "file" else None,
                said if kind in ("file", "link") else None,
            ),
        )
        at = begin + (size + 3) // 4 * 4
    raise Unreadable("a cpio archive without an end")


class _Erofs:
    """The tables of an erofs (the kernel's fs/erofs/erofs_fs.h): directories are never compressed."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        shift = self.data[1024 + 12]
        self.root = self._u("<H", 1024 + 14)
        self.block = 1 << shift
        self.meta = self._u("<I", 1024 + 40) * self.block
        if not 9 <= shift <= 16:
            raise Unreadable("the block size of the erofs")

    def _u(self, kind: str, offset: int) -> int:
        try:
            number: int = struct.unpack_from(kind, self.data, offset)[0]
        except struct.error:
            raise Unreadable("an erofs that ends too early") from None
        return number

    def inode(self, nid: int) -> tuple[Entry, bytes | None]:
        """The entry of an inode, and the data of a directory."""
        at = self.meta + 32 * nid
        form, xattrs, mode = (self._u("<H", at + 2 * i) for i in range(3))
        if form & 1:  # extended
            size, start = self._u("<Q", at + 8), self._u("<I", at + 16)
            owner = f"{self._u('<I', at + 24)}/{self._u('<I', at + 28)}"
            time: str | None = str(self._u("<Q", at + 32))
            length = 64
        else:
            size, start = self._u("<I", at + 8), self._u("<I", at + 16)
            owner = f"{self._u('<H', at + 24)}/{self._u('<H', at + 26)}"
            time, length = None, 32  # that of the whole image
        kind = _KINDS.get(stat.S_IFMT(mode), "device")
        entry = Entry(kind, f"{stat.S_IMODE(mode):04o}", owner, time, size if kind == "file" else None)
        if kind != "directory":
            return entry, None
        if size > len(self.data):
            raise Unreadable("a directory of the erofs that is larger than it")
        layout = form >> 1 & 7
        if layout not in (0, 2):
            raise Unreadable(f"a directory of the erofs with the layout {layout}")
        whole = size if layout == 0 else size // self.block * self.block  # the rest lies behind the inode
        data = self.data[start * self.block : start * self.block + whole]
        behind = at + length + (12 + (xattrs - 1) * 4 if xattrs else 0)
        return entry, data + self.data[behind : behind + size - whole]

    def names(self, data: bytes) -> Iterator[tuple[str, int]]:
        """The names in a directory and their inodes: each block has its own table, names behind it."""
        for begin in range(0, len(data), self.block):
            block = data[begin : begin + self.block]
            if len(block) < 12:
                raise Unreadable("a directory of the erofs that ends too early")
            count = struct.unpack_from("<H", block, 8)[0] // 12
            if not 0 < count * 12 <= len(block):
                raise Unreadable("a directory of the erofs")
            rows = [struct.unpack_from("<QH", block, 12 * i) for i in range(count)]
            ends = [row[1] for row in rows[1:]] + [len(block)]
            for (nid, offset), end in zip(rows, ends, strict=True):
                name = block[offset:end].split(b"\0")[0].decode(errors="surrogateescape")
                if not name or "/" in name:
                    raise Unreadable("a name in the erofs")
                yield name, nid


def _erofs(path: Path) -> Iterator[tuple[str, Entry]]:
    """Every entry of an erofs. Raises Unreadable."""
    image = _Erofs(path)
    waiting, count, seen = [("", image.root)], 0, set()
    while waiting:
        place, nid = waiting.pop()
        entry, data = image.inode(nid)
        count += 1
        if count > _MOST_ENTRIES:
            raise Unreadable("an erofs of too many entries")
        yield place or "/", entry
        if data is not None:
            if nid in seen:
                raise Unreadable("a directory of the erofs that is in itself")
            seen.add(nid)
            waiting += [(f"{place}/{name}", to) for name, to in image.names(data) if name not in (".", "..")]
