"""A small directory as one value: all of its files, a digest of them, and a copy that is exactly that."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nixbox.digests import sha256
from nixbox.values import dataclass

MOST_FILES = 2000
MOST_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Tree:
    """What is in a directory: relative paths, sorted, each with its content (bytes of a file, text of a link).

    Of a file's mode only that it may be executed counts; empty directories do not.
    """

    entries: tuple[tuple[str, bool, bytes | str], ...]

    @classmethod
    def read(cls, directory: Path) -> Tree:
        """All that is in `directory`, read once. Raises OSError, and ValueError for what is too much or no file."""
        entries: list[tuple[str, bool, bytes | str]] = []
        size = 0
        for place, directories, files in os.walk(directory, onerror=_raise):
            for name in [*files, *(d for d in directories if (Path(place) / d).is_symlink())]:
                path = Path(place) / name
                relative = str(path.relative_to(directory))
                mode = path.lstat().st_mode
                if stat.S_ISLNK(mode):
                    entries.append((relative, False, _link(directory, path)))
                elif stat.S_ISREG(mode):
                    content = _content(path)
                    size += len(content)
                    entries.append((relative, bool(mode & 0o111), content))
                else:
                    raise ValueError(f"{relative} is neither a file nor a directory")
                if len(entries) > MOST_FILES or size > MOST_BYTES:
                    raise ValueError(f"more than {MOST_FILES} files or {MOST_BYTES >> 20} MiB are in it")
        return cls(tuple(sorted(entries)))

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, in hex."""
        whole = sha256()
        for path, executable, content in self.entries:
            kind = "link" if isinstance(content, str) else "program" if executable else "file"
            data = os.fsencode(content)
            whole.update(f"{kind} {len(os.fsencode(path))} {len(data)}\n".encode() + os.fsencode(path) + data)
        return whole.hexdigest()

    def write(self, directory: Path) -> None:
        """Make `directory` with just this in it, whole or not at all; one that is there is taken for it."""
        import shutil
        import tempfile

        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            for name, executable, content in self.entries:
                path = temporary / name
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                if isinstance(content, str):
                    path.symlink_to(content)
                else:
                    path.write_bytes(content)
                    path.chmod(0o500 if executable else 0o400)
            temporary.rename(directory)
        except FileExistsError:
            shutil.rmtree(temporary)
        except OSError:
            shutil.rmtree(temporary)
            if not directory.is_dir():
                raise


def _raise(error: OSError) -> None:
    raise error


def _link(directory: Path, path: Path) -> str:
    """The text of a symbolic link, which leads to something in the same tree."""
    text = str(path.readlink())
    inside = os.path.normpath(path.parent.relative_to(directory) / text)
    if text.startswith("/") or inside.startswith(".."):
        raise ValueError(f"{path.relative_to(directory)} is a symbolic link that leads out of it")
    return text


def _content(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        return file.read(MOST_BYTES + 1)
