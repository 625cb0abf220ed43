"""Where things lie: the workspace, the caches, the runtime directory, and nixbox's own data files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from nixbox import locks
from nixbox.digests import sha256
from nixbox.errors import ConfigError, HostError, NixboxError
from nixbox.values import dataclass, field

CONFIG_DIR = ".nixbox"
CONFIG_FILE = "config.toml"
NIX_CONFIG_FILE = "config.nix"  # read by Nix, where there is no config.toml
LOCK_FILE = "nixbox.lock"
SETTINGS_FILE = "settings.toml"


def find_workspace(start: Path, *, trusting: bool = False) -> Path:
    """The nearest directory at or above `start` that holds `.nixbox/config.toml` (or `config.nix`).

    Raises ConfigError when there is none, or, unless `trusting`, when somebody else may have put it there.
    """
    start = start.resolve()
    for directory in (start, *start.parents):
        places = [directory / CONFIG_DIR / name for name in (CONFIG_FILE, NIX_CONFIG_FILE)]
        for config in filter(Path.is_file, places):
            if not trusting:
                _check_owner(config)
                _check_planted(directory)
            return directory
    raise ConfigError(
        f"no {CONFIG_DIR}/{CONFIG_FILE} in {start} or any directory above it",
        hint="`nixbox init` makes this directory a workspace",
    )


def _check_owner(config: Path) -> None:
    """Refuse a config that somebody else planted above us: it could take host variables into its guest.

    Raises ConfigError; NIXBOX_TRUST_CONFIG names a config (its path) that is to be trusted all the same.
    """
    owner = config.stat().st_uid
    trusted = {0, os.getuid(), int(os.environ.get("SUDO_UID") or 0)}
    if owner not in trusted and os.environ.get("NIXBOX_TRUST_CONFIG") != str(config):
        raise ConfigError(
            f"{config} belongs to another user (uid {owner}), who could read your variables through it",
            hint=f"if you trust it: export NIXBOX_TRUST_CONFIG={config}",
        )


# --- which workspaces are this user's own: a guest that can write a directory can put another one into it ---


@dataclass(frozen=True, slots=True)
class Known:
    """What this user's machines were given: real paths.

    `workspaces` maps those that nixbox has seen to device and inode of their `.nixbox`; `writable` maps directories
    that guests could write to the locks of the processes that serve them (one that is held: now). What lies in one of
    the latter and was not seen before, or is another directory by now, may have come from a guest. `plugins` maps
    directories of plugins to the digests of what was in them when they were the user's alone.
    """

    workspaces: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    writable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    plugins: Mapping[str, str] = field(default_factory=dict)

    def has(self, workspace: Path) -> bool:
        """Whether this very workspace was seen before."""
        found = _identity(workspace)
        return found is not None and self.workspaces.get(str(workspace)) == found

    def shared(self, directory: Path) -> list[str]:
        """The directories by which guests could write into it."""
        return [source for source in self.writable if directory.is_relative_to(source)]

    def served(self, directory: Path) -> bool:
        """Whether a guest can write into it now, and sees what is there now."""
        return any(locks.held(Path(lock)) for source in self.shared(directory) for lock in self.writable[source])


def known() -> Known:
    """What was remembered; nothing when there is none or it is damaged."""
    try:
        data = json.loads(_known_file().read_text())
        workspaces = {str(path): (int(device), int(inode)) for path, (device, inode) in data["workspaces"].items()}
        writable = {str(path): tuple(locks) for path, locks in data["writable"].items()}
        return Known(workspaces, writable, {str(path): str(was) for path, was in data.get("plugins", {}).items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Known()


def remember(workspace: Path, writable: Mapping[Path, Path] | None = None) -> None:
    """Note that nixbox has seen a workspace (a real path), and what guests can write from now on, with the lock of
    the process that serves it. Raises NixboxError on a full disk.
    """
    ident = _identity(workspace)
    if ident is None or (known().has(workspace) and not writable):
        return
    with _changing_known() as now:
        # One that is somewhere else by now could have been changed there: it is known no more.
        workspaces = {path: was for path, was in now.workspaces.items() if _identity(Path(path)) in (was, None)}
        shared = {path: [lock for lock in of if locks.held(Path(lock))] for path, of in now.writable.items()}
        for source, lock in (writable or {}).items():
            shared.setdefault(str(source), []).append(str(lock))
            gone = [path for path in workspaces if Path(path).is_relative_to(source) and not _identity(Path(path))]
            for path in gone:
                del workspaces[path]
        _write_known(workspaces | {str(workspace): ident}, shared, now.plugins)


def remember_plugin(directory: Path, digest: str) -> None:
    """Note what is in a plugin's directory (a real path) while it is the user's alone. Raises NixboxError."""
    with _changing_known() as now:
        _write_known(now.workspaces, now.writable, {**now.plugins, str(directory): digest})


@contextmanager
def _changing_known() -> Iterator[Known]:
    """What is known, with nobody else changing it meanwhile."""
    fd = os.open(private_dir(state_dir()), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield known()
    finally:
        os.close(fd)


def _write_known(
    workspaces: Mapping[str, tuple[int, int]], writable: Mapping[str, Sequence[str]], plugins: Mapping[str, str]
) -> None:
    data = {"workspaces": workspaces, "writable": writable, "plugins": plugins}
    write_atomic(_known_file(), json.dumps(data, indent=1) + "\n", mode=0o600)


def _identity(workspace: Path) -> tuple[int, int] | None:
    """Device and inode of a workspace's `.nixbox`; None when there is none."""
    try:
        info = (workspace / CONFIG_DIR).lstat()
    except OSError:
        return None
    return (info.st_dev, info.st_ino) if stat.S_ISDIR(info.st_mode) else None


