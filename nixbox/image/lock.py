"""`nixbox.lock`: every input of an image, by version and SHA-256, resolved once.

The file is JSON, one package a line so that a diff reads well. For the Debian base it names pool paths, not mirrors:
any mirror with the same bits serves. For nixpkgs it names one revision with its hash, of which everything follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from nixbox import paths
from nixbox.config import refs
from nixbox.errors import ConfigError
from nixbox.image import lockfile
from nixbox.image.lockfile import Pin
from nixbox.values import dataclass

FORMAT = lockfile.FORMAT
Arch = Literal["amd64", "arm64"]
Repo = Literal["debian", "security"]
_SHA256 = r"^[0-9a-f]{64}$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LockedPackage(_Strict):
    """One .deb: `path` is relative to the repository `repo`, `size` in bytes, `sha256` in hex."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9+.-]+$")
    version: str = Field(pattern=r"^[A-Za-z0-9.+~:-]+$")
    arch: str = Field(pattern=r"^[a-z0-9-]+$")
    repo: Repo
    # No part begins with a dot: the path stays inside the repository.
    path: str = Field(pattern=r"^pool(/[A-Za-z0-9+~:%_-][A-Za-z0-9.+~:%_-]*)+\.deb$")
    size: int = Field(gt=0)
    sha256: str = Field(pattern=_SHA256)


class Bootstrap(_Strict):
    """The static busybox that builds everything: its .deb, and the hash of the unpacked store path."""

    package: LockedPackage
    nar_hash: str = Field(pattern=r"^sha256-[A-Za-z0-9+/]{43}=$")


class KrunKernel(_Strict):
    """The kernel that libkrunfw carries, which machines on libkrun boot.

    `file` of `size` bytes is the library and `origin` says in words where it came from; the kernel is `length` bytes
    at `offset` of it, belongs at the guest's address `load` and begins to run at `entry`. `release` is uname's.
    """

    file: str = Field(pattern=r"^libkrunfw\.so\.[0-9]+$")
    origin: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 .+!_-]*$", max_length=100)
    size: int = Field(gt=0)
    sha256: str = Field(pattern=_SHA256)
    offset: int = Field(ge=0)
    length: int = Field(gt=0)
    load: int = Field(ge=0, lt=2**63)  # Nix's integers have a sign
    entry: int = Field(ge=0, lt=2**63)
    release: str = Field(pattern=r"^[0-9][A-Za-z0-9.+_-]*$")

    @model_validator(mode="after")
    def _is_inside(self) -> Self:
        if self.offset + self.length > self.size:
            raise ValueError("the kernel ends after its file does")
        if not self.load <= self.entry < self.load + self.length:
            raise ValueError("the kernel's entry is not in the kernel")
        return self


class Lock(_Strict):
    """A whole lock of the Debian base."""

    format: Literal[1]
    base: Literal["debian"]
    suite: str
    arch: Arch
    requested: tuple[str, ...]
    base_requested: tuple[str, ...]
    bootstrap: Bootstrap
    kernel: LockedPackage
    tools: tuple[LockedPackage, ...]
    base_packages: tuple[LockedPackage, ...]
    packages: tuple[LockedPackage, ...]
    sidecar_requested: tuple[str, ...] = ()
    sidecar_packages: tuple[LockedPackage, ...] = ()  # what they need beside base_packages and packages
    host: tuple[LockedPackage, ...] = ()  # what the host runs for a machine: virtiofsd
    krun: KrunKernel | None = None  # where the config asks for libkrun
    plugins: tuple[Annotated[Pin, BeforeValidator(lockfile.pin)], ...] = ()  # from GitHub; no part of the image

    def all_packages(self) -> list[LockedPackage]:
        """Every .deb of the lock, each once, sorted by file."""
        ours = (*self.base_packages, *self.packages, *self.sidecar_packages)
        every = (self.bootstrap.package, self.kernel, *self.tools, *ours, *self.host)
        return [found for _, found in sorted({p.path: p for p in every}.items())]


