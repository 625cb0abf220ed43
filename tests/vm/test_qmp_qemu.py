"""The QMP client against a real QEMU without a machine."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from nixbox.machine.qmp import Qmp, QmpClosed, QmpCommandError

QEMU = "qemu-system-x86_64"
START_S = 30.0
HANG_S = 20.0

pytestmark = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")


@dataclass(frozen=True, slots=True)
class Running:
    process: subprocess.Popen[bytes]
    qmp: Qmp


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room in the 107 bytes of a unix socket's path; pytest's may not."""
    with tempfile.TemporaryDirectory(prefix="nb-", dir="/tmp") as name:
        yield Path(name)


def connect(path: Path, process: subprocess.Popen[bytes]) -> Qmp:
    """QEMU binds the socket some milliseconds after it started."""
    end = time.monotonic() + START_S
    while True:
        try:
            return Qmp.connect(path, timeout_s=HANG_S)
        except QmpClosed:
            assert process.poll() is None, f"{QEMU} exited with {process.returncode}"
            assert time.monotonic() < end, f"{QEMU} does not listen"
            time.sleep(0.01)


@contextmanager
def started(directory: Path) -> Iterator[Running]:
    path = directory / "qmp"
    argv = [QEMU, "-M", "none", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    with subprocess.Popen([*argv, "-qmp", f"unix:{path},server=on,wait=off"]) as process:
        try:
            with connect(path, process) as qmp:
                yield Running(process, qmp)
        finally:
            process.kill()


@pytest.fixture
def qemu(short_dir: Path) -> Iterator[Running]:
    with started(short_dir) as running:
        yield running


def test_status_and_version(qemu: Running) -> None:
    assert qemu.qmp.execute("query-status")["status"] == "running"
    found = qemu.qmp.execute("query-version")["qemu"]
    assert qemu.qmp.version == f"{found['major']}.{found['minor']}.{found['micro']}"


def test_unknown_command(qemu: Running) -> None:
    with pytest.raises(QmpCommandError) as caught:
        qemu.qmp.execute("make-coffee")
    assert caught.value.error_class == "CommandNotFound"
    assert "make-coffee" in caught.value.desc
    with pytest.raises(QmpCommandError) as caught:
        qemu.qmp.execute("device_del", {"id": "nothing"})
    assert caught.value.error_class == "DeviceNotFound"


def test_events_of_stop_and_cont(qemu: Running) -> None:
    qemu.qmp.execute("stop")
    qemu.qmp.execute("cont")
    resumed = qemu.qmp.wait_event("RESUME", timeout_s=HANG_S)
    stopped = qemu.qmp.wait_event("STOP", timeout_s=HANG_S)
    assert 0 < stopped.time_s <= resumed.time_s


def test_the_largest_reply_fits(qemu: Running) -> None:
    assert len(qemu.qmp.execute("query-qmp-schema")) > 1000


def test_a_file_descriptor_is_taken(qemu: Running) -> None:
    with tempfile.TemporaryFile() as file:
        assert qemu.qmp.execute("getfd", {"fdname": "f"}, fds=[file.fileno()]) == {}
        added = qemu.qmp.execute("add-fd", {"fdset-id": 7}, fds=[file.fileno()])
        assert added["fdset-id"] == 7
    with pytest.raises(QmpCommandError):
        qemu.qmp.execute("getfd", {"fdname": "none was sent"})


def test_quit_says_why_and_then_closes(qemu: Running) -> None:
    qemu.qmp.execute("quit")
    assert qemu.qmp.wait_event("SHUTDOWN", timeout_s=HANG_S).data["reason"] == "host-qmp-quit"
    with pytest.raises(QmpClosed):
        qemu.qmp.wait_event("NEVER", timeout_s=HANG_S)
    assert qemu.process.wait(HANG_S) == 0


def test_a_killed_qemu_is_seen(qemu: Running) -> None:
    qemu.process.kill()
    start = time.monotonic()
    with pytest.raises(QmpClosed):
        qemu.qmp.wait_event("NEVER", timeout_s=HANG_S)
    with pytest.raises(QmpClosed):
        qemu.qmp.execute("query-status")
    assert time.monotonic() - start < HANG_S / 2


def test_the_next_client_is_served_after_the_first_left(short_dir: Path) -> None:
    with started(short_dir) as first:
        first.qmp.close()
        with connect(short_dir / "qmp", first.process) as second:
            assert second.execute("query-status")["running"] is True
