"""What is written for a guest's tar and what is believed of one: real trees, GNU tar, and archives no tar writes."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nixbox import paths
from nixbox.errors import ConfigError, NixboxError
from nixbox.guest import copy, inside, listing, seed, stream, tarread, tarwrite

OLD_NS = 1_234_567_890_123_456_789


def zoo(root: Path) -> None:
    """Every kind of file that is to survive, and some that are not."""
    (root / "empty").mkdir(parents=True)
    (root / "deep" / "er").mkdir(parents=True)
    (root / "file").write_bytes(b"some text\n")
    (root / "nothing").touch()
    (root / "deep" / "er" / "large").write_bytes(os.urandom(700_000))
    (root / "exact").write_bytes(b"x" * 1024)
    (root / "tool").write_bytes(b"#!/bin/sh\n")
    (root / "tool").chmod(0o4755)
    (root / "shut").write_bytes(b"mine")
    (root / "shut").chmod(0o400)
    (root / ("l" * 200)).mkdir()
    (root / ("l" * 200) / ("n" * 255)).write_bytes(b"long")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe not utf-8 \n")).write_bytes(b"bytes")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff" + b"z" * 150)).write_bytes(b"long bytes")
    (root / "grüße =1\n2").write_bytes(b"hello")
    (root / "-rf").write_bytes(b"dash")
    (root / "to file").symlink_to("file")
    (root / "to nothing").symlink_to("no/such/" + "thing" * 30)
    (root / "to root").symlink_to("/etc/passwd")
    os.link(root / "file", root / "deep" / "second name")
    os.link(root / "to file", root / "deep" / "second link")
    with (root / "holes").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"middle" * 1000)
        file.truncate(10 << 30)
    with (root / "hole").open("wb") as file:
        file.truncate(5 << 20)
    for i in range(50):
        (root / "empty" / f"{i}").write_bytes(bytes([i]) * i)
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(OLD_NS, OLD_NS + number), follow_symlinks=False)
    os.utime(root / "file", ns=(0, 1_000_000_000))
    os.utime(root / "exact", ns=(0, -1_500_000_000))
    (root / "deep").chmod(0o555)
    os.utime(root, ns=(OLD_NS, OLD_NS))


def tree(root: Path) -> dict[bytes, tuple[Any, ...]]:
    """What there is below a directory: kinds, modes, times, contents by hash, which names are one file."""
    found: dict[bytes, tuple[Any, ...]] = {}
    first: dict[int, bytes] = {}
    for directory, names, files in os.walk(os.fsencode(root)):
        for path in (directory, *(directory + b"/" + name for name in (*names, *files))):
            info = os.lstat(path)
            name = os.path.relpath(path, os.fsencode(root))
            what: object = None
            if stat.S_ISLNK(info.st_mode):
                what = Path(os.fsdecode(path)).readlink()
            elif stat.S_ISREG(info.st_mode):
                what = (info.st_size, _hash(path, info))
            one_of_many = info.st_nlink > 1 and stat.S_ISREG(info.st_mode)
            same = first.setdefault(info.st_ino, name) if one_of_many else b""
            found[name] = (stat.filemode(info.st_mode), info.st_mtime_ns, what, same if same != name else b"")
    return found


def _hash(path: bytes, info: os.stat_result) -> str:
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY)
    try:
        for offset, size in tarwrite.data_map(fd, info.st_size):
            data = os.pread(fd, size, offset).rstrip(b"\0")
            digest.update(data)
    finally:
        os.close(fd)
    return digest.hexdigest()


def pack(found: listing.Listing, out: Path) -> None:
    """A listing as one archive."""
    jobs = [*stream.split([found], 1), stream.last([found])]
    with out.open("wb") as file, inside.closing(inside.open_real(found.base)) as base:
        writer = tarwrite.TarWriter(file.fileno())
        writer.enter(base)
        for job in jobs:
            for _, entries in job:
                for entry in entries:
                    writer.add(entry)
        writer.finish()
        writer.close()


def unpack(archive: bytes, target: Path, **options: Any) -> tarread.Unpacked:
    """An archive through a pipe into a directory."""
    read, write = os.pipe()

    def feed() -> None:
        try:
            with os.fdopen(write, "wb") as out:
                out.write(archive)
        except BrokenPipeError:
            pass

    thread = threading.Thread(target=feed)
    thread.start()
    root = os.open(target, inside.DIRECTORY)
    try:
        unpacker = tarread.Unpacker(root, **options)
        unpacker.unpack(tarread.Source(read), lambda: None)
        return unpacker.done
    finally:
        os.close(read)
        os.close(root)
        thread.join()


def member(name: bytes, kind: bytes = b"0", data: bytes = b"", **options: Any) -> bytes:
    """One member of a hand-made archive."""
    options = {"mode": 0o644, "mtime_ns": 0, "size": len(data)} | options
    return tarwrite.header(name, kind, **options) + data + bytes(-len(data) % 512)


END = bytes(1024)


# --- writing ---


def test_gnu_tar_makes_the_same_tree(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    zoo(source)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(source / "empty" / "socket"))
    os.mkfifo(source / "empty" / "fifo")
    os.utime(source / "empty", ns=(OLD_NS, OLD_NS))
    found = listing.scan(source, b"new")
    assert found.skipped == {"socket": 1, "fifo": 1}
    pack(found, tmp_path / "tar")
    assert (tmp_path / "tar").stat().st_size < 2 << 20  # ten GiB of hole weigh nothing
    target.mkdir()
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    argv = ["tar", "-xpPf", str(tmp_path / "tar"), *stream.TAR_OPTIONS, "-C", str(target)]
    done = subprocess.run(argv, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    (source / "empty" / "socket").unlink()
    (source / "empty" / "fifo").unlink()
    os.utime(source / "empty", ns=(OLD_NS, OLD_NS))
    assert tree(target / "new") == tree(source)
    assert (target / "new" / "holes").stat().st_blocks < 1000


def test_our_own_reader_makes_the_same_tree(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    zoo(source)
    (source / "to root").unlink()
    os.utime(source, ns=(OLD_NS, OLD_NS))
    (source / "tool").chmod(0o755)
    os.utime(source / "tool", ns=(OLD_NS, OLD_NS))
    found = listing.scan(source, b".")
    pack(found, tmp_path / "tar")
    target.mkdir()
    done = unpack((tmp_path / "tar").read_bytes(), target, fresh=True)
    assert tree(target) == tree(source)
    assert (done.files, done.skipped) == (found.count, {})


def test_a_tree_of_gnu_tar_is_read(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    zoo(source)
    (source / "tool").chmod(0o755)
    argv = ["tar", "-c", "--format=posix", "--sparse", "--pax-option=delete=atime,delete=ctime", "-C", str(source)]
    archive = subprocess.run([*argv, "-f", "-", "."], capture_output=True, check=True).stdout
    target.mkdir()
    done = unpack(archive, target, fresh=True)
    assert done.skipped == {"symbolic link that leads out": 1}
    (source / "to root").unlink()
    os.utime(source, ns=(OLD_NS, OLD_NS))
    assert tree(target) == tree(source)


def test_python_reads_what_is_written(tmp_path: Path) -> None:
    name = b"d/" + b"x" * 300
    header = tarwrite.header(name, b"0", mode=0o640, mtime_ns=-1_500_000_000, size=0)
    (tmp_path / "tar").write_bytes(header + tarwrite.header(b"big", b"5", mode=0o7777, mtime_ns=1 << 70) + END)
    with tarfile.open(tmp_path / "tar") as archive:
        one, two = archive.getmembers()
    assert (one.name, one.mode, one.mtime) == (name.decode(), 0o640, -1.5)
    assert (two.mode, two.mtime) == (0o7777, (1 << 70) / 1e9)


@pytest.mark.parametrize("length", range(81, 110))
def test_records_count_themselves(length: int) -> None:
    header = tarwrite.header(b"n" * (length + 20), b"0", mode=0, mtime_ns=0)
    text = header[512:1024].rstrip(b"\0")
    assert int(text.split(b" ")[0]) == len(text)


@pytest.mark.parametrize("how", ["grows", "shrinks", "vanishes", "is replaced", "becomes a link", "same size"])
def test_a_file_that_changes_is_an_error(tmp_path: Path, how: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x" * 5000)
    os.utime(source / "file", ns=(0, 1))
    found = listing.scan(source, b"new")
    changes: dict[str, Callable[[], object]] = {
        "grows": lambda: (source / "file").write_bytes(b"x" * 6000),
        "shrinks": lambda: (source / "file").write_bytes(b"x"),
        "vanishes": lambda: (source / "file").unlink(),
        "is replaced": lambda: (tmp_path / "other").rename(source / "file"),
        "becomes a link": lambda: (tmp_path / "link").rename(source / "file"),
        "same size": lambda: (source / "file").write_bytes(b"y" * 5000),
    }
    (tmp_path / "other").write_bytes(b"x" * 5000)
    os.utime(tmp_path / "other", ns=(0, 1))
    (tmp_path / "link").symlink_to("/etc/passwd")
    changes[how]()
    with pytest.raises(NixboxError, match="changed while it was read: file"):
        pack(found, tmp_path / "tar")


def test_a_directory_that_becomes_a_link_is_not_followed(tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret"
    (source / "d").mkdir(parents=True)
    secret.mkdir()
    for directory in (source / "d", secret):
        (directory / "key").write_bytes(b"x")
    found = listing.scan(source, b"new")
    (source / "d").rename(source / "away")
    (source / "d").symlink_to(secret)
    with pytest.raises(NixboxError, match="changed while it was read"):
        pack(found, tmp_path / "tar")


def test_a_file_that_comes_later_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "source" / "d").mkdir(parents=True)
    found = listing.scan(tmp_path / "source", b"new")
    with inside.closing(inside.open_real(found.base)) as base:
        tarwrite.check_unchanged(base, found.directories)
        (tmp_path / "source" / "d" / "late").touch()
        with pytest.raises(NixboxError, match="read: d got or lost files"):
            tarwrite.check_unchanged(base, found.directories)


# --- listing ---


def test_exclude_by_name_path_and_directory(tmp_path: Path) -> None:
    for name in ("a.log", "keep", "d/b.log", "d/keep", "build/x", "d/build/y", "tmp/z", "d/tmp", "cache/1/x.lock"):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).touch()
    found = listing.scan(tmp_path / "s", b"n", ["*.log", "/build", "tmp/", "cache/*.lock"])
    assert sorted(entry.name for entry in found.files) == [b"n/d/build/y", b"n/d/keep", b"n/d/tmp", b"n/keep"]
    assert b"n/cache/1" in {entry.name for entry in found.directories}
    with pytest.raises(ConfigError, match="excludes nothing"):
        listing.scan(tmp_path / "s", b"n", ["/"])


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NixboxError, match="is not there"):
        listing.scan(tmp_path / "none", b"n")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(NixboxError, match="neither a directory nor a regular file"):
        listing.scan(tmp_path / "fifo", b"n")


def test_every_unreadable_path_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        if parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    (tmp_path / "s" / "open").mkdir(parents=True)
    (tmp_path / "s" / "closed").mkdir(mode=0o700)
    for i in range(12):
        (tmp_path / "s" / f"file{i:02}").touch(mode=0o600)
    code = (
        # tempfile: this Python may lie where the other user cannot read.
        "import sys, os, tempfile\nsys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\nfrom nixbox.guest import listing\n"
        "os.environ['XDG_STATE_HOME'] = os.environ['HOME'] = '/nowhere'\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "else: [p.chmod(0) for p in Path(sys.argv[1]).rglob('*') if p.name != 'open']\n"
        "listing.scan(Path(sys.argv[1]), b'n')\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "s"), *sys.path]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "NixboxError: not everything in" in done.stderr
    assert [f"  {name}" in done.stderr for name in ("closed", "file00", "file08", "file09", "and 3 more")] == (
        [True, True, True, False, True]
    )


def test_nixboxs_own_directories_are_left_out(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    (workspace / ".nixbox" / "machines").mkdir(parents=True)
    (workspace / "file").touch()
    paths.remember(workspace)
    found = listing.scan(workspace, b"n")
    assert [entry.name for entry in found.files] == [b"n/file"]
    assert found.skipped == {"nixbox's own": 1}


def test_a_directory_that_got_the_inode_of_a_removed_workspace_is_copied(tmp_path: Path) -> None:
    """A file system gives the number of what was removed to the next one: a cache lost whole directories by that."""
    workspace, cache = tmp_path / "workspace", tmp_path / "cache"
    (workspace / ".nixbox").mkdir(parents=True)
    cache.mkdir()
    paths.remember(workspace)
    # The very directory, under the name that the next one with its number could have.
    (workspace / ".nixbox").rename(cache / "1.23.0")
    (cache / "1.23.0" / "a.jar").touch()
    workspace.rmdir()
    found = listing.scan(cache, b"n")
    assert ([entry.name for entry in found.files], found.skipped) == ([b"n/1.23.0/a.jar"], {})


def test_a_workspace_that_was_moved_keeps_its_own_to_itself(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    (workspace / ".nixbox").mkdir(parents=True)
    paths.remember(workspace)
    workspace.rename(tmp_path / "elsewhere")
    found = listing.scan(tmp_path, b"n")
    assert (found.files, found.skipped) == ((), {"nixbox's own": 1})


def test_a_cache_is_copied_without_nixboxs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (paths.cache_dir() / "templates").mkdir(parents=True)
    (paths.cache_dir() / "templates" / "memory").touch()
    (tmp_path / "cache" / "file").touch()
    found = listing.scan(tmp_path / "cache", b"n")
    assert ([entry.name for entry in found.files], found.skipped) == ([b"n/file"], {"nixbox's own": 1})


def test_to_know_nixboxs_own_directories_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345678)  # nobody's
    own = [path for path in paths.own_directories() if "nixbox-12345678" in path.parts]
    assert len(own) == 1 and own[0].name == "nixbox"
    assert not own[0].parent.exists()


def test_a_link_that_a_guest_may_have_made_is_refused(tmp_path: Path) -> None:
    shared, secret = tmp_path / "shared", tmp_path / "secret"
    (shared / "real").mkdir(parents=True)
    secret.mkdir()
    (secret / "key").touch()
    (shared / "cache").symlink_to(secret)
    (shared / "own").symlink_to("real")
    (tmp_path / "users").symlink_to(shared)
    (shared / ".nixbox").mkdir()
    paths.remember(shared, {shared: tmp_path / "lock"})
    for source in (shared / "cache", shared / "cache" / "key", tmp_path / "users" / "cache"):
        with pytest.raises(NixboxError, match="one of them may have made it"):
            listing.scan(source, b"n")
        with pytest.raises(NixboxError, match="one of them may have made it"):
            inside.real(source / "new")
    assert inside.real(tmp_path / "users" / "own") == shared / "real"


def test_the_digest_tells_every_difference(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "f"
    file.write_bytes(b"1")
    os.utime(file, ns=(0, 1))
    os.utime(tmp_path / "d", ns=(0, 1))
    before = {listing.scan(tmp_path / "d", b"n").digest}
    assert {listing.scan(tmp_path / "d", b"n").digest} == before
    file.chmod(0o600)
    before.add(listing.scan(tmp_path / "d", b"n").digest)
    os.utime(file, ns=(0, 2))
    before.add(listing.scan(tmp_path / "d", b"n").digest)
    os.utime(tmp_path / "d", ns=(0, 2))
    before.add(listing.scan(tmp_path / "d", b"n").digest)
    file.rename(tmp_path / "d" / "g")
    os.utime(tmp_path / "d", ns=(0, 2))
    before.add(listing.scan(tmp_path / "d", b"n").digest)
    assert len(before) == 5


# --- streams ---


def entries(sizes: Mapping[str, int]) -> listing.Listing:
    files = tuple(
        listing.Entry(name.encode(), name.encode(), "file", 0o644, size, 0, 0, i)
        for i, (name, size) in enumerate(sizes.items())
    )
    return listing.Listing(Path("/s"), Path("/s"), files, (), (), {}, "")


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_a_split_keeps_every_file_once_and_in_order(parts: int) -> None:
    found = [entries({f"a{i}": i * 1000 for i in range(100)}), entries({}), entries({"b": 0})]
    jobs = stream.split(found, parts)
    names = [entry.name for job in jobs for _, part in job for entry in part]
    assert names == [entry.name for one in found for entry in one.files]
    weights = [sum(entry.size + 20_000 for _, part in job for entry in part) for job in jobs]
    assert len(jobs) == parts
    assert max(weights) - min(weights) <= 2 * 119_000


def test_a_large_file_and_many_small_ones_go_apart() -> None:
    jobs = stream.split([entries({"large": 50_000_000, **{f"{i}": 10 for i in range(2500)}})], 2)
    large, small = [sum(len(part) for _, part in job) for job in jobs]
    assert (large <= 2, large + small) == (True, 2501)


def test_samples_come_from_all_over(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for i in range(8):
        (tmp_path / "s" / f"{i}").write_bytes(bytes([i]) * (2 << 20))
    data = stream.sample([listing.scan(tmp_path / "s", b"n")])
    assert len(data) == 8 << 20
    assert set(data) == set(range(8))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "f").write_bytes(b"x" * 1000)
    assert len(stream.sample([listing.scan(tmp_path / "t", b"n")])) == 1000


@pytest.mark.parametrize(
    ("path", "words"),
    [("~", '"$HOME"'), ("~/", '"$HOME"'), ("~/a b", "\"$HOME\"/'a b'"), ("/", "/"), ("/x/$y/", "'/x/$y'")],
)
def test_guest_paths_are_quoted(path: str, words: str) -> None:
    assert stream.shell_path(path) == words


@pytest.mark.parametrize("path", ["x", "", "~root/x", "/a\nb", "./x"])
def test_other_guest_paths_are_refused(path: str) -> None:
    with pytest.raises(ConfigError):
        stream.shell_path(path)


def test_the_definition_is_in_the_sentinels_name() -> None:
    one = seed.Wanted(Path("/a"), "~/t", ("x", "y"))
    assert one.ident == seed.Wanted(Path("/a"), "~/t/", ("y", "x")).ident
    others = [
        seed.Wanted(Path("/b"), "~/t", ("x", "y")),
        seed.Wanted(Path("/a"), "~/t"),
        seed.Wanted(Path("/a"), "/t"),
    ]
    assert len({one.ident, *(other.ident for other in others)}) == 4


def test_copy_sources_have_names() -> None:
    names = {"a": "a", "/x/b/": "b", "b/.": "", ".": "", "..": "", "~": "", "/": ""}
    assert {text: copy._last(text) for text in names} == names
    assert [copy.guest_path(text) for text in ("x", "", "~", "/x", "~/x")] == ["~/x", "~/", "~", "/x", "~/x"]


# --- an archive of a guest's ---

PLAIN = b"stays"


def contents(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def scene(tmp_path: Path) -> Iterator[Path]:
    """A target with a file and a link of the user's own in it, and a place outside that must stay as it is."""
    outside, target = tmp_path / "outside", tmp_path / "outside" / "target"
    target.mkdir(parents=True)
    (outside / "victim").write_bytes(PLAIN)
    (outside / "dir").mkdir()
    (target / "mine").write_bytes(PLAIN)
    (target / "way out").symlink_to(outside)
    before = tree(outside / "dir"), (outside / "victim").stat()
    names = contents(outside)
    yield target
    assert (tree(outside / "dir"), (outside / "victim").stat()) == before
    assert (contents(outside), (outside / "victim").read_bytes()) == (names, PLAIN)
    assert (target / "way out").is_symlink()


