"""From merged settings to a plan: pure."""

from __future__ import annotations

from nixbox.plan import checks
from nixbox.plan.model import BackendName, ImageSpec, MachineSpec, Plan, Script
from nixbox.plan.network import Policy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.config.settings import Loaded


def resolve(loaded: Loaded, machine: str | None = None, backend: BackendName = "qemu") -> Plan:
    """What `up` will build and start, `backend` being the config's or what that stands for on this host.

    Raises ConfigError for everything that cannot be served, all at once.
    """
    checks.check(loaded, backend)
    settings = loaded.settings
    of_nixpkgs = settings.base == "nixpkgs"
    named = {"packages": settings.packages} | ({"ld_libraries": settings.ld_libraries} if of_nixpkgs else {})
    asked = [(name, loaded.origins[f"{field}[{i}]"]) for field in named for i, name in enumerate(named[field])]
    image = ImageSpec(
        base=settings.base,
        suite=settings.suite,
        packages=settings.packages,
        build=tuple(Script(origin, text) for origin, text in settings.build),
        build_network=settings.build_network,
        krun=backend == "krun",
        sidecar=settings.sidecar,
        sidecar_packages=settings.sidecar_packages,
        nixpkgs=settings.nixpkgs if of_nixpkgs else "",
        ld_libraries=settings.ld_libraries if of_nixpkgs else (),
        allow_unfree=of_nixpkgs and settings.allow_unfree,
        asked=tuple(asked),
    )
    spec = MachineSpec(
        name=machine or settings.name,
        vcpus=settings.vcpus,
        memory_mib=settings.memory_mib,
        disk_mib=settings.disk_mib,
        return_memory=settings.return_memory,
        accelerator=settings.accelerator,
        setup=settings.setup,
        setup_env=settings.setup_env,
        scripts=tuple(Script(origin, text) for origin, text in settings.scripts),
        env_names=tuple(entry.name for entry in settings.env),
        network=Policy(settings.network_mode, settings.domains, settings.ports, settings.allow_private),
        published=tuple((port.host, port.guest) for port in settings.published),
        mounts=settings.mounts,
        seeds=settings.seeds,
        backend=backend,
    )
    return Plan(image, spec)
