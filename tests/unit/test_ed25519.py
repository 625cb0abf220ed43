"""Ed25519 against the vectors of its standard (RFC 8032, 7.1)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import pytest

from nixbox import ed25519

# Private half, public half, message, signature.
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("secret", "public", "message", "signature"), VECTORS)
def test_it_is_that_of_the_standard(secret: str, public: str, message: str, signature: str) -> None:
    seed, data, made = (bytes.fromhex(text) for text in (secret, message, signature))
    assert ed25519.public_half(seed).hex() == public
    assert ed25519.sign(seed, data).hex() == signature
    assert ed25519.verify(bytes.fromhex(public), data, made)
    assert not ed25519.verify(bytes.fromhex(public), data + b"x", made)
    assert not ed25519.verify(ed25519.public_half(bytes(32)), data, made)
    for place in (0, 31, 32, 63):
        wrong = made[:place] + bytes([made[place] ^ 1]) + made[place + 1 :]
        assert not ed25519.verify(bytes.fromhex(public), data, wrong)


def test_a_signature_has_one_form() -> None:
    """The same s plus the group's order would pass a check that does not look (RFC 8032, 5.1.7)."""
    seed = b"k" * 32
    made = ed25519.sign(seed, b"m")
    order = 2**252 + 27742317777372353535851937790883648493
    other = made[:32] + (int.from_bytes(made[32:], "little") + order).to_bytes(32, "little")
    public = ed25519.public_half(seed)
    assert ed25519.verify(public, b"m", made)
    assert not ed25519.verify(public, b"m", other)
    assert not ed25519.verify(public, b"m", made[:63])
    assert not ed25519.verify(public[:31], b"m", made)


def test_what_is_no_key_is_refused() -> None:
    with pytest.raises(ValueError, match="31 bytes are no private key"):
        ed25519.public_half(bytes(31))


@pytest.fixture
def looked_for_anew() -> Iterator[None]:
    ed25519._libcrypto.cache_clear()
    yield
    ed25519._libcrypto.cache_clear()


@pytest.mark.usefixtures("looked_for_anew")
def test_no_library_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    monkeypatch.setitem(sys.modules, "_hashlib", None)  # an import of it fails
    with pytest.raises(ed25519.Missing, match=r"libcrypto\.so\.3"):
        ed25519.public_half(bytes(32))
