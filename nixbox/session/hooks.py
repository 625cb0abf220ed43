"""The user's and the plugins' own programs on the host: hooks, and what these and plugin commands are told."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from nixbox import paths, run
from nixbox.config.names import shown
from nixbox.digests import sha256
from nixbox.errors import NixboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.config.settings import Hook, Loaded, Used
    from nixbox.machine.record import MachineDir
    from nixbox.report import Reporter

EVENT = "NIXBOX_EVENT"
NAME = "NIXBOX_NAME"
WORKSPACE = "NIXBOX_WORKSPACE"


def called_for(workspace: Path) -> str | None:
    """The machine that a hook or a plugin command which called us works for; None when none of this workspace did."""
    return os.environ.get(NAME) if os.environ.get(WORKSPACE) == str(workspace) else None


def is_nested(machine: MachineDir) -> bool:
    """Whether a hook of this very machine called us: its hooks are not run again."""
    return EVENT in os.environ and called_for(machine.workspace) == machine.name


def run_hooks(
    event: str,
    machine: MachineDir,
    loaded: Loaded,
    environ: Mapping[str, str],
    report: Reporter,
    also: Mapping[str, str] | None = None,
) -> None:
    """Run the hooks of an event, one after the other; plugins' come first. `also` are further variables for them.

    A failure is told and the next one runs; NixboxError for one that is required.
    """
    hooks = loaded.settings.hooks[event]
    if not hooks or is_nested(machine):
        return
    for hook in hooks:
        title = f"{event} hook of {hook.whose}"
        first = shown(hook.first_line, most=80)
        report.phase(f"{title}: {first}")
        report.done()  # the terminal is the hook's
        env = context(machine, environ, _plugin(hook, loaded)) | {EVENT: event} | dict(also or {})
        code = run.on_host(["sh", "-c", hook.run], env=env, cwd=machine.workspace)
        if code == 0:
            continue
        if hook.required:
            raise NixboxError(f"the {title} failed with exit code {code}: {first}", hint="it is required")
        report.note(f"warning: the {title} failed with exit code {code}: {first}")


def _plugin(hook: Hook, loaded: Loaded) -> Used | None:
    return next((used for used in loaded.plugins if used.name == hook.plugin), None)


def context(machine: MachineDir, environ: Mapping[str, str], plugin: Used | None) -> dict[str, str]:
    """The environment of a program on the host that works for a machine: the user's own, and what it is about."""
    programs = _programs()
    env = dict(environ) | {
        NAME: machine.name,
        WORKSPACE: str(machine.workspace),
        "NIXBOX": str(programs / "nixbox"),
        "PATH": f"{programs}:{environ.get('PATH', os.defpath)}",
    }
    if plugin is not None:
        env |= {"NIXBOX_PLUGIN": plugin.name, "NIXBOX_PLUGIN_DIR": str(plugin.directory)}
    return env


def _programs() -> Path:
    """A directory with `nixbox`, this very program, and `nixbox-python`, a Python that can import it."""
    own = Path(sys.argv[0]).absolute()
    python = [sys.executable]
    if sys.prefix == sys.base_prefix:  # not a virtual environment, which knows its packages by itself
        python = ["env", f"PYTHONPATH={':'.join(filter(None, sys.path))}", *python]
    is_program = own.name == "nixbox" and os.access(own, os.X_OK)
    texts = {
        "nixbox": _script([str(own)] if is_program else [*python, "-m", "nixbox"]),
        "nixbox-python": _script(python),
    }
    ident = sha256(repr(sorted(texts.items())).encode()).hexdigest()[:12]
    place = paths.private_dir(paths.private_dir(paths.state_dir()) / "programs") / ident
    for name, text in texts.items():
        if not (place / name).exists():
            paths.private_dir(place)
            paths.write_atomic(place / name, text, mode=0o700)
    return place


def _script(argv: list[str]) -> str:
    return f'#!/bin/sh\nexec {shlex.join(argv)} "$@"\n'
