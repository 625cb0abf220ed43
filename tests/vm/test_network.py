"""What a guest can reach, attacked from inside real guests, in an Internet made of network namespaces."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest

import nixbox
from tests.vm import internet, test_credentials, test_mounts, world
from tests.vm.conftest import RESOURCES, Home, Workspace
from tests.vm.world import World

GATEWAY = "10.0.2.2"
COULD_NOT_RESOLVE, COULD_NOT_CONNECT = 6, 7  # curl(1), EXIT CODES; a time-out would be 28

# probe NAME COMMAND…: print the name and the exit code. A command that waits for a time-out shows as 124 or 28.
PROBES = """
probe() { name=$1; shift; timeout 8 "$@" >/tmp/out 2>&1; echo "$name $?"; }
get() { curl -sS --noproxy '*' -m 6 -o /dev/null "$@"; }
"""
# What must fail as an ordinary user and as root, whatever the mode; refused at once, so curl says 7.
NEVER = f"""
probe metadata curl -sS --noproxy '*' -m 6 http://{internet.METADATA}/
probe lan curl -sS --noproxy '*' -m 6 http://{internet.LAN}/
probe private curl -sS --noproxy '*' -m 6 http://{internet.REBOUND}/
probe host curl -sS --noproxy '*' -m 6 http://{world.HOST}:{world.LAN_PORT}/
probe hostlan curl -sS --noproxy '*' -m 6 http://{world.HOST_LAN}:{world.LAN_PORT}/
probe gateway curl -sS --noproxy '*' -m 6 http://{GATEWAY}:{world.LOOPBACK_PORT}/
probe gateway_lan curl -sS --noproxy '*' -m 6 http://{GATEWAY}:{world.LAN_PORT}/
probe ipv6 curl -sS --noproxy '*' -m 6 http://[fd00:2::2]/
"""
ESCAPES = f"""
probe literal curl -sS --noproxy '*' -m 6 http://{internet.BLOCKED}/
probe dns_udp /run/nixbox/busybox nslookup allowed.example {internet.OTHER_DNS}
probe dns_tcp bash -c 'exec 3<>/dev/tcp/{internet.OTHER_DNS}/53'
probe dot bash -c 'exec 3<>/dev/tcp/{internet.OTHER_DNS}/853'
probe quic bash -c 'exec 3<>/dev/udp/{internet.ALLOWED}/443; echo x >&3; dd bs=9 count=1 <&3 | grep x'
probe mdns bash -c 'exec 3<>/dev/udp/{internet.BLOCKED}/5353; echo x >&3; dd bs=9 count=1 <&3 | grep x'
probe ssh bash -c 'exec 3<>/dev/tcp/{internet.ALLOWED}/22'
probe port curl -sS --noproxy '*' -m 6 http://{internet.ALLOWED}:8080/
probe name curl -sS --noproxy '*' -m 6 http://blocked.example/
probe suffix curl -sS --noproxy '*' -m 6 http://notallowed.example/
probe rebound curl -sS --noproxy '*' -m 6 http://rebound.allowed.example/
"""
# Only root can try these. Whatever they answer, nothing may arrive.
AS_ROOT = f"""
bb=/run/nixbox/busybox
probe ping $bb ping -c 1 -W 2 {internet.ALLOWED}
$bb ip addr add 10.0.2.99/24 dev eth0
probe source curl -sS --noproxy '*' -m 3 --interface 10.0.2.99 http://{internet.BLOCKED}/
probe source_allowed curl -sS --noproxy '*' -m 3 --interface 10.0.2.99 http://{internet.ALLOWED}/
$bb ip addr del 10.0.2.99/24 dev eth0
cp /etc/resolv.conf /tmp/resolv.conf
echo nameserver {internet.OTHER_DNS} >/etc/resolv.conf
probe resolv_conf curl -sS --noproxy '*' -m 6 http://blocked.example/
cat /tmp/resolv.conf >/etc/resolv.conf
$bb ip -6 addr add fd00:2::15/64 dev eth0
$bb ip -6 route add default dev eth0
probe ipv6_route curl -sS --noproxy '*' -m 3 http://[2001:db8::1]/
$bb ip link set eth0 down
$bb ip link set eth0 address 02:00:00:00:00:01
$bb ip link set eth0 up
$bb ip route replace default via {GATEWAY}
probe other_mac curl -sS --noproxy '*' -m 6 http://{internet.METADATA}/
"""


@pytest.fixture
def box(workspace: Workspace, net: World) -> Workspace:
    """A workspace whose host is the one of the small Internet."""
    there = ["sh", "-c", 'cd "$0" && exec "$@"', str(workspace.path)]  # a mount namespace begins at its root
    return dataclasses.replace(workspace, prefix=[*net.prefix, *there])


def config(mode: str, more: str = "", top: str = "") -> str:
    return f'name = "box"\nmounts = []\n{top}{RESOURCES}[network]\nmode = "{mode}"\n{more}'


def probe(box: Workspace, script: str, *, root: bool = False) -> dict[str, int]:
    """Run probes in the guest: their names and exit codes."""
    shell = ["sudo", "bash"] if root else ["bash"]
    out = box("run", "--no-tty", "--", *shell, "-c", PROBES + script).stdout
    return {name: int(code) for name, code in (line.split() for line in out.splitlines())}


def arrived(net: World, since: int) -> list[dict[str, object]]:
    return net.seen()[since:]


def test_the_probes_find_what_is_there(net: World) -> None:
    """The same probes on the host itself: what must fail in a guest is reachable, so its failure says something."""
    script = PROBES.replace("/tmp/out", "/dev/null") + NEVER.replace("[fd00:2::2]", "127.0.0.1:80") + ESCAPES
    out = subprocess.run([*net.prefix, "bash", "-c", script], capture_output=True, text=True, check=True).stdout
    found = {name: int(code) for name, code in (line.split() for line in out.splitlines())}
    for name in ("metadata", "lan", "private", "host", "hostlan", "literal", "dot", "quic", "mdns", "ssh", "port"):
        assert found[name] == 0, (name, found)
    assert found["name"] == found["suffix"] == found["rebound"] == 0


@pytest.mark.parametrize("options", [(), ("--cold",)], ids=["restored", "cold"])
def test_off_lets_nothing_out(box: Workspace, net: World, options: tuple[str, ...]) -> None:
    box.config(config("off"))
    since = len(net.seen())
    box("up", *options)
    for root in (False, True):
        found = probe(box, NEVER + ESCAPES, root=root)
        assert found.pop("name") == found.pop("suffix") == found.pop("rebound") == COULD_NOT_RESOLVE
        assert 0 not in found.values() and not {28, 124} & set(found.values()), found
    assert 0 not in probe(box, AS_ROOT, root=True).values()
    assert arrived(net, since) == []
    reasons = {json.loads(line)["reason"] for line in box("net", "log", "--json").stdout.splitlines()}
    assert "network.mode is off" in reasons
    assert "mode         off" in box("net", "status").stdout


@pytest.mark.parametrize("options", [(), ("--cold",)], ids=["restored", "cold"])
def test_open_lets_out_but_not_into_private_places(box: Workspace, net: World, options: tuple[str, ...]) -> None:
    box.config(config("open"))
    since = len(net.seen())
    box("up", *options)
    for root in (False, True):
        found = probe(box, NEVER, root=root)
        assert 0 not in found.values() and not {28, 124} & set(found.values()), found
        found = probe(box, ESCAPES, root=root)
        # A name may have a private address; the filter refuses the address.
        assert found.pop("rebound") == COULD_NOT_CONNECT
        assert set(found.values()) == {0}, found
    probe(box, AS_ROOT, root=True)
    targets = {event.get("to") for event in arrived(net, since)}
    assert not targets & {internet.METADATA, internet.LAN, internet.REBOUND}
    assert "a private address" in box("net", "log").stdout


def test_private_addresses_can_be_allowed_but_never_the_hosts_loopback(box: Workspace) -> None:
    box.config(config("open", "allow_private = true\n"))
    box("up")
    found = probe(box, NEVER)
    assert found["metadata"] == found["lan"] == found["private"] == 0
    assert found["gateway"] == found["gateway_lan"] == found["host"] == COULD_NOT_CONNECT


@pytest.mark.parametrize("options", [(), ("--cold",)], ids=["restored", "cold"])
def test_filtered_lets_out_to_what_was_named(box: Workspace, net: World, options: tuple[str, ...]) -> None:
    box.config(config("filtered", 'domains = ["*.allowed.example"]\n'))
    since = len(net.seen())
    box("up", *options)
    # Before its name was asked for, not even an allowed server's address is reached.
    early = f"probe early curl -sS --noproxy '*' -m 6 http://{internet.ALLOWED}/"
    assert probe(box, early)["early"] == COULD_NOT_CONNECT
    good = """
