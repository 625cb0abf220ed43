"""From files and command line to one checked, merged `Settings` that knows where each value came from."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from nixbox import paths
from nixbox.config import fields, plugins, refs, schema
from nixbox.config.names import default_name, is_name, shown
from nixbox.config.plugins import PluginFault
from nixbox.config.schema import Config, Fault, Plugin, Profile
from nixbox.config.settings import (
    Command,
    EnvEntry,
    Hook,
    Loaded,
    Mount,
    Overrides,
    Published,
    Seed,
    Settings,
    Used,
)
from nixbox.config.sources import Sources
from nixbox.errors import ConfigError

DEFAULT = "default"
USER = paths.CONFIG_FILE
COMMAND_LINE = "command line"
HIDDEN = "(hidden)"
# nixbox's own commands: a plugin of such a name could not be called.
RESERVED = frozenset(
    (
        *("build", "config", "cp", "doctor", "down", "env", "fork", "image", "init", "list", "lock", "logs", "mount"),
        *("net", "plugin", "port", "rm", "run", "seed", "shell", "ssh-config", "status", "suspend", "template"),
        *("docs", "trust", "unmount", "up", "update", "version"),
    )
)

# A layer is one source's values by field path ("resources.vcpus"); lists and everything else are leaves.
Layer: TypeAlias = Mapping[str, Any]
M = TypeVar("M", Config, Profile, Plugin, schema.UserSettings)


def load(workspace: Path, overrides: Overrides | None = None, sources: Sources | None = None) -> Loaded:
    """Read and merge the configuration of `workspace`, the directory that holds `.nixbox`.

    `sources` serve plugins from GitHub and files in Nix's language; without them there are none. Raises one
    ConfigError whose `faults` name every fault of every file and of the command line, and what `sources` raise for
    GitHub.
    """
    overrides = overrides or Overrides()
    workspace = workspace.resolve()
    reading = _Reading(workspace, sources or Sources())
    user = reading.user()
    reading.base = user["base"] if user.get("base") in schema.BASES else "debian"
    config = reading.check(Config, user, reading.user_label)
    command = reading.command_line(overrides)
    used = list(filter(None, reading.used(_plugin_refs(user))))
    profile_name = overrides.profile or user.get("profile")
    profile = reading.profile(profile_name, "--profile" if overrides.profile else "profile")
    if reading.faults or config is None or command is None:
        raise _error(reading.faults)

    said: list[tuple[str, Config | Profile | Plugin, str | None]]
    said = [(f"plugin {found.ref}", plugin, found.name) for found, plugin in used]
    said += [(f"profile {profile_name}", profile, None)] if profile else []
    said += [(reading.user_file, config, None)]
    layers = [(DEFAULT, _defaults(workspace, config))]
    layers += [(origin, _layer(model, reading.base, whose)) for origin, model, whose in said]
    layers += [(COMMAND_LINE, _layer(command, reading.base))]
    values, origins = merge(layers)
    return Loaded(
        workspace,
        _settings(values, origins),
        origins,
        tuple(reading.files),
        tuple(reading.absent),
        plugins=tuple(_used(found, plugin) for found, plugin in used),
        unserved=_unserved([(origin, model) for origin, model, _ in said], reading.base),
        lasting=reading.lasting,
    )


def load_plugin(workspace: Path, ref: str, sources: Sources) -> tuple[plugins.Found, Plugin]:
    """One plugin, whether the workspace uses it or not. Raises ConfigError with every fault of it."""
    reading = _Reading(workspace.resolve(), sources)
    base = reading.user().get("base")
    reading.base = base if base in schema.BASES else "debian"
    reading.faults.clear()  # of the workspace's own config, which is not asked for
    reading.user_label = "plugin"
    if fault := fields.plugin_fault(ref):
        raise ConfigError(fault)
    found = next(iter(reading.used([ref])), None)
    if found is None or reading.faults:
        raise ConfigError(f"the plugin {shown(ref)} cannot be used", faults=reading.faults)
    return found


def user_settings(path: Path) -> schema.UserSettings:
    """The user's settings.toml. Raises one ConfigError with every fault of it."""
    reading = _Reading(Path(os.devnull), Sources())  # no workspace: the file is called by its whole path
    data = reading.toml(path)
    found = None if data is None else reading.check(schema.UserSettings, data, reading.label(path))
    if found is None:
        raise ConfigError(
            f"{path} has a fault",
            '[templates] limit = "20GiB" and [krun] library = "/PATH/libkrun.so" are all that it may hold',
            reading.faults,
        )
    return found


