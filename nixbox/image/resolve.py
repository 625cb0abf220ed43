"""Resolve a package set once: apt's resolver, the image's base set, and the build's own tools, into a lock."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

from nixbox.errors import ConfigError
from nixbox.image import apt, fetch
from nixbox.image.lock import FORMAT, Arch, Bootstrap, Lock, LockedPackage

# What every Debian image holds beside the essential and required packages.
BASE_REQUEST = (
    "?essential",
    "?priority(required)",
    "apt",
    "ca-certificates",
    "curl",
    "dropbear-bin",  # for sessions that start at once (nix/guest/stage2)
    "e2fsprogs",  # its resize2fs grows the overlay disk (nix/guest/stage1)
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
    "erofs-utils",
    "fakeroot",
    "kmod",
    "mawk",
    "mmdebstrap",
    "mount",
    "squashfs-tools",
    "xz-utils",
    "zstd",
)
# What the host runs for a machine (mounts/daemon.py), where the suite has it.
HOST_REQUEST = ("virtiofsd",)
# Names of an architecture: uname's, and Debian's.
ARCHES: dict[str, Arch] = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


def default_arch() -> Arch:
    """Debian's name for this host's architecture. Raises ConfigError for one that has no image."""
    machine = platform.machine()
    if machine not in ARCHES:
        raise ConfigError(f"nixbox has no image for {machine} hosts", hint="x86_64 and aarch64 are supported")
    return ARCHES[machine]


def resolve(
    requested: Sequence[str],
    sidecar: Sequence[str] = (),
    *,
    suite: str,
    mirrors: apt.Mirrors,
    progress: Callable[[str], None] = lambda _: None,
) -> Lock:
    """Resolve a package set with apt's own resolver against the mirror's signed metadata; the sidecar's on top of it.

    Raises UnknownPackagesError, ConfigError or NixboxError; nothing is written but the cache.
    """
    arch = default_arch()
    with apt.open_root(suite, arch, mirrors) as root:
        progress(f"reading Debian {suite}'s package lists")
        root.update()
        root.check_known([*requested, *sidecar])
        progress("resolving packages")
        tools = root.resolve(TOOLS_REQUEST)
        base = root.resolve(BASE_REQUEST)
        host = root.resolve(HOST_REQUEST) if root.has(HOST_REQUEST) else []

        def on_top(names: Sequence[str], below: Sequence[LockedPackage]) -> list[LockedPackage]:
            status = root.directory / "below.status"
            root.write_status(below, status)
            return root.resolve(names, installed=status) if names else []

        extra = on_top(requested, base)
        beside = on_top(sidecar, [*base, *extra])
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
        sidecar_requested=tuple(sidecar),
        sidecar_packages=tuple(beside),
        host=tuple(host),
    )
