"""The one module that starts processes.

`run` for short commands whose output is wanted, `stream` for long ones whose lines are followed, `spawn` for a
process that outlives this one, `replace` to become another program. A child gets an allow-list of the
environment, closed standard input unless asked, and a bound on its time.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from nixbox.errors import ExitCode, HostError, NixboxError, TimeoutExpired
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, TypeAlias

# What a child may see of our environment. Secrets of the caller's shell are not in it by default.
_ENV_EXACT = frozenset(
    (
        *("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "TZ", "USER", "NO_COLOR"),
        *("SSL_CERT_FILE", "NIX_SSL_CERT_FILE"),
        *("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"),
        *("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"),
    )
)
_ENV_PREFIXES = ("LC_", "NIX_", "XDG_")

Process: TypeAlias = subprocess.Popen[bytes]

# Which Debian package holds a program, for the hint when it is missing.
_PACKAGES = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "apt-helper": "apt",
    "mke2fs": "e2fsprogs",
    "nix": "nix-bin",
    "nix-instantiate": "nix-bin",
    "nix-store": "nix-bin",
    "pasta": "passt",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-x86_64": "qemu-system-x86",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
NOWHERE = subprocess.DEVNULL  # for the streams of `piped`
_TAIL_LINES = 30
_ARGV_SHOWN = 1000
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SSH_FAILED = 255  # what ssh exits with when it ends for a reason of its own (ssh(1))


class CommandError(NixboxError):
    """A program that was started failed; `code` is its exit code, `output` the end of what it printed."""

    def __init__(self, argv: Sequence[str], code: int, output: str, hint: str | None = None) -> None:
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"exited with {code}"
        if code == 127:
            how += " (command not found)"
        tail = "\n".join(output.strip().splitlines()[-_TAIL_LINES:])
        shown = shlex.join(argv)
        if len(shown) > _ARGV_SHOWN:
            shown = f"{shown[:_ARGV_SHOWN]}… ({len(argv)} words)"
        super().__init__(f"`{shown}` {how}" + (f":\n{tail}" if tail else ""), hint)
        self.code = code
        self.output = output


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # the real-time ones have no names
        return f"signal {number}"


@dataclass(frozen=True, slots=True)
class Completed:
    """What a finished command left: its exit code (negative: the signal that ended it) and its output."""

    code: int
    stdout: str
    stderr: str


def child_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: the allow-list, then `extra`."""
    env = {k: v for k, v in os.environ.items() if k in _ENV_EXACT or k.startswith(_ENV_PREFIXES)}
    env.update(extra or {})
    return env


def find_tool(name: str) -> str | None:
    """The path of a program, also from the sbin directories that an ordinary user's PATH may lack."""
    # By ourselves: what `shutil` imports for archives takes longer than all of this.
    for directory in (*os.get_exec_path(), "/usr/sbin", "/sbin", "/usr/lib/apt"):
        path = Path(directory, name)
        if os.access(path, os.X_OK) and path.is_file():
            return str(path)
    return None


def tool(name: str) -> str:
    """The path of a program that must be there; raises HostError with the package that has it."""
    found = find_tool(name)
    if found is None:
        package = _PACKAGES.get(name, name)
        raise HostError(
            f"the program `{name}` is not on this host",
            hint=f"on Debian: apt install {package}; or enter the project's dev shell; `nixbox doctor` lists all",
        )
    return found


def _program(name: str) -> str:
    """What to execute for the first word of a command: a path as it is, a name as `tool` finds it."""
    return name if "/" in name else tool(name)


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    check: bool = True,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    hint: str | None = None,
) -> Completed:
    """Run a command to its end and return its output (decoded as UTF-8, undecodable bytes replaced).

    Raises HostError when the program is missing, TimeoutExpired after `timeout_s` seconds, and CommandError on
    an exit code other than 0 when `check` is set.
    """
    argv = [_program(argv[0]), *argv[1:]]
    try:
        done = subprocess.run(
            argv,
            input=None if stdin is None else stdin.encode(errors="surrogateescape"),
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout_s,
            env=child_env(env),
            cwd=cwd,
            pass_fds=pass_fds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutExpired(f"`{shlex.join(argv)}` did not finish within {timeout_s:g} s") from None
    out = Completed(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))
    if check and out.code != 0:
        raise CommandError(argv, out.code, out.stderr or out.stdout, hint)
    return out


