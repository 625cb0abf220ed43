"""A mounted directory of the host, beside the guest's own disk: many small files, and one large one."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.home import CONFIG, Home

FILES = 5000
LARGE_MB = 200
_SMALL_BYTES = 1000

# In the directory $1: nanoseconds to unpack FILES small files, to write a large one to the host's disk, and to read
# it with nothing of it in the guest's memory.
SCRIPT = f"""
set -e
cd "$1"
rm -rf bench-files bench-large
sudo sh -c 'sync; echo 3 >/proc/sys/vm/drop_caches'
now() {{ date +%s%N; }}
a=$(now); mkdir bench-files; tar -xf /var/tmp/bench.tar -C bench-files; b=$(now)
c=$(now); dd if=/dev/zero of=bench-large bs=1M count={LARGE_MB} conv=fsync status=none; d=$(now)
sudo sh -c 'sync; echo 3 >/proc/sys/vm/drop_caches'
e=$(now); dd if=bench-large of=/dev/null bs=1M status=none; f=$(now)
rm -rf bench-files bench-large
echo $((b - a)) $((d - c)) $((f - e))
"""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds."""

    untar: float
    write: float
    read: float


@contextmanager
def machine(home: Home) -> Iterator[None]:
    """A machine with the workspace mounted at ~/workspace and the archive on its own disk."""
    config = home.workspace / ".nixbox" / "config.toml"
    config.write_text(mounting())
    archive = home.workspace / "bench.tar"
    with tarfile.open(archive, "w") as tar:
        for i in range(FILES):
            member = tarfile.TarInfo(f"{i % 50}/{i}")
            member.size = _SMALL_BYTES
            tar.addfile(member, io.BytesIO(bytes([i % 251]) * _SMALL_BYTES))
    try:
        home.nixbox("up")
        home.nixbox(
            "run", "--", "sudo", "sh", "-c", "cp ~nixbox/workspace/bench.tar /var/tmp/ && chmod 644 /var/tmp/*.tar"
        )
        yield
        home.nixbox("rm", "--yes", "bench")
    finally:
        config.write_text(CONFIG)
        archive.unlink()


def mounting() -> str:
    """The config with the default mount instead of none."""
    return CONFIG.replace("mounts = []\n", 'mounts = [{ source = ".", target = "~/workspace" }]\n')


def measure(home: Home, where: str) -> Times:
    """One round in a directory of the guest."""
    out = home.nixbox("run", "--no-tty", "--", "bash", "-c", SCRIPT, "sh", where)
    return Times(*(int(word) / 1e9 for word in out.split()))
