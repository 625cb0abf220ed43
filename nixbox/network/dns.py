"""DNS messages (RFC 1035) as far as a filter needs them: questions, and answers cut down to what was asked.

Everything here reads bytes that a stranger sent. Whatever is not understood raises ValueError.
"""

from __future__ import annotations

import os
import struct

from nixbox.values import dataclass

A, CNAME, AAAA, OPT, SVCB, HTTPS, ANY = 1, 5, 28, 41, 64, 65, 255
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP = 0, 1, 2, 3, 4

LONGEST = 65535  # bytes of a message over TCP
_UDP_LEAST = 512
_UDP_MOST = 1232  # what passes every path without being cut (dnsflagday.net/2020)
_HEADER = struct.Struct("!6H")
_RECORD = struct.Struct("!2HIH")
_QR, _AA, _TC, _RD, _RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080


@dataclass(frozen=True)
class Question:
    """One question: `name` in lower case without the last dot, `kind` a record type, `raw` its bytes as sent.

    `size` is the longest answer over UDP that the asker takes, in bytes.
    """

    ident: int
    name: str
    kind: int
    raw: bytes
    size: int = _UDP_LEAST

    def query(self) -> tuple[int, bytes]:
        """The question as we ask it of another server: a random id of our own, and nothing else of the asker's."""
        ident = int.from_bytes(os.urandom(2), "big")
        options = b"\0" + struct.pack("!2HIH", OPT, _UDP_MOST, 0, 0)
        return ident, _HEADER.pack(ident, _RD, 1, 0, 0, 1) + self.raw + options

    def answer(self, code: int, *, cut: bool = False) -> bytes:
        """An answer without records: an error, nothing there (NOERROR), or (`cut`) "ask again by TCP"."""
        flags = _QR | _RD | _RA | code | (_TC if cut else 0)
        return _HEADER.pack(self.ident, flags, 1, 0, 0, 0) + self.raw


def _name(data: bytes, at: int) -> tuple[str, int]:
    """The name at an offset and the offset behind it. A label that holds a dot or no ASCII is refused."""
    labels: list[bytes] = []
    behind = 0
    length = 0
    while True:
        if at >= len(data):
            raise ValueError("a name that goes beyond the message")
        size = data[at]
        if size >= 0xC0:
            if at + 1 >= len(data):
                raise ValueError("a name that goes beyond the message")
            target = (size & 0x3F) << 8 | data[at + 1]
            behind = behind or at + 2
            if target >= at:  # only ever backwards, so that it ends
                raise ValueError("a name that points forwards")
            at = target
            continue
        if size > 63:
            raise ValueError("a label of an unknown kind")
        at += 1
        if size == 0:
            break
        label = data[at : at + size]
        length += size + 1
        if len(label) < size or length > 254:
            raise ValueError("a name that is too long")
        if any(byte in b". " or not 32 < byte < 127 for byte in label):
            raise ValueError("a name with strange characters")
        labels.append(label)
        at += size
    return b".".join(labels).decode().lower(), behind or at


def parse_query(data: bytes) -> Question:
    """A guest's message: exactly one question about the Internet. Raises ValueError."""
    if len(data) < _HEADER.size:
        raise ValueError("no message")
    ident, flags, questions, answers, authorities, more = _HEADER.unpack_from(data)
    if flags & _QR or flags >> 11 & 0xF or questions != 1 or answers or authorities:
        raise ValueError("no plain question")
    name, at = _name(data, _HEADER.size)
    if data[_HEADER.size] >= 0xC0 or at + 4 > len(data):
        raise ValueError("no question")
    kind, kind_class = struct.unpack_from("!2H", data, at)
    if kind_class != IN:
        raise ValueError("not about the Internet")
    raw = data[_HEADER.size : at + 4]
    return Question(ident, name, kind, raw, _size(data, at + 4, more))


def _size(data: bytes, at: int, records: int) -> int:
    """The longest answer over UDP that EDNS (RFC 6891) offers to take."""
    for _ in range(records):
        _, at = _name(data, at)
        if at + _RECORD.size > len(data):
            raise ValueError("a record that goes beyond the message")
        kind, size, _, length = map(int, _RECORD.unpack_from(data, at))
        at += _RECORD.size + length
        if kind == OPT:
            return max(_UDP_LEAST, min(size, _UDP_MOST))
    return _UDP_LEAST


@dataclass(frozen=True)
class Answer:
    """A server's answer: `addresses` are the IPv4 addresses of the name that was asked for, aliases followed."""

    message: bytes
    code: int
    cut: bool
    addresses: tuple[str, ...]


def parse_answer(question: Question, ident: int, data: bytes, longest_s: int) -> Answer:
    """Check an answer to our `question.query()` and make it the asker's: no time in it is longer than `longest_s`.

    What comes back has the question, the answers and the authority, as sent by the server, and nothing behind them.
    Raises ValueError for what is no answer to it.
    """
    if len(data) < _HEADER.size:
        raise ValueError("no message")
    got, flags, questions, answers, authorities, _ = _HEADER.unpack_from(data)
    if got != ident or not flags & _QR or questions != 1:
        raise ValueError("an answer to something else")
    name, at = _name(data, _HEADER.size)
    if name != question.name or data[at : at + 4] != question.raw[-4:]:
        raise ValueError("an answer to another question")
    at += 4
    if at != _HEADER.size + len(question.raw):
        raise ValueError("a question that is written in another way")
    out = bytearray(data)
    # The chain of aliases is followed in whatever order it was sent.
    aliases: dict[str, str] = {}
    found: list[tuple[str, str]] = []
    for number in range(answers + authorities):
        owner, at = _name(data, at)
        if at + _RECORD.size > len(data):
            raise ValueError("a record that goes beyond the message")
        kind, kind_class, seconds, length = _RECORD.unpack_from(data, at)
        struct.pack_into("!I", out, at + 4, min(seconds, longest_s))
        at += _RECORD.size
        if at + length > len(data):
            raise ValueError("a record that goes beyond the message")
        if number < answers and kind_class == IN:
            if kind == CNAME:
                aliases[owner], _ = _name(data, at)
            elif kind == A and length == 4:
                found.append((owner, ".".join(str(byte) for byte in data[at : at + 4])))
        at += length
    chain = {name}
    while name in aliases and aliases[name] not in chain:
        name = aliases[name]
        chain.add(name)
    cut = bool(flags & _TC)
    header = _HEADER.pack(question.ident, (flags & ~_AA) | _RD | _RA, 1, answers, authorities, 0)
    out[: _HEADER.size] = header
    # The question as it was asked: a resolver may compare its letters.
    start = _HEADER.size
    out[start : start + len(question.raw)] = question.raw
    addresses = tuple(dict.fromkeys(address for owner, address in found if owner in chain))
    return Answer(bytes(out[:at]), flags & 0xF, cut, addresses)
