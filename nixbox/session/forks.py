"""Machines that are made of another one: of its memory and disk while it runs, else of its disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from nixbox.image import store
from nixbox.machine import saved, snapshot
from nixbox.machine.record import new_machine_id
from nixbox.network.watch import Watch
from nixbox.session import copies, stop
from nixbox.values import asdict, replace

if TYPE_CHECKING:
    from nixbox.machine.record import MachineDir
    from nixbox.session import Sandbox
    from nixbox.session.start import Start


def copy_disk(parent: MachineDir, boxes: Sequence[Sandbox]) -> None:
    """Make machines that have a copy of a stopped one's disk; each is still to be brought up."""
    old = parent.load()
    for box in boxes:
        with box.busy():
            box.machine.prepare()
            saved.copy(parent.overlay, box.machine.overlay)
            _copy_log(parent, box.machine)
            box.machine.save(
                replace(
                    old,
                    name=box.machine.name,
                    machine_id=new_machine_id(),
                    created_at=int(time.time()),
                    ready=False,
                )
            )


def fork_running(parent: Start, boxes: Sequence[Sandbox]) -> None:
    """Make machines that go on from a running one. One that does not come up is removed; those that did stay."""
    with ExitStack() as undo:
        for box in boxes:
            undo.enter_context(box.busy())
            undo.callback(_discard_unready, box.machine, parent)
        children = [_child(box, parent) for box in boxes]
        with copies.copied(parent, [child.machine for child in children]) as copy:
            begun = [undo.enter_context(copy.start(child)) for child in children]
        # All are told, then all are waited for: each has its own CPUs to be busy with.
        for restored in begun:
            restored.tell("fork")
        for restored in begun:
            restored.start.publish("forked", restored.ready())


def _child(box: Sandbox, parent: Start) -> Start:
    """A machine with all that is its own, to be started as a copy of a running one. Its disk is still to come."""
    machine = box.machine
    machine.prepare()
    _copy_log(parent.machine, machine)
    store.add_root(machine.image_root, parent.image.path)
    ident = new_machine_id()
    record = replace(
        parent.record,
        name=machine.name,
        machine_id=ident,
        created_at=int(time.time()),
        ready=False,
        env_hash=snapshot.env_hash(ident, parent.env),
        mounts=[asdict(replace(one, tag="")) for one in parent.record.shared],
    )
    machine.save(record)
    watch = Watch(parent.watch.policy)
    return replace(parent, machine=machine, record=record, phase=box.phase, report=box.report, watch=watch, ahead=[])


def _copy_log(parent: MachineDir, child: MachineDir) -> None:
    """The setup ran on the disk that it began with."""
    if parent.setup_log.exists():
        shutil.copyfile(parent.setup_log, child.setup_log)


def _discard_unready(machine: MachineDir, parent: Start) -> None:
    """A copy that did not come up is nobody's work."""
    record = machine.load_or_none()
    if record is None or not record.ready:
        stop.abandon(machine, parent.backend)
        machine.remove()
