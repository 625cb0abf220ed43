"""SSH: real ssh reads the configuration, real ssh-keygen makes the keys, a real shell reads the command line."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from nixbox.errors import HostError
from nixbox.guest import ssh
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
    endpoint = ssh.write_config(directory, "web-1", "dev", 40123, directory / "ctl")
    found = parsed(endpoint)
    assert found["hostname"] == "127.0.0.1"
    assert (found["port"], found["user"], found["hostkeyalias"]) == ("40123", "dev", "web-1")
    assert found["stricthostkeychecking"] in ("true", "yes")
    assert found["controlmaster"] == "auto"
    assert (found["forwardagent"], found["identitiesonly"]) == ("no", "yes")
    # -G expands the tokens of ControlPath only; in the others `%%` still stands for one.
    assert found["controlpath"] == str(directory / "ctl")
    assert found["identityfile"].replace("%%", "%") == str(directory / "user_key")
    assert found["userknownhostsfile"].replace("%%", "%") == str(directory / "known_hosts")
    assert (directory / "known_hosts").read_text() == "web-1 ssh-ed25519 AAAAC3\n"
    assert stat.S_IMODE(endpoint.config.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["new\nline", "${HOME}", "\x1b[2J"])
def test_a_path_that_ssh_would_read_as_another_is_refused(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    (directory / "host_key.pub").write_text("ssh-ed25519 AAAAC3 nixbox\n")
    with pytest.raises(HostError, match="ssh cannot work in a directory") as caught:
        ssh.write_config(directory, "web-1", "dev", 40123, directory / "ctl")
    assert caught.value.message.isprintable()
    assert not (directory / "config").exists()


@needs_ssh
def test_another_host_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "host_key.pub").write_text("ssh-ed25519 AAAAC3 nixbox\n")
    endpoint = ssh.write_config(tmp_path, "web-1", "dev", 40123, tmp_path / "ctl")
    assert parsed(ssh.Endpoint(endpoint.config, "web-2"))["port"] == "22"


def test_the_command_line_names_the_file_and_the_host(tmp_path: Path) -> None:
    argv = ssh.Endpoint(tmp_path / "config", "web-1").argv("-T")
    assert argv == ["ssh", "-F", str(tmp_path / "config"), "-T", "web-1"]


def test_a_secret_is_in_the_environment_and_in_no_command_line() -> None:
    assert ssh.session_env("id", {}) == {"NIXBOX_RUN": "id"}
    assert ssh.session_env("id", {"A": "it's"}) == {"NIXBOX_RUN": "id", "NIXBOX_ENV": "export A='it'\"'\"'s'\n"}


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
