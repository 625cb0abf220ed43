"""`nixbox build`, `image use`, `export` and `import`: images, where they come from and where they go."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nixbox.cli.common import print_json, reporter, sandbox
from nixbox.cli.options import Json, Profile
from nixbox.cli.stores import image_app
from nixbox.errors import ConfigError

if TYPE_CHECKING:
    from nixbox.image.build import Means

PublicKeys = Annotated[
    list[str] | None,
    typer.Option("--public-key", metavar="NAME:KEY", help="It must be signed by this key; may be given again."),
]
SignKey = Annotated[
    Path | None,
    typer.Option("--sign-key", metavar="FILE", help="Sign it with this key (nix key generate-secret)."),
]


def build(
    profile: Profile = None,
    locked: Annotated[bool, typer.Option("--locked", help="Fail instead of changing nixbox.lock.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Build everything of it again and compare; exit code 5 if it differs.")
    ] = False,
    take_from: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="Take it from this Nix binary cache, if that has it.")
    ] = None,
    public_key: PublicKeys = None,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Take from --from also what no key has signed.")
    ] = False,
    push: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="Then put it into this Nix binary cache.")
    ] = None,
    sign_key: SignKey = None,
    builders: Annotated[
        str | None, typer.Option("--builders", metavar="SPEC", help="Nix's remote builders, e.g. ssh://HOST.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build the image; prints its store path."""
    means = _means(take_from, public_key or [], unsigned, builders)
    if push is not None:
        from nixbox.image import binary_cache, nixkey

        binary_cache.check_url(push, "--store")
        if sign_key is not None:
            nixkey.secret_key(sign_key)
    elif sign_key is not None:
        raise ConfigError("--sign-key signs what --store URL puts into a binary cache")
    box = sandbox(profile=profile)
    if check:
        from nixbox.image import check as checking

        checking.require_reproducible(box.plan().image)
    image = box.build(locked=locked, means=means)
    if take_from is not None:
        words = {"there": "was here already", "built": "was built here", "substituted": f"came from {take_from}"}
        box.report.note(f"the image {words[image.how]}")
    from nixbox.session import images

    found = images.check(box, image) if check else None
    if push is not None:
        box.report.phase(f"copying the image to {push}")
        binary_cache.push(push, image.path, sign_key)
        box.report.note(f"the image is in {push}")
    box.report.done()
    if as_json:
        data = images.facts(box.workspace, image)
        if found is not None:
            agrees = all(one.agrees for one in found)
            data["check"] = {"agrees": agrees, "derivations": [one.as_json() for one in found]}
        print_json(data)
    else:
        print(image.path)
    if found is not None:
        if failure := checking.report(found):
            raise failure
        print(f"built again, and the same bit for bit: {len(found)} derivations", file=sys.stderr)


def _means(url: str | None, keys: list[str], unsigned: bool, builders: str | None) -> Means:
    """Where the image may come from. Raises ConfigError."""
    from nixbox.image import binary_cache
    from nixbox.image.build import Means

    if url is None and (keys or unsigned):
        raise ConfigError("--public-key and --unsigned are about what --from URL gives")
    cache = binary_cache.cache(url, keys, unsigned) if url is not None else None
    return Means(cache, binary_cache.check_builders(builders) if builders is not None else None)


@image_app.command("use")
def image_use(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A path in the Nix store.")],
    profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Take an image that is in the Nix store for this workspace's, if building would give the very same."""
    from nixbox.image import prebuilt

    box = sandbox(profile=profile)
    image = prebuilt.use(box.workspace, box.plan(box.load(locked=True)).image, path)
    if as_json:
        print_json({"path": str(image.path), "root": str(image.root)})
    else:
        box.report.note(f"image {image.path}")


@image_app.command("export")
def image_export(
    file: Annotated[Path, typer.Argument(help="The archive to write.", metavar="FILE")],
    profile: Profile = None,
    sign_key: SignKey = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write this workspace's image, with its lock, to one file; prints the SHA-256 of its manifest."""
    from nixbox.image import nixkey
    from nixbox.session import images

    key = nixkey.secret_key(sign_key) if sign_key is not None else None
    done = images.export(sandbox(profile=profile), file, key=key, force=force)
    if as_json:
        print_json(
            {
                "file": str(done.file),
                "size": done.bytes,
                "manifest_sha256": done.manifest_sha256,
                "path": str(done.image),
                "signed_by": done.signed_by,
            }
        )
        return
    from nixbox import view

    by = f", signed by {done.signed_by}" if done.signed_by else ""
    print(f"wrote {done.file}, {view.size(done.bytes)}{by}; its manifest's SHA-256:", file=sys.stderr)
    print(done.manifest_sha256)


@image_app.command("import")
def image_import(
    file: Annotated[Path, typer.Argument(help="An archive that `nixbox image export` wrote.", metavar="FILE")],
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HEX", help="Its manifest must have this SHA-256.")
    ] = None,
    public_key: PublicKeys = None,
    as_json: Json = False,
) -> None:
    """Take an image from such a file; in a workspace without a lock, its lock too. Prints the store path."""
    from nixbox.image import archive, nixkey
    from nixbox.session import images

    keys = tuple(nixkey.public_key(text) for text in public_key or [])
    pin = archive.check_sha256(sha256) if sha256 is not None else None
    done = images.bring(Path.cwd(), file, reporter(), sha256=pin, keys=keys)
    one = done.imported
    for note in done.notes:
        print(note, file=sys.stderr)
    if as_json:
        print_json(
            {
                "path": str(one.image.path),
                "root": str(one.image.root),
                "manifest_sha256": one.manifest_sha256,
                "signed_by": one.signed_by,
                "made_by": one.manifest.nixbox,
                "reproducible": one.manifest.reproducible,
                "lock": done.lock,
                "fits": done.fits,
                "notes": list(done.notes),
            }
        )
        return
    if done.lock == "written":
        print("its lock is this workspace's now", file=sys.stderr)
    if done.fits:
        print("nixbox up --locked starts a machine of it", file=sys.stderr)
    if not (keys or pin):
        print(f"only checked against itself: --sha256 {one.manifest_sha256} would pin it", file=sys.stderr)
    print(one.image.path)
