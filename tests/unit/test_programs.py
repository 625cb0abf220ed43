"""Programs of nixbox's own: forked from the process that waits (forkserver) they are what they are by themselves."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixbox import programs, run
from nixbox.network import watch
from nixbox.programs import Forked, Programs

LIMIT_S = 30.0
# What a program of the tests' does: it tells what it is and has, line by line, once it has read its settings.
MODULE = """
import os, sys
prepared = []
def prepare(*words):
    prepared.extend(words)
def main():
    said = sys.stdin.buffer.read().decode()
    if said == "fail":
        raise RuntimeError("as it was told")
    if said == "leave":
        sys.exit(7)
    links = {name: os.readlink(f"/proc/self/fd/{name}") for name in sorted(os.listdir("/proc/self/fd"), key=int)
             if os.path.lexists(f"/proc/self/fd/{name}")}
    print(said, sys.argv[1:], *prepared, sep="|")
    print(os.getsid(0) == os.getpid(), os.getcwd(), os.environ.get("NIXBOX_SECRET"), sep="|")
    print(*links, sep="|")
    shown, short = (open(f"/proc/self/{name}").read().replace(chr(0), " ").strip() for name in ("cmdline", "comm"))
    print(shown, short, sep="|")
    sys.stdout.flush()
"""


@pytest.fixture(params=["forked", "alone"])
def started(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Programs]:
    """Programs with and without somebody who waits; the test's module can be imported by what they start."""
    (tmp_path / "told.py").write_text(MODULE)
    monkeypatch.setenv("NIXBOX_SECRET", "of the shell")
    own = run.own_program

    def with_module(module: str, label: str) -> list[str]:
        argv = own(module, label)
        argv[4] = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {argv[4]}"
        return argv

    monkeypatch.setattr(run, "own_program", with_module)
    found = Programs()
    with found.waiting("nixbox-start-box") if request.param == "forked" else contextlib.nullcontext():
        found.expect("told", "word", ["more"])
        assert found.waits == (request.param == "forked")
        yield found


def ask(program: programs.Program, words: bytes) -> list[list[str]]:
    assert program.stdin is not None and program.stdout is not None
    program.stdin.write(words)
    program.stdin.close()
    with program.stdout as said:
        lines = said.read().decode().splitlines()
    program.wait()
    return [line.split("|") for line in lines]


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def children(label: bytes) -> list[int]:
    """Our children with a word in their command lines."""
    of_ours = Path("/proc/thread-self/children").read_text().split()
    return [int(pid) for pid in of_ours if label in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_it_has_what_it_was_given_and_nothing_else(started: Programs, tmp_path: Path) -> None:
    log = tmp_path / "log"
    ours, theirs = socket.socketpair()
    with ours, theirs, (tmp_path / "other").open("wb") as other:
        fds = (theirs.fileno(), other.fileno())
        program = started.start("told", "nixbox-told-box", ["7"], log=log, pass_fds=fds)
        first, second, third, fourth = ask(program, b"settings")
    forked = started.waits
    assert first[0] == "settings"
    assert first[1].endswith("'nixbox-told-box', '7']")
    assert first[2:] == (["word", "['more']"] if forked else [])
    assert second == ["True", "/", "None"]
    assert set(third) == {"0", "1", "2", *map(str, fds)}
    assert "nixbox-told-box" in fourth[0]
    assert fourth[1] == ("nixbox-told-box" if forked else fourth[1])
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_numbers_that_cross_are_kept(started: Programs, tmp_path: Path) -> None:
    """The descriptors come with other numbers than they shall have, which may be those of one another."""
    files = [(tmp_path / f"{number}").open("w+b") for number in range(12)]
    numbers = [file.fileno() for file in reversed(files)]
    program = started.start("told", "label", pass_fds=numbers)
    assert set(ask(program, b"")[2]) == {"0", "1", "2", *map(str, numbers)}
    for file in files:
        file.close()


def test_what_it_says_of_its_end_is_in_the_log(started: Programs, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert ask(started.start("told", "label", log=log), b"fail") == []
    until(lambda: "RuntimeError: as it was told" in log.read_text())
    assert ask(started.start("told", "label", log=log), b"leave") == []


def test_it_is_killed_by_its_own_descriptor(started: Programs) -> None:
    program = started.start("told", "label")
    program.kill()
    program.wait()
    program.kill()  # it has ended: nothing of the same number is hit
    if isinstance(program, Forked):
        assert program.stdin is not None and program.stdout is not None
        program.stdin.close()
        program.stdout.close()


def test_who_waits_ends_with_us_and_what_it_started_stays() -> None:
    found = Programs()
    with found.waiting("nixbox-start-box"):
        found.expect("nixbox.network.guard", watch.library())
        program = found.start("nixbox.network.guard", "nixbox-guard-box", ["0", "0", "0"])
        until(lambda: b"nixbox-guard-box" in Path(f"/proc/{program.pid}/cmdline").read_bytes())
        parent = int(Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert parent != os.getpid()
    assert not found.waits
    assert not Path(f"/proc/{parent}").exists()
    assert Path(f"/proc/{program.pid}").exists()
    program.kill()
    program.wait()


def test_without_who_waits_it_is_started_alone(tmp_path: Path) -> None:
    """It was killed: nothing else is lost."""
    found = Programs()
    log = tmp_path / "log"
    with found.waiting("nixbox-start-box"):
        until(lambda: len(children(b"nixbox-start-box")) == 1)  # its command line is there a moment after its start
        [waiting] = children(b"nixbox-start-box")
        os.kill(waiting, signal.SIGKILL)
        until(lambda: (Path(f"/proc/{waiting}/stat").read_text().rpartition(")")[2].split()[0]) == "Z")
        found.expect("nixbox.network.guard", watch.library())
        program = found.start("nixbox.network.guard", "label", ["0", "0", "0"], log=log)
        assert not isinstance(program, Forked)
        assert ask(program, b"") == []
    assert "EOFError" in log.read_text()
