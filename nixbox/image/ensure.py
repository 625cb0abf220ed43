"""The image of a plan: lock it if need be, fetch, build; nothing at all when it is there already."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from nixbox import paths, run
from nixbox.config import refs
from nixbox.errors import ConfigError, HostError
from nixbox.image import build, lockfile
from nixbox.image.build import HERE, Image, Means
from nixbox.plan.model import ImageSpec
from nixbox.report import Reporter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nixbox.image.lock import AnyLock

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
        why = _other_base(data, spec) or _other_request(data, spec) or _too_old(data)
    except FileNotFoundError:
        return "there is no lock yet"
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if why is None and spec.krun and data.get("krun") is None:
        return _NO_KRUN
    return why


def _other_base(data: Any, spec: ImageSpec) -> str | None:
    if data["base"] != spec.base:
        return f"the lock is for {data['base']}, the config says {spec.base}"
    if spec.base == "nixpkgs":
        pin, place = data["nixpkgs"], refs.parse(spec.nixpkgs)
        if (pin["owner"], pin["repo"], pin["ref"]) != (place.owner, place.repo, place.ref):
            return f"the lock is for another nixpkgs than {spec.nixpkgs}"
    elif data["suite"] != spec.suite:
        return f"the lock is for {data['suite']}, the config says {spec.suite}"
    return None


def _other_request(data: Any, spec: ImageSpec) -> str | None:
    requested, beside = sorted(data["requested"]), sorted(data.get("sidecar_requested", ()))
    if requested == sorted(spec.packages) and beside == sorted(spec.sidecar_packages):
        return None
    had, wanted = {*requested, *beside}, {*spec.packages, *spec.sidecar_packages}
    said = [("new", sorted(wanted - had)), ("gone", sorted(had - wanted))]
    found = "; ".join(f"{verb}: {', '.join(names)}" for verb, names in said if names)
    return found or "packages went to the sidecar, or came from it"


def _too_old(data: Any) -> str | None:
    if data["base"] != "debian":
        return None
    tools = {tool["name"] for tool in data["tools"]}
    if not set(data["base_requested"]) >= _GUEST_NEEDS or "erofs-utils" not in tools or "host" not in data:
        return "the lock was made by an older nixbox"
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

    A revision of nixpkgs stays as it is while the config names the same source: `nixbox update` moves it. libkrun's
    kernel becomes this host's (`libkrun` as for `ensure`) where `spec` asks for one; a host without one
    keeps the lock's.
    """
    from nixbox.image import krunfw, lock

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
    new = resolved(spec, old, mirror, security, reporter)
    new = new.model_copy(update={"krun": kernel})
    with suppress(ConfigError):  # pins that cannot be read are resolved anew
        new = new.model_copy(update={"plugins": tuple(lockfile.pins(path).values())})
    lock.save(new, path)
    return lock.changes(old, new).lines()


def resolved(
    spec: ImageSpec, old: AnyLock | None, mirror: str | None, security: str | None, reporter: Reporter
) -> AnyLock:
    """A lock of what `spec` asks for, without libkrun's kernel and plugins."""
    from nixbox.image import apt, nixpkgs, resolve
    from nixbox.image.lock import FORMAT, NixpkgsLock

    if spec.base != "nixpkgs":
        mirrors = apt.mirrors(mirror, security)
        wanted = (spec.packages, spec.sidecar_packages)
        return resolve.resolve(*wanted, suite=spec.suite, mirrors=mirrors, progress=reporter.phase)
    pin = old.nixpkgs if isinstance(old, NixpkgsLock) and old.nixpkgs.place == refs.parse(spec.nixpkgs) else None
    if pin is None:
        pin = nixpkgs.resolve(spec.nixpkgs, reporter.phase)
    arch = resolve.default_arch()
    return NixpkgsLock(format=FORMAT, base="nixpkgs", arch=arch, requested=tuple(spec.packages), nixpkgs=pin)


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


def adopt(image_key: str, expression: str, path: Path, how: str = "there") -> Image:
    """Root a store path, which something else than a build here brought, as the image of a key."""
    from nixbox.image import store

    paths.write_atomic(build.roots_dir() / f"{image_key}.nix", expression)
    root = build.roots_dir() / image_key
    store.add_root(root, path)
    return Image(path, root, fresh=how != "there", how=how)


def _substitute(spec: ImageSpec, text: str, image_key: str, cache: build.Cache, reporter: Reporter) -> Image | None:
    """The image from a binary cache; None, and a note, where that has not got it."""
    from nixbox.image import binary_cache

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
    return adopt(image_key, expression, path, "substituted")


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
    from nixbox.image import apt, fetch, lock, nixpkgs, store

    if spec.build and spec.build_network and store.private_root() is not None:
        raise HostError(
            "build_network needs root or a Nix daemon: in a store of your own Nix never lifts its sandbox",
            hint="on Debian: apt install nix-setup-systemd; or take build_network out of the profile",
        )
    loaded = lock.parse(lockfile.image_part(text), lock_path(workspace))
    path = keep_lock(build.key(spec, text), text)
    if isinstance(loaded, lock.NixpkgsLock):
        if loaded.krun:
            fetch.ensure_krun(loaded.krun, libkrun)
        nixpkgs.ensure(loaded.nixpkgs, reporter.phase)
        reporter.phase("looking the packages up in nixpkgs")
        nixpkgs.check(loaded, spec)
        return build.expression(spec, path, {})
    mirrors = apt.mirrors(mirror, security)
    reporter.phase("looking for the packages in the Nix store")
    fetch.ensure(loaded, mirrors, reporter.transfer, libkrun)
    return build.expression(spec, path, mirrors.as_dict())
