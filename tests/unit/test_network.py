"""The network's policy, its filter's text, and the DNS messages that strangers send."""

from __future__ import annotations

import _thread
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixbox.errors import ConfigError, NixboxError
from nixbox.network import dns, guard, policy, refusals, upstream
from nixbox.plan.network import Policy
from nixbox.session import net, ports

HANG_S = 10.0
LABEL = st.text("abcxyz019-", min_size=1, max_size=12)
NAME = st.lists(LABEL, min_size=1, max_size=5).map(".".join)


# --- policy ----------------------------------------------------------------------------------------------


@given(NAME, NAME)
def test_a_domain_covers_itself_and_what_is_below_it(domain: str, name: str) -> None:
    assert policy.covers(domain, domain.upper() + ".")
    assert policy.covers(f"*.{domain}", f"{name}.{domain}")
    assert not policy.covers(domain, f"x{domain}")
    assert not policy.covers(f"{name}.{domain}", domain)


@pytest.mark.parametrize(
    ("address", "private"),
    [
        *(("10.0.0.1", True), ("172.16.0.1", True), ("172.32.0.1", False), ("192.168.255.255", True)),
        *(("169.254.169.254", True), ("127.0.0.1", True), ("0.0.0.0", True), ("255.255.255.255", True)),
        *(("100.64.0.1", True), ("100.63.255.255", False), ("224.0.0.1", True), ("8.8.8.8", False)),
    ],
)
def test_private_addresses(address: str, private: bool) -> None:
    assert policy.is_private(address) is private
    assert policy.admits(Policy("filtered"), address) is not private
    assert policy.admits(Policy("filtered", allow_private=True), address)


def test_names_are_answered_as_the_mode_says() -> None:
    assert not policy.resolves(Policy("off", ("example.org",)), "example.org")
    assert policy.resolves(Policy("open"), "anything.example")
    named = Policy("filtered", ("*.example.org",))
    assert policy.resolves(named, "a.b.example.org") and policy.resolves(named, "example.org")
    assert not policy.resolves(named, "example.org.evil.example")
    assert Policy.from_json(json.loads(json.dumps(named.as_json()))) == named


def leaving(found: Policy) -> list[str]:
    text = policy.ruleset(found).partition("chain leaving {")[2].partition("}\n  chain")[0]
    return [line.strip() for line in text.strip().splitlines()]


def test_what_each_mode_accepts() -> None:
    established = "ct state established,related accept"
    private = "ip daddr @private goto refuse"
    assert leaving(Policy("off")) == [established]
    assert leaving(Policy("open")) == [established, private, "accept"]
    assert leaving(Policy("open", allow_private=True)) == [established, "accept"]
    assert leaving(Policy("filtered", ("a.b",))) == [
        established,
        private,
        "ip daddr @admitted tcp dport { 80, 443 } accept",
    ]
    assert leaving(Policy("filtered", ports=(22,)))[-1] == "ip daddr @admitted tcp dport { 22 } accept"
    for mode in ("off", "open", "filtered"):
        text = policy.ruleset(Policy(mode))
        assert text.count("policy drop") == 3 and text.count("{") == text.count("}")


def test_an_admission_names_addresses_only() -> None:
    text = policy.admission([("198.51.100.1", 360)])
    assert text.splitlines()[0] == "add element inet nixbox admitted { 198.51.100.1 timeout 360s }"
    with pytest.raises(ValueError, match="decimal digits"):
        policy.admission([("1.1.1.1 } ; flush ruleset", 1)])


# --- DNS -------------------------------------------------------------------------------------------------


def wire(name: str) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode() for part in name.split(".") if part) + b"\0"


def query(name: str, kind: int = dns.A, *, ident: int = 7, size: int | None = None) -> bytes:
    more = b"" if size is None else b"\0" + struct.pack("!2HIH", dns.OPT, size, 0, 0)
    return (
        struct.pack("!6H", ident, 0x100, 1, 0, 0, 1 if more else 0) + wire(name) + struct.pack("!2H", kind, 1) + more
    )


def record(owner: bytes, kind: int, data: bytes, seconds: int = 60) -> bytes:
    return owner + struct.pack("!2HIH", kind, 1, seconds, len(data)) + data


def answer(question: dns.Question, records: list[bytes], *, ident: int = 9, flags: int = 0x8180) -> bytes:
    return struct.pack("!6H", ident, flags, 1, len(records), 0, 0) + question.raw + b"".join(records)