TO_PARENT = member(b"link", b"2", target=b"..")
HOSTILE: dict[str, bytes] = {
    "absolute name": member(b"/tmp/nixbox-evil", data=b"x"),
    "dots": member(b"../victim", data=b"x"),
    "dots inside": member(b"a/../../victim", data=b"x"),
    "dots in a directory": member(b"..", b"5"),
    "dots by pax": member(b"ok", data=b"x", pax={"path": b"../victim"}),
    "dots by a long name": member(b"././@LongLink", b"L", b"../victim\0") + member(b"ok", data=b"x"),
    "dots by a sparse name": member(
        b"ok",
        data=b"1\n0\n0\n".ljust(512, b"\0"),
        pax={
            "GNU.sparse.major": b"1",
            "GNU.sparse.minor": b"0",
            "GNU.sparse.name": b"../victim",
            "GNU.sparse.realsize": b"0",
        },
    ),
    "through a link that is there": member(b"way out/victim", data=b"x"),
    "a directory through a link that is there": member(b"way out/dir", b"5", mode=0o777),
    "a directory that is a link": member(b"way out", b"5", mode=0o777),
    "through a link of its own": member(b"in", b"2", target=b"a") + member(b"in/x", data=b"x"),
    "hard link outside": member(b"h", b"1", target=b"../victim"),
    "hard link to an absolute name": member(b"h", b"1", target=b"/etc/passwd"),
    "hard link through a link": member(b"h", b"1", target=b"way out/victim"),
    "hard link to what was there": member(b"h", b"1", target=b"mine"),
    "hard link to a directory": member(b"d", b"5") + member(b"h", b"1", target=b"d"),
    "hard link to itself": member(b"f", data=b"x") + member(b"f", b"1", target=b"f"),
    "name too long": member(b"ok", data=b"x", pax={"path": b"a/" * 3000 + b"x"}),
    "component too long": member(b"ok", data=b"x", pax={"path": b"a" * 300}),
    "zero in a name": member(b"ok", data=b"x", pax={"path": b"a\0b"}),
    "no name": member(b"", data=b"x"),
    "the top as a file": member(b".", data=b"x"),
    "huge pax header": tarwrite._block(b"pax", b"x", 0o644, 1 << 30, 0, b""),
    "huge long name": tarwrite._block(b"x", b"L", 0o644, 1 << 32, 0, b""),
    "pax record past its end": member(b"pax", b"x", b"99 path=x\n"),
    "pax record of no length": member(b"pax", b"x", b"0 path=x\n"),
    "pax record without a number": member(b"pax", b"x", b"path=x\n"),
    "pax record without a key": member(b"pax", b"x", b"5 xyz\n"),
    "negative size": member(b"f", data=b"", pax={"size": b"-1"}),
    "huge size": member(b"f", data=b"", pax={"size": b"9" * 30}),
    "binary size": member(b"f")[:124] + b"\xff" * 12 + member(b"f")[136:],
    "wrong time": member(b"f", pax={"mtime": b"1e9"}),
    "huge time": member(b"f", pax={"mtime": b"9" * 19}),
    "wrong checksum": member(b"f").replace(b"ustar", b"Ustar"),
    "not tar at all": b"#!/bin/sh\nrm -rf /\n".ljust(1024, b"\0"),
    "unknown type": member(b"f", b"Z"),
    "old sparse file": member(b"f", b"S"),
    "only extensions": member(b"pax", b"x", b"8 a=bcd\n") * 20,
    "too many members": b"",  # see its own test
    "truncated header": member(b"f")[:300],
    "truncated data": member(b"f", data=b"x" * 5000)[:2000],
    "truncated pax header": tarwrite.header(b"n" * 500, b"0", mode=0, mtime_ns=0)[:600],
    "no end": member(b"f", data=b"x"),
}
del HOSTILE["too many members"]


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused(tmp_path: Path, what: str) -> None:
    with scene(tmp_path) as target:
        whole = not what.startswith(("truncated", "no end"))
        with pytest.raises(NixboxError):
            unpack(HOSTILE[what] + (END if whole else b""), target)
        assert (target / "mine").read_bytes() == PLAIN
        assert (target / "mine").stat().st_nlink == 1
        assert not Path("/tmp/nixbox-evil").exists()
        if what.startswith("truncated"):
            assert not (target / "f").exists()  # what is half there is taken away


