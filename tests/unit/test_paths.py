"""Files that are written whole, and where an image's files lie."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NoReturn

import pytest

from nixbox import paths
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
