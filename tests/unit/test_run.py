"""The one module that starts processes, with real ones: bounds, signals, environment and what is said of them."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nixbox import run
from nixbox.errors import ExitCode, HostError, TimeoutExpired
from nixbox.run import CommandError

HANG_S = 30.0  # a bound against hanging, never an expectation
PYTHON = (sys.executable, "-I", "-S", "-c")


def python(code: str, *args: str) -> list[str]:
    return [*PYTHON, code, *args]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie, which a container's first process may not reap, has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# --- run -------------------------------------------------------------------------------------------------


def test_output_and_code_come_back() -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = run.run(python(code), timeout_s=HANG_S, check=False)
    assert (done.code, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_undecodable_output_is_no_crash() -> None:
    code = r"import os; os.write(1, b'a\xff\xc3\xa9')"
    assert run.run(python(code), timeout_s=HANG_S).stdout == "a\ufffdé"


@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("mke2fs", "e2fsprogs"),
        ("nix", "nix-bin"),
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("zzz-none", "zzz-none"),
    ],
)
def test_a_missing_program_names_its_package(
    program: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_tool", lambda name: None)
    with pytest.raises(HostError) as caught:
        run.run([program, "--version"], timeout_s=HANG_S)
    assert f"`{program}`" in caught.value.message
    assert f"apt install {package};" in (caught.value.hint or "")
    assert caught.value.exit_code == ExitCode.HOST


def test_programs_are_also_found_outside_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "a-tool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert run.find_tool("a-tool") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.find_tool("a-tool") == str(program)
    program.chmod(0o644)
    (tmp_path / "a-directory").mkdir()
    assert run.find_tool("a-tool") is run.find_tool("a-directory") is None
    # sbin is searched although PATH lacks it
    if Path("/usr/sbin/mke2fs").exists() or Path("/sbin/mke2fs").exists():
        assert run.find_tool("mke2fs") is not None


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    argv = python(code, str(pid_file))
    with pytest.raises(TimeoutExpired, match=re.escape("did not finish within 2 s")) as caught:
        run.run(argv, timeout_s=2)
    assert shlex.join(argv) in caught.value.message
    assert gone(int(pid_file.read_text()))


def test_a_command_beside_the_body_has_ended_after_it(tmp_path: Path) -> None:
    written = tmp_path / "written"
    with run.beside(python(f"open({str(written)!r}, 'w').write('x')"), timeout_s=30):
        pass
    assert written.read_text() == "x"
    with pytest.raises(CommandError, match="broken"), run.beside(python("exit('broken')"), timeout_s=30):
        written.unlink()
    assert not written.exists(), "the body ran"


def test_a_command_beside_a_body_that_failed_is_ended(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"
    with pytest.raises(ZeroDivisionError), run.beside(python(code), timeout_s=30):
        wait_for(lambda: pid_file.exists() and pid_file.read_text().endswith(" "), "the command runs")
        _ = 1 / 0
    assert gone(int(pid_file.read_text()))


def test_a_command_beside_that_takes_too_long_is_ended() -> None:
    with pytest.raises(TimeoutExpired), run.beside(python("import time; time.sleep(600)"), timeout_s=0.2):
        pass


def test_a_failure_can_be_pasted() -> None:
    argv = python("import sys; print('why', file=sys.stderr); sys.exit(9)", "it's", "a b", "$HOME", "new\nline", "")
    with pytest.raises(CommandError) as caught:
        run.run(argv, timeout_s=HANG_S, hint="do that")
    found = re.search(r"`(.*)` exited with 9:\nwhy", caught.value.message, re.DOTALL)
    assert found is not None
    assert shlex.split(found[1]) == argv
    assert (caught.value.code, caught.value.output, caught.value.hint) == (9, "why\n", "do that")


def test_a_failure_shows_the_end_of_a_long_log() -> None:
    code = "import sys; [print(f'line {i}', file=sys.stderr) for i in range(1000)]; sys.exit(1)"
    with pytest.raises(CommandError) as caught:
        run.run(python(code), timeout_s=HANG_S)
    lines = caught.value.message.splitlines()
    assert lines[-1] == "line 999"
    assert 10 <= len(lines) < 60


def test_a_failure_that_only_wrote_to_stdout_shows_that() -> None:
    with pytest.raises(CommandError, match="only here"):
        run.run(python("import sys; print('only here'); sys.exit(1)"), timeout_s=HANG_S)


def test_a_death_by_signal_names_it() -> None:
    with pytest.raises(CommandError, match="was ended by SIGKILL") as caught:
        run.run(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), timeout_s=HANG_S)
    assert caught.value.code == -signal.SIGKILL


def test_127_is_put_into_words() -> None:
    with pytest.raises(CommandError, match="exited with 127 \\(command not found\\)"):
        run.run(["sh", "-c", "exit 127"], timeout_s=HANG_S)


def test_the_environment_is_an_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("NIXBOXTEST_TOKEN", "s3cret")
    monkeypatch.setenv("LC_TIME", "C")
    seen = run.run(["env"], timeout_s=HANG_S, env={"GIVEN": "yes"}).stdout
    assert "s3cret" not in seen
    assert {"LC_TIME=C", "GIVEN=yes", f"PATH={os.environ['PATH']}"} <= set(seen.splitlines())


def test_standard_input_is_closed_unless_given() -> None:
    assert run.run(["cat"], timeout_s=HANG_S).stdout == ""
    assert run.run(["cat"], timeout_s=HANG_S, stdin="täglich\n").stdout == "täglich\n"


def test_directory_and_descriptors_are_handed_over(tmp_path: Path) -> None:
    assert run.run(["pwd", "-P"], timeout_s=HANG_S, cwd=tmp_path).stdout.strip() == str(tmp_path.resolve())
    read_fd, write_fd = os.pipe()
    try:
        run.run(python(f"import os; os.write({write_fd}, b'here')"), timeout_s=HANG_S, pass_fds=[write_fd])
        assert os.read(read_fd, 10) == b"here"
        failing = python(f"import os; os.write({write_fd}, b'here')")
        assert run.run(failing, timeout_s=HANG_S, check=False).code != 0  # not inherited unless named
    finally:
        os.close(read_fd)
        os.close(write_fd)


# --- stream ----------------------------------------------------------------------------------------------


def test_lines_come_in_order_on_both_streams() -> None:
    code = (
        "import sys\nfor i in range(300):\n"
        " print(f'o{i}', flush=True); print(f'e{i}', file=sys.stderr, flush=True)\nprint('é end', end='')"
    )
    out: list[str] = []
    err: list[str] = []
    done = run.stream(
        python(code), on_out=out.append, on_err=err.append, env={"PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}
    )
    assert done.code == 0
    assert out == [*(f"o{i}" for i in range(300)), "é end"]
    assert err == [f"e{i}" for i in range(300)]
    assert done.stderr.endswith("e299\n")


def test_a_stream_that_fails_gives_its_code() -> None:
    code = "import sys; print('last words', file=sys.stderr); sys.exit(5)"
    done = run.stream(python(code))
    assert (done.code, done.stderr) == (5, "last words\n")


def test_a_streamed_command_ended_by_a_signal_gives_a_negative_code() -> None:
    assert run.stream(python("import os; os.kill(os.getpid(), 9)")).code == -9


def test_the_input_of_a_stream_is_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    assert run.stream(["cat"], on_out=lines.append).stdout == ""
    text = "".join(f"line {i} $HOME 'ü'\n" for i in range(5000))
    run.stream(["cat"], on_out=lines.append, stdin=text)
    assert "\n".join(lines) + "\n" == text


def test_the_environment_of_a_stream_is_an_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXBOXTEST_TOKEN", "s3cret")
    lines: list[str] = []
    run.stream(["env"], on_out=lines.append, env={"GIVEN": "yes"})
    assert "GIVEN=yes" in lines
    assert not any("s3cret" in line for line in lines)


def test_a_missing_program_to_stream_is_a_host_error() -> None:
    with pytest.raises(HostError, match="zzz-none"):
        run.stream(["zzz-none"])


FAMILY = "sleep 600 & echo $$ $!; wait"


def test_a_handler_that_fails_ends_the_child(tmp_path: Path) -> None:
    marker = tmp_path / "went-on"

    def fail(line: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.stream(["sh", "-c", 'echo first; sleep 2; touch "$1"', "sh", str(marker)], on_out=fail)
    assert not marker.exists()


def end(pids: list[int]) -> None:
    for pid in pids:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


STREAMER = """
import os, signal, sys, time
sys.path[:] = sys.argv[3:]
import sh
from nixbox import run
seen = []
def show(line):
    print(line, flush=True)
    seen.append(line)
