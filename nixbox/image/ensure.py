"""The image of a plan: lock it if need be, fetch, build; nothing at all when it is there already."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from nixbox import paths, run
from nixbox.errors import ConfigError, HostError
from nixbox.image import build, lockfile
from nixbox.image.build import HERE, Image, Means
from nixbox.plan.model import ImageSpec
from nixbox.report import Reporter

# Of the image's base set (resolve.BASE_REQUEST), what nix/guest cannot do without and older locks may lack.
_GUEST_NEEDS = {"dropbear-bin", "openssh-server", "e2fsprogs"}
_NO_KRUN = "the lock has no kernel for libkrun yet"

lock_path = lockfile.path


def stale(workspace: Path, spec: ImageSpec) -> str | None:
    """Why the lock does not serve this specification, or None when it does.

    Looks at the request only: a damaged lock is found, and named field by field, when it is used.
    """
    try:
        data = json.loads(lock_path(workspace).read_text())
        if lockfile.only_pins(data):
            return "there is no lock yet"
        suite, requested, base = data["suite"], sorted(data["requested"]), set(data["base_requested"])
        tools, beside = {tool["name"] for tool in data["tools"]}, sorted(data.get("sidecar_requested", ()))
    except FileNotFoundError:
        return "there is no lock yet"
    except (ValueError, KeyError, TypeError):
        return None
    if suite != spec.suite:
        return f"the lock is for {suite}, the config says {spec.suite}"
    wanted = [*spec.packages, *spec.sidecar_packages]
    if requested != sorted(spec.packages) or beside != sorted(spec.sidecar_packages):
        had = {*requested, *beside}
        new, gone = sorted({*wanted} - had), sorted(had - {*wanted})
        said = [f"{verb}: {', '.join(names)}" for verb, names in (("new", new), ("gone", gone)) if names]
        return "; ".join(said) or "packages went to the sidecar, or came from it"
    if not base >= _GUEST_NEEDS or "erofs-utils" not in tools or "host" not in data:
        return "the lock was made by an older nixbox"
    if spec.krun and data.get("krun") is None:
        return _NO_KRUN
    return None


def current(workspace: Path, spec: ImageSpec) -> Image | None:
    """The image of `spec` when it is there and its lock fits; asks neither Nix nor a mirror."""
    if stale(workspace, spec):
        return None
    return build.built(build.key(spec, lock_path(workspace).read_text()))


def relock(
    workspace: Path,
    spec: ImageSpec,
    mirror: str | None,
    security: str | None,
    reporter: Reporter,
    *,
    libkrun: Path | None = None,
) -> list[str]:
    """Resolve the package set anew and write the lock; returns what changed, a line each.

    libkrun's kernel becomes this host's (`libkrun` as for `ensure`) where `spec` asks for one; a host without one
    keeps the lock's.
    """
    from nixbox.image import apt, krunfw, lock, resolve

    run.tool("nix-store")  # said now rather than after the mirror was read
    path = lock_path(workspace)
    try:
        old = lock.load(path)
    except ConfigError:  # none, or one that this is the mend for
        old = None
    kernel = old.krun if old else None
    if spec.krun:
        library = krunfw.locate(libkrun) if kernel else krunfw.find(libkrun)
        kernel = krunfw.inspect(library) if library else kernel
    mirrors = apt.mirrors(mirror, security)
    new = resolve.resolve(
        spec.packages, spec.sidecar_packages, suite=spec.suite, mirrors=mirrors, progress=reporter.phase
    )
    new = new.model_copy(update={"krun": kernel})
    with suppress(ConfigError):  # pins that cannot be read are resolved anew
        new = new.model_copy(update={"plugins": tuple(lockfile.pins(path).values())})
    lock.save(new, path)
    return lock.changes(old, new).lines()


def _add_krun(workspace: Path, libkrun: Path | None) -> list[str]:
    """Put this host's libkrun kernel into a lock that has none, and leave all else in it; returns what changed."""
    from nixbox.image import krunfw, lock

    old = lock.load(lock_path(workspace))
    new = old.model_copy(update={"krun": krunfw.inspect(krunfw.find(libkrun))})
    lock.save(new, lock_path(workspace))
    return lock.changes(old, new).lines()