def _error(faults: Iterable[str]) -> ConfigError:
    unique = list(dict.fromkeys(faults))
    count = "a fault" if len(unique) == 1 else f"{len(unique)} faults"
    hint = "`nixbox init` in an empty directory writes a config.toml that shows every field"
    return ConfigError(f"the configuration has {count}", hint, unique)


# --- reading ---------------------------------------------------------------------------------------------


class _Reading:
    """Files read so far and every fault found on the way; nothing here raises for bad input."""

    def __init__(self, workspace: Path, sources: Sources) -> None:
        self.workspace = workspace
        self.sources = sources
        self.base: str = "debian"
        self.files: list[Path] = []
        self.absent: list[Path] = []  # a file that appeared there would be read instead of another one
        self.faults: list[str] = []
        self.lasting = True
        self.user_file = USER
        self.user_label = self.label(workspace / paths.CONFIG_DIR / USER)

    def user(self) -> Mapping[str, Any]:
        """The user's own config, in TOML or else in Nix; empty after a fault."""
        path, nix = (self.workspace / paths.CONFIG_DIR / name for name in (USER, paths.NIX_CONFIG_FILE))
        if path.exists() or not nix.is_file():
            return self.toml(path) or {}
        self.absent.append(path)
        self.user_file, self.user_label = nix.name, self.label(nix)
        return self.nix(self.sources.config, nix, self.user_label) or {}

    def nix(self, evaluate: Callable[[Path], Mapping[str, Any]], path: Path, label: str) -> Mapping[str, Any] | None:
        """What Nix makes of a file; None after a fault."""
        self.lasting = False  # it may ask for what is in no file
        try:
            data = plugins.evaluated(evaluate, path)
        except PluginFault as fault:
            self.faults.append(f"{label}: {fault}")
            return None
        packages = data.get("packages")  # in that language they are attributes of nixpkgs, whatever the base is
        return {**data, "packages": {"nixpkgs": packages}} if isinstance(packages, list) else data

    def label(self, path: Path) -> str:
        """How a file is called in a fault: relative to the workspace if it lies inside."""
        return str(path.relative_to(self.workspace) if path.is_relative_to(self.workspace) else path)

    def toml(self, path: Path, label: str | None = None) -> dict[str, Any] | None:
        """The parsed file, which faults call `label`; None after a fault."""
        label = label or self.label(path)
        try:
            text = path.read_bytes().decode()
            if path not in self.files:
                self.files.append(path)
            return tomllib.loads(text)
        except OSError as error:
            self.faults.append(f"{label}: cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            self.faults.append(f"{label}: line {line}: is not valid UTF-8 text")
        except RecursionError:
            self.faults.append(f"{label}: is nested too deeply")
        except tomllib.TOMLDecodeError as error:
            self.faults.append(f"{label}: {_syntax_fault(text, str(error))}")
        except ValueError:
            self.faults.append(f"{label}: holds a number of more digits than can be read")
        return None

    def check(self, model: type[M], data: Mapping[str, Any], label: str) -> M | None:
        found, faults = schema.validate(model, data, self.base)
        self.faults += [f"{label}: {fault}" for fault in faults]
        return found

    def command_line(self, overrides: Overrides) -> Config | None:
        """The overrides as a config of their own, so that they are checked by the same rules."""
        resources = {"vcpus": overrides.vcpus, "memory": overrides.memory}
        machine = {"backend": overrides.backend} if overrides.backend is not None else {}
        data: dict[str, Any] = {
            "resources": {key: value for key, value in resources.items() if value is not None},
            "env": dict(overrides.env) | {name: {"from_host": name} for name in overrides.env_from_host},
        }
        if machine:
            data["machine"] = machine
        if overrides.profile is not None:
            data["profile"] = overrides.profile
        found, faults = schema.validate(Config, data)
        self.faults += [f"{_option(fault, overrides)}: {fault.message}" for fault in faults]
        return found

    def used(self, named: Sequence[Any]) -> Iterator[tuple[plugins.Found, Plugin] | None]:
        """The plugins that `plugins` means; an entry that is malformed is a fault already."""
        good = {i: ref for i, ref in enumerate(named) if fields.is_plugin_ref(ref)}
        pinned = [ref for ref in good.values() if refs.is_github(ref)]
        where = self.sources.pinned(pinned) if pinned else {}
        if pinned:
            self.files.append(self.workspace / paths.CONFIG_DIR / paths.LOCK_FILE)  # it says which revisions they are
        names: dict[str, plugins.Found] = {}
        for i, ref in good.items():
            try:
                found = plugins.find(ref, self.workspace, where)
            except PluginFault as fault:
                self.faults.append(f"{self.user_label}: plugins[{i}]: {fault}")
                continue
            other = names.setdefault(found.name, found)
            if other.source != found.source:
                words = f"{shown(ref)} is called `{found.name}`, as {shown(other.ref)} is"
                self.faults.append(f"{self.user_label}: plugins[{i}]: {words}")
            plugin = self.plugin(found)
            yield (found, plugin) if plugin is not None else None

    def plugin(self, found: plugins.Found) -> Plugin | None:
        """What a plugin says; None after a fault."""
        label = self.label(found.source / found.file.name)
        if found.file.name == plugins.NIX:
            data = self.nix(self.sources.plugin, found.file, label)
        else:
            data = self.toml(found.file, label)
        plugin = None if data is None else self.check(Plugin, data, label)
        for i, command in enumerate(plugin.commands if plugin else ()):
            run = command.run or f"commands/{command.name}"
            program = found.directory / run
            if not os.access(program, os.X_OK) or not program.is_file():
                what = "is not there" if not program.exists() else "is no executable file (chmod +x)"
                self.faults.append(f"{label}: commands[{i}].run: {run} {what}")
        if plugin and plugin.commands and found.name in RESERVED:
            words = f"`{found.name}` is nixbox's own command; call the plugin's directory otherwise"
            self.faults.append(f"{label}: commands: {words}")
        return plugin

    def profile(self, name: object, asked_by: str) -> Profile | None:
        """The profile `name` of the workspace or else of the user; `asked_by` is the field or option."""
        if not isinstance(name, str) or not is_name(name):
            return None
        places = [self.workspace / paths.CONFIG_DIR / "profiles", paths.user_config_dir() / "profiles"]
        candidates = [place / f"{name}.toml" for place in places]
        path = next((p for p in candidates if p.is_file()), None)
        self.absent += candidates[: candidates.index(path)] if path else []
        if path is None:
            known = sorted({p.stem for place in places for p in place.glob("*.toml")})
            close = fields.near(name, known, most=3)
            label = asked_by if asked_by.startswith("--") else f"{self.user_label}: {asked_by}"
            where = " and ".join(self.label(place) for place in places)
            self.faults.append(f"{label}: no profile {shown(name)}{close}: looked for {name}.toml in {where}")
            return None
        data = self.toml(path)
        return None if data is None else self.check(Profile, data, self.label(path))


def _plugin_refs(user: Mapping[str, Any]) -> list[Any]:
    refs = user.get("plugins")
    return refs if isinstance(refs, list) else []


def _option(fault: Fault, overrides: Overrides) -> str:
    """The command line option a fault is about."""
    options = {
        "profile": "--profile",
        "resources.vcpus": "--cpus",
        "resources.memory": "--memory",
        "machine.backend": "--backend",
    }
    if fault.path in options:
        return options[fault.path]
    name = fault.path.removeprefix("env.").removesuffix(".from_host")
    hosts = overrides.env_from_host
    return f"--env-from-host {name}" if name.strip('"') in hosts else f"--env {name}"


def _syntax_fault(text: str, message: str) -> str:
    """A TOML syntax error with its line, column and the line itself, unless that may hold a secret."""
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    # tomllib says "(at line 3, column 5)" or "(at end of document)".
    place = re.search(r"\(at line (\d+), column (\d+)\)$", message)
    number, column = (int(place[1]), int(place[2])) if place else (len(lines), len(lines[-1]) + 1)
    line = lines[number - 1].strip() if number <= len(lines) else ""
    header = next((x for x in reversed(lines[:number]) if x.lstrip().startswith("[")), "")
    if not line.startswith("[") and (re.match(r"\s*\[\s*env\b", header) or re.match(r"env\b", line)):
        key, equals, _ = line.partition("=")
        line = f"{key}= {HIDDEN}" if equals else HIDDEN
    what = re.sub(r" \(at .*\)$", "", message)
    return f"line {number}, column {column}: {what}: {shown(line, most=100)}"


# --- merging ---------------------------------------------------------------------------------------------


def merge(layers: Sequence[tuple[str, Layer]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Lay (origin, layer) pairs over each other: lists concatenate without doubles, else the last wins.

    Returns the values by field path and the origin of each leaf; entries of a list have their own ("a[0]").
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for path, value in layer.items():
            if not isinstance(value, list):
                values[path], origins[path] = value, origin
                continue
            entries = values.setdefault(path, [])
            for entry in value:
                if entry not in entries:
                    origins[f"{path}[{len(entries)}]"] = origin
                    entries.append(entry)
            origins.pop(path, None)
            if not entries:  # an empty list is a leaf of its own
                origins[path] = origin
    return values, origins


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one layer: {"a": {"b": 1}} becomes {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _unserved(named: Iterable[tuple[str, Profile | Plugin | Config]], base: str) -> tuple[tuple[str, str], ...]:
    """Who names packages for the other base only, and which."""
    found = []
    for origin, model in named:
        for table in (model.packages, getattr(model, "sidecar_packages", None)):
            if isinstance(table, schema.PackageTable) and not getattr(table, base):
                found += [(origin, name) for other in schema.BASES if other != base for name in getattr(table, other)]
    return tuple(found)


def _used(found: plugins.Found, plugin: Plugin) -> Used:
    commands = tuple(Command(c.name, c.description, c.run or f"commands/{c.name}") for c in plugin.commands)
    return Used(found.name, found.ref, found.directory, found.source, plugin.description, commands)


def _layer(
    model: Config | Profile | Plugin, base: str, plugin: str | None = None, *, defaults: bool = False
) -> dict[str, Any]:
    """What a file says, as a layer; with `defaults` also what it leaves unsaid. `plugin` is whose file it is."""
    tree = model.model_dump(by_alias=True, exclude_unset=not defaults)
    tree.pop("description", None)
    tree.pop("commands", None)
    for field in {"packages", "sidecar_packages"} & tree.keys():
        tree[field] = schema.packages_for(tree[field], base)
    if "build" in tree:
        tree["build"] = [tree["build"]]
    if "disk" in tree:  # a profile's; it stands where the user's own would
        tree["resources"] = {"disk": tree.pop("disk")["size"]}
    if "mounts" in tree:
        tree["mounts"] = [Mount(**mount) for mount in tree["mounts"]]
    if "ports" in tree:
        tree["ports"] = [Published(**port) for port in tree["ports"]]
    if "seeds" in tree:
        tree["seeds"] = [Seed(**{**seed, "exclude": tuple(seed.get("exclude", ()))}) for seed in tree["seeds"]]
    for event, hooks in tree.get("hooks", {}).items():
        tables = [{"run": hook} if isinstance(hook, str) else hook for hook in hooks]
        tree["hooks"][event] = [Hook(plugin=plugin, **table) for table in tables]
    for name, value in tree.get("env", {}).items():
        entry = EnvEntry(name, from_host=value["from_host"]) if isinstance(value, dict) else EnvEntry(name, value)
        tree["env"][name] = entry
    return flatten(tree)


def _defaults(workspace: Path, config: Config) -> dict[str, Any]:
    layer = _layer(Config(), "debian", defaults=True)
    layer |= {"name": default_name(workspace), "build": [], "build_network": False, "setup": None, "setup_env": False}
    layer |= {"requires_env": [], "sidecar": [], "sidecar_packages": []}
    if "mounts" in config.model_fields_set:
        layer["mounts"] = []  # the user's own list replaces the default one: it could not be taken away else
    return layer


def _settings(values: Mapping[str, Any], origins: Mapping[str, str]) -> Settings:
    def with_origin(path: str) -> tuple[tuple[str, str], ...]:
        return tuple((origins[f"{path}[{i}]"], script) for i, script in enumerate(values[path]))

    return Settings(
        name=values["name"],
        base=values["base"],
        profile=values["profile"],
        plugins=tuple(values["plugins"]),
        packages=tuple(values["packages"]),
        build=with_origin("build"),
        build_network=values["build_network"],
        sidecar=tuple(values["sidecar"]),
        sidecar_packages=tuple(values["sidecar_packages"]),
        setup=values["setup"],
        setup_env=values["setup_env"],
        vcpus=values["resources.vcpus"],
        memory_mib=values["resources.memory"],
        disk_mib=values["resources.disk"],
        return_memory=values["resources.return_memory"],
        mounts=tuple(values["mounts"]),
        network_mode=values["network.mode"],
        domains=tuple(values["network.domains"]),
        ports=tuple(values["network.ports"]),
        allow_private=values["network.allow_private"],
        published=tuple(values["ports"]),
        env=tuple(value for path, value in values.items() if path.startswith("env.")),
        scripts=with_origin("scripts"),
        hooks={event: tuple(values[f"hooks.{event}"]) for event in schema.EVENTS},
        seeds=tuple(values["seeds"]),
        requires_env=with_origin("requires_env"),
        ld_libraries=tuple(values["ld_libraries"]),
        debian_mirror=values["debian.mirror"],
        debian_security_mirror=values["debian.security_mirror"],
        suite=values["debian.suite"],
        nixpkgs=values["nixpkgs.source"],
        allow_unfree=values["nixpkgs.allow_unfree"],
        accelerator=values["machine.accelerator"],
        backend=values["machine.backend"],
    )
