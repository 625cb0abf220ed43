"""How much of the host's memory a VM takes (Linux: /proc/PID/smaps_rollup; proc(5))."""

from __future__ import annotations

from pathlib import Path

from nixbox.values import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes. `resident` is what the process sees; `shared` the part of it that other processes, or the page cache
    behind a template, see as well; `own` what would become free if it ended.
    """

    resident: int
    shared: int
    own: int


def of(pid: int) -> Usage | None:
    """The usage of a process, or None where it cannot be seen: gone, somebody else's, or not on Linux."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    # Clean pages that are private to this process may still be the page cache's: a template's that only one maps.
    own = kib["Private_Dirty"] + kib.get("Private_Hugetlb", 0)
    return Usage(kib["Rss"] << 10, (kib["Rss"] - own) << 10, own << 10)