@contextlib.contextmanager
def beside(argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run a short command while the body runs, and wait for it at the body's end.

    Raises as `run` does; if the body raises, the command is ended and only that goes on.
    """
    argv = [tool(argv[0]), *argv[1:]]
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=child_env(env)
    )
    try:
        yield
    except BaseException:
        process.kill()
        process.communicate()
        raise
    try:
        said, _ = process.communicate(timeout=timeout_s)
    except BaseException as error:
        process.kill()
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutExpired(f"`{shlex.join(argv)}` did not finish within {timeout_s:g} s") from None
        raise
    if process.returncode != 0:
        raise CommandError(argv, process.returncode, said.decode(errors="replace"))


def stream(
    argv: Sequence[str],
    *,
    on_out: Callable[[str], None] | None = None,
    on_err: Callable[[str], None] | None = None,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Completed:
    """Run a long command, handing each line over as it comes; returns its code and the end of its output.

    A line handler that raises, and Ctrl-C, end the child before the exception goes on. The wait is the
    caller's to interrupt: builds and downloads have no natural bound.
    """
    import sh  # 60 ms of import that only builds and downloads pay

    program = _program(argv[0])
    kept_out: deque[str] = deque(maxlen=400)
    kept_err: deque[str] = deque(maxlen=400)
    failures: list[BaseException] = []

    def follow(kept: deque[str], handler: Callable[[str], None] | None) -> Callable[[str, Any, Any], bool | None]:
        def on_line(line: str, _stdin: Any, process: Any) -> bool | None:
            kept.append(line)
            try:
                if handler is not None:
                    handler(line.rstrip("\n"))
            except BaseException as error:
                failures.append(error)
                with contextlib.suppress(ProcessLookupError):
                    process.signal_group(signal.SIGTERM)
                return True  # sh: stop calling
            return None

        return on_line

    process = None
    code = 0
    try:
        with _signals_held():
            process = sh.Command(program)(
                *argv[1:],
                _bg=True,
                _bg_exc=False,
                _in=stdin,
                _out=follow(kept_out, on_out),
                _err=follow(kept_err, on_err),
                _env=child_env(env),
                _cwd=str(cwd) if cwd else None,
                _tty_out=False,
                _new_session=False,
                _new_group=True,  # Ctrl-C reaches us alone; we end the whole group below
                _encoding="utf-8",
                _decode_errors="replace",
            )
        process.wait()
    except sh.ErrorReturnCode as error:
        code = error.exit_code
    except BaseException:
        if process is not None:
            _end_group(process.pid)
        raise
    if failures:
        raise failures[0]
    return Completed(code, "".join(kept_out), "".join(kept_err))


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """What interrupts us waits for the body's end: a child that was begun in it can then be ended by its pid."""
    import threading

    came: list[int] = []
    ours = threading.current_thread() is threading.main_thread()  # others are never interrupted
    handlers = {sig: signal.getsignal(sig) for sig in _ENDING} if ours else {}
    previous = {sig: handler for sig, handler in handlers.items() if callable(handler)}
    for sig in previous:
        signal.signal(sig, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for sig, handler in previous.items():
            signal.signal(sig, handler)
    for number in came[:1]:
        previous[signal.Signals(number)](number, None)


def _end_group(pid: int, reap: Callable[[], object] = lambda: None) -> None:
    """End a process group of ours: SIGTERM, five seconds, SIGKILL. `reap` collects its leader if that has ended."""
    import time

    for sig in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(pid, sig)
        except ProcessLookupError:
            return
        for _ in range(100):
            reap()
            try:
                os.killpg(pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def own_program(module: str, label: str) -> list[str]:
    """The command line of a module of ours whose `main` is a process, started without the site's packages: a machine
    waits for it. `label` is what a list of processes shows; further arguments may follow.
    """
    root = str(Path(__file__).parent.parent)
    boot = f"import sys; sys.path.insert(0, sys.argv[1]); from {module} import main; main()"
    return [sys.executable, "-I", "-S", "-c", boot, root, label]


def open_log(path: Path) -> int:
    """A descriptor that appends to a log of this user's alone, which is made if it is not there. Raises OSError."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def spawn(
    argv: Sequence[str],
    *,
    log: Path,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    stdio: int | None = None,
    inside: Callable[[], None] | None = None,
    talk: bool = False,
) -> Process:
    """Start a process that outlives this one: its own session, no standard input, output appended to `log`.

    With `stdio`, a descriptor, that is its standard input and output, and only what it says on stderr goes to `log`.
    With `talk` these two are pipes. `inside` is called in the new process before it executes the program. Raises
    HostError when that fails.
    """
    argv = [_program(argv[0]), *argv[1:]]
    fd = open_log(log)
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if talk else subprocess.DEVNULL if stdio is None else stdio,
            stdout=subprocess.PIPE if talk else fd if stdio is None else stdio,
            stderr=fd,
            start_new_session=True,
            pass_fds=pass_fds,
            env=child_env(env),
            cwd="/",
            preexec_fn=inside,
        )
    except subprocess.SubprocessError as error:  # of `inside`; Python tells no more of it
        raise HostError(f"the process of `{argv[0]}` could not be prepared: {error}") from None
    finally:
        os.close(fd)


def attached(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    timeout_s: float | None,
    forward: Callable[[signal.Signals], None],
) -> int:
    """Run a command on our own standard streams and return its exit code (128 + n after signal n).

    SIGINT, SIGTERM and SIGHUP that reach us are handed to `forward`, and we go on waiting for the command to
    end. After `timeout_s` seconds `forward` gets SIGTERM, two seconds later SIGKILL, and the code is 124, as
    with timeout(1).
    """
    interrupted = False

    def on_signal(number: int, _: object) -> None:
        nonlocal interrupted
        interrupted = True
        forward(signal.Signals(number))

    previous = {sig: signal.signal(sig, on_signal) for sig in _ENDING}
    # In a process group of its own, so that a terminal's Ctrl-C reaches us alone, unless it reads that terminal.
    group = None if sys.stdin is not None and sys.stdin.isatty() else 0
    try:
        with subprocess.Popen([tool(argv[0]), *argv[1:]], env=child_env(env), process_group=group) as process:
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                for sig in (signal.SIGTERM, signal.SIGKILL):
                    forward(sig)
                    try:
                        process.wait(2)
                        break
                    except subprocess.TimeoutExpired:
                        continue
                process.kill()
                return int(ExitCode.TIMEOUT)
    finally:
        for sig, handler in previous.items():
            signal.signal(sig, handler)
    if interrupted and code == _SSH_FAILED:
        return int(ExitCode.INTERRUPTED)
    return 128 - code if code < 0 else code


def on_host(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> int:
    """Run a program of the user's own, with just this environment, to its end; returns its exit code (128 + signal).

    What it prints goes to our stderr, and it reads the terminal if there is one. An interrupt ends it, and goes on.
    """
    path = _program(argv[0])
    terminal = sys.stdin is not None and sys.stdin.isatty()
    process = None
    try:
        with _signals_held():
            process = subprocess.Popen(
                [path, *argv[1:]],
                stdin=None if terminal else subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                env=dict(env),
                cwd=cwd,
                process_group=None if terminal else 0,  # one of its own could not read the terminal
            )
        code = process.wait()
    except BaseException:
        if process is not None:
            if terminal:  # what ended us came to it as well; what it started is in our own group
                process.terminate()
                _end(process)
            else:
                _end_group(process.pid, process.poll)
                process.wait()
        raise
    return 128 - code if code < 0 else code


def _end(process: Process) -> None:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Piped:
    """A process that is talked to: `stdin` and `stdout` are our ends of its pipes, unless they were given."""

    def __init__(self, process: Process, argv: Sequence[str]) -> None:
        import threading

        self.argv = argv
        self.process = process
        self._said: deque[bytes] = deque(maxlen=8)
        # Somebody must read it at all times, or a process that complains much would stand still.
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    @property
    def stdin(self) -> int:
        """Where to write to."""
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    @property
    def stdout(self) -> int:
        """Where to read from."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        with contextlib.suppress(OSError, ValueError):
            while piece := os.read(self.process.stderr.fileno(), 8192):
                self._said.append(piece)

    def said(self) -> str:
        """The end of what it said on stderr: 64 KiB at most."""
        return b"".join(self._said).decode(errors="replace")

    def no_more(self) -> None:
        """Close its standard input."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def finish(self, timeout_s: float) -> int:
        """Wait for its end; returns the exit code (negative: a signal). Raises TimeoutExpired."""
        self.no_more()
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutExpired(
                f"`{shlex.join(self.argv)[:_ARGV_SHOWN]}` did not end within {timeout_s:g} s"
            ) from None
        self._reader.join(timeout_s)
        return code

    def end(self) -> None:
        """Kill it unless it has ended, and let go of it."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
        # Whoever else has its stderr (a shared connection that it began) does not hold us up.
        self._reader.join(1)
        for stream in (
            self.process.stdin,
            self.process.stdout,
            *(() if self._reader.is_alive() else (self.process.stderr,)),
        ):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


@contextlib.contextmanager
def piped(
    argv: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Piped]:
    """Run a process beside the body with pipes for its streams, or with the given descriptors.

    It is killed at the body's end unless it has ended: `finish` waits for it. In a process group of its own, so that
    a terminal's Ctrl-C reaches us alone. Raises HostError when the program is missing.
    """
    argv = [_program(argv[0]), *argv[1:]]
    child = None
    try:
        with _signals_held():
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if stdin is None else stdin,
                stdout=subprocess.PIPE if stdout is None else stdout,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=child_env(env),
                process_group=0,
            )
            child = Piped(process, argv)
        yield child
    finally:
        if child is not None:
            child.end()


def replace(argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> NoReturn:
    """Become another program: streams, terminal, signals and exit code are its own from here on.

    `env`: just this environment; else the allow-list of ours. Raises OSError for what cannot be executed.
    """
    path = _program(argv[0])
    if cwd is not None:
        os.chdir(cwd)
    os.execve(path, list(argv), child_env() if env is None else dict(env))