@given(NAME, st.sampled_from([dns.A, dns.AAAA, 15, 16]), st.none() | st.integers(0, 65535))
def test_a_question_is_read(name: str, kind: int, size: int | None) -> None:
    found = dns.parse_query(query(name, kind, size=size))
    assert (found.ident, found.name, found.kind) == (7, name, kind)
    assert found.size == (512 if size is None else max(512, min(size, 1232)))
    ident, asked = found.query()
    again = dns.parse_query(asked)
    assert (again.ident, again.name, again.kind) == (ident, name, kind)
    refused = found.answer(dns.NXDOMAIN)
    assert refused[:2] == b"\0\x07" and refused[3] & 0xF == 3 and refused[2] & 0x80
    assert refused[12:] == found.raw


@given(st.binary(max_size=80))
def test_whatever_a_guest_sends_is_a_question_or_an_error(data: bytes) -> None:
    try:
        dns.parse_query(data)
    except ValueError:
        return


@given(st.binary(max_size=200))
def test_whatever_a_server_sends_is_an_answer_or_an_error(data: bytes) -> None:
    question = dns.parse_query(query("example.org"))
    try:
        dns.parse_answer(question, 9, answer(question, [])[:12] + data, 300)
    except ValueError:
        return


@pytest.mark.parametrize(
    "data",
    [
        b"",
        query("a.b")[:-1],
        query("a.b")[:2] + b"\x81" + query("a.b")[3:],  # an answer
        struct.pack("!6H", 7, 0x100, 2, 0, 0, 0) + (wire("a.b") + b"\0\1\0\1") * 2,
        struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1",  # a name that points at itself
        struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + b"\x03a.b\0\0\1\0\1",  # a dot inside a label
        struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + wire("a.b") + b"\0\1\0\3",  # not the Internet
    ],
)
def test_odd_questions_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^.+$"):
        dns.parse_query(data)


def test_only_addresses_of_the_name_itself_count() -> None:
    question = dns.parse_query(query("www.example.org"))
    here = b"\xc0\x0c"
    records = [
        # The chain may come in any order.
        record(wire("two.cdn.example"), dns.A, bytes([198, 51, 100, 1]), 9999),
        record(here, dns.CNAME, wire("one.cdn.example")),
        record(wire("one.cdn.example"), dns.CNAME, wire("two.cdn.example")),
        record(wire("other.example"), dns.A, bytes([203, 0, 113, 66])),  # nobody asked
    ]
    found = dns.parse_answer(question, 9, answer(question, records) + b"behind", 300)
    assert found.addresses == ("198.51.100.1",)
    assert found.message[:2] == b"\0\x07" and found.message.endswith(bytes([203, 0, 113, 66]))
    assert struct.pack("!I", 9999) not in found.message and struct.pack("!I", 300) in found.message
    loop = [record(here, dns.CNAME, wire("a.example")), record(wire("a.example"), dns.CNAME, wire("www.example.org"))]
    assert dns.parse_answer(question, 9, answer(question, loop), 300).addresses == ()


def test_an_answer_to_something_else_is_none() -> None:
    question = dns.parse_query(query("www.example.org"))
    other = dns.parse_query(query("www.example.net"))
    for data in (answer(question, [], ident=8), answer(other, []), answer(question, [], flags=0x100), b"x"):
        with pytest.raises(ValueError, match=r"^.+$"):
            dns.parse_answer(question, 9, data, 300)


# --- the host's servers ----------------------------------------------------------------------------------


@contextmanager
def server(answers: list[bytes | None]) -> Iterator[tuple[int, list[bytes]]]:
    """A name server on loopback that gives one answer after the other (None: silence); its port and what it got."""
    got: list[bytes] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        def serve() -> None:
            for text in answers:
                data, asker = sock.recvfrom(65535)
                got.append(data)
                if text is not None:
                    sock.sendto(data[:2] + text[2:], asker)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield sock.getsockname()[1], got


def test_a_server_is_asked_and_its_guesses_are_passed_over() -> None:
    question = dns.parse_query(query("example.org"))
    good = answer(question, [record(b"\xc0\x0c", dns.A, bytes([198, 51, 100, 7]))])
    with server([good]) as (port, got):
        found = upstream.resolve(question, ("127.0.0.1",), 300, port)
        assert found is not None and found.addresses == ("198.51.100.7",)
        # Nothing of the guest's own message but the question goes on.
        assert got[0][12 : 12 + len(question.raw)] == question.raw


def test_a_server_that_is_not_there_is_no_answer() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    assert upstream.resolve(dns.parse_query(query("example.org")), ("127.0.0.1",), 300, port) is None


