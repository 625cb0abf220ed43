"""What every part of the command line uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nixbox.errors import NixboxError


def complete_machine(incomplete: str) -> list[str]:
    """Machine names of the workspace, for shell completion."""
    from nixbox import paths
    from nixbox.machine.record import all_machines

    try:
        workspace = paths.find_workspace(Path.cwd())
    except NixboxError:
        return []
    return [m.name for m in all_machines(workspace) if m.name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Machine = Annotated[
    str | None,
    typer.Option("--machine", "-m", help="Another machine than the default.", autocompletion=complete_machine),
]


def print_json(data: object) -> None:
    """Data on stdout, for machines."""
    print(json.dumps(data, indent=2, ensure_ascii=False))
