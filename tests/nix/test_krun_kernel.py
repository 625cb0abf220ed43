"""libkrun's kernel and first root, built by Nix itself out of the installed library, in a store of their own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nixbox import paths
from nixbox.errors import NixboxError
from nixbox.image import fetch, krunfw, lock, store
from nixbox.image.apt import Mirrors
from nixbox.image.lock import Bootstrap, KrunKernel, Lock, LockedPackage
from nixbox.plan import nixexpr
from nixbox.run import Completed, run

HANG_S = 120.0
MIRRORS = Mirrors("http://mirror.example/debian", None)


def static_busybox() -> Path | None:
    """A busybox of this host that needs no loader: the sandbox has none."""
    found = shutil.which("busybox")
    return Path(found) if found and b"/ld-linux" not in Path(found).read_bytes()[:4096] else None


pytestmark = [
    pytest.mark.skipif(shutil.which("nix-store") is None, reason="no nix-store on this host"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="libkrun's kernel is taken on x86_64 only so far"),
    pytest.mark.skipif(importlib.util.find_spec("smol") is None, reason="smolmachines is not installed"),
    pytest.mark.skipif(static_busybox() is None, reason="no static busybox on this host"),
]


@dataclass(frozen=True)
class World:
    """A store that holds the builder, and a lock that asks for nothing else."""

    place: Path
    library: Path
    kernel: KrunKernel
    lock: Lock

    def build(self, what: str, *options: str, **changes: object) -> Completed:
        """`nix build` of a part of the Debian base, with a kernel that differs from the real one by `changes`."""
        file = self.place / "nixbox.lock"
        # Not validated: what the lock's reader refuses, the build must notice too.
        lock.save(self.lock.model_copy(update={"krun": self.kernel.model_copy(update=changes)}), file)
        arguments: dict[str, nixexpr.Value] = {
            "lock": nixexpr.Call("builtins.fromJSON", nixexpr.Call("builtins.readFile", file)),
            "mirrors": {},
            "system": "x86_64-linux",
            "build": [],
            "buildNetwork": False,
            "sidecar": [],
            "guest": paths.nix_dir() / "guest",
        }
        base = nixexpr.Call("import", paths.nix_dir() / "bases/debian")
        (self.place / "base.nix").write_text(nixexpr.render(nixexpr.Call(base, arguments)))
        argv = ["nix", *store.setup().options, "build", "-L", "--no-link", "--json", *options]
        argv += ["-f", str(self.place / "base.nix"), what]
        return run(argv, timeout_s=HANG_S, check=False, env=store.env())

    def built(self, what: str) -> Path:
        """Where the result really lies."""
        done = self.build(what)
        assert done.code == 0, done.stderr
        return store.physical(Path(json.loads(done.stdout)[0]["outputs"]["out"]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    place = tmp_path_factory.mktemp("krun")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "private_root", lambda: place / "root")
        patched.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patched.delenv("NIXBOX_LIBKRUNFW", raising=False)
        busybox = static_busybox()
        assert busybox is not None
        tree = place / fetch.BUSYBOX / "bin"
        tree.mkdir(parents=True)
        shutil.copy(busybox, tree / "busybox")
        (tree / "busybox").chmod(0o555)
        # Stands for every .deb of the lock: none is opened, for the builder is there already.
        deb = LockedPackage(
            name="busybox-static",
            version="1",
            arch="amd64",
            repo="debian",
            path="pool/main/b/busybox-static_1_amd64.deb",
            size=1,
            sha256=hashlib.sha256(b"x").hexdigest(),
        )
        (place / fetch.deb_name(deb)).write_bytes(b"x")
        store.add_files([place / fetch.deb_name(deb)])
        store.add_tree(tree.parent)
        value = Lock(
            format=1,
            base="debian",
            suite="trixie",
            arch="amd64",
            requested=(),
            base_requested=(),
            bootstrap=Bootstrap(package=deb, nar_hash=store.nar_hash(tree.parent)),
            kernel=deb,
            tools=(),
            base_packages=(),
            packages=(),
        )
        library = krunfw.find()
        kernel = krunfw.inspect(library)
        yield World(place, library, kernel, value.model_copy(update={"krun": kernel}))


def test_a_library_that_is_neither_here_nor_in_the_store(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # First of all tests here: the others bring it.
    monkeypatch.setattr(krunfw, "locate", lambda library=None: None)
    with pytest.raises(
        NixboxError, match=f"names the libkrunfw of {world.kernel.origin} .*, and none is here"
    ) as caught:
        fetch.ensure(world.lock, MIRRORS)
    assert caught.value.hint == f"pip install {world.kernel.origin.replace(' ', '==')}"
    done = world.build("krun.kernel")
    assert done.code != 0
    assert f"libkrunfw.so.5 ({world.kernel.origin}) is not in the Nix store" in done.stderr


def test_another_library_is_not_taken(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other.so").write_bytes(b"x")
    monkeypatch.setenv("NIXBOX_LIBKRUNFW", str(tmp_path / "other.so"))
    with pytest.raises(NixboxError, match="and the one of libkrunfw is here") as caught:
        fetch.ensure(world.lock, MIRRORS)
    assert "nixbox lock" in (caught.value.hint or "")


def test_the_library_comes_into_the_store_under_the_name_of_the_lock(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "renamed.so").symlink_to(world.library)
    monkeypatch.setenv("NIXBOX_LIBKRUNFW", str(tmp_path / "renamed.so"))
    assert fetch.ensure(world.lock, MIRRORS) == 0  # nothing was fetched
    path = store.flat_path(world.kernel.file, world.kernel.sha256)
    assert store.physical(path).read_bytes() == world.library.read_bytes()
    # From now on it need not be here.
    monkeypatch.setenv("NIXBOX_LIBKRUNFW", str(tmp_path / "gone.so"))
    fetch.ensure(world.lock, MIRRORS)


def test_the_kernel_is_an_elf_file_of_one_segment(world: World) -> None:
    fetch.ensure(world.lock, MIRRORS)
    data = (world.built("krun.kernel") / "vmlinux").read_bytes()
    kernel = world.kernel
    # elf(5): Elf64_Ehdr and Elf64_Phdr
    head = struct.unpack_from("<16sHHIQQQIHHHHHH", data)
    assert head[0] == b"\x7fELF\x02\x01\x01" + bytes(9)
    assert head[1:] == (2, 62, 1, kernel.entry, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    kind, _flags, start, virtual, physical, in_file, in_memory, align = struct.unpack_from("<IIQQQQQQ", data, 64)
    assert (kind, virtual, physical, in_file, in_memory) == (
        1,
        kernel.load,
        kernel.load,
        kernel.length,
        kernel.length,
    )
    assert start % align == virtual % align
    assert not any(data[64 + 56 : start])
    whole = world.library.read_bytes()
    assert data[start:] == whole[kernel.offset : kernel.offset + kernel.length]


def test_the_first_root_is_what_the_initrd_is_made_of(world: World) -> None:
    boot = world.built("krun.boot")
    guest = paths.nix_dir() / "guest"
    scripts = {f"nixbox/{file.name}" for file in guest.iterdir()} - {"nixbox/stage1"}
    assert {str(path.relative_to(boot)) for path in boot.rglob("*")} == {
        *("init", "bin", "bin/busybox", "bin/sh", "dev", "proc", "sys", "run"),
        *("lower", "overlay", "new", "modules", "nixbox", *scripts),
    }
    assert (boot / "init").read_bytes() == (guest / "stage1").read_bytes()
    assert (boot / "bin/sh").readlink() == Path("busybox")
    assert all((boot / name).stat().st_mode & 0o111 for name in ("init", "bin/busybox", *scripts))


@pytest.mark.parametrize("what", ["krun.kernel", "krun.boot"])
def test_it_is_built_again_as_it_was(world: World, what: str) -> None:
    fetch.ensure(world.lock, MIRRORS)
    world.built(what)
    done = world.build(what, "--rebuild")
    assert done.code == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length": 2**40}, "the library ends before it does"),
        ({"offset": 2**30}, "the library ends before it does"),
        ({"offset": 0, "length": 4096}, "it is no Linux 6"),
        ({"release": "6.0.0"}, "it is no Linux 6.0.0"),
        ({"entry": 1}, "its entry is not in it"),
        ({"load": 2**62}, "its entry is not in it"),
    ],
)
def test_a_place_that_is_not_the_kernels_is_noticed(world: World, changes: dict[str, object], said: str) -> None:
    fetch.ensure(world.lock, MIRRORS)
    done = world.build("krun.kernel", **changes)
    assert done.code != 0
    assert f"the kernel in libkrunfw: {said}" in done.stderr
