"""What a workspace's settings come to: values only. The image part decides the build, the rest does not."""

from __future__ import annotations

from nixbox.values import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from nixbox.config.settings import Mount, Seed
    from nixbox.plan.network import Policy

    Accelerator = Literal["kvm", "hvf", "tcg"]
    BackendName = Literal["qemu", "krun", "cloud-hypervisor"]
else:  # without what `typing` costs
    Accelerator = BackendName = str


@dataclass(frozen=True, slots=True)
class Script:
    """Shell text and where it came from (`profile dev`, `plugin git`, `config.toml`)."""

    origin: str
    text: str


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Everything that changes the image, and nothing else. `krun`: it must hold libkrun's kernel too.

    `sidecar`: paths of the image that lie in an image of their own, as `sidecar_packages` do.
    `suite` is Debian's; `nixpkgs` (where its revisions come from: `github:OWNER/REPO@REF`), `ld_libraries` and
    `allow_unfree` are that base's. `asked` says for messages who names a package: (name, origin) pairs.
    """

    base: str
    suite: str
    packages: tuple[str, ...]
    build: tuple[Script, ...]
    build_network: bool
    krun: bool = False
    sidecar: tuple[str, ...] = ()
    sidecar_packages: tuple[str, ...] = ()
    nixpkgs: str = ""
    ld_libraries: tuple[str, ...] = ()
    allow_unfree: bool = False
    asked: tuple[tuple[str, str], ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Shared:
    """A directory of the host that a machine has: absolute `source`, of which `real` is the path without links.

    `device` and `inode` say what was shared, whatever the path means by now. `target` is as written; `added`: by
    `nixbox mount`, and not by the config. `tag` is the name by which the running guest knows it, never used twice
    (empty: the guest has not got it).
    """

    source: str
    real: str
    device: int
    inode: int
    target: str
    readonly: bool
    added: bool = False
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Queue:
    """A virtqueue: guest-physical addresses of its three parts, and how many descriptors it has."""

    descriptors: int
    available: int
    used: int
    size: int


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """What a machine is made of beside its image; changing any of it rebuilds nothing."""

    name: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    return_memory: bool
    accelerator: Literal["auto", "kvm", "hvf", "tcg"]
    setup: str | None
    setup_env: bool
    scripts: tuple[Script, ...]
    env_names: tuple[str, ...]
    network: Policy
    published: tuple[tuple[int, int], ...] = ()
    mounts: tuple[Mount, ...] = ()
    seeds: tuple[Seed, ...] = ()
    backend: BackendName = "qemu"


@dataclass(frozen=True, slots=True)
class Plan:
    """One `up`: the image and the machine."""

    image: ImageSpec
    machine: MachineSpec
