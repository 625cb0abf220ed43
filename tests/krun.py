"""What tests of the libkrun backend share: a machine's small files, and libraries to load."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nixbox.jails import Inode, Share
from nixbox.machine import libkrun
from nixbox.machine.backend import VmSpec

HANG_S = 20.0  # nothing here may take this long: a bound against hangs, not a measure of speed
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
needs_library = pytest.mark.skipif(
    importlib.util.find_spec(libkrun.PACKAGE) is None, reason="the package smolmachines is not installed"
)
# All that is needed of a libkrun, and nothing of a VM: `entered` is what the machine does. It has the console's
# terminal and the guest's end of the control channel.
LIBRARY = """
#include <stdint.h>
#include <string.h>
#include <unistd.h>
static int terminal, channel;
static void say(int fd, const char *words) { if (write(fd, words, strlen(words)) < 0) _exit(99); }
int krun_init_log() { return 0; }
int krun_create_ctx() { return 0; }
int krun_set_vm_config() { return 0; }
int krun_set_kernel() { return 0; }
int krun_disable_implicit_init() { return 0; }
int krun_add_disk2() { return 0; }
int krun_add_virtiofs3() { return 0; }
int krun_add_net_tap() { return 0; }
int krun_add_virtio_console_multiport() { return 0; }
int krun_add_console_port_tty(uint32_t c, uint32_t id, const char *name, int fd) { terminal = fd; return 0; }
int krun_add_console_port_inout(uint32_t c, uint32_t id, const char *name, int in, int out) {
    channel = in;
    return 0;
}
char *krun_get_last_error(void) { return "its own words"; }
static int entered(void);
int krun_start_enter(uint32_t c) { return entered(); }
"""
WAITS = "static int entered(void) { for (;;) pause(); }"


def elf(machine: int = 62) -> bytes:
    """A kernel that does nothing for ever: ELF, one segment at 16 MiB, all of it `hlt`. 62: EM_X86_64."""
    address, offset, code = 0x1000000, 0x1000, b"\xf4" * 512
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, address, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, offset, address, address, len(code), len(code), offset)
    return (header + segment).ljust(offset, b"\0") + code


def machine_spec(place: Path) -> VmSpec:
    """A machine whose files are all there, in `place`."""
    image = place / "image"
    (image / "boot").mkdir(parents=True)
    (image / "boot/init").write_text("#!/bin/sh\n")
    (image / "vmlinux").write_bytes(elf())
    for disk in ("root", "overlay"):
        (place / disk).write_bytes(bytes(4096))
    return VmSpec(
        name="web-1",
        kernel=image / "vmlinux",
        initrd=image / "boot",
        root=place / "root",
        overlay=place / "overlay",
        console_log=place / "console.log",
        vcpus=1,
        memory_mib=256,
        disk_mib=1024,
        accelerator="kvm",
        bound=True,
    )


def share(source: Path, *, readonly: bool) -> Share:
    """A directory as it is now, with nothing hidden."""
    return Share(source, Inode.of(source), readonly, ())


def module() -> Any:
    """The compiled declarations, imported anew."""
    path = libkrun.compiled() / f"{libkrun.MODULE}.py"
    spec = importlib.util.spec_from_file_location(libkrun.MODULE, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def c_library() -> str:
    """The C library's file, which this process has open: a library without any of the functions."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in lines if re.search(r"/libc[.-]", line))


def build(place: Path, entered: str) -> Path:
    """Compile a library that behaves as the text says."""
    source, made = place / "krun.c", place / "krun.so"
    source.write_text(LIBRARY + entered)
    argv = ["cc", "-w", "-shared", "-fPIC", "-o", str(made), str(source)]
    subprocess.run(argv, check=True, timeout=HANG_S)
    return made
