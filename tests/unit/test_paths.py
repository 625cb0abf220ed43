"""Files that are written whole, and where an image's files lie."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from pathlib import Path
from typing import NoReturn

import pytest

from nixbox import digests, paths
from nixbox.errors import NixboxError
from nixbox.image import build, store


@pytest.mark.parametrize("synced", [True, False])
def test_a_file_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool) -> None:
    synced_modes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced_modes.append(stat.S_IFMT(os.fstat(fd).st_mode)))
    file = tmp_path / "file"
    file.write_text("before")
    paths.write_atomic(file, "ä", mode=0o640, synced=synced)
    assert (file.read_text(encoding="utf-8"), stat.S_IMODE(file.stat().st_mode)) == ("ä", 0o640)
    assert list(tmp_path.iterdir()) == [file]
    assert synced_modes == ([stat.S_IFREG, stat.S_IFDIR] if synced else [])


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "file"
    file.write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NixboxError, match="no space left to write"):
        paths.write_atomic(file, "after")
    assert (file.read_text(), list(tmp_path.iterdir())) == ("before", [file])


def test_an_images_files_are_looked_for_until_they_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "private_root", lambda: tmp_path)
    image = build.Image(store.STORE / "hash-image", tmp_path / "root", fresh=False)
    with pytest.raises(FileNotFoundError):
        image.file("root.img")
    assert image.sidecars == ()
    place = tmp_path / "nix/store/hash-image"
    (place / "sidecars").mkdir(parents=True)
    disk = tmp_path / "nix/store/hash-disk"
    for link in ("root.img", "sidecars/0", "sidecars/1"):
        (place / link).symlink_to(store.STORE / "hash-disk")
    with pytest.raises(FileNotFoundError):
        image.file("root.img")
    disk.touch()
    assert [image.file("root.img"), *image.sidecars] == [disk] * 3
    (place / "root.img").unlink()
    assert image.file("root.img") == disk, "what a store path holds never changes: it is not looked at again"


def test_a_tree_is_removed_and_one_that_is_not_there_is_none(tmp_path: Path) -> None:
    tree, link = tmp_path / "tree", tmp_path / "link"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/file").write_text("x")
    link.symlink_to(tree)
    paths.remove_tree(link)  # not a directory: left alone, and what it leads to as well
    assert (tree / "a/file").exists()
    for _ in range(2):
        paths.remove_tree(tree)
        assert not tree.exists()


def test_a_full_disk_is_said_beforehand(tmp_path: Path) -> None:
    paths.require_space(tmp_path, 1, "a test")
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(NixboxError, match=r"no space left for a test: .*MiB free"):
        paths.require_space(tmp_path, free * 2 + 1, "a test")


@pytest.mark.parametrize("name", digests.__all__)
@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 1000])
def test_digests_are_those_of_hashlib(name: str, data: bytes) -> None:
    digest = getattr(digests, name)(data[:7])
    digest.update(data[7:])
    assert digest.hexdigest() == getattr(hashlib, name)(data).hexdigest()
