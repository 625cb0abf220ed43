"""The relay between a unix socket and a guest: whole messages only, whoever comes and goes."""

from __future__ import annotations

import contextlib
import inspect
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixbox import light
from nixbox.guest import control
from nixbox.guest.control import Control, Go
from nixbox.machine import relay
from nixbox.machine.backend import listening

HANG_S = 10.0  # nothing here may take this long: a bound against hangs, not a measure of speed
LARGE = bytes(range(256)) * (1 << 14)  # 4 MiB, far more than any buffer on the way
GO = Go(
    how="boot",
    restored=False,
    hostname="box",
    user="agent",
    image="/nix/store/image",
    grow=False,
    sidecars=0,
    machine_id="0" * 32,
    time_s=0,
    address="10.0.2.15/24",
    gateway="10.0.2.2",
    dns="10.0.2.3",
    host_key=b"key",
    dropbear_key=b"\x00key",
    authorized_key=b"key",
    env={},
    files={},
)


# --- framing ---

WITH_PAYLOAD = st.sampled_from(relay.WITH_PAYLOAD)
REST = st.binary(max_size=12).map(lambda data: data.replace(b"\n", b""))


@st.composite
def long_message(draw: st.DrawFn) -> bytes:
    """A word, a length, perhaps more words, and so many bytes, among them ends of lines."""
    payload = draw(st.binary(max_size=40) | st.text("\n go5", max_size=40).map(str.encode))
    more = draw(st.sampled_from([b"", b" 3", b" 3 words"]))
    return b"%b %d%b\n%b" % (draw(WITH_PAYLOAD), len(payload), more, payload)


SHORT_MESSAGE = st.sampled_from(
    [b"ping\n", b"sync\n", b"\n", b"hold\n", b"setup-done 12\n", b"poweroff\n"]
) | REST.map(lambda rest: b"x" + rest + b"\n")
MESSAGES = st.lists(long_message() | SHORT_MESSAGE, max_size=8)


@given(MESSAGES, st.lists(st.integers(1, 30), max_size=60), st.integers(0, 60))
def test_only_whole_messages_come_out_however_the_stream_is_cut(
    messages: list[bytes], sizes: list[int], missing: int
) -> None:
    stream = b"".join(messages)
    stream = stream[: len(stream) - missing] if missing else stream
    ends = [len(b"".join(messages[:count])) for count in range(len(messages) + 1)]
    framing, fed, came = relay.Framing(), 0, b""
    for size in (*sizes, len(stream)):
        came += framing.whole(stream[fed : fed + size])
        fed = min(len(stream), fed + size)
        assert came == stream[: max(end for end in ends if end <= fed)]


@pytest.mark.parametrize(
    "line", [b"go", b"go x", b"go -5", b"go 1.5", b"env 5x", "go ٣".encode(), b"gone 5", b"setup-done 5", b"", b" "]
)
def test_what_has_no_length_is_a_line(line: bytes) -> None:
    assert relay.Framing().whole(line + b"\nrest") == line + b"\n"


@pytest.mark.parametrize("begin", [b"", b"go 30000000\n", b"go 999999999999999999999\n"])
def test_nobody_makes_it_hold_more_than_a_message(begin: bytes) -> None:
    framing = relay.Framing()
    assert framing.whole(begin + b"x" * (8 << 20)) == b""
    with pytest.raises(ValueError, match="16 MiB"):
        framing.whole(b"x" * (16 << 20))


def test_a_length_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(ValueError):
        relay.Framing().whole(b"go " + b"9" * 10_000 + b"\n")


class Heard(Control):
    """Keeps what it is to send, and waits for no answer."""

    def __init__(self) -> None:
        self.payloads: dict[str, bool] = {}

    def send(self, line: str, payload: bytes = b"") -> None:
        word, _, rest = line.partition(" ")
        self.payloads[word] = bool(payload)
        assert not payload or rest.split()[0] == str(len(payload))

    def expect(self, word: str, timeout_s: float, *, about: str = "") -> str:
        return ""


