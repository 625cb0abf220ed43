"""The programs of nixbox's own that stand beside a machine: modules whose `main` is a process.

Each reads its settings from its standard input, and answers on its standard output. It is started as a Python of its
own, or, where one waits (`Programs.waiting`), forked from that (`forkserver`), which takes a tenth of the time.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nixbox import run
from nixbox.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Protocol
else:  # without what `typing` costs
    Protocol = object

_NOWHERE = Path(os.devnull)
_ANSWER_TIMEOUT_S = 30.0  # it may still be importing, on a slow and busy host


class Program(Protocol):
    """One that was started. `stdin` and `stdout` are our ends of its pipes."""

    pid: int
    stdin: IO[bytes] | None
    stdout: IO[bytes] | None

    def kill(self) -> None:
        """End it at once, unless it has ended."""

    def wait(self) -> object:
        """Wait for its end."""


class Forked:
    """A program that another process is the parent of: known by a pidfd, which stays open as long as this object."""

    def __init__(self, pid: int, pidfd: int, stdin: int, stdout: int) -> None:
        self.pid = pid
        self.stdin: IO[bytes] | None = os.fdopen(stdin, "wb")
        self.stdout: IO[bytes] | None = os.fdopen(stdout, "rb")
        self._pidfd = pidfd

    def __del__(self) -> None:
        os.close(self._pidfd)

    def kill(self) -> None:
        """SIGKILL, by the pidfd: never to another process of the same number."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self) -> None:
        """Wait for its end; its exit code is its parent's to know."""
        select.select([self._pidfd], [], [])


def _most_fds() -> int:
    from nixbox.linux import MOST_FDS  # not for commands that start nothing: it brings ctypes

    return MOST_FDS


class Programs:
    """Starts them; with nobody waiting, as programs of their own."""

    def __init__(self) -> None:
        self._orders: socket.socket | None = None

    @property
    def waits(self) -> bool:
        """Whether there is a process to fork from."""
        return self._orders is not None

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Have a process wait (see `expect`) for as long as the body runs; what it has started stays."""
        if not hasattr(os, "pidfd_open"):  # no Linux
            yield
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                process = run.spawn(run.own_program("nixbox.forkserver", label), log=_NOWHERE, stdio=theirs.fileno())
            self._orders = ours
            try:
                yield
            finally:
                self._orders = None
                process.kill()  # it may still be importing, for nobody
                process.wait()

    def expect(self, module: str, *arguments: str | list[str]) -> None:
        """Let who waits import a module that it will be asked for, and call its `prepare` with these arguments."""
        if self._orders is not None:
            with contextlib.suppress(OSError):  # it has ended: `start` does without
                self._orders.send(marshal.dumps((module, *arguments)))

    def start(
        self,
        module: str,
        label: str,
        arguments: Sequence[str] = (),
        *,
        log: Path = _NOWHERE,
        pass_fds: Sequence[int] = (),
    ) -> Program:
        """Start `main` of a module in a session of its own; what it says on stderr is appended to `log`.

        `label` is what a list of processes shows; it inherits `pass_fds` at their numbers. Raises HostError.
        """
        if self._orders is not None and len(pass_fds) <= _most_fds() - 3:
            forked = self._fork(self._orders, module, label, arguments, log, pass_fds)
            if forked is not None:
                return forked
            self._orders = None  # it has ended
        argv = [*run.own_program(module, label), *arguments]
        return run.spawn(argv, log=log, pass_fds=pass_fds, talk=True)

    def _fork(
        self,
        orders: socket.socket,
        module: str,
        label: str,
        arguments: Sequence[str],
        log: Path,
        pass_fds: Sequence[int],
    ) -> Forked | None:
        """None: the one who waits is not there any more. Raises HostError when it does not answer."""
        from nixbox import light  # as in _most_fds: it brings struct

        with ExitStack() as theirs, ExitStack() as undo:
            stdin, ours_in = os.pipe()
            theirs.callback(os.close, stdin)
            undo.callback(os.close, ours_in)
            ours_out, stdout = os.pipe()
            theirs.callback(os.close, stdout)
            undo.callback(os.close, ours_out)
            errors = run.open_log(log)
            theirs.callback(os.close, errors)
            order = marshal.dumps((module, label, list(arguments), list(pass_fds)))
            try:
                socket.send_fds(orders, [order], [stdin, stdout, errors, *pass_fds])
                if not select.select([orders], [], [], _ANSWER_TIMEOUT_S)[0]:
                    raise HostError(f"the process that `{label}` is to come from does not answer", hint="try again")
                answer, fds = light.receive_fds(orders, 100, 1)
            except OSError:
                return None
            if not answer:
                return None
            undo.pop_all()
        return Forked(int(answer), fds[0], ours_in, ours_out)
