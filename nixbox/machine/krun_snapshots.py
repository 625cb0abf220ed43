"""libkrun's snapshots, from inside the machine's process: taken by a word on its control socket, given before the VM.

No header documents them. A VM is given one as the launcher of smolmachines does it (src/agent/launcher.rs there). The
words PAUSE and SAVE, and what they write, were found by trying them with its 1.32.2 (docs/decisions/029): a directory
with `checkpoint.bin` and `manifest.bin` for CPUs and devices, and `memory.bin`, which a restored VM maps privately.
"""

from __future__ import annotations

import os

from nixbox import light, sparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.machine.krun_child import Library

ROOM = "/state"  # a file system in memory, in the jail
_CONTROL = f"{ROOM}/control"
_GIVEN, _SAVED = f"{ROOM}/given", f"{ROOM}/saved"
_MEMORY = "memory.bin"
_SHARED_RAM = "SMOLVM_FORKABLE"  # the library keeps a VM's memory in a file of memory, and can map another's
_IMMUTABLE = 1
_CHUNK = 1 << 20


class Refuses(Exception):
    """The library refuses, in its own words."""


def pack(files: dict[str, bytes]) -> bytes:
    """Files as one: for each a line with its name and length (bytes), and its contents."""
    return b"".join(f"{name} {len(data)}\n".encode() + data for name, data in files.items())


def unpack(state: bytes) -> dict[str, bytes]:
    """What `pack` was given. Raises ValueError for what is none of it."""
    files = {}
    while state:
        line, _, state = state.partition(b"\n")
        name, _, digits = line.decode("ascii").partition(" ")
        length = int(digits) if digits.isdecimal() else -1
        if not name or "/" in name or name.startswith(".") or not 0 <= length <= len(state):
            raise ValueError("that is no saved machine")
        files[name], state = state[:length], state[length:]
    return files


def prepare(library: Library, context: int, *, saves: bool, memory: int | None) -> None:
    """Before a VM begins that is to be saved later, or goes on from a saved memory (a descriptor). Raises Refused."""
    if saves or memory is not None:
        os.environ[_SHARED_RAM] = "1"
    if saves:
        library.call("krun_set_control_socket", context, _CONTROL.encode())
    if memory is not None:
        library.call("krun_set_snapshot_memory_fd2", context, memory, _IMMUTABLE)


def load(library: Library, context: int, state: bytes) -> None:
    """Give a VM that has not begun the state to go on from. Raises Refused, ValueError, OSError."""
    files = unpack(state)
    os.mkdir(_GIVEN)
    for name, data in files.items():
        with open(f"{_GIVEN}/{name}", "xb") as file:
            file.write(data)
    library.call("krun_set_snapshot", context, _GIVEN.encode())


def pause() -> None:
    """Stop the VM's CPUs and devices. Raises Refuses, OSError."""
    _order("PAUSE")


def save(memory: int) -> bytes:
    """The state of a VM that is paused, its memory in the file `memory` (an empty one). Raises Refuses, OSError."""
    _order(f"SAVE {_SAVED}")
    with open(f"{_SAVED}/{_MEMORY}", "rb") as file:
        sparse.copy_data(file.fileno(), memory)
    os.unlink(f"{_SAVED}/{_MEMORY}")
    return pack({name: _read(f"{_SAVED}/{name}") for name in sorted(os.listdir(_SAVED))})


def _order(words: str) -> None:
    with light.Socket(light.AF_UNIX, light.SOCK_STREAM) as sock:
        sock.connect(_CONTROL)
        sock.sendall(f"{words}\n".encode())
        answer = b""
        while not answer.endswith(b"\n") and (data := sock.recv(_CHUNK)):
            answer += data
    if not answer.startswith(b"OK"):
        raise Refuses(answer.decode(errors="replace").strip() or "no answer")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