def test_the_messages_with_a_payload_are_those_of_the_control_channel() -> None:
    """Whoever adds one to guest/control.py has to add it to the relay, which would cut it to pieces."""
    arguments: dict[str, Any] = {"message": GO, "setup": "hash", "timeout_s": 1.0, "env": {"A": "b"}, "tag": "t"}
    arguments |= {"target": "/t", "readonly": True, "force": True}
    heard = Heard()
    for name, method in inspect.getmembers(Control, inspect.isfunction):
        if not name.startswith("_") and name not in ("close", "send", "read_line", "expect"):
            method(heard, **{key: arguments[key] for key in list(inspect.signature(method).parameters)[1:]})
    assert "sync" in heard.payloads
    assert {word.encode() for word, any_ in heard.payloads.items() if any_} == set(relay.WITH_PAYLOAD)
    described = re.findall(r"`([\w-]+) LENGTH", control.__doc__ or "")
    assert {word.encode() for word in described} == set(relay.WITH_PAYLOAD)


# --- the control channel ---


class Channel:
    """A relay that serves, its guest's end, and a way to connect."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = listening(path)
        ours, self.guest = socket.socketpair()
        self._ours = ours
        self.guest.settimeout(HANG_S)
        self.thread = threading.Thread(target=relay.serve_control, args=(self._listener, ours), daemon=True)
        self.thread.start()

    def connect(self) -> socket.socket:
        host = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        host.settimeout(HANG_S)
        host.connect(str(self._path))
        return host

    def end(self) -> None:
        """The guest closes: so does the relay, at the latest when somebody connects."""
        self.guest.close()
        with self.connect():
            self.thread.join(HANG_S)
        assert not self.thread.is_alive()
        self._ours.close()
        self._listener.close()


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    made = Channel(tmp_path / "ctl")
    yield made
    made.end()


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def test_both_ways_through(channel: Channel) -> None:
    with channel.connect() as host:
        host.sendall(b"ping\n")
        assert read(channel.guest, 5) == b"ping\n"
        channel.guest.sendall(b"pong\n")
        assert read(host, 5) == b"pong\n"
        payload = LARGE[: 1 << 20]
        message = b"go %d 4096\n" % len(payload) + payload
        sending = threading.Thread(target=host.sendall, args=(message,))
        sending.start()
        assert read(channel.guest, len(message)) == message
        sending.join(HANG_S)


@pytest.mark.parametrize("cut", [b"pin", b"go 10 1\nabc", b"go 99999999999999999999\nabc", b"env 5\n"])
def test_a_host_that_goes_in_the_middle_of_a_message_has_said_nothing(channel: Channel, cut: bytes) -> None:
    with channel.connect() as host:
        host.sendall(b"sync\n" + cut)
        assert read(channel.guest, 5) == b"sync\n"
    with channel.connect() as host:
        host.sendall(b"ping\n")
        assert read(channel.guest, 5) == b"ping\n"


def test_a_host_that_talks_nonsense_is_let_go(channel: Channel) -> None:
    with channel.connect() as host:
        host.sendall(b"go " + b"9" * 10_000 + b"\n")
        assert host.recv(1) == b""
    with channel.connect() as host:
        host.sendall(b"ping\n")
        assert read(channel.guest, 5) == b"ping\n"


def test_what_the_guest_says_to_nobody_waits(channel: Channel) -> None:
    channel.guest.sendall(b"boot 2\n")
    with channel.connect() as host:
        assert read(host, 7) == b"boot 2\n"
    channel.guest.sendall(b"here\n")
    with channel.connect() as host:
        assert read(host, 5) == b"here\n"


def test_a_host_that_goes_while_the_guest_speaks_takes_nobody_with_it(channel: Channel) -> None:
    def speak() -> None:
        channel.guest.sendall(LARGE)
        channel.guest.sendall(read(channel.guest, 5))

    speaking = threading.Thread(target=speak)
    with channel.connect() as host:
        speaking.start()
        assert read(host, 10) == LARGE[:10]  # and no more: the relay stands in the middle of its answer
    with channel.connect() as host:
        host.sendall(b"ping\n")
        tail = b""
        while tail[-5:] != b"ping\n":
            more = host.recv(1 << 16)
            assert more
            tail = tail[-5:] + more
    speaking.join(HANG_S)


def test_hosts_take_turns(channel: Channel) -> None:
    with channel.connect() as first, channel.connect() as second:
        second.sendall(b"second\n")
        first.sendall(b"first\n")
        assert read(channel.guest, 6) == b"first\n"
        first.close()
        assert read(channel.guest, 7) == b"second\n"


def test_a_guest_that_closes_ends_it(channel: Channel) -> None:
    with channel.connect() as host:
        channel.guest.close()
        assert host.recv(1) == b""
        channel.thread.join(HANG_S)
        assert not channel.thread.is_alive()


# --- the shell ---


class Shells:
    """The relay for shells before a server on the loopback device that does not listen yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = listening(path)
        self.server = socket.socket()
        self.server.settimeout(HANG_S)
        self.server.bind(("127.0.0.1", 0))
        address = self.server.getsockname()
        threading.Thread(target=relay.serve_shell, args=(self._listener, address), daemon=True).start()

    def connect(self) -> socket.socket:
        host = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        host.settimeout(HANG_S)
        host.connect(str(self._path))
        return host

    def both(self) -> tuple[socket.socket, socket.socket]:
        """A connection's two ends: the host's, and the server's."""
        self.server.listen()
        host = self.connect()
        host.sendall(b"0")
        guest, _ = self.server.accept()
        guest.settimeout(HANG_S)
        assert guest.recv(1) == b"0"
        return host, guest


