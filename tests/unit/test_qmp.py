"""The QMP client against a scripted peer: answers late, in pieces, wrong or never."""

from __future__ import annotations

import array
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nixbox.errors import ExitCode, NixboxError, TimeoutExpired
from nixbox.machine import qmp as qmp_module
from nixbox.machine.qmp import Qmp, QmpClosed, QmpCommandError, QmpError, QmpProtocolError, QmpTimeout

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": ["oob"]}}
SHORT_S = 0.2  # a wait that is meant to run out
HANG_S = 10.0  # nothing here may take this long: a bound against hangs, not a measure of speed


class Peer:
    """The other end: sends what the script says, hands over the commands it receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(HANG_S)
        self.sock = sock
        self.lines = sock.makefile("rb")

    def send(self, *messages: Any) -> None:
        self.raw(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    def raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def command(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.lines.readline())
        return message

    def answer(self, value: Any = None) -> dict[str, Any]:
        """Take one command and return success for it."""
        message = self.command()
        self.send({"return": {} if value is None else value, "id": message["id"]})
        return message

    def wait_closed(self) -> None:
        assert self.lines.read() == b""

    def close(self) -> None:
        self.lines.close()
        self.sock.close()


@contextmanager
def playing(script: Callable[[Peer], None], *, greet: bool = True) -> Iterator[socket.socket]:
    """Our end of a socket pair whose other end plays `script`; an assertion in the script fails the test."""
    ours, theirs = socket.socketpair()
    failures: list[BaseException] = []

    def play() -> None:
        peer = Peer(theirs)
        try:
            if greet:
                peer.send(GREETING)
                assert peer.answer()["execute"] == "qmp_capabilities"
            script(peer)
        except BaseException as error:
            failures.append(error)
        finally:
            peer.close()

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(HANG_S)
    assert not thread.is_alive(), "the scripted peer hangs"
    if failures:
        raise failures[0]


@contextmanager
def connected(script: Callable[[Peer], None]) -> Iterator[Qmp]:
    with playing(script) as sock, Qmp.from_socket(sock, timeout_s=HANG_S) as qmp:
        yield qmp


@contextmanager
def quickly() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < HANG_S / 2


def event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data, "timestamp": {"seconds": 1700000000, "microseconds": 500000}}


# --- the ordinary course ------------------------------------------------------------------------------------


def test_greeting_tells_the_version_and_a_command_returns_its_value() -> None:
    def script(peer: Peer) -> None:
        message = peer.answer({"status": "running"})
        assert message["execute"] == "query-status"
        assert "arguments" not in message

    with connected(script) as qmp:
        assert qmp.version == "7.2.22"
        assert qmp.execute("query-status") == {"status": "running"}


def test_arguments_cross_and_every_command_has_its_own_id() -> None:
    seen: list[dict[str, Any]] = []

    def script(peer: Peer) -> None:
        seen.extend((peer.answer(), peer.answer()))

    with connected(script) as qmp:
        qmp.execute("device_del", {"id": "fs0", "text": "é\n"})
        qmp.execute("device_del", {"id": "fs0"})
    assert seen[0]["arguments"] == {"id": "fs0", "text": "é\n"}
    assert seen[0]["id"] != seen[1]["id"]


def test_an_error_reply_carries_class_and_description() -> None:
    def script(peer: Peer) -> None:
        ident = peer.command()["id"]
        peer.send({"id": ident, "error": {"class": "CommandNotFound", "desc": "no such command"}})
        peer.answer(1)

    with connected(script) as qmp:
        with pytest.raises(QmpCommandError, match="`nope`: no such command") as caught:
            qmp.execute("nope")
        assert caught.value.error_class == "CommandNotFound"
        assert caught.value.desc == "no such command"
        assert qmp.execute("next") == 1


def test_connect_finds_the_socket_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the whole path may be longer than the 107 bytes that a socket's path holds
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("q.sock")
        listener.listen(1)

        def serve() -> None:
            sock, _ = listener.accept()
            peer = Peer(sock)
            peer.send(GREETING)
            peer.answer()
            peer.wait_closed()
            peer.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with Qmp.connect(Path("q.sock"), timeout_s=HANG_S) as qmp:
            assert qmp.version == "7.2.22"
        thread.join(HANG_S)
        assert not thread.is_alive()


# --- how messages are cut -----------------------------------------------------------------------------------


def test_a_reply_may_come_byte_by_byte() -> None:
    def script(peer: Peer) -> None:
        ident = peer.command()["id"]
        for byte in json.dumps({"return": [1, "zwei"], "id": ident}).encode() + b"\r\n":
            peer.raw(bytes([byte]))

    with connected(script) as qmp:
        assert qmp.execute("slow") == [1, "zwei"]


def test_events_around_a_reply_in_one_packet_are_all_kept_in_order() -> None:
    def script(peer: Peer) -> None:
        ident = peer.command()["id"]
        peer.send(event("STOP"), event("RTC_CHANGE", offset=3), {"return": 7, "id": ident}, event("RESUME"))
        peer.wait_closed()

    with connected(script) as qmp:
        assert qmp.execute("any") == 7
        assert [(e.name, e.data) for e in qmp.drain_events()] == [
            ("STOP", {}),
            ("RTC_CHANGE", {"offset": 3}),
            ("RESUME", {}),
        ]
        assert qmp.drain_events() == []


def test_blank_lines_are_no_messages() -> None:
    def script(peer: Peer) -> None:
        peer.raw(b"\r\n\n")
        peer.answer(1)

    with connected(script) as qmp:
        assert qmp.execute("any") == 1


# --- events -------------------------------------------------------------------------------------------------


def test_wait_event_takes_the_first_match_and_leaves_the_rest() -> None:
    def script(peer: Peer) -> None:
        peer.answer()
        peer.send(event("A"), event("DEVICE_DELETED", device="x"), event("DEVICE_DELETED", device="y"))
        peer.wait_closed()

    with connected(script) as qmp:
        qmp.execute("go")
        found = qmp.wait_event("DEVICE_DELETED", timeout_s=HANG_S, where=lambda event: event.data["device"] == "y")
        assert found.data == {"device": "y"}
        assert found.time_s == 1700000000.5
        assert qmp.wait_event("NEVER", "DEVICE_DELETED", timeout_s=HANG_S).data == {"device": "x"}
        assert qmp.wait_event(timeout_s=HANG_S).name == "A"  # no name: any event


def test_other_events_that_trickle_in_do_not_put_the_deadline_off() -> None:
    stop = threading.Event()

    def script(peer: Peer) -> None:
        while not stop.wait(SHORT_S / 10):
            peer.send(event("TICK"))

    with connected(script) as qmp:
        with quickly(), pytest.raises(QmpTimeout, match=r"BOOM.*0\.2 s"):
            qmp.wait_event("BOOM", timeout_s=SHORT_S)
        stop.set()
        assert {e.name for e in qmp.drain_events()} == {"TICK"}


def test_bytes_of_a_line_that_never_ends_do_not_put_the_deadline_off() -> None:
    stop = threading.Event()

    def script(peer: Peer) -> None:
        while not stop.wait(SHORT_S / 10):
            peer.raw(b" ")

    with connected(script) as qmp:
        with quickly(), pytest.raises(QmpTimeout):
            qmp.execute("any", timeout_s=SHORT_S)
        stop.set()


def test_events_that_nobody_takes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_module, "MAX_EVENTS", 3)

    def script(peer: Peer) -> None:
        peer.command()
        peer.send(*[event("FLOOD")] * 4)
        peer.wait_closed()

    with connected(script) as qmp, pytest.raises(QmpProtocolError, match="3 events"):
        qmp.execute("any")


# --- replies that are not ours ------------------------------------------------------------------------------


def test_a_reply_with_another_id_is_not_ours() -> None:
    def script(peer: Peer) -> None:
        ident = peer.command()["id"]
        peer.send({"return": "of an earlier client", "id": "libvirt-1"}, {"return": "ours", "id": ident})

    with connected(script) as qmp:
        assert qmp.execute("any") == "ours"


@pytest.mark.parametrize("late", [{"return": "late"}, {"error": {"class": "GenericError", "desc": "late"}}])
def test_the_late_reply_of_a_timed_out_command_is_not_the_next_ones(late: dict[str, Any]) -> None:
    def script(peer: Peer) -> None:
        first, second = peer.command(), peer.command()
        peer.send({**late, "id": first["id"]}, {"return": "second", "id": second["id"]})

    with connected(script) as qmp:
        with pytest.raises(QmpTimeout, match="`first`"):
            qmp.execute("first", timeout_s=SHORT_S)
        assert qmp.execute("second") == "second"


def test_a_timeout_in_the_middle_of_a_line_does_not_spoil_the_next_call() -> None:
    def script(peer: Peer) -> None:
        first = json.dumps({"return": "late", "id": peer.command()["id"]}).encode()
        peer.raw(first[:9])
        second = peer.command()
        peer.raw(first[9:] + b"\n")
        peer.send({"return": "second", "id": second["id"]})

    with connected(script) as qmp:
        with pytest.raises(QmpTimeout):
            qmp.execute("first", timeout_s=SHORT_S)
        assert qmp.execute("second") == "second"


def test_a_command_cut_off_while_sending_is_finished_before_the_next() -> None:
    big = "x" * 4_000_000  # more than a socket buffer takes while nobody reads
    reading = threading.Event()

    def script(peer: Peer) -> None:
        reading.wait(HANG_S)
        assert peer.answer()["arguments"] == {"text": big}
        assert peer.answer("second")["execute"] == "second"

    with connected(script) as qmp:
        with quickly(), pytest.raises(QmpTimeout):
            qmp.execute("first", {"text": big}, timeout_s=SHORT_S)
        reading.set()
        assert qmp.execute("second") == "second"


# --- the end of a connection --------------------------------------------------------------------------------


def test_closed_while_waiting_is_seen_at_once_and_stays_so() -> None:
    def script(peer: Peer) -> None:
        peer.command()
        peer.send(event("SHUTDOWN"))

    with connected(script) as qmp:
        with quickly(), pytest.raises(QmpClosed, match="while waiting for the reply to `quit`"):
            qmp.execute("quit")
        with pytest.raises(QmpClosed):
            qmp.execute("again")
        assert [e.name for e in qmp.drain_events()] == ["SHUTDOWN"]
        with pytest.raises(QmpClosed):
            qmp.wait_event("SHUTDOWN", timeout_s=HANG_S)


def test_closed_before_sending_keeps_the_events_that_came_before() -> None:
    gone = threading.Event()

    def script(peer: Peer) -> None:
        peer.send(event("SHUTDOWN"))
        peer.close()
        gone.set()

    with connected(script) as qmp:
        assert gone.wait(HANG_S)
        with pytest.raises(QmpClosed):
            qmp.execute("query-status")
        assert [e.name for e in qmp.drain_events()] == ["SHUTDOWN"]


def test_closed_in_the_middle_of_a_line() -> None:
    def script(peer: Peer) -> None:
        peer.command()
        peer.raw(b'{"return": ')

    with connected(script) as qmp, quickly(), pytest.raises(QmpClosed, match="middle of a message"):
        qmp.execute("any")


def test_drain_events_does_not_raise_on_a_closed_socket() -> None:
    with connected(lambda peer: peer.send(event("SHUTDOWN"))) as qmp:
        assert qmp.wait_event("SHUTDOWN", timeout_s=HANG_S)
        assert qmp.drain_events() == []


def test_closed_before_the_greeting() -> None:
    with playing(lambda peer: None, greet=False) as sock, quickly():
        with pytest.raises(QmpClosed, match="greeting"):
            Qmp.from_socket(sock, timeout_s=HANG_S)
        assert sock.fileno() == -1  # a failed start leaves nothing open


def test_silence_instead_of_a_greeting_times_out() -> None:
    with (
        playing(Peer.wait_closed, greet=False) as sock,
        quickly(),
        pytest.raises(QmpTimeout, match="greeting"),
    ):
        Qmp.from_socket(sock, timeout_s=SHORT_S)


def test_silence_after_a_command_times_out() -> None:
    def script(peer: Peer) -> None:
        peer.command()
        peer.wait_closed()

    with connected(script) as qmp, quickly(), pytest.raises(QmpTimeout) as caught:
        qmp.execute("query-status", timeout_s=SHORT_S)
    assert isinstance(caught.value, TimeoutExpired)
    assert caught.value.exit_code is ExitCode.TIMEOUT


def test_our_own_close_is_final_and_may_be_repeated() -> None:
    with connected(Peer.wait_closed) as qmp:
        qmp.close()
        qmp.close()
        with pytest.raises(QmpClosed):
            qmp.execute("any")


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QmpClosed, match=r"missing\.sock"):
        Qmp.connect("missing.sock", timeout_s=HANG_S)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("stale.sock")
    with pytest.raises(QmpClosed, match=r"stale\.sock"):
        Qmp.connect("stale.sock", timeout_s=HANG_S)
    with pytest.raises(QmpError, match="107 bytes"):
        Qmp.connect("/" + "x" * 200, timeout_s=HANG_S)


def test_a_monitor_whose_queue_is_full_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind("q.sock")
        listener.listen(0)
        other.connect("q.sock")
        with quickly(), pytest.raises(QmpError, match="another client"):
            Qmp.connect("q.sock", timeout_s=SHORT_S)


# --- what is not QMP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"SSH-2.0-OpenSSH_9.2",
        b'{"return": ',
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"{}",
        b'{"event": 3}',
        b'{"event": "X", "data": []}',
        b'{"event": "X", "timestamp": {"seconds": "now"}}',
    ],
)
def test_garbage_is_an_error_and_ends_the_connection(line: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.command()
        peer.raw(line + b"\n")
        peer.wait_closed()

    with connected(script) as qmp:
        with quickly(), pytest.raises(QmpProtocolError):
            qmp.execute("any")
        with pytest.raises(QmpClosed):
            qmp.execute("any")


@pytest.mark.parametrize("error", [{"class": "GenericError"}, "text", {"class": 1, "desc": "x"}])
def test_a_malformed_error_reply_is_an_error(error: Any) -> None:
    def script(peer: Peer) -> None:
        peer.send({"error": error, "id": peer.command()["id"]})
        peer.wait_closed()

    with connected(script) as qmp, pytest.raises(QmpProtocolError):
        qmp.execute("any")


def test_an_error_without_an_id_says_that_qemu_could_not_read_us() -> None:
    def script(peer: Peer) -> None:
        peer.command()
        peer.send({"error": {"class": "GenericError", "desc": "JSON parse error"}})
        peer.wait_closed()

    with connected(script) as qmp, quickly(), pytest.raises(QmpProtocolError, match="JSON parse error"):
        qmp.execute("any")


@pytest.mark.parametrize("greeting", [{"return": {}}, {"QMP": {}}, {"QMP": {"version": {"qemu": 7}}}])
def test_a_wrong_greeting_is_an_error(greeting: dict[str, Any]) -> None:
    def script(peer: Peer) -> None:
        peer.send(greeting)
        peer.wait_closed()

    with playing(script, greet=False) as sock, quickly(), pytest.raises(QmpProtocolError):
        Qmp.from_socket(sock, timeout_s=HANG_S)


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_beyond_the_bound_is_an_error(end: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_module, "MAX_LINE_BYTES", 1000)

    def script(peer: Peer) -> None:
        peer.command()
        peer.raw(b'"' + b"x" * 2000 + b'"' + end)
        peer.wait_closed()

    with connected(script) as qmp, quickly(), pytest.raises(QmpProtocolError, match="1000 bytes"):
        qmp.execute("any")


# --- file descriptors ---------------------------------------------------------------------------------------


def test_file_descriptors_cross_with_their_command() -> None:
    got: list[bytes] = []

    def script(peer: Peer) -> None:
        data, ancillary, _, _ = peer.sock.recvmsg(65536, socket.CMSG_SPACE(8))
        ((level, kind, payload),) = ancillary
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        (fd,) = array.array("i", payload[:4])
        os.write(fd, b"through the fd")
        os.close(fd)
        message = json.loads(data)
        assert (message["execute"], message["arguments"]) == ("getfd", {"fdname": "state"})
        peer.send({"return": {}, "id": message["id"]})

    read_end, write_end = os.pipe()
    try:
        with connected(script) as qmp:
            assert qmp.execute("getfd", {"fdname": "state"}, fds=[write_end]) == {}
        os.close(write_end)
        write_end = -1
        got.append(os.read(read_end, 100))
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)
    assert got == [b"through the fd"]


def test_a_bad_file_descriptor_sends_nothing_and_spoils_nothing() -> None:
    def answer_next(peer: Peer) -> None:
        peer.answer("next")

    with connected(answer_next) as qmp:
        with pytest.raises(QmpError, match="Bad file descriptor") as caught:
            qmp.execute("getfd", {"fdname": "x"}, fds=[10**6])
        assert not isinstance(caught.value, QmpClosed)
        assert qmp.execute("next") == "next"


def test_every_error_is_shown_to_the_user_as_one() -> None:
    for kind in (QmpClosed, QmpTimeout, QmpCommandError, QmpProtocolError):
        assert issubclass(kind, QmpError)
        assert issubclass(kind, NixboxError)
