"""The images that this user built: what there is, what uses it, and how to get rid of what nothing uses."""

from __future__ import annotations

import time
from pathlib import Path

from nixbox.image import build, store
from nixbox.image.build import roots_dir
from nixbox.values import dataclass


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One built image. `size_bytes` is its closure; `used_by` the machines (paths) that keep it."""

    key: str
    path: Path
    base: str
    suite: str | None
    requested: tuple[str, ...]
    packages: int
    size_bytes: int
    built_at: int
    reproducible: bool
    used_by: tuple[str, ...]

    @property
    def in_use(self) -> bool:
        """Whether a machine, running or not, is made of it."""
        return bool(self.used_by)


def _machines(path: Path) -> tuple[str, ...]:
    """Workspace and name of every machine whose garbage collector root keeps this path."""
    found = []
    for root in store.roots_of(path):
        # WORKSPACE/.nixbox/machines/NAME/image
        if root.name == "image" and root.parent.parent.name == "machines" and root.is_symlink():
            found.append(f"{root.parents[3]}:{root.parent.name}")
    return tuple(sorted(found))


def all_images() -> list[ImageInfo]:
    """Every image with a root under the cache directory, newest first."""
    found = []
    for root in sorted(roots_dir().glob("*")):
        image = build.built(root.name)
        if image is None:
            continue
        target, meta = image.path, image.meta
        found.append(
            ImageInfo(
                key=root.name,
                path=target,
                base=meta["base"],
                suite=meta["suite"],
                requested=tuple(meta["requested"]),
                packages=len(meta["packages"]),
                size_bytes=store.closure_size(target),
                built_at=int(root.lstat().st_mtime),
                reproducible=meta["reproducible"],
                used_by=_machines(target),
            )
        )
    return sorted(found, key=lambda image: -image.built_at)


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed: store paths and roughly the bytes they took."""

    paths: int
    bytes: int


def unused(images: list[ImageInfo]) -> list[ImageInfo]:
    """Those that no machine is made of."""
    return [image for image in images if not image.in_use]


def collect(images: list[ImageInfo]) -> Collected:
    """Drop the roots of these images, then delete what nothing keeps any more. Other users of the store, and
    everything that some other root reaches, are left alone.
    """
    candidates: set[Path] = set()
    for image in images:
        for suffix in ("", "-1"):  # `nix build` roots the image and, beside it, what a rebuild needs
            root = roots_dir() / f"{image.key}{suffix}"
            if root.is_symlink():
                candidates |= set(store.requisites(root.readlink()))
                root.unlink()
        for suffix in (".nix", ".lock"):
            (roots_dir() / f"{image.key}{suffix}").unlink(missing_ok=True)
    dead = store.dead(candidates)
    size = store.sizes(dead)
    return Collected(store.delete(dead), size)


def age(seconds_since_epoch: int) -> str:
    """`3 d`, `2 h`, `5 min`."""
    seconds = max(0, int(time.time()) - seconds_since_epoch)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return "now"