def test_resolv_conf_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    servers = upstream.Servers(file)
    assert servers.now() == ("127.0.0.1",)
    file.write_text("# x\nnameserver 192.0.2.1\nsearch a.b\nnameserver junk\nnameserver fe80::1%eth0\n")
    assert servers.now() == ("192.0.2.1", "fe80::1%eth0")
    new = tmp_path / "new"
    new.write_text("nameserver 192.0.2.2\n" * 5)
    new.rename(file)
    assert servers.now() == ("192.0.2.2",) * 3


# --- refusals --------------------------------------------------------------------------------------------


def test_refusals_are_written_once_in_a_while_and_bounded(tmp_path: Path) -> None:
    file = tmp_path / "net.log"
    log = refusals.Log(file)
    one = refusals.Refusal(1.0, "tcp", None, "198.51.100.1", 80, "why")
    for _ in range(5):
        log.write(one)
    assert list(refusals.read(file)) == [one]
    assert file.stat().st_mode & 0o777 == 0o600
    for number in range(20_000):
        log.write(refusals.Refusal(float(number), "tcp", "x" * 60, "198.51.100.1", number, "why"))
    assert file.stat().st_size < 2 << 20
    assert sum(part.stat().st_size for part in tmp_path.iterdir()) < 3 << 20
    file.write_text("damaged\n" + file.read_text()[:200] + "\n")
    list(refusals.read(file))


@given(st.binary(max_size=120))
def test_whatever_the_kernel_logs_is_read(data: bytes) -> None:
    for packet in refusals.packets(data):
        refusals.destination(packet)
    refusals.destination(data)


def test_where_a_packet_was_going() -> None:
    head = bytes([0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 2, 15, 198, 51, 100, 1])
    packet = head + struct.pack("!HH", 4000, 443)
    assert refusals.destination(packet) == ("tcp", "198.51.100.1", 443)
    attribute = struct.pack("=HH", 4 + len(packet), 9) + packet
    body = b"\0" * 4 + attribute
    message = struct.pack("=IHHII", 16 + len(body), 4 << 8, 0, 0, 0) + body
    assert list(refusals.packets(message)) == [packet]


# --- the command line's part -----------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "pair"), [("8080:80", (8080, 80)), ("22", (22, 22))])
def test_a_pair_of_ports(text: str, pair: tuple[int, int]) -> None:
    assert ports.parse(text) == pair


@pytest.mark.parametrize("text", ["", "a", "80:", "0:1", "1:65536", "1:2:3", "-1:2", "²:1"])
def test_no_pair_of_ports(text: str) -> None:
    with pytest.raises(ConfigError, match="is no pair of ports"):
        ports.parse(text)


def test_domains_are_written_beside_what_is_there(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('# mine\nname = "x"\n')
    assert net.write_domains(config, ["a.example"]) == ["a.example"]
    assert net.write_domains(config, ["a.example", "b.example"]) == ["b.example"]
    assert config.read_text().startswith("# mine\n") and '["a.example", "b.example"]' in config.read_text()
    config.write_text("network = 1\n")
    with pytest.raises(NixboxError, match="cannot be changed"):
        net.write_domains(config, ["c.example"])
    assert config.read_text() == "network = 1\n"


# --- the guard's threads ---


@pytest.fixture
def a_guard(tmp_path: Path) -> guard.Guard:
    settings = {"policy": Policy("off").as_json(), "pasta": [], "nftables": "", "runtime": str(tmp_path)}
    return guard.Guard(settings | {"log": str(tmp_path / "net.log")}, -1, -1, -1)


def test_no_more_questions_at_a_time_than_there_may_be(a_guard: guard.Guard) -> None:
    going_on, answered = threading.Event(), threading.Semaphore(0)

    def answer(number: int) -> None:
        going_on.wait(HANG_S)
        answered.release()
        if number % 2:
            raise SystemExit  # however it ends

    for number in range(64):
        assert a_guard._begin(answer, number)
    assert not a_guard._begin(answer, 64)
    going_on.set()
    for _ in range(64):
        assert answered.acquire(timeout=HANG_S)
    end = time.monotonic() + HANG_S
    while a_guard._answering and time.monotonic() < end:
        time.sleep(0.001)
    assert a_guard._answering == 0 and a_guard._begin(answer, 0)


def test_a_question_that_no_thread_can_be_had_for_is_passed_over(
    a_guard: guard.Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", none)
    assert not a_guard._begin(lambda: None)
    assert a_guard._answering == 0
