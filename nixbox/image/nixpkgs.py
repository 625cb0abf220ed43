"""One revision of nixpkgs: which one a branch means now, its tree in the Nix store, and what it has of some names.

The tree is a fixed-output path, by the hash that `nixbox.lock` names; everything of an image follows from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from nixbox import paths, run
from nixbox.config import refs
from nixbox.config.fields import near
from nixbox.config.names import shown
from nixbox.errors import ConfigError, NixboxError
from nixbox.image import github, store
from nixbox.image.lock import Arch, NixpkgsLock, NixpkgsPin
from nixbox.plan import nixexpr
from nixbox.plan.model import ImageSpec
from nixbox.report import harmless
from nixbox.values import dataclass

SYSTEMS: dict[Arch, str] = {"amd64": "x86_64-linux", "arm64": "aarch64-linux"}  # as in nix/image.nix
_TIMEOUT_S = 300.0  # nixpkgs is read from a cold disk
_NEAR_MOST = 3


@dataclass(frozen=True, slots=True)
class Found:
    """What nixpkgs has under a name, as nix/bases/nixpkgs/inspect.nix says it.

    `missing` is the part of a dotted name that is not there, and `near` what there is in its place.
    """

    name: str
    state: Literal["package", "missing", "refused", "set"]
    version: str
    unfree: bool
    broken: bool
    insecure: bool
    unsupported: bool
    missing: str
    near: tuple[str, ...]


# --- the tree --------------------------------------------------------------------------------------------


def resolve(source: str, progress: Callable[[str], None]) -> NixpkgsPin:
    """What `source` (github:OWNER/REPO@REF) means now, its tree in the store. Raises ConfigError, NixboxError."""
    place = refs.parse(source)
    progress(f"asking GitHub for {source}")
    with _in_words():
        rev = github.resolve(place)
    return _fetched(place, rev, progress)


def _fetched(place: refs.Github, rev: str, progress: Callable[[str], None]) -> NixpkgsPin:
    progress(f"fetching {place.repository} at {rev[:12]}")
    with _in_words():
        nar_hash = github.prefetch(place, rev)
    date = github.commit_date(place, rev)
    assert place.ref is not None  # of whatever the config or a lock names
    return NixpkgsPin(owner=place.owner, repo=place.repo, ref=place.ref, rev=rev, hash=nar_hash, date=date)


def tree(pin: NixpkgsPin) -> Path:
    """Where the tree of a pin lies in the Nix store once it is there."""
    return store.recursive_path(github.STORE_NAME, pin.hash)


def ensure(pin: NixpkgsPin, progress: Callable[[str], None]) -> None:
    """Bring the tree of a pin into the store, if it is not there: without a network then. Raises NixboxError."""
    if store.invalid([tree(pin)]):
        progress(f"fetching {pin.place.repository} at {pin.rev[:12]}")
        with _in_words():
            github.fetch(pin.place, pin.rev, pin.hash)


def moved(pin: NixpkgsPin, progress: Callable[[str], None]) -> NixpkgsPin | None:
    """What the pin's own branch or tag means now, its tree in the store; None when that is what is pinned."""
    progress(f"asking GitHub for {pin.place}")
    with _in_words():
        rev = github.resolve(pin.place)
    return None if rev == pin.rev else _fetched(pin.place, rev, progress)


@contextmanager
def _in_words() -> Iterator[None]:
    """GitHub's refusals as they are about nixpkgs; `github` speaks of plugins."""
    try:
        yield
    except ConfigError as error:
        error.hint = "look at [nixpkgs] source in .nixbox/config.toml, and at the pin in nixbox.lock"
        raise
    except NixboxError as error:
        if "cannot be reached" in error.message:
            error.hint = "what is locked and in the Nix store needs no network; this has to be fetched once"
        raise


# --- what it has -----------------------------------------------------------------------------------------


def inspect(lock: NixpkgsLock, names: Sequence[str], *, with_base: bool = False) -> list[Found]:
    """Look names up in the locked revision, and with `with_base` all that every image of it has.

    Its tree must be in the store. Raises NixboxError with Nix's words when the tree cannot be evaluated at all.
    """
    argument: dict[str, nixexpr.Value] = {
        "lock": nixexpr.Call("builtins.fromJSON", lock.model_dump_json()),
        "system": SYSTEMS[lock.arch],
        "names": list(dict.fromkeys(names)),
        "withBase": with_base,
    }
    call = nixexpr.Call(nixexpr.Call("import", paths.nix_dir() / "bases/nixpkgs/inspect.nix"), argument)
    argv = ["nix-instantiate", "--eval", "--strict", "--json", "-"]
    done = run.run(argv, stdin=nixexpr.render(call), timeout_s=_TIMEOUT_S, check=False, env=store.env())
    if done.code != 0:
        said = "\n".join(harmless(line, "") for line in done.stderr.strip().splitlines()[-12:])
        raise NixboxError(
            f"nixpkgs at {lock.nixpkgs} cannot be evaluated:\n{said}",
            hint="is [nixpkgs] source a repository with the packages of nixpkgs?",
        )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return [Found(**{**row, "near": tuple(row["near"])}) for row in rows]


def check(lock: NixpkgsLock, spec: ImageSpec) -> None:
    """Raise one ConfigError with every package and library of `spec` that the locked revision cannot give."""
    named = [*(("packages", name) for name in spec.packages), *(("ld_libraries", name) for name in spec.ld_libraries)]
    found = {one.name: one for one in inspect(lock, [name for _, name in named])}
    asked: dict[str, list[str]] = {}
    for name, origin in spec.asked:
        asked.setdefault(name, []).append(origin)
    faults = []
    for field, name in dict.fromkeys(named):
        why = fault(found[name], allow_unfree=spec.allow_unfree)
        if why:
            by = " and ".join(dict.fromkeys(asked.get(name, ())))
            faults.append(f"{field}: {why}" + (f" (from {by})" if by else ""))
    if faults:
        count = "a name" if len(faults) == 1 else f"{len(faults)} names"
        raise ConfigError(
            f"nixpkgs at {lock.nixpkgs} cannot give {count} that the image asks for",
            hint="`nixbox update nixpkgs` takes a newer revision; mend the names where they stand",
            faults=faults,
        )


def fault(found: Found, *, allow_unfree: bool) -> str | None:
    """What keeps a name from being used, in words; None when nothing does."""
    name = shown(found.name, most=100)
    if found.state == "missing":
        parts = found.name.split(".")
        way = parts[: parts.index(found.missing)]
        close = near(found.missing, found.near, _NEAR_MOST)
        where = f": {shown('.'.join(way), most=100)} has no {shown(found.missing, most=100)}" if way else ""
        return f"there is no package {name}{where}{close}"
    if found.state == "set":
        return f"{name} is no package but a set of them: name one, as in {shown(f'{found.name}.NAME', most=100)}"
    if found.unfree and not allow_unfree:
        return f"{name} has a licence that is not free: [nixpkgs] allow_unfree = true in config.toml allows it"
    if found.state == "refused" or found.broken or found.insecure or found.unsupported:
        flags = {"broken": found.broken, "insecure": found.insecure, "not for this architecture": found.unsupported}
        words = " and ".join(word for word, holds in flags.items() if holds)
        return f"nixpkgs refuses {name}: it is {words or 'gone or cannot be evaluated'}"
    return None


def versions(lock: NixpkgsLock, names: Sequence[str]) -> dict[str, str]:
    """The versions of the image's own packages and of `names` (those that there are) in a revision."""
    return {one.name: one.version for one in inspect(lock, names, with_base=True) if one.state == "package"}
