"""The control channel: what the host packs for a guest, and what it makes of what an untrusted guest says."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
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
        "how": "boot",
        "restored": False,
        "hostname": "box",
        "user": "dev",
        "image": "/nix/store/image",
        "grow": False,
        "sidecars": 0,
        "machine_id": "0" * 32,
        "time_s": 1_700_000_000,
        "address": "10.0.2.15/24",
        "gateway": "10.0.2.2",
        "dns": "10.0.2.3",
        "host_key": b"PRIVATE\n",
        "dropbear_key": b"\0key\xff",
        "authorized_key": b"ssh-ed25519 AAAA\n",
        "env": {"A": "it's"},
        "files": {"/etc/a.list": "é\n", "etc/b": ""},
    }
    return Go(**(values | changes))  # type: ignore[arg-type]


# As nix/guest/stage2 does it: so many lines, byte by byte; what follows on the port is somebody else's.
READ_LINES = """
newline='
'
payload=
left=$1
while [ "$left" -gt 0 ] && IFS= read -r line; do
  payload=$payload$line$newline
  left=$((left - 1))
done
printf '%s' "$payload" >text
cat >rest
"""
# As nix/guest/stage1 does it: all of it at once.
READ_ALL = 'payload=$(dd bs="$2" count=1 iflag=fullblock 2>/dev/null); printf "%s\n" "$payload" >text; cat >rest'
TAKE_ON = """
put() { printf '%s\\000%s\\000' "$1" "$2" >>files; }
: >files
eval "$payload" || exit 9
first_files
for value in "$how" "$restored" "$hostname" "$user" "$image" "$grow" "$sidecars" "$machine_id" "$time" "$address" \
  "$gateway" "$dns" "$entropy" "$host_key" "$authorized_key"; do
  printf '%s\\000' "$value"
done >vars
printf '%b' "$dropbear_key" >key
printf '%s' "$env" >env
"""
NAMES = (
    *("how", "restored", "hostname", "user", "image", "grow", "sidecars", "machine_id", "time", "address", "gateway"),
    *("dns", "entropy", "host_key", "authorized_key"),
)


@dataclass(frozen=True)
class Taken:
    """What a guest's shell made of a `go`."""

    vars: dict[str, bytes]
    files: list[tuple[bytes, bytes]]
    key: bytes
    env: bytes


