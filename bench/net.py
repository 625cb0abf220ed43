"""The network of a guest, filtered, open, and QEMU's own user network, to a server in namespaces of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import bare
from bench.home import CONFIG, MEMORY_MIB, NIXBOX, VCPUS, Home
from nixbox import linux
from nixbox.guest import ssh
from nixbox.guest.control import Control
from nixbox.plan.model import Accelerator
from tests.vm import internet
from tests.vm.world import World

REQUESTS = 100

# Prints bytes a second of one download, and nanoseconds for REQUESTS requests after each other. bash opens the
# connections itself: to start a program for each would measure that.
SCRIPT = f"""
url=$1 host=$2
curl -sS --noproxy '*' -o /dev/null -w '%{{speed_download}}\\n' "$url/big"
begun=$(date +%s%N)
i=0
while [ $i -lt {REQUESTS} ]; do
  i=$((i + 1))
  exec 3<>/dev/tcp/$host/80
  printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3
  while read -r line <&3; do :; done
  exec 3>&-
done
echo $(($(date +%s%N) - begun))
"""


@dataclass(frozen=True, slots=True)
class Speed:
    """Bytes a second of one large download, and small requests a second."""

    download: float
    requests: float


def parse(out: str) -> Speed:
    """What SCRIPT printed."""
    download, nanoseconds = out.split()
    return Speed(float(download), REQUESTS / (int(nanoseconds) / 1e9))


@contextmanager
def world(home: Home) -> Iterator[World]:
    """The small Internet of the tests."""
    with tempfile.TemporaryDirectory(dir=home.path) as directory:
        made = World(Path(directory))
        try:
            yield made
        finally:
            made.end()


def nixbox(home: Home, place: World, *args: str) -> str:
    """Run a nixbox command on the host of that Internet."""
    there = ["sh", "-c", 'cd "$0" && exec "$@"', str(home.workspace)]
    return home.call([*place.prefix, *there, *NIXBOX, *args])


@contextmanager
def machine(home: Home, place: World, mode: str) -> Iterator[Callable[[], Speed]]:
    """A machine in a network mode, and how to measure it."""
    config = home.workspace / ".nixbox" / "config.toml"
    domains = 'domains = ["allowed.example"]\n' if mode == "filtered" else ""
    config.write_text(f'{CONFIG}[network]\nmode = "{mode}"\n{domains}')
    try:
        nixbox(home, place, "up")
        run = ("run", "--no-tty", "--", "bash", "-c", SCRIPT, "sh", "http://allowed.example", internet.ALLOWED)
        yield lambda: parse(nixbox(home, place, *run))
        nixbox(home, place, "rm", "--yes", "bench")
    finally:
        config.write_text(CONFIG)


@contextmanager
def user_network(home: Home, place: World, image: Path, accelerator: Accelerator) -> Iterator[Callable[[], Speed]]:
    """A bare QEMU with its own user network."""

    def inside() -> None:
        linux.setns(os.open(f"/proc/{place.host}/ns/net", os.O_RDONLY), linux.CLONE_NEWNET)

    with tempfile.TemporaryDirectory(dir=home.path) as directory:
        work = Path(directory)
        guest = bare.ColdGuest(work, image, vcpus=VCPUS, memory_mib=MEMORY_MIB, accelerator=accelerator)
        try:
            guest.bare.start(guest.spec, user_network=inside)
            with Control.connect(guest.bare.sockets.control) as control:
                control.expect("boot", bare.TIMEOUT_S)
                control.go(guest.bare.go("boot", restored=False, image=image))
                control.expect("ready", bare.TIMEOUT_S)
            endpoint = ssh.write_exec_config(work, bare.NAME, guest.bare.user, work / "x")
            ssh.await_master(endpoint, work / "x", guest.bare.sockets.shell, work / "log")
            argv = [*endpoint.argv("-T"), "bash", "-s", "--", f"http://{internet.ALLOWED}", internet.ALLOWED]

            def measure() -> Speed:
                return parse(subprocess.run(argv, input=SCRIPT, capture_output=True, text=True, check=True).stdout)

            yield measure
            ssh.close_masters(endpoint, (work / "none", work / "x"))
        finally:
            guest.bare.end()


# Prints the median milliseconds of a question to a name server.
_ASK = """
import socket, statistics, struct, sys, time
name = b"".join(bytes([len(p)]) + p.encode() for p in "sub.allowed.example".split(".")) + b"\\0"
message = struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + name + struct.pack("!2H", 1, 1)
times = []
for _ in range(200):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        begun = time.perf_counter()
        sock.sendto(message, (sys.argv[1], 53))
        assert len(sock.recv(4096)) > len(message)
        times.append(time.perf_counter() - begun)
print(statistics.median(times) * 1000)
"""


def dns_ms(place: World, pid: int, gateway: str) -> tuple[float, float]:
    """Median milliseconds of a question: to the guard, from its machine's namespace, and to the host's own server."""
    ask = [sys.executable, "-I", "-S", "-c", _ASK]
    there = ["nsenter", "--target", str(pid), "--user", "--net", "--preserve-credentials", "--"]
    guarded = subprocess.run([*there, *ask, gateway], capture_output=True, text=True, check=True).stdout
    direct = subprocess.run([*place.prefix, *ask, internet.DNS], capture_output=True, text=True, check=True).stdout
    return float(guarded), float(direct)
