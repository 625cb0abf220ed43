"""What a workspace's settings come to: values only. The image part decides the build, the rest does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Accelerator = Literal["kvm", "hvf", "tcg"]


@dataclass(frozen=True, slots=True)
class Script:
    """Shell text and where it came from (`profile dev`, `plugin git`, `config.toml`)."""

    origin: str
    text: str


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Everything that changes the image, and nothing else."""

    base: str
    suite: str
    packages: tuple[str, ...]
    build: tuple[Script, ...]
    build_network: bool


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


@dataclass(frozen=True, slots=True)
class Plan:
    """One `up`: the image, the machine, and what the user should be told about both."""

    image: ImageSpec
    machine: MachineSpec
    notices: tuple[str, ...]
