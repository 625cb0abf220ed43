"""What of the host is to be copied: a walk over a tree that follows no symbolic link, and a digest of what it saw."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from nixbox import paths
from nixbox.errors import ConfigError, NixboxError
from nixbox.guest import inside
from nixbox.report import harmless

Kind: TypeAlias = Literal["file", "directory", "symlink", "hard link"]

_MAX_DEPTH = 400  # each level has a descriptor open
_NAMED = 10  # so many paths are named in an error
_SKIPPED = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "fifo", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: `name` in the archive, `path` below the listing's base; what lstat(2) said of it.

    `target` is a symbolic link's text or, for a hard link, the archive's name of the file that it is.
    """

    name: bytes
    path: bytes
    kind: Kind
    mode: int
    size: int
    mtime_ns: int
    device: int
    inode: int
    sparse: bool = False
    target: bytes = b""

    def same(self, now: os.stat_result) -> bool:
        """Whether this is still the file that was listed."""
        return (self.size, self.mtime_ns, self.device, self.inode) == (
            *(now.st_size, now.st_mtime_ns, now.st_dev, now.st_ino),
        )


@dataclass(frozen=True, slots=True)
class Listing:
    """A tree, or a single file: `base` is the real directory that the entries' paths are relative to.

    `files` are regular files and symbolic links, `hard` further names of such files, `directories` come outer ones
    first. `digest` is the SHA-256 of names, kinds, modes, sizes, times and links.
    """

    source: Path
    base: Path
    files: tuple[Entry, ...]
    hard: tuple[Entry, ...]
    directories: tuple[Entry, ...]
    skipped: Mapping[str, int]
    digest: str

    @property
    def count(self) -> int:
        """Everything but directories."""
        return len(self.files) + len(self.hard)

    @property
    def bytes(self) -> int:
        """Of all regular files, each counted once."""
        return sum(entry.size for entry in self.files if entry.kind == "file")


def excluder(patterns: Iterable[str]) -> Callable[[bytes, bool], bool]:
    """Whether a path below the source (and whether it is a directory) is left out, by patterns of fnmatch(3)'s kind.

    A pattern without a slash is compared with the names at every depth, one with a slash with the whole path below
    the source, where `*` matches slashes as well. A slash at the end: directories only. With a directory goes all
    that is in it. Case counts. Raises ConfigError for an empty pattern.
    """
    names: list[tuple[bool, re.Pattern[str]]] = []
    whole: list[tuple[bool, re.Pattern[str]]] = []
    for pattern in patterns:
        bare = pattern.removeprefix("./").rstrip("/")
        if not bare:
            raise ConfigError(
                f"the pattern {pattern!r} excludes nothing", hint="see fnmatch(3): *.log, build/*, tmp/"
            )
        rule = (pattern.endswith("/"), re.compile(fnmatch.translate(bare.lstrip("/"))))
        (whole if "/" in bare else names).append(rule)

    def excluded(path: bytes, is_directory: bool) -> bool:
        text = os.fsdecode(path)
        last = text.rpartition("/")[2]
        found = ((names, last), (whole, text))
        return any(rule.match(word) for rules, word in found for only, rule in rules if is_directory or not only)

    return excluded if names or whole else lambda path, is_directory: False


@dataclass(slots=True)
class _Walk:
    """What a walk has found so far."""

    prefix: bytes
    excluded: Callable[[bytes, bool], bool]
    own: frozenset[tuple[int, int]]
    moved: frozenset[tuple[int, int]]
    files: list[Entry] = field(default_factory=list)
    hard: list[Entry] = field(default_factory=list)
    directories: list[Entry] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: list[bytes] = field(default_factory=list)
    seen: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def directory(self, fd: int, path: bytes, info: os.stat_result, depth: int) -> None:
        """A directory and all below it; `fd` is open on it."""
        if depth > _MAX_DEPTH:
            raise NixboxError(f"{_shown(path)[:200]}… lies more than {_MAX_DEPTH} directories deep")
        self.directories.append(_entry(self.prefix + (b"/" + path if path else b""), path or b".", "directory", info))
        try:
            with os.scandir(fd) as found:
                names = sorted(os.fsencode(entry.name) for entry in found)
        except PermissionError:
            self.unreadable.append(path)
            return
        for name in names:
            self.one(fd, name, path + b"/" + name if path else name, depth)

    def one(self, at: int, name: bytes, path: bytes, depth: int) -> None:
        """Whatever is called `name` in the directory `at`."""
        try:
            info = os.lstat(name, dir_fd=at)
        except FileNotFoundError:
            raise changed(path, "has vanished") from None
        except PermissionError:  # a directory that may be listed, but not entered
            self.unreadable.append(path)
            return
        kind = stat.S_IFMT(info.st_mode)
        if self.excluded(path, kind == stat.S_IFDIR):
            return
        if kind == stat.S_IFDIR:
            self.inner(at, name, path, info, depth)
        elif kind in (stat.S_IFREG, stat.S_IFLNK):
            self.file(at, name, path, info)
        else:
            self.skipped[_SKIPPED.get(kind, "of an unknown kind")] += 1

    def inner(self, at: int, name: bytes, path: bytes, info: os.stat_result, depth: int) -> None:
        """A directory in another one."""
        ident = (info.st_dev, info.st_ino)
        if ident in self.own or (ident in self.moved and name == os.fsencode(paths.CONFIG_DIR)):
            self.skipped["nixbox's own"] += 1
            return
        try:
            fd = os.open(name, inside.DIRECTORY, dir_fd=at)
        except PermissionError:
            self.unreadable.append(path)
            return
        except OSError:
            raise changed(path, "is no directory any more") from None
        with inside.closing(fd):
            now = os.fstat(fd)
            if (now.st_dev, now.st_ino) != (info.st_dev, info.st_ino):
                raise changed(path, "is another directory now")
            self.directory(fd, path, now, depth + 1)

    def file(self, at: int, name: bytes, path: bytes, info: os.stat_result) -> None:
        """A regular file or a symbolic link."""
        full = self.prefix + b"/" + path if path else self.prefix
        ident = (info.st_dev, info.st_ino)
        if info.st_nlink > 1 and ident in self.seen:
            self.hard.append(_entry(full, path or name, "hard link", info, self.seen[ident]))
            return
        if stat.S_ISLNK(info.st_mode):
            entry = _entry(full, path or name, "symlink", info, os.readlink(name, dir_fd=at))
        elif os.access(name, os.R_OK, dir_fd=at, effective_ids=True):
            entry = _entry(full, path or name, "file", info)
        else:
            self.unreadable.append(path)
            return
        if info.st_nlink > 1:
            self.seen[ident] = full
        self.files.append(entry)


