"""An image as one file: manifest, lock, and the image's closure as Nix archives; made on one host, used on another.

    manifest.json   what the image was made of, every store path with its hash, size and references
    manifest.sum    the manifest's own hash, and a signature where there was a key
    nixbox.lock
    nar/HASH.nar    each store path, not compressed: its SHA-256 is the NAR hash, which Nix checks as well

Everything is checked by the manifest before Nix is given any of it; the manifest itself by a signature or by its own
hash, where the caller has one. See docs/decisions/031-image-archives.md.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nixbox import __version__, paths, run
from nixbox.errors import ConfigError, HostError, NixboxError
from nixbox.image import binary_cache, build, ensure, fetch, lock, lockfile, manifest, resolve, store, ustar
from nixbox.image.build import Cache, Image
from nixbox.image.manifest import Manifest
from nixbox.image.nixkey import PublicKey, SecretKey
from nixbox.image.store import PathInfo
from nixbox.plan.model import ImageSpec
from nixbox.report import Reporter
from nixbox.values import dataclass

_MANIFEST, _SEAL, _LOCK = "manifest.json", "manifest.sum", "nixbox.lock"
_MOST_MANIFEST = 64 << 20
_MOST_SEAL = 1 << 10
_DUMP_END_S = 60.0
_PLAIN = re.compile(r"[A-Za-z0-9/._-]+")


@dataclass(frozen=True, slots=True)
class Exported:
    """A written archive: its size in bytes, the SHA-256 of its manifest (which covers all of it), and who signed."""

    file: Path
    bytes: int
    manifest_sha256: str
    image: Path
    signed_by: str | None


@dataclass(frozen=True, slots=True)
class Imported:
    """An archive that was taken in: the image, rooted under its key, and the lock that it was made of."""

    image: Image
    key: str
    manifest: Manifest
    manifest_sha256: str
    signed_by: str | None
    lock_text: str


# --- out ---


def export(
    target: Path,
    spec: ImageSpec,
    lock_text: str,
    image: Path,
    reporter: Reporter,
    *,
    key: SecretKey | None = None,
    force: bool = False,
) -> Exported:
    """Write an image to a file, whole or not at all; the same image gives the same bits.

    Raises ConfigError when `target` is there and `force` is not set, NixboxError on a full disk and for a store whose
    content is not what it was.
    """
    if target.exists() and not force:
        raise ConfigError(f"{target} is there already", hint="--force replaces it")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no directory {target.parent}")
    infos = store.path_infos(sorted(store.requisites(image)))
    parsed = lock.parse(lockfile.image_part(lock_text), Path(_LOCK))
    for info in infos:
        if info.nar_size > ustar.MOST_BYTES:
            raise NixboxError(f"{info.path} has {info.nar_size} bytes: more than {ustar.MOST_BYTES} fit no archive")
    encoded = lock_text.encode()
    made = Manifest(
        format=manifest.FORMAT,
        nixbox=__version__,
        arch=parsed.arch,
        image=str(image),
        reproducible=not (spec.build and spec.build_network),
        spec=spec,
        lock=manifest.Content(sha256=hashlib.sha256(encoded).hexdigest(), size=len(encoded)),
        paths=tuple(manifest.stored(info, key) for info in infos),
    )
    data = manifest.dump(made)
    seal = manifest.seal(data, key)
    size = ustar.length([len(data), len(seal), *made.sizes])
    paths.require_space(target.parent, size, f"the archive {target.name}")
    with _whole(target) as file:
        ustar.write(file, _MANIFEST, data)
        ustar.write(file, _SEAL, seal)
        ustar.write(file, _LOCK, encoded)
        done = 0
        for number, (info, path) in enumerate(zip(infos, made.paths, strict=True)):
            file.write(ustar.header(path.member, path.size))
            for piece in _dump(info):
                file.write(piece)
                done += len(piece)
                reporter.copying("exporting", done, sum(made.sizes), number, len(infos))
            file.write(ustar.padding(path.size))
        file.write(ustar.END)
    return Exported(target, size, hashlib.sha256(data).hexdigest(), image, key.name if key else None)


@contextmanager
def _whole(target: Path) -> Iterator[BinaryIO]:
    """A file beside the target that takes its place at the body's end, and is gone if the body fails."""
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in paths.FULL:
            raise paths.no_space(target) from None
        raise


