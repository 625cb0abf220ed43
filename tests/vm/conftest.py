"""Real machines, through the command line as a user types it. One lock and one image serve the whole session."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.vm.world import World

UP_TIMEOUT_S = 400
# Little memory: several guests may run at once on a small CI machine.
RESOURCES = '[resources]\nvcpus = 1\nmemory = "320MiB"\ndisk = "1GiB"\n'


def processes(*words: bytes) -> list[int]:
    """The processes whose command line holds every one of `words`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(int(process.name))
    return found


def held_by(pid: int) -> list[str]:
    """What a process has open, by path; nothing of one that has ended."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(str(fd.readlink()))
    return found


@dataclass
class Workspace:
    """A workspace of the test's own and the command line in it."""

    path: Path
    env: Mapping[str, str]
    prefix: Sequence[str] = ()
    extra: dict[str, str] = field(default_factory=dict)

    def start(self, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a nixbox command, its streams piped."""
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "nixbox", *args],
            cwd=self.path,
            env=dict(self.env) | self.extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def __call__(
        self, *args: str, code: int | None = 0, stdin: bytes | None = None, timeout_s: float = UP_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a nixbox command to its end and check its exit code (None: any)."""
        process = self.start(*args, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE)
        try:
            out, err = process.communicate(stdin, timeout=timeout_s)
        except BaseException:
            process.kill()
            process.wait()
            raise
        done = subprocess.CompletedProcess(args, process.returncode, out.decode(errors="replace"), err.decode())
        if code is not None:
            assert done.returncode == code, f"nixbox {args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def guest(self, script: str, **options: Any) -> str:
        """Run a shell script in the guest and return what it printed."""
        return self("run", "--no-tty", "--", "sh", "-euc", script, **options).stdout

    def config(self, text: str, profile: str | None = None) -> None:
        """Write config.toml (and a profile `dev`)."""
        directory = self.path / ".nixbox"
        (directory / "profiles").mkdir(parents=True, exist_ok=True)
        (directory / "config.toml").write_text(text)
        if profile is not None:
            (directory / "profiles" / "dev.toml").write_text(profile)

    def status(self) -> dict[str, Any]:
        """`nixbox status --json`."""
        found: dict[str, Any] = json.loads(self("status", "--json", code=None).stdout)
        return found

    def machine(self, name: str = "box") -> Path:
        """The machine's directory on the host."""
        return self.path / ".nixbox" / "machines" / name

    def of_session(self, *words: bytes) -> list[int]:
        """The processes with such a command line that stand beside this session's machines: they hold locks of
        theirs, which need not be there any more.
        """
        runtime = f"{self.env['XDG_RUNTIME_DIR']}/"
        return [pid for pid in processes(*words) if any(held.startswith(runtime) for held in held_by(pid))]

    def vm_pids(self) -> list[int]:
        """The VM processes of this workspace: those whose command line names it."""
        return processes(b"qemu-system", os.fsencode(self.path))


@dataclass(frozen=True)
class Home:
    """The session's own home: caches, runtime directory, and the shared lock."""

    path: Path
    env: Mapping[str, str]
    lock: str


def make_home() -> Iterator[Home]:
    """A clean home, and a lock of the base image that every workspace of the session starts from."""
    # Not pytest's tmp_path: unix sockets need short paths.
    path = Path(tempfile.mkdtemp(prefix="nbx"))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "NIXBOX_"))}
    env |= {"HOME": str(path), "XDG_RUNTIME_DIR": str(path / "run"), "PYTHONDONTWRITEBYTECODE": "1"}
    (path / "run").mkdir(mode=0o700)
    # As under any test runner: no terminal, no locale surprises.
    env |= {"LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    first = Workspace(path / "first", env)
    first.path.mkdir()
    # With the kernel for libkrun, where there is one: every hypervisor then runs machines of the one image.
    backend = '[machine]\nbackend = "krun"\n' if platform.machine() == "x86_64" else ""
    first.config(f'name = "box"\nmounts = []\n{RESOURCES}{backend}')
    first("lock")
    first("build")
    try:
        yield Home(path, env, (first.path / ".nixbox" / "nixbox.lock").read_text())
    finally:
        # A private store (ordinary users) is read-only and large: Nix's own permissions must go first.
        subprocess.run(["chmod", "-R", "u+w", str(path)], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(path)


@pytest.fixture
def workspace(home: Home) -> Iterator[Workspace]:
    """A fresh workspace `box` on the shared image; its machines are ended and checked to be gone."""
    path = Path(tempfile.mkdtemp(prefix="w", dir=home.path))
    box = Workspace(path, home.env)
    box.config(f'name = "box"\nmounts = []\n{RESOURCES}')
    (path / ".nixbox" / "nixbox.lock").write_text(home.lock)
    before = _runtime(box)
    yield box
    _end(box)
    assert _runtime(box) <= before, "sockets were left behind"


@pytest.fixture(scope="module")
def running(home: Home) -> Iterator[Workspace]:
    """One machine that is up for all tests of a module that only use it."""
    path = Path(tempfile.mkdtemp(prefix="w", dir=home.path))
    box = Workspace(path, home.env)
    box.config(f'name = "box"\nmounts = []\n{RESOURCES}')
    (path / ".nixbox" / "nixbox.lock").write_text(home.lock)
    box("up")
    yield box
    _end(box)


@pytest.fixture(scope="module")
def net() -> Iterator[World]:
    """A small Internet of namespaces, with hosts that are allowed and hosts that are not."""
    with tempfile.TemporaryDirectory(prefix="nbw") as directory:
        made = World(Path(directory))
        try:
            yield made
        finally:
            made.end()


def _runtime(box: Workspace) -> set[str]:
    """The runtime directories of the session's machines."""
    return {entry.name for entry in (Path(box.env["XDG_RUNTIME_DIR"])).glob("nixbox/*")}


def _end(box: Workspace) -> None:
    """Stop what a test left running, then insist that nothing is left."""
    for machine in sorted((box.path / ".nixbox" / "machines").glob("*")):
        if (machine / "machine.json").exists():
            box("rm", "--yes", machine.name)
    left = box.vm_pids()
    for pid in left:
        os.kill(pid, 9)
    assert not left, f"the test left VM processes behind: {left}"
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(box.path) in line]
    assert not mounts, mounts
    shutil.rmtree(box.path)
