"""A stand-in for GitHub in namespaces of its own, and workspaces that reach it: for tests of what is pinned there."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TOOLS = ("git", "ip", "nix-prefetch-url", "nix-store", "nsenter", "openssl", "unshare")
HANG_S = 60.0
HERE = Path(__file__).parent / "nix"
NAMES = ("github.com", "api.github.com", "codeload.github.com")
DAY = "2026-07-04"
# What a command line or the session does, and a JSON line of what came out.
DRIVER = """
import json, os, sys
from pathlib import Path
from nixbox.errors import NixboxError
from nixbox.image import pins
from nixbox.report import Reporter

class Notes(Reporter):
    def __init__(self):
        self.notes = []
    def note(self, text):
        self.notes.append(text)

notes, (call, refs, options) = Notes(), json.loads(sys.argv[1])
workspace, said = Path.cwd(), {}
try:
    if call == "ensure":
        said["places"] = {ref: str(place) for ref, place in pins.ensure(workspace, refs, notes, **options).items()}
    elif call == "present":
        said["places"] = {ref: str(place) for ref, place in pins.present(workspace, refs).items()}
    else:
        said["changes"] = [str(change) for change in pins.update(workspace, refs, notes, **options)]
except NixboxError as error:
    said |= {"error": error.message, "hint": error.hint, "code": int(error.exit_code)}
print(json.dumps(said | {"notes": notes.notes}))
"""


def run(argv: Sequence[str | Path], env: Mapping[str, str] | None = None, **options: Any) -> str:
    done = subprocess.run(
        [str(word) for word in argv],
        env=None if env is None else dict(env),
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
        **({"stdin": subprocess.DEVNULL} | options),
    )
    assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# --- the stand-in ----------------------------------------------------------------------------------------


def certificates(directory: Path) -> None:
    """A CA that signs for GitHub's names, and one that signs nothing of it."""
    curve: list[str | Path] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    for name in ("ca", "other"):
        ca: list[str | Path] = [
            "-keyout",
            directory / f"{name}.key",
            "-out",
            directory / f"{name}.pem",
            "-subj",
            f"/CN={name}",
        ]
        run(["openssl", "req", "-x509", *curve, *ca])
    request: list[str | Path] = [
        "-keyout",
        directory / "key.pem",
        "-out",
        directory / "request.pem",
        "-subj",
        "/CN=github.com",
    ]
    run(["openssl", "req", *curve[:-2], *request])
    extensions = directory / "extensions"
    extensions.write_text("subjectAltName=" + ",".join(f"DNS:{name}" for name in NAMES))
    signed: list[str | Path] = [
        "-CA",
        directory / "ca.pem",
        "-CAkey",
        directory / "ca.key",
        "-CAcreateserial",
        "-days",
        "2",
    ]
    argv = ["openssl", "x509", "-req", "-in", directory / "request.pem", *signed]
    run([*argv, "-extfile", extensions, "-out", directory / "cert.pem"])


