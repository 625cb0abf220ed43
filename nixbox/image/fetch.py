"""Bring the files of a lock into the Nix store: apt's own transports where the host has them, else Nix's.

Every file is checked against the lock's size and SHA-256 before it is added.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from nixbox import paths, run
from nixbox.errors import NixboxError
from nixbox.image import krunfw, store

if TYPE_CHECKING:
    from nixbox.image.apt import Mirrors
    from nixbox.image.lock import Bootstrap, KrunKernel, Lock, LockedPackage

BUSYBOX = "nixbox-busybox"
# (bytes so far, bytes in all, files so far, files in all)
Progress = Callable[[int, int, int, int], None]


class GoneError(NixboxError):
    """Files of the lock that the mirror does not have (any more), or has with other bits."""


def deb_name(package: LockedPackage) -> str:
    """The store name of a .deb (nix/bases/debian/fetch.nix: `debName`)."""
    name = f"{package.name}_{package.version}_{package.arch}.deb"
    return re.sub("[~:%]", "-", name)


def deb_path(package: LockedPackage) -> Path:
    """Where the .deb lies in the Nix store once it is there."""
    return store.flat_path(deb_name(package), package.sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _work_dir() -> Iterator[Path]:
    """A directory of our own under the cache; gone afterwards, whatever happened."""
    parent = paths.cache_dir() / "downloads"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        yield Path(directory)


def _download(
    packages: Sequence[LockedPackage], mirrors: Mirrors, target: Path, progress: Progress | None
) -> dict[str, Path]:
    """Fetch packages into `target`; returns pool path → file. Raises GoneError naming what is missing."""
    paths.require_space(target, sum(package.size for package in packages), "downloads")
    urls = mirrors.as_dict()
    sources: dict[str, str] = {}
    files: dict[str, Path] = {}
    for package in packages:
        files[package.path] = target / deb_name(package)
        base = urls.get(package.repo, urls["debian"])
        sources[package.path] = f"{base}/{quote(package.path, safe='/+:~')}"
    if run.find_tool("apt-helper"):
        done = _by_apt(packages, sources, files, progress)
    else:
        done = _by_python(packages, sources, files, progress)
    if "No space left on device" in done.stderr + done.stdout:
        raise NixboxError(f"no space left on the disk of {target.parent}", hint="free some space and try again")
    bad = [
        f"{p.name} {p.version}: {'has other bits than the lock says' if files[p.path].exists() else 'not there'}"
        for p in packages
        if not files[p.path].exists() or _sha256(files[p.path]) != p.sha256
    ]
    if bad:
        shown = "\n".join(f"  {line}" for line in bad[:10]) + (f"\n  … and {len(bad) - 10} more" if bad[10:] else "")
        said = "\n".join(line for line in done.stderr.splitlines() if line.startswith("E:"))
        raise GoneError(
            f"{len(bad)} of {len(packages)} packages could not be fetched from {mirrors.debian}:\n{shown}\n{said}",
            hint="is the mirror reachable? Mirrors drop old versions: `nixbox lock` moves the lock to the "
            "current ones, or set [debian] mirror to an archive that keeps them",
        )
    return files


def _by_apt(
    packages: Sequence[LockedPackage],
    sources: Mapping[str, str],
    files: Mapping[str, Path],
    progress: Progress | None,
) -> run.Completed:
    """apt's own transports: pipelined, through the host's proxies, checked against the hash as they arrive."""
    argv = ["apt-helper", "download-file"]
    for package in packages:
        argv += [sources[package.path], str(files[package.path]), f"SHA256:{package.sha256}"]
    total, seen, size = sum(p.size for p in packages), 0, 0

    def on_line(line: str) -> None:
        nonlocal seen, size
        if progress and line.startswith("Get:") and seen < len(packages):
            seen, size = seen + 1, size + packages[seen].size
            progress(size, total, seen, len(packages))

    return run.stream(argv, on_out=on_line, env={"LC_ALL": "C"})


def _by_python(
    packages: Sequence[LockedPackage],
    sources: Mapping[str, str],
    files: Mapping[str, Path],
    progress: Progress | None,
) -> run.Completed:
    """For hosts without apt, where only the bootstrap comes this way: Nix fetches the rest by itself."""
    from urllib.error import URLError
    from urllib.request import urlopen

    errors = []
    for number, package in enumerate(packages, 1):
        try:
            # The scheme is http, https or file: config and apt sources were checked for it.
            with urlopen(sources[package.path], timeout=60) as answer, files[package.path].open("wb") as file:  # noqa: S310
                shutil.copyfileobj(answer, file)
        except (URLError, OSError) as error:
            errors.append(f"E: {package.name}: {error}")
        if progress:
            progress(package.size, package.size, number, len(packages))
    return run.Completed(1 if errors else 0, "", "\n".join(errors))


def _unpack_busybox(deb: Path, target: Path) -> Path:
    """Unpack the static busybox of a .deb into `target/nixbox-busybox/bin/busybox`, as tools.nix would.

    A .deb is an ar archive (deb(5)): 60-byte member headers after an 8-byte magic.
    """
    data, offset = deb.read_bytes(), 8
    while offset < len(data):
        name = data[offset : offset + 16].decode().strip().rstrip("/")
        size = int(data[offset + 48 : offset + 58])
        member = data[offset + 60 : offset + 60 + size]
        if name == "data.tar.xz":
            with tarfile.open(fileobj=io.BytesIO(lzma.decompress(member))) as tar:
                found = tar.extractfile("./usr/bin/busybox")
                if found is not None:
                    program = target / BUSYBOX / "bin" / "busybox"
                    program.parent.mkdir(parents=True)
                    program.write_bytes(found.read())
                    program.chmod(0o555)
                    return target / BUSYBOX
        offset += 60 + size + size % 2
    raise NixboxError(f"{deb.name} holds no static busybox")


def busybox_nar_hash(package: LockedPackage, mirrors: Mirrors) -> str:
    """Fetch the bootstrap busybox and return the NAR hash of its unpacked tree."""
    with _work_dir() as work:
        if store.invalid([deb_path(package)]):
            deb = _download([package], mirrors, work, None)[package.path]
            store.add_files([deb])
        else:
            deb = store.physical(deb_path(package))
        return store.nar_hash(_unpack_busybox(deb, work))


def _add_krun(kernel: KrunKernel, libkrun: Path | None, work: Path) -> None:
    """Put the library of libkrun's kernel into the store, if it is not there. Raises NixboxError, HostError."""
    if not store.invalid([store.flat_path(kernel.file, kernel.sha256)]):
        return
    library = krunfw.locate(libkrun)
    if library is None or _sha256(library) != kernel.sha256:
        here = f"the one of {krunfw.origin(library)}" if library else "none"
        package, _, version = kernel.origin.partition(" ")
        hint = f"pip install {package}=={version}" if version else "NIXBOX_LIBKRUNFW names another one"
        if library:
            hint += "; or, where the config asks for libkrun, `nixbox lock` takes the one that is here"
        raise NixboxError(
            f"nixbox.lock names the libkrunfw of {kernel.origin} ({kernel.sha256[:8]}…), and {here} is here",
            hint=hint,
        )
    # Under the name that the build knows: the file here may be a link, and be called otherwise.
    shutil.copyfile(library, work / kernel.file)
    store.add_files([work / kernel.file])