probe plain curl -sS --noproxy '*' -m 6 http://allowed.example/
probe tls_port curl -sS --noproxy '*' -m 6 http://allowed.example:443/
probe upper curl -sS --noproxy '*' -m 6 http://Sub.ALLOWED.example/
probe alias curl -sS --noproxy '*' -m 6 http://alias.allowed.example/
probe many curl -sS --noproxy '*' -m 6 http://many.allowed.example/
probe literal_after curl -sS --noproxy '*' -m 6 http://198.51.100.99/
"""
    for root in (False, True):
        found = probe(box, good, root=root)
        assert set(found.values()) == {0}, found
        found = probe(box, NEVER + ESCAPES, root=root)
        assert found.pop("name") == found.pop("suffix") == found.pop("rebound") == COULD_NOT_RESOLVE
        assert 0 not in found.values() and not {28, 124} & set(found.values()), found
    probe(box, AS_ROOT, root=True)
    for event in arrived(net, since):
        if event["kind"] == "dns":
            assert event["server"] == internet.DNS
            name = str(event["raw"]).lower()
            assert "allowed" in name and "notallowed" not in name
        elif event["port"] == 53:  # an answer that was too long: the host's own question, by TCP
            assert event["to"] == internet.DNS
        else:
            assert event["kind"] == "tcp" and event["port"] in (80, 443), event
            assert event["to"] in (internet.ALLOWED, internet.ALIAS) or str(event["to"]) >= internet.MANY, event
    log = [json.loads(line) for line in box("net", "log", "--json").stdout.splitlines()]
    assert {"name": "blocked.example", "reason": "not in network.domains", "protocol": "dns"}.items() <= {
        key: value for entry in log if entry["name"] == "blocked.example" for key, value in entry.items()
    }.items()
    port = next(entry for entry in log if entry["port"] == 8080)
    assert (port["address"], port["reason"]) == (internet.ALLOWED, "not in network.ports")
    assert port["name"].endswith("allowed.example")
    assert any(entry["reason"] == "the name has a private address" for entry in log)
    assert abs(log[-1]["time"] - time.time()) < 300
    assert "nixbox net allow blocked.example" in box("net", "log").stdout


def test_a_hypervisor_that_was_taken_over_has_no_way_out(box: Workspace, net: World) -> None:
    """Whoever runs code in QEMU's process has its namespaces and its rights there: none."""
    box.config(config("open"))
    box("up")
    (pid,) = box.vm_pids()
    status = Path(f"/proc/{pid}/status").read_text()
    for line in ("CapEff", "CapPrm", "CapBnd"):
        assert f"{line}:\t0000000000000000\n" in status
    assert "NoNewPrivs:\t1\n" in status
    since = len(net.seen())
    there = ["nsenter", "--target", str(pid), "--user", "--net", "--preserve-credentials"]
    drop = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--securebits", "+noroot,+noroot_locked"]
    for address in (internet.ALLOWED, internet.METADATA, internet.LAN, world.HOST):
        get = ["curl", "-sS", "--noproxy", "*", "-m", "2", f"http://{address}/"]
        assert subprocess.run([*there, *drop, *get], capture_output=True, check=False).returncode != 0
    tries = ["nft list ruleset", "nft flush ruleset", "ip link set tap0 down", "ip route add 192.0.2.0/24 dev lo"]
    for line in tries:
        done = subprocess.run([*there, *drop, "sh", "-c", line], capture_output=True, check=False)
        assert done.returncode != 0, line
    assert arrived(net, since) == []
    assert probe(box, f"probe fine curl -sS --noproxy '*' -m 6 http://{internet.ALLOWED}/")["fine"] == 0


