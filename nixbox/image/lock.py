"""`nixbox.lock`: every input of an image, by version and SHA-256, resolved once.

The file is JSON, one package a line so that a diff reads well. It names pool paths, not mirrors: any mirror
with the same bits serves.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nixbox import paths
from nixbox.errors import ConfigError
from nixbox.image import apt, fetch

FORMAT: Literal[1] = 1
Arch = Literal["amd64", "arm64"]
# What every Debian image holds beside the essential and required packages.
BASE_REQUEST = (
    "?essential",
    "?priority(required)",
    "apt",
    "ca-certificates",
    "curl",
    "iproute2",
    "less",
    "netbase",
    "openssh-server",
    "procps",
    "sudo",
)
# What the image build itself runs (nix/bases/debian/tools.nix).
TOOLS_REQUEST = (
    "?essential",
    "apt",
    "apt-utils",
    "cpio",
    "fakeroot",
    "kmod",
    "mawk",
    "mmdebstrap",
    "mount",
    "squashfs-tools",
    "xz-utils",
    "zstd",
)
_ARCHES: dict[str, Arch] = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_SHA256 = r"^[0-9a-f]{64}$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LockedPackage(_Strict):
    """One .deb: `path` is relative to the repository `repo`, `size` in bytes, `sha256` in hex."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9+.-]+$")
    version: str = Field(pattern=r"^[A-Za-z0-9.+~:-]+$")
    arch: str = Field(pattern=r"^[a-z0-9-]+$")
    repo: apt.Repo
    # No part begins with a dot: the path stays inside the repository.
    path: str = Field(pattern=r"^pool(/[A-Za-z0-9+~:%_-][A-Za-z0-9.+~:%_-]*)+\.deb$")
    size: int = Field(gt=0)
    sha256: str = Field(pattern=_SHA256)


class Bootstrap(_Strict):
    """The static busybox that builds everything: its .deb, and the hash of the unpacked store path."""

    package: LockedPackage
    nar_hash: str = Field(pattern=r"^sha256-[A-Za-z0-9+/]{43}=$")


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

    def all_packages(self) -> list[LockedPackage]:
        """Every .deb of the lock, each once, sorted by file."""
        every = (self.bootstrap.package, self.kernel, *self.tools, *self.base_packages, *self.packages)
        return [found for _, found in sorted({p.path: p for p in every}.items())]

    def matches(self, suite: str, requested: Sequence[str]) -> bool:
        """Whether this lock is the resolution of such a request (order does not matter)."""
        return (self.suite, sorted(self.requested)) == (suite, sorted(requested)) and (
            self.base_requested == BASE_REQUEST
        )


def load(path: Path) -> Lock:
    """Read a lock. Raises ConfigError naming every bad field, or saying that there is none."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"there is no lock at {path}", hint="`nixbox lock` makes it") from None
    mend = "restore the file from version control, or delete it and run `nixbox lock`"
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", hint=mend) from None
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise ConfigError(
            f"{path} has format {data.get('format')!r}; this nixbox reads format {FORMAT}",
            hint="use the nixbox that wrote it, or delete it and run `nixbox lock`",
        )
    try:
        return Lock.model_validate(data)
    except ValidationError as error:
        faults = [f"{path.name}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{path} is damaged", hint=mend, faults=faults) from None


def dump(lock: Lock) -> str:
    """The lock as text: one package a line, keys in a fixed order."""
    data = lock.model_dump()
    parts = []
    for key, value in data.items():
        if key in ("tools", "base_packages", "packages"):
            rows = ",\n".join("    " + json.dumps(row) for row in value)
            parts.append(f'  "{key}": [\n{rows}\n  ]' if rows else f'  "{key}": []')
        else:
            parts.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def save(lock: Lock, path: Path) -> None:
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


def changes(old: Lock | None, new: Lock) -> Changes:
    """What a new lock changes in the image (not in the build's tools)."""

    def versions(lock: Lock) -> dict[str, str]:
        return {p.name: p.version for p in (*lock.base_packages, *lock.packages, lock.kernel)}

    before, after = versions(old) if old else {}, versions(new)
    return Changes(
        added={n: v for n, v in after.items() if n not in before},
        removed={n: v for n, v in before.items() if n not in after},
        changed={n: (before[n], v) for n, v in after.items() if n in before and before[n] != v},
    )


def default_arch() -> Arch:
    """Debian's name for this host's architecture. Raises ConfigError for one that has no image."""
    machine = platform.machine()
    if machine not in _ARCHES:
        raise ConfigError(f"nixbox has no image for {machine} hosts", hint="x86_64 and aarch64 are supported")
    return _ARCHES[machine]


def resolve(
    requested: Sequence[str],
    *,
    suite: str,
    mirrors: apt.Mirrors,
    progress: Callable[[str], None] = lambda _: None,
) -> Lock:
    """Resolve a package set with apt's own resolver against the mirror's signed metadata.

    Raises UnknownPackagesError, ConfigError or NixboxError; nothing is written but the cache.
    """
    arch = default_arch()
    with apt.open_root(suite, arch, mirrors) as root:
        progress(f"reading Debian {suite}'s package lists")
        root.update()
        root.check_known(requested)
        progress("resolving packages")
        tools = root.resolve(TOOLS_REQUEST)
        base = root.resolve(BASE_REQUEST)
        extra: list[LockedPackage] = []
        if requested:
            status = root.directory / "base.status"
            root.write_status(base, status)
            extra = root.resolve(requested, installed=status)
        kernel = root.exact([root.first_dependency(f"linux-image-cloud-{arch}")])[0]
        busybox = root.exact(["busybox-static"])[0]
    progress("fetching the bootstrap busybox")
    return Lock(
        format=FORMAT,
        base="debian",
        suite=suite,
        arch=arch,
        requested=tuple(requested),
        base_requested=BASE_REQUEST,
        bootstrap=Bootstrap(package=busybox, nar_hash=fetch.busybox_nar_hash(busybox, mirrors)),
        kernel=kernel,
        tools=tuple(tools),
        base_packages=tuple(base),
        packages=tuple(extra),
    )
