"""Images between hosts: what one is, whether it can be built again, a workspace's image to a file and from one."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nixbox import paths
from nixbox.errors import NixboxError
from nixbox.values import dataclass

if TYPE_CHECKING:
    from nixbox.image.archive import Exported, Imported
    from nixbox.image.build import Image
    from nixbox.image.check import Checked
    from nixbox.image.nixkey import PublicKey, SecretKey
    from nixbox.report import Reporter
    from nixbox.session import Sandbox


def facts(workspace: Path, image: Image) -> dict[str, Any]:
    """All that tells an image from another: paths, hashes and sizes (bytes), for `nixbox build --json`."""
    from nixbox.image import ensure, listing, store

    infos = store.path_infos(sorted(store.requisites(image.path)))
    own = next(info for info in infos if info.path == image.path)
    files = {}
    directory = store.place(image.path)
    for link in sorted(directory.rglob("*")):  # what is behind a link to a directory has a store path of its own
        name = str(link.relative_to(directory))
        file = image.file(name)
        if file.is_file():
            files[name] = {"sha256": listing.sha256(file), "size": file.stat().st_size}
    deriver = store.deriver(image.path)
    meta = image.meta
    return {
        "path": str(image.path),
        "root": str(image.root),
        "fresh": image.fresh,
        "how": image.how,
        "drv": str(deriver) if deriver else None,
        "nar_hash": _sri(own.nar_sha256),
        "nar_size": own.nar_size,
        "closure_size": sum(info.nar_size for info in infos),
        "closure": [{"path": str(i.path), "nar_hash": _sri(i.nar_sha256), "nar_size": i.nar_size} for i in infos],
        "files": files,
        "lock_sha256": hashlib.sha256(ensure.lock_path(workspace).read_bytes()).hexdigest(),
        "reproducible": meta["reproducible"],
        "image": meta,
    }


def _sri(sha256_hex: str) -> str:
    return "sha256-" + base64.b64encode(bytes.fromhex(sha256_hex)).decode()


def check(box: Sandbox, image: Image) -> list[Checked]:
    """Build everything of the workspace's image again and compare. Raises ConfigError, BuildError, NixboxError."""
    from nixbox.image import build, ensure
    from nixbox.image import check as checking
    from nixbox.machine import backends

    loaded = box.load()
    spec = box.plan(loaded).image
    text = ensure.lock_path(box.workspace).read_text()
    key = build.key(spec, text)
    if key != image.root.name:
        raise NixboxError("the lock, the config or nixbox itself changed meanwhile", hint="run it again")
    settings = loaded.settings
    where = (settings.debian_mirror, settings.debian_security_mirror, box.report, backends.library(spec))
    expression = ensure.sources(box.workspace, text, spec, *where)
    try:
        return checking.check(spec, key, expression, box.report)
    finally:
        box.report.done()


def export(box: Sandbox, target: Path, *, key: SecretKey | None, force: bool) -> Exported:
    """Write the workspace's image, which must be there, to a file. Raises ConfigError, NixboxError."""
    from nixbox.image import archive, build, ensure

    spec = box.plan(box.load(locked=True)).image
    why = ensure.stale(box.workspace, spec)
    text = "" if why else ensure.lock_path(box.workspace).read_text()
    image = None if why else build.built(build.key(spec, text))
    if image is None:
        raise NixboxError(
            f"the image of this workspace is not here{f': {why}' if why else ''}",
            hint="`nixbox build` makes it, or takes it from a binary cache (--from URL)",
        )
    try:
        return archive.export(target, spec, text, image.path, box.report, key=key, force=force)
    finally:
        box.report.done()


@dataclass(frozen=True, slots=True)
class Arrived:
    """What an import came to. `lock`: of the workspace's lock, `notes` what differs or does not fit."""

    imported: Imported
    lock: Literal["written", "same", "different"] | None
    fits: bool
    notes: tuple[str, ...]


def bring(
    start: Path, source: Path, reporter: Reporter, *, sha256: str | None, keys: tuple[PublicKey, ...]
) -> Arrived:
    """Take an archive into the store; in a workspace without a lock the archive's becomes it.

    `fits`: the workspace's config and lock ask for just this image. Raises ArchiveError, ConfigError, NixboxError.
    """
    from nixbox.image import archive

    workspace = _workspace(start)
    imported = archive.bring(source, reporter, sha256=sha256, keys=keys)
    reporter.done()
    if workspace is None:
        return Arrived(imported, None, False, ())
    lock, notes = _take_lock(workspace, imported.lock_text)
    fits = False
    if lock != "different":
        from nixbox.image import build, ensure
        from nixbox.session import Sandbox

        box = Sandbox(workspace, reporter=reporter)
        try:
            spec = box.plan(box.load(locked=True)).image
        except NixboxError as error:
            return Arrived(
                imported, lock, False, (*notes, f"this workspace's config cannot be read: {error.message}")
            )
        why = ensure.stale(workspace, spec)
        if why is None:
            fits = build.key(spec, ensure.lock_path(workspace).read_text()) == imported.key
            why = None if fits else "its build scripts differ"
        if why:
            notes = (*notes, f"this workspace's config asks for another image: {why}")
    return Arrived(imported, lock, fits, notes)


def _workspace(start: Path) -> Path | None:
    """The workspace at or above a directory, if there is one. Raises ConfigError for one that is not trusted."""
    names = (paths.CONFIG_FILE, paths.NIX_CONFIG_FILE)
    here = start.resolve()
    found = any((d / paths.CONFIG_DIR / name).is_file() for d in (here, *here.parents) for name in names)
    return paths.find_workspace(start) if found else None


def _take_lock(workspace: Path, text: str) -> tuple[Literal["written", "same", "different"], tuple[str, ...]]:
    """Give a workspace the archive's lock if it has none; else say what differs."""
    import json

    from nixbox.image import ensure, lock, lockfile

    file = ensure.lock_path(workspace)
    with lockfile.one_at_a_time(workspace):
        if not file.exists():
            paths.write_atomic(file, text)
            return "written", ()
        have = file.read_text()
        if lockfile.image_part(have) == lockfile.image_part(text):
            return "same", ()
        data = lockfile.parse(have, file)
        if lockfile.only_pins(data):  # the workspace's own pins stay
            whole = json.loads(lockfile.image_part(text)) | {"plugins": data["plugins"]}
            paths.write_atomic(file, lockfile.render(whole))
            return "written", ()
        changed = lock.changes(lock.load(file), lock.parse(lockfile.image_part(text), Path("nixbox.lock"))).lines()
    shown = changed[:20] + ([f"… and {len(changed) - 20} more"] if changed[20:] else [])
    first = f"{paths.CONFIG_DIR}/{paths.LOCK_FILE} is another one than the archive's, and stays; the archive's has:"
    return "different", (first, *(shown or ["the same packages, and other tools of the build"]))