def test_a_running_machine_follows_its_user_and_its_host(box: Workspace, net: World) -> None:
    box.config("# kept\n" + config("filtered", 'domains = ["allowed.example"] # these\n'))
    box("up")
    get = "probe late curl -sS --noproxy '*' -m 6 http://late.example/"
    assert probe(box, get)["late"] == COULD_NOT_RESOLVE
    said = box("net", "allow", "late.example")
    assert "--save" in said.stderr
    assert probe(box, get)["late"] == 0
    assert "late.example" not in (box.path / ".nixbox/config.toml").read_text()
    box("net", "allow", "late.example", "--save")
    text = (box.path / ".nixbox/config.toml").read_text()
    assert 'domains = ["allowed.example", "late.example"] # these' in text and text.startswith("# kept\n")
    assert "is no domain" in box("net", "allow", "https://x", code=2).stderr

    # A VPN comes up: the host asks another server, and so do its guests.
    assert "switched" not in box.guest("getent hosts switched.allowed.example || :")
    net.resolv_conf.write_text(f"nameserver {internet.OTHER_DNS}\n")
    try:
        assert internet.ALIAS in box.guest("getent hosts switched.allowed.example")
    finally:
        net.resolv_conf.write_text(f"nameserver {internet.DNS}\n")

    # The guard is killed: nothing becomes wider, and the next up starts it again.
    guard = _guards(box)
    assert guard
    for pid in guard:
        os.kill(pid, signal.SIGKILL)
    since = len(net.seen())
    found = probe(box, NEVER + ESCAPES + get)
    assert 0 not in found.values(), found
    assert arrived(net, since) == []
    assert "does not answer" in box("net", "status", code=1).stderr
    assert "it was started again" in box("up").stderr
    assert probe(box, get)["late"] == 0
    assert "late.example" in box("net", "status").stdout

    # Suspended, resumed and forked machines have the same policy, each with a guard of its own.
    box("suspend")
    end = time.monotonic() + 10
    while _guards(box):
        assert time.monotonic() < end, "the guard outlives its machine"
    assert json.loads(box("up", "--json").stdout)["how"] == "resumed"
    (name,) = box("fork").stdout.split()
    for machine in ("box", name):
        out = box("run", "-m", machine, "--", "bash", "-c", PROBES + get + "\n" + ESCAPES).stdout
        found = {what: int(code) for what, code in (line.split() for line in out.splitlines())}
        assert found.pop("late") == 0
        assert 0 not in found.values(), (machine, found)


