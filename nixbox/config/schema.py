"""What a config, a profile and a plugin may say: the pydantic models, and their faults in plain words.

Every model refuses unknown fields and converts nothing: TOML has types, so `vcpus = "2"` is a mistake worth
naming. Pydantic stays inside this module; callers see models, `validate` and `Fault`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, time
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import ErrorDetails

from nixbox.config.names import name_fault, shown
from nixbox.config.settings import TEMPLATE_LIMIT_MIB

Base = Literal["debian", "nixpkgs"]
NetworkMode = Literal["off", "filtered", "open"]
Accelerator = Literal["auto", "kvm", "hvf", "tcg"]
BASES: tuple[Base, ...] = get_args(Base)
EVENTS = ("pre-up", "post-up", "pre-down", "post-down")

_SIZE = re.compile(r"([0-9]{1,12}) ?(M|MiB|G|GiB)?", re.IGNORECASE)
_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_PACKAGE: Mapping[str, tuple[re.Pattern[str], str]] = {
    "debian": (
        re.compile(r"[a-z0-9][a-z0-9+.-]+"),
        "a Debian package name (two or more of lower-case letters, digits, `+`, `-` and `.`)",
    ),
    "nixpkgs": (
        re.compile(r"[A-Za-z_][A-Za-z0-9_'.+-]*"),
        "a nixpkgs attribute (such as `jq` or `python3Packages.requests`)",
    ),
}


# --- words -----------------------------------------------------------------------------------------------


def near(name: str, known: Iterable[str], most: int = 1) -> str:
    """ " (did you mean `x`?)" for up to `most` known names that are like `name`; "" when none is."""
    close = difflib.get_close_matches(name, list(known), n=most)
    return f" (did you mean {' or '.join(map(shown, close))}?)" if close else ""


# --- names, sizes and other scalars ----------------------------------------------------------------------


def parse_size(value: object, *, least_mib: int = 1) -> int:
    """A size in MiB from "512MiB", "2GiB", "2G" or a whole number of MiB; units are binary.

    Raises ValueError that says what is accepted, also for less than `least_mib` MiB.
    """
    match = _SIZE.fullmatch(str(value)) if isinstance(value, int | str) else None
    if match is None:
        given = f"{shown(value)} is not a size" if isinstance(value, str) else "must be a size"
        raise ValueError(f'{given}: write "512MiB", "2GiB" (also 512M, 2G) or a whole number of MiB')
    mib = int(match[1]) * (1024 if (match[2] or "M")[0] in "gG" else 1)
    if mib < least_mib:
        raise ValueError(f"{format_size(mib)} is too little: at least {format_size(least_mib)} is needed")
    return mib


def format_size(mib: int) -> str:
    """`mib` MiB as `parse_size` reads it back: "2GiB" or "1536MiB"."""
    return f"{mib // 1024}GiB" if mib and mib % 1024 == 0 else f"{mib}MiB"


def _check_name_field(value: str) -> str:
    if fault := name_fault(value):
        raise ValueError(fault)
    return value


def _matching(pattern: str, wanted: str) -> AfterValidator:
    """Accept text that `pattern` matches whole (`$` alone would let a newline through)."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(f"{shown(value)} is not {wanted}")
        return value

    return AfterValidator(check)


def _between(least: int, most: int) -> AfterValidator:
    def check(value: int) -> int:
        if not least <= value <= most:
            raise ValueError(f"{value} is out of range: a whole number from {least} to {most} is needed")
        return value

    return AfterValidator(check)


def _check_no_nul(value: str) -> str:
    # The value is not repeated in the message: it may be a secret.
    if "\0" in value:
        raise ValueError("holds a NUL character, which no variable, script or file name can carry")
    return value


def _check_env_name(value: str) -> str:
    # Not repeated either: a secret put where its variable's name belongs must not end in a log.
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise ValueError("is not a variable name: use letters, digits and `_`, and no digit first")
    return value


