"""What may be shared, what of it is hidden, the filter of system calls, and who answers when virtiofsd is gone."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixbox import jails, paths
from nixbox.config.settings import Mount
from nixbox.errors import ConfigError, HostError
from nixbox.jails import Inode
from nixbox.mounts import daemon, health, places
from nixbox.mounts.standin import Broken, Device, StandIn
from nixbox.plan.model import Queue, Shared


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in a home of the test's own."""
    home = tmp_path / "home"
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(home))
    made = tmp_path / "home" / "project"
    (made / ".nixbox").mkdir(parents=True)
    (made / ".nixbox" / "config.toml").touch()
    return made


def look(workspace: Path, *mounts: Mount) -> list[places.Place]:
    return places.resolve(mounts, workspace, places.own_directories(workspace))


def faults(workspace: Path, *mounts: Mount) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        look(workspace, *mounts)
    return list(caught.value.faults)


# --- places ---


def test_a_source_is_relative_to_the_workspace_or_to_the_home(workspace: Path) -> None:
    (workspace / "data").mkdir()
    (workspace.parent / "other").mkdir()
    data, other = look(workspace, Mount("data", "/a"), Mount("~/other", "/b", readonly=True))
    assert (data.source, data.moved, data.inode) == (workspace / "data", False, Inode.of(workspace / "data"))
    assert (other.source, other.mount.readonly) == (workspace.parent / "other", True)


def test_links_are_followed_and_told(workspace: Path) -> None:
    (workspace / "real").mkdir()
    (workspace / "link").symlink_to("real")
    (found,) = look(workspace, Mount("link", "/a"))
    assert found.source == workspace / "real"
    assert found.moved


def test_every_fault_is_told_at_once(workspace: Path) -> None:
    (workspace / "file").touch()
    (workspace / "dead").symlink_to("nothing")
    found = faults(
        workspace,
        Mount("missing", "/a"),
        Mount("file", "/b"),
        Mount("dead", "/c"),
        Mount("/", "/d"),
        Mount("/proc/self", "/e"),
        Mount(".nixbox", "/f"),
        Mount(".", "/proc/x"),
        Mount(".", "/"),
        Mount(".", "/same"),
        Mount(".", "/same/"),
    )
    assert [line.split(":")[0] for line in found] == [
        *(f"mounts[{i}].source" for i in range(6)),
        "mounts[6].target",
        "mounts[7].target",
        "mounts",
    ]
    for line, word in zip(found, ("not there", "no directory", "to nothing", "host itself"), strict=False):
        assert word in line
    assert "nixbox's own" in found[5]


def test_outer_targets_come_first(workspace: Path) -> None:
    for name in ("a", "b"):
        (workspace / name).mkdir()
    found = look(workspace, Mount("a", "/srv/x/y"), Mount("b", "/srv"))
    assert [place.mount.target for place in found] == ["/srv", "/srv/x/y"]


def test_nixboxs_own_files_are_hidden_wherever_they_lie(workspace: Path) -> None:
    home = workspace.parent
    for name in ("nixbox/templates", "nixbox/profiles"):
        (home / name).mkdir(parents=True)
    other = home / "other"
    (other / ".nixbox").mkdir(parents=True)
    paths.remember(other)
    (whole,) = look(workspace, Mount("~", "/home"))
    hidden = {str(path) for path, _ in whole.masks}
    assert hidden == {"project/.nixbox", "other/.nixbox", "nixbox"}
    assert dict(whole.masks)[Path("other/.nixbox")] == Inode.of(other / ".nixbox")
    (own,) = look(workspace, Mount(".", "/w"))
    assert [path for path, _ in own.masks] == [Path(".nixbox")]
    assert look(other, Mount(".", "/w"))[0].masks[0][0] == Path(".nixbox")


def test_a_config_directory_that_is_a_link_cannot_be_kept_from_a_guest(workspace: Path) -> None:
    (workspace / ".nixbox").rename(workspace.parent / "elsewhere")
    (workspace / ".nixbox").symlink_to(workspace.parent / "elsewhere")
    with pytest.raises(ConfigError, match="symbolic link"):
        look(workspace, Mount(".", "/w"))


def served(workspace: Path) -> Path:
    """Share a workspace, writable, with a guest whose virtiofsd has ended; returns that one's lock."""
    lock = workspace.parent / "lock"
    lock.touch()
    paths.remember(workspace, {workspace: lock})
    return lock


def plant(place: Path) -> None:
    (place / ".nixbox").mkdir(parents=True)
    (place / ".nixbox" / "config.toml").touch()