def _guards(box: Workspace) -> list[int]:
    """The guard processes of this session's machines and all that they have started."""
    return box.of_session(b"nixbox-guard-box")


@pytest.mark.parametrize("mode", ["off", "filtered"])
def test_ports_are_published_in_every_mode(box: Workspace, mode: str) -> None:
    box.config(config(mode, top="ports = [{ host = 18080, guest = 8000 }]\n"))
    box("up")
    # A server on the guest's own loopback, as development servers are.
    serve = "/run/nixbox/busybox httpd -p 127.0.0.1:8000 -h /etc"
    box.guest(serve)
    assert _answer(box, 18080) == "box\n"
    box("port", "add", "18081:8000")
    assert _answer(box, 18081) == "box\n"
    rows = json.loads(box("port", "list", "--json").stdout)
    assert [(row["host"], row["active"]) for row in rows] == [(18080, True), (18081, True)]
    assert "cannot be published" in box("port", "add", f"{world.LOOPBACK_PORT}:8000", code=1).stderr
    box("port", "rm", "18081")
    assert _answer(box, 18081) == ""
    assert "is not published" in box("port", "rm", "18081", code=2).stderr
    box("port", "add", "18082:8000")
    box("down")
    assert _answer(box, 18080) == ""
    box("up")
    box.guest(serve)
    assert _answer(box, 18080) == _answer(box, 18082) == "box\n"


def _answer(box: Workspace, port: int) -> str:
    """What the guest's web server says at a port of the host's loopback; nothing if nobody answers."""
    get = ["curl", "-sS", "--noproxy", "*", "-m", "20", f"http://127.0.0.1:{port}/hostname"]
    return subprocess.run([*box.prefix, *get], capture_output=True, text=True, check=False).stdout


def test_what_cannot_be_enforced_is_refused(box: Workspace) -> None:
    box.config(config("filtered", 'domains = ["allowed.example"]\n'))
    hide = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null "$0" && exec "$@"']
    pasta = shutil.which("pasta")
    assert pasta is not None
    without = dataclasses.replace(box, prefix=[*box.prefix, *hide, pasta])
    failed = without("up", code=None)
    assert failed.returncode != 0 and "pasta" in failed.stderr
    assert not box.vm_pids() and not _guards(box)
    without = dataclasses.replace(box, prefix=[*box.prefix, *hide, "/dev/net/tun"])
    failed = without("up", code=None)
    assert failed.returncode != 0 and "/dev/net/tun" in failed.stderr
    assert not box.vm_pids() and not _guards(box)


