"""The flake under a newer Nix than this host may have: Debian's, of the suite that images are made of."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixbox.errors import NixboxError
from nixbox.image import apt, fetch, lock, store
from nixbox.image.resolve import default_arch
from nixbox.run import CommandError, run
from tests.flakes import HELLO_LOCK, Clone, make_clone

SUITE = "trixie"
UNPACK_S = 60.0
SYSTEM = f"{platform.machine()}-linux"


def debs() -> list[Path]:
    """Nix and the libraries that it loads, in this host's store. Raises NixboxError without a mirror."""
    mirrors = apt.mirrors(None, None)
    with apt.open_root(SUITE, default_arch(), mirrors) as root:
        root.update()
        every = root.resolve(["nix-bin"])
    wanted = [p for p in every if p.name == "nix-bin" or (p.name.startswith("lib") and "perl" not in p.name)]
    hello = lock.load(HELLO_LOCK)
    assert isinstance(hello, lock.Lock)
    bootstrap = hello.bootstrap  # it is there anyhow, and has to be of the same kind
    fetch.ensure_packages([*wanted, bootstrap.package], bootstrap, mirrors)
    return [store.physical(fetch.deb_path(package)) for package in wanted]


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Clone, Clone]]:
    """The flake with this host's Nix, and with the newer one."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb on this host")
    top = tmp_path_factory.mktemp("newer")
    clone = make_clone(top)
    tree = tmp_path_factory.mktemp("nix")
    try:
        found = debs()
    except NixboxError as error:
        pytest.skip(f"Debian {SUITE}'s Nix cannot be had here: {error}")
    for deb in found:
        run(["dpkg-deb", "--extract", str(deb), str(tree)], timeout_s=UNPACK_S)
    libraries = next((tree / "usr/lib").glob("*/libc.so.6")).parent
    loader = next(libraries.glob("ld-linux-*"))
    program = (str(loader), "--library-path", str(libraries), str(tree / "usr/bin/nix"))
    yield clone, dataclasses.replace(clone, program=program)


def test_it_is_newer_than_2_8(clones: tuple[Clone, Clone]) -> None:
    version = re.search(r"(\d+)\.(\d+)", clones[1].nix("--version"))
    assert version is not None
    assert tuple(map(int, version.groups())) > (2, 8)


def test_show_and_metadata_need_no_nixpkgs(clones: tuple[Clone, Clone]) -> None:
    shown = json.loads(clones[1].nix("flake", "show", "--json", "--all-systems"))
    assert shown["packages"]["aarch64-linux"]["nixbox-debian"]["type"] == "derivation"
    assert shown["checks"]["x86_64-linux"]["nix"]["name"] == "nixbox-check-nix"
    assert shown["nixosModules"]["nixbox"]["type"] == "nixos-module"
    pin = json.loads(clones[1].nix("flake", "metadata", "--json"))["locks"]["nodes"]["nixpkgs"]
    assert pin == json.loads((clones[1].repo / "flake.lock").read_text())["nodes"]["nixpkgs"]
    assert clones[1].git("status", "--porcelain") == ""


@pytest.mark.parametrize("output", ["nixbox-debian", "image-hello-debian"])
def test_both_make_the_same_derivations(clones: tuple[Clone, Clone], output: str) -> None:
    # hello's lock has one architecture, and this evaluates on any.
    system = "x86_64-linux" if output.startswith("image") else SYSTEM
    ours, newer = (clone.eval(f".#packages.{system}.{output}.drvPath") for clone in clones)
    assert newer == ours


def test_a_sandbox_and_its_faults_are_the_same(clones: tuple[Clone, Clone]) -> None:
    given = 'lock = ./repo/nix/flake/hello.lock; name = "demo"; config.resources.vcpus = 1;'
    sandbox = f'(flake.lib.mkSandbox {{ {given} packages = [ "jq" ]; }}).drvPath'
    ours, newer = (clone.value(sandbox) for clone in clones)
    assert newer == ours
    with pytest.raises(CommandError, match=r"lock: has other packages \(gone: jq\)"):
        clones[1].value(f"(flake.lib.mkSandbox {{ {given} }}).drvPath")


def test_what_needs_nixpkgs_asks_for_the_pinned_one(clones: tuple[Clone, Clone]) -> None:
    rev = json.loads((clones[1].repo / "flake.lock").read_text())["nodes"]["nixpkgs"]["locked"]["rev"]
    with pytest.raises(CommandError, match=rf"unable to download .*{rev}"):
        clones[1].nix("eval", f".#packages.{SYSTEM}.nixbox.drvPath")
