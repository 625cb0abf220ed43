"""A small Internet for tests: a program that serves names, pages and echoes on every address it is given.

Run in a network namespace of the test's own: `internet.py LOG`. It writes a JSON line to LOG for all that reaches it.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
from pathlib import Path

ALLOWED, BLOCKED, ALIAS, LATE = "198.51.100.10", "198.51.100.11", "198.51.100.12", "198.51.100.13"
MANY = "198.51.100.64"
DNS, OTHER_DNS = "198.51.100.53", "198.51.100.54"
METADATA, LAN, REBOUND = "169.254.169.254", "192.168.77.1", "10.9.8.7"
MANY_ADDRESSES = tuple(f"198.51.100.{64 + i}" for i in range(40))
ADDRESSES = (ALLOWED, BLOCKED, ALIAS, LATE, DNS, OTHER_DNS, METADATA, REBOUND, *MANY_ADDRESSES)
TCP_PORTS = (22, 80, 443, 853, 8080)
UDP_PORTS = (443, 5353)

ZONE = {
    "allowed.example": [("A", ALLOWED, 1)],
    "sub.allowed.example": [("A", ALLOWED, 60)],
    "notallowed.example": [("A", BLOCKED, 60)],
    "blocked.example": [("A", BLOCKED, 60)],
    "alias.allowed.example": [("CNAME", "one.cdn.example", 60), ("CNAME2", "two.cdn.example", 60), ("A2", ALIAS, 60)],
    "many.allowed.example": [("A", address, 60) for address in MANY_ADDRESSES],
    "rebound.allowed.example": [("A", REBOUND, 60)],
    "late.example": [("A", LATE, 60)],
}
# What the other server says: a name has another address there, so that a test sees which one was asked.
OTHER = {"allowed.example": [("A", ALIAS, 1)], "switched.allowed.example": [("A", ALIAS, 1)]}


def labels(name: str) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"


def reply(data: bytes, zone: dict[str, list[tuple[str, str, int]]], limit: int) -> bytes:
    ident = data[:2]
    at, parts = 12, []
    while data[at]:
        parts.append(data[at + 1 : at + 1 + data[at]].decode())
        at += data[at] + 1
    question = data[12 : at + 5]
    name, kind = ".".join(parts).lower(), struct.unpack("!H", data[at + 1 : at + 3])[0]
    records = zone.get(name)
    if records is None:
        return ident + struct.pack("!5H", 0x8183, 1, 0, 0, 0) + question
    body, count, owner = b"", 0, name
    for what, value, seconds in records:
        if what.startswith("CNAME"):
            body += labels(owner) + struct.pack("!2HIH", 5, 1, seconds, len(labels(value))) + labels(value)
            owner, count = value, count + 1
        elif kind == 1:
            body += labels(owner) + struct.pack("!2HIH", 1, 1, seconds, 4) + socket.inet_aton(value)
            count += 1
    answer = ident + struct.pack("!5H", 0x8180, 1, count, 0, 0) + question + body
    if len(answer) > limit:
        return ident + struct.pack("!5H", 0x8380, 1, 0, 0, 0) + question
    return answer


class Server:
    def __init__(self, log: Path) -> None:
        self.file = log.open("a")
        self.lock = threading.Lock()

    def seen(self, **what: object) -> None:
        with self.lock:
            self.file.write(json.dumps(what) + "\n")
            self.file.flush()

    def udp(self, address: str, port: int) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, port))
        zone = OTHER if address == OTHER_DNS else ZONE
        while True:
            data, asker = sock.recvfrom(65535)
            if port == 53:
                answer = reply(data, zone, 512)
                self.seen(kind="dns", server=address, raw=data[12:60].decode("latin-1"))
            else:
                answer = data
                self.seen(kind="udp", to=address, port=port)
            sock.sendto(answer, asker)

    def tcp(self, address: str, port: int) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(64)
        while True:
            client, peer = sock.accept()
            self.seen(kind="tcp", to=address, port=port, peer=peer[0])
            threading.Thread(target=self.client, args=(client, address, port), daemon=True).start()

    def client(self, client: socket.socket, address: str, port: int) -> None:
        try:
            with client:
                data = client.recv(65535)
                if port == 53:
                    answer = reply(data[2:], OTHER if address == OTHER_DNS else ZONE, 65535)
                    client.sendall(struct.pack("!H", len(answer)) + answer)
                elif data.startswith(b"GET /big"):
                    client.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                    for _ in range(100):
                        client.sendall(bytes(1 << 20))
                elif data.startswith(b"GET /slow"):
                    client.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                    for _ in range(8):
                        client.sendall(b"tick\n")
                        threading.Event().wait(1)
                else:
                    client.sendall(f"HTTP/1.0 200 OK\r\n\r\n{address}:{port}\n".encode())
        except OSError:
            return


def main() -> None:
    server = Server(Path(sys.argv[1]))
    works = [(server.udp, a, p) for a in (*ADDRESSES, LAN) for p in UDP_PORTS]
    works += [(server.tcp, a, p) for a in (*ADDRESSES, LAN) for p in TCP_PORTS]
    works += [(work, a, 53) for a in (DNS, OTHER_DNS) for work in (server.udp, server.tcp)]
    for work, address, port in works:
        threading.Thread(target=work, args=(address, port), daemon=True).start()
    threading.Event().wait(0.5)
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
