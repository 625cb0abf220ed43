"""What `status`, `list` and `logs` show."""

from __future__ import annotations

import dataclasses
import io
import mmap
import os
import subprocess
import threading
from pathlib import Path

import pytest

from nixbox import view
from nixbox.errors import NotRunningError
from nixbox.machine import snapshot, usage
from nixbox.machine.record import MachineDir, Record

HANG_S = 30.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Dying(MachineDir):
    """A machine that lives for some questions, and does something at each of them."""

    def __init__(self, workspace: Path, log: Path, words: list[str]) -> None:
        super().__init__(workspace, "web-1")
        self.log = log
        self.words = words

    def alive(self) -> bool:
        if not self.words:
            return False
        with self.log.open("a") as file:
            file.write(self.words.pop(0))
        return bool(self.words)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (12 << 20, "12 MiB"), (1536 << 20, "1.5 GiB")),
        *((1 << 30, "1.0 GiB"), (3 << 40, "3072.0 GiB")),
    ],
)
def test_size(count: int, text: str) -> None:
    assert view.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min")),
        *((86399, "23 h 59 min"), (86400, "1 d 0 h"), (100 * 86400 + 7200, "100 d 2 h")),
    ],
)
def test_duration(seconds: int, text: str) -> None:
    assert view.duration(seconds) == text


def test_a_log_is_shown_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one\ntwo\xff\n")
    out = io.StringIO()
    view.show_log(log, Dying(tmp_path, log, ["never asked"] * 9), follow=False, out=out)
    assert out.getvalue() == "one\ntwo\ufffd\n"


def test_following_ends_with_the_machine_and_loses_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("boot\n")
    out = io.StringIO()
    machine = Dying(tmp_path, log, ["a\n", "b\n", "last words\n"])
    thread = threading.Thread(
        target=view.show_log, args=(log, machine), kwargs={"follow": True, "out": out}, daemon=True
    )
    thread.start()
    thread.join(HANG_S)
    assert not thread.is_alive()
    assert out.getvalue() == "boot\na\nb\nlast words\n"


def test_a_terminal_gets_no_control_characters_but_a_file_gets_all(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a\x1b[31m\x07\tb\r\n\x9b2Jé\u202e\n", newline="")
    stopped = MachineDir(tmp_path, "web-1")
    terminal, file = Terminal(), io.StringIO()
    view.show_log(log, stopped, follow=False, out=terminal)
    view.show_log(log, stopped, follow=False, out=file)
    assert terminal.getvalue() == "a?[31m?\tb\n?2Jé?\n"
    assert "\x1b[31m\x07" in file.getvalue()


def test_a_stopped_machine(tmp_path: Path) -> None:
    machine = MachineDir(tmp_path / "w", "web-1")
    with pytest.raises(NotRunningError):
        view.machine_view(machine)
    machine.prepare()
    record = Record("web-1", "0" * 32, "dev", 1, "/nix/store/x", "qemu", "tcg", 2, 2048, 10240)
    machine.save(dataclasses.replace(record, ready=True, network={"mode": "off"}, pid=12, started_at=5, setup="aa"))
    found = view.machine_view(machine)
    assert (found.state, found.network, found.pid, found.started_at) == ("stopped", "off", None, None)
    assert (found.disk_used_bytes, found.setup_done) == (0, True)
    machine.overlay.write_bytes(b"x" * 8192)
    with machine.hold_lock():  # lives, but nobody answers on its monitor
        found = view.machine_view(machine)
        assert (found.state, found.network, found.pid) == ("running", "off", 12)
        machine.update(ready=False)
        assert view.machine_view(machine).state == "starting"
    assert found.disk_used_bytes >= 8192
    assert set(found.as_dict()) >= {"name", "state", "image", "disk_used_bytes"}


def test_a_suspended_machine(tmp_path: Path) -> None:
    machine = MachineDir(tmp_path / "w", "web-1")
    machine.prepare()
    record = Record("web-1", "0" * 32, "dev", 1, "/nix/store/x", "qemu", "tcg", 2, 2048, 10240)
    machine.save(dataclasses.replace(record, ready=True, how="restored"))
    machine.snapshot.mkdir()
    manifest = snapshot.Manifest("nix:x", "sha256:1", "sha256:2", "QEMU", snapshot.now())
    snapshot.write(machine.snapshot, manifest)
    found = view.machine_view(machine)
    assert (found.state, found.snapshot, found.how, found.memory) == ("suspended", (), "", None)
    snapshot.invalidate(machine.snapshot, manifest, ["the image has changed"])
    found = view.machine_view(machine)
    assert (found.state, found.snapshot) == ("stopped", ("the image has changed",))
    with machine.hold_lock():
        assert view.machine_view(machine).how == "restored"


# --- memory ----------------------------------------------------------------------------------------------


def test_the_memory_of_a_process() -> None:
    before = usage.of(os.getpid())
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE) as taken:
        for at in range(0, len(taken), 4096):
            taken[at] = 1
        after = usage.of(os.getpid())
    assert before is not None
    assert after is not None
    assert after.own - before.own > 24 << 20
    assert 0 < after.own < after.resident
    assert after.shared == after.resident - after.own


def test_the_memory_of_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert usage.of(child.pid) is None  # it has ended, and nobody has waited for it
    assert usage.of(child.pid) is None


def test_rows_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    view.print_rows([["a", "long cell", ""], ["bbb", "x", "y"]], ["N", "M", ""])
    assert capsys.readouterr().out == "N    M\na    long cell\nbbb  x          y\n"
