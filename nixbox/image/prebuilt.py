"""An image that something else has put into the Nix store (a flake, a binary cache) as the one of a workspace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nixbox.errors import ConfigError
from nixbox.image import build, ensure, store
from nixbox.image.build import Image

if TYPE_CHECKING:
    from nixbox.plan.model import ImageSpec


def use(workspace: Path, spec: ImageSpec, given: Path) -> Image:
    """Take `given`, a store path, for the image of `spec` and root it: nothing is fetched and nothing built.

    Only what building would give is taken: Nix says which path that is. Raises ConfigError for another image, for
    one that is not in the store and for a lock that does not fit, CommandError when Nix cannot evaluate it.
    """
    if why := ensure.stale(workspace, spec):
        raise ConfigError(f"the lock does not fit the config: {why}", hint="`nixbox lock`, and commit the result")
    text = ensure.lock_path(workspace).read_text()
    key = build.key(spec, text)
    found = build.built(key)
    if found is not None and found.path == given:
        return found
    expression = build.expression(spec, ensure.keep_lock(key, text), {})
    path = build.evaluate(expression).out
    if path != given:
        raise ConfigError(
            f"{given} is not the image of this workspace, which is {path}",
            hint="it was made of another config, lock or version of nixbox; `nixbox build` makes this one",
        )
    if not store.is_there(path):
        raise ConfigError(f"{path} is not in the Nix store", hint="`nix build` it, or: nixbox build")
    return ensure.adopt(key, expression, path)
