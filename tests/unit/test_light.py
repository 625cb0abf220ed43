"""The parts of the standard library that processes beside a machine have from its compiled modules."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import nixbox
from nixbox import light

HANG_S = 10.0


def test_its_numbers_are_those_of_the_library() -> None:
    names = ("SIG_DFL", "SIG_IGN", "SIGINT", "SIGKILL", "SIGPIPE", "SIGTERM")
    assert [getattr(light, name) for name in names] == [getattr(signal, name) for name in names]
    for name in ("AF_UNIX", "AF_INET", "SOCK_SEQPACKET", "SHUT_RDWR", "MSG_CMSG_CLOEXEC", "AI_NUMERICHOST"):
        assert getattr(light, name) == getattr(socket, name)


def test_a_signal_has_the_handler_that_it_was_given() -> None:
    came: list[int] = []
    before = signal.getsignal(signal.SIGUSR1)
    try:
        light.signal(signal.SIGUSR1, lambda number, _: came.append(number))
        os.kill(os.getpid(), signal.SIGUSR1)
        assert came == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_descriptors_are_sent_to_the_library_and_come_from_it(count: int) -> None:
    ours, theirs = light.socket_pair(light.SOCK_SEQPACKET)
    with ours, socket.socket(fileno=theirs.detach()) as other:
        assert other.family == socket.AF_UNIX and other.type == socket.SOCK_SEQPACKET
        pipes = [os.pipe() for _ in range(count)]
        light.send_fds(ours, b"there", [write for _, write in pipes])
        words, there, _, _ = socket.recv_fds(other, 100, 3)
        socket.send_fds(other, [b"and back"], there)
        back, fds = light.receive_fds(ours, 100, 3)
        assert (words, back, len(fds)) == (b"there", b"and back", count)
        assert not any(os.get_inheritable(fd) for fd in fds)
        for (read, write), one, other_one in zip(pipes, there, fds, strict=True):
            os.write(other_one, b"x")
            assert os.read(read, 2) == b"x"
            for fd in (read, write, one, other_one):
                os.close(fd)


def test_more_descriptors_than_were_asked_for_are_refused_and_let_go() -> None:
    ours, theirs = light.socket_pair(light.SOCK_SEQPACKET)
    read, write = os.pipe()
    with ours, theirs:
        light.send_fds(theirs, b"two", [write, write])
        with pytest.raises(OSError, match="more descriptors came"):
            light.receive_fds(ours, 100, 1)
        os.close(write)
        assert os.read(read, 1) == b""  # nobody has one any more
    os.close(read)


def test_no_message_and_no_descriptors_at_the_end() -> None:
    ours, theirs = light.socket_pair(light.SOCK_STREAM)
    with ours:
        theirs.close()
        assert light.receive_fds(ours, 100, 3) == (b"", [])


def test_a_server_accepts_what_the_library_connects(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with light.Socket(light.AF_UNIX, light.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(path)
            accepted, _ = listener.accept()
            with accepted:
                assert isinstance(accepted, light.Socket) and accepted.gettimeout() is None
                assert not os.get_inheritable(accepted.fileno())
                accepted.sendall(b"hello")
                assert client.recv(10) == b"hello"
            assert client.recv(10) == b""  # closed
    assert listener.fileno() == -1


def test_accept_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    with light.Socket(light.AF_UNIX, light.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(1)
        listener.settimeout(0.01)
        with pytest.raises(TimeoutError):
            listener.accept()


ACTS: list[Callable[[type], object]] = [
    lambda suppress: suppress(OSError).__exit__(OSError, OSError(), None),
    lambda suppress: suppress(OSError).__exit__(FileNotFoundError, FileNotFoundError(), None),
    lambda suppress: suppress(OSError, KeyError).__exit__(KeyError, KeyError(), None),
    lambda suppress: suppress(OSError).__exit__(ValueError, ValueError(), None),
    lambda suppress: suppress(OSError).__exit__(None, None, None),
    lambda suppress: suppress().__exit__(OSError, OSError(), None),
    lambda suppress: suppress(OSError).__enter__(),
]


@pytest.mark.parametrize("act", ACTS)
def test_what_is_suppressed_is_what_the_library_does(act: Callable[[type], object]) -> None:
    assert bool(act(light.suppress)) == bool(act(contextlib.suppress))


def test_a_suppressed_failure_ends_the_body_alone() -> None:
    done = []
    with light.suppress(KeyError):
        done.append(1)
        {}["x"]  # type: ignore[index]
        done.append(2)
    with pytest.raises(ValueError, match="no"), light.suppress(KeyError):
        raise ValueError("no")
    assert done == [1]


def test_a_program_has_such_sockets_and_not_the_library() -> None:
    """A process with nothing of the library's `socket` in it answers one that has it."""
    root = Path(nixbox.__file__).parent.parent
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); from nixbox import light\n"
        "with light.Socket(fileno=0) as sock:\n"
        "    while data := sock.recv(100): sock.sendall(data.upper())\n"
        "assert 'socket' not in sys.modules"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdin=theirs.fileno())
        theirs.close()
        timer = threading.Timer(HANG_S, process.kill)
        timer.start()
        ours.sendall(b"words")
        assert ours.recv(100) == b"WORDS"
        ours.shutdown(socket.SHUT_WR)
        assert process.wait(HANG_S) == 0
        timer.cancel()
