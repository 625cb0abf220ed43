"""Ports of a guest that the host's loopback has as well: over nixbox's own SSH connection, in every network mode."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterable

from nixbox import paths, run
from nixbox.errors import ConfigError, NixboxError
from nixbox.session import stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import TypeAlias

    from nixbox.machine.record import MachineDir

Published: TypeAlias = tuple[int, int]  # a port of the host's loopback, and the guest's
_TIMEOUT_S = 60.0


def parse(text: str) -> Published:
    """`8080:80`, or `8080` for the same on both sides. Raises ConfigError."""
    match = re.fullmatch(r"([0-9]{1,5})(?::([0-9]{1,5}))?", text)
    host, guest = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (0 < host < 65536 and 0 < guest < 65536):
        raise ConfigError(f"{text!r} is no pair of ports", hint="write HOST:GUEST, such as 8080:80")
    return host, guest


def added(machine: MachineDir) -> list[Published]:
    """Those that were added by `nixbox port add`."""
    try:
        return [(int(host), int(guest)) for host, guest in json.loads(_file(machine).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def wanted(machine: MachineDir, configured: Iterable[Published]) -> list[Published]:
    """All that a machine is to have: one for each port of the host, what was added last counts."""
    return sorted({**dict(configured), **dict(added(machine))}.items())


def publish(machine: MachineDir, published: Published) -> None:
    """Forward a port of the host's loopback. Raises NixboxError when something else has it."""
    host, guest = published
    if _is_ours(machine, published):
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", host))
        except OSError as error:
            raise NixboxError(
                f"port {host} cannot be published: {error.strerror}", hint="take another port of the host"
            ) from None
    _forward(machine, "forward", published)
    with _active(machine).open("a") as file:
        file.write(f"{host}:{guest}\n")


def add(machine: MachineDir, published: Published) -> None:
    """Publish a port of a running machine, now and at every later start. Raises NixboxError."""
    others = [pair for pair in added(machine) if pair[0] != published[0]]
    for active in _actives(machine):
        if active[0] == published[0] and active != published:
            withdraw(machine, active)
    publish(machine, published)
    paths.write_atomic(_file(machine), json.dumps([*others, published]), mode=0o600)


def remove(machine: MachineDir, host: int) -> bool:
    """Take a port back; whether there was one."""
    before = added(machine)
    after = [pair for pair in before if pair[0] != host]
    if after != before:
        paths.write_atomic(_file(machine), json.dumps(after), mode=0o600)
    found = [pair for pair in _actives(machine) if pair[0] == host] if machine.alive() else []
    for pair in found:
        withdraw(machine, pair)
    return bool(found) or after != before


def withdraw(machine: MachineDir, published: Published) -> None:
    """End a forwarding."""
    _forward(machine, "cancel", published)
    left = [pair for pair in _actives(machine) if pair != published]
    paths.write_atomic(_active(machine), "".join(f"{host}:{guest}\n" for host, guest in left), mode=0o600)


def _forward(machine: MachineDir, what: str, published: Published) -> None:
    endpoint = stop.reached(machine)
    host, guest = published
    where = f"127.0.0.1:{host}:127.0.0.1:{guest}"
    done = run.run([*endpoint.argv("-O", what, "-L", where)], timeout_s=_TIMEOUT_S, check=False)
    if done.code != 0 and what == "forward":
        raise NixboxError(f"port {host} cannot be published: {done.stderr.strip()}")


def _file(machine: MachineDir) -> Path:
    return machine.path / "ports.json"


def _active(machine: MachineDir) -> Path:
    """What this connection forwards; it goes with the machine's runtime directory."""
    return machine.runtime / "ports"


def _actives(machine: MachineDir) -> list[Published]:
    try:
        return [parse(line) for line in _active(machine).read_text().splitlines()]
    except (OSError, ConfigError):
        return []


def _is_ours(machine: MachineDir, published: Published) -> bool:
    """Whether it is forwarded already, by a connection that still stands."""
    if published not in _actives(machine):
        return False
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", published[0])) == 0


def listing(machine: MachineDir, configured: Iterable[Published]) -> list[dict[str, object]]:
    """Every port that the machine is to have, and whether it has it now."""
    here = machine.alive()
    return [
        {"host": host, "guest": guest, "active": here and _is_ours(machine, (host, guest))}
        for host, guest in wanted(machine, configured)
    ]
