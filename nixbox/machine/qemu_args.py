"""QEMU's command line as a pure function of a VmSpec (QEMU 7.2 and later; qemu(1))."""

from __future__ import annotations

import json
from pathlib import Path

from nixbox.machine.backend import VmSpec, disks
from nixbox.plan.network import NETWORK_MTU
from nixbox.values import dataclass, replace

MOUNTS_BUS = "mounts"
KERNEL_ARGS = (
    "console=ttyS0",
    "quiet",
    "panic=-1",  # with -no-reboot a panic ends QEMU at once instead of hanging
    "8250.nr_uarts=1",
    "no_timer_check",
    "cryptomgr.notests",
    "random.trust_cpu=on",
)
# Software emulation: calibrating a timer there is slow and can fail under load, and a guest's own defences
# against speculation cost time but defend nothing, since no guest instruction is run by the CPU itself. A
# program that is somewhere else each time is translated anew each time (docs/decisions/023).
TCG_KERNEL_ARGS = ("mitigations=off", "norandmaps", "tsc=reliable")


@dataclass(frozen=True, slots=True)
class Fds:
    """What QEMU inherits: listening unix sockets, so that it never binds a path itself, and the TAP device."""

    control: int
    monitor: int
    shell: int
    tap: int


def _escape(path: Path) -> str:
    """A path inside a comma-separated option: QEMU reads `,,` as one comma."""
    return str(path).replace(",", ",,")


def _disk(node: str, path: Path, *, readonly: bool) -> list[str]:
    # JSON, not key=value: any byte may stand in a path.
    block: dict[str, object] = {
        "driver": "raw",
        "node-name": node,
        "read-only": readonly,
        "file": {"driver": "file", "filename": str(path)},
    }
    if readonly:
        # The store is shared and never written: no lock is needed, and none may be had (root-owned files).
        block["file"] = {"driver": "file", "filename": str(path), "locking": "off"}
    else:
        # Freed blocks go back to the host; a guest's flush is a flush, and the page cache outlives the VM.
        block.update({"discard": "unmap", "detect-zeroes": "unmap"})
    # A full host disk pauses the machine instead of failing the guest's write: nothing is lost.
    policy = "" if readonly else ",werror=enospc,rerror=report"
    return [
        "-blockdev",
        json.dumps(block),
        "-device",
        f"virtio-blk-pci,drive={node},serial={node},romfile=" + policy,
    ]


def _accelerator(spec: VmSpec) -> list[str]:
    if spec.accelerator == "tcg":
        # cmpxchg16b under TCG caused rare double faults with Debian's 6.12 kernel.
        return ["-accel", "tcg,thread=multi", "-cpu", "max,-cx16"]
    return ["-accel", spec.accelerator, "-cpu", "host"]


def _memory(spec: VmSpec) -> list[str]:
    # Never merged with other guests' pages by the host's KSM (a side channel), never in a core dump of QEMU.
    common = f"id=mem,size={spec.memory_mib}M,merge=off,dump=off"
    if spec.memory_file is None:
        return ["-object", f"memory-backend-ram,{common}"]
    share = "on" if spec.memory_file.shared else "off"
    path = _escape(spec.memory_file.path)
    return ["-object", f"memory-backend-file,{common},mem-path={path},share={share}"]


def kernel_args(spec: VmSpec) -> str:
    """The guest kernel's command line. Nothing secret and nothing individual is ever on it."""
    extra = TCG_KERNEL_ARGS if spec.accelerator == "tcg" else ()
    return " ".join((*KERNEL_ARGS, *extra))


def argv(spec: VmSpec, fds: Fds, *, sandbox: bool) -> list[str]:
    """The whole command line; `sandbox` adds QEMU's own seccomp filter (Linux hosts)."""
    command = [
        "qemu-system-x86_64",
        *("-name", f"nixbox-{spec.name}"),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-M", "q35,usb=off,vmport=off,smm=off,hpet=off,memory-backend=mem"),
        *_accelerator(spec),
        *("-smp", str(spec.vcpus)),
        *("-m", f"{spec.memory_mib}M"),
        *_memory(spec),
        *("-kernel", str(spec.kernel)),
        *("-initrd", str(spec.initrd)),
        *("-append", kernel_args(spec)),
        *("-chardev", f"file,id=console,path={_escape(spec.console_log)},append=on"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=monitor,fd={fds.monitor},server=on,wait=off"),
        *("-mon", "chardev=monitor,mode=control"),
        *("-device", "virtio-serial-pci,romfile="),
        *("-chardev", f"socket,id=control,fd={fds.control},server=on,wait=off"),
        *("-device", "virtserialport,chardev=control,name=nixbox.control"),
        *("-chardev", f"socket,id=shell,fd={fds.shell},server=on,wait=off"),
        *("-device", "virtserialport,chardev=shell,name=nixbox.shell"),
        *(word for name, path, readonly in disks(spec) for word in _disk(name, path, readonly=readonly)),
        *("-netdev", f"tap,id=net,fd={fds.tap}"),
        *("-device", f"virtio-net-pci,netdev=net,host_mtu={NETWORK_MTU},romfile="),
        *("-object", "rng-builtin,id=rng"),
        *("-device", "virtio-rng-pci,rng=rng"),
        # Directories of the host come and go behind it: 31 places, for less than as many ports cost a boot.
        *("-device", f"pcie-pci-bridge,id={MOUNTS_BUS}"),
        # Another number at every start: a guest that was saved renews its random numbers (docs/specs/vmgenid.rst).
        *("-device", "vmgenid,guid=auto"),
    ]
    if spec.return_memory:
        # The guest tells which pages are free, and QEMU takes them out of its memory: out of the file, too, if there
        # is one, privately mapped or not. So never with a file that is shared with others.
        command += ["-device", "virtio-balloon-pci,free-page-reporting=on,romfile="]
    if spec.incoming:
        command += ["-S", "-incoming", "defer"]
    if sandbox:
        # It cannot start a process: saved states go through descriptors that we pass it.
        command += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    return command


def shape(spec: VmSpec) -> list[str]:
    """The command line with every name and path of one machine taken out: what a saved state depends on."""
    nothing = replace(
        spec,
        name="",
        overlay=Path("overlay"),
        console_log=Path("console"),
        memory_file=None,
        incoming=False,
    )
    return argv(nothing, Fds(-1, -1, -1, -1), sandbox=False)
