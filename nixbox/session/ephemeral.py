"""Machines that last for one command."""

from __future__ import annotations

import os
from pathlib import Path

from nixbox import paths
from nixbox.machine.record import MachineDir


def name() -> str:
    """A name for a machine that lasts for one command."""
    return f"run-{os.urandom(4).hex()}"


def sweep(workspace: Path) -> None:
    """Remove what ephemeral machines have left whose command was killed."""
    machines = workspace / paths.CONFIG_DIR / "machines"
    for path in machines.glob("run-" + "[0-9a-f]" * 8):
        machine = MachineDir(workspace, path.name)
        record = machine.load_or_none()
        if (record.ephemeral if record is not None else not machine.exists()) and not machine.alive():
            machine.remove_if_idle()