def sparse(numbers: bytes, data: bytes, real_size: int, **more: bytes) -> bytes:
    pax = {"major": b"1", "minor": b"0", "name": b"f", "realsize": str(real_size).encode()} | more
    content = numbers + bytes(-len(numbers) % 512) + data
    return member(b"f", data=content, pax={f"GNU.sparse.{key}": value for key, value in pax.items()}) + END


@pytest.mark.parametrize(
    ("numbers", "data", "real_size"),
    [
        (b"1\n0\n10\n", b"x" * 10, 5),  # data behind the end
        (b"1\n100\n10\n", b"x" * 10, 50),
        (b"2\n10\n10\n5\n10\n", b"x" * 20, 100),  # backwards
        (b"2\n0\n10\n5\n10\n", b"x" * 20, 100),  # twice
        (b"1\n0\n10\n", b"x" * 5, 100),  # less data than said
        (b"1\n0\n10\n", b"x" * 600, 1000),  # more
        (b"99999999\n", b"", 10),
        (b"3\n0\n", b"", 10),  # a map that does not end
        (b"-1\n", b"", 10),
        (b"1\n-5\n10\n", b"x" * 10, 100),
        (b"1\n9999999999999999999\n10\n", b"x" * 10, 100),
        (b"1" * 600, b"", 10),
        (b"x\n", b"", 10),
        (b"0\n", b"", (1 << 63) - 1),  # no file system holds it
    ],
)
def test_a_sparse_file_out_of_range_is_refused(tmp_path: Path, numbers: bytes, data: bytes, real_size: int) -> None:
    with scene(tmp_path) as target:
        with pytest.raises(NixboxError):
            unpack(sparse(numbers, data, real_size), target)
        assert not (target / "f").exists()


