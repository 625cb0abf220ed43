"""The libkrun backend without its process: what it checks, what libkrun is told, and what a refusal means."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nixbox import run
from nixbox.errors import ConfigError, HostError, NixboxError
from nixbox.machine import krun, krun_child, libkrun
from nixbox.machine.backend import Backend, Sockets, VmSpec
from nixbox.machine.krun import Krun
from nixbox.plan.network import NETWORK_MTU
from tests.krun import elf, machine_spec, module, share


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(libkrun.VARIABLE, raising=False)


@pytest.fixture
def spec(tmp_path: Path) -> VmSpec:
    return machine_spec(tmp_path)


# --- check ---


def refused(spec: VmSpec) -> NixboxError:
    with pytest.raises(NixboxError) as caught:
        krun.check(spec)
    assert caught.value.hint
    return caught.value


def test_what_is_all_there_is_let_pass(spec: VmSpec) -> None:
    krun.check(spec)


@pytest.mark.parametrize("name", ["kernel", "root"])
def test_an_image_without_its_kernel_or_root_is_to_be_built(spec: VmSpec, name: str) -> None:
    path: Path = getattr(spec, name)
    path.unlink()
    assert str(refused(spec)).startswith(f"the image's {name}") and str(path) in str(refused(spec))
    assert "nixbox build" in str(refused(spec).hint)
    path.mkdir()
    assert "is not there" in str(refused(spec))


@pytest.mark.parametrize("data", [b"", b"MZ" + bytes(100), elf()[:18], elf(machine=183)])
def test_a_kernel_that_is_none_for_this_machine(spec: VmSpec, data: bytes) -> None:
    spec.kernel.write_bytes(data)
    assert str(refused(spec)) == f"{spec.kernel} is no kernel for this machine (ELF, x86-64)"
    assert "nixbox lock" in str(refused(spec).hint)


def test_an_image_without_an_init(spec: VmSpec) -> None:
    (spec.initrd / "init").unlink()
    assert f"{spec.initrd}/init" in str(refused(spec))
    shutil.rmtree(spec.initrd)
    assert "nixbox build" in str(refused(spec).hint)


@pytest.mark.parametrize(("disk", "mend"), [("root", "nixbox build"), ("overlay", "nixbox rm")])
@pytest.mark.parametrize("size", [0, 511, 4097])
def test_a_disk_that_is_no_whole_sectors(spec: VmSpec, disk: str, mend: str, size: int) -> None:
    path: Path = getattr(spec, disk)
    path.write_bytes(bytes(size))
    assert str(refused(spec)) == f"the disk {path} is damaged: {size} bytes are no whole sectors"
    assert mend in str(refused(spec).hint)


def test_a_disk_that_cannot_be_opened(spec: VmSpec) -> None:
    def why() -> str:
        error = refused(spec)
        assert "nixbox rm" in str(error.hint)
        return str(error).removeprefix(f"the disk {spec.overlay} cannot be opened: ")

    spec.overlay.unlink()
    assert why() == "No such file or directory"
    spec.overlay.mkdir()
    assert why() == "Is a directory"
    spec.overlay.rmdir()
    spec.overlay.symlink_to(spec.overlay)
    assert why() == "Too many levels of symbolic links"


def test_memory_that_the_host_does_not_have(spec: VmSpec) -> None:
    host_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    krun.check(replace(spec, memory_mib=host_mib))
    error = refused(replace(spec, memory_mib=host_mib + 1))
    assert isinstance(error, ConfigError)
    assert f"resources.memory: {host_mib + 1} MiB" in str(error) and f"({host_mib} MiB)" in str(error)


# --- what a refusal means ---


@pytest.mark.parametrize(
    ("what", "code", "detail", "kind", "words", "mend"),
    [
        ("dlopen", 0, "file too short", HostError, "/l.so cannot be loaded: file too short", "architecture"),
        ("symbol", 0, "krun_add_net_tap", HostError, "/l.so lacks krun_add_net_tap", "nixbox[krun]"),
        ("vcpus", 0, "4", ConfigError, "resources.vcpus: 1 is more than", "at most vcpus = 4"),
        ("jail", 1, "/x: no", HostError, "the machine's process cannot be jailed: /x: no", "nixbox doctor"),
        ("system", 40, "", NixboxError, "the machine's process cannot begin: Too many levels", "nixbox logs"),
        ("krun_add_disk2", 22, "", NixboxError, "libkrun refuses krun_add_disk2: Invalid argument", "nixbox logs"),
        ("krun_add_disk2", 22, "bad disk", NixboxError, "libkrun refuses krun_add_disk2: bad disk", "--backend qemu"),
        (
            "krun_create_ctx",
            0,
            "",
            NixboxError,
            "libkrun refuses krun_create_ctx: it does not say why",
            "nixbox logs",
        ),
    ],
)
def test_a_refusal_is_explained(
    spec: VmSpec, what: str, code: int, detail: str, kind: type, words: str, mend: str
) -> None:
    error = krun.explained(what, code, detail, "/l.so", spec)
    assert type(error) is kind
    assert str(error).startswith(words)
    assert mend in str(error.hint)


# --- the orders that libkrun gets ---


class Recorder(krun_child.Library):
    """A libkrun with the functions `built`, which keeps what it is told; `fails` is one that returns an error."""

    def __init__(self, built: tuple[str, ...] = (), fails: str = "") -> None:
        self.ffi = module().ffi
        self.calls: list[tuple[Any, ...]] = []
        self._built = {*libkrun.NEEDED, *built}
        self._fails = fails

    def has(self, name: str) -> bool:
        return name in self._built

    def call(self, name: str, *arguments: Any) -> int:
        assert name in self._built
        self.calls.append((name, *map(self._plain, arguments)))
        if name == self._fails:
            raise krun_child.Refused(name, 22, "its own words")
        return {"krun_get_max_vcpus": 4, "krun_create_ctx": 7, "krun_add_virtio_console_multiport": 3}.get(name, 0)

    def _plain(self, value: Any) -> Any:
        """A C argument as a value that can be compared; arrays of strings end with a NULL."""
        if not isinstance(value, self.ffi.CData):
            return value
        if value == self.ffi.NULL:
            return None
        kind = self.ffi.typeof(value).item
        if kind.kind == "pointer":
            *words, last = list(value)
            assert last == self.ffi.NULL
            return [self.ffi.string(word) for word in words]
        return self.ffi.string(value) if kind.cname == "char" else bytes(self.ffi.buffer(value))


def orders(spec: VmSpec, library: Recorder) -> list[tuple[Any, ...]]:
    settings = json.loads(json.dumps(krun._settings(spec)))
    assert krun_child.configure(library, settings, 10, 11) == 7
    return library.calls


def test_libkrun_is_told_the_whole_machine(spec: VmSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of this host")  # libkrun would hand the guest its process's own environment
    shares = (share(tmp_path, readonly=False), share(tmp_path, readonly=True))
    wanted = replace(spec, vcpus=2, memory_mib=512, slots=3, shares=shares)
    assert orders(wanted, Recorder(("krun_set_exec", "krun_get_max_vcpus"))) == [
        ("krun_init_log", -1, 2, 2, 1),
        ("krun_get_max_vcpus",),
        ("krun_create_ctx",),
        ("krun_disable_implicit_init", 7),
        ("krun_set_vm_config", 7, 2, 512),
        ("krun_set_kernel", 7, b"/kernel", 1, None, " ".join(krun.KERNEL_ARGS).encode()),
        ("krun_set_exec", 7, b"/init", [], []),
        ("krun_add_virtiofs3", 7, b"/dev/root", b"/boot", 0, True),
        ("krun_add_disk2", 7, b"root", b"/disk0", 0, True),
        ("krun_add_disk2", 7, b"overlay", b"/disk1", 0, False),
        ("krun_add_virtiofs3", 7, b"nixbox-0", b"/share0", 0, False),
        ("krun_add_virtiofs3", 7, b"nixbox-1", b"/share1", 0, True),
        ("krun_add_virtiofs3", 7, b"nixbox-2", b"/share2", 0, True),
        ("krun_add_net_tap", 7, b"tap0", bytes.fromhex("525400123456"), 0b1000_1000_0011, 0),
        ("krun_add_virtio_console_multiport", 7),
        ("krun_add_console_port_tty", 7, 3, b"", 10),
        ("krun_add_console_port_inout", 7, 3, b"nixbox.control", 11, 11),
    ]


def test_what_version_1_does_of_itself_is_forbidden_before_anything_else(spec: VmSpec) -> None:
    implicit = ("krun_disable_implicit_vsock", "krun_disable_implicit_console")
    told = orders(spec, Recorder(implicit))
    assert told[2:5] == [*((name, 7) for name in implicit), ("krun_disable_implicit_init", 7)]
    assert [call for call in told if call[0] not in implicit] == orders(spec, Recorder())


def test_the_kernels_command_line_is_plain_text_for_every_image() -> None:
    line = " ".join(krun.KERNEL_ARGS)
    assert line.isascii() and len(line) < 2048  # COMMAND_LINE_SIZE; libkrun aborts on what is not ASCII
    assert f"nixbox.mtu={NETWORK_MTU}" in krun.KERNEL_ARGS


@pytest.mark.parametrize(("built", "vcpus", "most"), [(("krun_get_max_vcpus",), 5, "4"), ((), 129, "128")])
def test_more_cpus_than_there_can_be_are_refused_first(
    spec: VmSpec, built: tuple[str, ...], vcpus: int, most: str
) -> None:
    """128: the next power of two is no byte any more (krun_child)."""
    library = Recorder(built)
    with pytest.raises(krun_child.Refused) as caught:
        orders(replace(spec, vcpus=vcpus), library)
    assert (caught.value.what, caught.value.detail) == ("vcpus", most)
    assert "krun_create_ctx" not in [call[0] for call in library.calls]
    orders(replace(spec, vcpus=int(most)), Recorder(built))


@pytest.mark.parametrize("name", [name for name in libkrun.NEEDED if name != "krun_start_enter"])
def test_the_first_call_that_fails_is_the_last(spec: VmSpec, name: str) -> None:
    library = Recorder(fails=name)
    with pytest.raises(krun_child.Refused) as caught:
        orders(spec, library)
    assert (caught.value.what, caught.value.code, caught.value.detail) == (name, 22, "its own words")
    assert [call[0] for call in library.calls].index(name) == len(library.calls) - 1


# --- the host, and what this backend cannot do ---


@pytest.fixture
def library(tmp_path: Path) -> str:
    path = tmp_path / "named.so"
    path.touch()
    return str(path)


def test_a_host_is_checked_for_its_kind_and_the_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "tool", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("nixbox.machine.krun.architecture", lambda: "x86_64")
    Krun(library).check_host()
    with pytest.raises(HostError, match="no such file"):
        Krun(library + ".gone").check_host()
    monkeypatch.setattr("nixbox.machine.krun.architecture", lambda: "aarch64")
    with pytest.raises(HostError, match="on x86_64 and on macOS, not on aarch64") as caught:
        Krun(library).check_host()
    assert "--backend qemu" in str(caught.value.hint)


def test_on_macos_this_python_has_to_be_signed_for_the_hypervisor(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    said = ""

    def codesign(argv: list[str], *, timeout_s: float, check: bool) -> run.Completed:
        asked.append(argv)
        return run.Completed(0 if said else 1, said, "")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("nixbox.machine.krun.architecture", lambda: "arm64")
    monkeypatch.setattr(run, "run", codesign)
    monkeypatch.setattr(run, "tool", lambda name: f"/usr/bin/{name}")
    with pytest.raises(HostError, match=r"lacks the entitlement com\.apple\.security\.hypervisor") as caught:
        Krun(library).check_host()
    assert "codesign --sign - --force --entitlements FILE" in str(caught.value.hint)
    assert sys.executable in str(caught.value.hint)
    said = "<plist><dict><key>com.apple.security.hypervisor</key><true/></dict></plist>"
    Krun(library).check_host()
    assert asked == [["codesign", "--display", "--entitlements", "-", "--xml", sys.executable]] * 2


def test_what_it_cannot_do_is_refused_in_words(tmp_path: Path) -> None:
    backend: Backend = Krun()
    sockets = Sockets.in_dir(tmp_path)
    with pytest.raises(HostError, match="of the backend krun cannot be copied") as copied:
        backend.move(sockets, sockets)
    with pytest.raises(HostError, match="of the backend krun cannot be given a directory") as given:
        backend.attach(sockets, "mnt0", 0)
    assert all("--backend qemu" in str(caught.value.hint) for caught in (copied, given))
    assert not backend.features.restore and not backend.features.hot_plug and not backend.features.emulates
    assert backend.queues(sockets, "mnt0") == ()
    assert backend.detach(sockets, "mnt0") is False
