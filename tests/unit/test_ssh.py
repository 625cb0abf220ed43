"""SSH: real ssh reads the configuration, real ssh-keygen makes the keys, a real shell reads the command line."""

from __future__ import annotations

import ast
import base64
import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from nixbox import ed25519, paths
from nixbox.errors import HostError
from nixbox.guest import keys, ssh
from nixbox.run import run

HANG_S = 30.0
needs_ssh = pytest.mark.skipif(
    shutil.which("ssh") is None or shutil.which("ssh-keygen") is None, reason="no OpenSSH client on this host"
)
WORDS = st.text(
    st.sampled_from(" '\"$`\\\n\t!*?~#;&|<>(){}[]-=é") | st.characters(codec="utf-8", exclude_characters="\0"),
    max_size=12,
)
QUICK = settings(
    max_examples=4,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def public_key(directory: Path, name: str) -> str:
    done = run(["ssh-keygen", "-y", "-f", str(directory / name)], timeout_s=HANG_S)
    return done.stdout.split()[1]


def check_pair(directory: Path, name: str) -> str:
    """The public key, after making sure that both files belong together."""
    written = (directory / f"{name}.pub").read_text().split()[1]
    assert written == public_key(directory, name)
    assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600
    return written


def _no_library() -> None:
    raise ed25519.Missing


# --- keys ------------------------------------------------------------------------------------------------


@needs_ssh
def test_keys_stay(tmp_path: Path) -> None:
    ssh.make_keys(tmp_path)
    first = [check_pair(tmp_path, name) for name in ("host_key", "user_key")]
    assert first[0] != first[1]
    ssh.make_keys(tmp_path)
    assert [check_pair(tmp_path, name) for name in ("host_key", "user_key")] == first
    assert {p.name for p in tmp_path.iterdir()} == {"host_key", "host_key.pub", "user_key", "user_key.pub"}


@needs_ssh
@pytest.mark.parametrize("library", [True, False])
def test_a_pair_signs_and_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: bool) -> None:
    if not library:
        monkeypatch.setattr(ed25519, "_libcrypto", _no_library)
        with pytest.raises(ed25519.Missing):
            ed25519.public_half(bytes(32))
    keys.make(tmp_path / "key")
    public = check_pair(tmp_path, "key")
    (tmp_path / "allowed").write_text(f"me ssh-ed25519 {public}\n")
    (tmp_path / "text").write_text("words")
    sign = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(tmp_path / "key"), "-n", "file", str(tmp_path / "text")]
    run(sign, timeout_s=HANG_S)
    verify = ["ssh-keygen", "-Y", "verify", "-f", str(tmp_path / "allowed"), "-I", "me", "-n", "file"]
    verify += ["-s", str(tmp_path / "text.sig")]
    with (tmp_path / "text").open("rb") as text:
        done = subprocess.run(verify, stdin=text, capture_output=True, check=False)
    assert done.returncode == 0, done


@needs_ssh
@pytest.mark.parametrize("left", [["host_key"], ["host_key.pub"], ["host_key.new", "host_key.new.pub"], []])
def test_an_interrupted_run_is_repaired(tmp_path: Path, left: list[str]) -> None:
    ssh.make_keys(tmp_path)
    user = check_pair(tmp_path, "user_key")
    kept = {name: (tmp_path / name.replace(".new", "")).read_bytes() for name in left}
    for name in ("host_key", "host_key.pub"):
        (tmp_path / name).unlink()
    for name, data in kept.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(0o600)
    ssh.make_keys(tmp_path)
    check_pair(tmp_path, "host_key")
    assert check_pair(tmp_path, "user_key") == user
    assert not list(tmp_path.glob("*.new*"))


@needs_ssh
def test_interrupted_at_any_rename_the_next_run_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace
    for stop_at in (1, 2):
        for leftover in ("private", "nothing"):
            directory = tmp_path / f"{stop_at}-{leftover}"
            directory.mkdir()
            ssh.make_keys(directory)
            (directory / "host_key.pub").unlink()
            if leftover == "nothing":
                (directory / "host_key").unlink()
            calls = 0

            def failing(self: Path, target: Path, stop_at: int = stop_at) -> Path:
                nonlocal calls
                calls += 1
                if calls == stop_at:
                    raise KeyboardInterrupt
                return replace(self, target)

            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(Path, "replace", failing)
                ssh.make_keys(directory)
            ssh.make_keys(directory)
            check_pair(directory, "host_key")


