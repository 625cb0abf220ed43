"""SHA-256 and SHA-1 without OpenSSL: to load its library takes a short command longer than all that it hashes.

`hashlib` loads it in any case, for its quicker functions; for what is large, or another function, that is the place.
(As the standard library's `random` does it, for the same reason.)
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hashlib import sha1, sha256
else:
    try:
        from _sha2 import sha256  # Python 3.12 and later
    except ImportError:
        try:
            from _sha256 import sha256
        except ImportError:  # a Python that was built without
            from hashlib import sha256
    try:
        from _sha1 import sha1
    except ImportError:
        from hashlib import sha1

__all__ = ["sha1", "sha256"]
