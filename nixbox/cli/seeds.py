"""`nixbox seed`: caches of the host, copied to a running guest once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nixbox.cli.common import print_json, reporter, sandbox
from nixbox.cli.options import Json, Machine


def complete_target(incomplete: str) -> list[str]:
    """The targets of the workspace's seeds, for shell completion."""
    from pathlib import Path

    from nixbox import loading, paths
    from nixbox.errors import NixboxError

    try:
        settings = loading.load(paths.find_workspace(Path.cwd()), fetch=False).settings
    except NixboxError:
        return []
    return [seed.target for seed in settings.seeds if seed.target.startswith(incomplete)]


def seed(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET…]", help="Seeds by their target; default: all.", autocompletion=complete_target
        ),
    ] = None,
    machine: Machine = None,
    force: Annotated[bool, typer.Option("--force", help="Again, though it was done before.")] = False,
    as_json: Json = False,
) -> None:
    """Copy the config's [[seeds]] to the running guest's own disk: those that are not there yet."""
    from nixbox import view
    from nixbox.values import asdict

    box = sandbox(machine)
    done = box.seed(targets or (), force=force)
    reporter().done()
    if as_json:
        print_json({target: asdict(one) for target, one in done.items()})
        return
    for target, one in done.items():
        if one.how == "done before":
            print(f"{target}: seeded before", file=sys.stderr)
            continue
        skipped = "".join(f", {count} {what} left out" for what, count in one.skipped.items())
        words = f"{one.files} files, {view.size(one.bytes)} in {one.seconds:.1f} s{skipped}"
        print(f"{target}: {words}", file=sys.stderr)
    if not done:
        print("the config has no seeds: see [[seeds]]", file=sys.stderr)
