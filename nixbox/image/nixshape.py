"""What a plugin or config in Nix's language comes to, put into the shape of plugin.toml or config.toml.

The bash nixbox took several spellings of most fields; all are taken here. What is left over is a fault that names
the field and what is accepted: nothing is dropped. Values are judged by the models, later.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from nixbox.image.nixvalue import PACKAGE, Node, Place, Reader, merged

Shape: TypeAlias = Callable[[Node, Place], tuple[dict[str, Any], list[str]]]


def hint(place: Place) -> str:
    """What to do about faults."""
    names = [name for name, meant in _meant(_Shaper(place).fields()).items() if name == meant]
    return f"a {'plugin' if place.of_plugin else 'config'} may have {', '.join(names)}"


def plugin(node: Node, place: Place) -> tuple[dict[str, Any], list[str]]:
    """A plugin in the shape of plugin.toml, and its faults."""
    reader = _Shaper(place)
    data = reader.whole(node)
    if found := reader.commands():
        data["commands"] = found
    return data, reader.faults


def config(node: Node, place: Place) -> tuple[dict[str, Any], list[str]]:
    """A config in the shape of config.toml, and its faults."""
    reader = _Shaper(place)
    data = reader.whole(node)
    network = data.get("network", {})
    if network.get("domains") and "mode" not in network:
        # A list of what is allowed meant that the rest is not; the default here is open.
        data["network"] = {"mode": "filtered"} | network
    return data, reader.faults


_NIX = {"packages": "packages", "ldLibraries": "ld_libraries", "ld_libraries": "ld_libraries"}
_NETWORK = {
    "domains": "domains",
    "allowedDomains": "domains",
    "allowed_domains": "domains",
    "allow": "domains",
    "ports": "ports",
    "allowedPorts": "ports",
    "allowed_ports": "ports",
    "mode": "mode",
    "allowPrivate": "allow_private",
    "allow_private": "allow_private",
}
_MOUNT = {
    "source": "source",
    "src": "source",
    "host": "source",
    "hostPath": "source",
    "target": "target",
    "dst": "target",
    "guest": "target",
    "guestPath": "target",
    "readOnly": "readonly",
    "readonly": "readonly",
    "read_only": "readonly",
    "ro": "readonly",
}
_RESOURCES = {
    "vcpus": "vcpus",
    "cpus": "vcpus",
    "cpu": "vcpus",
    "memory": "memory",
    "mem": "memory",
    "disk": "disk",
    "diskSize": "disk",
    "disk_size": "disk",
    "return_memory": "return_memory",
    "returnMemory": "return_memory",
}
_HOOKS = ("pre-up", "post-up", "pre-down", "post-down")
_HOOK = {"run": "run", "command": "run", "required": "required"}
_FROM_HOST = {"from_host": "from_host", "fromHost": "from_host"}


def _meant(names: Iterable[str]) -> dict[str, str]:
    """The fields of a file, and which of their spellings mean the same."""
    return {name: _RESOURCES.get(name, {"requiresEnv": "requires_env"}.get(name, name)) for name in names}


class _Shaper(Reader):
    """The fields of a file, one method for each."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.called: list[str] = []  # packages that scripts call by their store path

    # --- the whole ---------------------------------------------------------------------------------------

    def fields(self) -> dict[str, Callable[[Node, str], Any]]:
        """The fields of the file, each with its reader; a reader's None leaves the field out."""
        common: dict[str, Callable[[Node, str], Any]] = {
            "nix": self.nix,
            "packages": self.package_table,
            "mounts": self.mounts,
            "network": self.network,
            "scripts": self.scripts,
            "hooks": self.hooks,
        }
        if self.place.of_plugin:
            more: dict[str, Callable[[Node, str], Any]] = {
                "name": self.plain_text,
                "description": self.plain_text,
                "requires_env": self.plain_texts,
                "requiresEnv": self.plain_texts,
            }
            return common | more
        own: dict[str, Callable[[Node, str], Any]] = {
            "plugins": self.plugins,
            "env": self.env,
            "resources": self.resources,
            "ports": self.published,
            "name": self.plain_text,
            "profile": self.plain_text,
            "base": self.plain_text,
        }
        return common | own | dict.fromkeys(_RESOURCES, self.amount)

    def whole(self, node: Node) -> dict[str, Any]:
        if node.kind != "set":
            self.wrong(node, "", "an attribute set, or a function of { pkgs, lib, ... } that gives one")
            return {}
        fields = self.fields()
        data: dict[str, Any] = {}
        for name, entry in node.value.items():
            if name == "env" and self.place.of_plugin:
                words = "a plugin cannot set variables: secrets are always named in the user's own config, [env]"
                self.fault(entry, name, f"{words}; say which the plugin needs with requires_env")
            elif name not in fields:
                self.unknown(entry, name, name, _meant(fields))
            elif (value := fields[name](entry, name)) is not None:
                self.put(data, entry, name, value)
        if self.called:
            self.put(data, node, "packages", self.called)
        return {name: value for name, value in data.items() if value not in ([], {})}

    def put(self, data: dict[str, Any], node: Node, name: str, value: Any) -> None:
        """Lay a field where the TOML has it; lists of two spellings of a field add up."""
        parts = {name: value}
        if name == "nix":
            parts = value
        elif name == "requiresEnv":
            parts = {"requires_env": value}
        elif name in _RESOURCES:
            parts = {"resources": {_RESOURCES[name]: value}}
        elif name == "name" and self.place.of_plugin:
            return  # its directory is its name
        for key, part in parts.items():
            old = data.get(key)
            if key == "packages" and isinstance(old, dict) != isinstance(part, dict) and old is not None:
                # A list is of nixpkgs' names; beside a table it is that table's.
                old, part = ({"nixpkgs": x} if isinstance(x, list) else x for x in (old, part))
            if isinstance(old, list) and isinstance(part, list):
                data[key] = merged(old, part)
            elif key == "packages" and isinstance(old, dict):
                data[key] = {base: merged(old.get(base, []), part.get(base, [])) for base in [*part, *old]}
            elif isinstance(old, dict) and isinstance(part, dict) and not old.keys() & part.keys():
                data[key] = old | part
            elif old is None:
                data[key] = part
            else:
                self.fault(node, name, "is said twice, under two names")

    # --- packages ----------------------------------------------------------------------------------------

    def nix(self, node: Node, name: str) -> dict[str, list[str]]:
        accepted = "an attribute set of packages and ldLibraries"
        return {key: self.package_list(entry, path) for key, path, entry in self.table(node, name, _NIX, accepted)}

    def package_table(self, node: Node, name: str) -> list[str] | dict[str, list[str]]:
        if node.kind != "set":
            return self.package_list(node, name)
        bases = {"debian": "debian", "nixpkgs": "nixpkgs"}
        return {key: self.package_list(entry, path) for key, path, entry in self.table(node, name, bases, "")}

    def package_list(self, node: Node, name: str) -> list[str]:
        found = []
        for path, entry in self.entries(node, name, "a list of packages"):
            whole = re.fullmatch(PACKAGE, entry.value) if entry.kind == "text" else None
            if entry.kind == "package":
                found.append(entry.value)
            elif whole and entry.has_packages:
                found.append(whole[1])
            elif entry.kind != "text":
                self.wrong(entry, path, "a package of `pkgs` or its attribute as text")
            elif self.unmarked(entry, path):
                found.append(entry.value)
        return merged([], found)

    # --- mounts ------------------------------------------------------------------------------------------

    def mounts(self, node: Node, name: str) -> list[dict[str, Any]]:
        accepted = 'a list of "source:target[:ro]" or { source; target; readOnly; }, or a set of target = source'
        if node.kind == "set":
            if {"source", "target"} <= {_MOUNT.get(key) for key in node.value}:
                return [self.mount_table(node, name)]
            return [self.mount_at(target, entry, f"{name}.{target}") for target, entry in node.value.items()]
        found = []
        for path, entry in self.entries(node, name, accepted):
            if entry.kind == "set":
                found.append(self.mount_table(entry, path))
            elif entry.kind == "text":
                found.append(self.mount_text(entry, path))
            else:
                self.wrong(entry, path, '"source:target[:ro]" or { source; target; readOnly; }')
        return found

    def mount_text(self, node: Node, name: str) -> dict[str, Any]:
        source, *rest = self.host_text(node, name).split(":")
        if len(rest) not in (1, 2) or rest[1:] not in ([], ["ro"], ["rw"]):
            self.fault(node, name, 'must be "source:target", "source:target:ro" or "source:target:rw"')
            return {}
        return {"source": source, "target": rest[0]} | ({"readonly": True} if rest[1:] == ["ro"] else {})

    def mount_table(self, node: Node, name: str, **given: str) -> dict[str, Any]:
        table: dict[str, Any] = dict(given)
        for key, path, entry in self.table(node, name, _MOUNT, "an attribute set"):
            if key in table:
                self.fault(entry, path, "is said twice, under two names")
            table[key] = self.flag(entry, path) if key == "readonly" else self.end(entry, path)
        for key in ("source", "target"):
            if key not in table:
                self.fault(node, f"{name}.{key}", "is missing")
        keys = [key for key in ("source", "target", "readonly") if key in table]
        return {key: table[key] for key in keys if key != "readonly" or table[key] is not False}

    def mount_at(self, target: str, node: Node, name: str) -> dict[str, Any]:
        if node.kind == "set":
            return self.mount_table(node, name, target=target)
        source, colon, how = self.end(node, name).rpartition(":")
        if colon and how in ("ro", "rw"):
            return {"source": source, "target": target} | ({"readonly": True} if how == "ro" else {})
        return {"source": source + colon + how, "target": target}

    def end(self, node: Node, name: str) -> str:
        """One end of a mount: text, or a path as Nix writes it."""
        if node.kind == "text":
            return self.host_text(node, name)
        if node.kind == "path":
            return self.host_path(node, name)
        self.wrong(node, name, "a path")
        return ""

    def host_text(self, node: Node, name: str) -> str:
        """Paths as text, in which `~` stands for the home directory however that was written.

        No other variable may be in it, and HOME nowhere but at a path's beginning.
        """
        home = self.place.environ.get("HOME", "").rstrip("/")
        text: str = node.value
        stays = "HOME" in node.variables and not home
        if "HOME" in node.variables and home:
            text = re.sub(rf"(^|:){re.escape(home)}(?=/|:|$)", r"\1~", text)
            stays = len(home) > 1 and home in text
        if stays or {*node.variables} - {"HOME"} or len(node.marks) > len(node.variables):
            self.unmarked(node, name)
        return re.sub(r"(^|:)(?:\$HOME|\$\{HOME\})(?=/|:|$)", r"\1~", text)

    def host_path(self, node: Node, name: str) -> str:
        """A path of Nix as a config has it: relative to the workspace, from the home directory, or absolute."""
        path, home = Path(node.value), self.place.environ.get("HOME", "")
        if self.place.of_plugin:
            if path.is_relative_to(self.place.directory):
                self.fault(node, name, "is the plugin's own; a plugin mounts what the user has")
            home = os.path.expanduser("~")  # noqa: PTH111 - it stays as it is without one
        elif path.is_relative_to(self.place.workspace):
            relative = path.relative_to(self.place.workspace)
            return str(relative) if relative == Path() else f"./{relative}"
        if home.startswith("/") and home != "/" and path.is_relative_to(home):
            return str(Path("~") / path.relative_to(home))
        return str(path)

    # --- network -----------------------------------------------------------------------------------------

    def network(self, node: Node, name: str) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, path, entry in self.table(node, name, _NETWORK, "an attribute set of domains, ports and mode"):
            if key in ("mode", "allow_private") and self.place.of_plugin:
                self.fault(entry, path, "a plugin cannot choose that; the user does, in the config's own `network`")
            elif key == "mode":
                data[key] = self.plain_text(entry, path)
            elif key == "allow_private":
                data[key] = self.flag(entry, path)
            elif key == "domains":
                # ".example.org" is how some tools write that subdomains count, which they do here.
                texts = [text.removeprefix(".") for text in self.plain_texts(entry, path)]
                data[key] = merged(data.get(key, []), texts)
            else:
                ports = [self.number(port, at) for at, port in self.entries(entry, path, "a list of ports")]
                data[key] = merged(data.get(key, []), ports)
        return {key: value for key, value in data.items() if value is not None and value != []}

    # --- scripts and hooks -------------------------------------------------------------------------------

    def scripts(self, node: Node, name: str) -> list[str]:
        if node.kind == "set":
            found: list[str | None] = []
            for key, entry in node.value.items():
                path = f"{name}.{key}"
                if re.match(r"on[A-Z-]", key) and key not in ("onStart", "onUp"):
                    self.fault(entry, path, "scripts run when the machine is up, and at no other time (onStart)")
                found += self.scripts(entry, path) if entry.kind in ("list", "set") else [self.script(entry, path)]
            return [text for text in found if text is not None]
        if node.kind != "list":
            one = self.script(node, name)
            return [] if one is None else [one]
        texts = [self.script(entry, path) for path, entry in self.entries(node, name, "")]
        return [text for text in texts if text is not None]

    def script(self, node: Node, name: str) -> str | None:
        """A script of the guest's; `${pkgs.jq}/bin/jq` in it is `jq`, which the image then has."""
        if node.kind == "path":
            return self.content(node, name)
        if node.kind != "text":
            self.wrong(node, name, "a script as text, or the path of a file")
            return None
        text: str = node.value
        if f"{self.place.directory}/" in text:
            self.fault(node, name, "holds the path of a file that the guest does not have: use builtins.readFile")
            return None
        if not node.has_packages or node.variables or node.files:
            return text if self.unmarked(node, name) else None
        self.called += re.findall(rf"{PACKAGE}/bin/", text)
        text = re.sub(rf"{PACKAGE}/bin/(?=[\w.+-])", "", text)
        if "/nixbox-package:" in text:
            words = "holds the store path of a package, and not of a program in its bin/"
            self.fault(node, name, f"{words}; no nixpkgs is evaluated here")
            return None
        return text

    def hooks(self, node: Node, name: str) -> dict[str, list[Any]]:
        spellings = dict(zip(_HOOKS, _HOOKS, strict=True))
        spellings |= {re.sub(r"-(.)", lambda m: m[1].upper(), event): event for event in _HOOKS}
        spellings |= {event.replace("-", "_"): event for event in _HOOKS}
        data: dict[str, list[Any]] = {}
        for event, path, entry in self.table(node, name, spellings, f"an attribute set of {', '.join(_HOOKS)}"):
            pairs = self.entries(entry, path, "") if entry.kind == "list" else [(path, entry)]
            found = [self.hook(one, at) for at, one in pairs]
            data.setdefault(event, []).extend(hook for hook in found if hook is not None)
        return {event: commands for event, commands in data.items() if commands}

    def hook(self, node: Node, name: str) -> str | dict[str, Any] | None:
        if node.kind == "set":
            table: dict[str, Any] = {}
            for key, path, entry in self.table(node, name, _HOOK, ""):
                table[key] = self.flag(entry, path) if key == "required" else self.hook(entry, path)
            if not isinstance(table.get("run"), str):
                self.fault(node, name, "must have `run`, a shell command")
                return None
            return {"run": table.pop("run")} | table
        if node.kind == "path":
            return self.program(node, name)
        if node.kind != "text":
            self.wrong(node, name, "a shell command, the path of a program, or { run; required; }")
            return None
        if node.has_packages:
            self.fault(
                node, name, "hooks run on this host, which has no package of the image: write the program's name"
            )
            return None
        return node.value if self.unmarked(node, name) else None

    def program(self, node: Node, name: str) -> str | None:
        """The shell command that runs a program of the plugin's or the workspace's own."""
        text = self.content(node, name)
        if text is None:
            return None
        path = Path(node.value)
        if self.place.of_plugin:
            command = f'"$NIXBOX_PLUGIN_DIR"/{shlex.quote(str(path.relative_to(self.place.directory)))}'
        else:
            command = shlex.quote(f"./{path.relative_to(self.place.workspace)}")
        if os.access(path, os.X_OK):
            return command
        first = text.partition("\n")[0]
        interpreter = first.removeprefix("#!").strip() if first.startswith("#!") else "sh"
        return f"{interpreter} {command}"

    def commands(self) -> list[dict[str, Any]]:
        """The executables in `commands/`: what the plugin offers on the host."""
        place = self.place.directory / "commands"
        found = []
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if path.is_file() and os.access(path, os.X_OK) and not path.name.startswith("."):
                found.append({"name": path.name.removesuffix(path.suffix), "run": f"commands/{path.name}"})
        return found

    # --- of a config only --------------------------------------------------------------------------------

    def plugins(self, node: Node, name: str) -> list[str]:
        found = []
        for path, entry in self.entries(node, name, "a list of plugins"):
            if entry.kind == "path":
                text: str | None = self.host_path(entry, path)
            elif entry.kind == "text":
                text = self.host_text(entry, path)
            else:
                self.wrong(entry, path, "a plugin's name or its directory (not what is in it)")
                continue
            found.append(str(text).removesuffix("/default.nix"))
        return merged([], found)

    def env(self, node: Node, name: str) -> dict[str, Any]:
        if node.kind != "set":
            self.wrong(node, name, "an attribute set")
            return {}
        values = {key: self.variable(entry, f"{name}.{key}") for key, entry in node.value.items()}
        return {key: value for key, value in values.items() if value is not None}

    def variable(self, node: Node, name: str) -> str | dict[str, str] | None:
        if node.kind == "set":
            for _, path, entry in self.table(node, name, _FROM_HOST, ""):
                text = self.plain_text(entry, path)
                return None if text is None else {"from_host": text}
            return None
        if node.kind == "plain" and isinstance(node.value, int) and not isinstance(node.value, bool):
            return str(node.value)
        if node.kind != "text":
            self.wrong(node, name, 'text, or builtins.getEnv "NAME"')
            return None
        if node.variables:
            source = node.variables[0]
            if len(node.marks) == 1 and node.value == self.place.environ.get(source, ""):
                return {"from_host": source}
            words = "is made of the host's variable" if len(node.marks) == 1 else "is made of the host's variables"
            self.fault(
                node,
                name,
                f"{words} {', '.join(node.variables)}, and its value would be written down: hand over each alone, "
                f'{source} = builtins.getEnv "{source}", and put them together in a script',
            )
            return None
        return node.value if self.unmarked(node, name) else None

    def resources(self, node: Node, name: str) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, path, entry in self.table(node, name, _RESOURCES, "an attribute set of vcpus, memory and disk"):
            value = self.amount(entry, path)
            if key in data:
                self.fault(entry, path, "is said twice, under two names")
            elif value is not None:
                data[key] = value
        return data

    def amount(self, node: Node, name: str) -> int | str | bool | None:
        """A number, or a size with its unit; the models know which is which."""
        key = _RESOURCES[name.rpartition(".")[2]]
        if key == "return_memory":
            return self.flag(node, name)
        if node.kind == "text" and key != "vcpus" and not re.fullmatch(r"[0-9]+", node.value):
            return self.plain_text(node, name)
        return self.number(node, name)

    def published(self, node: Node, name: str) -> list[dict[str, Any]]:
        accepted = '{ host; guest; } or "host:guest"'
        found: list[dict[str, Any]] = []
        for path, entry in self.entries(node, name, f"a list of {accepted}"):
            match = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", entry.value) if entry.kind == "text" else None
            if match:
                found.append({"host": int(match[1]), "guest": int(match[2])} if self.unmarked(entry, path) else {})
            elif entry.kind == "set":
                ends = self.table(entry, path, {"host": "host", "guest": "guest"}, accepted)
                found.append({key: self.number(value, at) for key, at, value in ends})
            else:
                self.wrong(entry, path, accepted)
        return found
