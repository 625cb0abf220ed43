"""Key pairs for SSH (ed25519), made in this process: to start ssh-keygen twice is a tenth of a quick machine's start.

The private half of such a key is 32 random bytes; the public one is computed by OpenSSL's libcrypto, which Python and
OpenSSH themselves use. Where that is not found, ssh-keygen makes the pair.
"""

from __future__ import annotations

import binascii
import os
from pathlib import Path

from nixbox import ed25519, run

_TIMEOUT_S = 30.0
COMMENT = b"nixbox"
_LINE = 70  # characters, as ssh-keygen writes them


def make(private: Path) -> None:
    """Write a new pair: `private`, and beside it the same name with `.pub`. Both whole, the private one last."""
    for entry in private.parent.iterdir():  # of a making that was cut off; a pattern would have to be compiled
        if entry.name.startswith(private.name) and ".new" in entry.name:
            entry.unlink()
    seed = os.urandom(ed25519.BYTES)
    try:
        public = ed25519.public_half(seed)
    except ed25519.Missing:
        _by_ssh_keygen(private)
        return
    blob = _string(b"ssh-ed25519") + _string(public)
    line = b" ".join((b"ssh-ed25519", binascii.b2a_base64(blob, newline=False), COMMENT))
    _write(private.with_suffix(".pub"), line + b"\n", 0o644)
    _write(private, _openssh(seed, public).encode(), 0o600)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all; not synced: a machine that never came up needs no key."""
    new = path.with_name(f"{path.name}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(new, flags, mode), "wb") as file:
        file.write(data)
    new.replace(path)


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _openssh(seed: bytes, public: bytes) -> str:
    """A private key as OpenSSH keeps it, without a passphrase (OpenSSH's PROTOCOL.key)."""
    kind = _string(b"ssh-ed25519")
    check = os.urandom(4)  # twice the same: how a wrong passphrase is noticed
    secret = check + check + kind + _string(public) + _string(seed + public) + _string(COMMENT)
    secret += bytes(range(1, 1 + -len(secret) % 8))
    none = _string(b"none")
    data = b"openssh-key-v1\0" + none + none + _string(b"") + (1).to_bytes(4, "big")
    data += _string(kind + _string(public)) + _string(secret)
    text = binascii.b2a_base64(data, newline=False).decode()
    lines = [text[at : at + _LINE] for at in range(0, len(text), _LINE)]
    return "\n".join(("-----BEGIN OPENSSH PRIVATE KEY-----", *lines, "-----END OPENSSH PRIVATE KEY-----", ""))


def _by_ssh_keygen(private: Path) -> None:
    # It writes the two files one after the other: made aside, the private one is moved last.
    new = private.with_name(f"{private.name}.new")
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", COMMENT.decode(), "-f", str(new)]
    run.run(argv, timeout_s=_TIMEOUT_S)
    Path(f"{new}.pub").replace(private.with_suffix(".pub"))
    new.replace(private)