class Repository:
    """A repository on the stand-in, written in a clone of its own."""

    def __init__(self, world: World, owner: str, name: str = "tools") -> None:
        self.bare = world.directory / "repos" / owner / f"{name}.git"
        self.clone = world.directory / "clones" / owner / name
        self.clone.mkdir(parents=True)
        self.env = {**world.env, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
        for who in ("AUTHOR", "COMMITTER"):
            self.env |= {
                f"GIT_{who}_NAME": "x",
                f"GIT_{who}_EMAIL": "x@x.example",
                f"GIT_{who}_DATE": f"{DAY}T12:00Z",
            }
        run(["git", "init", "--quiet", "--bare", "--initial-branch=trunk", self.bare], self.env)
        self("init", "--quiet", "--initial-branch=trunk")
        self("remote", "add", "origin", str(self.bare))

    def __call__(self, *words: str) -> str:
        return run(["git", "-C", self.clone, *words], self.env).strip()

    def commit(self, text: str, *ref: str, subdir: str = "", more: str = "") -> str:
        """A commit with a plugin that says `text`, pushed to `ref` (default: trunk); returns its name."""
        place = self.clone / subdir
        (place / "commands").mkdir(parents=True, exist_ok=True)
        (place / "plugin.toml").write_text(f'description = "{text}"\n{more}')
        (place / "commands/hello").write_text("#!/bin/sh\necho hello\n")
        (place / "commands/hello").chmod(0o755)
        self("add", "--all")
        self("commit", "--quiet", "--allow-empty", "--message", text)
        self("push", "--quiet", "--force", "origin", *(f"HEAD:{name}" for name in ref or ("refs/heads/trunk",)))
        return self("rev-parse", "HEAD")

    def nar_hash(self, rev: str, directory: Path) -> str:
        """What fetchFromGitHub would be given for a commit: of git's own files, by Nix's own archive of them."""
        tree = directory / f"tree-{rev}"
        tree.mkdir()
        archive = subprocess.run(["git", "-C", self.clone, "archive", rev], capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
        nar = subprocess.run(["nix-store", "--dump", tree], capture_output=True, check=True).stdout
        return "sha256-" + base64.b64encode(hashlib.sha256(nar).digest()).decode()


class World:
    """Namespaces in which GitHub is this machine; nothing in them reaches any other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "nix").mkdir()
        (directory / "nix/nix.conf").write_text("build-users-group =\nsubstituters =\n")
        (directory / "hosts").write_text(f"127.0.0.1 localhost {' '.join(NAMES)}\n")
        self.log = directory / "log"
        self.log.touch()
        self.mode("")
        certificates(directory)
        prefixes = ("XDG_", "NIX", "GIT_", "GITHUB_")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
        self.env = {name: value for name, value in self.env.items() if not name.lower().endswith("_proxy")}
        ca = str(directory / "ca.pem")
        self.env |= dict.fromkeys(("SSL_CERT_FILE", "NIX_SSL_CERT_FILE", "GIT_SSL_CAINFO"), ca)
        self.env |= {"NIX_CONF_DIR": str(directory / "nix"), "PYTHONDONTWRITEBYTECODE": "1"}
        self.env |= {"HOME": str(directory / "home"), "PYTHONPATH": str(HERE.parents[1])}
        (directory / "home").mkdir()
        self.root = os.geteuid() == 0
        hosts = 'mount --bind "$0" /etc/hosts && ip link set lo up && exec "$@"'
        server = [sys.executable, "-I", "-S", str(HERE / "github_server.py"), str(directory)]
        argv = [*self.unshare(), "--mount", "sh", "-c", hosts, str(directory / "hosts"), *server]
        self.server = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.env, text=True, cwd="/"
        )
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "ready\n"

    def unshare(self) -> list[str]:
        return ["unshare", *([] if self.root else ["--user", "--map-root-user"]), "--net"]

    def enter(self, workspace: Path) -> list[str]:
        user = [] if self.root else ["--user", "--preserve-credentials"]
        return [
            shutil.which("nsenter") or "nsenter",
            f"--target={self.server.pid}",
            *user,
            "--net",
            "--mount",
            f"--wd={workspace}",
            "--",
        ]

    def mode(self, text: str) -> None:
        (self.directory / "mode").write_text(text)

    def asked(self) -> list[tuple[str, str, str]]:
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()]

    def end(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        try:
            self.server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()
        self.server.stdout.close()


def make_world() -> Iterator[World]:
    """The server, or a skip that says what it lacks."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} on this host")
    flags = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    probe = subprocess.run(["unshare", *flags, "--net", "--mount", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"this host makes no namespaces: {probe.stderr.decode().strip()}")
    directory = Path(tempfile.mkdtemp(prefix="nbgh"))
    directory.chmod(0o755)  # an ordinary user comes in, too
    made = None
    try:
        made = World(directory)
        yield made
    finally:
        if made is not None:
            made.end()
        run(["chmod", "-R", "u+w", directory])
        shutil.rmtree(directory)


@dataclass
class Workspace:
    """A workspace with a store of its own, and nixbox in it."""

    world: World
    path: Path
    env: dict[str, str]
    owner: str
    prefix: list[str] = field(default_factory=list)
    program: str = sys.executable

    def start(
        self, argv: Sequence[str], *, offline: bool = False, environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        into = [*self.world.unshare(), "--"] if offline else self.world.enter(self.path)
        return subprocess.Popen(
            [*into, *self.prefix, self.program, *argv],
            cwd=self.path,
            env=self.env | dict(environ or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def python(
        self, *argv: str, code: int = 0, offline: bool = False, environ: Mapping[str, str] | None = None
    ) -> tuple[str, str]:
        process = self.start(argv, offline=offline, environ=environ)
        try:
            out, err = process.communicate(timeout=HANG_S)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        assert process.returncode == code, f"{argv}: {process.returncode}\n{out}\n{err}"
        return out, err

    def call(self, what: str, refs: Sequence[str], environ: Mapping[str, str] | None = None, **options: Any) -> Any:
        offline = options.pop("offline", False)
        argument = json.dumps([what, list(refs), options])
        out, err = self.python("-c", DRIVER, argument, offline=offline, environ=environ)
        assert err == "", err
        return json.loads(out)

    def ensure(self, *refs: str, **options: Any) -> dict[str, Path]:
        said = self.call("ensure", refs, **options)
        assert "error" not in said, said
        return {ref: Path(place) for ref, place in said["places"].items()}

    def refused(self, *refs: str, what: str = "ensure", **options: Any) -> tuple[str, int]:
        """The error and the hint, and the exit code; nothing was recorded."""
        before = self.lock.read_bytes() if self.lock.exists() else None
        said = self.call(what, refs, **options)
        assert "error" in said, said
        assert (self.lock.read_bytes() if self.lock.exists() else None) == before
        return f"{said['error']}\n{said['hint']}", said["code"]

    def update(self, *refs: str, **options: Any) -> list[str]:
        said = self.call("update", refs, **options)
        assert "error" not in said, said
        changes: list[str] = said["changes"]
        return changes

    @property
    def lock(self) -> Path:
        return self.path / ".nixbox/nixbox.lock"

    def rows(self) -> dict[str, dict[str, str]]:
        return {row["ref"]: row for row in json.loads(self.lock.read_text())["plugins"]}

    def asked(self) -> list[tuple[str, str]]:
        """The hosts and paths that were asked of this workspace's owner."""
        return [(host, path) for host, _, path in self.world.asked() if f"/{self.owner}/" in path]

    def fresh_store(self) -> None:
        """A store and a cache in which nothing is."""
        number = len(list(self.path.parent.glob("store*")))
        self.env |= {"NIX_REMOTE": str(self.path.parent / f"store{number}")}
        self.env |= {"XDG_CACHE_HOME": str(self.path.parent / f"cache{number}")}

    def store_paths(self) -> set[str]:
        return {path.name for path in Path(self.env["NIX_REMOTE"], "nix/store").glob("*-*")}


def make_box(world: World) -> Iterator[Workspace]:
    """A workspace whose owner on GitHub is its own, with an empty store."""
    world.mode("")
    directory = Path(tempfile.mkdtemp(prefix="b", dir=world.directory))
    (directory / "work/.nixbox").mkdir(parents=True)
    made = Workspace(world, directory / "work", dict(world.env), "own-" + directory.name.replace("_", "-").lower())
    made.fresh_store()
    yield made
    world.mode("")
    run(["chmod", "-R", "u+w", directory])
    shutil.rmtree(directory)


def make_repository(box: Workspace) -> Repository:
    """An empty repository of the workspace's owner."""
    return Repository(box.world, box.owner)
