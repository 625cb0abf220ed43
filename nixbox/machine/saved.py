"""Saved guests on the disk: a directory of large files, sealed with what tells later whether they are whole.

`files.json`, written last, maps each file's name to its size (bytes), device, inode, modification and change times
(ns), and the SHA-256 of what is not a hole and where. A file whose numbers and times are as they were has not been
written to, and is not read again; a small one, or one that looks touched, is hashed. A copy with other holes is not
the same: what is saved here can be made again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from io import BufferedWriter
from pathlib import Path

from nixbox import paths
from nixbox.digests import sha256
from nixbox.errors import NixboxError
from nixbox.sparse import copy_data, extents

SEAL = "files.json"
_CHUNK_BYTES = 1 << 20
# A manifest. QEMU's device states are larger (0.5 MB), and a CPU without instructions for SHA-256 needs a tenth of a
# restore for one.
_SMALL_BYTES = 64 << 10


def _digest(path: Path) -> str:
    """SHA-256 over the offset, the length and the bytes of every extent: what was written, where it was written."""
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        if os.fstat(fd).st_size > _SMALL_BYTES:
            import hashlib

            digest = hashlib.sha256()
        else:
            digest = sha256()
        for start, end in extents(fd):
            digest.update(f"{start} {end}\n".encode())
            for at in range(start, end, _CHUNK_BYTES):
                digest.update(os.pread(fd, min(_CHUNK_BYTES, end - at), at))
    return digest.hexdigest()


def _marks(path: Path) -> dict[str, int]:
    info = path.lstat()
    return {
        "size": info.st_size,
        "device": info.st_dev,
        "inode": info.st_ino,
        "mtime_ns": info.st_mtime_ns,
        "ctime_ns": info.st_ctime_ns,
    }


def seal(directory: Path, names: Sequence[str]) -> None:
    """Bring the files to the disk, and write down what they are. Raises NixboxError on a full disk."""
    found = {}
    for name in names:
        fd = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
        except OSError as error:
            raise NixboxError(f"cannot write {directory / name}: {error.strerror}") from None
        finally:
            os.close(fd)
        found[name] = _marks(directory / name) | {"sha256": _digest(directory / name)}
    _write_seal(directory, found)


def _write_seal(directory: Path, found: Mapping[str, Mapping[str, int | str]]) -> None:
    paths.write_atomic(directory / SEAL, json.dumps(found, indent=1) + "\n", mode=0o600)


def faults(directory: Path, required: Sequence[str] = ("memory", "state")) -> list[str]:
    """What is wrong with a sealed directory, a line each; nothing for one that is whole and has `required` in it."""
    try:
        sealed: dict[str, dict[str, int | str]] = json.loads((directory / SEAL).read_text())
        found = [f"{name} is not in {SEAL}" for name in required if name not in sealed]
        found += [fault for name, marks in sealed.items() if (fault := _fault(directory / name, marks))]
    except FileNotFoundError as error:
        return [f"{Path(error.filename).name} is missing"]
    except OSError as error:
        return [f"{Path(error.filename or SEAL).name} cannot be read: {error.strerror}"]
    except (ValueError, AttributeError, KeyError, TypeError):
        return [f"{SEAL} is damaged"]
    now = {name: {**_marks(directory / name), "sha256": marks["sha256"]} for name, marks in sealed.items()}
    if not found and now != sealed:
        with contextlib.suppress(OSError, NixboxError):
            _write_seal(directory, now)  # the same content with other numbers (another mount, say): once is enough
    return found


def _fault(path: Path, sealed: Mapping[str, int | str]) -> str | None:
    marks = {name: value for name, value in sealed.items() if name != "sha256"}
    now = _marks(path)
    if now["size"] != marks["size"]:
        return f"{path.name} has {now['size']} bytes instead of {marks['size']}"
    if (now != marks or now["size"] <= _SMALL_BYTES) and _digest(path) != sealed["sha256"]:
        return f"{path.name} is not what was saved"
    return None


def create(path: Path) -> BufferedWriter:
    """A new file for this user's eyes only, open for writing. Raises FileExistsError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb")


def copy(source: Path, target: Path) -> None:
    """Copy a sparse file, whole or not at all: sharing its blocks where the file system can, else without its holes.

    Raises NixboxError on a full disk.
    """
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        with source.open("rb", buffering=0) as old, create(temporary) as new:
            copy_data(old.fileno(), new.fileno())
            os.fsync(new.fileno())
        temporary.replace(target)
    except OSError as error:
        if error.errno in paths.FULL:
            raise paths.no_space(target) from None
        # The path of a descriptor (/proc/self/fd) says nothing. Not Path.resolve, which may fail.
        raise NixboxError(f"cannot copy {os.path.realpath(source)} to {target}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def compact(source: int, target: int) -> None:
    """Make the empty file `target` (a descriptor) a copy of `source` with a hole for every page of zeros."""
    page, chunk = bytes(4096), bytes(1 << 18)
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start in range(0, size, len(chunk)):
        data = os.pread(source, len(chunk), start)
        if data == chunk[: len(data)]:
            continue
        for at in range(0, len(data), len(page)):
            part = data[at : at + len(page)]
            if part != page[: len(part)]:
                os.pwrite(target, part, start + at)