def _entry(name: bytes, path: bytes, kind: Kind, info: os.stat_result, target: bytes = b"") -> Entry:
    sparse = kind == "file" and info.st_blocks * 512 < info.st_size
    size = 0 if kind == "directory" else info.st_size
    mode = stat.S_IMODE(info.st_mode)
    return Entry(name, path, kind, mode, size, info.st_mtime_ns, info.st_dev, info.st_ino, sparse, target)


def _shown(path: bytes) -> str:
    return harmless(os.fsdecode(path).encode("utf-8", "replace").decode())


def changed(path: bytes, how: str) -> NixboxError:
    """The error for a source that is not what it was a moment ago."""
    return NixboxError(
        f"the source changed while it was read: {_shown(path)} {how}",
        hint="try again when nothing writes to it",
    )


def _own() -> tuple[frozenset[tuple[int, int]], frozenset[tuple[int, int]]]:
    """Directories of nixbox's, which no guest is given (device and inode), and configs that are not where they were.

    Of the latter the number alone says little: once a directory is removed, a file system gives it to the next one.
    """
    found = set()
    for directory in paths.own_directories():
        with contextlib.suppress(OSError):  # not every one is there
            info = directory.stat()
            found.add((info.st_dev, info.st_ino))
    return frozenset(found), frozenset(set(paths.known().workspaces.values()) - found)


def scan(source: Path, name: bytes, exclude: Sequence[str] = ()) -> Listing:
    """List a directory or a file of the host, to be called `name` in the archive.

    `source` itself may be a symbolic link, what lies in it is never followed. Raises NixboxError for one that is
    missing, with every path (the first ten) that is unreadable, and for one that changes meanwhile.
    """
    where = inside.real(source)
    walk = _Walk(name, excluder(exclude), *_own())
    try:
        base = where if where.is_dir() else where.parent
        with inside.closing(inside.open_real(base)) as fd:
            if base == where:
                walk.directory(fd, b"", os.fstat(fd), 0)
            else:
                _single(walk, fd, where)
    except FileNotFoundError:
        raise NixboxError(f"{source} is not there", hint="make it, or name another source") from None
    except OSError as error:
        raise NixboxError(f"{source} cannot be read: {error.strerror}") from None
    if walk.unreadable:
        named = [f"  {_shown(path) or source}" for path in walk.unreadable[:_NAMED]]
        more = len(walk.unreadable) - len(named)
        raise NixboxError(
            "\n".join(
                [f"not everything in {source} is yours to read:", *named, *([f"  and {more} more"] * (more > 0))]
            ),
            hint="make it readable, or exclude it",
        )
    files, hard, directories = tuple(walk.files), tuple(walk.hard), tuple(walk.directories)
    return Listing(source, base, files, hard, directories, dict(walk.skipped), _digest(walk))


def _single(walk: _Walk, fd: int, where: Path) -> None:
    """A source that is no directory."""
    name = os.fsencode(where.name)
    info = os.lstat(name, dir_fd=fd)
    if not stat.S_ISREG(info.st_mode):
        raise NixboxError(f"{where} is neither a directory nor a regular file")
    walk.file(fd, name, b"", info)


def _digest(walk: _Walk) -> str:
    found = hashlib.sha256()
    for entry in (*walk.directories, *walk.files, *walk.hard):
        words = (entry.kind, entry.mode, entry.size, entry.mtime_ns)
        found.update(b"\0".join((entry.name, entry.target, *(str(word).encode() for word in words), b"")))
    return found.hexdigest()
