"""What a config, a profile and a plugin may say: the pydantic models, and their faults in plain words.

Every model refuses unknown fields and converts nothing: TOML has types, so `vcpus = "2"` is a mistake worth
naming. Pydantic stays inside this module; callers see models, `validate` and `Fault`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, time
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails

from nixbox.config.fields import (
    DebianPackage,
    Disk,
    Domain,
    EnvName,
    GuestPath,
    HostPath,
    ListedPackage,
    Memory,
    Mirror,
    Name,
    NixPackage,
    NixpkgsSource,
    NoNul,
    PluginRef,
    Port,
    Program,
    Script,
    SidecarPath,
    Size,
    Suite,
    between,
    near,
    shape,
)
from nixbox.config.names import shown
from nixbox.config.settings import TEMPLATE_LIMIT_MIB
from nixbox.values import dataclass

Base = Literal["debian", "nixpkgs"]
NetworkMode = Literal["off", "filtered", "open"]
Accelerator = Literal["auto", "kvm", "hvf", "tcg"]
Backend = Literal["auto", "qemu", "krun", "cloud-hypervisor"]
BASES: tuple[Base, ...] = get_args(Base)
EVENTS = ("pre-up", "post-up", "pre-down", "post-down")

# --- models ----------------------------------------------------------------------------------------------


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    # Fields that are unknown for a reason worth telling.
    refused: ClassVar[Mapping[str, str]] = {}


class PackageTable(_Model):
    """Packages for each base."""

    debian: list[DebianPackage] = Field(default=[], description="Names of Debian packages.")
    nixpkgs: list[NixPackage] = Field(default=[], description="Attributes of nixpkgs.")


# A plain list is meant for whichever base the config chooses; `validate` says which one that is.
Packages = Annotated[
    Annotated[list[ListedPackage], Tag("plain")] | Annotated[PackageTable, Tag("table")],
    Discriminator(shape),
]


class Resources(_Model):
    """The machine's shape. A size is text such as `4GiB`, or a number of MiB."""

    vcpus: Annotated[int, between(1, 256)] = Field(default=2, description="Virtual CPUs, 1 to 256.")
    memory: Memory = Field(default=2048, description="Memory, at least 128MiB.")
    disk: Disk = Field(default=10240, description="The disk for all that changes in the guest; sparse on the host.")
    return_memory: bool = Field(
        default=False,
        description="true: memory that the guest frees goes back to the host; the machine shares none with others.",
    )


class MountTable(_Model):
    """A directory of the host that the guest sees."""

    source: HostPath = Field(description="A directory of the host: `~/…`, absolute, or relative to the workspace.")
    target: GuestPath = Field(description="Where the guest sees it: `~/…` or absolute.")
    readonly: bool = Field(default=False, description="true: the guest cannot change it.")


class PortTable(_Model):
    """A port of the host's loopback, and the guest's port that answers there."""

    host: Port = Field(description="The port at 127.0.0.1.")
    guest: Port = Field(description="The guest's port.")


class Network(_Model):
    """What the guest may reach."""

    mode: NetworkMode = Field(
        default="open",
        description="`off`: nothing leaves the guest. `filtered`: only `domains`. `open`: the Internet.",
    )
    domains: list[Domain] = Field(
        default=[], description="What `filtered` lets through: these names and all below them."
    )
    ports: list[Port] = Field(default=[], description="TCP ports of `filtered`; 80 and 443 if nobody names any.")
    allow_private: bool = Field(
        default=False, description="true: private and link-local addresses too. The host's loopback never."
    )


class FromHost(_Model):
    """A variable that takes its value from the host's environment at `up`."""

    from_host: EnvName = Field(description="The variable of the host.")


EnvValue = Annotated[Annotated[str, NoNul, Tag("plain")] | Annotated[FromHost, Tag("table")], Discriminator(shape)]


class HookTable(_Model):
    """An entry of [hooks] that says more than its shell command."""

    run: Script = Field(description="A shell command.")
    required: bool = Field(default=False, description="true: if it fails, `up` or `down` fails as well.")