if sys.argv[2] == "early":  # the signal comes when the child is there, and nobody knows its pid yet
    made = sh.RunningCommand.__init__
    def init(*args, **settings):
        made(*args, **settings)
        os.kill(os.getpid(), signal.SIGINT)
        while not seen:
            time.sleep(0.01)
    sh.RunningCommand.__init__ = init
try:
    run.stream(["sh", "-c", sys.argv[1]], on_out=show)
except KeyboardInterrupt:
    os._exit(130)  # as the program does: the threads of sh may be at anything
"""


@pytest.mark.parametrize("when", ["early", "later"])
def test_ctrl_c_ends_the_whole_group(when: str) -> None:
    argv = [sys.executable, "-I", "-c", STREAMER, FAMILY, when, *sys.path]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout is not None
        pids = [int(word) for word in ours.stdout.readline().split()]
        try:
            assert len(pids) == 2
            if when == "later":
                ours.send_signal(signal.SIGINT)
            assert ours.wait(HANG_S) == 130
            for pid in pids:
                wait_for(lambda pid=pid: gone(pid), "the child's end")  # type: ignore[misc]
        finally:
            end(pids)
            ours.kill()


# --- spawn -----------------------------------------------------------------------------------------------


def test_what_is_spawned_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXBOXTEST_TOKEN", "s3cret")
    log = tmp_path / "log"
    log.write_text("before\n")
    log.chmod(0o600)
    code = (
        "import os, sys\n"
        "print(os.getsid(0) == os.getpid(), os.getcwd(), repr(sys.stdin.read()), os.getenv('NIXBOXTEST_TOKEN'))\n"
        "print('err', file=sys.stderr)"
    )
    process = run.spawn(python(code), log=log)
    assert process.wait(HANG_S) == 0
    lines = log.read_text().splitlines()
    assert lines[0] == "before"
    assert sorted(lines[1:]) == sorted(["True / '' None", "err"])


def test_a_new_log_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        assert run.spawn(["true"], log=tmp_path / "log").wait(HANG_S) == 0
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


def test_a_log_is_never_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "log").symlink_to(target)
    with pytest.raises(OSError) as caught:
        run.spawn(["echo", "overwritten"], log=tmp_path / "log").wait(HANG_S)
    assert caught.value.errno == errno.ELOOP
    assert target.read_text() == "mine"


def test_a_spawned_process_may_speak_over_a_socket(tmp_path: Path) -> None:
    ours, its = socket.socketpair()
    with ours:
        with its:
            code = "import sys; print(sys.stdin.readline().upper(), flush=True); print('log', file=sys.stderr)"
            process = run.spawn(python(code), log=tmp_path / "log", stdio=its.fileno())
        ours.settimeout(HANG_S)
        ours.sendall(b"hello\n")
        with ours.makefile("rb") as said:
            assert said.read() == b"HELLO\n\n"  # to its end: nobody else holds the other side
        assert process.wait(HANG_S) == 0
    assert (tmp_path / "log").read_text() == "log\n"


def test_only_named_descriptors_are_inherited(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    try:
        code = "import os, sys; print(sorted(map(int, os.listdir('/proc/self/fd'))))"
        run.spawn(python(code), log=tmp_path / "log", pass_fds=[write_fd]).wait(HANG_S)
        fds = set(eval((tmp_path / "log").read_text()))
        assert write_fd in fds
        assert read_fd not in fds
    finally:
        os.close(read_fd)
        os.close(write_fd)


# --- attached --------------------------------------------------------------------------------------------


def nothing(sig: signal.Signals) -> None:
    raise AssertionError(f"{sig.name} was not expected")


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_exit_codes_pass_through(code: int) -> None:
    assert run.attached(["sh", "-c", f"exit {code}"], env={}, timeout_s=None, forward=nothing) == code


def test_a_signal_n_becomes_128_plus_n() -> None:
    assert run.attached(["sh", "-c", "kill -TERM $$"], env={}, timeout_s=HANG_S, forward=nothing) == 128 + 15


def test_streams_are_our_own(capfd: pytest.CaptureFixture[str]) -> None:
    run.attached(["sh", "-c", 'echo "$X"; echo err >&2'], env={"X": "out"}, timeout_s=HANG_S, forward=nothing)
    assert capfd.readouterr() == ("out\n", "err\n")


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_forwarded_and_the_command_goes_on(sig: signal.Signals, tmp_path: Path) -> None:
    seen: list[signal.Signals] = []
    marker = tmp_path / "forwarded"

    def forward(found: signal.Signals) -> None:
        seen.append(found)
        marker.touch()

    before = signal.getsignal(sig)
    script = f'kill -{sig.name.removeprefix("SIG")} "$PPID"; until [ -e "$1" ]; do sleep 0.02; done; exit 7'
    code = run.attached(["sh", "-c", script, "sh", str(marker)], env={}, timeout_s=HANG_S, forward=forward)
    assert (code, seen) == (7, [sig])
    assert signal.getsignal(sig) is before


def test_a_timeout_forwards_sigterm_first(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    seen: list[signal.Signals] = []

    def forward(sig: signal.Signals) -> None:
        seen.append(sig)
        os.kill(int(pid_file.read_text()), sig)

    script = 'echo $$ >"$1.new"; mv "$1.new" "$1"; exec sleep 600'
    code = run.attached(["sh", "-c", script, "sh", str(pid_file)], env={}, timeout_s=1, forward=forward)
    assert (code, seen) == (ExitCode.TIMEOUT, [signal.SIGTERM])
    assert gone(int(pid_file.read_text()))


def test_a_command_that_no_forwarding_reaches_is_killed(tmp_path: Path) -> None:
    seen: list[signal.Signals] = []
    pid_file = tmp_path / "pid"
    script = 'echo $$ >"$1"; exec sleep 600'
    code = run.attached(["sh", "-c", script, "sh", str(pid_file)], env={}, timeout_s=0.5, forward=seen.append)
    assert (code, seen) == (ExitCode.TIMEOUT, [signal.SIGTERM, signal.SIGKILL])
    assert gone(int(pid_file.read_text()))


# --- replace ---------------------------------------------------------------------------------------------


def test_replace_becomes_the_program() -> None:
    code = (
        "import os, sys\nsys.path[:] = sys.argv[1:]\nfrom nixbox import run\n"
        "print(os.getpid(), flush=True)\nrun.replace(['sh', '-c', 'echo $$ $NIXBOXTEST_TOKEN; exit 4'])"
    )
    done = run.run(
        [sys.executable, "-I", "-c", code, *sys.path],
        timeout_s=HANG_S,
        check=False,
        env={"NIXBOXTEST_TOKEN": "s3cret"},
    )
    first, second = done.stdout.splitlines()
    assert (done.code, first) == (4, second)


# --- a child that ends with its parent --------------------------------------------------------------------


@pytest.mark.parametrize("orphaned", [False, True], ids=["its parent lives", "its parent has ended"])
def test_who_is_to_end_with_its_parent_does_not_outlive_it(orphaned: bool) -> None:
    code = """
import os, sys, time
from nixbox import linux
parent = os.getpid()
if os.fork() == 0:
    while sys.argv[1] == "True" and os.getppid() == parent:
        time.sleep(0.001)
    linux.end_with_parent(parent)
    os.write(1, b"lived")
    os._exit(0)
if sys.argv[1] == "False":
    os.wait()
"""
    # It has its parent's output, which ends with the last of the two.
    done = run.run([sys.executable, "-c", code, str(orphaned)], timeout_s=HANG_S)
    assert done.stdout == ("" if orphaned else "lived")
