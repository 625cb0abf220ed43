"""What goes wrong with libkrun, provoked on a host where it could work: each fault is named, with its mend."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kvm.box import Box
from tests.kvm.test_cli import CHECKOUT, KEPT
from tests.vm.conftest import Home

CONFIG = """\
name = "box"
mounts = []
[resources]
vcpus = 1
memory = "320MiB"
disk = "1GiB"
[network]
mode = "off"
[machine]
backend = "krun"
"""
# The C library is a library for this machine, and none of libkrun's functions is in it.
FAULTS = """
elf() { python3 -I -S -c 'import sys; data = bytearray(open(sys.argv[1], "rb").read()); data[18] = 183; \
  open(sys.argv[2], "wb").write(data)' "$1" "$2"; }
libc=$(sed -n 's|.* \\(/.*/libc.so.6\\)$|\\1|p' /proc/self/maps | head -n 1)
krun=$(PYTHON -c 'from nixbox.machine import libkrun; print(libkrun.find())')
elf "$krun" /tmp/other.so
"""


@dataclass
class Place:
    box: Box
    path: Path
    env: dict[str, str]

    def up(self, before: str = "", *args: str, env: str = "") -> tuple[int, str]:
        """`nixbox up` after a shell script; its exit code and all that it said."""
        command = shlex.join([sys.executable, "-m", "nixbox", "up", *args])
        done = self.box.run(["sh", "-c", f"{before}\n{env} {command} 2>&1"], cwd=str(self.path), env=self.env)
        return done.code, done.stdout


@pytest.fixture
def place(box: Box, home: Home) -> Iterator[Place]:
    path = Path(tempfile.mkdtemp(prefix="w", dir=home.path))
    try:
        (path / ".nixbox").mkdir()
        (path / ".nixbox/config.toml").write_text(CONFIG)
        (path / ".nixbox/nixbox.lock").write_text(home.lock)
        env = {name: home.env[name] for name in KEPT if name in home.env} | {"PYTHONPATH": str(CHECKOUT)}
        yield Place(box, path, env)
    finally:
        shutil.rmtree(path)


def test_every_fault_is_named_with_its_mend(place: Place) -> None:
    faults = FAULTS.replace("PYTHON", sys.executable)
    # The library.
    code, said = place.up(faults, env="NIXBOX_LIBKRUN=$libc")
    assert code == 3 and "lacks krun_init_log" in said and "nixbox[krun]" in said, said
    code, said = place.up(env="NIXBOX_LIBKRUN=/tmp/other.so")
    assert code == 3 and "cannot be loaded" in said and "architecture" in said, said
    code, said = place.up(env="NIXBOX_LIBKRUN=/nowhere/libkrun.so")
    assert code == 3 and "NIXBOX_LIBKRUN names /nowhere/libkrun.so" in said, said
    # What the config asks for.
    code, said = place.up("", "--cpus", "200")
    assert code == 2 and "resources.vcpus: 200 is more than" in said and "at most vcpus = " in said, said
    assert "no template could be made" not in said, said  # it is not tried twice
    code, said = place.up("", "--memory", "60GiB")
    assert code == 2 and "resources.memory: 61440 MiB is more than this host has" in said, said
    # Files: the disk that a machine of this name has, and the image.
    disk = ".nixbox/machines/box/overlay.img"
    code, said = place.up(f"truncate -s +100 {disk}")
    assert code == 1 and "are no whole sectors" in said and "nixbox rm" in said, said
    assert "template" not in said, said  # none is made for it, and none is blamed
    code, said = place.up(
        f'rm {disk}; kernel=$(readlink -f $(sed -n \'s/.*"image": "\\(.*\\)".*/\\1/p\' '
        ".nixbox/machines/box/machine.json)/krun/vmlinux); mount --bind /etc/hostname $kernel"
    )
    assert code == 1 and "is no kernel for this machine" in said, said
    code, said = place.up("umount $(grep -o '/[^ ]*vmlinux' /proc/mounts); rm /dev/kvm; rm ~/.cache/nixbox/kvm.json")
    assert code == 3 and "the backend krun needs KVM" in said and "--backend qemu" in said, said
    # Nothing is left of all these.
    assert place.box.run(["sh", "-c", "grep -la 'n[i]xbox-krun' /proc/[0-9]*/cmdline"]).stdout == ""