def _dump(info: PathInfo) -> Iterator[bytes]:
    """The NAR of a store path. Raises NixboxError at its end when it is not what the store's database says."""
    digest, size = hashlib.sha256(), 0
    argv = ["nix-store", "--dump", str(store.place(info.path))]
    with run.piped(argv, stdin=run.NOWHERE, env=store.env()) as child:
        while piece := os.read(child.stdout, 1 << 20):
            digest.update(piece)
            size += len(piece)
            if size > info.nar_size:
                break
            yield piece
        if size <= info.nar_size and child.finish(_DUMP_END_S) != 0:
            raise NixboxError(f"{info.path} cannot be read: {child.said().strip()}")
    if (digest.hexdigest(), size) != (info.nar_sha256, info.nar_size):
        raise NixboxError(
            f"{info.path} is not what it was when it was built: the store is damaged",
            hint=f"nix-store --verify-path {info.path}; nix-store --repair-path {info.path}",
        )


# --- in ---


def bring(
    source: Path,
    reporter: Reporter,
    *,
    sha256: str | None = None,
    keys: tuple[PublicKey, ...] = (),
) -> Imported:
    """Take an archive into the store and root its image, so that the config and the lock that it is of find it.

    `sha256` (hex) is what its manifest must have, `keys` are those of which one must have signed it; nothing reaches
    the store before all of the file was checked. Raises ArchiveError for a file that is no whole archive of ours,
    HostError for another architecture's image, NixboxError for one that this nixbox would not build from its lock.
    """
    parent = paths.cache_dir() / "downloads"
    parent.mkdir(parents=True, exist_ok=True)
    fetch.clean()
    with _opened(source) as file, tempfile.TemporaryDirectory(dir=parent) as work, _full_disk(parent):
        reader = ustar.Reader(file, str(source))
        data = reader.small(_MANIFEST, _MOST_MANIFEST)
        seal = reader.small(_SEAL, _MOST_SEAL)
        said, signer = _believe(reader, data, seal, sha256, keys)
        whole = ustar.length([len(data), len(seal), *said.sizes])
        key, lock_text = _unpack(reader, said, whole, Path(work), reporter)
        _require_same(said, lock_text, Path(work))
        reporter.phase("putting the image into the Nix store")
        _add(said, Path(work))
    expression = build.expression(said.spec, ensure.keep_lock(key, lock_text), {})
    image = ensure.adopt(key, expression, Path(said.image), "imported")
    if build.built(key) is None:
        image.root.unlink(missing_ok=True)
        raise reader.error(f"{said.image} is no image of nixbox's")
    return Imported(image, key, said, hashlib.sha256(data).hexdigest(), signer, lock_text)


@contextmanager
def _opened(source: Path) -> Iterator[BinaryIO]:
    if not source.exists():
        raise ConfigError(f"there is no archive {source}", hint="`nixbox image export FILE` writes one")
    if not source.is_file():
        raise ConfigError(f"{source} is no file")
    with source.open("rb") as file:
        yield file