def test_other_sparse_formats_are_refused(tmp_path: Path) -> None:
    with scene(tmp_path) as target, pytest.raises(NixboxError, match="unknown format"):
        unpack(sparse(b"0\n", b"", 10, major=b"0", minor=b"1"), target)


@pytest.mark.parametrize(
    ("place", "target", "out"),
    [
        (b"l", b"file", False),
        (b"a/l", b"../file", False),
        (b"a/b/l", b"../../x/y", False),
        (b"a/l", b".", False),
        (b"l", b"./a//b", False),
        (b"l", b"..", True),
        (b"l", b"../target/mine", True),
        (b"a/l", b"../../x", True),
        (b"l", b"/etc/passwd", True),
        (b"l", b"/", True),
        (b"l", b"a/../b", True),  # a may be a link by then
        (b"a/l", b"../x/..", True),
    ],
)
def test_links_that_lead_out_are_left_out(tmp_path: Path, place: bytes, target: bytes, out: bool) -> None:
    with scene(tmp_path) as root:
        done = unpack(member(place, b"2", target=target) + member(b"after", data=b"x") + END, root)
        assert os.path.lexists(os.fsencode(root) + b"/" + place) is not out
        assert done.skipped == ({"symbolic link that leads out": 1} if out else {})
        assert (root / "after").read_bytes() == b"x"