def ensure(
    workspace: Path,
    spec: ImageSpec,
    mirror: str | None,
    security: str | None,
    reporter: Reporter,
    *,
    locked: bool = False,
    libkrun: Path | None = None,
    means: Means | None = None,
    phase: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Image:
    """The built image of `spec`. Raises ConfigError when `locked` is set and the lock does not fit.

    `libkrun`: the library whose kernel an image for libkrun gets, where one is named (krunfw.locate).
    `means`: a binary cache that is asked first, and builders; an image that is here already needs neither.
    `phase` is entered for each of the parts `lock` and `build`.
    """
    with phase("lock"), lockfile.one_at_a_time(workspace):
        why = stale(workspace, spec)
        if why and locked:
            raise ConfigError(f"the lock does not fit the config: {why}", hint="`nixbox lock`, and commit the result")
        if why:
            if why == _NO_KRUN:  # the packages stay as they are, and no mirror is asked
                changed = _add_krun(workspace, libkrun)
            else:
                reporter.phase(f"locking packages ({why})")
                changed = relock(workspace, spec, mirror, security, reporter, libkrun=libkrun)
            if len(changed) <= 20:
                for line in changed:
                    reporter.note(line)
            else:
                reporter.note(f"locked {len(changed)} packages in {paths.CONFIG_DIR}/{paths.LOCK_FILE}")
        # Read once: what is built is what the key was made of, whatever happens to the file meanwhile.
        text = lock_path(workspace).read_text()
    means = means or HERE
    with phase("build"):
        image_key = build.key(spec, text)
        found = build.built(image_key)
        if found is not None:
            return found
        if means.cache is not None:
            taken = _substitute(spec, text, image_key, means.cache, reporter)
            if taken is not None:
                return taken
        expression = sources(workspace, text, spec, mirror, security, reporter, libkrun)
        reporter.phase("evaluating the image")
        try:
            return build.build(spec, image_key, expression, reporter, means.builders)
        finally:
            reporter.done()


def keep_lock(image_key: str, text: str) -> Path:
    """Write what the key was made of, and nothing else, where the image's expression reads it."""
    build.roots_dir().mkdir(parents=True, exist_ok=True)
    path = build.roots_dir() / f"{image_key}.lock"
    paths.write_atomic(path, lockfile.image_part(text))
    return path


def _substitute(spec: ImageSpec, text: str, image_key: str, cache: build.Cache, reporter: Reporter) -> Image | None:
    """The image from a binary cache; None, and a note, where that has not got it."""
    from nixbox.image import binary_cache, store

    # No mirror decides what an image is, and nothing is fetched from one.
    expression = build.expression(spec, keep_lock(image_key, text), {})
    reporter.phase("evaluating the image")
    path = build.evaluate(expression).out
    reporter.phase(f"asking {cache.url} for the image")
    if not binary_cache.has(cache, path):
        reporter.note(f"{cache.url} has not got this image ({path.name}): it is built")
        return None
    reporter.phase(f"copying the image from {cache.url}")
    binary_cache.take(cache, path)
    paths.write_atomic(build.roots_dir() / f"{image_key}.nix", expression)
    root = build.roots_dir() / image_key
    store.add_root(root, path)
    return Image(path, root, fresh=True, how="substituted")


def sources(
    workspace: Path,
    text: str,
    spec: ImageSpec,
    mirror: str | None,
    security: str | None,
    reporter: Reporter,
    libkrun: Path | None,
) -> str:
    """Put what an image is built of into the store; returns the expression that builds it.

    `text` is the lock's. Raises GoneError, HostError, ConfigError, NixboxError.
    """
    from nixbox.image import apt, fetch, lock, store

    if spec.build and spec.build_network and store.private_root() is not None:
        raise HostError(
            "build_network needs root or a Nix daemon: in a store of your own Nix never lifts its sandbox",
            hint="on Debian: apt install nix-setup-systemd; or take build_network out of the profile",
        )
    loaded = lock.parse(lockfile.image_part(text), lock_path(workspace))
    path = keep_lock(build.key(spec, text), text)
    mirrors = apt.mirrors(mirror, security)
    reporter.phase("looking for the packages in the Nix store")
    fetch.ensure(loaded, mirrors, reporter.transfer, libkrun)
    return build.expression(spec, path, mirrors.as_dict())
