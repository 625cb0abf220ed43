"""The stand-in for nixpkgs: its tree put together, and into the Nix store under the hash that a lock then names.

Nothing of nixbox is changed for it: the lock's pin has the stand-in's hash, by which Nix finds the tree in the store.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import sys
from pathlib import Path

from nixbox import paths
from nixbox.image import apt, fetch, github, lock, store
from nixbox.image.lock import Bootstrap, Lock, LockedPackage, NixpkgsLock, NixpkgsPin

STAND_IN = Path(__file__).parent / "standin"
# The Debian packages that its derivations are made of, beside those that every Debian lock has.
REQUEST = ("jq", "libjq1", "netbase", "nix-bin", "patchelf", "sqlite3", "tree", "zlib1g")
PIN = {"owner": "stand-in", "repo": "nixpkgs", "ref": "trunk", "rev": "0123456789abcdef" * 2 + "01234567"}


def a_deb(name: str, version: str = "1:2.0-3+b1") -> LockedPackage:
    """A package of which nothing exists but its name: evaluation needs no files."""
    return LockedPackage(
        name=name,
        version=version,
        arch="amd64",
        repo="debian",
        path=f"pool/main/x/{name}_amd64.deb",
        size=10,
        sha256=hashlib.sha256(f"{name} {version}".encode()).hexdigest(),
    )


def debian_lock(**versions: str) -> Lock:
    """A lock with every .deb that the stand-in's derivations name."""
    text = "".join((STAND_IN / name).read_text() for name in ("default.nix", "offered.nix", "make.nix"))
    lists = re.findall(r'(?:package|library) "[^"]+" \[([^\]]*)\]', text)
    names = sorted({name for words in lists for name in re.findall(r'"([^"]+)"', words)})
    assert set(REQUEST) - {"patchelf"} <= set(names), "something is asked for and not used"
    return Lock(
        format=1,
        base="debian",
        suite="trixie",
        arch="amd64",
        requested=(),
        base_requested=(),
        bootstrap=Bootstrap(
            package=a_deb("busybox-static"),
            nar_hash="sha256-" + base64.b64encode(hashlib.sha256(b"busybox").digest()).decode(),
        ),
        kernel=a_deb("linux-image-6.12.9+deb13-cloud-amd64"),
        tools=(a_deb("mmdebstrap"),),
        base_packages=tuple(a_deb(name, versions.get(name.replace("-", "_"), "1:2.0-3+b1")) for name in names),
        packages=(),
    )


def write_tree(directory: Path, debian: Lock) -> Path:
    """Write the stand-in's tree for a lock of the Debian base (with REQUEST) to `directory`, and return that."""
    shutil.copytree(STAND_IN, directory)
    (directory / "debian").mkdir()
    for name in ("fetch.nix", "tools.nix"):
        shutil.copy(paths.nix_dir() / "bases/debian" / name, directory / "debian" / name)
    lock.save(debian, directory / "lock.json")
    return directory


def pin(tree: Path, **changes: str) -> NixpkgsPin:
    """The pin of a tree, which must be called `source`; it is put into the store."""
    assert tree.name == github.STORE_NAME
    found = NixpkgsPin(**{**PIN, "hash": store.nar_hash(tree), "date": "2026-07-04", **changes})
    store.add_tree(tree)
    return found


def main(directory: str, debian: str, target: str) -> None:
    """Put the stand-in together in `directory`, with its .debs in the store, and write a lock of it to `target`.

    For a process of its own, with the environment of the machines' home. `debian` is a lock of the Debian base.
    """
    found = lock.load(Path(debian))
    assert isinstance(found, Lock)
    fetch.ensure(found, apt.mirrors(None, None))
    tree = write_tree(Path(directory) / github.STORE_NAME, found)
    new = NixpkgsLock(format=1, base="nixpkgs", arch=found.arch, requested=(), nixpkgs=pin(tree))
    lock.save(new, Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