def test_what_a_guest_may_have_made_is_no_workspace(workspace: Path) -> None:
    served(workspace)
    assert paths.find_workspace(workspace) == workspace
    planted = workspace / "sub"
    plant(planted)
    with pytest.raises(ConfigError, match="one of them may have put it there"):
        paths.find_workspace(planted)
    assert paths.find_workspace(planted, trusting=True) == planted
    paths.trust(planted)
    assert paths.find_workspace(planted) == planted
    (again,) = look(workspace, Mount(".", "/w"))
    assert {str(path) for path, _ in again.masks} == {".nixbox", "sub/.nixbox"}, "it is hidden from now on"


def test_another_directory_in_its_place_is_no_known_workspace(workspace: Path) -> None:
    planted = workspace / "sub"
    plant(planted)
    paths.remember(planted)
    served(workspace)
    planted.rename(workspace / "moved")  # a guest can do that: what is hidden moves with it
    plant(planted)
    with pytest.raises(ConfigError):
        paths.find_workspace(planted)
    (planted / ".nixbox" / "config.toml").unlink()
    (planted / ".nixbox").rmdir()
    (planted / ".nixbox").symlink_to("../moved/.nixbox")
    with pytest.raises(ConfigError):
        paths.find_workspace(planted)


def test_a_workspace_that_went_away_before_a_start_is_known_no_more(workspace: Path) -> None:
    planted = workspace / "sub"
    plant(planted)
    paths.remember(planted)
    planted.rename(workspace / "moved")
    served(workspace)  # what is there now is not hidden from this guest
    (workspace / "moved").rename(planted)
    with pytest.raises(ConfigError):
        paths.find_workspace(planted)


def test_nothing_is_trusted_while_a_guest_can_change_it(workspace: Path) -> None:
    lock = served(workspace)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        plant(workspace / "sub")
        with pytest.raises(ConfigError, match="a guest that runs can write"):
            paths.trust(workspace / "sub")
    paths.trust(workspace / "sub")
    assert paths.find_workspace(workspace / "sub") == workspace / "sub"


def test_what_is_out_of_reach_of_guests_is_not_suspect(workspace: Path) -> None:
    paths.remember(workspace)
    plant(workspace / "sub")
    assert paths.find_workspace(workspace / "sub") == workspace / "sub"


def test_a_damaged_memory_of_workspaces_is_none(workspace: Path) -> None:
    paths.remember(workspace)
    for text in ("{", "[]", '{"workspaces": {"/x": 1}, "writable": {}}'):
        (paths.state_dir() / "known.json").write_text(text)
        assert paths.known() == paths.Known()
    served(workspace)
    assert list(paths.known().writable) == [str(workspace)]


@pytest.mark.parametrize(
    ("target", "path"),
    [("~/workspace", "/home/me/workspace"), ("/srv/data/", "/srv/data"), ("/a~b", "/a~b"), ("~", "/home/me")],
)
def test_guest_paths(target: str, path: str) -> None:
    assert places.guest_path(target, "me") == path


@pytest.mark.parametrize(("name", "cache"), [("node_modules", True), (".m2", True), ("project", False)])
def test_caches_are_known_by_their_names(name: str, cache: bool) -> None:
    assert places.looks_like_cache(Path("/home/me") / name) is cache


def test_what_is_wrong_is_told(workspace: Path, tmp_path: Path) -> None:
    inode = Inode.of(workspace)
    one = Shared(str(workspace), str(workspace), inode.device, inode.number, "/w", readonly=False)
    assert health.trouble(tmp_path, one) == "not mounted"


# --- virtiofsd ---


def test_the_images_own_virtiofsd_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "usr" / "libexec" / "virtiofsd"
    program.parent.mkdir(parents=True)
    program.touch()
    found = daemon.program(tmp_path)
    assert found.path == "/usr/libexec/virtiofsd"
    assert found.tree[0] == ("/usr", tmp_path / "usr")
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho --sandbox\n")
    old.chmod(0o755)
    monkeypatch.setenv("NIXBOX_VIRTIOFSD", str(old))
    with pytest.raises(HostError, match="too old"):
        daemon.program(tmp_path)
    old.write_text("#!/bin/sh\necho --translate-uid\n")
    chosen = daemon.program(tmp_path)
    assert chosen.path == str(old)
    assert chosen.tree[-1] == (str(tmp_path), tmp_path)
    assert ("/usr", Path("/usr")) in chosen.tree


def test_the_virtiofsd_of_nixpkgs_comes_with_the_store_around_it(tmp_path: Path) -> None:
    package = tmp_path / "abc-virtiofsd-1.13"
    (package / "bin").mkdir(parents=True)
    (package / "bin/virtiofsd").touch()
    found = daemon.program(package)
    # Its name in the store, wherever that store lies: the loader and the libraries that it names are found so.
    assert found.path == "/nix/store/abc-virtiofsd-1.13/bin/virtiofsd"
    assert found.tree == (("/nix/store", tmp_path),)


