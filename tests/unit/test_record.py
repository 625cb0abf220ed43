"""A machine's directory: its record, and the locks that say whether it lives, with real processes holding them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nixbox import paths
from nixbox.errors import ExitCode, HostError, NixboxError, NotRunningError
from nixbox.machine import record
from nixbox.machine.record import MachineDir, Record, all_machines, holders

HANG_S = 30.0
RECORD = Record(
    name="web-1",
    machine_id="0" * 32,
    user="dev",
    created_at=1_700_000_000,
    image="/nix/store/x-nixbox-image",
    backend="qemu",
    accelerator="tcg",
    vcpus=2,
    memory_mib=2048,
    disk_mib=10240,
)


@pytest.fixture
def machine(tmp_path: Path) -> MachineDir:
    found = MachineDir(tmp_path / "workspace", "web-1")
    found.prepare()
    return found


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


@contextmanager
def process(*pass_fds: int) -> Iterator[subprocess.Popen[bytes]]:
    """Something that lives until it is ended, with these descriptors inherited."""
    with subprocess.Popen(["sleep", "600"], pass_fds=pass_fds) as child:
        try:
            yield child
        finally:
            child.kill()


@contextmanager
def vm(machine: MachineDir) -> Iterator[subprocess.Popen[bytes]]:
    """A child that holds the machine's lock as a VM does: through an inherited descriptor."""
    with machine.hold_lock() as fd:
        child = subprocess.Popen(["sleep", "600"], pass_fds=[fd])
    with child:
        try:
            yield child
        finally:
            child.kill()


# --- the record ------------------------------------------------------------------------------------------


def test_a_record_comes_back(machine: MachineDir) -> None:
    assert not machine.exists()
    machine.save(RECORD)
    assert machine.exists()
    assert machine.load() == RECORD
    assert stat.S_IMODE(machine.record_file.stat().st_mode) == 0o600


def test_update_changes_only_what_it_names(machine: MachineDir) -> None:
    machine.save(RECORD)
    changed = machine.update(ready=True, pid=4000)
    assert changed == machine.load() == dataclasses.replace(RECORD, ready=True, pid=4000)


def test_a_machine_that_is_not_there(machine: MachineDir) -> None:
    with pytest.raises(NotRunningError, match="there is no machine `web-1`") as caught:
        machine.load()
    assert caught.value.exit_code == ExitCode.NOT_RUNNING


DAMAGED = {
    "empty": b"",
    "half": json.dumps(dataclasses.asdict(RECORD))[:100].encode(),
    "list": b"[]",
    "null": b"null",
    "binary": b"\xff\xfe{}",
    "future": json.dumps(dataclasses.asdict(RECORD) | {"format": 2}).encode(),
    "unknown": json.dumps(dataclasses.asdict(RECORD) | {"colour": "red"}).encode(),
}


def test_a_record_of_an_older_nixbox_is_read(machine: MachineDir) -> None:
    data = dataclasses.asdict(RECORD)
    for name in ("workspace", "how", "ephemeral"):
        del data[name]
    machine.record_file.write_text(json.dumps(data))
    assert machine.load() == dataclasses.replace(RECORD, workspace="", how="", ephemeral=False)


def test_how_it_was_started_comes_back(machine: MachineDir) -> None:
    machine.save(RECORD)
    machine.update(how="restored", ephemeral=True)
    assert (machine.load().how, machine.load().ephemeral) == ("restored", True)


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_record_is_named(machine: MachineDir, data: bytes) -> None:
    machine.record_file.write_bytes(data)
    with pytest.raises(NixboxError, match=r"machine\.json is damaged") as caught:
        machine.load()
    assert "its disk is untouched" in (caught.value.hint or "")


def test_a_record_that_lacks_fields_is_named(machine: MachineDir) -> None:
    machine.record_file.write_text('{"format": 1, "name": "web-1"}')
    with pytest.raises(NixboxError, match=r"machine\.json is damaged"):
        machine.load()


# --- liveness --------------------------------------------------------------------------------------------


def test_a_machine_lives_as_long_as_its_process(machine: MachineDir) -> None:
    assert not machine.alive()
    with machine.hold_lock() as fd:
        assert machine.alive()
        child = subprocess.Popen(["sleep", "600"], pass_fds=[fd])
    try:
        assert machine.alive()  # the parent has let go
        child.send_signal(signal.SIGKILL)
        assert machine.wait_gone(HANG_S)
        assert not machine.alive()
    finally:
        child.kill()
        child.wait(HANG_S)


def test_a_record_alone_is_no_life(machine: MachineDir) -> None:
    machine.save(dataclasses.replace(RECORD, ready=True, pid=os.getpid()))
    (machine.path / "lock").touch()
    assert not machine.alive()


def test_asking_does_not_look_like_a_vm(machine: MachineDir) -> None:
    (machine.path / "lock").touch()
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.extend(machine.alive() for _ in range(200))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert set(answers) == {False}
    assert len(answers) == 800


