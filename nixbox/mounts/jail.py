"""The jail of the process that serves a mount: the shared directory is in it, its own program, and nothing else.

It is entered by a child before that becomes virtiofsd, without any privilege (user_namespaces(7),
mount_namespaces(7)). A guest that broke out of virtiofsd would find no other file, no network, no capability, and no
way to make a set-user-ID program; and where the share is read-only, the kernel says so and not virtiofsd.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from nixbox import linux

SHARE = "/share"
USER = 1000  # whoever started it is this user there: the one of the guest (nix/guest/stage2), and never root
_MOST_DESCRIPTORS = 1 << 20  # one for every file that a guest remembers, which its own memory bounds sooner
_EXIT_CODE = 126

# Numbers of the system calls that take a mode, and which argument it is; the one whose mode cannot be seen.
_MODES = {
    # chmod, fchmod, fchmodat, fchmodat2, open, creat, openat, mkdir, mkdirat, mknod, mknodat
    "x86_64": (
        ((90, 1), (91, 1), (268, 2), (452, 2), (2, 2), (85, 1), (257, 3), (83, 1), (258, 2), (133, 1), (259, 2)),
        437,
        0xC000003E,
    ),
    # fchmod, fchmodat, fchmodat2, openat, mkdirat, mknodat
    "aarch64": (((52, 1), (53, 2), (452, 2), (56, 3), (34, 2), (33, 2)), 437, 0xC00000B7),
}


@dataclass(frozen=True, slots=True)
class Inode:
    """A directory that is what it was when it was looked at, whatever its path means by now."""

    device: int
    number: int

    @classmethod
    def of(cls, path: Path | int) -> Inode:
        """The inode of a path or a descriptor. Raises OSError."""
        info = os.fstat(path) if isinstance(path, int) else path.stat()
        return cls(info.st_dev, info.st_ino)


@dataclass(frozen=True, slots=True)
class Jail:
    """What is in it.

    `place` is a directory that nobody else uses, to build it on. `programs` maps paths in the jail to directories of
    the host with the program and its libraries (a string: a symbolic link to that). `masks` are paths below `source`,
    with what must be there, which are empty and closed in the jail.
    """

    place: Path
    programs: tuple[tuple[str, Path | str], ...]
    source: Path
    inode: Inode
    readonly: bool
    masks: tuple[tuple[Path, Inode], ...]

    def enter(self) -> None:
        """Go in, for good: for a child, before it executes. On failure it ends, with words on its stderr."""
        step = "cannot make namespaces"
        try:
            linux.own_user_namespace(linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC, USER)
            linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
            step = f"cannot share {self.source}"
            source = self._open(self.source, self.inode)
            programs = [(name, os.open(was, os.O_PATH)) for name, was in self.programs if isinstance(was, Path)]
            step = "cannot build its jail"
            root = self._build(source, programs)
            step = "cannot hide what is nixbox's own"
            for path, inode in self.masks:
                self._mask(root, path, inode)
            step = "cannot close its jail"
            linux.mount("none", root, None, linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV)
            linux.pivot_root(root)
            _raise_limit()
            linux.give_up()
            linux.seccomp(no_setuid(platform.machine()))
        except OSError as error:
            os.write(2, f"nixbox: {step}: {error.strerror}\n".encode(errors="replace"))
            os._exit(_EXIT_CODE)

    def _open(self, path: Path | str, inode: Inode, at: int | None = None) -> int:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
        if Inode.of(fd) != inode:
            raise OSError(0, f"{path} is not what it was a moment ago")
        return fd

    def _build(self, source: int, programs: list[tuple[str, int]]) -> str:
        root = str(self.place)
        linux.mount("tmpfs", root, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755,size=64k")
        for name, fd in programs:
            target = root + name
            Path(target).mkdir(parents=True)
            linux.mount(f"/proc/self/fd/{fd}", target, None, linux.MS_BIND | linux.MS_REC)
            linux.restrict_mounts(target, linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV)
        for name, link in self.programs:
            if isinstance(link, str):
                Path(root + name).symlink_to(link)
        # virtiofsd opens files again through its own descriptors; of other processes nothing is seen.
        Path(f"{root}/proc/self").mkdir(parents=True)
        linux.mount(f"/proc/{os.getpid()}", f"{root}/proc/self", None, linux.MS_BIND)
        limits = Path(f"{root}/proc/sys/fs")
        limits.mkdir(parents=True)
        (limits / "nr_open").write_text(f"{_MOST_DESCRIPTORS}\n")  # it asks, though it is told to change nothing
        Path(root + SHARE).mkdir()
        linux.mount(f"/proc/self/fd/{source}", root + SHARE, None, linux.MS_BIND | linux.MS_REC)
        # What the host mounts there later is not given: it would come without these restrictions.
        linux.mount("none", root + SHARE, None, linux.MS_REC | linux.MS_PRIVATE)
        closed = linux.MOUNT_ATTR_RDONLY if self.readonly else 0
        linux.restrict_mounts(root + SHARE, linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV | closed)
        return root

    def _mask(self, root: str, path: Path, inode: Inode) -> None:
        fd = os.open(root + SHARE, os.O_PATH | os.O_DIRECTORY)
        for part in path.parts[:-1]:
            fd = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        fd = self._open(path.name, inode, fd)
        closed = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
        # Not merely empty: for whoever may not look inside, what is missing has not been deleted (git, for one).
        linux.mount("tmpfs", f"/proc/self/fd/{fd}", "tmpfs", closed, "mode=0000,size=4k,nr_inodes=2")


def _raise_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def no_setuid(machine: str) -> bytes:
    """A filter (classic BPF, linux/filter.h, linux/seccomp.h) that refuses the bits set-user-ID and set-group-ID.

    They would let everybody on the host run a guest's program as this user. `machine` is as in uname(2).
    """
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    modes, openat2, arch = _MODES[machine]
    steps = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 1, 0, arch),
        (end, 0, 0, kill),
        (load, 0, 0, 0),  # seccomp_data.nr
        (at_least, 0, 1, 0x40000000),  # the same calls under other numbers (x32)
        (end, 0, 0, kill),
    ]
    for number, argument in modes:
        steps += [
            (equal, 0, 4, number),
            (load, 0, 0, 16 + 8 * argument),  # the lower half of seccomp_data.args[…], little-endian
            (any_bit, 0, 1, stat.S_ISUID | stat.S_ISGID),
            (end, 0, 0, error | 1),  # EPERM
            (end, 0, 0, allow),
        ]
    steps += [(equal, 0, 1, openat2), (end, 0, 0, error | 38), (end, 0, 0, allow)]  # ENOSYS
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