def _check_url(value: str) -> str:
    wanted = "is not a mirror: write an http, https or file URL such as `http://mirror.example/debian`"
    try:
        url = urlsplit(value)
    except ValueError:
        raise ValueError(f"{shown(value)} {wanted}") from None
    # It becomes a line of an apt source list, where blanks and brackets have a meaning of their own.
    clean = re.fullmatch(r"[!-~]+", value) is not None and not set(value) & set('[]<>"`\\#')
    place = url.path.startswith("/") if url.scheme == "file" else bool(url.hostname)
    if url.scheme not in ("http", "https", "file") or not clean or not place:
        raise ValueError(f"{shown(value)} {wanted}")
    return value


def _check_host_path(value: str) -> str:
    if not value or any(ord(c) < 32 or c == "\x7f" for c in value):
        raise ValueError(f"{shown(value)} is not a path: it is empty or holds control characters")
    return value


def _check_target(value: str) -> str:
    if not value.startswith(("/", "~/")) or ".." in value.split("/"):
        raise ValueError(f"{shown(value)} is not a place in the guest: start with `/` or `~/`, without `..`")
    return value


def is_plugin_path(value: str) -> bool:
    """Whether a plugin is meant by its directory, not by its name."""
    return value.startswith(("./", "../", "/", "~"))


def _check_plugin(value: str) -> str:
    if value.startswith("github:"):
        raise ValueError(f"{shown(value)}: plugins from GitHub are not in this version yet")
    if is_plugin_path(value):
        return _check_host_path(value)
    if fault := name_fault(value):
        raise ValueError(f"{fault}; a plugin's directory starts with `./`, `/` or `~`")
    return value


def guest_path_fault(value: str) -> str | None:
    """What is wrong with a place in the guest, or None."""
    try:
        _check_target(_check_host_path(value))
    except ValueError as error:
        return str(error)
    return None


