"""How a VM ends: asked through its own init, by the hypervisor, or by force."""

from __future__ import annotations

import signal

from nixbox import run
from nixbox.errors import NixboxError
from nixbox.guest import ssh

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.machine.backend import Backend
    from nixbox.machine.record import MachineDir

STOP_TIMEOUT_S = 20.0
_KILL_TIMEOUT_S = 10.0


def endpoint(machine: MachineDir) -> ssh.Endpoint:
    """How nixbox's own commands reach a machine's guest."""
    return ssh.Endpoint(machine.ssh / "exec", machine.name)


def reached(machine: MachineDir) -> ssh.Endpoint:
    """`endpoint`, once the shared connection stands. Raises HostError when none comes about."""
    ssh.await_master(endpoint(machine), machine.ssh_sockets[1], machine.sockets.shell, machine.vm_log)
    return endpoint(machine)


def heal(machine: MachineDir, backend: Backend) -> None:
    """Let a machine go on that was paused by a command which was killed. Under the busy lock."""
    if machine.paused.exists():
        backend.resume(machine.sockets)
        machine.paused.unlink(missing_ok=True)


def stop(machine: MachineDir, backend: Backend) -> str:
    """Stop a machine the mildest way that works, and say which it was. Under the busy lock."""
    if not machine.alive():
        machine.clean_runtime()
        return "not running"
    record = machine.load_or_none()
    if record is None or not record.ready:
        return end(machine, backend)
    heal(machine, backend)
    if not _power_off(machine, backend):
        _sync(machine, backend)
        return end(machine, backend)
    machine.clean_runtime()
    return "powered off"


def _power_off(machine: MachineDir, backend: Backend) -> bool:
    """Ask the guest's init to sync and power off; whether it did within the bound."""
    from nixbox.guest import control

    try:
        if backend.status(machine.sockets) != "running":
            return False
        with control.Control.connect(machine.sockets.control) as channel:
            channel.send("poweroff")
            channel.expect("off", STOP_TIMEOUT_S)
    except NixboxError:
        # An older message, a hung guest, a closed socket: the harder ways follow.
        return machine.wait_gone(0.5)
    return machine.wait_gone(_KILL_TIMEOUT_S)


def _sync(machine: MachineDir, backend: Backend) -> None:
    """The guest's init did not answer: what was written there should reach its disk all the same."""
    try:
        if backend.status(machine.sockets) == "running":
            run.run([*endpoint(machine).argv(), "sync"], timeout_s=STOP_TIMEOUT_S, check=False)
    except NixboxError:
        return


def end(machine: MachineDir, backend: Backend) -> str:
    """End a VM without asking the guest: by the hypervisor, else SIGKILL. Raises NixboxError if it lives on."""
    how = "quit"
    ssh.close_masters(endpoint(machine), machine.ssh_sockets)
    try:
        backend.quit(machine.sockets)
    except NixboxError:
        how = "killed"
    if how == "killed" or not machine.wait_gone(_KILL_TIMEOUT_S):
        how = "killed"
        if not machine.kill(signal.SIGKILL, _KILL_TIMEOUT_S):
            raise NixboxError(f"the VM process of `{machine.name}` cannot be ended")
    machine.clean_runtime()
    return how


def abandon(machine: MachineDir, backend: Backend) -> None:
    """A start that failed or was interrupted leaves no VM behind."""
    if machine.alive():
        end(machine, backend)
    machine.clean_runtime()