HookEntry = Annotated[
    Annotated[Script, Tag("plain")] | Annotated[HookTable, Tag("table")],
    Discriminator(shape),
]


class Hooks(_Model):
    """Shell commands that run on the host, in the workspace; a plugin's come before the user's own."""

    pre_up: list[HookEntry] = Field(default=[], alias="pre-up", description="Before `nixbox up` starts anything.")
    post_up: list[HookEntry] = Field(default=[], alias="post-up", description="When it is up, at every `nixbox up`.")
    pre_down: list[HookEntry] = Field(default=[], alias="pre-down", description="Before it is stopped.")
    post_down: list[HookEntry] = Field(default=[], alias="post-down", description="When it is stopped.")


class SeedTable(_Model):
    """A directory of the host that the guest gets a copy of, on its own disk: a cache, for one."""

    source: HostPath = Field(description="A directory of the host: `~/…`, absolute, or relative to the workspace.")
    target: GuestPath = Field(description="Where the guest has it: `~/…` or absolute.")
    exclude: list[HostPath] = Field(default=[], description="Patterns of what to leave out.")
    sentinel: GuestPath | None = Field(default=None, description="The guest's file that says it is done.")
    on_up: bool = Field(default=True, description="false: only `nixbox seed` and commands seed it, not `nixbox up`.")


class Debian(_Model):
    """Where the Debian base comes from; unset mirrors mean those of the host's apt sources."""

    mirror: Mirror | None = Field(default=None, description="The archive's URL.")
    security_mirror: Mirror | None = Field(default=None, description="The security archive's URL.")
    suite: Suite = Field(default="trixie", description="The release.")


class Nixpkgs(_Model):
    """Which nixpkgs the base of that name is made of, and what of it may be used."""

    source: NixpkgsSource = Field(
        default="github:NixOS/nixpkgs@nixos-unstable",
        description="A branch, tag or commit on GitHub; `nixbox.lock` has the revision, `nixbox update` moves it.",
    )
    allow_unfree: bool = Field(default=False, description="true: also packages whose licence is not free.")


class MachineTable(_Model):
    """How the machine is run."""

    accelerator: Accelerator = Field(
        default="auto", description="What runs the guest's instructions; `auto`: the best that works on this host."
    )
    backend: Backend = Field(default="auto", description="The hypervisor; `auto` takes QEMU if it is there.")


class Config(_Model):
    """The user's `.nixbox/config.toml`."""

    name: Name | None = Field(default=None, description="The machine's name; by default the directory's.")
    profile: Name | None = Field(
        default=None, description="`profiles/NAME.toml` in `.nixbox/` or in the user's own `~/.config/nixbox/`."
    )
    base: Base = Field(default="debian", description="What the image is made from.")
    plugins: list[PluginRef] = Field(
        default=[],
        description="By name, by path (`./tools/mine`), or from GitHub (`github:owner/repo/subdir@v1`).",
    )
    packages: Packages = Field(
        default=[], description='What the image gets; or by base: { debian = ["jq"], nixpkgs = ["jq"] }.'
    )
    scripts: list[Script] = Field(default=[], description="Shell scripts in the guest, at every `nixbox up`.")
    resources: Resources = Field(default=Resources(), description="The machine's shape.")
    mounts: list[MountTable] = Field(
        default=[MountTable(source=".", target="~/workspace")],
        description="Directories of the host that the guest sees; what is written here replaces the default.",
    )
    network: Network = Field(default=Network(), description="What the guest may reach.")
    ports: list[PortTable] = Field(
        default=[], description="Ports of the guest that the host's loopback has as well, in every network mode."
    )
    env: dict[EnvName, EnvValue] = Field(
        default={}, description="Variables for the guest: a text, or { from_host = NAME }. In its memory only."
    )
    hooks: Hooks = Field(default=Hooks(), description="Shell commands on the host.")
    seeds: list[SeedTable] = Field(default=[], description="Directories of the host that the guest gets a copy of.")
    ld_libraries: list[NixPackage] = Field(
        default=[], description="nixpkgs attributes whose libraries foreign programs find; for that base only."
    )
    debian: Debian = Field(default=Debian(), description="Where the Debian base comes from.")
    nixpkgs: Nixpkgs = Field(default=Nixpkgs(), description="Which nixpkgs the base of that name is made of.")
    machine: MachineTable = Field(default=MachineTable(), description="How the machine is run.")


