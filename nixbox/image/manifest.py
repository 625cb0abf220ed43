"""What an archive of an image says of itself: the first member, by which all others are checked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nixbox.image import store
from nixbox.image.lock import Arch
from nixbox.image.nixkey import PublicKey, SecretKey
from nixbox.image.store import PathInfo
from nixbox.image.ustar import MOST_BYTES
from nixbox.plan.model import ImageSpec
from nixbox.values import asdict

FORMAT: Literal[1] = 1
MOST_PATHS = 100_000
_SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_SIGNATURE = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}:[A-Za-z0-9+/]{86}==$")]
# A path of the store, and nothing below it (Nix manual, "store path").
_PATH = Annotated[
    str, Field(pattern=r"^/nix/store/[0-9abcdfghijklmnpqrsvwxyz]{32}-[A-Za-z0-9+_?=-][A-Za-z0-9+._?=-]{0,210}$")
]
# What a signature is of: no other text can be taken for a manifest.
_DOMAIN = b"nixbox image manifest 1\0"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Content(_Strict):
    """A member: its SHA-256 and its size in bytes."""

    sha256: _SHA256
    size: int = Field(gt=0, le=MOST_BYTES)


class StoredPath(Content):
    """A store path: hash and size are those of its NAR. `signatures` are Nix's own, as a binary cache has them."""

    path: _PATH
    references: tuple[_PATH, ...]
    signatures: tuple[_SIGNATURE, ...] = ()

    @property
    def hash_part(self) -> str:
        """The 32 letters that name it."""
        return Path(self.path).name[:32]

    @property
    def member(self) -> str:
        """Its name in the archive."""
        return f"nar/{self.hash_part}.nar"

    def narinfo(self) -> str:
        """What a binary cache says of it."""
        lines = [
            f"StorePath: {self.path}",
            f"URL: {self.member}",
            "Compression: none",
            f"FileHash: {store.hash_base32(self.sha256)}",
            f"FileSize: {self.size}",
            f"NarHash: {store.hash_base32(self.sha256)}",
            f"NarSize: {self.size}",
            f"References: {' '.join(Path(reference).name for reference in self.references)}",
            *(f"Sig: {signature}" for signature in self.signatures),
        ]
        return "\n".join(lines) + "\n"


class Manifest(_Strict):
    """A whole archive's: `spec` and the lock are what the image was made of, `paths` the image's closure."""

    format: Literal[1]
    nixbox: str = Field(pattern=r"^[A-Za-z0-9.+_-]{1,50}$")
    arch: Arch
    image: _PATH
    reproducible: bool
    spec: ImageSpec
    lock: Content
    paths: Annotated[tuple[StoredPath, ...], Field(min_length=1, max_length=MOST_PATHS)]

    @property
    def sizes(self) -> list[int]:
        """The sizes of the members behind the manifest and its signature."""
        return [self.lock.size, *(path.size for path in self.paths)]


def fingerprint(info: PathInfo) -> bytes:
    """What Nix signs of a store path (libstore/path-info.cc)."""
    references = ",".join(str(reference) for reference in info.references)
    return f"1;{info.path};{store.hash_base32(info.nar_sha256)};{info.nar_size};{references}".encode()


def stored(info: PathInfo, key: SecretKey | None) -> StoredPath:
    """A store path as a manifest has it, signed if there is a key."""
    return StoredPath(
        path=str(info.path),
        sha256=info.nar_sha256,
        size=info.nar_size,
        references=tuple(str(reference) for reference in info.references),
        signatures=(key.sign(fingerprint(info)),) if key else (),
    )


def dump(manifest: Manifest) -> bytes:
    """The one text of a manifest: JSON, keys in order, a path a line."""
    data: dict[str, Any] = manifest.model_dump(mode="json", exclude={"spec", "paths"})
    data["spec"] = asdict(manifest.spec)
    rows = ",\n".join("    " + json.dumps(path.model_dump(mode="json"), sort_keys=True) for path in manifest.paths)
    lines = [f"  {json.dumps(key)}: {json.dumps(data[key], sort_keys=True)}" for key in sorted(data)]
    return ("{\n" + ",\n".join(lines) + ',\n  "paths": [\n' + rows + "\n  ]\n}\n").encode()


def parse(data: bytes) -> Manifest:
    """The manifest that a member is. Raises ValueError saying what is wrong with it."""
    try:
        said = json.loads(data)
    except ValueError as error:
        raise ValueError(f"manifest.json is no JSON: {error}") from None
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        version = said.get("format") if isinstance(said, dict) else None
        raise ValueError(f"it has format {version!r}; this nixbox reads format {FORMAT}")
    try:
        found = Manifest.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"manifest.json: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    known = {path.path for path in found.paths}
    if len({path.hash_part for path in found.paths}) != len(found.paths):
        raise ValueError("manifest.json: paths: one is there twice")
    if found.image not in known:
        raise ValueError("manifest.json: paths: the image is not among them")
    for path in found.paths:
        if missing := set(path.references) - known:
            raise ValueError(f"manifest.json: paths: {path.path} needs {min(missing)}, which is not among them")
    # Whatever else a JSON text may hold (a key twice, a field of a later version) would not be looked at.
    if dump(found) != data:
        raise ValueError("manifest.json is not as nixbox writes it")
    return found


def seal(data: bytes, key: SecretKey | None) -> bytes:
    """The member behind a manifest: a line with the SHA-256 of it and of the rest, and a signature if there is a key.

    The sum tells of accidents only; who changes the manifest changes it too.
    """
    signature = f"{key.sign(_DOMAIN + data)}\n".encode() if key else b""
    return hashlib.sha256(data + signature).hexdigest().encode() + b"\n" + signature


def signature(data: bytes, sealed: bytes) -> str:
    """The signature of a manifest as its seal has it, not checked; empty without one. Raises ValueError."""
    line, _, rest = sealed.partition(b"\n")
    if line != hashlib.sha256(data + rest).hexdigest().encode():
        raise ValueError("manifest.json or manifest.sum is damaged: the two do not fit")
    return rest.decode("ascii", errors="replace").strip()


def signed_by(data: bytes, text: str, keys: tuple[PublicKey, ...]) -> str | None:
    """The name of that one of the keys whose signature of the manifest `text` is."""
    return next((key.name for key in keys if key.accepts(_DOMAIN + data, text)), None)
