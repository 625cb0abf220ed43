"""What of the host may be in a guest: sources looked at, nixbox's own files found, all faults at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from nixbox import paths
from nixbox.config.settings import Mount
from nixbox.errors import ConfigError
from nixbox.jails import Inode, Share
from nixbox.values import dataclass

# Of these the host keeps no file that a tool would not make again, and a tool opens thousands of them.
CACHES = frozenset(
    (
        *(".cache", ".cargo", ".gradle", ".ivy2", ".m2", ".npm", ".pnpm-store", ".rustup", ".yarn"),
        *("__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".terraform", ".tox", ".venv"),
        *("node_modules", "target"),
    )
)
_NOWHERE = ("/", "/dev", "/proc", "/run", "/sys")  # the guest's own


@dataclass(frozen=True, slots=True)
class Place:
    """A directory to share: its real path, what it is, and what in it is nixbox's own (relative paths)."""

    mount: Mount
    source: Path
    inode: Inode
    masks: tuple[tuple[Path, Inode], ...]

    @property
    def moved(self) -> bool:
        """Whether the source is behind symbolic links."""
        return self.mount.source != str(self.source)

    @property
    def share(self) -> Share:
        """What of it a guest gets."""
        return Share(self.source, self.inode, self.mount.readonly, self.masks)


def guest_path(target: str, user: str) -> str:
    """A target as the guest has it: absolute, without a slash at the end."""
    return target.replace("~", f"/home/{user}", 1).rstrip("/") if target.startswith("~") else target.rstrip("/")


def resolve(
    mounts: Sequence[Mount], workspace: Path, private: Iterable[Path], fields: Sequence[str] = ()
) -> list[Place]:
    """Look at the sources, which are relative to `workspace` or begin with `~`; outer targets come first.

    `private` are directories of nixbox's own, `fields` what faults call each mount. Raises ConfigError with every
    fault: a source that is not there, or that nobody should be given.
    """
    faults: list[str] = []
    found = []
    own = [path.resolve() for path in private if path.exists()]
    for i, mount in enumerate(mounts):
        field = fields[i] if fields else f"mounts[{i}]"
        try:
            written = workspace / Path(mount.source).expanduser()
            fault = _fault(mount, written, own)
            if fault is None:
                source = written.resolve()
                absolute = Mount(str(written), mount.target, mount.readonly)
                found.append(Place(absolute, source, Inode.of(source), _masks(source, own)))
        except RuntimeError:  # of expanduser
            fault = f"source: `{mount.source}`: there is no such user"
        except OSError as error:
            fault = f"source: `{mount.source}` cannot be read: {error.strerror}"
        faults += [f"{field}.{fault}"] if fault else []
    targets = [place.mount.target.rstrip("/") for place in found]
    faults += [
        f"mounts: `{t}` is the target of more than one" for t in dict.fromkeys(targets) if targets.count(t) > 1
    ]
    if faults:
        raise ConfigError("not every directory can be mounted", faults=faults)
    return sorted(found, key=lambda place: len(PurePosixPath(place.mount.target).parts))


def _fault(mount: Mount, written: Path, own: Sequence[Path]) -> str | None:
    target = mount.target.rstrip("/") or "/"
    if any(target == place or (place != "/" and target.startswith(f"{place}/")) for place in _NOWHERE):
        return f"target: `{mount.target}` is the guest's own; take another place"
    if not written.exists():
        mend = "it is a symbolic link to nothing" if written.is_symlink() else "make it, or take the mount out"
        return f"source: `{mount.source}` is not there: {mend}"
    source = written.resolve()
    if not source.is_dir():
        return f"source: `{mount.source}` is no directory; mount the one that it is in"
    if not os.access(source, os.R_OK | os.X_OK):
        return f"source: `{mount.source}` is not yours to read"
    if source == Path("/") or any(source.is_relative_to(place) for place in ("/proc", "/sys", "/dev")):
        return f"source: {source} would give the guest the host itself; mount a directory of yours"
    for place in own:
        if source.is_relative_to(place):
            return f"source: {source} is nixbox's own, and no guest may see it"
    return None


def _masks(source: Path, own: Sequence[Path]) -> tuple[tuple[Path, Inode], ...]:
    """What is nixbox's own below a source; what is inside another one of them is hidden with that."""
    inner = [place for place in own if place.is_relative_to(source)]
    outermost = [place for place in inner if not any(place != o and place.is_relative_to(o) for o in inner)]
    return tuple((place.relative_to(source), Inode.of(place)) for place in dict.fromkeys(outermost))


def own_directories(workspace: Path) -> list[Path]:
    """`paths.own_directories`, and the workspace's.

    Raises ConfigError when the workspace's is a symbolic link, which a guest with the workspace could replace.
    """
    config = workspace / paths.CONFIG_DIR
    if config.is_symlink():
        raise ConfigError(
            f"{config} is a symbolic link, so it cannot be kept from the guest",
            hint="make it a directory, or set mounts = [] in config.toml",
        )
    # There before anybody could see them made.
    paths.private_dir(paths.state_dir())
    paths.runtime_dir(workspace, "")
    return [config, *paths.own_directories()]


def looks_like_cache(source: Path) -> bool:
    """Whether a source is, by its name, one of the caches that are better kept in the guest."""
    return source.name in CACHES
