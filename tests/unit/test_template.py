"""Templates: found by what they were made of, whole or not at all, made by one process at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixbox.errors import NixboxError
from nixbox.machine import saved, template
from nixbox.machine.template import Info, Key, Template

HANG_S = 30.0
MIB = 1 << 20
BOOT = Key(
    stage="boot",
    image="/nix/store/x-nixbox-image",
    backend="qemu",
    hypervisor="QEMU emulator version 7.2",
    accelerator="tcg",
    cpu="emulated",
    vcpus=2,
    memory_mib=8,
    root="1 2 3",
    devices=("-M", "q35", "-m", "8M"),
)
READY = replace(BOOT, stage="ready", user="dev", setup="aa", disk_mib=16, files="bb")
MEMORY = b"memory" * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/nixbox/templates"


@pytest.fixture(autouse=True)
def no_descriptor_stays_open(cache: Path) -> Iterator[None]:
    yield
    places = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in range(256)]
    assert [place for place in places if place.startswith(str(cache))] == []


def unexpected(text: str = "") -> None:
    raise AssertionError(f"nobody waits, and nothing is damaged: {text}")


def publish(key: Key, state: bytes = b"state") -> Path:
    """Make a template as the session does, with large files of little content."""
    with template.making(key, unexpected) as work:
        out = work / "out"
        out.mkdir(mode=0o700)
        with saved.create(out / "memory") as memory:
            memory.write(MEMORY)
            memory.truncate(8 * MIB)
        with saved.create(out / "state") as file:
            file.write(state)
        if key.stage == "ready":
            with saved.create(out / "overlay.img") as disk:
                disk.truncate(16 * MIB)
                os.pwrite(disk.fileno(), b"ext4", 5 * MIB)
            (out / "setup.log").write_text("set up\n")
        template.publish(out, key)
    return template.directory() / key.ident


@contextmanager
def found(key: Key) -> Iterator[Template]:
    opened = template.find(key, unexpected)
    assert opened is not None
    try:
        yield opened
    finally:
        opened.close()


def names(directory: Path) -> set[str]:
    """What lies there, but for locks."""
    return {path.name for path in directory.iterdir() if path.suffix != ".lock"}


# --- the key ---------------------------------------------------------------------------------------------

OTHER: dict[str, object] = {
    "stage": "boot",
    "image": "/nix/store/y-nixbox-image",
    "backend": "other",
    "hypervisor": "QEMU emulator version 7.3",
    "accelerator": "kvm",
    "cpu": "model 7",
    "vcpus": 3,
    "memory_mib": 9,
    "root": "1 2 4",
    "devices": ("-M", "q35", "-m 8M"),
    "user": None,
    "setup": None,
    "disk_mib": 17,
    "files": "cc",
    "format": template.FORMAT + 1,
}


def test_the_identifier_depends_on_every_field() -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(Key)}
    keys = [READY, *(replace(READY, **{name: value}) for name, value in OTHER.items())]  # type: ignore[arg-type]
    assert len({key.ident for key in keys}) == len(keys)
    assert all(len(bytes.fromhex(key.ident)) == 16 for key in keys)


def test_the_identifier_is_the_same_in_another_process() -> None:
    code = (
        "import sys; sys.path[:] = sys.argv[2:]; import json\n"
        "from nixbox.machine.template import Key\n"
        "data = json.loads(sys.argv[1])\n"
        "print(Key(**(data | {'devices': tuple(data['devices'])})).ident)"
    )
    argv = [sys.executable, "-I", "-c", code, json.dumps(READY.as_dict()), *sys.path]
    assert subprocess.check_output(argv, text=True, timeout=HANG_S).strip() == READY.ident


def test_nothing_is_none_and_not_a_word() -> None:
    assert replace(READY, setup=None).ident != replace(READY, setup="None").ident
    assert replace(READY, devices=("a b",)).ident != replace(READY, devices=("a", "b")).ident


def test_an_emulated_guest_sees_nothing_of_the_host() -> None:
    assert template.host_cpu("tcg") == "emulated"
    assert template.host_cpu("kvm") == template.host_cpu("kvm") != "emulated"


# --- found -----------------------------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_was_made(cache: Path) -> None:
    assert template.find(BOOT, unexpected) is None
    assert template.every() == []
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_template_is_found_as_it_was_made(cache: Path) -> None:
    path = publish(READY)
    with found(READY) as ready:
        assert (ready.path, ready.key, ready.state, ready.setup_log) == (path, READY, b"state", "set up\n")
        assert os.pread(ready.memory, 8 * MIB + 1, 0) == MEMORY.ljust(8 * MIB, b"\0")
        assert ready.overlay is not None
        assert os.pread(ready.overlay, 4, 5 * MIB) == b"ext4"
        assert not any(os.get_inheritable(fd) for fd in (ready.memory, ready.overlay))
    assert names(cache) == {READY.ident}
    assert names(path) == {*("memory", "state", "overlay.img", "setup.log", "used", "template.json", saved.SEAL)}
    private = {file.name for file in path.iterdir() if stat.S_IMODE(file.stat().st_mode) == 0o600}
    assert private == names(path) - {"setup.log"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_booted_one_has_no_disk() -> None:
    publish(BOOT)
    with found(BOOT) as boot:
        assert (boot.overlay, boot.setup_log) == (None, "")


def test_each_key_has_its_own() -> None:
    publish(BOOT, b"boot")
    publish(READY, b"ready")
    for key, state in ((BOOT, b"boot"), (READY, b"ready")):
        with found(key) as one:
            assert one.state == state
    assert template.find(replace(READY, setup=None), unexpected) is None


def test_publishing_again_takes_its_place(cache: Path) -> None:
    publish(BOOT, b"old")
    with found(BOOT) as old:
        publish(BOOT, b"new")
        assert old.state == b"old"
        assert os.pread(old.memory, 6, 0) == b"memory"
    with found(BOOT) as new:
        assert new.state == b"new"
    assert names(cache) == {BOOT.ident}


def test_finding_is_using() -> None:
    for key in (BOOT, READY):
        os.utime(publish(key) / "used", (1000, 1000 if key is BOOT else 2000))
    assert [info.ident for info in template.every()] == [READY.ident, BOOT.ident]
    with found(BOOT):
        pass
    assert [info.ident for info in template.every()] == [BOOT.ident, READY.ident]
    with found(BOOT):  # and changes nothing of it
        pass


def test_one_that_is_used_may_be_removed(cache: Path, tmp_path: Path) -> None:
    path = publish(READY)
    with found(READY) as ready:
        template.remove(path)
        assert names(cache) == set()
        assert template.find(READY, unexpected) is None
        assert os.pread(ready.memory, 6, 0) == b"memory"
        saved.copy(Path(f"/proc/self/fd/{ready.overlay}"), tmp_path / "overlay.img")
        assert (tmp_path / "overlay.img").stat().st_size == 16 * MIB
        template.remove(path)  # what is not there is removed


# --- damaged ---------------------------------------------------------------------------------------------


def change_a_byte(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES = ("memory", "state", "overlay.img", "template.json", saved.SEAL)
DAMAGE = [(name, damage) for name in FILES for damage in (Path.unlink, change_a_byte, cut, make_directory)]
DAMAGE += [(name, link) for name in FILES if name != saved.SEAL]  # the seal itself may lie elsewhere


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=[f"{name} {damage.__name__}" for name, damage in DAMAGE])
def test_damage_is_said_and_removed(cache: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(publish(READY) / name)
    said: list[str] = []
    assert template.find(READY, said.append) is None
    (words,) = said
    assert f"({name} " in words
    assert words.startswith("a template is damaged (")
    assert names(cache) == set()
    assert template.find(READY, unexpected) is None
    publish(READY)
    with found(READY):
        pass


def test_all_damage_is_said_at_once(cache: Path) -> None:
    path = publish(READY)
    cut(path / "memory")
    cut(path / "overlay.img")
    said: list[str] = []
    assert template.find(READY, said.append) is None
    assert "memory has " in said[0]
    assert "; overlay.img has " in said[0]


def test_an_empty_directory_is_damaged(cache: Path) -> None:
    template.directory()
    (cache / BOOT.ident).mkdir()
    said: list[str] = []
    assert template.find(BOOT, said.append) is None
    assert len(said) == 1
    assert names(cache) == set()


def test_one_that_was_made_for_another_machine_is_refused(cache: Path) -> None:
    other = replace(READY, vcpus=64, hypervisor="another")
    publish(other).rename(cache / READY.ident)
    said: list[str] = []
    assert template.find(READY, said.append) is None
    assert "it was made for another hypervisor, vcpus" in said[0]
    assert names(cache) == set()


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '"x"', '{"created_at": 1}'])
def test_a_manifest_that_says_nothing_is_refused(cache: Path, text: str) -> None:
    path = publish(BOOT)
    (path / "template.json").write_text(text)
    saved.seal(path, ["memory", "state", "template.json"])  # as if it had always been so
    said: list[str] = []
    assert template.find(BOOT, said.append) is None
    assert len(said) == 1
    assert names(cache) == set()


# --- made ------------------------------------------------------------------------------------------------

MAKING = """
import json, sys
sys.path[:] = sys.argv[2:]
from nixbox.machine.template import Key, making
data = json.loads(sys.argv[1])
with making(Key(**(data | {"devices": tuple(data["devices"])})), lambda: None) as work:
    (work / "half").touch()
    print("in", flush=True)
    sys.stdin.read()
