"""Seeding beside what else could copy the same: `ssh cat` of as many bytes, `scp -r` and `rsync -a`."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.home import CONFIG, Home

FILES = 20_000
SMALL_BYTES = 4000  # on average
LARGE_MB = 200
_CONFIG = CONFIG.replace("mounts = []\n", 'packages = ["rsync"]\nmounts = []\n')


@dataclass(frozen=True, slots=True)
class Place:
    """A running machine, and what is to be copied to it."""

    home: Home
    small: Path
    large: Path

    def _ssh(self, file: str) -> list[str]:
        return ["ssh", "-F", str(self.home.workspace / ".nixbox" / "machines" / "bench" / "ssh" / file)]

    def guest(self, command: str) -> None:
        """Run a shell line in the guest."""
        self.home.call([*self._ssh("exec"), "bench", command])

    def _timed(self, argv: list[str], source: Path | None = None, most_s: float | None = None) -> float:
        """Seconds that a command takes; what it brought, in ~/t, is gone afterwards."""
        begun = time.perf_counter()
        with (source or Path("/dev/null")).open("rb") as stdin:
            subprocess.run(
                argv, stdin=stdin, stdout=subprocess.DEVNULL, check=True, cwd=self.home.workspace, timeout=most_s
            )
        seconds = time.perf_counter() - begun
        self._clean()
        return seconds

    def _clean(self) -> None:
        self.guest("rm -rf t .local; mkdir t; sync")

    def raw(self, sync: bool) -> float:
        """The large file through nixbox's own connection, into a file."""
        return self._timed([*self._ssh("exec"), "bench", "cat >t/large" + ("; sync" if sync else "")], self.large)

    def seed(self, source: Path) -> float:
        """A seed, from the first look to the sentinel."""
        from nixbox.guest import seed
        from nixbox.machine.record import MachineDir
        from nixbox.report import Reporter
        from nixbox.session import stop

        begun = time.perf_counter()
        endpoint = stop.reached(MachineDir(self.home.workspace, "bench"))
        seed.seed(endpoint, seed.Wanted(source, "~/t/copy"), report=Reporter())
        seconds = time.perf_counter() - begun
        self._clean()
        return seconds

    def pending(self, rounds: int) -> list[float]:
        """The question that every `up` asks, once the seed is done."""
        from nixbox.guest import seed
        from nixbox.machine.record import MachineDir
        from nixbox.report import Reporter
        from nixbox.session import stop

        endpoint = stop.endpoint(MachineDir(self.home.workspace, "bench"))
        wanted = seed.Wanted(self.large, "~/t/copy")
        seed.seed(endpoint, wanted, report=Reporter())
        found = []
        for _ in range(rounds):
            begun = time.perf_counter()
            if seed.pending(endpoint, [wanted]) != [False]:
                raise SystemExit("the seed is not done")
            found.append(time.perf_counter() - begun)
        self._clean()
        return found

    def scp(self, most_s: float) -> float | None:
        """The small files by scp, as a user would call it; None when it takes longer than that."""
        config = self._ssh("config")[2]
        try:
            return self._timed(["scp", "-q", "-F", config, "-r", str(self.small), "bench:t/copy"], most_s=most_s)
        except subprocess.TimeoutExpired:
            self._clean()
            return None

    def rsync(self, file: str) -> float:
        """The small files by rsync, over OpenSSH (`config`), or over nixbox's own connection (`exec`)."""
        shell = " ".join(self._ssh(file))
        return self._timed(["rsync", "-a", "-e", shell, f"{self.small}/", "bench:t/copy/"])


def have_rsync() -> bool:
    """Whether this host has it."""
    return shutil.which("rsync") is not None


@contextmanager
def machine(home: Home) -> Iterator[Place]:
    """A machine with rsync in it, and trees like a package cache's: nothing in them can be compressed."""
    config = home.workspace / ".nixbox" / "config.toml"
    config.write_text(_CONFIG)
    place = Place(home, home.path / "small", home.path / "large")
    rng = random.Random(1)
    for i in range(FILES):
        directory = place.small / f"org-{i // 1000}" / f"module-{i // 20}"
        if i % 20 == 0:
            directory.mkdir(parents=True)
        (directory / f"{i}.jar").write_bytes(rng.randbytes(rng.randrange(2 * SMALL_BYTES)))
    with place.large.open("wb") as file:
        for _ in range(LARGE_MB):
            file.write(rng.randbytes(1_000_000))
    try:
        home.nixbox("up")
        home.nixbox("run", "--", "true")  # the shared connection stands by then
        place._clean()
        yield place
        home.nixbox("rm", "--yes", "bench")
    finally:
        config.write_text(CONFIG)
        shutil.rmtree(place.small)
        place.large.unlink()
