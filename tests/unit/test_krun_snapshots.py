"""What a libkrun machine's process does to be saved and to go on: beside a stand-in for the library's control socket.

The real one is used in tests/kvm, where guests run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixbox.errors import NixboxError
from nixbox.machine import krun_child, krun_snapshots, libkrun
from nixbox.machine.backend import MemoryFile, Sockets, listening
from nixbox.machine.krun import Krun
from tests.krun import HANG_S

MEMORY = b"\x01" * 4096 + bytes(1 << 20) + b"\x02" * 4096
NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/"), min_size=1).filter(
    lambda name: not name.startswith(".")
)


@given(st.dictionaries(NAMES, st.binary()))
def test_files_come_out_as_they_went_in(files: dict[str, bytes]) -> None:
    assert krun_snapshots.unpack(krun_snapshots.pack(files)) == files


@pytest.mark.parametrize(
    "state", [b"x", b"a 3\nxy", b"../a 1\nx", b".. 1\nx", b"a -1\nx", b"a b\nx", b" 1\nx", b"\xff 1\nx", b"a 1 1\nx"]
)
def test_what_is_no_saved_machine_is_refused(state: bytes) -> None:
    with pytest.raises(ValueError):
        krun_snapshots.unpack(state)


def test_a_library_with_snapshots_is_told_from_one_without(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(b"\0".join([b"", *(name.encode() for name in libkrun.SNAPSHOTS), b""]))
    assert libkrun.has_snapshots(path) and Krun(str(path)).features.templates
    path.write_bytes(b"\0".join([b"", *(name.encode() for name in libkrun.SNAPSHOTS[1:]), b""]))
    assert not libkrun.has_snapshots(path) and not Krun(str(path)).features.templates
    path.write_bytes(b"")
    assert not Krun(str(path)).features.templates
    assert not Krun(str(path) + ".gone").features.templates


# --- the orders ---


class Library:
    """What it is called with; `control` is the library's own socket, once it has been asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.heard: list[str] = []
        self.refuses: str | None = None

    def call(self, name: str, *arguments: Any) -> int:
        self.calls.append((name, *arguments))
        if name == self.refuses:
            raise krun_child.Refused(name, 22, "its own words")
        if name == "krun_set_control_socket":
            threading.Thread(target=self._serve, args=(listening(Path(arguments[1].decode())),), daemon=True).start()
        return 0

    def _serve(self, listener: socket.socket) -> None:
        while True:
            asker, _ = listener.accept()
            with asker:
                words = asker.recv(4096).decode()
                self.heard.append(words)
                asker.sendall(self._answer(*words.split()))

    def _answer(self, order: str, *arguments: str) -> bytes:
        if order == self.refuses:
            return b"ERR EIO no room\n"
        if order == "SAVE":
            place = Path(arguments[0])
            place.mkdir()  # one that is there is refused
            with (place / "memory.bin").open("wb") as file:
                os.pwrite(file.fileno(), MEMORY[:4096], 0)
                os.pwrite(file.fileno(), MEMORY[-4096:], len(MEMORY) - 4096)
            (place / "checkpoint.bin").write_bytes(b"cpus")
            (place / "manifest.bin").write_bytes(b"\0\n\0")
        return b"OK\n"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    monkeypatch.setattr(krun_snapshots, "_CONTROL", str(path / "control"))
    monkeypatch.setattr(krun_snapshots, "_GIVEN", str(path / "given"))
    monkeypatch.setattr(krun_snapshots, "_SAVED", str(path / "saved"))
    monkeypatch.delenv("SMOLVM_FORKABLE", raising=False)
    return path


Serve = Callable[[bool], tuple[Library, krun_child.Monitor, Sockets]]