class NixpkgsPin(_Strict):
    """A revision of nixpkgs: `ref` is the branch or tag that it was found by, `rev` the commit, `hash` its NAR hash.

    `date` is the day of the commit (`2026-07-04`; None when GitHub did not say).
    """

    owner: str
    repo: str
    ref: str
    rev: str = Field(pattern=r"^[0-9a-f]{40}$")
    hash: str = Field(pattern=r"^sha256-[A-Za-z0-9+/]{43}=$")
    date: str | None = Field(default=None, pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")

    @model_validator(mode="after")
    def _is_a_place(self) -> Self:
        place = refs.parse(str(self.place))
        if place != self.place:
            raise ValueError(f"{self.place} is no branch, tag or commit of a repository")
        if place.rev not in (None, self.rev):
            raise ValueError("rev is another commit than ref names")
        return self

    @property
    def place(self) -> refs.Github:
        """Where it was found."""
        return refs.Github(self.owner, self.repo, ref=self.ref)

    def __str__(self) -> str:
        return self.rev[:12] + (f" ({self.date})" if self.date else "")


class NixpkgsLock(_Strict):
    """A whole lock of the nixpkgs base: the packages are named, and the revision says what they are."""

    format: Literal[1]
    base: Literal["nixpkgs"]
    arch: Arch
    requested: tuple[str, ...]
    nixpkgs: NixpkgsPin
    krun: KrunKernel | None = None
    plugins: tuple[Annotated[Pin, BeforeValidator(lockfile.pin)], ...] = ()


AnyLock: TypeAlias = "Lock | NixpkgsLock"
_MODELS: dict[str, type[Lock] | type[NixpkgsLock]] = {"debian": Lock, "nixpkgs": NixpkgsLock}


def load(path: Path) -> AnyLock:
    """Read a lock. Raises ConfigError naming every bad field, or saying that there is none."""
    try:
        return parse(path.read_text(), path)
    except FileNotFoundError:
        raise ConfigError(f"there is no lock at {path}", hint="`nixbox lock` makes it") from None


def parse(text: str, path: Path) -> AnyLock:
    """The lock that a text holds; `path` is what faults call it. Raises ConfigError naming every bad field."""
    data = lockfile.parse(text, path)
    if lockfile.only_pins(data):
        raise ConfigError(f"{path} has plugins and no packages yet", hint="`nixbox lock` adds them")
    base = data.get("base") if isinstance(data, dict) else None
    model = _MODELS.get(base, Lock) if isinstance(base, str) else Lock
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = [f"{path.name}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{path} is damaged", hint=lockfile.MEND, faults=faults) from None


def dump(lock: AnyLock) -> str:
    """The lock as text: one package or plugin a line, keys in a fixed order; what most locks lack only if there."""
    seldom = {name for name in ("krun", "sidecar_requested", "sidecar_packages") if not getattr(lock, name, None)}
    data = lock.model_dump(exclude={"plugins", *seldom})
    if lock.plugins:
        data["plugins"] = [pin.row for pin in lock.plugins]
    return lockfile.render(data)


def save(lock: AnyLock, path: Path) -> None:
    """Write the lock whole or not at all."""
    paths.write_atomic(path, dump(lock))


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs between two locks' images: names to versions, the kernel and base included."""

    added: dict[str, str]
    removed: dict[str, str]
    changed: dict[str, tuple[str, str]]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def lines(self) -> list[str]:
        """For people: `+ jq 1.7.1`, `- tree 2.1`, `~ bash 5.2 → 5.3`."""
        return [
            *(f"+ {name} {version}" for name, version in self.added.items()),
            *(f"- {name} {version}" for name, version in self.removed.items()),
            *(f"~ {name} {old} → {new}" for name, (old, new) in self.changed.items()),
        ]


def changes(old: AnyLock | None, new: AnyLock) -> Changes:
    """What a new lock changes in the image (not in the build's tools).

    The versions that a revision of nixpkgs has are not in the lock: image/nixpkgs.py asks Nix for them.
    """

    def versions(lock: AnyLock) -> dict[str, str]:
        if isinstance(lock, NixpkgsLock):
            found = {"nixpkgs": str(lock.nixpkgs)} | dict.fromkeys(lock.requested, "of nixpkgs")
        else:
            every = (*lock.base_packages, *lock.packages, *lock.sidecar_packages, lock.kernel)
            found = {p.name: p.version for p in every}
        if krun := lock.krun:
            # Of one release there may be many builds.
            found["libkrun's kernel"] = f"{krun.release} ({krun.origin}, {krun.sha256[:8]})"
        return found

    return differences(versions(old) if old else {}, versions(new))


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> Changes:
    """What differs between two sets of packages: names to versions."""
    return Changes(
        added={n: v for n, v in after.items() if n not in before},
        removed={n: v for n, v in before.items() if n not in after},
        changed={n: (before[n], v) for n, v in after.items() if n in before and before[n] != v},
    )
