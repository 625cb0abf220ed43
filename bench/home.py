"""A home of our own to measure in: a workspace, nixbox's commands in it, and nothing left of them afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NIXBOX = [sys.executable, "-m", "nixbox"]
MEMORY_MIB = 512
VCPUS = 2
CONFIG = f'name = "bench"\nmounts = []\n[resources]\nvcpus = {VCPUS}\nmemory = "{MEMORY_MIB}MiB"\ndisk = "2GiB"\n'
_END_S = 60.0
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Home:
    """Caches, Nix store, sockets and a workspace, all below one directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workspace = path / "bench"
        self.store = path / "store"
        self.cache = path / "cache"
        self._children: list[subprocess.Popen[str]] = []
        (self.workspace / ".nixbox").mkdir(parents=True, exist_ok=True)
        (self.workspace / ".nixbox" / "config.toml").write_text(CONFIG)
        (path / "run").mkdir(mode=0o700, exist_ok=True)
        for name in [name for name in os.environ if name.startswith(("XDG_", "NIXBOX_"))]:
            del os.environ[name]
        # Ours as well: what we use of nixbox as a library shall find the same places.
        os.environ["HOME"] = str(path)
        os.environ["XDG_RUNTIME_DIR"] = str(path / "run")
        os.environ["XDG_CACHE_HOME"] = str(self.cache)
        os.environ["NIX_REMOTE"] = str(self.store)

    def begin(self, argv: list[str]) -> subprocess.Popen[str]:
        """Start a program in the workspace; `finish` waits for it.

        In a process group of its own: Ctrl-C reaches us alone, and `end` hands it over, once.
        """
        child = subprocess.Popen(
            argv,
            cwd=self.workspace,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self._children.append(child)
        return child

    def finish(self, child: subprocess.Popen[str]) -> str:
        """Wait for a program; returns its stdout. Raises SystemExit when it fails."""
        out, err = child.communicate()
        self._children.remove(child)
        if child.returncode != 0:
            words = [word for word in child.args if isinstance(word, str)] if isinstance(child.args, list) else []
            raise SystemExit(f"{' '.join(words)}: {child.returncode}\n{err}")
        return out

    def call(self, argv: list[str]) -> str:
        """Run a program to its end; returns its stdout."""
        return self.finish(self.begin(argv))

    def nixbox(self, *args: str) -> str:
        """Run a nixbox command to its end; returns its stdout."""
        return self.call([*NIXBOX, *args])

    def up(self, how: str, *args: str) -> dict[str, Any]:
        """`nixbox up --json`, which must come about in this way (see session.Up)."""
        done: dict[str, Any] = json.loads(self.nixbox("up", "--json", *args))
        if done["how"] != how:
            raise SystemExit(f"the machine was to be {how}, but it {done['how']}: {done}")
        return done

    def status(self, name: str = "bench") -> dict[str, Any]:
        """`nixbox status --json` of a running machine."""
        found: dict[str, Any] = json.loads(self.nixbox("status", name, "--json"))
        return found

    def image(self) -> Path:
        """The image's store path; builds it if need be."""
        return Path(self.nixbox("build").strip())

    def forget_images(self) -> None:
        """Remove store and caches."""
        for directory in (self.store, self.cache):
            _remove(directory)

    def end(self) -> None:
        """End every program and every machine that was begun here, however it stands."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGINT)
        for child in self._children:
            try:
                child.communicate(timeout=_END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()
        self._children.clear()
        for machine in sorted((self.workspace / ".nixbox" / "machines").glob("*")):
            child = self.begin([*NIXBOX, "rm", "--yes", machine.name])
            with contextlib.suppress(SystemExit):  # what is left of it is ended below
                self.finish(child)
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> list[int]:
        """Processes that nixbox starts and whose command line names our directory."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                program, _, line = (process / "cmdline").read_bytes().partition(b"\0")
            except OSError:
                continue
            ours = os.fsencode(program).rpartition(b"/")[2] in (b"qemu-system-x86_64", b"ssh", b"setpriv")
            if ours and os.fsencode(f"{self.path}/") in line:
                found.append(int(process.name))
        return found


@contextmanager
def home(kept: Path | None) -> Iterator[Home]:
    """A home that is gone afterwards, also after Ctrl-C, SIGTERM and SIGHUP; `kept` is one that stays."""
    path = kept or Path(tempfile.mkdtemp(prefix="nbx"))
    # Not resolved, a path would not be found in a command line.
    opened = Home(path.resolve())
    previous = {sig: signal.signal(sig, _interrupt) for sig in _ENDING}
    try:
        yield opened
    finally:
        for sig in _ENDING:
            signal.signal(sig, signal.SIG_IGN)
        opened.end()
        if kept is None:
            _remove(path)
        for sig, handler in previous.items():
            signal.signal(sig, handler)


def _interrupt(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _remove(path: Path) -> None:
    if path.exists():
        subprocess.run(["chmod", "-R", "u+w", str(path)], check=False)  # a store's directories are read-only
        shutil.rmtree(path, ignore_errors=True)
