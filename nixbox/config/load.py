"""From files and command line to one checked, merged `Settings` that knows where each value came from."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from nixbox import paths
from nixbox.config import schema
from nixbox.config.names import default_name, is_name, shown
from nixbox.config.schema import Config, Fault, Plugin, Profile
from nixbox.config.settings import EnvEntry, Loaded, Mount, Overrides, Published, Settings
from nixbox.errors import ConfigError

DEFAULT = "default"
USER = paths.CONFIG_FILE
COMMAND_LINE = "command line"
HIDDEN = "(hidden)"

# A layer is one source's values by field path ("resources.vcpus"); lists and everything else are leaves.
Layer: TypeAlias = Mapping[str, Any]
M = TypeVar("M", Config, Profile, Plugin, schema.UserSettings)


def load(workspace: Path, overrides: Overrides | None = None) -> Loaded:
    """Read and merge the configuration of `workspace`, the directory that holds `.nixbox`.

    Raises one ConfigError whose `faults` name every fault of every file and of the command line.
    """
    overrides = overrides or Overrides()
    workspace = workspace.resolve()
    reading = _Reading(workspace)
    user = reading.toml(workspace / paths.CONFIG_DIR / paths.CONFIG_FILE) or {}
    reading.base = user["base"] if user.get("base") in schema.BASES else "debian"
    config = reading.check(Config, user, reading.user_label)
    command = reading.command_line(overrides)
    plugins = [reading.plugin(i, ref) for i, ref in enumerate(_plugin_refs(user))]
    profile_name = overrides.profile or user.get("profile")
    profile = reading.profile(profile_name, "--profile" if overrides.profile else "profile")
    if reading.faults or config is None or command is None:
        raise _error(reading.faults)

    layers = [(DEFAULT, _defaults(workspace, config))]
    layers += [(f"plugin {ref}", _layer(p, reading.base)) for ref, p in filter(None, plugins)]
    layers += [(f"profile {profile_name}", _layer(profile, reading.base))] if profile else []
    layers += [(USER, _layer(config, reading.base)), (COMMAND_LINE, _layer(command, reading.base))]
    values, origins = merge(layers)
    return Loaded(workspace, _settings(values, origins), origins, tuple(reading.files), tuple(reading.absent))


def user_settings(path: Path) -> schema.UserSettings:
    """The user's settings.toml. Raises one ConfigError with every fault of it."""
    reading = _Reading(Path(os.devnull))  # no workspace: the file is called by its whole path
    data = reading.toml(path)
    found = None if data is None else reading.check(schema.UserSettings, data, reading.label(path))
    if found is None:
        raise ConfigError(
            f"{path} has a fault", '[templates] limit = "20GiB" is all that it may hold', reading.faults
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

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.base: str = "debian"
        self.files: list[Path] = []
        self.absent: list[Path] = []  # a file that appeared there would be read instead of another one
        self.faults: list[str] = []
        self.user_label = self.label(workspace / paths.CONFIG_DIR / paths.CONFIG_FILE)

    def label(self, path: Path) -> str:
        """How a file is called in a fault: relative to the workspace if it lies inside."""
        return str(path.relative_to(self.workspace) if path.is_relative_to(self.workspace) else path)

    def toml(self, path: Path) -> dict[str, Any] | None:
        """The parsed file; None after a fault."""
        try:
            text = path.read_bytes().decode()
            if path not in self.files:
                self.files.append(path)
            return tomllib.loads(text)
        except OSError as error:
            self.faults.append(f"{self.label(path)}: cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            self.faults.append(f"{self.label(path)}: line {line}: is not valid UTF-8 text")
        except RecursionError:
            self.faults.append(f"{self.label(path)}: is nested too deeply")
        except tomllib.TOMLDecodeError as error:
            self.faults.append(f"{self.label(path)}: {_syntax_fault(text, str(error))}")
        except ValueError:
            self.faults.append(f"{self.label(path)}: holds a number of more digits than can be read")
        return None

    def check(self, model: type[M], data: Mapping[str, Any], label: str) -> M | None:
        found, faults = schema.validate(model, data, self.base)
        self.faults += [f"{label}: {fault}" for fault in faults]
        return found

    def command_line(self, overrides: Overrides) -> Config | None:
        """The overrides as a config of their own, so that they are checked by the same rules."""
        resources = {"vcpus": overrides.vcpus, "memory": overrides.memory}
        data: dict[str, Any] = {
            "resources": {key: value for key, value in resources.items() if value is not None},
            "env": dict(overrides.env) | {name: {"from_host": name} for name in overrides.env_from_host},
        }
        if overrides.profile is not None:
            data["profile"] = overrides.profile
        found, faults = schema.validate(Config, data)
        self.faults += [f"{_option(fault, overrides)}: {fault.message}" for fault in faults]
        return found

    def plugin(self, index: int, ref: object) -> tuple[str, Plugin] | None:
        """The plugin that entry `index` of `plugins` means; an entry that is malformed is a fault already."""
        if not isinstance(ref, str) or not schema.is_plugin_ref(ref):
            return None
        home = paths.plugins_dir()
        # Without a home directory `~` stays as it is, and the file is not found.
        place = self.workspace / _expand(ref) if schema.is_plugin_path(ref) else home / ref
        path = place / "plugin.toml"
        if not path.is_file():
            known = [p.parent.name for p in home.glob("*/plugin.toml")]
            close = "" if schema.is_plugin_path(ref) else schema.near(ref, known)
            where = f"{self.label(path)} is not there"
            self.faults.append(f"{self.user_label}: plugins[{index}]: no plugin {shown(ref)}{close}: {where}")
            return None
        data = self.toml(path)
        found = None if data is None else self.check(Plugin, data, self.label(path))
        return (ref, found) if found else None

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
            close = schema.near(name, known, most=3)
            label = asked_by if asked_by.startswith("--") else f"{self.user_label}: {asked_by}"
            where = " and ".join(self.label(place) for place in places)
            self.faults.append(f"{label}: no profile {shown(name)}{close}: looked for {name}.toml in {where}")
            return None
        data = self.toml(path)
        return None if data is None else self.check(Profile, data, self.label(path))


def _expand(ref: str) -> Path:
    try:
        return Path(ref).expanduser()
    except RuntimeError:
        return Path(ref)


def _plugin_refs(user: Mapping[str, Any]) -> list[Any]:
    refs = user.get("plugins")
    return refs if isinstance(refs, list) else []


def _option(fault: Fault, overrides: Overrides) -> str:
    """The command line option a fault is about."""
    options = {"profile": "--profile", "resources.vcpus": "--cpus", "resources.memory": "--memory"}
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


def _layer(model: Config | Profile | Plugin, base: str, *, defaults: bool = False) -> dict[str, Any]:
    """What a file says, as a layer; with `defaults` also what it leaves unsaid."""
    tree = model.model_dump(by_alias=True, exclude_unset=not defaults)
    tree.pop("description", None)
    if "packages" in tree:
        tree["packages"] = schema.packages_for(tree["packages"], base)
    if "build" in tree:
        tree["build"] = [tree["build"]]
    if "disk" in tree:  # a profile's; it stands where the user's own would
        tree["resources"] = {"disk": tree.pop("disk")["size"]}
    if "mounts" in tree:
        tree["mounts"] = [Mount(**mount) for mount in tree["mounts"]]
    if "ports" in tree:
        tree["ports"] = [Published(**port) for port in tree["ports"]]
    for name, value in tree.get("env", {}).items():
        entry = EnvEntry(name, from_host=value["from_host"]) if isinstance(value, dict) else EnvEntry(name, value)
        tree["env"][name] = entry
    return flatten(tree)


def _defaults(workspace: Path, config: Config) -> dict[str, Any]:
    layer = _layer(Config(), "debian", defaults=True)
    layer |= {"name": default_name(workspace), "build": [], "build_network": False, "setup": None, "setup_env": False}
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
        debian_mirror=values["debian.mirror"],
        debian_security_mirror=values["debian.security_mirror"],
        suite=values["debian.suite"],
        accelerator=values["machine.accelerator"],
    )


# --- showing ---------------------------------------------------------------------------------------------


def to_json(loaded: Loaded) -> dict[str, Any]:
    """`{"settings": …, "origins": …}`: fields as in config.toml, sizes in MiB, literals in `env` masked."""
    return {"settings": _tree(loaded.settings), "origins": dict(loaded.origins)}


def _tree(settings: Settings) -> dict[str, Any]:
    """The settings in the shape of config.toml, free of secrets."""
    env = {e.name: {"from_host": e.from_host} if e.from_host else HIDDEN for e in settings.env}
    return {
        "name": settings.name,
        "profile": settings.profile,
        "base": settings.base,
        "plugins": list(settings.plugins),
        "packages": list(settings.packages),
        "build": [script for _, script in settings.build],
        "build_network": settings.build_network,
        "setup": settings.setup,
        "setup_env": settings.setup_env,
        "scripts": [script for _, script in settings.scripts],
        "resources": {
            "vcpus": settings.vcpus,
            "memory": settings.memory_mib,
            "disk": settings.disk_mib,
            "return_memory": settings.return_memory,
        },
        "mounts": [dataclasses.asdict(mount) for mount in settings.mounts],
        "network": {
            "mode": settings.network_mode,
            "domains": list(settings.domains),
            "ports": list(settings.ports),
            "allow_private": settings.allow_private,
        },
        "ports": [dataclasses.asdict(port) for port in settings.published],
        "env": env,
        "hooks": {event: list(commands) for event, commands in settings.hooks.items()},
        "debian": {
            "mirror": settings.debian_mirror,
            "security_mirror": settings.debian_security_mirror,
            "suite": settings.suite,
        },
        "machine": {"accelerator": settings.accelerator},
    }


def render(loaded: Loaded) -> str:
    """One line per field for people, "field = value   # origin", literal `env` values masked."""
    tree = _tree(loaded.settings)
    tree["resources"] |= {
        "memory": schema.format_size(loaded.settings.memory_mib),
        "disk": schema.format_size(loaded.settings.disk_mib),
    }
    env = {f"env.{name}": value for name, value in tree.pop("env").items()}
    rows: list[tuple[str, str]] = []
    for path, value in (flatten(tree) | env).items():
        entries = {f"{path}[{i}]": entry for i, entry in enumerate(value)} if isinstance(value, list) else {}
        rows += [(leaf, f"{leaf} = {_shown_value(v)}") for leaf, v in (entries or {path: value}).items()]
    width = min(60, max(len(text) for _, text in rows))
    return "\n".join(f"{text:<{width}}   # {loaded.origins[path]}" for path, text in rows)


def _shown_value(value: object) -> str:
    """A value nearly as TOML writes it; of a script only the first line."""
    if value is None:
        return "(unset)"
    if value == HIDDEN:
        return HIDDEN
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_shown_value(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, str) and "\n" in value.strip():
        lines = value.strip().splitlines()
        return f"{json.dumps(lines[0], ensure_ascii=False)} … ({len(lines)} lines)"
    return json.dumps(value, ensure_ascii=False)
