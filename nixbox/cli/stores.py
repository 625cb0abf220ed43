"""`nixbox image` and `nixbox template`: what is kept for all workspaces, and how to get rid of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nixbox.cli.common import print_json
from nixbox.cli.options import Json
from nixbox.errors import ConfigError

image_app = typer.Typer(help="List and collect built images.", no_args_is_help=True, rich_markup_mode=None)
template_app = typer.Typer(help="List and remove templates.", no_args_is_help=True, rich_markup_mode=None)


@image_app.command("list")
def image_list(as_json: Json = False) -> None:
    """The images that were built here."""
    from nixbox import view
    from nixbox.image import images
    from nixbox.values import asdict

    found = images.all_images()
    if as_json:
        print_json([asdict(image) | {"path": str(image.path)} for image in found])
        return
    rows = [
        [
            image.key[:12],
            f"{image.base} {image.suite or ''}".strip(),
            f"{image.packages} ({', '.join(image.requested) or 'none'} on top)",
            view.size(image.size_bytes),
            images.age(image.built_at),
            ", ".join(Path(machine).name for machine in image.used_by) or "no",
            "" if image.reproducible else "not reproducible (build_network)",
        ]
        for image in found
    ]
    if rows:
        view.print_rows(rows, ["NAME", "BASE", "PACKAGES", "SIZE", "AGE", "IN USE", ""])
    else:
        print("no images yet: `nixbox build` makes one", file=sys.stderr)


@template_app.command("list")
def template_list(as_json: Json = False) -> None:
    """The templates that machines are restored from, the last used first."""
    import time

    from nixbox import view
    from nixbox.machine import template
    from nixbox.values import asdict

    found = template.every()
    if as_json:
        print_json([asdict(info) for info in found])
        return
    rows = [
        [
            info.ident[:12],
            info.stage + (" + setup" if info.setup else ""),
            f"{info.vcpus} × {info.memory_mib} MiB",
            view.size(info.size_bytes),
            view.duration(max(0, int(time.time()) - info.used_at)),
            Path(info.image).name[:12],
            f"damaged: {info.damage}" if info.damage else "",
        ]
        for info in found
    ]
    if rows:
        view.print_rows(rows, ["NAME", "STAGE", "SHAPE", "SIZE", "LAST USED", "IMAGE", ""])
    else:
        print("no templates yet: the first `nixbox up` makes one", file=sys.stderr)


@template_app.command("rm")
def template_rm(
    names: Annotated[list[str], typer.Argument(help="The beginnings of templates' names.", metavar="NAME…")],
) -> None:
    """Remove templates. Machines that were restored from them do not notice."""
    from nixbox.machine import template

    found = {info.ident: info for name in names for info in template.by_name(name)}
    for info in found.values():
        template.remove(template.directory() / info.ident)
    print(f"removed {len(found)}", file=sys.stderr)


@template_app.command("gc")
def template_gc(
    everything: Annotated[bool, typer.Option("--all", help="Remove every template.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove damaged templates, those of images that are gone, and the least recently used beyond the limit."""
    from nixbox import view
    from nixbox.config.cache import template_limit_bytes
    from nixbox.image import store
    from nixbox.machine import template

    infos = template.every()
    gone = {info.ident for info in infos if not store.is_there(Path(info.image))}
    staying = [info for info in infos if info.ident not in gone]
    over = template.over_limit(staying, 0 if everything else template_limit_bytes())
    going = [info for info in infos if info.ident in gone] + over
    for info in going:
        print(f"{info.ident[:12]}  {info.stage}  {view.size(info.size_bytes)}")
        if not dry_run:
            template.remove(template.directory() / info.ident)
    if not dry_run:
        template.sweep()
    if not going:
        print("nothing to remove", file=sys.stderr)


@image_app.command("gc")
def image_gc(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove the images that no machine is made of."""
    from nixbox import view
    from nixbox.image import fetch, images

    unused = images.unused(images.all_images())
    for image in unused:
        print(f"{image.key[:12]}  {view.size(image.size_bytes)}  {image.path}")
    if not unused:
        print("every image is in use", file=sys.stderr)
    if dry_run or not unused:
        return
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"{len(unused)} images would go", hint="--yes removes them without asking")
        typer.confirm(f"remove {len(unused)} images?", abort=True, err=True)
    fetch.clean()
    gone = images.collect(unused)
    print(f"removed {gone.paths} store paths, {view.size(gone.bytes)}", file=sys.stderr)
