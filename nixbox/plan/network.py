"""What a machine's network is to be, as values: for its plan, its guard and its hypervisor."""

from __future__ import annotations

from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Literal

# Bytes: of the guest's card, its namespace's end of it, and pasta's device. What leaves is taken apart and sent anew
# by the host's own sockets (passt(1)), so packets may be large.
NETWORK_MTU = 65520
GUEST_ADDRESS = "10.0.2.15"  # the same in every machine: each has a network namespace of its own
GUEST_MAC = "52:54:00:12:34:56"  # likewise; QEMU's own default
GUEST_SHELL_PORT = 2  # of nixbox's own sessions, where the hypervisor has no serial port for them (nix/guest/stage2)


def mac_bytes(mac: str) -> bytes:
    """The six bytes of an address of Ethernet's, as `02:00:00:00:00:02`."""
    return bytes.fromhex(mac.replace(":", ""))


@dataclass(frozen=True)
class Policy:
    """What a guest may reach. `domains` cover their subdomains; `ports` are TCP ports (none: 80 and 443).

    Both matter in `filtered` only; `allow_private` opens private and link-local ranges in both modes that let out.
    """

    mode: Literal["off", "filtered", "open"]
    domains: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    allow_private: bool = False

    def as_json(self) -> dict[str, Any]:
        """For a pipe or a file; `from_json` reads it."""
        return {
            "mode": self.mode,
            "domains": list(self.domains),
            "ports": list(self.ports),
            "allow_private": self.allow_private,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Policy:
        """What `as_json` wrote. Raises KeyError."""
        return cls(data["mode"], tuple(data["domains"]), tuple(data["ports"]), data["allow_private"])