def serving(monitor: krun_child.Monitor, listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the test is over
        monitor.serve(listener)


@pytest.fixture
def serve(room: Path, tmp_path: Path) -> Iterator[Serve]:
    """A machine's monitor, of one that waits for its state (`incoming`) or has begun."""
    listeners = []

    def begin(incoming: bool) -> tuple[Library, krun_child.Monitor, Sockets]:
        library, sockets = Library(), Sockets.in_dir(tmp_path)
        monitor = krun_child.Monitor(library, 7, incoming=incoming)  # type: ignore[arg-type]
        listeners.append(listening(sockets.monitor))
        threading.Thread(target=serving, args=(monitor, listeners[-1]), daemon=True).start()
        return library, monitor, sockets

    yield begin
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)


def test_a_machine_is_saved_into_a_new_file(serve: Serve, tmp_path: Path) -> None:
    library, _, sockets = serve(False)
    krun_snapshots.prepare(library, 7, saves=True, memory=None)  # type: ignore[arg-type]
    assert os.environ["SMOLVM_FORKABLE"] == "1"
    backend, memory = Krun(), MemoryFile(tmp_path / "memory", shared=True)
    memory.path.write_bytes(b"what it was restored from")
    with memory.path.open("rb") as mapped:
        backend.pause(sockets)
        state = backend.save(sockets, memory)
        assert mapped.read() == b"what it was restored from"
    assert [words.split()[0] for words in library.heard] == ["PAUSE", "SAVE"]
    assert krun_snapshots.unpack(state) == {"checkpoint.bin": b"cpus", "manifest.bin": b"\0\n\0"}
    assert memory.path.read_bytes() == MEMORY
    assert memory.path.stat().st_blocks * 512 < len(MEMORY)  # with its holes


def test_a_machine_goes_on_from_its_state(serve: Serve, room: Path, tmp_path: Path) -> None:
    library, monitor, sockets = serve(True)
    krun_snapshots.prepare(library, 7, saves=False, memory=5)  # type: ignore[arg-type]
    backend = Krun()
    assert backend.status(sockets) == "inmigrate"
    large = os.urandom(1 << 20)
    backend.load(sockets, krun_snapshots.pack({"checkpoint.bin": large, "manifest.bin": b""}))
    assert (room / "given/checkpoint.bin").read_bytes() == large
    assert library.calls == [
        ("krun_set_snapshot_memory_fd2", 7, 5, 1),
        ("krun_set_snapshot", 7, str(room / "given").encode()),
    ]
    waiting = threading.Thread(target=monitor.wait, daemon=True)
    waiting.start()
    assert backend.status(sockets) == "inmigrate" and waiting.is_alive()
    for _ in range(2):  # again is no harm
        backend.resume(sockets)
        waiting.join(HANG_S)
        assert not waiting.is_alive()
        assert backend.status(sockets) == "running"


def test_one_that_is_neither_saved_nor_restored_is_told_nothing(room: Path) -> None:
    library = Library()
    krun_snapshots.prepare(library, 7, saves=False, memory=None)  # type: ignore[arg-type]
    assert library.calls == [] and "SMOLVM_FORKABLE" not in os.environ


def test_refusals_come_back_in_words(serve: Serve, tmp_path: Path) -> None:
    library, _, sockets = serve(True)
    backend, memory = Krun(), MemoryFile(tmp_path / "memory", shared=True)
    with pytest.raises(NixboxError, match=r"libkrun cannot pause the machine: .*No such file"):
        backend.pause(sockets)  # it was not started to be saved
    krun_snapshots.prepare(library, 7, saves=True, memory=None)  # type: ignore[arg-type]
    library.refuses = "SAVE"
    with pytest.raises(NixboxError, match="libkrun cannot save the machine: ERR EIO no room"):
        backend.save(sockets, memory)
    with pytest.raises(NixboxError, match="libkrun cannot load the machine: that is no saved machine"):
        backend.load(sockets, b"nothing like it")
    library.refuses = "krun_set_snapshot"
    with pytest.raises(
        NixboxError, match="libkrun cannot load the machine: krun_set_snapshot: its own words"
    ) as caught:
        backend.load(sockets, krun_snapshots.pack({}))
    assert "--backend qemu" in str(caught.value.hint)