def _known_file() -> Path:
    return state_dir() / "known.json"


def _check_planted(workspace: Path) -> None:
    """Refuse a workspace that a guest may have made: its config could give that guest the host.

    Raises ConfigError.
    """
    now = known()
    if now.shared(workspace) and not now.has(workspace):
        raise ConfigError(
            f"{workspace / CONFIG_DIR} is new, and lies in {now.shared(workspace)[0]}, which guests can write: "
            "one of them may have put it there",
            hint="look at its files; if it is yours: nixbox trust",
        )


def trust(workspace: Path) -> None:
    """Take a workspace for the user's own. Raises ConfigError while a guest can change it."""
    now = known()
    if now.served(workspace) and not now.has(workspace):
        raise ConfigError(
            f"a guest that runs can write {workspace / CONFIG_DIR}",
            hint="`nixbox down` its machine first (the next start hides what is trusted by then), and look again",
        )
    remember(workspace)


def _xdg(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    # The XDG base directory specification: a relative path is to be ignored.
    return Path(value) if value.startswith("/") else Path.home() / fallback


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/nixbox`: everything here can be made again."""
    return _xdg("XDG_CACHE_HOME", ".cache") / "nixbox"


def user_config_dir() -> Path:
    """`$XDG_CONFIG_HOME/nixbox`: the user's settings, profiles and plugins."""
    return _xdg("XDG_CONFIG_HOME", ".config") / "nixbox"


def state_dir() -> Path:
    """`$XDG_STATE_HOME/nixbox`: what must not be lost, and is not for the user to write."""
    return _xdg("XDG_STATE_HOME", ".local/state") / "nixbox"


def runtime_dir(workspace: Path, name: str) -> Path:
    """The directory for a machine's sockets: short, since a unix socket path holds 107 bytes (unix(7)).

    Without $XDG_RUNTIME_DIR a per-user directory under the temporary directory serves; it is created 0700 and
    refused when somebody else owns it. Raises HostError in that case.
    """
    ident = sha256(f"{workspace}\0{name}".encode()).hexdigest()[:12]
    base, ours = _runtime_base()
    if ours:
        private_dir(base)
    return base / "nixbox" / ident


def _runtime_base() -> tuple[Path, bool]:
    """What `nixbox/` with the directories for sockets lies in, and whether it is ours to make and to check."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    # 66 leaves room for "/nixbox/<12>/ssh" and the 17 bytes that ssh adds to its control socket's name at first.
    if base.startswith("/") and len(os.fsencode(base)) <= 66 and os.access(base, os.W_OK):
        return Path(base), False
    import tempfile

    temporary = tempfile.gettempdir()
    if len(os.fsencode(temporary)) > 50:
        # A directory of our own is made in it, and checked.
        temporary = "/tmp"  # noqa: S108
    return Path(temporary) / f"nixbox-{os.getuid()}", True


def own_directories() -> list[Path]:
    """Where nixbox has what no guest may read or write: configs, keys, records, templates, sockets.

    Of every workspace that it has seen. Not every one is there, and none is made.
    """
    configs = [Path(workspace) / CONFIG_DIR for workspace in known().workspaces]
    return [*configs, user_config_dir(), cache_dir(), state_dir(), _runtime_base()[0] / "nixbox"]


def private_dir(path: Path) -> Path:
    """Make `path` (mode 0700) unless it is there; refuse one that is a link or somebody else's."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        hint = f"sudo chown -R {os.getuid()} {path}" if stat.S_ISDIR(info.st_mode) else f"look what {path} is"
        raise HostError(f"{path} is not a directory of yours", hint=hint)
    if info.st_mode & 0o077:
        path.chmod(0o700)
    return path


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it, as far as that goes; one that is not there needs no `shutil`."""
    if os.path.lexists(path):
        import shutil

        shutil.rmtree(path, ignore_errors=True)


def _data_dir(packaged: str, checkout: str) -> Path:
    here = Path(__file__).resolve().parent
    inside = here / packaged
    return inside if inside.is_dir() else here.parent / checkout


def nix_dir() -> Path:
    """The Nix files: inside an installed wheel, or beside the package in a checkout."""
    return _data_dir("_nix", "nix")


def plugins_dir() -> Path:
    """The in-tree plugins: inside an installed wheel, or beside the package in a checkout."""
    return _data_dir("_plugins", "plugins")


def docs_dir() -> Path:
    """The documentation's sources (`mkdocs.yml`, `docs/`, `README.md`): in an installed wheel, or the checkout."""
    return _data_dir("_docs", ".")


def require_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Raise NixboxError when the disk of `directory` has less than `needed_bytes` free for `what`.

    Asked beforehand where a program that fills the disk would hang or leave a mess.
    """
    disk = os.statvfs(directory)
    free = disk.f_bavail * disk.f_frsize
    if free < needed_bytes:
        raise NixboxError(
            f"no space left for {what}: {directory} has {free >> 20} MiB free, {needed_bytes >> 20} MiB are needed",
            hint="free some space and try again; `nixbox image gc` removes unused images",
        )


FULL = (errno.ENOSPC, errno.EDQUOT)  # how a full disk, or a used up quota, is told


def no_space(path: Path) -> NixboxError:
    """What to raise for a file that a full disk kept from being written."""
    return NixboxError(f"no space left to write {path}", hint="free some space and try again")


def _sync_directory(directory: Path) -> None:
    """A rename is on the disk when its directory is."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, text: str, mode: int = 0o644, *, synced: bool = True) -> None:
    """Write a file whole or not at all: a temporary file beside it, fsync, rename.

    Not `synced`: one that is written anew before it is read after a power failure. Raises NixboxError when the disk
    is full; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    # By ourselves: tempfile takes longer for a name and its checks than the file does.
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(fd, mode)
            if synced:
                os.fsync(fd)
        temporary.replace(path)
        if synced:
            _sync_directory(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise no_space(path) from None
        raise
