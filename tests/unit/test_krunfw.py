"""libkrunfw: found where it may be, read as it is, refused with a reason when it is not one."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from nixbox import run
from nixbox.errors import ExitCode, HostError, NixboxError
from nixbox.image import krunfw

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86_64 so far")
COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this host")
INSTALLED = pytest.mark.skipif(importlib.util.find_spec("smol") is None, reason="smolmachines is not installed")
# A library like libkrunfw: its kernel is data of the file.
SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
__attribute__((aligned(65536))) char KERNEL_BUNDLE[] = "head Linux version 6.1.2-x+ (somebody) tail";
char *krunfw_get_kernel(uint64_t *load, uint64_t *entry, size_t *size) {
  *load = 0x1000000; *entry = 0x1000000 + ENTRY; *size = sizeof KERNEL_BUNDLE - 1;
  return RESULT;
}
"""


def made(place: Path, result: str = "KERNEL_BUNDLE", entry: int = 5, source: str = SOURCE) -> Path:
    """A library of our own, compiled."""
    path = place / krunfw.FILE
    argv = ["cc", "-shared", "-fPIC", "-xc", "-", "-o", str(path), f"-DENTRY={entry}", f"-DRESULT={result}"]
    subprocess.run(argv, input=source.encode(), check=True, timeout=60)
    return path


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host without any libkrunfw."""
    monkeypatch.delenv("NIXBOX_LIBKRUNFW", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "find_tool", lambda name: None)
    return monkeypatch


def a_file(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / krunfw.FILE).write_bytes(b"x")
    return directory / krunfw.FILE


# --- where it is -----------------------------------------------------------------------------------------


def test_nowhere(bare: pytest.MonkeyPatch) -> None:
    assert krunfw.locate() is None
    with pytest.raises(HostError, match="is not on this host") as caught:
        krunfw.find()
    assert "nixbox[krun]" in (caught.value.hint or "")


def test_the_variable_comes_first(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_file(tmp_path / "lib")
    (tmp_path / "mine.so").write_bytes(b"x")
    bare.setenv("NIXBOX_LIBKRUNFW", str(tmp_path / "mine.so"))
    assert krunfw.find(tmp_path / "lib/libkrun.so") == tmp_path / "mine.so"


def test_a_variable_that_names_nothing_is_no_reason_to_look_elsewhere(
    bare: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_file(tmp_path)
    bare.setenv("NIXBOX_LIBKRUNFW", str(tmp_path / "none.so"))
    with pytest.raises(HostError, match=r"NIXBOX_LIBKRUNFW names .*none\.so") as caught:
        krunfw.locate(tmp_path / "libkrun.so")
    assert caught.value.exit_code == ExitCode.HOST


def test_beside_libkrun_then_beside_what_it_links_to(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = a_file(tmp_path / "real")
    (tmp_path / "real/libkrun.so.1").write_bytes(b"x")
    link = tmp_path / "lib/libkrun.so"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "real/libkrun.so.1")
    assert krunfw.find(link) == real
    nearer = a_file(tmp_path / "lib")
    assert krunfw.find(link) == nearer


def test_the_module_is_found_without_running_it(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol/__init__.py").write_text("raise SystemExit('it ran')")
    bare.setattr(
        importlib.util, "find_spec", lambda name: importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)])
    )
    assert krunfw.locate() is None  # the package without the file
    there = a_file(tmp_path / "smol")
    assert krunfw.find() == there


def test_what_the_loader_knows(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = a_file(tmp_path)
    listed = f"2 libs found in cache `/etc/ld.so.cache'\n\tlibkrunfw.so.4 (libc6,x86-64) => {tmp_path}/4\n"
    listed += f"\tlibkrunfw.so.5 (libc6,x86-64) => {tmp_path}/gone\n\tlibkrunfw.so.5 (libc6,x86-64) => {here}\n"
    tool = tmp_path / "ldconfig"
    tool.write_text(f"#!/bin/sh\n[ $* = -p ] && cat <<'END'\n{listed}END\n")
    tool.chmod(0o755)
    bare.setattr(run, "find_tool", lambda name: str(tool))
    assert krunfw.find() == here


# --- what it holds ---------------------------------------------------------------------------------------


@X86
@INSTALLED
def test_the_installed_one() -> None:
    from importlib import metadata

    path = krunfw.find()
    data = path.read_bytes()
    found = krunfw.inspect(path)
    assert found.origin == f"smolmachines {metadata.version('smolmachines')}"
    assert (found.size, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    kernel = data[found.offset : found.offset + found.length]
    assert len(kernel) == found.length > 2**20
    assert f"Linux version {found.release} ".encode() in kernel
    assert found.load <= found.entry < found.load + found.length


@X86
@COMPILER
def test_one_of_our_own(tmp_path: Path) -> None:
    path = made(tmp_path)
    found = krunfw.inspect(path)
    kernel = path.read_bytes()[found.offset : found.offset + found.length]
    assert kernel == b"head Linux version 6.1.2-x+ (somebody) tail"
    assert (found.origin, found.release, found.load, found.entry) == ("libkrunfw", "6.1.2-x+", 2**24, 2**24 + 5)


def fault(path: Path) -> str:
    with pytest.raises(NixboxError) as caught:
        krunfw.inspect(path)
    assert str(path) in caught.value.message
    assert "nixbox[krun]" in (caught.value.hint or "")
    assert "Traceback" not in caught.value.message
    return caught.value.message


@X86
@COMPILER
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"result": "0"}, "it holds no kernel"),
        ({"result": "memcpy(malloc(sizeof KERNEL_BUNDLE), KERNEL_BUNDLE, sizeof KERNEL_BUNDLE)"}, "not in the file"),
        ({"result": "(KERNEL_BUNDLE[0]++, KERNEL_BUNDLE)"}, "differs from its file"),
        ({"entry": 4096}, "begins to run at 0x1001000, which is outside"),
        ({"source": SOURCE.replace("Linux version", "Other version")}, "does not say which Linux"),
        ({"source": "int other;"}, "no function krunfw_get_kernel"),
        ({"result": "(char *)8"}, "not in the file"),
        ({"result": "(abort(), KERNEL_BUNDLE)"}, "ended with `Aborted`"),
    ],
)
def test_one_that_cannot_be_used(tmp_path: Path, change: dict[str, str], said: str) -> None:
    assert said in fault(made(tmp_path, **change))  # type: ignore[arg-type]


@X86
@pytest.mark.parametrize("data", [b"", b"not a library\n", b"\x7fELF" + bytes(60)])
def test_what_is_no_library(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / krunfw.FILE
    path.write_bytes(data)
    fault(path)


@X86
def test_what_is_no_file(tmp_path: Path) -> None:
    assert "No such file" in fault(tmp_path / "none")
    assert "Is a directory" in fault(tmp_path)


@X86
@COMPILER
def test_another_architecture(tmp_path: Path) -> None:
    path = made(tmp_path)
    data = bytearray(path.read_bytes())
    data[18:20] = (183).to_bytes(2, "little")  # e_machine: AArch64
    path.write_bytes(data)
    fault(path)


@X86
@INSTALLED
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_one_that_is_cut_short_ends_only_the_child(tmp_path: Path, part: float) -> None:
    data = krunfw.find().read_bytes()
    path = tmp_path / krunfw.FILE
    path.write_bytes(data[: int(len(data) * part)])
    assert "Bus error" in fault(path)


def test_other_hosts_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(HostError, match="x86_64 hosts only so far; this one is aarch64"):
        krunfw.inspect(tmp_path)