def domain_fault(value: str) -> str | None:
    """What is wrong with a domain, or None."""
    if re.fullmatch(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", value):
        return None
    wanted = "a domain such as `example.org` or `*.example.org` (subdomains are covered either way; no URL)"
    return f"{shown(value)} is not {wanted}"


def _check_domain(value: str) -> str:
    if fault := domain_fault(value):
        raise ValueError(fault)
    return value


def is_plugin_ref(value: object) -> bool:
    """Whether `value` is well-formed as an entry of `plugins`."""
    try:
        return isinstance(value, str) and _check_plugin(value) == value
    except ValueError:
        return False


def _check_package(base: str, value: str) -> str:
    pattern, wanted = _PACKAGE[base]
    if not pattern.fullmatch(value):
        raise ValueError(f"{shown(value)} is not {wanted}")
    return value


def _check_listed_package(value: str, info: ValidationInfo) -> str:
    return _check_package((info.context or {}).get("base", "debian"), value)


def _shape(value: object) -> str:
    return "table" if isinstance(value, dict | BaseModel) else "plain"


NoNul = AfterValidator(_check_no_nul)
Name = Annotated[str, AfterValidator(_check_name_field)]
Size = Annotated[int, BeforeValidator(parse_size)]
Memory = Annotated[int, BeforeValidator(lambda value: parse_size(value, least_mib=128))]
Disk = Annotated[int, BeforeValidator(lambda value: parse_size(value, least_mib=256))]
Script = Annotated[str, NoNul]
EnvName = Annotated[str, AfterValidator(_check_env_name)]
HostPath = Annotated[str, AfterValidator(_check_host_path)]
GuestPath = Annotated[HostPath, AfterValidator(_check_target)]
Domain = Annotated[str, AfterValidator(_check_domain)]
Port = Annotated[int, _between(1, 65535)]
PluginRef = Annotated[str, AfterValidator(_check_plugin)]
Mirror = Annotated[str, AfterValidator(_check_url)]
Suite = Annotated[str, _matching(r"[a-z][a-z0-9-]*", "a Debian suite such as `trixie`")]


# --- models ----------------------------------------------------------------------------------------------


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    # Fields that are unknown for a reason worth telling.
    refused: ClassVar[Mapping[str, str]] = {}


class PackageTable(_Model):
    """Packages for each base."""

    debian: list[Annotated[str, AfterValidator(lambda value: _check_package("debian", value))]] = []
    nixpkgs: list[Annotated[str, AfterValidator(lambda value: _check_package("nixpkgs", value))]] = []


# A plain list is meant for whichever base the config chooses; `validate` says which one that is.
Packages = Annotated[
    Annotated[list[Annotated[str, AfterValidator(_check_listed_package)]], Tag("plain")]
    | Annotated[PackageTable, Tag("table")],
    Discriminator(_shape),
]


class Resources(_Model):
    """The machine's shape; memory and disk in MiB.

    `return_memory`: memory that the guest frees goes back to the host, and the machine shares none with others.
    """

    vcpus: Annotated[int, _between(1, 256)] = 2
    memory: Memory = 2048
    disk: Disk = 10240
    return_memory: bool = False


class MountTable(_Model):
    """A host directory (relative to the workspace) and where the guest sees it."""

    source: HostPath
    target: GuestPath
    readonly: bool = False


class PortTable(_Model):
    """A port of the host's loopback, and the guest's port that answers there."""

    host: Port
    guest: Port


class Network(_Model):
    """What the guest may reach."""

    mode: NetworkMode = "open"
    domains: list[Domain] = []
    ports: list[Port] = []
    allow_private: bool = False


class FromHost(_Model):
    """A variable that takes its value from the host's environment at `up`."""

    from_host: EnvName


EnvValue = Annotated[Annotated[str, NoNul, Tag("plain")] | Annotated[FromHost, Tag("table")], Discriminator(_shape)]


class Hooks(_Model):
    """Host commands around `up` and `down`."""

    pre_up: list[Script] = Field(default=[], alias="pre-up")
    post_up: list[Script] = Field(default=[], alias="post-up")
    pre_down: list[Script] = Field(default=[], alias="pre-down")
    post_down: list[Script] = Field(default=[], alias="post-down")


class Debian(_Model):
    """Where the Debian base comes from; unset mirrors mean those of the host's apt sources."""

    mirror: Mirror | None = None
    security_mirror: Mirror | None = None
    suite: Suite = "trixie"


class MachineTable(_Model):
    """How the machine is run."""

    accelerator: Accelerator = "auto"


class Config(_Model):
    """The user's `.nixbox/config.toml`."""

    name: Name | None = None
    profile: Name | None = None
    base: Base = "debian"
    plugins: list[PluginRef] = []
    packages: Packages = []
    scripts: list[Script] = []
    resources: Resources = Resources()
    mounts: list[MountTable] = [MountTable(source=".", target="~/workspace")]
    network: Network = Network()
    ports: list[PortTable] = []
    env: dict[EnvName, EnvValue] = {}
    hooks: Hooks = Hooks()
    debian: Debian = Debian()
    machine: MachineTable = MachineTable()


class ProfileDisk(_Model):
    """The size in MiB of a fresh overlay disk."""

    size: Disk


class Profile(_Model):
    """`profiles/NAME.toml`: what is baked into the image and what runs once on a fresh machine."""

    description: str = ""
    packages: Packages = []
    build: Script | None = None
    build_network: bool = False
    setup: Script | None = None
    setup_env: bool = False
    disk: ProfileDisk | None = None


class TemplateSettings(_Model):
    """How much of the disk all templates together may take."""

    limit: Size = TEMPLATE_LIMIT_MIB


class UserSettings(_Model):
    """`settings.toml` of the user's own configuration directory: what belongs to no workspace."""

    templates: TemplateSettings = TemplateSettings()


def _not_yet(what: str) -> str:
    return f"this version of nixbox cannot {what} in a plugin yet"


class Plugin(_Model):
    """A minimal `plugin.toml`."""

    refused: ClassVar[Mapping[str, str]] = {
        "commands": _not_yet("offer host-side commands"),
        "env": "a plugin cannot set variables: secrets are always named in the user's own config.toml, [env]",
        "hooks": _not_yet("run hooks"),
        "mounts": _not_yet("mount directories"),
        "network": _not_yet("allow domains or ports"),
        "requires_env": _not_yet("require variables"),
        "seeds": _not_yet("seed caches"),
    }

    description: str = ""
    packages: Packages = []
    build: Script | None = None
    scripts: list[Script] = []


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
