"""nixbox: one command turns a directory into a microVM whose image Nix built from a lock file."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nixbox.session import Sandbox

__version__ = "0.1.0"
__all__ = ["Sandbox", "__version__"]


def __getattr__(name: str) -> Any:
    # `from nixbox import Sandbox` without making every command pay for the whole library at start-up.
    if name == "Sandbox":
        from nixbox.session import Sandbox

        return Sandbox
    raise AttributeError(name)