class ProfileDisk(_Model):
    """The disk of a fresh machine."""

    size: Disk = Field(description="Its size, unless config.toml says another.")


class Profile(_Model):
    """`profiles/NAME.toml`: what is baked into the image and what runs once on a fresh machine.

    `sidecar` (paths of the image) and `sidecar_packages` lie in images of their own, beside the root image.
    """

    description: str = Field(default="", description="What it is for.")
    packages: Packages = Field(
        default=[], description='What the image gets; or by base: { debian = ["jq"], nixpkgs = ["jq"] }.'
    )
    build: Script | None = Field(default=None, description="A shell script in the image's build, as its root.")
    build_network: bool = Field(
        default=False, description="true: `build` reaches the network, and the image is not reproducible."
    )
    sidecar: list[SidecarPath] = Field(
        default=[], description="Heavy paths of the image, which lie in a read-only image of their own."
    )
    sidecar_packages: Packages = Field(
        default=[], description="Heavy packages, likewise; built alone when only they change."
    )
    setup: Script | None = Field(
        default=None, description="A shell script, once on a fresh machine, as its user; part of the template."
    )
    setup_env: bool = Field(
        default=False, description="true: `setup` sees `[env]`, and runs on each new machine instead."
    )
    disk: ProfileDisk | None = Field(default=None, description="The disk of a fresh machine.")


class TemplateSettings(_Model):
    """How much of the disk all templates together may take."""

    limit: Size = Field(default=TEMPLATE_LIMIT_MIB, description="The size; those used longest ago go first.")


class KrunSettings(_Model):
    """Where libkrun is, if not where the loader or the package smolmachines has it."""

    library: HostPath | None = Field(default=None, description="The path of the library.")


class UserSettings(_Model):
    """`settings.toml` of the user's own configuration directory: what belongs to no workspace."""

    templates: TemplateSettings = Field(
        default=TemplateSettings(), description="The templates that machines are restored from."
    )
    krun: KrunSettings = Field(default=KrunSettings(), description="libkrun.")


class PluginNetwork(_Model):
    """What the plugin's tools have to reach, in mode `filtered`, which is the user's own to choose."""

    refused: ClassVar[Mapping[str, str]] = {
        "mode": "a plugin cannot choose the mode; the user does, in config.toml, [network]",
        "allow_private": "a plugin cannot open private addresses; the user does, in config.toml, [network]",
    }

    domains: list[Domain] = Field(default=[], description="Domains, with their subdomains.")
    ports: list[Port] = Field(default=[], description="TCP ports; if nobody names any, they are 80 and 443.")


class CommandTable(_Model):
    """A program on the host that `nixbox PLUGIN NAME [ARGS…]` runs."""

    name: Name = Field(description="What it is called.")
    description: str = Field(default="", description="One line for `nixbox --help`.")
    run: Program | None = Field(
        default=None, description="An executable in the plugin's directory, in any language; else `commands/NAME`."
    )