def test_devices_and_rights_do_not_come(tmp_path: Path) -> None:
    with scene(tmp_path) as target:
        archive = member(b"null", b"3", mode=0o666) + member(b"disk", b"4") + member(b"fifo", b"6")
        archive += member(b"root", data=b"x", mode=0o6755) + member(b"tmp", b"5", mode=0o7777)
        done = unpack(archive + END, target)
        assert done.skipped == {"device": 2, "fifo": 1}
        assert stat.S_IMODE((target / "root").stat().st_mode) == 0o755
        assert stat.S_IMODE((target / "tmp").stat().st_mode) == 0o777
        assert contents(target) == ["mine", "root", "tmp", "way out"]


def test_what_was_there_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    with scene(tmp_path) as target:
        (target / "to victim").symlink_to("../victim")
        os.link(target.parent / "victim", target / "same file")
        done = unpack(member(b"to victim", data=b"new") + member(b"same file", data=b"new") + END, target)
        assert done.files == 2
        assert (target / "to victim").read_bytes() == (target / "same file").read_bytes() == b"new"
        assert not (target / "to victim").is_symlink()


def test_directories_that_were_there_keep_their_modes(tmp_path: Path) -> None:
    with scene(tmp_path) as target:
        (target / "d").mkdir(mode=0o700)
        archive = member(b".", b"5", mode=0o777) + member(b"d", b"5", mode=0o777) + member(b"e", b"5", mode=0o751)
        target.chmod(0o711)
        unpack(archive + END, target)
        modes = [stat.S_IMODE((target / name).stat().st_mode) for name in (".", "d", "e")]
        assert modes == [0o711, 0o700, 0o751]


