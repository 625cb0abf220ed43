"""What `status`, `list` and `logs` show: collected here, printed by the CLI."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from nixbox.errors import NixboxError
from nixbox.machine import snapshot, usage
from nixbox.machine.record import MachineDir, Record
from nixbox.machine.usage import Usage
from nixbox.plan.model import Shared
from nixbox.report import harmless
from nixbox.values import asdict, dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO


@dataclass(frozen=True, slots=True)
class MachineView:
    """One machine as it is now.

    `state`: `running`, `starting`, `stopped`, `suspended`, or what stopped it (`io-error`).

    `memory` is what it takes of the host's, in bytes: resident, of which shared and own (None: not known). `how` says
    how it came up (see session.Up), `snapshot` why a saved state of it could not be used, `mounts` which directories
    of the host it has.
    """

    name: str
    state: str
    workspace: str
    image: str
    backend: str
    accelerator: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    disk_used_bytes: int
    user: str
    network: str
    pid: int | None
    created_at: int
    started_at: int | None
    setup_done: bool
    how: str = ""
    memory: Usage | None = None
    snapshot: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return asdict(self)


def machine_view(machine: MachineDir) -> MachineView:
    """Look at one machine. Raises NotRunningError when there is none."""
    from nixbox.machine.overlay import allocated_bytes

    record = machine.load()
    alive = machine.alive()
    kept = None
    if not alive and machine.snapshot.exists():
        kept = snapshot.read(machine.snapshot)
    why = kept.invalidateReasons if kept is not None else ()
    down = "suspended" if kept is not None and not why else "stopped"
    return MachineView(
        name=record.name,
        state=_state(machine, record) if alive else down,
        workspace=str(machine.workspace),
        image=record.image,
        backend=record.backend,
        accelerator=record.accelerator,
        vcpus=record.vcpus,
        memory_mib=record.memory_mib,
        disk_mib=record.disk_mib,
        disk_used_bytes=allocated_bytes(machine.overlay) if machine.overlay.exists() else 0,
        user=record.user,
        network=str(record.network.get("mode", "")),
        pid=record.pid if alive else None,
        created_at=record.created_at,
        started_at=record.started_at if alive else None,
        setup_done=record.setup is not None,
        how=record.how if alive else "",
        memory=usage.of(record.pid) if alive and record.pid is not None else None,
        snapshot=why,
        mounts=tuple(_mount(machine, one, alive) for one in record.shared),
    )


def _mount(machine: MachineDir, one: Shared, alive: bool) -> str:
    """`~/workspace is /home/me/project (read-only)`, and what is wrong with it."""
    from nixbox.mounts import health

    words = f"{one.target} is {one.real}" + (" (read-only)" if one.readonly else "")
    trouble = health.trouble(machine.runtime, one) if alive else None
    return f"{words}: {trouble}; `nixbox up` mounts it again" if trouble else words


def machine_views(machines: list[MachineDir]) -> list[MachineView]:
    """Look at every machine; one whose record cannot be read is shown as `damaged`."""
    found = []
    for machine in machines:
        try:
            found.append(machine_view(machine))
        except NixboxError:
            nothing = (str(machine.workspace), "", "", "", 0, 0, 0, 0, "", "", None, 0, None, False)
            found.append(MachineView(machine.name, "damaged", *nothing))
    return found


def _state(machine: MachineDir, record: Record) -> str:
    if not record.ready:
        return "starting"
    from nixbox.machine import backends

    try:
        return backends.named(record.backend).status(machine.sockets)
    except NixboxError:
        # Somebody else is speaking to the monitor, or the VM is just ending: the lock says that it lives.
        return "running"


def size(count: int) -> str:
    """`1.5 GiB`, `12 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def duration(seconds: int) -> str:
    """`3 d 4 h`, `5 min`, `12 s`."""
    for unit, length, lower, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            return f"{seconds // length} {unit} {seconds % length // part} {lower}"
    return f"{seconds} s"


def show_log(path: Path, machine: MachineDir, *, follow: bool, out: TextIO) -> None:
    """Print a log; with `follow` go on until the machine stops or Ctrl-C."""
    safe = out.isatty()  # what a guest wrote must not drive the user's terminal
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            more = follow and machine.alive()  # asked before reading: a machine's last words are not lost
            text = file.read()
            if text:
                out.write(harmless(text.replace("\r", ""), "\n\t") if safe else text)
                out.flush()
            elif not more:
                return
            else:
                time.sleep(0.2)  # a plain file has no event to wait for that every host knows


def print_rows(rows: list[list[str]], header: list[str]) -> None:
    """A plain table on stdout."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")
