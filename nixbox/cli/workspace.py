"""What is done to a workspace and its image, and to no machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nixbox.cli.common import print_json, sandbox
from nixbox.cli.options import Json, Profile
from nixbox.errors import ExitCode


def init(
    name: Annotated[str | None, typer.Option(help="The name of the machine; default: the directory's.")] = None,
    base: Annotated[str | None, typer.Option(help="debian (the default) or nixpkgs.")] = None,
    from_nix: Annotated[
        Path | None, typer.Option("--from", metavar="CONFIG.NIX", help="What a config in Nix's language says.")
    ] = None,
) -> None:
    """Make this directory a workspace (.nixbox/config.toml)."""
    from nixbox.config import scaffold

    if from_nix is not None:
        from nixbox.image import nixeval

        data = nixeval.config(from_nix, os.environ)
        data |= {key: value for key, value in (("name", name), ("base", base)) if value is not None}
        if data.get("base") != "nixpkgs" and isinstance(data.get("packages"), list):
            data["packages"] = {"nixpkgs": data["packages"]}  # as load takes them (config/load.py)
        path = scaffold.from_nix(Path.cwd(), data, from_nix.name)
    else:
        path = scaffold.init(Path.cwd(), name=name, base=base or "debian")
    print(f"wrote {path.relative_to(Path.cwd())}; next: nixbox up", file=sys.stderr)


def trust() -> None:
    """Say that this workspace and the plugins in it are yours, though a guest could have written them."""
    from nixbox import paths

    workspace = paths.find_workspace(Path.cwd(), trusting=True)
    paths.trust(workspace)
    print(f"{workspace} is trusted", file=sys.stderr)
    from nixbox.config.plugins import trust as trust_plugins

    for plugin in trust_plugins(workspace):
        print(f"{plugin} is trusted as it is now", file=sys.stderr)


def lock() -> None:
    """Resolve the packages anew, write the lock, print changes."""
    box = sandbox()
    changed = box.lock()
    box.report.done()
    print("\n".join(changed) if changed else "nothing changed", file=sys.stdout if changed else sys.stderr)


def config(
    profile: Profile = None,
    as_json: Json = False,
    nix: Annotated[bool, typer.Option("--nix", help="Print the generated Nix expression.")] = False,
) -> None:
    """Print the merged configuration and where each value came from."""
    from nixbox.config import show

    box = sandbox(profile=profile)
    loaded = box.load()
    if nix:
        from nixbox.image import apt, build, ensure

        settings, mirrors = loaded.settings, {}
        if settings.base == "debian":
            mirrors = apt.mirrors(settings.debian_mirror, settings.debian_security_mirror).as_dict()
        print(build.expression(box.plan(loaded).image, ensure.lock_path(box.workspace), mirrors), end="")
    elif as_json:
        print_json(show.to_json(loaded))
    else:
        print(show.render(loaded))


def doctor(as_json: Json = False) -> None:
    """Say what this host has and lacks. Exit code 3 when something necessary is missing."""
    from nixbox import doctor as examiner
    from nixbox.values import asdict

    missing = False
    found = []
    for finding in examiner.examine():
        missing = missing or finding.level == "missing"
        if as_json:
            found.append(asdict(finding))
            continue
        print(f"{finding.level:8} {finding.what}: {finding.detail}")
        if finding.hint and finding.level != "ok":
            print(f"{'':8} hint: {finding.hint}")
    if as_json:
        print_json(found)
    if missing:
        raise typer.Exit(ExitCode.HOST)


def version() -> None:
    """Print the version."""
    from nixbox import __version__

    print(f"nixbox {__version__}")
