"""What the jails of nixbox's processes are built of: bind mounts of what was looked at, masks, and what is forbidden.

For a child in a mount namespace of its own that it has every right over (linux.own_user_namespace). Everything
raises OSError.
"""

from __future__ import annotations

import os
import resource
import stat

from nixbox import light, linux
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

USER = 1000  # whoever started it is this user there: the one of the guest (nix/guest/stage2), and never root
MOST_DESCRIPTORS = 1 << 20  # one for every file that a guest remembers, which its own memory bounds sooner

# Numbers of the system calls that take a mode, and which argument it is; the one whose mode cannot be seen.
_MODES = {
    # chmod, fchmod, fchmodat, fchmodat2, open, creat, openat, mkdir, mkdirat, mknod, mknodat
    "x86_64": (
        ((90, 1), (91, 1), (268, 2), (452, 2), (2, 2), (85, 1), (257, 3), (83, 1), (258, 2), (133, 1), (259, 2)),
        437,
    ),
    # fchmod, fchmodat, fchmodat2, openat, mkdirat, mknodat
    "aarch64": (((52, 1), (53, 2), (452, 2), (56, 3), (34, 2), (33, 2)), 437),
}


@dataclass(frozen=True)
class Inode:
    """A directory that is what it was when it was looked at, whatever its path means by now."""

    device: int
    number: int

    @classmethod
    def of(cls, path: Path | int) -> Inode:
        """The inode of a path or a descriptor. Raises OSError."""
        info = os.fstat(path) if isinstance(path, int) else path.stat()
        return cls(info.st_dev, info.st_ino)


@dataclass(frozen=True)
class Share:
    """A directory of the host for a guest: where it is, what it is, and what in it is hidden.

    `masks` are paths below `source`, with what must be there, which are empty and closed for the guest.
    """

    source: Path | str
    inode: Inode
    readonly: bool
    masks: tuple[tuple[Path | str, Inode], ...]

    def open(self) -> int:
        """A descriptor of the directory, which is still what it was when it was looked at."""
        return open_same(self.source, self.inode)


def open_same(path: Path | str, inode: Inode, at: int | None = None) -> int:
    """A descriptor (O_PATH) of a directory that must be `inode` and no symbolic link."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
    if Inode.of(fd) != inode:
        raise OSError(0, f"{path} is not what it was a moment ago")
    return fd


def bind_closed(fd: int, target: str) -> None:
    """Bind what a descriptor stands for, with all below it, at `target`: to be read there only."""
    linux.mount(f"/proc/self/fd/{fd}", target, None, linux.MS_BIND | linux.MS_REC)
    linux.restrict_mounts(target, linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV)


def bind_share(share: Share, fd: int, target: str) -> None:
    """Bind a share, opened as `fd`, at the directory `target`, as the guest may have it."""
    linux.mount(f"/proc/self/fd/{fd}", target, None, linux.MS_BIND | linux.MS_REC)
    # What the host mounts there later is not given: it would come without these restrictions.
    linux.mount("none", target, None, linux.MS_REC | linux.MS_PRIVATE)
    closed = linux.MOUNT_ATTR_RDONLY if share.readonly else 0
    linux.restrict_mounts(target, linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV | closed)


def mask(target: str, path: Path | str, inode: Inode) -> None:
    """Hide the directory at `path` (relative) below `target`, which must be `inode`."""
    fd = os.open(target, os.O_PATH | os.O_DIRECTORY)
    *parents, name = str(path).split("/")
    for part in parents:
        fd = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    fd = open_same(name, inode, fd)
    closed = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    # Not merely empty: for whoever may not look inside, what is missing has not been deleted (git, for one).
    linux.mount("tmpfs", f"/proc/self/fd/{fd}", "tmpfs", closed, "mode=0000,size=4k,nr_inodes=2")


def bind_own_process(root: str) -> None:
    """Give a jail /proc/self and nothing else of /proc: who serves files opens them again through its descriptors."""
    os.makedirs(f"{root}/proc/self")
    linux.mount(f"/proc/{os.getpid()}", f"{root}/proc/self", None, linux.MS_BIND)


def close(root: str) -> None:
    """Make the built jail the root, for good, with nothing to be changed in it."""
    linux.mount("none", root, None, linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV)
    linux.pivot_root(root)


def raise_limit() -> None:
    """As many descriptors as this process may have: one for every file that a guest remembers."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    with light.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def no_setuid(machine: str) -> bytes:
    """A filter (classic BPF, linux/filter.h, linux/seccomp.h) that refuses the bits set-user-ID and set-group-ID.

    They would let everybody on the host run a guest's program as this user. `machine` is as in uname(2).
    """
    load, equal, end = linux.BPF_LOAD, linux.BPF_EQUAL, linux.BPF_END
    allow, kill, error = linux.SECCOMP_ALLOW, linux.SECCOMP_KILL, linux.SECCOMP_ERROR
    modes, openat2 = _MODES[machine]
    steps = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 1, 0, linux.AUDIT_ARCH[machine]),
        (end, 0, 0, kill),
        (load, 0, 0, 0),  # seccomp_data.nr
        (linux.BPF_AT_LEAST, 0, 1, 0x40000000),  # the same calls under other numbers (x32)
        (end, 0, 0, kill),
    ]
    for number, argument in modes:
        steps += [
            (equal, 0, 4, number),
            (load, 0, 0, 16 + 8 * argument),  # the lower half of seccomp_data.args[…], little-endian
            (linux.BPF_ANY_BIT, 0, 1, stat.S_ISUID | stat.S_ISGID),
            (end, 0, 0, error | 1),  # EPERM
            (end, 0, 0, allow),
        ]
    steps += [(equal, 0, 1, openat2), (end, 0, 0, error | 38), (end, 0, 0, allow)]  # ENOSYS
    return linux.bpf(*steps)
