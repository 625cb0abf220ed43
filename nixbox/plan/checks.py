"""What this version cannot do yet is refused here, by name, before anything starts. Nothing is silently ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nixbox.errors import ConfigError

if TYPE_CHECKING:
    from nixbox.config.settings import Loaded


def check(loaded: Loaded) -> None:
    """Raise one ConfigError with every setting that this version cannot serve."""
    settings = loaded.settings
    faults = []

    def refuse(field: str, why: str) -> None:
        origin = loaded.origins.get(field) or next(
            (source for key, source in loaded.origins.items() if key.startswith(field)), "config.toml"
        )
        faults.append(f"{field} (from {origin}): {why}")

    if settings.base == "nixpkgs":
        refuse("base", 'this version has the `debian` base only; use base = "debian"')
    if settings.network_mode != "filtered":
        for field in ("domains", "ports"):
            if getattr(settings, field):
                refuse(f"network.{field}", f'only mode = "filtered" has any; the mode is "{settings.network_mode}"')
    hosts = [port.host for port in settings.published]
    for i, port in enumerate(hosts):
        if port in hosts[:i]:
            refuse(f"ports[{i}].host", f"port {port} of the host is taken by an earlier entry")
    for event, commands in settings.hooks.items():
        if commands:
            refuse(f"hooks.{event}", "this version does not run hooks; remove them")
    if faults:
        raise ConfigError("the config asks for what this version of nixbox cannot do", faults=faults)
