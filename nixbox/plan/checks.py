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
    if any(_is_set(loaded, f"mounts[{i}]") for i in range(len(settings.mounts))):
        refuse("mounts", "this version cannot mount host directories; use scp or rsync with `nixbox ssh-config`")
    for event, commands in settings.hooks.items():
        if commands:
            refuse(f"hooks.{event}", "this version does not run hooks; remove them")
    if faults:
        raise ConfigError("the config asks for what this version of nixbox cannot do", faults=faults)


def _is_set(loaded: Loaded, field: str) -> bool:
    found = [source for key, source in loaded.origins.items() if key == field or key.startswith(f"{field}.")]
    return any(source != "default" for source in found)


def notices(loaded: Loaded) -> tuple[str, ...]:
    """What an `up` should say, since a default of the design is not there yet."""
    if loaded.settings.mounts:
        return ("the workspace is not mounted in the guest: this version cannot mount host directories",)
    return ()