"""


@contextmanager
def somebody_making(key: Key) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-I", "-c", MAKING, json.dumps(key.as_dict()), *sys.path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "in\n"
            yield child
        finally:
            child.kill()


def test_a_making_leaves_nothing(cache: Path) -> None:
    with template.making(BOOT, unexpected) as work:
        assert work.parent == cache
        assert stat.S_IMODE(work.stat().st_mode) == 0o700
        (work / "memory").touch()
    assert names(cache) == set()
    with pytest.raises(ZeroDivisionError), template.making(BOOT, unexpected) as work:
        raise ZeroDivisionError
    assert names(cache) == set()
    with template.making(BOOT, unexpected):
        pass


def test_the_second_waits_for_the_first_and_is_told(cache: Path) -> None:
    waits: list[int] = []
    with somebody_making(BOOT) as other:

        def waiting() -> None:
            waits.append(1)
            assert other.stdin is not None
            threading.Timer(0.05, other.stdin.close).start()

        with template.making(BOOT, waiting) as work:
            assert other.wait(HANG_S) == 0
            assert list(work.iterdir()) == []
    assert waits == [1]


def test_threads_take_turns() -> None:
    inside: list[int] = []
    most: list[int] = []
    waits: list[int] = []
    entered, go_on = threading.Event(), threading.Event()

    def waiting() -> None:
        waits.append(1)
        go_on.set()

    def make() -> None:
        with template.making(BOOT, waiting):
            inside.append(1)
            most.append(len(inside))
            entered.set()
            go_on.wait(HANG_S)
            inside.pop()

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
        entered.wait(HANG_S)
    for thread in threads:
        thread.join(HANG_S)
    assert not any(thread.is_alive() for thread in threads)
    assert (most, len(waits) in (1, 2)) == ([1, 1, 1], True)


def test_another_template_is_not_waited_for(cache: Path) -> None:
    with somebody_making(BOOT), template.making(READY, unexpected):
        # What somebody is making is not swept away.
        assert names(cache) == {f".new-{BOOT.ident}", f".new-{READY.ident}"}
        assert (cache / f".new-{BOOT.ident}/half").exists()


def test_one_template_may_be_made_for_another(cache: Path) -> None:
    with template.making(READY, unexpected) as work:
        (work / "half").touch()
        publish(BOOT)
        assert (work / "half").exists()
    assert names(cache) == {BOOT.ident}


@pytest.mark.parametrize("next_key", [BOOT, READY], ids=["the same", "another"])
def test_what_a_killed_making_leaves_is_cleared_up(cache: Path, next_key: Key) -> None:
    with somebody_making(BOOT) as other:
        other.send_signal(signal.SIGKILL)
        other.wait(HANG_S)
    assert names(cache) == {f".new-{BOOT.ident}"}
    with template.making(next_key, unexpected) as work:
        assert list(work.iterdir()) == []
        assert names(cache) == {work.name}
    assert names(cache) == set()


def test_what_a_killed_removal_leaves_is_swept(cache: Path) -> None:
    path = publish(BOOT)
    path.rename(cache / f".gone-{path.name}-1")
    publish(READY)
    assert names(cache) == {READY.ident}


def test_what_a_killed_removal_leaves_is_in_nobodys_way(cache: Path) -> None:
    path = publish(BOOT)
    left = cache / f".gone-{path.name}-{os.getpid()}"  # the numbers of processes come again
    left.mkdir()
    (left / "memory").touch()
    template.remove(path)
    assert not path.exists()
    template.sweep()
    assert names(cache) == set()


# --- listed ----------------------------------------------------------------------------------------------


def test_every_template_is_listed_with_its_facts(cache: Path) -> None:
    for key, used in ((BOOT, 1000), (READY, 2000)):
        os.utime(publish(key) / "used", (used, used))
    (cache / ".new-abc").mkdir()
    (cache / "0123.lock").touch()
    ready, boot = template.every()
    assert (ready.ident, ready.stage, ready.setup, ready.used_at) == (READY.ident, "ready", True, 2000)
    assert (boot.ident, boot.stage, boot.setup, boot.used_at) == (BOOT.ident, "boot", False, 1000)
    for info in (ready, boot):
        assert (info.image, info.vcpus, info.memory_mib, info.damage) == (BOOT.image, 2, 8, None)
        assert info.created_at > 1_700_000_000
        assert 4096 <= info.size_bytes < MIB  # what they take, not how long they are


def test_a_damaged_one_is_listed_too(cache: Path) -> None:
    cut(publish(BOOT) / "memory")
    (cache / "abc").mkdir()
    (cache / "abc/template.json").write_text("{")
    found = {info.ident: info for info in template.every()}
    assert set(found) == {BOOT.ident, "abc"}
    assert (found["abc"].stage, found["abc"].damage) == ("?", f"{saved.SEAL} is missing")
    assert (found[BOOT.ident].damage or "").startswith("memory has ")


def test_templates_are_named_by_their_beginning() -> None:
    for key in (BOOT, READY):
        publish(key)
    assert [info.ident for info in template.by_name(BOOT.ident[:8])] == [BOOT.ident]
    assert [info.ident for info in template.by_name(READY.ident)] == [READY.ident]
    for name in ("zz", BOOT.ident + "0", BOOT.ident[1:9]):
        with pytest.raises(NixboxError, match=f"no template's name begins with `{name}`"):
            template.by_name(name)


# --- the limit -------------------------------------------------------------------------------------------


def info(ident: str, size: int, used: int, damage: str | None = None) -> Info:
    return Info(ident, "boot", "/nix/store/x", 2, 8, False, size, 1, used, damage)


def going(infos: list[Info], limit: int, keep: str | None = None) -> list[str]:
    return [one.ident for one in template.over_limit(infos, limit, keep)]


def test_the_least_recently_used_go_first() -> None:
    infos = [info("c", 10, 3), info("a", 10, 1), info("b", 10, 2)]
    assert going(infos, 30) == []
    assert going(infos, 29) == ["a"]
    assert going(infos, 15) == ["a", "b"]
    assert going(infos, 0) == ["a", "b", "c"]


def test_damaged_ones_go_in_any_case_and_count_nothing() -> None:
    infos = [info("a", 10, 1), info("b", 1000, 9, "memory is missing")]
    assert going(infos, 10) == ["b"]
    assert going(infos, 9) == ["b", "a"]


def test_the_one_to_keep_stays() -> None:
    infos = [info("a", 100, 1), info("b", 10, 2)]
    assert going(infos, 105, "a") == ["b"]
    assert going(infos, 5, "a") == ["b"]
    assert going([info("a", 100, 1, "damaged")], 5, "a") == []


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9), st.booleans()), max_size=8),
    st.integers(0, 200),
    st.integers(0, 9),
)
def test_no_more_goes_than_has_to(facts: list[tuple[int, int, bool]], limit: int, keep: int) -> None:
    infos = [info(str(i), size, used, "damaged" if bad else None) for i, (size, used, bad) in enumerate(facts)]
    gone = template.over_limit(infos, limit, str(keep))
    stay = [one for one in infos if one not in gone]
    assert len(gone) + len(stay) == len(infos)
    assert all(one.damage is None or one.ident == str(keep) for one in stay)
    assert all(one.ident != str(keep) for one in gone)
    total = sum(one.size_bytes for one in stay)
    assert total <= limit or {one.ident for one in stay} <= {str(keep)}
    aged = [one for one in gone if one.damage is None]
    assert all(old.used_at <= one.used_at for old in aged for one in stay if one.ident != str(keep))
    if aged:
        assert total + aged[-1].size_bytes > limit


def test_a_template_is_as_it_was_after_others_were_removed(cache: Path) -> None:
    for key, used in ((BOOT, 1000), (READY, 2000)):
        os.utime(publish(key) / "used", (used, used))
    infos = template.every()
    for one in template.over_limit(infos, infos[0].size_bytes):
        template.remove(cache / one.ident)
    with found(READY) as ready:
        assert asdict(ready.key) == asdict(READY)
    assert names(cache) == {READY.ident}