# What a desktop has and a bare machine like CI's may lack: code and Python where everybody can read them, and a TUN
# device that everybody may use, as udev makes it (50-udev-default.rules).
_AS_USER = """
set -e
base=$1 python=$2 code=$3 site=$4 uid=$5 work=$6
shift 6
mount -t tmpfs -o mode=0755,dev tmpfs "$base/made"
mkdir "$base/made/python" "$base/made/code" "$base/made/site"
mknod -m 0666 "$base/made/tun" c 10 200
mount --bind "$base/made/tun" /dev/net/tun
cp /etc/passwd "$base/made/passwd"
echo "tester:x:$uid:$uid::$HOME:/bin/sh" >>"$base/made/passwd"
mount --bind "$base/made/passwd" /etc/passwd
mount --bind "$python" "$base/made/python"
mount --bind "$code" "$base/made/code"
mount --bind "$site" "$base/made/site"
cd "$work"
export PYTHONPATH="$base/made/code:$base/made/site"
shift
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups --inh-caps -all --bounding-set -all --no-new-privs -- \\
  "$base/made/python/bin/python3" "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the whole suite runs as an ordinary user already")
def test_an_ordinary_user_has_all_of_it(home: Home, net: World) -> None:
    uid = 64321
    base = Path(tempfile.mkdtemp(prefix="nbu"))
    work = base / "w"
    for path in (base / "made", work, base / "home", base / "run"):
        path.mkdir(mode=0o700)
        os.chown(path, uid, uid)
    base.chmod(0o755)
    code, site = Path(nixbox.__file__).parent.parent, sysconfig.get_path("purelib")
    there = ["sh", "-c", _AS_USER, "sh", str(base), sys.base_prefix, str(code), site, str(uid), str(work)]
    env = {**home.env, "HOME": str(base / "home"), "XDG_RUNTIME_DIR": str(base / "run")}
    box = Workspace(work, env, prefix=["unshare", "--mount", *there])
    outside = test_mounts.furnish(box)
    mounts = test_mounts.mount_tables(box)
    box.config(config("filtered", f'domains = ["allowed.example"]\n{mounts}').replace("mounts = []\n", ""))
    (work / ".nixbox" / "nixbox.lock").write_text(home.lock)
    for path in (outside, *work.rglob("*"), *outside.rglob("*")):
        os.chown(path, uid, uid, follow_symlinks=False)
    try:
        assert "your own store is" in box("doctor").stdout
        box("build")
        inner = dataclasses.replace(box, prefix=[*net.prefix, "unshare", "--mount", *there])
        for options in ((), ("--cold",)):
            since = len(net.seen())
            inner("up", *options)
            (pid,) = inner.vm_pids()
            assert Path(f"/proc/{pid}").stat().st_uid == uid
            good = "probe good curl -sS --noproxy '*' -m 6 http://allowed.example/"
            assert probe(inner, good)["good"] == 0
            for root in (False, True):
                found = probe(inner, NEVER + ESCAPES, root=root)
                assert 0 not in found.values() and not {28, 124} & set(found.values()), found
            probe(inner, AS_ROOT, root=True)
            assert {event.get("to", internet.DNS) for event in arrived(net, since)} == {
                internet.DNS,
                internet.ALLOWED,
            }
            test_mounts.attack(inner, outside, uid)
            inner("down")
        for mode in ("off", "open"):
            variable = '[env]\nTOKEN = { from_host = "HOST_TOKEN" }\n'
            box.config(config(mode, f"{mounts}{variable}").replace("mounts = []\n", ""))
            for options in ((), ("--cold",)):
                since = len(net.seen())
                inner.extra["HOST_TOKEN"] = test_credentials.PLANTED
                inner("up", *options)
                del inner.extra["HOST_TOKEN"]
                probes = NEVER + ESCAPES if mode == "off" else NEVER
                for root in (False, True):
                    found = probe(inner, probes, root=root)
                    assert 0 not in found.values() and not {28, 124} & set(found.values()), found
                assert (probe(inner, good)["good"] == 0) is (mode == "open")
                assert bool(arrived(net, since)) is (mode == "open")
                assert inner.guest("echo $TOKEN; sync") == f"{test_credentials.PLANTED}\n"
                value = test_credentials.PLANTED.encode()
                assert test_credentials.holding(value, base.rglob("*")) == []
                assert test_credentials.processes_with(value) == []
                inner("down")
        inner("rm", "--yes")
    finally:
        for pid in box.vm_pids():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(base)