@pytest.fixture
def shells(tmp_path: Path) -> Iterator[Shells]:
    """Its thread waits for connections until this process ends."""
    made = Shells(tmp_path / "ssh")
    yield made
    made.server.close()


def clock(on_sleep: Callable[[], None]) -> SimpleNamespace:
    """The module `time` for a relay that tells when it has been refused and waits to try again."""

    def sleep(seconds: float) -> None:
        on_sleep()
        threading.Event().wait(seconds)

    return SimpleNamespace(monotonic=time.monotonic, sleep=sleep)


def test_a_server_that_listens_late_is_waited_for(shells: Shells, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = threading.Event()
    monkeypatch.setattr(relay, "time", clock(refused.set))
    with shells.connect() as host:
        host.sendall(b"SSH-2.0-early\r\n")
        assert refused.wait(HANG_S)
        shells.server.listen()
        guest, _ = shells.server.accept()
        with guest:
            guest.settimeout(HANG_S)
            assert read(guest, 15) == b"SSH-2.0-early\r\n"


def test_a_server_that_never_listens_is_given_up(shells: Shells, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_CONNECT_LIMIT_S", 0.05)
    with shells.connect() as host:
        host.sendall(b"SSH-2.0-early\r\n")
        with contextlib.suppress(ConnectionResetError):  # its words were never read
            assert host.recv(1) == b""


def test_a_server_hears_nothing_before_the_host_has_said_a_word(shells: Shells) -> None:
    """Connections of before a restore, begun and given up, would fill its queue."""
    shells.connect().close()
    with shells.connect(), shells.connect() as second:
        host, guest = shells.both()
        with host, guest:
            second.sendall(b"now")
            later, _ = shells.server.accept()
            with later:
                assert later.recv(3) == b"now"


def test_whoever_closes_first_ends_both_ways(shells: Shells) -> None:
    host, guest = shells.both()
    with host, guest:
        guest.sendall(b"bye")
        guest.close()
        assert read(host, 4) == b"bye"
    host, guest = shells.both()
    with host, guest:
        host.sendall(b"bye")
        host.close()
        assert read(guest, 4) == b"bye"


def test_much_passes_both_ways_at_once(shells: Shells) -> None:
    host, guest = shells.both()
    with host, guest:
        back = LARGE[::-1]
        sending = [
            threading.Thread(target=host.sendall, args=(LARGE,)),
            threading.Thread(target=guest.sendall, args=(back,)),
        ]
        got: list[bytes] = []
        reading = threading.Thread(target=lambda: got.append(read(guest, len(LARGE))))
        for thread in (*sending, reading):
            thread.start()
        assert read(host, len(back)) == back
        for thread in (*sending, reading):
            thread.join(HANG_S)
        assert got == [LARGE]


def test_shells_do_not_wait_for_each_other(shells: Shells) -> None:
    host, guest = shells.both()
    other_host, other_guest = shells.both()
    with host, guest, other_host, other_guest:
        other_guest.sendall(b"second")
        assert read(other_host, 6) == b"second"
        guest.sendall(b"first")
        assert read(host, 5) == b"first"


def test_a_sleeping_guest_is_asked_again_soon_and_then_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts: list[float] = []

    class Sleeping(light.Socket):
        def settimeout(self, value: float | None) -> None:
            if value is not None:
                timeouts.append(value)

        def connect(self, address: object) -> None:
            if len(timeouts) < 9:
                raise TimeoutError

    monkeypatch.setattr(relay, "time", clock(lambda: None))
    monkeypatch.setattr(light, "Socket", Sleeping)
    relay._connected(("127.0.0.1", 2)).close()
    assert timeouts == [0.02, 0.04, 0.08, 0.16, 0.32, 1.0, 1.0, 1.0, 1.0]
