"""Asking the host's own name servers: those that the host would ask at this moment (resolv.conf(5))."""

from __future__ import annotations

import os
import struct
import time

from nixbox import light
from nixbox.network import dns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

_RESOLV_CONF = "/etc/resolv.conf"
_TRIES = 2
_UDP_TIMEOUT_S = 2.0
_TCP_TIMEOUT_S = 4.0
_MOST_SERVERS = 3  # resolv.conf(5), MAXNS


class Servers:
    """The host's name servers. The file is read again when it changes: a VPN comes and goes while a machine runs."""

    def __init__(self, file: Path | str = _RESOLV_CONF) -> None:
        self._file = file
        self._seen: object = None
        self._servers: tuple[str, ...] = ()

    def now(self) -> tuple[str, ...]:
        """Their addresses, in order."""
        try:
            info = os.stat(self._file)
            seen = (info.st_dev, info.st_ino, info.st_mtime_ns, info.st_size)
            if seen != self._seen:
                with open(self._file, errors="replace") as file:
                    self._servers = parse_resolv_conf(file.read())
                self._seen = seen
        except OSError:
            self._seen, self._servers = None, ()
        return self._servers or ("127.0.0.1",)  # what resolv.conf(5) says of a file that names none


def parse_resolv_conf(text: str) -> tuple[str, ...]:
    """The `nameserver` addresses of resolv.conf(5), without what is no address."""
    import ipaddress

    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            with light.suppress(ValueError):
                ipaddress.ip_address(words[1].partition("%")[0])
                found.append(words[1])
    return tuple(found[:_MOST_SERVERS])


def resolve(question: dns.Question, servers: tuple[str, ...], longest_s: int, port: int = 53) -> dns.Answer | None:
    """Ask one server after the other, twice; None when none answers."""
    for _ in range(_TRIES):
        for server in servers:
            with light.suppress(OSError):
                answer = _by_udp(question, server, port, longest_s)
                if answer is not None and answer.cut:
                    answer = _by_tcp(question, server, port, longest_s)
                if answer is not None and answer.code != dns.SERVFAIL:
                    return answer
    return None


def _connected(kind: int, server: str, port: int, timeout_s: float) -> light.Socket:
    info = light.getaddrinfo(server, port, type=kind, flags=light.AI_NUMERICHOST)[0]
    sock = light.Socket(info[0], kind)
    try:
        sock.settimeout(timeout_s)
        sock.connect(info[4])
    except BaseException:
        sock.close()
        raise
    return sock


def _by_udp(question: dns.Question, server: str, port: int, longest_s: int) -> dns.Answer | None:
    # A socket of its own for each question: another source port each time, and only that server's answers reach it.
    with _connected(light.SOCK_DGRAM, server, port, _UDP_TIMEOUT_S) as sock:
        ident, message = question.query()
        sock.send(message)
        end = time.monotonic() + _UDP_TIMEOUT_S
        while (left := end - time.monotonic()) > 0:
            sock.settimeout(left)
            data = sock.recv(dns.LONGEST)
            with light.suppress(ValueError):  # somebody's guess, or a server that is confused
                return dns.parse_answer(question, ident, data, longest_s)
    return None


def _by_tcp(question: dns.Question, server: str, port: int, longest_s: int) -> dns.Answer | None:
    with _connected(light.SOCK_STREAM, server, port, _TCP_TIMEOUT_S) as sock:
        ident, message = question.query()
        sock.sendall(struct.pack("!H", len(message)) + message)
        data = read_message(sock)
    if data is None:
        return None
    try:
        return dns.parse_answer(question, ident, data, longest_s)
    except ValueError:
        return None


def read_message(sock: light.Socket) -> bytes | None:
    """One message with its length before it (RFC 1035, 4.2.2); None at the end of the stream. Raises OSError."""
    head = _exactly(sock, 2)
    return _exactly(sock, int.from_bytes(head, "big")) if head is not None else None


def _exactly(sock: light.Socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            return None
        data += more
    return data
