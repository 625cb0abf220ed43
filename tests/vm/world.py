"""Network namespaces that stand for a host and the Internet around it; nothing of this machine's own is in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.vm import internet

HOST, ROUTER = "203.0.113.2", "203.0.113.1"
HOST_LAN = "192.168.77.2"
LOOPBACK_PORT = 8099  # a service of the host's own loopback
LAN_PORT = 8098  # a service of the host on all its addresses

_SERVICE = """
import socket, sys, threading
def serve(address, port):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    sock.listen(64)
    while True:
        client, _ = sock.accept()
        with client:
            client.recv(4096)
            client.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nthe host\\n")
for place in (("127.0.0.1", int(sys.argv[1])), ("0.0.0.0", int(sys.argv[2]))):
    threading.Thread(target=serve, args=place, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


class World:
    """The host's namespaces are entered with `prefix` before a command line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "internet.log"
        self.log.touch()
        self.resolv_conf = directory / "resolv.conf"
        self.resolv_conf.write_text(f"nameserver {internet.DNS}\n")
        flags = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        self._processes: list[subprocess.Popen[str]] = []
        self.host = self._start(["unshare", *flags, "--net", "--mount", *_keep()])
        self.prefix = self._enter(self.host, "--net", "--mount")
        self.internet = self._start([*self._enter(self.host), "unshare", "--net", *_keep()])
        other = self._enter(self.internet, "--net")
        self._links(other)
        self._run([*self.prefix, "mount", "--bind", str(self.resolv_conf), "/etc/resolv.conf"])
        python = [sys.executable, "-I", "-S"]
        self._start([*other, *python, internet.__file__, str(self.log)])
        self._start([*self.prefix, *python, "-c", _SERVICE, str(LOOPBACK_PORT), str(LAN_PORT)])

    def _enter(self, pid: int, *namespaces: str) -> list[str]:
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(pid), *user, *namespaces, "--"]

    def _start(self, argv: Sequence[str]) -> int:
        """Start a process that says `ready`, and lives until its standard input ends; returns its id."""
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", argv
        return process.pid

    def _run(self, argv: Sequence[str]) -> None:
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)

    def _links(self, other: list[str]) -> None:
        for name, host, peer in (("wan", HOST, ROUTER), ("lan", HOST_LAN, internet.LAN)):
            link = ["ip", "link", "add", name, "type", "veth", "peer", "name", name, "netns", str(self.internet)]
            self._run([*self.prefix, *link])
            for prefix, address in ((self.prefix, host), (other, peer)):
                self._run([*prefix, "ip", "addr", "add", f"{address}/24", "dev", name])
                self._run([*prefix, "ip", "link", "set", name, "up"])
        for prefix in (self.prefix, other):
            self._run([*prefix, "ip", "link", "set", "lo", "up"])
        for address in internet.ADDRESSES:
            self._run([*other, "ip", "addr", "add", f"{address}/32", "dev", "lo"])
        self._run([*self.prefix, "ip", "route", "add", "default", "via", ROUTER])

    def seen(self) -> list[dict[str, Any]]:
        """All that reached the Internet up to now."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def end(self) -> None:
        """End every process; the namespaces go with them."""
        for process in reversed(self._processes):
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _keep() -> list[str]:
    """Hold the namespaces until standard input ends."""
    return ["sh", "-c", "echo ready; read -r _"]
