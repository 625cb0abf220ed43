"""In what two builds differ: trees, initrds, file systems. Images are made by the host's tools where it has them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nixbox.errors import NixboxError
from nixbox.image import check, listing
from nixbox.image.listing import Difference, Entry


def tree(place: Path) -> Path:
    """Two directories, files of all kinds, a link."""
    (place / "etc/empty").mkdir(parents=True)
    (place / "etc/motd").write_text("hello\n")
    (place / "etc/long").write_text("x" * 20_000)
    (place / "run").write_text("#!/bin/sh\n")
    (place / "run").chmod(0o755)
    (place / "link").symlink_to("etc/motd")
    return place


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    """The same tree twice."""
    return tree(tmp_path / "a"), tree(tmp_path / "b")


def rows(found: list[Difference]) -> list[tuple[str, str, str, str]]:
    return [(d.path, d.what, d.built, d.again) for d in found]


def test_the_same_trees_differ_in_nothing(trees: tuple[Path, Path]) -> None:
    (trees[1] / "etc/motd").touch()  # no part of a NAR
    assert listing.differences(*trees, "out", None) == []


def test_every_kind_of_difference_is_named(trees: tuple[Path, Path]) -> None:
    one, other = trees
    (other / "etc/motd").write_text("HELLO\n")
    (other / "run").chmod(0o644)
    (other / "link").unlink()
    (other / "link").symlink_to("run")
    (other / "new").write_text("")
    (other / "etc/empty").rmdir()
    (other / "etc/long").unlink()
    (other / "etc/long").mkdir()
    found = rows(listing.differences(one, other, "out", None))
    assert ("out/run", "mode", "executable", "-") in found
    assert ("out/link", "content", "etc/motd", "run") in found
    assert ("out/new", "is there", "no", "yes") in found
    assert ("out/etc/empty", "is there", "yes", "no") in found
    assert ("out/etc/long", "kind", "file", "directory") in found
    assert [row[:2] for row in found if row[0] == "out/etc/motd"] == [("out/etc/motd", "content")]
    assert {row[0] for row in found} == {
        f"out/{n}" for n in ("run", "link", "new", "etc/empty", "etc/long", "etc/motd")
    }


def cpio(place: Path, target: Path) -> Path:
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    argv = ["busybox", "cpio", "-o", "-H", "newc"]
    done = subprocess.run(argv, cwd=place, input="\n".join(names).encode(), capture_output=True, check=True)
    target.write_bytes(done.stdout)
    return target


@pytest.mark.skipif(shutil.which("busybox") is None, reason="no busybox on this host")
def test_an_initrd_is_looked_into(trees: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = trees
    (other / "etc/motd").write_text("HELLO\n")
    (other / "run").chmod(0o700)
    a, b = cpio(one, tmp_path / "a.img"), cpio(other, tmp_path / "b.img")
    found = rows(listing.differences(a, b, "initrd", None))
    assert ("initrd:/run", "mode", "0755", "0700") in found
    assert any(row[:2] == ("initrd:/etc/motd", "content") for row in found)
    assert not any("long" in row[0] for row in found)


def erofs(place: Path, target: Path) -> Path:
    argv = ["mkfs.erofs", "-zlz4", "--quiet", "-U", "00000000-0000-0000-0000-000000000000", "-T", "1"]
    subprocess.run([*argv, target, place], capture_output=True, check=True)
    return target


def squashfs(place: Path, target: Path) -> Path:
    subprocess.run(["mksquashfs", place, target, "-quiet", "-no-progress", "-all-time", "1"], check=True)
    return target


IMAGES = [
    pytest.param(
        make,
        marks=pytest.mark.skipif(
            not all(shutil.which(tool) for tool in tools), reason=f"{tools[0]} is not on this host"
        ),
        id=tools[0],
    )
    for make, tools in ((erofs, ("mkfs.erofs", "fsck.erofs")), (squashfs, ("mksquashfs", "unsquashfs")))
]


@pytest.mark.parametrize("make", IMAGES)
def test_a_file_system_is_looked_into(make, trees: tuple[Path, Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    one, other = trees
    for number in range(500):  # a directory of more than a block
        for place in trees:
            (place / f"etc/{number:04}-with-a-longer-name").write_text(str(number))
    (other / "etc/long").write_text("x" * 19_999 + "y")
    (other / "run").chmod(0o4755)
    (other / "link").unlink()
    (other / "link").symlink_to("run")
    (other / "etc/0300-with-a-longer-name").unlink()
    a, b = make(one, tmp_path / "a.img"), make(other, tmp_path / "b.img")
    found = {row[:2]: row[2:] for row in rows(listing.differences(a, b, "root", None))}
    assert set(found) == {
        ("root:/etc/long", "content"),
        ("root:/run", "mode"),
        ("root:/link", "content"),
        ("root:/etc/0300-with-a-longer-name", "is there"),
    }
    assert found["root:/link", "content"] == ("etc/motd", "run")


@pytest.mark.parametrize("make", IMAGES)
def test_another_layout_is_told_from_other_files(make, trees: tuple[Path, Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    a = make(trees[0], tmp_path / "a.img")
    b = tmp_path / "b.img"
    b.write_bytes(a.read_bytes() + bytes(4096))
    (found,) = listing.differences(a, b, "root", None)
    assert found.what == "layout, with the same files in it"
    assert found.built == f"byte {a.stat().st_size}"


@pytest.mark.parametrize("place", [1024 + 12, 1024 + 14, 1024 + 40])
def test_a_damaged_file_system_is_still_a_difference(place: int, trees: tuple[Path, Path], tmp_path: Path) -> None:
    if not shutil.which("mkfs.erofs"):
        pytest.skip("mkfs.erofs is not on this host")
    a = erofs(trees[0], tmp_path / "a.img")
    data = bytearray(a.read_bytes())
    data[place] ^= 0xFF
    (tmp_path / "b.img").write_bytes(data)
    found = listing.differences(a, tmp_path / "b.img", "root", None)
    assert found and all(difference.path.startswith("root") for difference in found)


def test_what_only_looks_like_an_image_is_a_file(tmp_path: Path) -> None:
    for magic in (b"hsqs", b"070701", b"\0" * 1024 + b"\xe2\xe1\xf5\xe0"):
        (tmp_path / "a").write_bytes(magic + b"a" * 3000)
        (tmp_path / "b").write_bytes(magic + b"b" * 3000)
        found = rows(listing.differences(tmp_path / "a", tmp_path / "b", "x", None))
        assert [row[:2] for row in found] == [("x", "content")], magic


def test_entries_say_each_field_that_differs() -> None:
    a, b = Entry("file", "0644", "0/0", "1", 5, "x"), Entry("file", "0600", "0/7", "2", 6, "y")
    found = listing._entry("p", a, b)
    assert [(d.what, d.built, d.again) for d in found] == [
        ("mode", "0644", "0600"),
        ("owner", "0/0", "0/7"),
        ("time", "1", "2"),
        ("size", "5", "6"),
        ("content", "x", "y"),
    ]


# --- derivations ---

PLAIN = 'Derive([("out","/nix/store/x-a","","")],[("/nix/store/y.drv",["out"])],[],"x86_64-linux","b",[],[("a","(")])'
FIXED = 'Derive([("out","/nix/store/x-b.deb","sha256","00")],[],[],"builtin","builtin:fetchurl",[],[])'
TWO = 'Derive([("dev","/nix/store/x-dev","",""),("out","/nix/store/x-out","","")],[],[],"s","b",[],[])'


@pytest.mark.parametrize(
    ("text", "outputs"),
    [
        (PLAIN, [("/nix/store/x-a", "")]),
        (FIXED, [("/nix/store/x-b.deb", "sha256")]),
        (TWO, [("/nix/store/x-dev", ""), ("/nix/store/x-out", "")]),
    ],
)
def test_outputs_of_a_derivation(text: str, outputs: list[tuple[str, str]]) -> None:
    assert check.outputs(text) == outputs


def test_a_long_list_of_differences_is_cut_for_people_alone() -> None:
    step = check.Step(Path("/nix/store/x.drv"), Path("/nix/store/" + "a" * 32 + "-out"))
    many = check.Checked(step, tuple(Difference(f"out/{i}", "content", "a", "b") for i in range(100)))
    error = check.report([many])
    assert error is not None and "out: 100 differences" in error.message and "out/39: content: a / b" in error.message
    assert "out/40:" not in error.message and "… and 60 more" in error.message
    assert len(many.as_json()["differences"]) == 100  # type: ignore[arg-type]


def test_what_is_no_derivation() -> None:
    with pytest.raises(NixboxError, match="not a derivation"):
        check.outputs("DrvWithVersion(")
