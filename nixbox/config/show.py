"""The merged configuration as people and programs read it, free of secrets."""

from __future__ import annotations

import json
from typing import Any

from nixbox.config import fields
from nixbox.config.load import HIDDEN, flatten
from nixbox.config.settings import Hook, Loaded, Settings
from nixbox.values import asdict


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
        "sidecar": list(settings.sidecar),
        "sidecar_packages": list(settings.sidecar_packages),
        "setup": settings.setup,
        "setup_env": settings.setup_env,
        "scripts": [script for _, script in settings.scripts],
        "resources": {
            "vcpus": settings.vcpus,
            "memory": settings.memory_mib,
            "disk": settings.disk_mib,
            "return_memory": settings.return_memory,
        },
        "mounts": [asdict(mount) for mount in settings.mounts],
        "network": {
            "mode": settings.network_mode,
            "domains": list(settings.domains),
            "ports": list(settings.ports),
            "allow_private": settings.allow_private,
        },
        "ports": [asdict(port) for port in settings.published],
        "env": env,
        "hooks": {event: [_hook(one) for one in hooks] for event, hooks in settings.hooks.items()},
        "seeds": [_set(asdict(seed)) for seed in settings.seeds],
        "requires_env": [name for _, name in settings.requires_env],
        "ld_libraries": list(settings.ld_libraries),
        "debian": {
            "mirror": settings.debian_mirror,
            "security_mirror": settings.debian_security_mirror,
            "suite": settings.suite,
        },
        "nixpkgs": {"source": settings.nixpkgs, "allow_unfree": settings.allow_unfree},
        "machine": {"accelerator": settings.accelerator, "backend": settings.backend},
    }


def _hook(hook: Hook) -> Any:
    return {"run": hook.run, "required": True} if hook.required else hook.run


def _set(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in table.items() if value is not None
    }


def render(loaded: Loaded) -> str:
    """One line per field for people, "field = value   # origin", literal `env` values masked."""
    tree = _tree(loaded.settings)
    tree["resources"] |= {
        "memory": fields.format_size(loaded.settings.memory_mib),
        "disk": fields.format_size(loaded.settings.disk_mib),
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
