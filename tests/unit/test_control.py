"""The control channel: what the host packs for a guest, and what it makes of what an untrusted guest says."""

from __future__ import annotations

import io
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nixbox.errors import TimeoutExpired
from nixbox.guest.control import Control, Go, GuestError, env_text, printable, tail
from nixbox.run import run

HANG_S = 30.0
SHELLS = [
    argv for argv in (["dash"], ["busybox", "sh"], ["bash", "--posix"], ["sh"]) if shutil.which(argv[0]) is not None
]
# Bytes as the environment has them: text that need not be UTF-8, with what a shell cares for much likelier.
VALUES = st.lists(
    st.sampled_from([b"'", b'"', b"$", b"`", b"\\", b"\n", b" ", b"!", b"\t", b"\r", b"\xff", b"\xc3\xa9", b"$(x)"])
    | st.integers(1, 255).map(lambda byte: bytes([byte])),
    max_size=20,
).map(lambda parts: b"".join(parts).decode(errors="surrogateescape"))
QUICK = settings(
    max_examples=4,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # each step of shrinking would start shells anew
    suppress_health_check=list(HealthCheck),
)


def message(**changes: object) -> Go:
    values: dict[str, object] = {
        "hostname": "box",
        "user": "dev",
        "image": "/nix/store/image",
        "grow": False,
        "machine_id": "0" * 32,
        "time_s": 1_700_000_000,
        "address": "10.0.2.15/24",
        "gateway": "10.0.2.2",
        "dns": "10.0.2.3",
        "host_key": b"PRIVATE\n",
        "authorized_key": b"ssh-ed25519 AAAA\n",
        "env": {"A": "it's"},
        "files": {"/etc/a.list": "é\n", "etc/b": ""},
    }
    return Go(**(values | changes))  # type: ignore[arg-type]