def test_a_directory_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with scene(tmp_path) as target:
        (target / "d").mkdir()
        (target / "d" / "x").touch()
        with pytest.raises(NixboxError, match="is a directory here"):
            unpack(member(b"d", data=b"x") + END, target)
        assert (target / "d" / "x").exists()


def test_a_workspaces_configuration_does_not_come(tmp_path: Path) -> None:
    with scene(tmp_path) as target:
        archive = member(b"p/.nixbox", b"5") + member(b"p/.nixbox/config.toml", data=b"[hooks]") + member(b"p/f")
        done = unpack(archive + END, target)
        assert contents(target / "p") == ["f"]
        assert done.skipped == {"nixbox's own": 2}


def test_a_hard_link_to_a_link_is_looked_at_from_its_own_place(tmp_path: Path) -> None:
    with scene(tmp_path) as target:
        archive = member(b"a/l", b"2", target=b"../mine") + member(b"b/h", b"1", target=b"a/l")
        archive += (
            member(b"h", b"1", target=b"a/l") + member(b"o", b"2", target=b"..") + member(b"p", b"1", target=b"o")
        )
        done = unpack(archive + END, target)
        assert (target / "b" / "h").readlink() == Path("../mine")
        assert done.skipped == {"symbolic link that leads out": 3}
        assert contents(target) == ["a", "b", "mine", "way out"]