def ensure_krun(kernel: KrunKernel, libkrun: Path | None = None) -> None:
    """Put libkrunfw of an image's lock into the store, from this host. Raises NixboxError, HostError."""
    with _work_dir() as work:
        _add_krun(kernel, libkrun, work)


def ensure(lock: Lock, mirrors: Mirrors, progress: Progress | None = None, libkrun: Path | None = None) -> int:
    """Put every file of the lock, and the bootstrap, into the store; returns how many were fetched.

    libkrun's kernel comes from this host (krunfw.locate), for no mirror has it, and so before anything is fetched.
    """
    if lock.krun:
        with _work_dir() as work:
            _add_krun(lock.krun, libkrun, work)
    return ensure_packages(lock.all_packages(), lock.bootstrap, mirrors, progress)


def ensure_packages(
    packages: Sequence[LockedPackage], bootstrap: Bootstrap, mirrors: Mirrors, progress: Progress | None = None
) -> int:
    """Put .debs, the bootstrap's among them, and the bootstrap itself into the store; returns how many were fetched.

    Without apt on the host only the bootstrap is brought here; Nix fetches the rest by the same hashes. Raises
    GoneError and NixboxError.
    """
    wanted = {deb_path(p): p for p in packages}
    missing = store.invalid(wanted)
    if run.find_tool("apt-helper") is None:
        missing &= {deb_path(bootstrap.package)}
    fetched = 0
    with _work_dir() as work:
        if missing:
            asked = [wanted[path] for path in sorted(missing)]
            files = _download(asked, mirrors, work, progress)
            store.add_files(list(files.values()))
            fetched = len(files)
        busybox = store.recursive_path(BUSYBOX, bootstrap.nar_hash)
        if store.invalid([busybox]) and not store.invalid([deb_path(bootstrap.package)]):
            added = store.add_tree(_unpack_busybox(store.physical(deb_path(bootstrap.package)), work))
            if added != busybox:
                raise NixboxError(
                    f"the lock's bootstrap hash does not fit {bootstrap.package.name} {bootstrap.package.version}",
                    hint="`nixbox lock` resolves it again",
                )
    return fetched


def clean() -> None:
    """Remove what downloads that were killed have left; those of the last day may still be at work."""
    for left in (paths.cache_dir() / "downloads").glob("*"):
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)
