"""The network of a machine that runs: its guard, its policy, and what was refused."""

from __future__ import annotations

from nixbox.errors import ConfigError, NixboxError, NotRunningError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    from nixbox.machine.record import MachineDir, Record
    from nixbox.network.watch import Files, Watch
    from nixbox.report import Reporter


def files(machine: MachineDir) -> Files:
    """Where the guard of a machine's network has its things."""
    from nixbox.machine.record import GUARD_LOCK
    from nixbox.network.watch import Files

    runtime = machine.runtime
    return Files(runtime, runtime / GUARD_LOCK, machine.vm_log, machine.logs / "net.log")


def heal(machine: MachineDir, record: Record, report: Reporter) -> bool:
    """Start the guard of a running machine again if it was killed; whether it was. Under the busy lock.

    Raises HostError.
    """
    from nixbox.network import watch

    if record.pid is None or not record.network:
        return False
    guard = watch.Watch(record.policy)
    if watch.heal(guard, machine.name, files(machine), record.pid):
        report.note("the guard of the machine's network had ended; it was started again")
        settle(guard, report)
        return True
    return False


def settle(guard: Watch, report: Reporter) -> None:
    """Wait until a machine's policy holds, and say if it has no way out yet. Raises HostError when it cannot hold."""
    trouble = guard.settle()
    if trouble is not None:
        report.note(f"note: the machine has no way out for now: {trouble}")


def ask(machine: MachineDir, fds: Sequence[int] = (), **request: Any) -> dict[str, Any]:
    """Ask the guard of a running machine (see watch.ask). Raises NotRunningError, NixboxError."""
    from nixbox.network import watch

    if not machine.alive():
        raise NotRunningError(f"`{machine.name}` is not running", hint="`nixbox up` starts it")
    return watch.ask(files(machine), fds, **request)


def allow(machine: MachineDir, domains: list[str]) -> None:
    """Let a running machine resolve further domains, at once. Raises ConfigError unless its mode is `filtered`."""
    from nixbox.config.fields import domain_fault

    faults = [fault for fault in map(domain_fault, domains) if fault]
    if faults:
        raise ConfigError("that is no domain", faults=faults)
    mode = machine.load().policy.mode
    if mode != "filtered":
        raise ConfigError(
            f"`{machine.name}` has network mode {mode}: only `filtered` has a list of domains",
            hint='set mode = "filtered" under [network] in .nixbox/config.toml',
        )
    policy = ask(machine, allow=domains)["policy"]
    machine.update(network=policy)  # a guard that is started again knows it too


def write_domains(config: Path, domains: list[str]) -> list[str]:
    """Add domains to `network.domains` of a config.toml, which keeps its comments; returns those that were new."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    from nixbox import paths

    try:
        document = tomlkit.parse(config.read_text(encoding="utf-8"))
        table = document.setdefault("network", tomlkit.table())
        known = table.setdefault("domains", tomlkit.array())
        new = [domain for domain in domains if domain not in known]
        known.extend(new)
    except (OSError, UnicodeError, TOMLKitError, AttributeError, TypeError) as error:
        raise NixboxError(f"{config} cannot be changed: {error}", hint="add the domains by hand") from None
    if new:
        paths.write_atomic(config, tomlkit.dumps(document))
    return new
