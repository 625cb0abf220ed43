"""cloud-hypervisor's API client against a scripted peer: refusals, silence, and what is not HTTP."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nixbox.errors import ExitCode, NixboxError
from nixbox.machine.cloud_hypervisor_api import Api, ApiClosed, ApiError, ApiTimeout

SHORT_S = 0.2  # a wait that is meant to run out
NO_CONTENT = b"HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"


@contextmanager
def playing(path: Path, script: Callable[[socket.socket], None]) -> Iterator[Api]:
    """A client of a server that plays `script` on its one connection; an assertion in the script fails the test."""
    failures: list[BaseException] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def play() -> None:
            try:
                connection, _ = listener.accept()
                with connection:
                    script(connection)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=play, daemon=True)
        thread.start()
        yield Api(path)
        thread.join(10)
    assert not thread.is_alive() and failures == []


def answer(*pieces: bytes) -> Callable[[socket.socket], None]:
    """Take a request and answer in pieces."""

    def script(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        for piece in pieces:
            connection.sendall(piece)

    return script


def test_a_request_is_as_it_is_described(tmp_path: Path) -> None:
    def script(connection: socket.socket) -> None:
        data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.split(b"\r\n")[0] == b"PUT /api/v1/vm.add-net HTTP/1.1"
        assert b"Content-Type: application/json" in head and b"Content-Length: %d" % len(body) in head
        assert body == b'{"id": "net"}'
        assert [os.readlink(f"/proc/self/fd/{fd}") for fd in fds] == ["/dev/null"]  # noqa: PTH115
        os.close(fds[0])
        connection.sendall(NO_CONTENT)

    with open("/dev/null") as device, playing(tmp_path / "api", script) as api:  # noqa: PTH123
        api.put("vm.add-net", {"id": "net"}, fds=[device.fileno()])


def test_a_request_without_a_body_has_no_length(tmp_path: Path) -> None:
    """micro-http takes a length of 0 for no body, but the API refuses a body where none belongs."""

    def script(connection: socket.socket) -> None:
        assert b"Content-" not in connection.recv(1 << 16)
        connection.sendall(NO_CONTENT)

    with playing(tmp_path / "api", script) as api:
        assert api.put("vm.boot") is None


def test_a_large_request_arrives_whole(tmp_path: Path) -> None:
    large = {"text": "x" * 1_000_000}

    def script(connection: socket.socket) -> None:
        data = b""
        while not data.endswith(b'x"}'):
            data += connection.recv(1 << 16)
        assert len(data) > 1_000_000
        connection.sendall(NO_CONTENT)

    with playing(tmp_path / "api", script) as api:
        api.put("vm.create", large)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_may_come_in_pieces(tmp_path: Path, size: int) -> None:
    whole = b'HTTP/1.1 200 \r\nContent-Type: application/json\r\ncontent-length: 20\r\n\r\n{"state": "Running"}'
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    with playing(tmp_path / "api", answer(*pieces)) as api:
        assert api.get("vm.info") == {"state": "Running"}


def test_a_success_without_content(tmp_path: Path) -> None:
    with playing(tmp_path / "api", answer(b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n")) as api:
        assert api.put("vmm.shutdown") is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'["Error from API", "The VM could not boot"]', "Error from API: The VM could not boot"),
        (b"Error from API", "Error from API"),  # versions before 48
        (b"", "HTTP status 500"),
    ],
)
def test_a_refusal_has_its_own_words(tmp_path: Path, body: bytes, words: str) -> None:
    said = b"HTTP/1.1 500 \r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with playing(tmp_path / "api", answer(said)) as api, pytest.raises(ApiError) as caught:
        api.put("vm.boot")
    assert caught.value.message == f"cloud-hypervisor refused `vm.boot`: {words}"
    assert caught.value.status == 500


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 \r\nContent-Length: 20\r\n\r\n{"], ids=["nothing", "head", "body"]
)
def test_one_that_ends_is_told(tmp_path: Path, said: bytes) -> None:
    with (
        playing(tmp_path / "api", answer(said)) as api,
        pytest.raises(ApiClosed, match=r"before it answered `vm\.info`"),
    ):
        api.get("vm.info")


@pytest.mark.parametrize(
    "said",
    [
        b"-ERR unknown\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\n{]}",
    ],
)
def test_what_is_not_its_api_is_told(tmp_path: Path, said: bytes) -> None:
    with playing(tmp_path / "api", answer(said)) as api, pytest.raises(NixboxError, match="not"):
        api.get("vm.info")


def test_one_that_is_silent_is_not_waited_for(tmp_path: Path) -> None:
    def script(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 2")
        assert connection.recv(1) == b""  # until the client gives up

    with playing(tmp_path / "api", script) as api, pytest.raises(ApiTimeout, match="did not answer") as caught:
        api.get("vm.info", timeout_s=SHORT_S)
    assert caught.value.exit_code is ExitCode.TIMEOUT


def test_where_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ApiClosed, match="No such file"):
        Api(tmp_path / "none").get("vm.info")
    with pytest.raises(ApiClosed, match="too long"):
        Api(tmp_path / ("n" * 110)).get("vm.info")
