"""What every part of the command line uses."""

from __future__ import annotations

import json
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def print_json(data: object) -> None:
    """Data on stdout, for machines."""
    print(json.dumps(data, indent=2, ensure_ascii=False))
