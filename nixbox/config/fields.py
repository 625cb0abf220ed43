"""The scalars of configs, profiles and plugins: what each accepts, and what is wrong with a value it does not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationInfo

from nixbox.config import refs
from nixbox.config.names import name_fault, shown

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


def matching(pattern: str, wanted: str) -> AfterValidator:
    """Accept text that `pattern` matches whole (`$` alone would let a newline through)."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(f"{shown(value)} is not {wanted}")
        return value

    return AfterValidator(check)


def between(least: int, most: int) -> AfterValidator:
    """Accept whole numbers from `least` to `most`."""

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


# What a guest starts with, and what its file systems are put on: as a whole these have to be in the root image.
_ROOT_ONLY = frozenset(
    f"/{name}"
    for name in (
        *("", "boot", "dev", "etc", "home", "mnt", "proc", "root", "run", "sys", "tmp", "usr", "var", "var/lib"),
        *(above + name for above in ("", "usr/") for name in ("bin", "lib", "lib64", "sbin")),
    )
)


def _check_sidecar(value: str) -> str:
    if value in _ROOT_ONLY:
        raise ValueError(f"{shown(value)} is needed to start a guest: name what is heavy below it")
    # No pattern of a shell's or of unsquashfs'.
    if not re.fullmatch(r"(/[A-Za-z0-9._+@%:~-]+)+", value) or {".", ".."} & set(value.split("/")):
        raise ValueError(f"{shown(value)} is not a path in the image: write it whole and plain, such as `/opt/jdk`")
    return value


def is_plugin_path(value: str) -> bool:
    """Whether a plugin is meant by its directory, not by its name."""
    return value.startswith(("./", "../", "/", "~"))


def _check_plugin(value: str) -> str:
    if refs.is_github(value):
        refs.parse(value)
        return value
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


def plugin_fault(value: str) -> str | None:
    """What is wrong with an entry of `plugins`, or None."""
    try:
        _check_plugin(value)
    except ValueError as error:
        return str(error)
    return None


def is_plugin_ref(value: object) -> bool:
    """Whether `value` is well-formed as an entry of `plugins`."""
    return isinstance(value, str) and plugin_fault(value) is None


def _check_source(value: str) -> str:
    form = f"{shown(value, most=100)} is no nixpkgs: write github:OWNER/REPO@BRANCH (or a tag, or a commit)"
    try:
        place = refs.parse(value)
    except ValueError:
        raise ValueError(form) from None
    if place.subdir or place.ref is None:
        raise ValueError(form)
    return value


def _check_package(base: str, value: str) -> str:
    pattern, wanted = _PACKAGE[base]
    if not pattern.fullmatch(value):
        raise ValueError(f"{shown(value)} is not {wanted}")
    return value


def _check_listed_package(value: str, info: ValidationInfo) -> str:
    return _check_package((info.context or {}).get("base", "debian"), value)


def _check_program(value: str) -> str:
    if value.startswith("/") or ".." in value.split("/"):
        raise ValueError(f"{shown(value)} is not a file in the plugin's own directory")
    return value


def shape(value: object) -> str:
    """Which of the two ways something is written in, for a field that has both."""
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
SidecarPath = Annotated[str, AfterValidator(_check_sidecar)]
Domain = Annotated[str, AfterValidator(_check_domain)]
Port = Annotated[int, between(1, 65535)]
PluginRef = Annotated[str, AfterValidator(_check_plugin)]
Mirror = Annotated[str, AfterValidator(_check_url)]
Suite = Annotated[str, matching(r"[a-z][a-z0-9-]*", "a Debian suite such as `trixie`")]
NixPackage = Annotated[str, AfterValidator(lambda value: _check_package("nixpkgs", value))]
DebianPackage = Annotated[str, AfterValidator(lambda value: _check_package("debian", value))]
NixpkgsSource = Annotated[str, AfterValidator(_check_source)]
ListedPackage = Annotated[str, AfterValidator(_check_listed_package)]
Program = Annotated[HostPath, AfterValidator(_check_program)]
