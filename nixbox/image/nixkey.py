"""Nix's signing keys, as `nix key generate-secret` writes them (`NAME:BASE64`), and signatures by them.

Not by Nix: no command of it signs or checks what is no store path.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from nixbox import ed25519
from nixbox.errors import ConfigError, HostError
from nixbox.values import dataclass

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A key that signs: its name and 32 secret bytes, which no message shows."""

    name: str
    seed: bytes

    def __repr__(self) -> str:
        return f"SecretKey({self.name})"

    def sign(self, message: bytes) -> str:
        """`NAME:BASE64`, as Nix writes signatures. Raises HostError."""
        try:
            return f"{self.name}:{base64.b64encode(ed25519.sign(self.seed, message)).decode()}"
        except ed25519.Missing as missing:
            raise _lacking(missing) from None

    @property
    def public(self) -> str:
        """`NAME:BASE64`: what `trusted-public-keys` and `--public-key` take."""
        return f"{self.name}:{base64.b64encode(ed25519.public_half(self.seed)).decode()}"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that signatures are checked with."""

    name: str
    data: bytes

    def accepts(self, message: bytes, signature: str) -> bool:
        """Whether a signature (`NAME:BASE64`) of this message is this key's. Raises HostError where none can tell."""
        name, _, text = signature.partition(":")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return False
        try:
            return name == self.name and ed25519.verify(self.data, message, data)
        except ValueError:  # the key's bytes are no point of the curve
            return False
        except ed25519.Missing as missing:
            raise _lacking(missing) from None


def _lacking(missing: ed25519.Missing) -> HostError:
    return HostError(f"signatures cannot be made or checked here: {missing}", hint="on Debian: apt install libssl3")


def _parts(text: str, length: int) -> tuple[str, bytes] | None:
    name, _, encoded = text.strip().partition(":")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return None
    return (name, data) if _NAME.fullmatch(name) and len(data) == length else None


def public_key(text: str, origin: str = "--public-key") -> PublicKey:
    """A public key as Nix writes it (`NAME:BASE64`). Raises ConfigError; `origin` is what it calls the text."""
    parts = _parts(text, 32)
    if parts is None:
        raise ConfigError(
            f"{origin} is no public key of Nix's (NAME:BASE64 of 32 bytes)",
            hint="nix key convert-secret-to-public < FILE prints the one of a secret key",
        )
    return PublicKey(*parts)


def secret_key(file: Path) -> SecretKey:
    """The key in a file that `nix key generate-secret` wrote. Raises ConfigError, which does not show it."""
    mend = "nix key generate-secret --key-name NAME > FILE makes one"
    try:
        parts = _parts(file.read_text(), 64)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"the key {file} cannot be read: {why}", hint=mend) from None
    # The second half is the public key again (libsodium): a file in which the two do not fit is damaged.
    try:
        whole = parts is not None and ed25519.public_half(parts[1][:32]) == parts[1][32:]
    except ed25519.Missing as missing:
        raise _lacking(missing) from None
    if parts is None or not whole:
        raise ConfigError(f"{file} is no secret key of Nix's", hint=mend)
    return SecretKey(parts[0], parts[1][:32])
