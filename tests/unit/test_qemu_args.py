"""QEMU's command line: readable golden texts, and paths of every kind that stay one argument."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixbox.jails import Inode, Share
from nixbox.machine import qemu_args
from nixbox.machine.backend import MemoryFile, VmSpec
from nixbox.machine.qemu_args import Fds, argv, shape
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
    disk_mib=8192,
    accelerator="tcg",
)
FDS = Fds(control=7, monitor=9, shell=11, tap=13)
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
-M q35,usb=off,vmport=off,smm=off,hpet=off,memory-backend=mem
{accelerator}
-smp 3
-m 1536M
-object memory-backend-ram,id=mem,size=1536M,merge=off,dump=off
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
-chardev socket,id=shell,fd=11,server=on,wait=off
-device virtserialport,chardev=shell,name=nixbox.shell
-blockdev root: raw, read-only, /nix/store/root.squashfs
-device virtio-blk-pci,drive=root,serial=root,romfile=
-blockdev overlay: raw, writable, /w/.nixbox/machines/web-1/overlay.img
-device virtio-blk-pci,drive=overlay,serial=overlay,romfile=,werror=enospc,rerror=report
-netdev tap,id=net,fd=13
-device virtio-net-pci,netdev=net,host_mtu=65520,romfile=
-object rng-builtin,id=rng
-device virtio-rng-pci,rng=rng
-device pcie-pci-bridge,id=mounts
-device vmgenid,guid=auto
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


def options(value: str) -> dict[str, str]:
    """QEMU splits an option at single commas and reads two as one (util/qemu-option.c, get_opt_value)."""
    parts = [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
    return dict(part.partition("=")[::2] for part in parts)


def memory(command: list[str]) -> str:
    (found,) = (value for value in values(command, "-object") if value.startswith("memory-backend-"))
    return found


@pytest.mark.parametrize(
    ("accelerator", "lines", "append"),
    [
        ("tcg", "-accel tcg,thread=multi\n-cpu max,-cx16", " mitigations=off norandmaps tsc=reliable"),
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
    assert options(memory(command))["size"] == f"{memory_mib}M"  # QEMU refuses a memory of another size than -m


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
    console = next(value for value in values(command, "-chardev") if value.startswith("file,"))
    assert options(console) == {"file": "", "id": "console", "path": str(spec.console_log), "append": "on"}


@pytest.mark.parametrize(("shared", "share"), [(True, "on"), (False, "off")])
@given(name=NAMES)
def test_memory_in_a_file(shared: bool, share: str, name: str) -> None:
    command = argv(replace(SPEC, memory_file=MemoryFile(Path("/m", name), shared)), FDS, sandbox=True)
    assert options(memory(command)) == {
        "memory-backend-file": "",
        "id": "mem",
        "size": "1536M",
        "merge": "off",
        "dump": "off",
        "mem-path": str(Path("/m", name)),
        "share": share,
    }


def test_the_machine_uses_the_memory_that_it_is_given() -> None:
    for file in (None, MemoryFile(Path("/m"), shared=False)):
        command = argv(replace(SPEC, memory_file=file), FDS, sandbox=True)
        (machine,) = values(command, "-M")
        assert options(machine)["memory-backend"] == options(memory(command))["id"]


def test_a_restored_machine_waits_for_its_state() -> None:
    booting, waiting = (argv(replace(SPEC, incoming=incoming), FDS, sandbox=True) for incoming in (False, True))
    assert values(waiting, "-incoming") == ["defer"]
    assert "-S" in waiting  # paused until its host has connected
    assert not {"-S", "-incoming"} & set(booting)
    assert [word for word in waiting if word not in ("-S", "-incoming", "defer")] == booting


def test_every_start_has_another_generation() -> None:
    # A literal number would be the same in every copy, and their random numbers too.
    assert values(argv(SPEC, FDS, sandbox=True), "-device")[-1] == "vmgenid,guid=auto"


def test_each_channel_has_its_own_descriptor() -> None:
    sockets = [options(value) for value in values(argv(SPEC, FDS, sandbox=True), "-chardev")]
    assert {found["id"]: found["fd"] for found in sockets if "fd" in found} == {
        "control": "7",
        "monitor": "9",
        "shell": "11",
    }
    # QEMU must not wait for somebody to connect before it runs the guest.
    assert all(found["wait"] == "off" for found in sockets if "fd" in found)


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


def test_nothing_of_the_guest_listens_on_the_host() -> None:
    text = " ".join(argv(SPEC, FDS, sandbox=True))
    assert "hostfwd" not in text and "-netdev user" not in text
    assert not re.search(r"-(vnc|spice|gdb|s|incoming|virtfs|fsdev)\b", text)


# --- the shape -------------------------------------------------------------------------------------------

OWN: dict[str, object] = {
    "name": "api",
    "overlay": Path("/elsewhere/o,verlay.img"),
    "console_log": Path("/elsewhere/console.log"),
    "memory_file": MemoryFile(Path("/proc/self/fd/9"), shared=False),
    "incoming": True,
    "bound": True,
    "disk_mib": 1024,
    "slots": 2,  # other backends' only, as the next
    "shares": (Share(Path("/srv"), Inode(1, 2), False, ()),),
}
SHARED: dict[str, object] = {
    "vcpus": 4,
    "memory_mib": 1537,
    "root": Path("/nix/store/other.squashfs"),
    "kernel": Path("/nix/store/other/vmlinux"),
    "initrd": Path("/nix/store/other/initrd"),
    "accelerator": "kvm",
    "return_memory": True,
    "sidecars": (Path("/nix/store/sidecar.erofs"),),
}


def changed(**fields: object) -> VmSpec:
    return replace(SPEC, **fields)  # type: ignore[arg-type]


def test_every_field_is_a_machines_own_or_shared() -> None:
    assert set(OWN) | set(SHARED) == {field.name for field in dataclasses.fields(VmSpec)}
    assert all(getattr(SPEC, name) != value for name, value in (OWN | SHARED).items())


def test_sidecars_are_further_disks_that_nobody_writes() -> None:
    command = argv(changed(sidecars=(Path("/nix/a"), Path("/nix/b,c"))), FDS, sandbox=False)
    disks = [json.loads(word) for word in command if word.startswith('{"driver"')]
    assert [disk["node-name"] for disk in disks] == ["root", "overlay", "sidecar0", "sidecar1"]
    assert [disk["read-only"] for disk in disks] == [True, False, True, True]
    assert disks[3]["file"] == {"driver": "file", "filename": "/nix/b,c", "locking": "off"}
    serials = [word for word in command if word.startswith("virtio-blk-pci")]
    assert ["serial=sidecar1" in word for word in serials] == [False, False, False, True]


def test_two_machines_of_one_template_have_one_shape() -> None:
    assert shape(changed(**OWN)) == shape(SPEC)
    for name, value in OWN.items():
        assert shape(changed(**{name: value})) == shape(SPEC)
    text = "\n".join(shape(changed(**OWN)))
    assert not any(own in text for own in ("api", "elsewhere", "/proc/self"))


@pytest.mark.parametrize("name", SHARED)
def test_another_machine_has_another_shape(name: str) -> None:
    assert shape(changed(**{name: SHARED[name]})) != shape(SPEC)
    assert shape(changed(**OWN, **{name: SHARED[name]})) != shape(SPEC)


def test_the_shape_is_what_runs() -> None:
    """Whatever is added to the command line is part of it."""
    ours = set(argv(SPEC, FDS, sandbox=False)) - set(shape(SPEC))
    own = ("nixbox-web-1", "fd=7,", "fd=9,", "fd=11,", "fd=13", str(SPEC.overlay), str(SPEC.console_log))
    assert all(any(word in found for word in own) for found in ours)
    assert len(ours) == len(own)
