"""`nixbox image use`: the image that a flake or a binary cache has brought."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nixbox.cli.common import Json, Profile, print_json, sandbox

_PATH = typer.Argument(metavar="PATH", help="A path in the Nix store.")


def image_use(path: Annotated[Path, _PATH], profile: Profile = None, as_json: Json = False) -> None:
    """Take an image that is in the Nix store for this workspace's, if building would give the very same."""
    from nixbox.image import prebuilt

    box = sandbox(profile=profile)
    image = prebuilt.use(box.workspace, box.plan(box.load(locked=True)).image, path)
    if as_json:
        print_json({"path": str(image.path), "root": str(image.root)})
    else:
        box.report.note(f"image {image.path}")
