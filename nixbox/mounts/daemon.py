"""virtiofsd, one for each mount: which program, how it is called, and its start in a jail."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from nixbox import jails, run
from nixbox.errors import HostError
from nixbox.mounts import health, jail
from nixbox.mounts.places import Place
from nixbox.values import dataclass

_OPTION = "--translate-uid"  # the Rust virtiofsd has it since 1.13
_IN_TREE = "usr/libexec/virtiofsd"  # Debian's package
_IN_STORE = "bin/virtiofsd"  # nixpkgs'
# Where distributions put it; it is no command.
_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/virtiofsd/virtiofsd", "/usr/lib/qemu/virtiofsd")
_LIBRARIES = ("/usr", "/lib", "/lib64", "/bin", "/nix/store", "/gnu/store")


@dataclass(frozen=True, slots=True)
class Program:
    """virtiofsd as its jail has it (`path`), and what of the host the jail needs for that (see jail.Jail)."""

    path: str
    tree: tuple[tuple[str, Path | str], ...]


def program(tools: Path | None) -> Program:
    """The virtiofsd to use: `NIXBOX_VIRTIOFSD`, else that of an image's own tools for the host, else the host's.

    `tools` is a tree of Debian packages, or where nixpkgs' package really lies in a Nix store, with all that it needs
    beside it. Raises HostError when there is none that can do what it has to.
    """
    chosen = os.environ.get("NIXBOX_VIRTIOFSD")
    if chosen is None and tools is not None and (tools / _IN_TREE).is_file():
        links = tuple((f"/{name}", f"usr/{name}") for name in ("bin", "lib", "lib64"))
        return Program(f"/{_IN_TREE}", (("/usr", tools / "usr"), *links))
    if chosen is None and tools is not None and (tools / _IN_STORE).is_file():
        return Program(f"/nix/store/{tools.name}/{_IN_STORE}", (("/nix/store", tools.parent),))
    candidates = [chosen] if chosen is not None else [run.find_tool("virtiofsd"), *_PLACES]
    old = None
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            if _OPTION in run.run([candidate, "--help"], timeout_s=10, check=False).stdout:
                return _of_host(Path(candidate).resolve())
            old = candidate
    raise HostError(
        f"{old} is too old to share directories"
        if old
        else "there is no virtiofsd on this host to share directories",
        hint="it comes with images of nixpkgs, and of Debian trixie and newer (`nixbox lock`); or install virtiofsd "
        "1.13 or newer, or set NIXBOX_VIRTIOFSD; mounts = [] in config.toml does without",
    )


def _of_host(path: Path) -> Program:
    tree: list[tuple[str, Path | str]] = []
    for name in _LIBRARIES:
        place = Path(name)
        if place.is_symlink():
            tree.append((name, str(place.readlink()).removeprefix("/")))
        elif place.is_dir():
            tree.append((name, place))
    if not any(path.is_relative_to(name) for name in _LIBRARIES):
        tree.append((str(path.parent), path.parent))
    return Program(str(path), tuple(tree))


def argv(path: str, listener: int, *, readonly: bool) -> list[str]:
    """The command line; `listener` is a descriptor. Every user of the guest is this user on the host."""
    words = [path, "--fd", str(listener), "--shared-dir", jail.SHARE]
    # The jail is better than its own sandboxes, which need root or helpers; the limit is raised there.
    words += ["--sandbox", "none", "--rlimit-nofile", "0", "--log-level", "warn"]
    for option in ("uid", "gid"):
        words += [f"--translate-{option}", f"squash-guest:0:{jails.USER}:4294967295"]
    return [*words, "--readonly"] if readonly else words


@dataclass(frozen=True, slots=True)
class Daemon:
    """A virtiofsd that runs, and our end of its connection, which is the hypervisor's to have."""

    pid: int
    connection: socket.socket


def start(chosen: Program, place: Place, runtime: Path, tag: str, log: Path) -> Daemon:
    """Start one. It holds the lock `runtime`/TAG as long as it lives, and ends when the connection does.

    Whether it could enter its jail shows when it is spoken to; its words are in `log`. Raises HostError.
    """
    room = runtime / "jail"
    room.mkdir(mode=0o700, exist_ok=True)
    cell = jail.Jail(room, chosen.tree, place.share)
    lock = health.hold(runtime, tag)
    ours = socket.socket(socket.AF_UNIX)
    path = runtime / "fs"
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            listener.listen(1)
            ours.connect(str(path))
            path.unlink()  # one connection is all that it ever gets
            words = argv(chosen.path, listener.fileno(), readonly=place.mount.readonly)
            process = run.spawn(words, log=log, pass_fds=(listener.fileno(), lock), inside=cell.enter)
        return Daemon(process.pid, ours)
    except BaseException:
        ours.close()
        raise
    finally:
        os.close(lock)
