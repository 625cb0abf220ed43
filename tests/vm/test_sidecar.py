"""Images beside the root image: what a guest sees of them, what they cost it, and which layer wins."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.conftest import RESOURCES, Home, Workspace, _end

BIG_MIB = 500
# 16 MiB that no compression makes smaller, again and again: further apart than lz4 and zstd look back.
BUILD = f"""
mkdir -p /opt/side/deep /opt/big
echo of the build >/opt/side/file
chmod 2750 /opt/side/deep
chown 7:8 /opt/side/deep
echo 'echo a fake' >/usr/bin/tree
chmod 755 /usr/bin/tree
echo of the root >/etc/conflict
echo '# kept' >/etc/apt/sources.list.d/own.list
echo an old log >/var/log/dpkg.log
perl -e 'srand(1); print pack("L*", map {{ rand(2**32) }} 1 .. 1 << 20) for 1 .. 4' >/opt/big/0
for i in $(seq 1 {BIG_MIB // 16}); do cat /opt/big/0; done >/opt/big/data
"""
PROFILE = f"""
build = {json.dumps(BUILD)}
sidecar = ["/opt/side", "/opt/big", "/usr/bin/tree"]
sidecar_packages = ["tree", "cron"]
"""
CONFIG = f'name = "box"\nprofile = "dev"\nmounts = []\n{RESOURCES}'


@pytest.fixture(scope="module")
def box(home: Home) -> Iterator[Workspace]:
    """A machine with both kinds of sidecars, up."""
    path = Path(tempfile.mkdtemp(prefix="w", dir=home.path))
    made = Workspace(path, home.env)
    made.config(CONFIG, PROFILE)
    (path / ".nixbox" / "nixbox.lock").write_text(home.lock)
    try:
        made("up", timeout_s=900)
        yield made
    finally:
        _end(made)


def test_what_is_in_a_sidecar_is_where_it_was(box: Workspace) -> None:
    said = box.guest(
        "cat /opt/side/file; stat -c '%a %u %g' /opt/side/deep /opt; stat -c %s /opt/big/data; sha256sum /opt/big/0;"
        "tail -c 16M /opt/big/data | sha256sum"
    ).splitlines()
    assert said[:4] == ["of the build", "2750 7 8", "755 0 0", str(BIG_MIB // 16 << 24)]
    assert said[4].split()[0] == said[5].split()[0]
    # It can be written to, as all else: the copy is on the machine's own disk.
    box.guest("sudo sh -euc 'echo mine >>/opt/side/file; rm -r /opt/side/deep'")
    assert box.guest("cat /opt/side/file; ls /opt/side") == "of the build\nmine\nfile\n"


def test_each_layer_covers_the_ones_below(box: Workspace) -> None:
    """The sidecar of packages over that of paths over the root."""
    assert "tree v" in box.guest("tree --version")
    assert box.guest("cat /etc/conflict /etc/apt/sources.list.d/own.list") == "of the root\n# kept\n"
    layers = box.guest("grep ' / overlay ' /proc/mounts").split("lowerdir=")[1].split(",")[0]
    assert layers == "/overlay/sidecar1:/overlay/sidecar0:/lower"
    # What the packages' step took away is away, though the root has it.
    assert box.guest("[ -e /var/log/dpkg.log ] || echo gone") == "gone\n"
    assert box.guest("ls -A /overlay /lower 2>&1 || :").count("No such file") == 2


def test_its_packages_are_packages(box: Workspace) -> None:
    said = box.guest(
        "dpkg --audit; dpkg -V tree cron; dpkg-query -W -f '${db:Status-Abbrev}' tree cron; getent group crontab"
    )
    assert said.startswith("ii ii crontab:x:"), said
    assert box.guest("apt-mark showauto | grep -cx -e tree -e cron || :") == "0\n"


def test_nobody_can_write_to_a_sidecar(box: Workspace) -> None:
    """Not even root of the guest: the disk says no, before the file does."""
    script = """
    for disk in /sys/block/vd*; do
      read -r serial <$disk/serial || :
      case $serial in
        sidecar*) echo $(cat $disk/ro); dd if=/dev/zero of=/dev/${disk##*/} bs=512 count=1 2>&1 | grep -c ermitted ;;
      esac
    done
    """
    assert box.guest(f"sudo sh -uc {shlex.quote(script)}").split() == ["1", "1", "1", "1"]


def test_a_guest_pays_for_what_it_reads_of_a_sidecar(box: Workspace, workspace: Workspace) -> None:
    """500 MB more in the image are less than 10 MB of memory after a start."""
    used = "awk '/^Mem(Total|Free):/ { print $2 }' /proc/meminfo"

    def used_kib(machine: Workspace) -> int:
        machine("down")
        machine("up")
        total, free = map(int, machine.guest(used).split())
        return total - free

    workspace("up")
    without, beside = used_kib(workspace), used_kib(box)
    print(f"used after a start: {without} KiB without a sidecar, {beside} KiB with one of {BIG_MIB} MiB")
    assert abs(beside - without) < 10_000


def test_a_path_that_nothing_made_is_named(workspace: Workspace) -> None:
    workspace.config(CONFIG, 'sidecar = ["/opt/nothing"]\n')
    said = workspace("build", code=1).stderr
    assert "no package or build script made the sidecar /opt/nothing" in said


def test_every_fault_of_a_sidecar_is_named_at_once(workspace: Workspace) -> None:
    workspace.config(
        CONFIG, 'packages = ["jq"]\nsidecar = ["opt", "/usr", "/a/../b"]\nsidecar_packages = ["jq", "X"]\n'
    )
    said = workspace("build", code=2).stderr
    for fault in (
        "sidecar[0]: `opt` is not a path in the image",
        "sidecar[1]: `/usr` is needed to start a guest",
        "sidecar[2]: `/a/../b` is not a path in the image",
        "sidecar_packages[1]: `X` is not a Debian package name",
    ):
        assert fault in said, said
