"""Nix's signatures: Ed25519 (RFC 8032) with keys as `nix key generate-secret` writes them (`NAME:BASE64`).

In Python, and not by libcrypto or Nix: no command of Nix signs or checks what is no store path. One signature takes
some ten milliseconds. Not constant in time: for keys on a machine that others do not measure.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from nixbox.errors import ConfigError

_P = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, _P - 2, _P) % _P
_ROOT = pow(2, (_P - 1) // 4, _P)  # of -1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")

# X, Y, Z, T with x = X/Z, y = Y/Z, xy = T/Z (RFC 8032, 5.1.4).
_Point = tuple[int, int, int, int]
_ZERO: _Point = (0, 1, 1, 0)


def _add(p: _Point, q: _Point) -> _Point:
    a, b = (p[1] - p[0]) * (q[1] - q[0]) % _P, (p[1] + p[0]) * (q[1] + q[0]) % _P
    c, d = 2 * p[3] * q[3] * _D % _P, 2 * p[2] * q[2] % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _times(number: int, point: _Point) -> _Point:
    result = _ZERO
    while number:
        if number & 1:
            result = _add(result, point)
        point = _add(point, point)
        number >>= 1
    return result


def _same(p: _Point, q: _Point) -> bool:
    return (p[0] * q[2] - q[0] * p[2]) % _P == 0 and (p[1] * q[2] - q[1] * p[2]) % _P == 0


def _x_of(y: int, odd: int) -> int | None:
    """The x of a point from its y and the lowest bit of x; None where there is none (RFC 8032, 5.1.3)."""
    if y >= _P:
        return None
    square = (y * y - 1) * pow(_D * y * y + 1, _P - 2, _P) % _P
    if square == 0:
        return None if odd else 0
    x = pow(square, (_P + 3) // 8, _P)
    if (x * x - square) % _P:
        x = x * _ROOT % _P
    if (x * x - square) % _P:
        return None
    return x if x & 1 == odd else _P - x


_BASE_Y = 4 * pow(5, _P - 2, _P) % _P
_BASE_X = _x_of(_BASE_Y, 0) or 0
_BASE: _Point = (_BASE_X, _BASE_Y, 1, _BASE_X * _BASE_Y % _P)


def _encode(point: _Point) -> bytes:
    inverse = pow(point[2], _P - 2, _P)
    x, y = point[0] * inverse % _P, point[1] * inverse % _P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _decode(data: bytes) -> _Point | None:
    number = int.from_bytes(data, "little")
    y, odd = number & ((1 << 255) - 1), number >> 255
    x = _x_of(y, odd)
    return None if x is None else (x, y, 1, x * y % _P)


def _number(*parts: bytes) -> int:
    return int.from_bytes(hashlib.sha512(b"".join(parts)).digest(), "little")


def _expand(seed: bytes) -> tuple[int, bytes]:
    digest = hashlib.sha512(seed).digest()
    scalar = int.from_bytes(digest[:32], "little")
    return (scalar & ((1 << 254) - 8)) | (1 << 254), digest[32:]


def public_half(seed: bytes) -> bytes:
    """The public key (32 bytes) of a private one (32 bytes)."""
    return _encode(_times(_expand(seed)[0], _BASE))


def sign(seed: bytes, message: bytes) -> bytes:
    """The signature (64 bytes) of a message by the private key `seed` (32 bytes)."""
    scalar, prefix = _expand(seed)
    nonce = _number(prefix, message) % _ORDER
    r = _encode(_times(nonce, _BASE))
    s = (nonce + _number(r, public_half(seed), message) * scalar) % _ORDER
    return r + s.to_bytes(32, "little")


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) of `message` is of the key whose public half is `public` (32 bytes)."""
    if len(public) != 32 or len(signature) != 64:
        return False
    a, r = _decode(public), _decode(signature[:32])
    s = int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= _ORDER:
        return False
    h = _number(signature[:32], public, message) % _ORDER
    return _same(_times(s, _BASE), _add(r, _times(h, a)))


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A key that signs: its name and 32 secret bytes, which no message shows."""

    name: str
    seed: bytes

    def __repr__(self) -> str:
        return f"SecretKey({self.name})"

    def sign(self, message: bytes) -> str:
        """`NAME:BASE64`, as Nix writes signatures."""
        return f"{self.name}:{base64.b64encode(sign(self.seed, message)).decode()}"

    @property
    def public(self) -> str:
        """`NAME:BASE64`: what `trusted-public-keys` and `--public-key` take."""
        return f"{self.name}:{base64.b64encode(public_half(self.seed)).decode()}"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that signatures are checked with."""

    name: str
    data: bytes

    def accepts(self, message: bytes, signature: str) -> bool:
        """Whether a signature (`NAME:BASE64`) of this message is this key's."""
        name, _, text = signature.partition(":")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return False
        return name == self.name and verify(self.data, message, data)


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
    if parts is None or public_half(parts[1][:32]) != parts[1][32:]:
        raise ConfigError(f"{file} is no secret key of Nix's", hint=mend)
    return SecretKey(parts[0], parts[1][:32])