class Plugin(_Model):
    """`plugin.toml`: what a plugin adds to a workspace."""

    refused: ClassVar[Mapping[str, str]] = {
        "env": "a plugin cannot set variables: secrets are always named in the user's own config.toml, [env]; "
        "say which the plugin needs with requires_env",
        "resources": "a plugin does not shape the machine: config.toml does, [resources]",
        "setup": "a plugin has no first-boot setup: a profile has; `scripts` run at every `up`",
        "ports": "a plugin publishes no ports: config.toml does",
    }

    description: str = Field(default="", description="One line for `nixbox plugin list`.")
    packages: Packages = Field(
        default=[], description='What the image gets; or by base: { debian = ["jq"], nixpkgs = ["jq"] }.'
    )
    build: Script | None = Field(
        default=None, description="A shell script in the image's build, as its root, without network."
    )
    scripts: list[Script] = Field(default=[], description="Shell scripts in the guest, at every `nixbox up`.")
    requires_env: list[EnvName] = Field(default=[], description="Variables that config.toml has to name, in [env].")
    network: PluginNetwork = Field(default=PluginNetwork(), description="What its tools have to reach.")
    mounts: list[MountTable] = Field(default=[], description="Directories of the host that the guest sees.")
    hooks: Hooks = Field(default=Hooks(), description="Shell commands on the host.")
    seeds: list[SeedTable] = Field(default=[], description="Directories of the host that the guest gets a copy of.")
    commands: list[CommandTable] = Field(default=[], description="Programs on the host: `nixbox PLUGIN NAME`.")
    ld_libraries: list[NixPackage] = Field(
        default=[], description="nixpkgs attributes whose libraries foreign programs find; for that base only."
    )


# --- validation ------------------------------------------------------------------------------------------

M = TypeVar("M", bound=_Model)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong: the field as the user would write it ("" for the whole file), and what is wrong."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


def validate(model: type[M], data: Mapping[str, Any], base: str = "debian") -> tuple[M | None, list[Fault]]:
    """Parsed TOML as `model`, or every fault in it; `base` is what a plain `packages` list is meant for."""
    try:
        return model.model_validate(data, context={"base": base}), []
    except ValidationError as error:
        found = error.errors(include_url=False)
        return None, [Fault(_path(data, e), _message(model, e)) for e in found]


def _path(data: object, error: ErrorDetails) -> str:
    """The field of an error as the user wrote it.

    Pydantic's location also names union branches and "[key]"; what does not lead anywhere in the user's own
    data is such a name, save for the last part of a missing field.
    """
    path = ""
    for depth, part in enumerate(error["loc"], 1):
        missing = error["type"] == "missing" and depth == len(error["loc"])
        if isinstance(part, int) and isinstance(data, list):
            path += f"[{part}]"
            data = data[part]
        elif isinstance(data, dict) and (part in data or missing):
            key = str(part)
            plain = re.fullmatch(r"[A-Za-z0-9_-]+", key)
            path += ("." if path else "") + (key if plain else json.dumps(key))
            data = data.get(part)
    return path


# What is accepted where pydantic reports a wrong type.
_ACCEPTED = {
    "string_type": "text in quotes",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def _kind(value: object) -> str:
    """What a TOML value is, without its content: that may be a secret."""
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "true or false"),
        (int, "a whole number"),
        (float, "a fraction"),
        (str, "text"),
        (list, "a list"),
        (dict, "a table"),
        ((date, time), "a date or time"),
    )
    return next((words for kind, words in kinds if isinstance(value, kind)), "something else")


def _message(model: type[BaseModel], error: ErrorDetails) -> str:
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return _unknown_field(model, error["loc"])
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        words = ", ".join(f"`{choice}`" for choice in choices[:-1]) + f" or `{choices[-1]}`"
        wrong = f"{shown(given)}{near(given, choices)}" if isinstance(given, str) else _kind(given)
        return f"must be {words}, not {wrong}"
    if kind == "string_unicode":
        return "is not valid UTF-8 text"
    return f"must be {_ACCEPTED.get(kind, 'something else')}, not {_kind(given)}"


def _unknown_field(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    for part in location[:-1]:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if part in fields:
            model = _model_in(fields[str(part)].annotation) or model
    key = str(location[-1])
    refused: Mapping[str, str] = getattr(model, "refused", {})
    if key in refused:
        return refused[key]
    known = [field.alias or name for name, field in model.model_fields.items()]
    return "unknown field" + (near(key, known) or f" (known here: {', '.join(known)})")


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The one model inside a field's type, as in `list[MountTable]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def packages_for(packages: list[str] | Mapping[str, list[str]], base: str) -> list[str]:
    """The packages of a dumped `packages` field that are meant for `base`."""
    return list(packages.get(base, []) if isinstance(packages, Mapping) else packages)
