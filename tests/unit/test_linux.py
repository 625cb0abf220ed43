"""What a process asks of the kernel for itself."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import pytest

from nixbox import linux, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own calls")
HANG_S = 10.0


def descriptors(pid: int) -> tuple[int, set[str]]:
    """How many descriptors a process has room for, and those that it has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (size,) = (int(line.split()[1]) for line in lines if line.startswith("FDSize:"))
    return size, {path.name for path in Path(f"/proc/{pid}/fd").iterdir()}


@pytest.mark.parametrize("few", [False, True])
def test_room_for_descriptors_stays_when_a_program_is_executed(tmp_path: Path, few: bool) -> None:
    def inside() -> None:
        if few:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        linux.make_room()

    process = run.spawn(["sleep", "60"], log=tmp_path / "log", inside=inside)
    end = time.monotonic() + HANG_S
    try:
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.01)
        size, found = descriptors(process.pid)
        while len(found) > 3 and time.monotonic() < end:  # libraries may still be looked for
            time.sleep(0.01)
            size, found = descriptors(process.pid)
    finally:
        process.kill()
        process.wait()
    assert found == {"0", "1", "2"}
    assert (size >= 512) != few
