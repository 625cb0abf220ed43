"""What cannot be served is refused here, by name, before anything starts. Nothing is silently ignored."""

from __future__ import annotations

from nixbox.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.config.settings import Loaded
    from nixbox.plan.model import BackendName


def check(loaded: Loaded, backend: BackendName = "qemu") -> None:
    """Raise one ConfigError with every setting that cannot be served, and every variable that a plugin misses."""
    settings = loaded.settings
    faults = []

    def refuse(field: str, why: str) -> None:
        origin = loaded.origins.get(field) or next(
            (source for key, source in loaded.origins.items() if key.startswith(field)), "config.toml"
        )
        faults.append(f"{field} (from {origin}): {why}")

    if settings.base != "debian":
        for field in ("sidecar", "sidecar_packages"):
            if getattr(settings, field):
                refuse(f"{field}[0]", f'only base = "debian" has sidecars so far; the base is "{settings.base}"')
    if backend != "qemu" and settings.accelerator == "tcg":
        refuse("machine.accelerator", f'the backend {backend} emulates nothing: "auto", or backend = "qemu"')
    if settings.network_mode != "filtered":
        for field in ("domains", "ports"):
            of = [loaded.origins[f"network.{field}[{i}]"] for i in range(len(getattr(settings, field)))]
            if not all(origin.startswith("plugin ") for origin in of):  # a plugin's are for whoever filters
                refuse(f"network.{field}", f'only mode = "filtered" has any; the mode is "{settings.network_mode}"')
    for i, name in enumerate(settings.sidecar_packages):
        if name in settings.packages:
            refuse(f"sidecar_packages[{i}]", f"{name} is in packages as well: it can be in one of the two")
    hosts = [port.host for port in settings.published]
    for i, port in enumerate(hosts):
        if port in hosts[:i]:
            refuse(f"ports[{i}].host", f"port {port} of the host is taken by an earlier entry")
    given = {entry.name for entry in settings.env}
    for origin, name in settings.requires_env:
        if name not in given:
            mend = f'add {name} = {{ from_host = "{name}" }} there, or a literal that is no secret'
            faults.append(f"env: {origin} needs the variable {name}: {mend}")
    targets = [seed.target.rstrip("/") for seed in settings.seeds]
    for i, target in enumerate(targets):
        if target in targets[:i]:
            refuse(f"seeds[{i}]", f"{target} is the target of an earlier one as well")
    if faults:
        raise ConfigError("the config asks for what cannot be done", faults=faults)
