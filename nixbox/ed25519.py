"""Ed25519 (RFC 8032) by OpenSSL's libcrypto, which Python has loaded anyway: public halves, signatures, checks.

The private half of a key is 32 random bytes. Every function may raise Missing: where there is no libcrypto with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BYTES = 32  # of either half
SIGNATURE_BYTES = 64
_NID = 1087  # openssl/obj_mac.h: NID_ED25519
_NAMES = ("libcrypto.so.3", "libcrypto.so.1.1", "libcrypto.3.dylib")


class Missing(Exception):
    """This Python has no libcrypto that knows such keys."""


@functools.cache
def _libcrypto() -> ctypes.CDLL:
    with contextlib.suppress(ImportError):
        import _hashlib  # noqa: F401 - with it the library is loaded already, wherever this Python has it
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    # openssl/evp.h
    functions: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "EVP_PKEY_new_raw_private_key": (pointer, (ctypes.c_int, pointer, text, size)),
        "EVP_PKEY_new_raw_public_key": (pointer, (ctypes.c_int, pointer, text, size)),
        "EVP_PKEY_get_raw_public_key": (ctypes.c_int, (pointer, pointer, pointer)),
        "EVP_PKEY_free": (None, (pointer,)),
        "EVP_MD_CTX_new": (pointer, ()),
        "EVP_MD_CTX_free": (None, (pointer,)),
        "EVP_DigestSignInit": (ctypes.c_int, (pointer, pointer, pointer, pointer, pointer)),
        "EVP_DigestSign": (ctypes.c_int, (pointer, pointer, pointer, text, size)),
        "EVP_DigestVerifyInit": (ctypes.c_int, (pointer, pointer, pointer, pointer, pointer)),
        "EVP_DigestVerify": (ctypes.c_int, (pointer, text, size, text, size)),
    }
    for name in _NAMES:
        with contextlib.suppress(OSError, AttributeError):
            lib = ctypes.CDLL(name)
            for function, (result, arguments) in functions.items():
                symbol = getattr(lib, function)
                symbol.restype, symbol.argtypes = result, arguments
            return lib
    raise Missing(f"none of {', '.join(_NAMES)} has Ed25519")


class _Key:
    """A key of libcrypto's and a context to use it with; a context manager. Raises ValueError for what is no key."""

    def __init__(self, data: bytes, kind: str) -> None:
        self.lib = _libcrypto()
        self.key = getattr(self.lib, f"EVP_PKEY_new_raw_{kind}_key")(_NID, None, data, len(data))
        if not self.key:
            raise ValueError(f"{len(data)} bytes are no {kind} key")
        self.context = self.lib.EVP_MD_CTX_new()

    def __enter__(self) -> _Key:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.EVP_MD_CTX_free(self.context)
        self.lib.EVP_PKEY_free(self.key)


def public_half(seed: bytes) -> bytes:
    """The public half (32 bytes) of a private one (EVP_PKEY_get_raw_public_key(3))."""
    with _Key(seed, "private") as made:
        public, length = ctypes.create_string_buffer(BYTES), ctypes.c_size_t(BYTES)
        done = made.lib.EVP_PKEY_get_raw_public_key(made.key, public, ctypes.byref(length))
    if done != 1 or length.value != BYTES:
        raise Missing("libcrypto tells no public half")
    return public.raw


def sign(seed: bytes, message: bytes) -> bytes:
    """The signature (64 bytes) of a message by a private half (EVP_DigestSign(3))."""
    signature, length = ctypes.create_string_buffer(SIGNATURE_BYTES), ctypes.c_size_t(SIGNATURE_BYTES)
    with _Key(seed, "private") as made:
        begun = made.lib.EVP_DigestSignInit(made.context, None, None, None, made.key)
        arguments = (made.context, signature, ctypes.byref(length), message, len(message))
        if begun != 1 or made.lib.EVP_DigestSign(*arguments) != 1 or length.value != SIGNATURE_BYTES:
            raise Missing("libcrypto makes no signature")
    return signature.raw


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether a signature of a message is of the key with this public half (EVP_DigestVerify(3))."""
    if len(public) != BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    with _Key(public, "public") as made:
        if made.lib.EVP_DigestVerifyInit(made.context, None, None, None, made.key) != 1:
            raise Missing("libcrypto checks no signature")
        return bool(made.lib.EVP_DigestVerify(made.context, signature, len(signature), message, len(message)) == 1)
