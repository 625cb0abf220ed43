"""The jail of the process that serves a mount: the shared directory is in it, its own program, and nothing else.

It is entered by a child before that becomes virtiofsd, without any privilege (user_namespaces(7),
mount_namespaces(7)). A guest that broke out of virtiofsd would find no other file, no network, no capability, and no
way to make a set-user-ID program; and where the share is read-only, the kernel says so and not virtiofsd.
"""

from __future__ import annotations

import os
from pathlib import Path

from nixbox import jails, linux
from nixbox.values import dataclass

SHARE = "/share"
_EXIT_CODE = 126


@dataclass(frozen=True, slots=True)
class Jail:
    """What is in it.

    `place` is a directory that nobody else uses, to build it on. `programs` maps paths in the jail to directories of
    the host with the program and its libraries (a string: a symbolic link to that).
    """

    place: Path
    programs: tuple[tuple[str, Path | str], ...]
    share: jails.Share

    def enter(self) -> None:
        """Go in, for good: for a child, before it executes. On failure it ends, with words on its stderr."""
        step = "cannot make namespaces"
        try:
            linux.own_user_namespace(linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC, jails.USER)
            linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
            step = f"cannot share {self.share.source}"
            source = self.share.open()
            programs = [(name, os.open(was, os.O_PATH)) for name, was in self.programs if isinstance(was, Path)]
            step = "cannot build its jail"
            root = self._build(source, programs)
            step = "cannot hide what is nixbox's own"
            for path, inode in self.share.masks:
                jails.mask(root + SHARE, path, inode)
            step = "cannot close its jail"
            jails.close(root)
            jails.raise_limit()
            linux.give_up()
            linux.seccomp(jails.no_setuid(os.uname().machine))
        except OSError as error:
            os.write(2, f"nixbox: {step}: {error.strerror}\n".encode(errors="replace"))
            os._exit(_EXIT_CODE)

    def _build(self, source: int, programs: list[tuple[str, int]]) -> str:
        root = str(self.place)
        linux.mount("tmpfs", root, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755,size=64k")
        for name, fd in programs:
            target = root + name
            Path(target).mkdir(parents=True)
            jails.bind_closed(fd, target)
        for name, link in self.programs:
            if isinstance(link, str):
                Path(root + name).symlink_to(link)
        jails.bind_own_process(root)  # of other processes nothing is seen
        limits = Path(f"{root}/proc/sys/fs")
        limits.mkdir(parents=True)
        (limits / "nr_open").write_text(f"{jails.MOST_DESCRIPTORS}\n")  # it asks, though it is told to change nothing
        Path(root + SHARE).mkdir()
        jails.bind_share(self.share, source, root + SHARE)
        return root
