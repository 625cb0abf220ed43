"""What `cp` is told, what people are told meanwhile, and the processes that data is piped through."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from nixbox import report, run
from nixbox.cli.copying import sides
from nixbox.errors import ConfigError, HostError, NixboxError, TimeoutExpired
from nixbox.guest import stream

HANG_S = 30.0
PYTHON = (sys.executable, "-I", "-S", "-c")


# --- which side ---


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["a", "guest:b"], (["a"], "b", None, False)),
        (["a", "HOST:c:d", "Guest:"], (["a", "c:d"], "", None, False)),
        (["guest:/a", "guest:~/b", "c"], (["/a", "~/b"], "c", None, True)),
        (["box:a", "host:"], (["a"], ".", "box", True)),
        (["./box:a", "other:b", "box:c"], (["./box:a", "other:b"], "c", "box", False)),
        (["a", "guest:x:y\nz"], (["a"], "x:y\nz", None, False)),
    ],
)
def test_the_guests_side_is_named(words: list[str], found: tuple[object, ...]) -> None:
    assert sides(words, ["box", "web"]) == found


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a"],
        ["a", "b"],
        ["guest:a", "guest:b"],
        ["guest:a", "b", "guest:c"],
        ["box:a", "web:b", "c"],
        ["box:a", "web:b"],
    ],
)
def test_anything_but_one_side_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        sides(words, ["box", "web"])


# --- progress ---


def test_progress_has_bytes_files_rate_and_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = report.Pace()
    assert pace.words("x", 0, 100 << 20, 0, 50) == "0 of 100 MiB, 0 of 50 files"
    now[0] += 2
    assert pace.words("x", 20 << 20, 100 << 20, 10, 50) == "20 of 100 MiB, 10 of 50 files, 10.0 MiB/s, 8 s left"
    assert pace.words("y", 1 << 20, 0, 3, 0) == "1 MiB, 3 files"
    now[0] += 1
    assert pace.words("y", 3 << 20, 0, 4, 0) == "3 MiB, 4 files, 2.0 MiB/s"


def test_plain_lines_come_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines = report.LineReporter()
    for second in range(8):
        now[0] = 100.0 + second
        lines.copying("seeding ~/x", second << 20, 10 << 20, second, 10)
    assert capsys.readouterr().err.splitlines() == [
        "· seeding ~/x: 3 of 10 MiB, 3 of 10 files, 1.0 MiB/s, 7 s left",
        "· seeding ~/x: 6 of 10 MiB, 6 of 10 files, 1.0 MiB/s, 4 s left",
    ]
    report.NoteReporter().copying("x", 1, 2, 3, 4)
    report.Reporter().copying("x", 1, 2, 3, 4)
    assert capsys.readouterr().err == ""


# --- piped processes ---


def test_data_goes_through_two_processes() -> None:
    code = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read().upper())"
    with run.piped([*PYTHON, code]) as last, run.piped([*PYTHON, code], stdout=last.stdin) as first:
        last.no_more()
        stream.write_all(first.stdin, b"a" * 1000)
        assert first.finish(HANG_S) == 0
        assert os.read(last.stdout, 2000) == b"A" * 1000
        assert last.finish(HANG_S) == 0


def test_what_it_says_is_kept_up_to_a_bound() -> None:
    with run.piped([*PYTHON, "import sys; sys.stderr.write('x' * 500_000 + 'end'); sys.exit(3)"]) as child:
        assert child.finish(HANG_S) == 3
        assert child.said().endswith("xend")
        assert len(child.said()) <= 64 << 10


def test_it_is_ended_with_the_body() -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(ZeroDivisionError), run.piped(["sleep", "1000"]) as child:
        _ = 1 / 0
    assert child.process.returncode == -signal.SIGKILL
    with run.piped(["sleep", "1000"]) as child, pytest.raises(TimeoutExpired, match=r"did not end within 0\.1 s"):
        child.finish(0.1)
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_reader_that_is_killed_or_stands_still_is_told() -> None:
    with run.piped(["sleep", "1000"], stdout=run.NOWHERE) as child:
        with pytest.raises(TimeoutExpired, match="took nothing"):
            stream.write_all(child.stdin, bytes(1 << 22), timeout_s=0.1)
        child.process.kill()
        with pytest.raises(NixboxError, match="connection to the machine was lost"):
            stream.write_all(child.stdin, bytes(1 << 22))


def test_a_missing_program_is_named() -> None:
    with pytest.raises(HostError, match="no-such-program"), run.piped(["no-such-program"]):
        pass


# --- what a guest says ---


def lines_of(code: str) -> list[str]:
    with run.piped([*PYTHON, code]) as child:
        lines = stream.Lines(child, "a test")
        found = []
        while line := lines.next(HANG_S):
            found.append(line)
        return found


def test_lines_have_a_bound(tmp_path: Path) -> None:
    assert lines_of("print('a\\nb', end='')") == ["a"]
    assert lines_of("import sys\nwhile True: sys.stdout.write('x' * 10000)") == []
    with run.piped(["sleep", "1000"]) as child, pytest.raises(TimeoutExpired, match="a test"):
        stream.Lines(child, "a test").next(0.1)


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ("tar: x: Cannot write: No space left on device\n", 2, "the machine's disk is full"),
        ("tar: x: Wrote only 512 of 10240 bytes\n", 2, "the machine's disk is full"),
        ("", 255, "the connection to the machine was lost"),
        ("sh: 1: exec: tar: not found\n", 127, "the guest lacks a program"),
        ("a\n\x1b[2Jb\n", 1, "what: the guest says (exit code 1):\n  a\n  ?[2Jb"),
    ],
)
def test_a_failure_in_words(said: str, code: int, words: str) -> None:
    error = stream.failure("what", said, code)
    assert isinstance(error, NixboxError)
    assert words in error.message
