"""`nixbox env`: the variables that the config hands to a guest; their values are never shown."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from nixbox.cli.common import print_json
from nixbox.cli.options import Json, Machine

env_app = typer.Typer(help="The variables that the guest is given.", no_args_is_help=True)


@env_app.command("list")
def env_list(as_json: Json = False) -> None:
    """Names, where each value comes from, and where it goes; never a value."""
    from nixbox import loading, paths, view

    settings = loading.load(paths.find_workspace(Path.cwd())).settings
    goes = ["sessions", "scripts"]
    if settings.setup is not None and settings.setup_env:
        goes.append("setup")
    rows: list[dict[str, object]] = [
        {
            "name": entry.name,
            "from": "config.toml" if entry.from_host is None else f"host: {entry.from_host}",
            "set": entry.from_host is None or entry.from_host in os.environ,
            "to": goes,
        }
        for entry in settings.env
    ]
    if as_json:
        print_json(rows)
    elif rows:
        cells = [[str(row["name"]), str(row["from"]), "yes" if row["set"] else "no", ", ".join(goes)] for row in rows]
        view.print_rows(cells, ["NAME", "FROM", "SET", "GOES TO"])
    else:
        print("the config hands no variables to the guest: see [env]", file=sys.stderr)


@env_app.command("push")
def env_push(machine: Machine = None) -> None:
    """Give a running guest the variables as they are now: new sessions have them, and no others."""
    from nixbox.session import Sandbox

    names = Sandbox.open(Path.cwd(), machine).push_env()
    print(f"new sessions have {', '.join(names) or 'no variables'}", file=sys.stderr)
