"""Files of the host by directory descriptor: whoever changes names meanwhile cannot lead us elsewhere.

A guest can write the directories that are mounted in it, so between a look at a path and its use a directory may have
become a symbolic link. Here every component is opened by itself and without following links (open(2), O_NOFOLLOW).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nixbox import paths
from nixbox.errors import NixboxError

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40  # as the kernel's own bound (path_resolution(7))


def real(path: Path) -> Path:
    """`path` without symbolic links; what it leads to need not be there.

    Raises NixboxError when a link in a directory that guests can write leads out of it: a guest may have made that.
    """
    shared = [Path(place) for place in paths.known().writable]
    here, links = Path("/"), 0
    left = list((Path.cwd() / path).parts[1:])
    while left:
        part = left.pop(0)
        if part == "..":
            here = here.parent
            continue
        there = here / part
        if not there.is_symlink():
            here = there
            continue
        links += 1
        if links > _MAX_LINKS:
            raise NixboxError(f"{path} leads through too many symbolic links")
        target = there.readlink()
        for place in shared:
            if there.is_relative_to(place) and not (leads := (here / target).resolve()).is_relative_to(place):
                raise NixboxError(
                    f"{there} is a symbolic link to {leads}; it lies in {place}, which guests can write, so one of "
                    "them may have made it",
                    hint=f"if that is what you mean, write {leads}",
                )
        here = Path("/") if target.is_absolute() else here
        left[:0] = target.parts[1:] if target.is_absolute() else target.parts
    return here


def open_real(path: Path) -> int:
    """A descriptor of a directory whose path has no symbolic link. Raises OSError."""
    at = os.open("/", DIRECTORY)
    try:
        for part in path.parts[1:]:
            # To pass through a directory needs no right to list it.
            inner = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = inner
        return os.open(".", DIRECTORY, dir_fd=at)
    finally:
        os.close(at)


class Below:
    """Directories below one, by name; the last that was used stays open."""

    def __init__(self, root: int) -> None:
        self.root = root
        self._parts: tuple[bytes, ...] = ()
        self._fd = root

    def directory(self, parts: Sequence[bytes], make: bool = False) -> int:
        """A descriptor of the directory `parts`, which stays ours; with `make`, what is missing is made, mode 0700.

        Raises OSError: ELOOP or ENOTDIR where something else than a directory is.
        """
        wanted = tuple(parts)
        if wanted == self._parts:
            return self._fd
        at, begun = self.root, 0
        if self._parts and wanted[: len(self._parts)] == self._parts:
            at, begun = self._fd, len(self._parts)
        opened = at
        try:
            for part in wanted[begun:]:
                inner = self._inner(part, opened, make)
                if opened not in (self.root, at):
                    os.close(opened)
                opened = inner
        except BaseException:
            if opened not in (self.root, at):
                os.close(opened)
            raise
        if self._fd not in (self.root, opened):
            os.close(self._fd)
        self._parts, self._fd = wanted, opened
        return opened

    def _inner(self, part: bytes, at: int, make: bool) -> int:
        try:
            return os.open(part, DIRECTORY, dir_fd=at)
        except FileNotFoundError:
            if not make:
                raise
        os.mkdir(part, 0o700, dir_fd=at)
        self.made(part, at)
        return os.open(part, DIRECTORY, dir_fd=at)

    def made(self, part: bytes, at: int) -> None:
        """Told of each directory that was made."""

    def close(self) -> None:
        """Let go of what is kept open; the root stays the caller's."""
        if self._fd != self.root:
            os.close(self._fd)
        self._parts, self._fd = (), self.root


@contextmanager
def closing(fd: int) -> Iterator[int]:
    """A descriptor for the time of the body."""
    try:
        yield fd
    finally:
        os.close(fd)
