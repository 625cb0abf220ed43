"""The options that many commands have, as the parser takes them, and the types of commands that do not import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from nixbox.cli.common import complete_machine

Name = Annotated[
    str | None,
    typer.Argument(
        help="A machine of this workspace; default: the workspace's own.", autocompletion=complete_machine
    ),
]
Machine = Annotated[
    str | None,
    typer.Option("--machine", "-m", help="Another machine than the default.", autocompletion=complete_machine),
]
Profile = Annotated[str | None, typer.Option("--profile", "-p", help="Use this profile instead of the config's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def typed(function: Callable[..., Any]) -> None:
    """Give a function the types that its annotations name, where its own module imports them for checks alone."""
    function.__annotations__ = get_type_hints(function, localns=globals(), include_extras=True)
