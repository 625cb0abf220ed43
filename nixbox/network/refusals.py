"""What was refused, and where that is written down: a JSON object a line, in a file that cannot grow without end."""

from __future__ import annotations

import os
import struct
import time

from nixbox.values import asdict, dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LIMIT_BYTES = 1 << 20
_AGAIN_S = 2.0  # a program that tries again and again is told of once in so many seconds
_NFULNL_MSG_PACKET = 4 << 8  # linux/netfilter/nfnetlink_log.h
_NFULA_PAYLOAD = 9
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp"}


@dataclass(frozen=True)
class Refusal:
    """One thing that the guest did not get: a name, or a connection. `time` is in seconds since the epoch.

    `name` is that of the question, or the last one that was answered with `address`.
    """

    time: float
    protocol: str
    name: str | None
    address: str | None
    port: int | None
    reason: str


class Log:
    """The file `net.log` of a machine. Not for two processes at once."""

    def __init__(self, file: Path | str) -> None:
        self._file = str(file)
        self._last: dict[tuple[object, ...], float] = {}

    def write(self, refusal: Refusal) -> None:
        """Add a line, unless the same was said a moment ago. A disk that is full loses it; nothing else does."""
        key = (refusal.protocol, refusal.name, refusal.address, refusal.port)
        now = time.monotonic()
        if now - self._last.get(key, -_AGAIN_S) < _AGAIN_S:
            return
        if len(self._last) > 1000:
            self._last.clear()
        self._last[key] = now
        import json  # of no use to a guard until then

        line = json.dumps(asdict(refusal)) + "\n"
        try:
            if os.path.exists(self._file) and os.stat(self._file).st_size > _LIMIT_BYTES:
                os.replace(self._file, f"{self._file}.old")
            fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "w") as out:
                out.write(line)
        except OSError:
            return


def read(file: Path) -> Iterator[Refusal]:
    """The refusals in a log, oldest first; a line that is damaged is passed over."""
    import json

    for part in (file.with_suffix(".log.old"), file):
        try:
            lines = part.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            try:
                yield Refusal(**json.loads(line))
            except (ValueError, TypeError):
                continue


def packets(message: bytes) -> Iterator[bytes]:
    """The packets in what a socket of nfnetlink_log returned (linux/netlink.h, linux/netfilter/nfnetlink_log.h)."""
    at = 0
    while at + 16 <= len(message):
        length, kind = struct.unpack_from("=IH", message, at)
        if length < 16 or at + length > len(message):
            return
        if kind == _NFULNL_MSG_PACKET:
            yield from _payload(message[at + 20 : at + length])
        at += length + 3 & ~3


def _payload(attributes: bytes) -> Iterator[bytes]:
    at = 0
    while at + 4 <= len(attributes):
        length, kind = struct.unpack_from("=HH", attributes, at)
        if length < 4:
            return
        if kind & 0x3FFF == _NFULA_PAYLOAD:
            yield attributes[at + 4 : at + length]
        at += length + 3 & ~3


def destination(packet: bytes) -> tuple[str, str, int | None] | None:
    """Protocol, address and port that an IPv4 or IPv6 packet was meant for; None when it cannot be told."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        protocol, header = packet[9], (packet[0] & 0xF) * 4
        address = ".".join(str(byte) for byte in packet[16:20])
    elif len(packet) >= 40 and packet[0] >> 4 == 6:
        import ipaddress

        protocol, header = packet[6], 40
        address = str(ipaddress.IPv6Address(packet[24:40]))
    else:
        return None
    port = None
    if protocol in (6, 17) and len(packet) >= header + 4:
        (port,) = struct.unpack_from("!H", packet, header + 2)
    return _PROTOCOLS.get(protocol, f"protocol {protocol}"), address, port
