"""Inside a real guest: commands, environment, and what the Debian root is like."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.vm.conftest import RESOURCES, Workspace


def test_streams_and_exit_codes_pass_through(running: Workspace) -> None:
    data = bytes(range(256)) * 4096
    process = running.start("run", "--no-tty", "--", "sha256sum", stdin=subprocess.PIPE)
    out, _ = process.communicate(data, timeout=60)
    import hashlib

    assert out.split()[0].decode() == hashlib.sha256(data).hexdigest()
    process = running.start("run", "--no-tty", "--", "cat", stdin=subprocess.PIPE)
    assert process.communicate(data, timeout=60)[0] == data
    both = running("run", "--", "sh", "-c", "echo out; echo err >&2; exit 3", code=3)
    assert (both.stdout, both.stderr) == ("out\n", "err\n")
    assert running("run", "--", "sh", "-c", "kill -9 $$", code=137).stdout == ""
    assert "not found" in running("run", "--", "no-such-command", code=127).stderr
    odd = ["a b", "", "'", '"', "$HOME", "*", "\\", "new\nline", "-x", "ü"]
    printed = running("run", "--", "printf", "%s\\0", *odd).stdout
    assert printed.split("\0")[:-1] == odd


def test_workdir_and_variables_of_one_command(running: Workspace) -> None:
    assert running("run", "-w", "/usr/share", "--", "pwd").stdout == "/usr/share\n"
    assert running("run", "-w", "~", "--", "pwd").stdout.startswith("/home/")
    running.guest("mkdir -p ~/'my dir'")
    assert running("run", "-w", "~/my dir", "--", "pwd").stdout.endswith("/my dir\n")
    assert "No such file" in running("run", "-w", "/no/where", "--", "true", code=None).stderr
    value = "a 'b' \"c\" $d `e` \\ \n ü *"
    assert running("run", "-e", f"X={value}", "--", "printenv", "X").stdout == value + "\n"


def test_a_time_limit_ends_the_command_in_the_guest(running: Workspace) -> None:
    running("run", "--timeout", "1", "--", "sleep", "12345", code=124, timeout_s=60)
    assert "12345" not in running.guest("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    # One that does not listen to SIGTERM is killed.
    stubborn = "trap '' TERM; while :; do sleep 1; done # stubborn"
    running("run", "--timeout", "1", "--", "bash", "-c", stubborn, code=124, timeout_s=60)
    assert "stubborn" not in running.guest("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").replace("# stub'", "")


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_command(running: Workspace, sig: signal.Signals) -> None:
    script = "trap 'echo caught; exit 42' INT TERM; echo ready; while :; do sleep 0.1; done"
    process = running.start("run", "--no-tty", "--", "bash", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(sig)
    out, err = process.communicate(timeout=60)
    assert b"caught" in out and process.returncode == 42, err


def test_ctrl_c_in_a_terminal_reaches_the_command_alone(running: Workspace) -> None:
    # The whole foreground group gets SIGINT, as from a terminal: ssh must not die of it first.
    script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    process = running.start("run", "--no-tty", "--", "bash", "-c", script, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert b"caught" in out and process.returncode == 9, err


def test_what_sudo_runs_is_ended_too(running: Workspace) -> None:
    running("run", "--timeout", "1", "--", "sudo", "sleep", "54321", code=124, timeout_s=60)
    assert "54321" not in running.guest("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").replace("cat /proc", "")


def test_names_of_variables_are_names(running: Workspace) -> None:
    refused = running("run", "-e", "X;touch /tmp/pwn;Y=1", "--", "true", code=125)
    assert "takes NAME=VALUE" in refused.stderr
    assert (
        running("run", "-e", "command=mine", "-e", "run=too", "--", "printenv", "command", "run").stdout
        == "mine\ntoo\n"
    )


def test_a_terminal_when_there_is_one(running: Workspace) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*_command(running), "run", "--", "sh", "-c", "tty; stty size; read line; echo got:$line"],
        cwd=running.path,
        env=dict(running.env) | {"TERM": "xterm"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    os.write(leader, b"typed\n")
    text = _read_all(leader)
    assert process.wait(60) == 0
    assert b"/dev/pts/" in text and b"got:typed" in text
    assert "not a tty" in running("run", "--", "tty", code=1).stdout


def _command(box: Workspace) -> list[str]:
    import sys

    return [*box.prefix, sys.executable, "-m", "nixbox"]


def _read_all(fd: int) -> bytes:
    text = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([fd], [], [], 1)[0]:
            try:
                data = os.read(fd, 4096)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            text += data
    os.close(fd)
    return text


def test_twenty_commands_at_once(running: Workspace) -> None:
    results: dict[int, str] = {}

    def one(number: int) -> None:
        results[number] = running("run", "--no-tty", "--", "echo", str(number)).stdout

    threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number}\n" for number in range(20)}


def test_copying_files_with_plain_scp_and_sftp(running: Workspace, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(running("ssh-config").stdout)
    (tmp_path / "up").write_bytes(os.urandom(100_000))
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for options in ([], ["-O"]):  # sftp, and the old protocol
        subprocess.run(["scp", "-q", *options, "-F", config, tmp_path / "up", "box:copy"], check=True, env=env)
        subprocess.run(["scp", "-q", *options, "-F", config, "box:copy", tmp_path / "down"], check=True, env=env)
        assert (tmp_path / "down").read_bytes() == (tmp_path / "up").read_bytes()
    # Without the machine's key nobody gets in, and a wrong host key is refused.
    stranger = tmp_path / "stranger"
    stranger.write_text(re.sub(r"(?m)^  (IdentityFile|ControlPath) .*$", r"  \1 none", config.read_text()))
    refused = subprocess.run(
        ["ssh", "-F", stranger, "box", "true"],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 255 and "Permission denied" in refused.stderr
    (tmp_path / "known").write_text("box " + (Path(__file__).parent / "other_host_key.pub").read_text())
    wrong = subprocess.run(
        [
            "ssh",
            "-F",
            config,
            "-o",
            "ControlPath=none",
            "-o",
            f"UserKnownHostsFile={tmp_path / 'known'}",
            "box",
            "true",
        ],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 255 and "Host key verification failed" in wrong.stderr


def test_the_user_and_the_debian_root(running: Workspace) -> None:
    assert running.guest("id -u; sudo -n id -u").split() == ["1000", "0"]
    modes = running.guest("stat -c '%a %U:%G %n' /usr/bin/su /usr/bin/sudo /usr/bin/passwd /etc/shadow /tmp /root")
    assert modes.splitlines() == [
        "4755 root:root /usr/bin/su",
        "4755 root:root /usr/bin/sudo",
        "4755 root:root /usr/bin/passwd",
        "640 root:shadow /etc/shadow",
        "1777 root:root /tmp",
        "700 root:root /root",
    ]
    assert running.guest("dpkg --audit") == ""
    assert running.guest("readlink -e /etc/alternatives/awk") == "/usr/bin/mawk\n"
    assert "_apt" in running.guest("getent passwd _apt sshd")
    owners = running.guest("sudo stat -c '%U:%G %n' /var/mail /etc/gshadow /usr/bin/chage")
    assert owners.split()[::2] == ["root:mail", "root:shadow", "root:shadow"]
    assert running.guest("ls -A /etc/ssh | grep host_key || echo none") == "none\n"
    assert running.guest("date -u +%Y") == time.strftime("%Y\n", time.gmtime())
    # What stage 1 put together cannot be reached from inside.
    assert running("run", "--", "sudo", "ls", "/overlay", "/lower", code=2).stdout == ""


def test_the_root_image_cannot_be_written_by_guest_root(running: Workspace) -> None:
    image = Path(running.status()["image"])
    before = _digest(image / "root.img", running)
    attack = (
        "for disk in /dev/vd?; do sudo blockdev --setrw $disk || true; "
        "[ $(cat /sys/block/${disk#/dev/}/serial) = root ] || continue; "
        "sudo dd if=/dev/urandom of=$disk bs=4096 count=4 conv=fsync 2>&1 || echo refused; done"
    )
    assert "refused" in running.guest(attack)
    assert _digest(image / "root.img", running) == before


def _digest(path: Path, box: Workspace) -> str:
    from nixbox.image import store

    root = Path(box.env["HOME"]) / ".local/share/nix/root"
    place = path if store.private_root() is None else root / path.relative_to("/")
    return subprocess.run(["sha256sum", place], check=True, capture_output=True, text=True).stdout.split()[0]


ODD_VALUES = {
    "SPACES": "  a  b  ",
    "QUOTES": 'it\'s "quoted" `cmd` $(cmd)',
    "DOLLAR": "$HOME ${x} $$",
    "NEWLINES": "one\ntwo\n\nthree\n",
    "UTF8": "grüße 🦀",
    "BACKSLASH": "\\n \\' \\",
    "EMPTY": "",
    "GLOB": "* ? [a] ~",
    "CONTROL": "".join(map(chr, range(1, 32))),
    "LONG": "x" * 50_000,
}


def test_the_environment_arrives_byte_for_byte_and_stays_in_memory(workspace: Workspace) -> None:
    secret = "s3cret-" + os.urandom(8).hex()
    lines = [f"{name} = {_toml(value)}" for name, value in ODD_VALUES.items()]
    lines += ['FROM_HOST = { from_host = "NIXBOX_TEST_SECRET" }']
    workspace.config(f'name = "box"\nmounts = []\n[env]\n{chr(10).join(lines)}\n{RESOURCES}')

    missing = workspace("up", code=2)
    assert "NIXBOX_TEST_SECRET" in missing.stderr and "lacks" in missing.stderr
    workspace.extra["NIXBOX_TEST_SECRET"] = secret
    workspace("up", "--env", "GIVEN=by hand", timeout_s=400)
    script = "; ".join(f'printf "%s\\0" "${name}"' for name in [*ODD_VALUES, "FROM_HOST", "GIVEN"])
    want = [*ODD_VALUES.values(), secret, "by hand", ""]
    for command in (["sh", "-c", script], ["bash", "-lc", script], ["bash", "-c", script]):
        assert workspace("run", "--", *command).stdout.split("\0") == want, command
    # A login shell that did not come through sshd, and a child of one.
    through_su = workspace("run", "--", "sudo", "su", "-", _user(workspace), "-c", 'printf %s "$FROM_HOST"').stdout
    assert through_su == secret
    (pid,) = workspace.vm_pids()
    assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert secret.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert secret not in workspace.guest("cat /proc/cmdline")
    assert workspace.guest("stat -c '%a %u' /run/nixbox/env") == "600 1000\n"
    assert workspace.guest("stat -f -c %T /run/nixbox/env") == "tmpfs\n"
    workspace("down")
    for file in workspace.path.rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), f"the secret is in {file}"
    shown = workspace("config").stdout + workspace("config", "--json").stdout + workspace("up", "--dry-run").stdout
    assert secret not in shown and "by hand" not in shown

    # Taken out of the config, it is gone at the next start.
    workspace.config(f'name = "box"\nmounts = []\n{RESOURCES}')
    workspace("up")
    assert workspace.guest("echo ${FROM_HOST-unset}") == "unset\n"


def _user(box: Workspace) -> str:
    return str(box.status()["user"])


def _toml(value: str) -> str:
    import json

    # A TOML basic string is written as a JSON string but for DEL, which none of these holds.
    return json.dumps(value, ensure_ascii=False)
