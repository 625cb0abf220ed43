"""A tiny image in the place of Debian's, for tests of what happens to images between hosts: built in a moment."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from nixbox.image import lock
from nixbox.image.lock import Bootstrap, Lock, LockedPackage
from nixbox.plan.model import ImageSpec, Script

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
            base_requested=(),
            bootstrap=Bootstrap(package=package("busybox-static"), nar_hash="sha256-" + "A" * 43 + "="),
            kernel=package("linux"),
            tools=(),
            base_packages=(package("bash"),),
            packages=(),
        )
    )


def spec(*scripts: str, network: bool = False) -> ImageSpec:
    """What the tiny image is to be; the scripts write below $out, with busybox as $b."""
    return ImageSpec("debian", "trixie", (), tuple(Script("profile dev", text) for text in scripts), network)
