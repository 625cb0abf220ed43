"""A machine's directories and its record, before a start: what the plan says, and what it keeps from before."""

from __future__ import annotations

import time

from nixbox.guest import ssh
from nixbox.machine import backends, overlay, record
from nixbox.session import mounts
from nixbox.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.image.build import Image
    from nixbox.machine.accelerator import Choice
    from nixbox.machine.record import MachineDir, Record
    from nixbox.mounts.places import Place
    from nixbox.plan.model import Plan
    from nixbox.report import Reporter


def prepare(
    machine: MachineDir,
    plan: Plan,
    image: Image,
    choice: Choice,
    places: list[Place],
    report: Reporter,
    *,
    ephemeral: bool,
) -> Record:
    """Make the directories; returns the record to start with, without the hash of an environment."""
    spec = plan.machine
    old = machine.load() if machine.exists() else None
    machine.prepare()
    disk_mib = spec.disk_mib
    if machine.overlay.exists():
        if old is None:
            # Its record is missing, but an overlay may hold somebody's work: it is never thrown away here.
            report.note("found an overlay disk without a record; keeping it")
        disk_mib = overlay.size_mib(machine.overlay)
        if spec.disk_mib > disk_mib:
            overlay.grow(machine.overlay, spec.disk_mib)
        elif spec.disk_mib < disk_mib and old is not None:
            report.note(f"note: the overlay disk stays at {disk_mib} MiB; a disk is never shrunk")
    if old is not None and old.image != str(image.path):
        report.note("the image has changed: the machine's own files stay on top of the new one")
    new = record.Record(
        name=machine.name,
        machine_id=old.machine_id if old else record.new_machine_id(),
        user=old.user if old else ssh.guest_user(),
        created_at=old.created_at if old else int(time.time()),
        image=str(image.path),
        backend=spec.backend,
        accelerator=choice.accelerator,
        vcpus=spec.vcpus,
        memory_mib=spec.memory_mib,
        disk_mib=max(spec.disk_mib, disk_mib),
        workspace=str(machine.workspace),
        ephemeral=ephemeral,
        return_memory=spec.return_memory,
        network=spec.network.as_json(),
        mounts=mounts.wanted(places, old),
    )
    plugs = backends.named(new.backend).features.hot_plug
    return replace(new, shares_memory=bool(new.mounts) and plugs)
