"""A client for cloud-hypervisor's REST API on a unix socket (vmm/src/api/openapi/ in its source).

One connection a request. Written out because descriptors travel beside a request's bytes, which `http.client` cannot
send; the server's side of HTTP is as small as this (micro-http, Firecracker's): a status line, headers, and a body as
long as `Content-Length` says, or none.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nixbox.errors import NixboxError, TimeoutExpired

TIMEOUT_S = 10.0
_LONGEST = 16 << 20  # bytes of an answer; `vm.info`, the largest, has some 10 kB
_CHUNK = 1 << 16


class ApiError(NixboxError):
    """cloud-hypervisor refused a request; `status` is HTTP's, `words` its own."""

    def __init__(self, what: str, status: int, words: str) -> None:
        super().__init__(f"cloud-hypervisor refused `{what}`: {words or f'HTTP status {status}'}")
        self.status = status
        self.words = words


class ApiClosed(NixboxError):
    """Nobody is at the other end: cloud-hypervisor ended, or never listened there."""


class ApiTimeout(TimeoutExpired):
    """cloud-hypervisor did not answer in time."""


class Api:
    """The API of the cloud-hypervisor that listens at a unix socket."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, what: str, *, timeout_s: float = TIMEOUT_S) -> Any:
        """Ask for `vm.info` and the like. Raises ApiError, ApiClosed, ApiTimeout."""
        return self._request("GET", what, None, (), timeout_s)

    def put(
        self,
        what: str,
        body: dict[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float = TIMEOUT_S,
    ) -> Any:
        """Do `vm.boot` and the like; returns what is answered, None for most. `fds` travel along and stay open here.

        Raises ApiError, ApiClosed, ApiTimeout.
        """
        return self._request("PUT", what, body, fds, timeout_s)

    def _request(
        self, method: str, what: str, body: dict[str, Any] | None, fds: Sequence[int], timeout_s: float
    ) -> Any:
        content = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} /api/v1/{what} HTTP/1.1", "Host: localhost", "Accept: application/json"]
        if content:
            head += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        request = "\r\n".join((*head, "", "")).encode() + content
        deadline = time.monotonic() + timeout_s
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(timeout_s)
                sock.connect(str(self.path))
                rest = request[socket.send_fds(sock, [request], list(fds)) :]
                if rest:
                    sock.sendall(rest)
                status, answer = _answer(sock, what, deadline)
        except TimeoutError:
            raise ApiTimeout(f"cloud-hypervisor did not answer `{what}` within {timeout_s:g} s") from None
        except OSError as error:
            raise ApiClosed(
                f"cloud-hypervisor does not answer at {self.path}: {error.strerror or error}",
                hint="`nixbox logs` shows what it said last",
            ) from None
        if status >= 400:
            raise ApiError(what, status, _words(answer))
        if not answer:
            return None
        try:
            return json.loads(answer)
        except ValueError:
            raise NixboxError(f"cloud-hypervisor answered `{what}` with what is not JSON: {answer[:200]!r}") from None


def _answer(sock: socket.socket, what: str, deadline: float) -> tuple[int, bytes]:
    """The status and the body of an answer. Raises OSError, TimeoutError, ApiClosed, NixboxError."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(sock, what, deadline, len(data))
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode(errors="replace").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    try:
        status = int(first.split()[1])
        length = int(headers.get("content-length", "0"))
    except (ValueError, IndexError):
        raise NixboxError(f"what listens there is not cloud-hypervisor: it said {first!r:.200}") from None
    while len(body) < length:
        body += _more(sock, what, deadline, len(body))
    return status, body[:length]


def _more(sock: socket.socket, what: str, deadline: float, so_far: int) -> bytes:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    if so_far > _LONGEST:
        raise NixboxError(f"cloud-hypervisor's answer to `{what}` is longer than {_LONGEST} bytes")
    sock.settimeout(left)
    if data := sock.recv(_CHUNK):
        return data
    raise ApiClosed(f"cloud-hypervisor ended before it answered `{what}`", hint="`nixbox logs` shows its last words")


def _words(answer: bytes) -> str:
    """An error's text: newer versions send the chain of causes as a list of strings, older ones just text."""
    try:
        said = json.loads(answer)
    except ValueError:
        said = answer.decode(errors="replace").strip()
    return ": ".join(map(str, said)) if isinstance(said, list) else str(said)