def test_one_file_is_one_file(tmp_path: Path) -> None:
    with scene(tmp_path) as target:
        assert unpack(member(b"./any/name", data=b"x") + END, target, only=b"chosen").files == 1
        assert (target / "chosen").read_bytes() == b"x"
        for archive in (member(b"d", b"5"), member(b"l", b"2", target=b"x"), member(b"a") + member(b"b")):
            with pytest.raises(NixboxError, match="one regular file"):
                unpack(archive + END, target, only=b"chosen")


def test_the_number_of_members_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarread, "_MAX_MEMBERS", 10)
    with scene(tmp_path) as target, pytest.raises(NixboxError, match="more than 10 members"):
        unpack(b"".join(member(b"%d" % i) for i in range(20)) + END, target)


def test_what_follows_the_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarread, "_MAX_REST_BYTES", 100)
    for size in (100, 101):
        read, write = os.pipe()
        os.write(write, bytes(size))
        os.close(write)
        with inside.closing(read):
            if size == 100:
                tarread.Source(read).rest()
            else:
                with pytest.raises(NixboxError, match="goes on after its end"):
                    tarread.Source(read).rest()


def test_names_of_a_guest_cannot_drive_a_terminal(tmp_path: Path) -> None:
    with scene(tmp_path) as target, pytest.raises(NixboxError) as caught:
        unpack(member(b"../\x1b[2J\xff", data=b"x") + END, target)
    assert "\x1b" not in caught.value.message
    caught.value.message.encode()
