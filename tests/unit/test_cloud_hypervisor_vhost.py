"""vhost-user messages that are passed on: each whole, with its own descriptors, whatever waits behind it."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nixbox.errors import NixboxError
from nixbox.machine.cloud_hypervisor_vhost import Directory, forward

HANG_S = 10.0


def message(request: int, payload: bytes = b"") -> bytes:
    return struct.pack("=III", request, 1, len(payload)) + payload


@contextmanager
def forwarded() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends between which one direction is passed on; afterwards nothing of it runs on."""
    sender, source = socket.socketpair()
    target, receiver = socket.socketpair()
    with sender, source, target, receiver:
        receiver.settimeout(HANG_S)
        thread = threading.Thread(target=forward, args=(source, target), daemon=True)
        thread.start()
        yield sender, receiver
        sender.close()
        thread.join(HANG_S)
        assert not thread.is_alive()


def test_descriptors_stay_with_their_message() -> None:
    """A front-end does not wait for each answer: one without descriptors may come just before one with."""
    sender, source = socket.socketpair()
    target, receiver = socket.socketpair()
    with sender, source, target, receiver:
        memory = os.memfd_create("memory")
        os.write(memory, b"the guest's")
        event = os.eventfd(0)
        sender.sendall(message(2, b"features"))
        socket.send_fds(sender, [message(5, b"x" * 40)], [memory, event])
        sender.sendall(message(3))
        os.close(memory)
        os.close(event)
        sender.shutdown(socket.SHUT_WR)
        forward(source, target)  # all of it waits already
        receiver.settimeout(HANG_S)
        assert socket.recv_fds(receiver, 12, 4)[:2] == (message(2, b"features")[:12], [])
        assert socket.recv_fds(receiver, 8, 4)[:2] == (b"features", [])
        header, fds, _, _ = socket.recv_fds(receiver, 12, 4)
        assert header == message(5, b"x" * 40)[:12] and len(fds) == 2
        assert os.pread(fds[0], 100, 0) == b"the guest's"
        for fd in fds:
            os.close(fd)
        assert receiver.recv(40) == b"x" * 40
        assert socket.recv_fds(receiver, 100, 4)[:2] == (message(3), [])
        assert receiver.recv(1) == b""


def test_a_message_may_come_in_pieces() -> None:
    with forwarded() as (sender, receiver):
        whole = message(9, b"payload")
        for at in range(len(whole)):
            sender.sendall(whole[at : at + 1])
        assert receiver.recv(100) == whole


def test_no_descriptor_is_kept() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with forwarded() as (sender, receiver):
        for _ in range(20):
            fd = os.memfd_create("m")
            socket.send_fds(sender, [message(1)], [fd])
            os.close(fd)
            _, fds, _, _ = socket.recv_fds(receiver, 12, 4)
            os.close(fds[0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("said", [struct.pack("=III", 1, 1, 1 << 20), b"short"])
def test_what_is_no_message_ends_the_connection(said: bytes) -> None:
    with forwarded() as (sender, receiver):
        sender.sendall(said)
        sender.shutdown(socket.SHUT_WR)
        assert receiver.recv(1) == b""


def test_both_ways_end_with_either_end(tmp_path: Path) -> None:
    for closes in (0, 1):
        ours, process = socket.socketpair()
        directory = Directory(ours)
        hypervisor = socket.socket(socket.AF_UNIX)
        with directory.offered(tmp_path / "fs"):
            hypervisor.connect(str(tmp_path / "fs"))
            hypervisor.sendall(message(1))
            assert process.recv(100) == message(1)
            process.sendall(message(1, b"features"))
            assert hypervisor.recv(100) == message(1, b"features")
        assert not directory.wait(0.05)
        ends = (hypervisor, process)
        ends[closes].close()
        assert directory.wait(HANG_S)
        assert ends[1 - closes].recv(1) == b""
        ends[1 - closes].close()


def test_a_directory_that_nobody_takes(tmp_path: Path) -> None:
    ours, process = socket.socketpair()
    directory = Directory(ours)
    with process:
        with pytest.raises(NixboxError, match="did not connect"), directory.offered(tmp_path / "fs"):
            assert (tmp_path / "fs").exists()
        process.settimeout(HANG_S)
        assert process.recv(1) == b""
        assert directory.wait(HANG_S)
    assert not (tmp_path / "fs").exists()