@contextmanager
def _full_disk(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in paths.FULL:
            raise NixboxError(f"no space left on the disk of {place}", hint="free some space and try again") from None
        raise


def _believe(
    reader: ustar.Reader, data: bytes, seal: bytes, sha256: str | None, keys: tuple[PublicKey, ...]
) -> tuple[Manifest, str | None]:
    """The manifest, once it is the one that was meant; and who signed it, of the keys that were named."""
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and digest != sha256.lower():
        raise reader.error(f"its manifest's SHA-256 is {digest}, not {sha256.lower()}")
    try:
        signature = manifest.signature(data, seal)
        signer = manifest.signed_by(data, signature, keys)
        if keys and signer is None:
            raise ValueError("its manifest is not signed" + (" by a key that was named" if signature else ""))
        said = manifest.parse(data)
    except ValueError as error:
        raise reader.error(str(error)) from None
    here = resolve.ARCHES.get(platform.machine(), platform.machine())
    if said.arch != here:
        raise HostError(f"{reader.what} has an image for {said.arch}; this host is {here}")
    return said, signer


def _unpack(reader: ustar.Reader, said: Manifest, whole: int, work: Path, reporter: Reporter) -> tuple[str, str]:
    """Check every member and lay them out as a binary cache; returns the image's key and the lock."""
    if reader.bytes < whole:
        raise reader.error(f"it is cut off: {whole - reader.bytes} of its {whole} bytes are missing")
    if reader.bytes > whole:
        raise reader.error(f"{reader.bytes - whole} bytes are behind its end")
    total = sum(said.sizes)
    paths.require_space(work, total, "unpacking the archive")
    pieces: list[bytes] = []
    reader.copy(_LOCK, said.lock.size, said.lock.sha256, pieces.append)
    try:
        lock_text = b"".join(pieces).decode()
    except UnicodeDecodeError:
        raise reader.error(f"{_LOCK} is not text") from None
    (work / "nar").mkdir()
    (work / "nix-cache-info").write_text(f"StoreDir: {store.STORE}\n")
    done = 0

    def progress(sink: Callable[[bytes], object], number: int) -> Callable[[bytes], None]:
        def take(piece: bytes) -> None:
            nonlocal done
            sink(piece)
            done += len(piece)
            reporter.copying("checking the archive", done, total, number, len(said.paths))

        return take

    for number, path in enumerate(said.paths):
        with (work / path.member).open("wb") as file:
            reader.copy(path.member, path.size, path.sha256, progress(file.write, number))
        (work / f"{path.hash_part}.narinfo").write_text(path.narinfo())
    reader.end()
    return build.key(said.spec, lock_text), lock_text


def _require_same(said: Manifest, lock_text: str, work: Path) -> None:
    """The image must be the one that its own lock and scripts come to here. Raises NixboxError."""
    parsed = lock.parse(lockfile.image_part(lock_text), Path(_LOCK))
    if parsed.arch != said.arch:
        raise NixboxError(f"the archive is for {said.arch}, and the lock in it for {parsed.arch}")
    file = work / "image.lock"
    file.write_text(lockfile.image_part(lock_text))
    found = build.evaluate(build.expression(said.spec, file, {})).out
    if str(found) != said.image:
        other = f" {said.nixbox}" if said.nixbox != __version__ else ", of another state,"
        raise NixboxError(
            f"a nixbox{other} made this archive: from its lock this one ({__version__}) would build {found.name}, "
            f"and the archive has {Path(said.image).name}",
            hint="use the same nixbox on both hosts, or export the image anew",
        )


def _add(said: Manifest, work: Path) -> None:
    """Give the unpacked archive to Nix; what is there already must be the same."""
    wanted = {Path(path.path): path for path in said.paths}
    missing = store.invalid(wanted)
    for info in store.path_infos(sorted(wanted.keys() - missing)):
        if (info.nar_sha256, info.nar_size) != (wanted[info.path].sha256, wanted[info.path].size):
            raise NixboxError(
                f"the store has {info.path} already, with other bits than the archive",
                hint="`nixbox build --check` tells which of the two is what the lock says; `nixbox image gc` removes "
                "images that no machine uses",
            )
    if missing:
        with _plainly_named(work) as place:
            source = Cache(f"file://{place}", unsigned=True)  # what was to be checked was checked
            binary_cache.take(source, Path(said.image))


@contextmanager
def _plainly_named(directory: Path) -> Iterator[Path]:
    """A name of a directory that is the same in a URL, whether Nix decodes that (newer) or not (2.8)."""
    if _PLAIN.fullmatch(str(directory)):
        yield directory
        return
    temporary = tempfile.gettempdir()
    # Where even that has a strange name, the one that every system has; a directory of our own is made in it.
    parent = temporary if _PLAIN.fullmatch(temporary) else "/tmp"  # noqa: S108
    with tempfile.TemporaryDirectory(prefix="nixbox-import-", dir=parent) as short:
        link = Path(short) / "cache"
        link.symlink_to(directory)
        yield link


def check_sha256(text: str) -> str:
    """A SHA-256 as a command line has it. Raises ConfigError."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ConfigError("--sha256 takes 64 hexadecimal digits", hint="`nixbox image export` printed them")
    return text.lower()
