"""One life of a machine through the command line, on each hypervisor: here under TCG, in the box under real KVM.

The lock, the image and the steps are the same for all.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from nixbox.plan.network import GUEST_MAC
from tests.kvm import box as boxes
from tests.kvm.box import Done
from tests.vm import internet
from tests.vm.conftest import Home
from tests.vm.world import World

CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0
KEPT = ("HOME", "XDG_RUNTIME_DIR", "PATH", "LC_ALL", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")
CONFIG = """\
name = "box"
[resources]
vcpus = 1
memory = "320MiB"
disk = "1GiB"
[[mounts]]
source = "."
target = "~/workspace"
[[mounts]]
source = "data"
target = "/srv/data"
readonly = true
[network]
mode = "filtered"
domains = ["allowed.example"]
ports = [8080]
[machine]
accelerator = "{accelerator}"
backend = "{backend}"
"""
# A World in the box: it says how its host is entered, and lives as long as the box.
WORLD = """
import json, os, sys, time
from pathlib import Path
from tests.vm.world import World
place = Path(sys.argv[1])
place.mkdir()
world = World(place)
(place / "new").write_text(json.dumps(world.prefix))
(place / "new").rename(place / "prefix")
time.sleep(86400)
"""


@dataclass
class Host:
    """Where the commands run. `run` takes a command line, its directory, its environment and a bound in seconds."""

    backend: str
    accelerator: str
    workspace: Path
    env: Mapping[str, str]
    prefix: list[str]
    run: Callable[[list[str], str, Mapping[str, str], float], Done]

    def sh(self, script: str, code: int | None = 0) -> str:
        """A shell script as the user of this host; returns its stdout."""
        there = f"cd {shlex.quote(str(self.workspace))}\n{script}"  # a mount namespace is entered at its root
        done = self.run([*self.prefix, "sh", "-euc", there], "/", self.env, TIMEOUT_S)
        assert code is None or done.code == code, f"{script}: {done.code}\n{done.stdout}\n{done.stderr}"
        print(done.stderr, end="")
        return done.stdout

    def nixbox(self, *args: str, code: int = 0) -> str:
        """A nixbox command; returns its stdout."""
        return self.sh(f"exec {shlex.join([sys.executable, '-m', 'nixbox', *args])}", code)

    def guest(self, script: str, code: int = 0) -> str:
        """A shell script in the guest; returns its stdout."""
        return self.nixbox("run", "--no-tty", "--", "sh", "-euc", script, code=code)


def _here(argv: list[str], cwd: str, env: Mapping[str, str], timeout_s: float) -> Done:
    done = subprocess.run(
        argv, cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
    )
    return Done(done.returncode, done.stdout, done.stderr, 0.0)


@pytest.fixture(params=["qemu-tcg", "qemu-kvm", "krun-kvm"])
def host(request: pytest.FixtureRequest, home: Home, tmp_path: Path) -> Iterator[Host]:
    """A host of the kind, in a small Internet, with a workspace that has never been up."""
    backend, accelerator = request.param.split("-")
    workspace = Path(tempfile.mkdtemp(prefix="w", dir=home.path))
    (workspace / ".nixbox").mkdir()
    (workspace / "data").mkdir()
    (workspace / "data/given").write_text("given\n")
    (workspace / ".nixbox/config.toml").write_text(CONFIG.format(backend=backend, accelerator=accelerator))
    (workspace / ".nixbox/nixbox.lock").write_text(home.lock)
    env = {name: home.env[name] for name in KEPT if name in home.env} | {"PYTHONPATH": str(CHECKOUT)}
    try:
        if accelerator == "tcg":
            world = World(tmp_path)
            try:
                yield Host(backend, accelerator, workspace, env, world.prefix, _here)
            finally:
                _here([sys.executable, "-m", "nixbox", "rm", "--yes"], str(workspace), env, TIMEOUT_S)
                world.end()
        else:
            with boxes.restored(request.getfixturevalue("saved")) as box:

                def in_box(argv: list[str], cwd: str, env: Mapping[str, str], timeout_s: float) -> Done:
                    return box.run(argv, cwd=cwd, env=env, timeout_s=timeout_s)

                start = shlex.join([sys.executable, "-c", WORLD, "/tmp/world"])
                wait = "until [ -e /tmp/world/prefix ]; do sleep 0.1; done; cat /tmp/world/prefix"
                script = f"ip link set lo up; setsid {start} </dev/null >/tmp/world.log 2>&1 & {wait}"
                said = in_box(["sh", "-c", script], "/tmp", env, 60.0)
                yield Host(backend, accelerator, workspace, env, json.loads(said.stdout), in_box)
    finally:
        shutil.rmtree(workspace)


def test_a_machines_life(host: Host) -> None:
    def up(how: str) -> None:
        done = json.loads(host.nixbox("up", "--json"))
        print({name: round(seconds, 2) for name, seconds in done["phases"].items()})
        assert (done["how"], done["accelerator"]) == (how, host.accelerator), done

    up("restored")
    _commands(host)
    _mounts(host)
    _network(host)
    if host.backend == "qemu":
        host.guest("echo here >/dev/shm/file")
        host.nixbox("suspend")
        up("resumed")
        assert host.guest("cat /dev/shm/file") == "here\n"
    else:
        _what_it_cannot_do(host)

    host.guest("echo mine >~/file; sync")
    host.nixbox("down")
    assert host.sh("grep -laE 'n[i]xbox-(krun-)?box' /proc/[0-9]*/cmdline || true") == ""
    up("restored")
    status = json.loads(host.nixbox("status", "--json"))
    assert status["backend"] == host.backend
    assert int(host.sh(f"sed -n 's/FDSize://p' /proc/{status['pid']}/status")) >= 512  # before it had threads
    if host.backend == "krun":
        _has_no_old_timer(host, status["pid"])
    _idles(host, status["pid"])
    host.sh(f"kill -9 {status['pid']}")
    host.nixbox("run", "true", code=125)
    up("restored")
    assert host.guest("cat ~/file") == "mine\n"
    host.nixbox("rm", "--yes")
    _randomness(host)


def _commands(host: Host) -> None:
    # The kernel's own defences are on where instructions are the processor's.
    spaces = "0" if host.accelerator == "tcg" else "2"
    assert host.guest("hostname; cat /proc/sys/kernel/randomize_va_space; exit 7", code=7) == f"box\n{spaces}\n"
    shell = shlex.join([sys.executable, "-m", "nixbox", "shell"])
    words = r"printf 'echo it is $((40 + 2))\nexit 3\n'"
    assert "it is 42" in host.sh(f"{words} | script -qec {shlex.quote(shell)} /dev/null", code=None)
    copy = f"{sys.executable} -m nixbox run --no-tty -- cat"
    assert host.sh(f"head -c 3000000 /dev/zero | {copy} | wc -c") == "3000000\n"


def _mounts(host: Host) -> None:
    host.sh("ln -s /etc/machine-id out")
    attacks = (
        "echo x >/srv/data/given",  # read-only, whoever asks
        "sudo mount -o remount,rw /srv/data && sudo sh -c 'echo x >/srv/data/given'",
        "ls ~/workspace/.nixbox/*",  # nixbox's own, masked
        "sudo cat ~/workspace/.nixbox/config.toml",
        "cp /bin/true ~/workspace/suid && chmod u+s ~/workspace/suid",
        "sudo mknod ~/workspace/device c 1 3",
        "! cmp ~/workspace/out /etc/machine-id",  # a link out of the share leads to the guest's own files
    )
    tried = [
        f"if {{ {attack}; }} >/dev/null 2>&1; then echo {shlex.quote(attack)} succeeded; fi" for attack in attacks
    ]
    given = "cat /srv/data/given ~/workspace/data/given; echo from the guest >~/workspace/made"
    assert host.guest("\n".join([given, *tried])) == "given\ngiven\n"
    assert host.sh("cat made data/given; stat -c %u made") == f"from the guest\ngiven\n{os.getuid()}\n"


def _network(host: Host) -> None:
    get = "curl -s --max-time 20 -o /dev/null -w '%{http_code}\\n'"
    places = ("http://blocked.example:8080/", f"http://{internet.BLOCKED}:8080/", "http://allowed.example:80/")
    refused = [f"if {get} {place} >&2; then echo {place} answered; fi" for place in places]
    # Nothing but the card leads out: no vsock (VIRTIO_ID_VSOCK), by which libkrun reaches the host's network.
    vsock = "grep -l 0x0013 /sys/bus/virtio/devices/*/device || true"
    mac = "cat /sys/class/net/eth0/address"
    said = host.guest("\n".join([f"{get} http://allowed.example:8080/", *refused, vsock, mac]))
    assert said == f"200\n{GUEST_MAC}\n", "and the namespace knows where the guest is without asking"


def _idles(host: Host, pid: int) -> None:
    """A guest with nothing to do leaves its CPU: some that was saved at the wrong moment never halted again."""
    host.guest("true")
    busy = f"cut -d' ' -f14,15 /proc/{pid}/stat"
    before, after = (sum(map(int, host.sh(words).split())) for words in (f"sleep 2; {busy}", f"sleep 4; {busy}"))
    assert after - before < 0.5 * 4 * os.sysconf("SC_CLK_TCK")


def _has_no_old_timer(host: Host, pid: int) -> None:
    """KVM was not asked about the old timer chip (machine/krun_timer), and the guest does not use it."""
    assert host.sh(f"sed -n 's/Seccomp_filters:\t//p' /proc/{pid}/status") == "2\n"
    assert host.guest("sed -n '/^ *0:/p' /proc/interrupts") == ""


def _randomness(host: Host) -> None:
    """Machines of one template draw different numbers, from the first on."""
    draw = "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid"
    drawn = []
    for _ in range(2):
        done = json.loads(host.nixbox("up", "--json"))
        assert (done["how"], done["template"], done["made"]) == ("restored", "ready", False), done
        drawn += host.guest(draw).splitlines()
        host.nixbox("rm", "--yes")
    assert len(set(drawn)) == 4, drawn


def _what_it_cannot_do(host: Host) -> None:
    """Libkrun neither saves a running machine nor plugs anything in: said with the mend."""
    for command, words in (
        ("suspend", "neither suspend nor copy"),
        ("fork", "neither suspend nor copy"),
        ("mount data /srv/more", "neither come nor go"),
        ("unmount /srv/data", "neither come nor go"),
    ):
        said = host.sh(f"{sys.executable} -m nixbox {command} 2>&1", code=None)
        assert words in said and "--backend qemu" in said, said