def test_the_lock_of_a_live_machine_cannot_be_taken(machine: MachineDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with vm(machine):
        monkeypatch.setattr(record, "_flock", lambda fd, wait_s, real=record._flock: real(fd, 0.05))
        with pytest.raises(NixboxError, match="at work on this machine"), machine.hold_lock():
            pass


def test_a_lock_is_not_written_through_a_link(machine: MachineDir, tmp_path: Path) -> None:
    (machine.path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), machine.hold_lock():
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_waiting_for_the_end_has_a_bound(machine: MachineDir) -> None:
    with vm(machine):
        assert not machine.wait_gone(0.05)


def test_holders_are_the_processes_with_the_lock(machine: MachineDir) -> None:
    assert holders(machine.path / "lock") == []
    with vm(machine) as child, process():
        assert holders(machine.path / "lock") == [child.pid]


def test_kill_hits_the_holder_alone(machine: MachineDir) -> None:
    with vm(machine) as child, process() as stranger:
        machine.save(dataclasses.replace(RECORD, pid=stranger.pid))  # a stale record names somebody else
        assert machine.kill(signal.SIGKILL, HANG_S)
        assert child.wait(HANG_S) == -signal.SIGKILL
        assert stranger.poll() is None
    assert not machine.alive()


def test_kill_says_when_it_did_not_help(machine: MachineDir) -> None:
    with vm(machine) as child:
        assert not machine.kill(signal.SIGCONT, 0.05)
        assert child.poll() is None


def test_kill_without_a_vm(machine: MachineDir) -> None:
    assert machine.kill(signal.SIGKILL, 1)


# --- one command at a time -------------------------------------------------------------------------------

BUSY = """
import sys
sys.path[:] = sys.argv[2:]
from pathlib import Path
from nixbox.machine.record import MachineDir, holders
with MachineDir(Path(sys.argv[1]), "web-1").busy(lambda: None):
    print("in", flush=True)
    sys.stdin.read()
"""


@contextmanager
def somebody_busy(machine: MachineDir) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-I", "-c", BUSY, str(machine.workspace), *sys.path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "in\n"
            yield child
        finally:
            child.kill()


def unexpected() -> None:
    raise AssertionError("nobody else is at work")


def test_nobody_waits_alone(machine: MachineDir) -> None:
    for _ in range(2):
        with machine.busy(unexpected):
            pass


def test_the_second_waits_for_the_first_and_says_so_once(machine: MachineDir) -> None:
    waits: list[int] = []
    with somebody_busy(machine) as other:

        def waiting() -> None:
            waits.append(1)
            assert other.stdin is not None
            threading.Timer(0.1, other.stdin.close).start()

        with machine.busy(waiting, HANG_S):
            assert other.wait(HANG_S) == 0
    assert waits == [1]


def test_waiting_for_another_command_has_a_bound(machine: MachineDir) -> None:
    waits: list[int] = []
    failing = pytest.raises(NixboxError, match=r"at work on this machine for 0\.05 s")
    with somebody_busy(machine), failing, machine.busy(lambda: waits.append(1), 0.05):
        pass
    assert waits == [1]


def test_a_command_that_was_killed_blocks_nobody(machine: MachineDir) -> None:
    with somebody_busy(machine) as other:
        other.send_signal(signal.SIGKILL)
        other.wait(HANG_S)
        with machine.busy(unexpected):
            pass


def test_busy_does_not_look_like_life(machine: MachineDir) -> None:
    with machine.busy(unexpected):
        assert not machine.alive()


def test_a_vm_does_not_inherit_the_busy_lock(machine: MachineDir) -> None:
    with machine.busy(unexpected), machine.hold_lock() as fd:
        child = subprocess.Popen(["sleep", "600"], pass_fds=[fd])
    try:
        with machine.busy(unexpected):
            assert machine.alive()
    finally:
        child.kill()
        child.wait(HANG_S)


# --- files -----------------------------------------------------------------------------------------------


def test_directories_are_private(machine: MachineDir) -> None:
    for directory in (machine.path, machine.ssh, machine.logs, machine.runtime):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_all_machines_ignores_strays(machine: MachineDir) -> None:
    assert all_machines(machine.workspace) == []  # prepared, but without a record
    assert all_machines(machine.workspace / "none") == []
    machine.save(RECORD)
    other = MachineDir(machine.workspace, "api")
    other.prepare()
    other.save(dataclasses.replace(RECORD, name="api"))
    (machine.path.parent / "a-file").touch()
    (machine.path.parent / "empty").mkdir()
    assert [found.name for found in all_machines(machine.workspace)] == ["api", "web-1"]


def test_remove_takes_everything_of_one_machine(machine: MachineDir, tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_text("mine")
    (machine.path / "image").symlink_to(outside)
    machine.overlay.write_bytes(b"x")
    machine.save(RECORD)
    other = MachineDir(machine.workspace, "api")
    other.prepare()
    other.save(RECORD)
    machine.remove()
    assert not machine.path.exists()
    assert not machine.runtime.exists()
    assert outside.read_text() == "mine"
    assert other.exists()
    assert other.runtime.is_dir()


def test_what_an_interrupted_removal_leaves_is_no_machine(
    machine: MachineDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.save(RECORD)

    def stop(path: Path, ignore_errors: bool = False) -> None:
        if path == machine.path:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", stop)
        machine.remove()
    assert machine.path.exists()
    assert all_machines(machine.workspace) == []


def test_logs_are_rotated_once(machine: MachineDir) -> None:
    machine.rotate_logs()
    for text in ("first", "second"):
        machine.console_log.write_text(text)
        machine.vm_log.write_text(text)
        machine.setup_log.write_text("kept")
        machine.rotate_logs()
    found = {path.name: path.read_text() for path in machine.logs.iterdir()}
    assert found == {"console.log.old": "second", "vm.log.old": "second", "setup.log": "kept"}


def test_a_machine_that_has_ended_is_not_paused(machine: MachineDir) -> None:
    machine.paused.touch()
    machine.sockets.control.touch()
    machine.clean_runtime()
    assert not machine.paused.exists()
    assert not machine.runtime.exists()
    assert machine.path.is_dir()


def test_machine_ids_differ() -> None:
    first, second = record.new_machine_id(), record.new_machine_id()
    assert first != second
    assert len(first) == 32
    assert int(first, 16)


# --- private and short directories -----------------------------------------------------------------------


def test_a_private_directory_is_made_and_mended(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        made = paths.private_dir(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    made.chmod(0o755)
    assert stat.S_IMODE(paths.private_dir(made).stat().st_mode) == 0o700


def test_a_link_is_no_private_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(HostError, match="is not a directory of yours"):
        paths.private_dir(tmp_path / "link")
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o755


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(HostError, match="is not a directory of yours"):
        paths.private_dir(tmp_path / "theirs")


SSH_SUFFIX = "." + "x" * 16  # what ssh appends while it makes a control socket (mux.c)


def socket_paths(machine: MachineDir) -> list[str]:
    """Every path that a socket of the machine is bound to."""
    qemus = [getattr(machine.sockets, field.name) for field in dataclasses.fields(machine.sockets)]
    return [*map(str, qemus), *(f"{path}{SSH_SUFFIX}" for path in machine.ssh_sockets)]


def longest(machine: MachineDir) -> int:
    return max(len(os.fsencode(path)) for path in socket_paths(machine))


def base_of(length: int, tmp_path: Path, letter: str = "r") -> Path:
    """A directory whose path has this many characters."""
    path = tmp_path / (letter * (length - len(str(tmp_path)) - 1))
    path.mkdir(mode=0o700)
    assert len(str(path)) == length
    return path


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short place of our own, and no temporary directory but it."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="nb", dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


@pytest.mark.parametrize(
    "length",
    [
        *(20, 40, 66, 67, 70, 71, 90, 150),
    ],
)
def test_socket_paths_fit(length: int, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base_of(length, short)))
    machine = MachineDir(Path("/a/workspace"), "web-1")
    assert longest(machine) <= 107
    if length <= 66:
        assert machine.runtime.is_relative_to(os.environ["XDG_RUNTIME_DIR"])


def test_socket_paths_fit_in_bytes(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base_of(60, short, "é")))
    assert longest(MachineDir(Path("/a/workspace"), "web-1")) <= 107


@pytest.mark.parametrize("value", ["", "relative", None])
def test_without_a_runtime_directory(value: str | None, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    directory = paths.runtime_dir(Path("/a/workspace"), "web-1")
    base = short / f"nixbox-{os.getuid()}"
    assert directory.is_relative_to(base)
    assert stat.S_IMODE(base.stat().st_mode) == 0o700


def test_a_squatted_temporary_directory_is_refused(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    (short / "real").mkdir()
    (short / f"nixbox-{os.getuid()}").symlink_to(short / "real")
    with pytest.raises(HostError):
        paths.runtime_dir(Path("/a/workspace"), "web-1")


def test_no_two_machines_share_sockets() -> None:
    pairs = [(f"/w{i}", name) for i in range(20) for name in ("a", "b", "a-b")] + [
        ("/w/a", "b"),
        ("/w", "a"),
        ("/wa", ""),
    ]
    assert len({paths.runtime_dir(Path(workspace), name) for workspace, name in pairs}) == len(pairs)
    assert paths.runtime_dir(Path("/w"), "a") == paths.runtime_dir(Path("/w"), "a")


def test_sockets_can_be_bound_there(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base_of(66, short)))
    machine = MachineDir(short / "workspace", "x" * 63)
    machine.prepare()
    found = socket_paths(machine)
    assert len(set(found)) == len(found)
    for path in found:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)


def test_a_copy_of_a_machine_has_sockets_of_its_own(tmp_path: Path) -> None:
    machine = MachineDir(tmp_path / "workspace", "web-1")
    copy = MachineDir(machine.path, "web-1", machine.path / "copy")
    assert copy.path == machine.path / "copy"
    assert copy.runtime != machine.runtime
    for made in (machine, copy):
        made.prepare()
        made.save(RECORD)
    with machine.hold_lock():
        assert not copy.alive()
    copy.remove()
    assert machine.exists()
    assert machine.runtime.is_dir()
    assert not copy.path.exists()
    assert not copy.runtime.exists()
    assert [found.name for found in all_machines(machine.workspace)] == ["web-1"]