def test_readonly_is_told_to_virtiofsd_too() -> None:
    assert "--readonly" not in daemon.argv("/v", 7, readonly=False)
    words = daemon.argv("/v", 7, readonly=True)
    assert words[-1] == "--readonly"
    assert words[words.index("--fd") + 1] == "7"


# --- the filter of system calls: a small machine for classic BPF (linux/filter.h) runs it ---

ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def verdict(machine: str, arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    program = jails.no_setuid(machine)
    steps = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    at = accumulator = 0
    while True:
        code, yes, no, value = steps[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x15:
                at += yes if accumulator == value else no
            case 0x35:
                at += yes if accumulator >= value else no
            case 0x45:
                at += yes if accumulator & value else no
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(code)


@pytest.mark.parametrize(
    ("machine", "arch", "number", "argument"),
    [
        ("x86_64", 0xC000003E, 90, 1),  # chmod
        ("x86_64", 0xC000003E, 91, 1),  # fchmod
        ("x86_64", 0xC000003E, 268, 2),  # fchmodat
        ("x86_64", 0xC000003E, 452, 2),  # fchmodat2
        ("x86_64", 0xC000003E, 257, 3),  # openat
        ("x86_64", 0xC000003E, 258, 2),  # mkdirat
        ("x86_64", 0xC000003E, 259, 2),  # mknodat
        ("aarch64", 0xC00000B7, 52, 1),
        ("aarch64", 0xC00000B7, 53, 2),
        ("aarch64", 0xC00000B7, 56, 3),
    ],
)
def test_no_call_sets_user_or_group_id_bits(machine: str, arch: int, number: int, argument: int) -> None:
    def asked(mode: int) -> int:
        return verdict(machine, arch, number, (*[0xFFFFFFFF] * argument, mode))

    assert asked(0o755) == asked(0o1777) == ALLOW
    for mode in (stat.S_ISUID | 0o755, stat.S_ISGID | 0o755, 0o6000, stat.S_IFREG | stat.S_ISUID):
        assert asked(mode) == ERROR | errno.EPERM


def test_other_calls_pass_and_other_numbers_for_the_same_do_not() -> None:
    assert verdict("x86_64", 0xC000003E, 0, (0o6755, 0o6755, 0o6755)) == ALLOW
    assert verdict("x86_64", 0xC000003E, 437) == ERROR | errno.ENOSYS  # openat2: its mode cannot be seen
    assert verdict("x86_64", 0x40000003, 15, (0, 0o4755)) == KILL  # i386
    assert verdict("x86_64", 0xC000003E, 0x40000000 + 268, (0, 0, 0o4755)) == KILL  # x32
    assert verdict("aarch64", 0xC00000B7, 437) == ERROR | errno.ENOSYS


# --- the stand-in: a guest's memory of our own ---

DESCRIPTORS, AVAILABLE, USED, SIZE = 0x1000, 0x2000, 0x3000, 8
QUEUE = Queue(DESCRIPTORS, AVAILABLE, USED, SIZE)


class Memory:
    """A guest's memory with one queue, and a driver that puts requests into it."""

    def __init__(self, fd: int) -> None:
        os.ftruncate(fd, 1 << 16)
        self.map = mmap.mmap(fd, 0)

    def put(self, address: int, data: bytes) -> None:
        self.map[address : address + len(data)] = data

    def index(self, ring: int) -> int:
        return int(struct.unpack_from("<H", self.map, ring + 2)[0])

    def offer(self, head: int) -> None:
        """Make a chain available."""
        at = self.index(AVAILABLE)
        self.put(AVAILABLE + 4 + 2 * (at % SIZE), struct.pack("<H", head))
        self.put(AVAILABLE + 2, struct.pack("<H", (at + 1) & 0xFFFF))

    def request(
        self, number: int, unique: int, *, answer: int = 80, table: int = DESCRIPTORS, first: int = 0
    ) -> None:
        """A FUSE request of 48 bytes in two descriptors, with room for an answer."""
        place = 0x8000 + number * 0x200
        self.put(place, struct.pack("<IIQ", 48, 1, unique))
        chain = [(place, 40, 1), (place + 40, 8, 1 if answer else 0), (place + 0x100, answer, 2)]
        for i, (address, length, flags) in enumerate(chain[: 3 if answer else 2]):
            self.put(table + 16 * (first + i), struct.pack("<QIHH", address, length, flags, first + i + 1))

    def answer(self, number: int) -> tuple[int, int, int]:
        length, error, unique = struct.unpack_from("<IiQ", self.map, 0x8000 + number * 0x200 + 0x100)
        return length, error, unique


@pytest.fixture
def guest() -> Iterator[tuple[Memory, StandIn, int]]:
    fd = os.memfd_create("test")
    memory = Memory(fd)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    stand_in = StandIn(Device((QUEUE,), fd, (event,)))
    yield memory, stand_in, event
    stand_in.stop()
    memory.map.close()


def test_what_waits_is_answered_with_an_error(guest: tuple[Memory, StandIn, int]) -> None:
    memory, stand_in, event = guest
    assert stand_in.answer() == 0
    memory.request(0, unique=77)
    memory.offer(0)
    memory.request(1, unique=78, first=3)
    memory.offer(3)
    assert stand_in.answer() == 2
    assert memory.answer(0) == (16, -errno.EIO, 77)
    assert memory.answer(1) == (16, -errno.EIO, 78)
    assert memory.index(USED) == 2
    assert struct.unpack_from("<IIII", memory.map, USED + 4) == (0, 16, 3, 16)
    assert os.eventfd_read(event) == 1
    assert stand_in.answer() == 0


def test_what_wants_no_answer_gets_none_and_a_table_aside_is_read(guest: tuple[Memory, StandIn, int]) -> None:
    memory, stand_in, _ = guest
    memory.request(0, unique=1, answer=0)
    memory.offer(0)
    memory.request(1, unique=2, table=0x6000)
    memory.put(DESCRIPTORS + 16 * 5, struct.pack("<QIHH", 0x6000, 48, 4, 0))
    memory.offer(5)
    assert stand_in.answer() == 2
    assert memory.answer(0) == (0, 0, 0)
    assert memory.answer(1) == (16, -errno.EIO, 2)
    assert struct.unpack_from("<II", memory.map, USED + 4) == (0, 0)


def test_it_goes_on_where_virtiofsd_was_and_round_the_ring(guest: tuple[Memory, StandIn, int]) -> None:
    memory, stand_in, _ = guest
    for ring in (AVAILABLE, USED):
        memory.put(ring + 2, struct.pack("<H", 0xFFFF))
    for i in range(3):
        memory.request(i, unique=i, first=0)
        memory.offer(0)
        assert stand_in.answer() == 1
        assert memory.answer(i) == (16, -errno.EIO, i)
    assert memory.index(USED) == 2


@pytest.mark.parametrize(
    "what", ["too many", "no such descriptor", "outside", "circle", "short", "no request", "deep"]
)
def test_what_is_no_request_ends_it_and_nothing_is_written(guest: tuple[Memory, StandIn, int], what: str) -> None:
    memory, stand_in, _ = guest
    memory.request(0, unique=1)
    memory.offer(0)
    match what:
        case "too many":
            memory.put(AVAILABLE + 2, struct.pack("<H", SIZE + 1))
        case "no such descriptor":
            memory.put(AVAILABLE + 4, struct.pack("<H", SIZE))
        case "outside":
            memory.put(DESCRIPTORS, struct.pack("<Q", (1 << 16) - 8))
        case "circle":
            memory.put(DESCRIPTORS + 16, struct.pack("<QIHH", 0x8028, 8, 1, 0))
        case "short":
            memory.put(DESCRIPTORS + 32, struct.pack("<QI", 0x8100, 8))
        case "no request":
            memory.put(0x8000, struct.pack("<I", 49))
        case "deep":
            memory.put(DESCRIPTORS, struct.pack("<QIHH", 0x6000, 16, 4, 0))
            memory.put(0x6000, struct.pack("<QIHH", 0x6000, 16, 4, 0))
    before = bytes(memory.map)
    with pytest.raises(Broken):
        stand_in.answer()
    assert bytes(memory.map) == before


@given(st.binary(min_size=SIZE * 16, max_size=SIZE * 16), st.integers(0, SIZE - 1))
def test_no_table_makes_it_fail_otherwise(table: bytes, head: int) -> None:
    fd = os.memfd_create("test")
    memory = Memory(fd)
    stand_in = StandIn(Device((QUEUE,), fd, ()))
    memory.put(DESCRIPTORS, table)
    memory.offer(head)
    try:
        stand_in.answer()
    except Broken:
        pass
    finally:
        stand_in.stop()


def test_memory_above_the_devices_is_found() -> None:
    """q35 has what does not fit below 2.75 GiB above 4 GiB, and then less below (hw/i386/pc_q35.c)."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4 << 30)
    stand_in = StandIn(Device((), fd, ()))
    assert stand_in._offset(0x7FFFF000, 4096) == 0x7FFFF000
    assert stand_in._offset(1 << 32, 4096) == 0x80000000
    for address in (0x80000000, 0xFEE00000):
        with pytest.raises(Broken):
            stand_in._offset(address, 1)
    stand_in.stop()