def unpack(data: bytes) -> dict[str, tuple[int, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {}
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None
            assert (member.uid, member.gid) == (0, 0)
            found[member.name] = (member.mode, file.read())
        return found


# --- go --------------------------------------------------------------------------------------------------


def test_the_archive_holds_what_the_guest_expects() -> None:
    found = unpack(message().pack())
    assert set(found) == {
        "vars",
        "entropy",
        "env",
        "ssh/host_key",
        "ssh/authorized_keys",
        "files/etc/a.list",
        "files/etc/b",
    }
    assert found["ssh/host_key"] == (0o600, b"PRIVATE\n")
    assert found["env"] == (0o600, b"export A='it'\"'\"'s'\n")
    assert found["files/etc/a.list"] == (0o644, "é\n".encode())
    assert {name for name, (mode, _) in found.items() if mode & 0o077} == {
        "ssh/authorized_keys",
        "files/etc/a.list",
        "files/etc/b",
    }


def test_two_machines_get_other_entropy() -> None:
    first, second = (unpack(message().pack())["entropy"][1] for _ in range(2))
    assert len(first) == 64
    assert first != second


def test_the_guest_can_unpack_and_source_it(tmp_path: Path) -> None:
    (tmp_path / "go.tar").write_bytes(message(hostname="a'b $(touch pwned)", user="x y").pack())
    tar = ["busybox", "tar"] if shutil.which("busybox") else ["tar"]
    run([*tar, "-x", "-f", "go.tar"], timeout_s=HANG_S, cwd=tmp_path)
    script = '. ./vars; printf "%s|" "$hostname" "$user" "$machine_id" "$time" "$address" "$gateway" "$dns"'
    done = run(["sh", "-c", script], timeout_s=HANG_S, cwd=tmp_path)
    expected = ["a'b $(touch pwned)", "x y", "0" * 32, "1700000000", "10.0.2.15/24", "10.0.2.2", "10.0.2.3", ""]
    assert done.stdout.split("|") == expected
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("shell", SHELLS, ids=lambda argv: argv[0])
@QUICK
@given(values=st.lists(VALUES, min_size=60, max_size=120))
def test_every_byte_of_a_variable_arrives(
    shell: list[str], tmp_path_factory: pytest.TempPathFactory, values: list[str]
) -> None:
    directory = tmp_path_factory.mktemp("env")
    env = {f"NB_{i}": value for i, value in enumerate(values)}
    (directory / "env").write_bytes(env_text(env).encode(errors="surrogateescape"))
    # Each value from the shell itself and once more from a child, which sees only what is exported.
    names = " ".join(f'"$NB_{i}"' for i in range(len(values)))
    script = f"set -u; . ./env; for v in {names}; do printf '%s\\000' \"$v\"; done >out; env -0 >child"
    run([*shell, "-c", script], timeout_s=HANG_S, cwd=directory, env={"LC_ALL": "C"})
    wanted = [value.encode(errors="surrogateescape") for value in values]
    assert (directory / "out").read_bytes().split(b"\0")[:-1] == wanted
    child = dict(entry.partition(b"=")[::2] for entry in (directory / "child").read_bytes().split(b"\0"))
    assert [child[f"NB_{i}".encode()] for i in range(len(values))] == wanted


# --- the channel -----------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[Control, socket.socket]]:
    host, guest = socket.socketpair()
    with Control(host) as control, guest:
        yield control, guest


Ends = tuple[Control, socket.socket]


def test_a_start(ends: Ends) -> None:
    control, guest = ends
    guest.sendall(b"boot 1\nready abc def\n")
    assert control.expect("boot", HANG_S) == "1"
    assert control.expect("ready", HANG_S) == "abc def"


def test_a_word_without_anything_behind_it(ends: Ends) -> None:
    control, guest = ends
    guest.sendall(b"off\r\n")
    assert control.expect("off", HANG_S) == ""


def test_here_is_passed_over(ends: Ends) -> None:
    control, guest = ends
    guest.sendall(b"here\nhere\nready -\n")
    assert control.expect("ready", HANG_S) == "-"


def test_a_line_may_come_in_pieces(ends: Ends) -> None:
    control, guest = ends

    def send() -> None:
        for byte in b"here\nready 0123\n":
            guest.sendall(bytes([byte]))

    sender = threading.Thread(target=send)
    sender.start()
    assert control.expect("ready", HANG_S) == "0123"
    sender.join(HANG_S)


def test_fail_is_told_in_the_guests_own_words_made_safe(ends: Ends) -> None:
    control, guest = ends
    guest.sendall(b"fail no disk \x1b[31m\x07 here\n")
    with pytest.raises(GuestError, match="the guest cannot start: no disk") as caught:
        control.expect("ready", HANG_S)
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize("said", [b"READY -", b"", b"\xff\xfe\x00", b"readyy", b"go 12", b"\x1b]0;title\x07"])
def test_anything_else_is_refused(ends: Ends, said: bytes) -> None:
    control, guest = ends
    guest.sendall(said + b"\n")
    with pytest.raises(GuestError, match="instead of `ready`") as caught:
        control.expect("ready", HANG_S)
    assert caught.value.message.isprintable()


def test_a_line_without_end_is_cut_off(ends: Ends) -> None:
    control, guest = ends

    def send() -> None:
        try:
            for _ in range(1000):
                guest.sendall(b"x" * 1000)
        except OSError:
            return

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(GuestError, match="no message"):
        control.expect("ready", HANG_S)
    assert len(control._buffer) < 10_000
    control._sock.close()
    sender.join(HANG_S)
    assert not sender.is_alive()


def test_a_long_line_that_fits_is_read(ends: Ends) -> None:
    control, guest = ends
    guest.sendall(b"ready " + b"x" * 4000 + b"\n")
    assert control.expect("ready", HANG_S) == "x" * 4000


def test_many_short_lines_are_no_long_one(ends: Ends) -> None:
    control, guest = ends
    guest.sendall(b"her")
    with pytest.raises(TimeoutExpired):
        control.read_line(0.01, "here")
    guest.sendall(b"e\n" + b"here\n" * 900 + b"ready -\n")
    assert control.expect("ready", HANG_S) == "-"


def test_the_end_of_the_machine_is_told(ends: Ends) -> None:
    control, guest = ends
    guest.sendall(b"rea")
    guest.close()
    with pytest.raises(GuestError, match="ended before the guest said `ready`"):
        control.expect("ready", HANG_S)


def test_a_silent_guest_runs_into_the_bound(ends: Ends) -> None:
    control, guest = ends
    guest.sendall(b"here\nrea")
    with pytest.raises(TimeoutExpired, match="did not say `ready` within"):
        control.expect("ready", 0.05)
    guest.sendall(b"dy 1\n")  # what had come is not lost
    assert control.expect("ready", HANG_S) == "1"


def test_a_flood_of_here_does_not_extend_the_bound(ends: Ends) -> None:
    control, guest = ends
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            try:
                guest.sendall(b"here\n")
            except OSError:
                return
            stop.wait(0.01)

    sender = threading.Thread(target=flood)
    sender.start()
    try:
        with pytest.raises(TimeoutExpired):
            control.expect("ready", 0.2)
    finally:
        stop.set()
        sender.join(HANG_S)


def test_go_says_its_length_first(ends: Ends) -> None:
    control, guest = ends
    guest.settimeout(HANG_S)
    control.go(message())
    with guest.makefile("rb") as said:
        word, length = said.readline().split()
        data = said.read(int(length))
    assert word == b"go"
    assert "vars" in unpack(data)


def test_speaking_to_a_machine_that_is_gone(ends: Ends) -> None:
    control, guest = ends
    guest.close()
    with pytest.raises(GuestError, match="ended while it was spoken to"):
        for _ in range(3):
            control.send("poweroff")


def test_connecting_where_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="does not answer"):
        Control.connect(tmp_path / "ctl")


# --- showing ---------------------------------------------------------------------------------------------


@given(st.text(max_size=400))
def test_printable_is_printable_and_bounded(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) == min(len(text), 300)
    assert all(a in (b, "?") for a, b in zip(shown, text, strict=False))


def test_tail(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log, 5) == []
    log.write_bytes(b"old\n" * 50_000 + b"\n  \none\x1b[2J\ntwo\xff\nthree")
    assert tail(log, 3) == ["one?[2J", "two\ufffd", "three"]
    assert tail(log, 1) == ["three"]