@needs_ssh
def test_dropbears_key_is_openssh_s(tmp_path: Path) -> None:
    ssh.make_keys(tmp_path)
    found = ssh.dropbear_key((tmp_path / "host_key").read_text())
    assert found[:19] == b"\0\0\0\x0bssh-ed25519\0\0\0\x40"
    seed, public = found[19:51], found[51:]
    blob = base64.b64decode(public_key(tmp_path, "host_key"))
    assert blob == b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + public
    if shutil.which("openssl") is not None:
        # RFC 8410: what comes before the 32 bytes of an ed25519 key, in private and public form.
        secret = bytes.fromhex("302e020100300506032b657004220420") + seed
        derived = subprocess.run(
            ["openssl", "pkey", "-inform", "DER", "-pubout", "-outform", "DER"],
            input=secret,
            capture_output=True,
            check=True,
            timeout=HANG_S,
        ).stdout
        assert derived == bytes.fromhex("302a300506032b6570032100") + public


def openssh_key(comment: bytes, public: bytes, private: bytes) -> str:
    """A key file as OpenSSH's PROTOCOL.key has it."""

    def string(data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    inner = b"\1\2\3\4" * 2 + string(b"ssh-ed25519") + string(public) + string(private + public) + string(comment)
    inner += bytes(range(1, 8))[: -len(inner) % 8]
    outer = b"openssh-key-v1\0" + string(b"none") + string(b"none") + string(b"") + (1).to_bytes(4, "big")
    outer += string(string(b"ssh-ed25519") + string(public)) + string(inner)
    text = base64.b64encode(outer).decode()
    lines = [text[at : at + 70] for at in range(0, len(text), 70)]
    return "\n".join(["-----BEGIN OPENSSH PRIVATE KEY-----", *lines, "-----END OPENSSH PRIVATE KEY-----", ""])


@given(st.binary(max_size=80), st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_every_ed25519_key_is_understood(comment: bytes, public: bytes, private: bytes) -> None:
    found = ssh.dropbear_key(openssh_key(comment, public, private))
    assert found == b"\0\0\0\x0bssh-ed25519\0\0\0\x40" + private + public


@needs_ssh
@pytest.mark.parametrize("options", [["-t", "rsa", "-b", "1024"], ["-t", "ed25519", "-N", "secret"]])
def test_another_key_is_called_damaged(tmp_path: Path, options: list[str]) -> None:
    run(["ssh-keygen", "-q", "-N", "", *options, "-f", str(tmp_path / "key")], timeout_s=HANG_S)
    with pytest.raises(HostError, match="host key is damaged"):
        ssh.dropbear_key((tmp_path / "key").read_text())


@pytest.mark.parametrize("lines", range(7))
def test_a_key_that_was_cut_off_is_called_damaged(lines: int) -> None:
    whole = openssh_key(b"nixbox", b"p" * 32, b"s" * 32).splitlines()
    assert len(whole) > 6
    with pytest.raises(HostError, match="host key is damaged"):
        ssh.dropbear_key("\n".join(whole[:lines]))


# --- configuration ---------------------------------------------------------------------------------------


def parsed(endpoint: ssh.Endpoint) -> dict[str, str]:
    text = run(["ssh", "-G", "-F", str(endpoint.config), endpoint.name], timeout_s=HANG_S).stdout
    return {key.lower(): value for key, _, value in (line.partition(" ") for line in text.splitlines())}


@needs_ssh
@pytest.mark.parametrize(
    "name",
    [
        *(
            "plain",
            "with space",
            "100% sure %h %d",
            "it's",
            'a "quoted" one',
            "ünïcode",
            "#hash",
            "a=b",
            "~x",
            "$HOME",
        ),
        *("back\\slash", "two\\\\", '\\"', "last\\"),
    ],
)
def test_ssh_reads_odd_paths_as_they_are(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    (directory / "host_key.pub").write_text("ssh-ed25519 AAAAC3 nixbox\n")
    others = ssh.write_config(directory, "web-1", "dev", directory / "mux")
    ours = ssh.write_exec_config(directory, "web-1", "dev", directory / "x")
    for endpoint, control in ((others, "mux"), (ours, "x")):
        found = parsed(endpoint)
        assert (found["user"], found["hostkeyalias"]) == ("dev", "web-1")
        assert found["stricthostkeychecking"] in ("true", "yes")
        assert found["controlmaster"] == "auto"
        assert (found["forwardagent"], found["identitiesonly"]) == ("no", "yes")
        # -G expands the tokens of ControlPath only; in the others `%%` still stands for one.
        assert found["controlpath"] == str(directory / control)
        assert found["identityfile"].replace("%%", "%") == str(directory / "user_key")
        assert found["userknownhostsfile"].replace("%%", "%") == str(directory / "known_hosts")
        assert stat.S_IMODE(endpoint.config.stat().st_mode) == 0o600
    assert (directory / "known_hosts").read_text() == "web-1 ssh-ed25519 AAAAC3\n"
    assert stat.S_IMODE((directory / "known_hosts").stat().st_mode) == 0o600


@needs_ssh
def test_each_configuration_leads_to_its_own_server(tmp_path: Path) -> None:
    (tmp_path / "host_key.pub").write_text("ssh-ed25519 AAAAC3 nixbox\n")
    others = parsed(ssh.write_config(tmp_path, "web-1", "dev", tmp_path / "mux"))
    # OpenSSH in the guest, through the connection of ours: whatever the network's mode is.
    assert others["proxycommand"] == f"ssh -F {tmp_path / 'exec'} -W 127.0.0.1:22 web-1"
    ours = ssh.write_exec_config(tmp_path, "web-1", "dev", tmp_path / "x")
    assert parsed(ours)["proxycommand"] == "false"
    # Without the shared connection it fails at once, and finds no other server.
    assert run([*ours.argv("-T"), "true"], timeout_s=HANG_S, check=False).code == 255


@pytest.mark.parametrize("name", ["new\nline", "${HOME}", "\x1b[2J"])
def test_a_path_that_ssh_would_read_as_another_is_refused(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    (directory / "host_key.pub").write_text("ssh-ed25519 AAAAC3 nixbox\n")
    with pytest.raises(HostError, match="ssh cannot work in a directory") as caught:
        ssh.write_config(directory, "web-1", "dev", directory / "mux")
    assert caught.value.message.isprintable()
    with pytest.raises(HostError, match="ssh cannot work in a directory"):
        ssh.write_exec_config(directory, "web-1", "dev", directory / "x")
    with pytest.raises(HostError, match="ssh cannot work in a directory"):
        ssh.check_path(directory)
    assert not (directory / "config").exists()
    assert not (directory / "exec").exists()


@needs_ssh
def test_another_host_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "host_key.pub").write_text("ssh-ed25519 AAAAC3 nixbox\n")
    endpoint = ssh.write_config(tmp_path, "web-1", "dev", tmp_path / "mux")
    assert parsed(ssh.Endpoint(endpoint.config, "web-2"))["port"] == "22"


def test_the_command_line_names_the_file_and_the_host(tmp_path: Path) -> None:
    argv = ssh.Endpoint(tmp_path / "config", "web-1").argv("-T")
    assert argv == ["ssh", "-F", str(tmp_path / "config"), "-T", "web-1"]


# --- command lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["sh", "bash"])
@QUICK
@example(commands=[["-n", "--", "", "a b", "~", "*", "$HOME"]])
@given(commands=st.lists(st.lists(WORDS, min_size=1, max_size=5), min_size=40, max_size=60))
def test_words_arrive_as_they_are(shell: str, commands: list[list[str]]) -> None:
    # A program that prints each of its arguments, ended by NUL.
    program = ["printf", "%s\\0"]
    script = "\n".join(ssh.remote_command([*program, *words, "END"], None) for words in commands)
    out = run([shell, "-c", script], timeout_s=HANG_S, env={"LC_ALL": "C.UTF-8"}).stdout
    expected = [word for words in commands for word in (*words, "END")]
    assert out.split("\0")[:-1] == [word.encode(errors="replace").decode() for word in expected]


@pytest.mark.parametrize("name", ["plain", "a b", "it's", "$HOME", "-n", "~tilde", "new\nline", "é"])
def test_the_directory_is_taken_literally(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home dir"
    (home / name).mkdir(parents=True)
    for workdir, place in ((str(home / name), home / name), (f"~/{name}", home / name), ("~", home), ("~/", home)):
        line = ssh.remote_command(["sh", "-c", "pwd -P; echo $#", "sh", "one"], workdir)
        out = run(["sh", "-c", line], timeout_s=HANG_S, env={"HOME": str(home)}).stdout
        assert out == f"{place.resolve()}\n1\n"


def test_a_directory_that_is_not_there_runs_nothing(tmp_path: Path) -> None:
    line = ssh.remote_command(["touch", str(tmp_path / "ran")], str(tmp_path / "none"))
    assert run(["sh", "-c", line], timeout_s=HANG_S, check=False).code != 0
    assert not (tmp_path / "ran").exists()


# --- what a run sends ------------------------------------------------------------------------------------

RUN_ID = "0123456789abcdef"
FAKE_SSH = """\
#!{python} -IS
import os, subprocess, sys
here, how = {here!r}, {how!r}
command = sys.argv[-1].replace("/run/nixbox", here)
with open(here + "/argv", "a") as log:
    print(sys.argv[1:], file=log)
env = os.environ | {{"SHELL": "/bin/sh"}}
data = sys.stdin.buffer.read().replace(b"/run/nixbox", here.encode()) if "cat >" in command else b""
if how == "session":
    env["SSH_ORIGINAL_COMMAND"] = command
    argv = [here + "/busybox", "sh", here + "/session"]
else:
    argv = [how, "-c", command]
sys.exit(subprocess.run(argv, env=env, input=data).returncode)
"""


class Guest:
    """What the guest does with a command behind an `ssh` that only starts it; its places lie in a directory of ours.

    `how`: nix/guest/session, as for a shell of another kind, or the shell that takes it as it is.
    """

    def __init__(self, place: Path, busybox: str, how: str) -> None:
        self.place = place
        self.endpoint = ssh.Endpoint(place / "exec", "web-1")
        (place / "scripts").mkdir()
        (place / "bin").mkdir()
        (place / "busybox").symlink_to(busybox)
        for name in ("session", "rc"):
            text = (paths.nix_dir() / "guest" / name).read_text()
            (place / name).write_text(text.replace("/run/nixbox", str(place)))
        (place / "bin/ssh").write_text(FAKE_SSH.format(python=sys.executable, here=str(place), how=how))
        (place / "bin/ssh").chmod(0o755)

    def run(self, line: str, env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        sent = ssh.marked(self.endpoint, RUN_ID, line, env)
        argv = [*self.endpoint.argv("-T"), sent]
        return subprocess.run(argv, capture_output=True, check=False, timeout=HANG_S, stdin=subprocess.DEVNULL)

    def told(self) -> str:
        """What command lines have shown."""
        return (self.place / "argv").read_text()


@pytest.fixture(params=["session", "bash", "dash"])
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Guest:
    busybox, how = shutil.which("busybox"), request.param
    if busybox is None or (how != "session" and shutil.which(how) is None):
        pytest.skip("this host lacks busybox or a shell")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    return Guest(tmp_path, busybox, how)


def test_a_short_command_is_one_message(tmp_path: Path) -> None:
    sent = ssh.marked(ssh.Endpoint(tmp_path / "exec", "web-1"), RUN_ID, "echo 'a b'\necho c", {})
    assert sent == f"NIXBOX_RUN_ID={RUN_ID}; . /run/nixbox/rc\necho 'a b'\necho c\nexit $?"


def test_a_run_is_found_by_its_mark(guest: Guest) -> None:
    done = guest.run('echo "$NIXBOX_RUN_ID/${SSH_ORIGINAL_COMMAND-unset}"; exit 7', {})
    assert (done.stdout, done.returncode) == (f"{RUN_ID}/unset\n".encode(), 7)
    done = guest.run("""sh -c 'echo "$NIXBOX_RUN_ID/$A"; kill -TERM $$'""", {"A": "x"})
    assert (done.stdout, done.returncode) == (f"{RUN_ID}/x\n".encode(), 128 + 15)


def test_a_secret_is_in_no_command_line(guest: Guest) -> None:
    done = guest.run(ssh.remote_command(["printenv", "TOKEN"], None), {"TOKEN": "s3cret"})
    assert done.stdout == b"s3cret\n"
    assert "s3cret" not in guest.told()
    assert list((guest.place / "scripts").iterdir()) == []


def test_what_was_sent_ahead_is_private(guest: Guest) -> None:
    ssh.marked(guest.endpoint, RUN_ID, "true", {"TOKEN": "s3cret"})
    (script,) = (guest.place / "scripts").iterdir()
    assert script.name == f"run-{RUN_ID}"
    assert stat.S_IMODE(script.stat().st_mode) == 0o600


@pytest.mark.parametrize("length", [7990, 8000, 8001, 9001, 120_000])
def test_a_long_command_arrives(guest: Guest, length: int) -> None:
    frame = len(ssh.remote_command(["printf", "%s", ""], None)) - 2
    done = guest.run(ssh.remote_command(["printf", "%s", "x" * (length - frame)], None), {})
    assert done.stdout == b"x" * (length - frame)
    # dropbear ends a session whose command is longer (MAX_CMD_LEN).
    assert max(len(word) for line in guest.told().splitlines() for word in ast.literal_eval(line)) < 9000


def test_bytes_count_not_characters(guest: Guest) -> None:
    done = guest.run(ssh.remote_command(["printf", "%s", "é" * 5000], None), {})
    assert done.stdout == "é".encode() * 5000
    assert len(guest.told().splitlines()) == 2


@QUICK
@example(words=["-n", "", "a b", "*", "$HOME", "'", "\n"], values=["", "\n", "'", "$(exit 3)", "\n\n"])
@given(words=st.lists(WORDS, min_size=1, max_size=40), values=st.lists(WORDS, max_size=40))
def test_words_and_variables_arrive_as_they_are(guest: Guest, words: list[str], values: list[str]) -> None:
    env = {f"NB_{i}": value for i, value in enumerate(values)}
    names = " ".join(f'"$NB_{i}"' for i in range(len(values)))
    script = f'for v in "$@" {names}; do printf "%s\\000" "$v"; done; env -0'
    done = guest.run(ssh.remote_command(["sh", "-c", script, "sh", *words], None), env)
    assert (done.returncode, done.stderr) == (0, b"")
    found = done.stdout.split(b"\0")
    assert found[: len(words) + len(values)] == [text.encode() for text in (*words, *values)]
    assert {f"{name}={value}".encode() for name, value in env.items()} <= set(found)


@pytest.mark.parametrize(
    ("word", "value"), [("\udcff", ""), ("x", "\udcff"), ("\udcff" + "x" * 9000, "")], ids=["word", "value", "long"]
)
def test_what_is_no_utf_8_arrives_too(guest: Guest, word: str, value: str) -> None:
    line = ssh.remote_command(["sh", "-c", 'printf "%s/%s" "$1" "$A"', "sh", word], None)
    done = guest.run(line, {"A": value} if value else {})
    assert done.stdout == f"{word}/{value}".encode(errors="surrogateescape")


# --- the shared connection -------------------------------------------------------------------------------


class Shell:
    """The socket of a guest's SSH port, and a configuration that leads there."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.socket = place / "ssh"
        self.control = place / "x"
        self.log = place / "vm.log"
        ssh.make_keys(place)
        self.endpoint = ssh.write_exec_config(place, "web-1", "dev", self.control)

    @contextmanager
    def listening(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.socket))
            listener.listen(4)
            listener.settimeout(HANG_S)
            yield listener

    def wait(self) -> None:
        ssh.await_master(self.endpoint, self.control, self.socket, self.log)

    def stub(self, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
        """A program that stands in for ssh; it says how often it was started."""
        (self.place / "bin").mkdir()
        (self.place / "bin/ssh").write_text(f"#!/bin/sh\necho >>{self.place}/starts\n{script}\n")
        (self.place / "bin/ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{self.place / 'bin'}:{os.environ['PATH']}")

    def starts(self) -> int:
        return len((self.place / "starts").read_text().splitlines())


@pytest.fixture
def shell() -> Iterator[Shell]:
    with tempfile.TemporaryDirectory(prefix="nb", dir="/tmp") as directory:  # short enough for a socket's path
        yield Shell(Path(directory))


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


def ended(pid: int) -> bool:
    """Whether a child of ours is gone, or has been waited for already."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


@needs_ssh
def test_real_ssh_speaks_over_the_socket_and_ends_with_it(shell: Shell) -> None:
    with shell.listening() as listener:
        with ssh.connected(shell.socket) as transport:
            pid = ssh.begin_master(shell.endpoint, transport, shell.log)
        connection, _ = listener.accept()
    with connection, connection.makefile("rb") as said:
        connection.settimeout(HANG_S)
        assert said.readline().startswith(b"SSH-2.0-OpenSSH")
    wait_for(lambda: ended(pid), "ssh to end")
    assert not shell.control.exists()


@needs_ssh
def test_a_connection_that_stands_is_not_opened_again(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "connected", lambda path: pytest.fail("it stands already"))
    with socket.socket(socket.AF_UNIX) as first:
        first.bind(str(shell.control))
        first.listen()
        shell.wait()
    # What is left of one that has ended does not count.
    with socket.socket(socket.AF_UNIX) as second:

        def stand() -> None:
            shell.control.unlink(missing_ok=True)
            second.bind(str(shell.control))
            second.listen()

        late = threading.Timer(0.05, stand)
        late.start()
        shell.wait()
        late.join(HANG_S)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(ssh, "CONNECT_TIMEOUT_S", 0.1)


@needs_ssh
def test_a_connection_that_has_ended_is_opened_again(
    shell: Shell, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    master = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind('{shell.control}'); s.listen(); s.accept()"
    shell.stub(monkeypatch, f'[ "$(wc -l <{shell.place}/starts)" -lt 2 ] || exec {sys.executable} -c "{master}"')
    with shell.listening():
        shell.wait()
    assert shell.starts() >= 2


@needs_ssh
def test_no_connection_is_said_within_a_bound(shell: Shell, hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "_MASTER_TIMEOUT_S", 0.4)
    shell.stub(monkeypatch, "exit 255")
    begun = time.monotonic()
    with shell.listening(), pytest.raises(HostError, match="no SSH connection to `web-1` comes about"):
        shell.wait()
    assert time.monotonic() - begun < HANG_S
    wait_for(lambda: shell.starts() >= 2, "the second try")


@needs_ssh
def test_a_machine_that_is_gone_is_said(shell: Shell, hasty: None) -> None:
    with pytest.raises(HostError, match="the machine's SSH port does not answer"):
        shell.wait()


@needs_ssh
def test_only_connections_that_there_are_are_closed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.stub(monkeypatch, f'echo "$2 $*" >>{shell.place}/said')
    ssh.close_masters(shell.endpoint, (shell.place / "mux", shell.control))
    assert not (shell.place / "said").exists()
    for name in ("mux", "x"):
        (shell.place / name).touch()
    ssh.close_masters(shell.endpoint, (shell.place / "mux", shell.control))
    files = [Path(line.split()[0]).name for line in (shell.place / "said").read_text().splitlines()]
    assert files == ["config", "exec"]


# --- the user --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "guest"),
    [
        ("alice", "alice"),
        ("a_b-c9", "a_b-c9"),
        ("_x", "_x"),
        *((name, "nixbox") for name in ("root", "www-data", "nobody", "sshd", "Alice", "9lives", "a.b", "a b")),
        *((name, "nixbox") for name in ("", "-x", "a" * 32, "dömäin", "CORP\\alice", "alice$", "a:b", "a\n")),
    ],
)
def test_the_guests_user(host: str, guest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = pwd.struct_passwd((host, "x", 1000, 1000, "", "/home/x", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry)
    assert ssh.guest_user() == guest
    assert re.fullmatch(r"[a-z_][a-z0-9_-]*", ssh.guest_user())


def test_a_uid_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", missing)
    assert os.getuid() >= 0
    assert ssh.guest_user() == "nixbox"
