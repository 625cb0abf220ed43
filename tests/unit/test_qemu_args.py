"""QEMU's command line: readable golden texts, and paths of every kind that stay one argument."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixbox.machine import qemu_args
from nixbox.machine.backend import VmSpec
from nixbox.machine.qemu_args import Fds, argv
from nixbox.plan.model import Accelerator

SPEC = VmSpec(
    name="web-1",
    kernel=Path("/nix/store/image/vmlinux"),
    initrd=Path("/nix/store/image/initrd"),
    root=Path("/nix/store/root.squashfs"),
    overlay=Path("/w/.nixbox/machines/web-1/overlay.img"),
    console_log=Path("/w/.nixbox/machines/web-1/logs/console.log"),
    vcpus=3,
    memory_mib=1536,
    accelerator="tcg",
)
FDS = Fds(control=7, monitor=9)
# Everything but NUL and the slash may stand in a file's name; what QEMU and JSON care for is made likelier.
NAMES = st.text(
    st.sampled_from(", =\"'\\:%{}[]é\n") | st.characters(codec="utf-8", exclude_characters="\0/"),
    min_size=1,
    max_size=15,
).filter(lambda name: name not in (".", ".."))

GOLDEN = """\
qemu-system-x86_64
-name nixbox-web-1
-nodefaults
-no-user-config
-no-reboot
-display none
-M q35,usb=off,vmport=off,smm=off,hpet=off
{accelerator}
-smp 3
-m 1536M
-kernel /nix/store/image/vmlinux
-initrd /nix/store/image/initrd
-append console=ttyS0 quiet panic=-1 8250.nr_uarts=1 no_timer_check cryptomgr.notests random.trust_cpu=on{append}
-chardev file,id=console,path=/w/.nixbox/machines/web-1/logs/console.log,append=on
-serial chardev:console
-chardev socket,id=monitor,fd=9,server=on,wait=off
-mon chardev=monitor,mode=control
-device virtio-serial-pci,romfile=
-chardev socket,id=control,fd=7,server=on,wait=off
-device virtserialport,chardev=control,name=nixbox.control
-blockdev root: raw, read-only, /nix/store/root.squashfs
-device virtio-blk-pci,drive=root,serial=root,romfile=
-blockdev overlay: raw, writable, /w/.nixbox/machines/web-1/overlay.img
-device virtio-blk-pci,drive=overlay,serial=overlay,romfile=,werror=enospc,rerror=report
-netdev user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:0-:22
-device virtio-net-pci,netdev=net,romfile=
-object rng-builtin,id=rng
-device virtio-rng-pci,rng=rng
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
"""


def readable(command: list[str]) -> str:
    """One option a line, its value behind it; block devices in short."""
    lines: list[str] = []
    option = ""
    for word in command:
        if option == "-blockdev":
            block = json.loads(word)
            mode = "read-only" if block["read-only"] else "writable"
            word = f"{block['node-name']}: {block['driver']}, {mode}, {block['file']['filename']}"
        if word.startswith("-") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
        option = word
    return "\n".join(lines) + "\n"


def values(command: list[str], option: str) -> list[str]:
    return [value for word, value in pairwise(command) if word == option]


def blocks(command: list[str]) -> dict[str, dict[str, object]]:
    return {block["node-name"]: block for block in map(json.loads, values(command, "-blockdev"))}


@pytest.mark.parametrize(
    ("accelerator", "lines", "append"),
    [
        ("tcg", "-accel tcg,thread=multi\n-cpu max,-cx16", " mitigations=off tsc=reliable"),
        ("kvm", "-accel kvm\n-cpu host", ""),
        ("hvf", "-accel hvf\n-cpu host", ""),
    ],
)
def test_golden(accelerator: Accelerator, lines: str, append: str) -> None:
    command = argv(replace(SPEC, accelerator=accelerator), FDS, sandbox=True)
    assert readable(command) == GOLDEN.format(accelerator=lines, append=append)


def test_the_sandbox_is_one_option() -> None:
    with_it, without = (argv(SPEC, FDS, sandbox=sandbox) for sandbox in (True, False))
    assert with_it[: len(without)] == without
    assert with_it[len(without)] == "-sandbox"
    assert {"spawn=deny", "elevateprivileges=deny"} <= set(with_it[-1].split(","))


@given(st.integers(1, 256), st.integers(128, 2**20))
def test_the_machines_shape(vcpus: int, memory_mib: int) -> None:
    command = argv(replace(SPEC, vcpus=vcpus, memory_mib=memory_mib), FDS, sandbox=True)
    assert (values(command, "-smp"), values(command, "-m")) == ([str(vcpus)], [f"{memory_mib}M"])


@given(NAMES, NAMES, NAMES)
def test_paths_of_every_kind_parse_back(root: str, overlay: str, log: str) -> None:
    spec = replace(SPEC, root=Path("/r", root), overlay=Path("/o", overlay), console_log=Path("/c", log))
    command = argv(spec, FDS, sandbox=True)
    assert len(command) == len(argv(SPEC, FDS, sandbox=True))
    found = blocks(command)
    for node, path in (("root", spec.root), ("overlay", spec.overlay)):
        file = found[node]["file"]
        assert isinstance(file, dict)
        assert file["filename"] == str(path)
    # QEMU splits an option at single commas and reads two as one (util/qemu-option.c, get_opt_value).
    console = next(value for value in values(command, "-chardev") if value.startswith("file,"))
    parts = [part.replace("\0", ",") for part in console.replace(",,", "\0").split(",")]
    assert parts == ["file", "id=console", f"path={spec.console_log}", "append=on"]


def test_the_root_image_cannot_be_written() -> None:
    found = blocks(argv(SPEC, FDS, sandbox=True))
    assert found["root"]["read-only"] is True
    assert found["overlay"]["read-only"] is False
    # Two machines share a root image, but never an overlay: only there QEMU's own lock stays on.
    assert "'locking': 'off'" in str(found["root"])
    assert "locking" not in str(found["overlay"])


def test_a_full_host_disk_pauses_the_machine() -> None:
    overlay = next(v for v in values(argv(SPEC, FDS, sandbox=True), "-device") if "drive=overlay" in v)
    assert "werror=enospc" in overlay


def test_nothing_individual_reaches_the_guests_kernel() -> None:
    other = replace(SPEC, name="other", overlay=Path("/x"), console_log=Path("/y"), vcpus=1, memory_mib=256)
    assert qemu_args.kernel_args(SPEC) == qemu_args.kernel_args(other)


def test_the_guest_is_reached_from_this_host_only() -> None:
    text = " ".join(argv(SPEC, FDS, sandbox=True))
    assert re.findall(r"hostfwd=\S+", text) == ["hostfwd=tcp:127.0.0.1:0-:22"]
    assert not re.search(r"-(vnc|spice|gdb|s|incoming|virtfs|fsdev)\b", text)
