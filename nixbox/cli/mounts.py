"""`nixbox mount` and `nixbox unmount`: directories of the host in a machine that runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nixbox.cli.options import Machine

if TYPE_CHECKING:
    from nixbox.session import Sandbox


def _sandbox(name: str | None) -> Sandbox:
    from nixbox import report
    from nixbox.session import Sandbox

    return Sandbox.open(Path.cwd(), name, reporter=report.for_stderr(quiet=False))


def mount(
    source: Annotated[str, typer.Argument(help="A directory of this host.")],
    target: Annotated[str, typer.Argument(help="Where the guest sees it: /srv/data, ~/data.")],
    readonly: Annotated[bool, typer.Option("--readonly", help="The guest can only read it.")] = False,
    machine: Machine = None,
) -> None:
    """Share a directory with the running guest, now and at every later start."""
    real = _sandbox(machine).mount(source, target, readonly=readonly)
    print(f"{target} is {real}{' (read-only)' if readonly else ''}", file=sys.stderr)


def unmount(
    target: Annotated[str, typer.Argument(help="Where the guest sees it.")],
    force: Annotated[bool, typer.Option("--force", help="Also from under those in the guest who use it.")] = False,
    machine: Machine = None,
) -> None:
    """Take a directory away from the running guest. One of the config comes back at the next `nixbox up`."""
    if _sandbox(machine).unmount(target, force=force):
        print(f"{target} is unmounted", file=sys.stderr)
    else:
        print(f"nothing is mounted at {target}", file=sys.stderr)
