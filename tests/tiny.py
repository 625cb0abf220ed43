"""A tiny image in the place of Debian's, for tests of what happens to images between hosts: built in a moment."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nixbox import paths
from nixbox.image import build, ensure, lock, store
from nixbox.image.lock import Bootstrap, Lock, LockedPackage
from nixbox.plan.model import ImageSpec, Script
from nixbox.report import Reporter

BUSYBOX = shutil.which("busybox", path="/bin:/usr/bin")

IMAGE = """
{ lock, mirrors ? { }, build ? [ ], buildNetwork ? false }:
let
  b = "${./tools}/bin/busybox";
  run = name: script: derivation {
    inherit name;
    system = builtins.currentSystem;
    builder = b;
    args = [ "sh" "-euc" "b=${b}\\n${script}" ];
  };
  initrd = run "tiny-initrd" "echo ${lock.suite} > $out";
  meta = builtins.toJSON {
    inherit (lock) arch base suite requested;
    packages = [ ];
    reproducible = !(buildNetwork && build != [ ]);
  };
  image = run "tiny-image" ''
    $b mkdir -p $out/etc
    $b ln -s ${initrd} $out/initrd
    echo '${meta}' > $out/image.json
    ${builtins.concatStringsSep "\\n" (map (s: s.script) build)}
  '';
in
{ inherit image; inputs = initrd; }
"""


def write(nix: Path) -> Path:
    """Write the tiny image's files: what `paths.nix_dir` is to name."""
    (nix / "tools/bin").mkdir(parents=True)
    assert BUSYBOX is not None
    shutil.copy(BUSYBOX, nix / "tools/bin/busybox")
    (nix / "image.nix").write_text(IMAGE)
    return nix


def package(name: str) -> LockedPackage:
    """A package of which nothing exists but its name."""
    return LockedPackage(
        name=name, version="1", arch="amd64", repo="debian", path=f"pool/{name}.deb", size=1, sha256="0" * 64
    )


def lock_text(suite: str = "trixie") -> str:
    """A whole lock, of which the tiny image uses the suite."""
    return lock.dump(
        Lock(
            format=1,
            base="debian",
            suite=suite,
            arch="amd64" if platform.machine() == "x86_64" else "arm64",
            requested=(),
            base_requested=("dropbear-bin", "e2fsprogs", "openssh-server"),
            bootstrap=Bootstrap(package=package("busybox-static"), nar_hash="sha256-" + "A" * 43 + "="),
            kernel=package("linux"),
            tools=(package("erofs-utils"),),
            base_packages=(package("bash"),),
            packages=(),
        )
    )


def spec(*scripts: str, network: bool = False) -> ImageSpec:
    """What the tiny image is to be; the scripts write below $out, with busybox as $b."""
    return ImageSpec("debian", "trixie", (), tuple(Script("profile dev", text) for text in scripts), network)


@dataclass
class Host:
    """A host with a store and a cache directory of its own; `use` makes this process be on it."""

    path: Path
    patch: pytest.MonkeyPatch

    def use(self) -> Host:
        self.path.mkdir(exist_ok=True)
        self.patch.setenv("NIX_REMOTE", str(self.path / "store"))
        self.patch.setenv("XDG_CACHE_HOME", str(self.path / "cache"))
        for cached in (store.private_root, store.setup):
            cached.cache_clear()
        return self

    def build(self, what: ImageSpec, text: str) -> build.Image:
        """Build the tiny image on this host."""
        key = build.key(what, text)
        expression = build.expression(what, ensure.keep_lock(key, text), {})
        return build.build(what, key, expression, Reporter())

    @property
    def held(self) -> set[str]:
        """The names of what is in the store, .drv files and tools apart."""
        found = {path.name[33:] for path in (self.path / "store/nix/store").glob("*-tiny-*") if path.suffix != ".drv"}
        return {name for name in found if not name.endswith(".lock")}


class Hosts:
    """As many hosts as a test names."""

    def __init__(self, place: Path, patch: pytest.MonkeyPatch) -> None:
        self.place, self.patch = place, patch

    def __call__(self, name: str) -> Host:
        return Host(self.place / name, self.patch).use()


def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Hosts without anything in their stores, and the tiny image's files in the place of nixbox's own (a fixture)."""
    nix = write(tmp_path / "nix")
    monkeypatch.setattr(paths, "nix_dir", lambda: nix)
    yield Hosts(tmp_path, monkeypatch)
    monkeypatch.undo()
    for cached in (store.private_root, store.setup):
        cached.cache_clear()
    for path in tmp_path.glob("*/store"):  # read-only directories
        subprocess.run(["chmod", "-R", "u+w", str(path)], check=True)
