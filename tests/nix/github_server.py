"""A stand-in for github.com, codeload.github.com and api.github.com, as far as nixbox asks them.

Run in a network namespace of the test's own: `github_server.py DIRECTORY`, with cert.pem and key.pem there and bare
repositories in repos/OWNER/REPO.git. `mode` there says how to misbehave; each request is a JSON line in `log`.
"""

from __future__ import annotations

import io
import json
import os
import re
import ssl
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

DIRECTORY = Path(sys.argv[1])
LOCK = threading.Lock()
BACKEND = subprocess.run(["git", "--exec-path"], capture_output=True, text=True, check=True).stdout.strip()


def git(repository: Path, *argv: str) -> bytes | None:
    done = subprocess.run(["git", "-C", str(repository), *argv], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def mode() -> str:
    return (DIRECTORY / "mode").read_text()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        host, url = self.headers["Host"], urlsplit(self.path)
        with LOCK, (DIRECTORY / "log").open("a") as log:
            log.write(json.dumps([host, self.command, self.path]) + "\n")
        if mode() == "limit":
            self.answer(429, b"too many requests\n")
            return
        if mode() == "broken":
            self.answer(502, b"unicorn\n")
            return
        place = re.fullmatch(r"(?:/repos)?/([^/]+)/([^/]+?)(?:\.git)?/(.*)", url.path)
        repository = DIRECTORY / "repos" / place[1] / f"{place[2]}.git" if place else DIRECTORY / "none"
        what = place[3] if place else ""
        if host == "github.com" and what in ("info/refs", "git-upload-pack"):
            self.smart(repository, url.path, url.query)
        elif host == "github.com" and (found := re.fullmatch(r"archive/(.*)\.tar\.gz", what)) and place:
            # GitHub looks the commit up before it sends on.
            if git(repository, "cat-file", "-e", f"{found[1]}^{{commit}}") is None:
                self.answer(404, b"Not Found")
            else:
                self.answer(302, Location=f"https://codeload.github.com/{place[1]}/{place[2]}/tar.gz/{found[1]}")
        elif host == "codeload.github.com" and (found := re.fullmatch(r"tar\.gz/(.*)", what)) and place:
            self.archive(repository, place[2], found[1])
        elif host == "api.github.com" and (found := re.fullmatch(r"commits/(.*)", what)):
            date = git(repository, "log", "-1", "--format=%cd", "--date=format-local:%Y-%m-%dT%H:%M:%SZ", found[1])
            if date is None or mode() == "no-api":
                self.answer(403, b'{"message": "API rate limit exceeded"}', Content_Type="application/json")
            else:
                body = {"sha": found[1], "commit": {"committer": {"date": date.decode().strip()}}}
                self.answer(200, json.dumps(body).encode(), Content_Type="application/json; charset=utf-8")
        else:
            self.answer(404, b"Not Found")

    def archive(self, repository: Path, name: str, rev: str) -> None:
        if mode() == "stall":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"\x1f\x8b")
            self.wfile.flush()
            threading.Event().wait(60)
            return
        data = git(repository, "archive", "--format=tar.gz", f"--prefix={name}-{rev}/", rev)
        if data is not None and mode() == "other-bits":
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w:gz") as tar:
                entry = tarfile.TarInfo(f"{name}-{rev}/plugin.toml")
                entry.size = 5
                tar.addfile(entry, io.BytesIO(b"evil\n"))
            data = packed.getvalue()
        self.answer(404 if data is None else 200, data or b"", Content_Type="application/x-gzip")

    def smart(self, repository: Path, path: str, query: str) -> None:
        if not repository.is_dir():
            # Whether it is missing or private is not told.
            self.answer(401, b"Repository not found.", WWW_Authenticate='Basic realm="GitHub"')
            return
        env = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(DIRECTORY / "repos"),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REMOTE_ADDR": "127.0.0.1",
        }
        sent = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        argv = [f"{BACKEND}/git-http-backend"]
        done = subprocess.run(argv, input=sent, env=env, capture_output=True, check=True).stdout
        head, _, body = done.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.answer(int(headers.pop("Status", "200").split()[0]), body, **headers)


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 443), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(DIRECTORY / "cert.pem", DIRECTORY / "key.pem")
    # The handshake is each connection's own affair: one that refuses our certificate must not end the server.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