def take(sent: Go, directory: Path, shell: list[str], reader: str = READ_LINES) -> Taken:
    """Send it to a real shell, which must read all of it and nothing of what comes behind it."""
    payload = sent.pack()
    done = subprocess.run(
        [*shell, "-c", reader + TAKE_ON, "sh", str(payload.count(b"\n")), str(len(payload))],
        input=payload + b"ping\n",
        cwd=directory,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        capture_output=True,
        timeout=HANG_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (directory / "rest").read_bytes() == b"ping\n"
    assert (directory / "text").read_bytes() == payload
    values = (directory / "vars").read_bytes().split(b"\0")[:-1]
    words = (directory / "files").read_bytes().split(b"\0")[:-1]
    return Taken(
        vars=dict(zip(NAMES, values, strict=True)),
        files=list(zip(words[::2], words[1::2], strict=True)),
        key=(directory / "key").read_bytes(),
        env=(directory / "env").read_bytes(),
    )


# --- go --------------------------------------------------------------------------------------------------


shells = pytest.mark.parametrize("shell", SHELLS, ids=lambda argv: argv[0])


@shells
@pytest.mark.parametrize("reader", [READ_LINES, READ_ALL], ids=["lines", "whole"])
def test_the_guest_takes_on_what_the_host_said(tmp_path: Path, shell: list[str], reader: str) -> None:
    nasty = 'a\'b $(touch pwned) `touch pwned` \\ "${x}"\n;touch pwned'
    found = take(
        message(how="hold", restored=True, grow=True, sidecars=2, hostname=nasty, user="x y"), tmp_path, shell, reader
    )
    entropy = found.vars.pop("entropy")
    assert len(bytes.fromhex(entropy.decode())) == 32
    assert {name: value.decode() for name, value in found.vars.items()} == {
        "how": "hold",
        "restored": "1",
        "hostname": nasty,
        "user": "x y",
        "image": "/nix/store/image",
        "grow": "1",
        "sidecars": "2",
        "machine_id": "0" * 32,
        "time": "1700000000",
        "address": "10.0.2.15/24",
        "gateway": "10.0.2.2",
        "dns": "10.0.2.3",
        "host_key": "PRIVATE",
        "authorized_key": "ssh-ed25519 AAAA",
    }
    assert found.files == [(b"etc/a.list", "é\n".encode()), (b"etc/b", b"")]
    assert found.env == b"export A='it'\"'\"'s'\n"
    assert found.key == b"\0key\xff"
    assert not (tmp_path / "pwned").exists()


@shells
def test_a_machine_without_files_and_variables(tmp_path: Path, shell: list[str]) -> None:
    found = take(message(env={}, files={}), tmp_path, shell)
    assert (found.env, found.files) == (b"", [])
    assert (found.vars["restored"], found.vars["grow"]) == (b"0", b"0")


def test_two_machines_get_other_entropy(tmp_path: Path) -> None:
    first, second = (take(message(), tmp_path, ["sh"]).vars["entropy"] for _ in range(2))
    assert len(first) == 64
    assert first != second


@shells
@QUICK
@given(
    texts=st.lists(VALUES, min_size=20, max_size=60),
    env=st.lists(VALUES, max_size=40),
    key=st.binary(min_size=1, max_size=300),
)
@example(texts=["\n", "\n\n", "a\n"], env=["\n\n"], key=bytes(range(256)) + b"\n\0\0017\\0\\n")
def test_every_byte_of_a_go_arrives(
    shell: list[str], tmp_path_factory: pytest.TempPathFactory, texts: list[str], env: list[str], key: bytes
) -> None:
    files = {f"etc/{i}{text}": text for i, text in enumerate(texts)}
    variables = {f"NB_{i}": value for i, value in enumerate(env)}
    sent = message(hostname=texts[0], image=texts[-1], files=files, env=variables, dropbear_key=key)
    found = take(sent, tmp_path_factory.mktemp("go"), shell)

    def raw(text: str) -> bytes:
        return text.encode(errors="surrogateescape")

    assert (found.vars["hostname"], found.vars["image"]) == (raw(texts[0]), raw(texts[-1]))
    assert found.files == [(raw(name), raw(body)) for name, body in files.items()]
    assert found.env == raw(env_text(variables))
    assert found.key == key


@pytest.mark.parametrize("how", ["boot", "hold", "fork", "resume"])
def test_each_way_to_start_is_said(how: str, tmp_path: Path) -> None:
    assert take(message(how=how), tmp_path, ["sh"]).vars["how"] == how.encode()


@shells
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


def test_go_says_its_length_in_bytes_and_in_lines_first(ends: Ends) -> None:
    control, guest = ends
    guest.settimeout(HANG_S)
    control.go(message(hostname="é\n\n", env={"A": "x\ny"}))
    control.send("ping")
    with guest.makefile("rb") as said:
        word, length, lines = said.readline().split()
        data = said.read(int(length))
        assert said.readline() == b"ping\n"
    assert word == b"go"
    assert data.count(b"\n") == int(lines)
    assert data.startswith(b"how=boot\n")
    assert data.endswith(b"\n")


def test_the_environment_of_a_running_guest_is_replaced(ends: Ends) -> None:
    control, guest = ends
    for env in ({"A": "\udcff é\n"}, {}):
        guest.sendall(b"done\n")
        control.push_env(env, HANG_S)
        with guest.makefile("rb") as said:
            word, length = said.readline().split()
            data = said.read(int(length))
        assert (word, data.strip()) == (b"env", env_text(env).encode(errors="surrogateescape").strip())
        assert data  # the guest reads at least one byte


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
