"""Who answers a guest whose virtiofsd is gone: every request that it waits for, and every later one, fails with EIO.

Nobody else can. The guest's driver waits for ever, even for the removal of its device, and a hypervisor that has
lost a vhost-user process keeps the device as it is. So whatever of the device is needed is collected while virtiofsd
lives: the guest's memory, the places of its queues there, and the event descriptors that interrupt the guest.

The formats: split virtqueues (virtio 1.2, 2.7), FUSE's headers (linux/fuse.h). The guest is not trusted, and the
queues are its own memory: what is not a well-formed request ends the work, and nothing is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from nixbox.plan.model import Queue
from nixbox.values import asdict, dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SYS_PIDFD_GETFD = 438  # on every architecture (Linux 5.6)
_POLL_S = 0.02
_NEXT, _WRITE, _INDIRECT = 1, 2, 4  # flags of a descriptor
_IN_HEADER = struct.Struct("<IIQ")  # length, opcode, unique; more follows
_OUT_HEADER = struct.Struct("<IiQ")  # length, error, unique
_DESCRIPTOR = struct.Struct("<QIHH")  # address, length, flags, next

# Where QEMU's q35 splits memory that does not fit below the devices (hw/i386/pc_q35.c).
_LOW_MOST, _LOW_IF_MORE, _HIGH = 0xB0000000, 0x80000000, 1 << 32


class Broken(Exception):
    """What should be a request is none."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device's queues, the guest's memory and the event descriptors, as descriptors of this process."""

    queues: tuple[Queue, ...]
    memory: int
    events: tuple[int, ...]

    def as_json(self) -> list[dict[str, Any]]:
        """The queues, for a socket; the descriptors travel beside them."""
        return [asdict(queue) for queue in self.queues]

    @classmethod
    def from_json(cls, data: list[dict[str, Any]], fds: list[int]) -> Device:
        """What `as_json` gave, with the memory's and the events' descriptors."""
        return cls(tuple(Queue(**queue) for queue in data), fds[0], tuple(fds[1:]))

    def close(self) -> None:
        """Let go of the descriptors."""
        for fd in (self.memory, *self.events):
            os.close(fd)


def collect(pid: int, queues: tuple[Queue, ...]) -> Device | None:
    """Take a virtiofsd's descriptors (pidfd_getfd(2)); None when it cannot be done, or it has none yet."""
    libc = ctypes.CDLL(None, use_errno=True)
    memory, events = None, []
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            link = str(entry.readlink())
            if link not in ("anon_inode:[eventfd]",) and not link.startswith("/memfd:"):
                continue
            fd = libc.syscall(ctypes.c_long(_SYS_PIDFD_GETFD), pidfd, int(entry.name), 0)
            if fd < 0:
                continue
            if not link.startswith("/memfd:"):
                events.append(fd)
            elif memory is None:
                memory = fd
            else:
                os.close(fd)
    except OSError:  # it has ended meanwhile
        pass
    finally:
        os.close(pidfd)
    if memory is not None:
        return Device(queues, memory, tuple(events))
    for fd in events:
        os.close(fd)
    return None


class StandIn:
    """Answers for a device, in a thread, until it is told to stop or its queues are none any more."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._memory = mmap.mmap(device.memory, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and let go of the guest's memory."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._memory.close()
        self.device.close()

    def _run(self) -> None:
        with contextlib.suppress(Broken, OSError):
            self._interrupt()  # virtiofsd may have ended between an answer and its interrupt
            while not self._stop.wait(_POLL_S):
                self.answer()

    def answer(self) -> int:
        """Answer all that waits; returns how much that was. Raises Broken."""
        count = sum(self._answer(queue) for queue in self.device.queues)
        if count:
            self._interrupt()
        return count

    def _interrupt(self) -> None:
        for fd in self.device.events:  # the one that interrupts the guest is among them; the others mind nothing
            os.eventfd_write(fd, 1)

    def _answer(self, queue: Queue) -> int:
        # virtiofsd takes requests in order, so what was used so far says which are open.
        available, used = self._index(queue.available), self._index(queue.used)
        waiting = (available - used) & 0xFFFF
        if waiting > queue.size:
            raise Broken
        for i in range(waiting):
            slot = (used + i) % queue.size
            (head,) = struct.unpack("<H", self._read(queue.available + 4 + 2 * slot, 2))
            written = self._refuse(queue, head)
            self._write(queue.used + 4 + 8 * slot, struct.pack("<II", head, written))
            self._write(queue.used + 2, struct.pack("<H", (used + i + 1) & 0xFFFF))
        return waiting

    def _refuse(self, queue: Queue, head: int) -> int:
        """Put an error where the answer to a request belongs; returns how many bytes that were."""
        readable, writable = b"", None
        length = 0
        for address, size, flags in self._chain(queue, head):
            if flags & _WRITE:
                writable = (address, size) if writable is None else writable
            else:
                length += size
                if len(readable) < _IN_HEADER.size:
                    readable += self._read(address, min(size, _IN_HEADER.size))
        if len(readable) < _IN_HEADER.size:
            raise Broken
        said, _, unique = _IN_HEADER.unpack(readable[: _IN_HEADER.size])
        if said != length:
            raise Broken
        if writable is None:  # what wants no answer
            return 0
        if writable[1] < _OUT_HEADER.size:
            raise Broken
        self._write(writable[0], _OUT_HEADER.pack(_OUT_HEADER.size, -errno.EIO, unique))
        return _OUT_HEADER.size

    def _chain(self, queue: Queue, head: int) -> Iterator[tuple[int, int, int]]:
        """Address, length and flags of every descriptor of a request."""
        table, size, at = queue.descriptors, queue.size, head
        for _ in range(1 << 12):
            if at >= size:
                raise Broken
            address, length, flags, following = _DESCRIPTOR.unpack(self._read(table + 16 * at, 16))
            if flags & _INDIRECT:
                if table != queue.descriptors or length % 16 or not length:
                    raise Broken
                table, size, at = address, length // 16, 0
                continue
            yield address, length, flags
            if not flags & _NEXT:
                return
            at = following
        raise Broken

    def _index(self, ring: int) -> int:
        index: int = struct.unpack("<H", self._read(ring + 2, 2))[0]
        return index

    def _offset(self, address: int, length: int) -> int:
        """Where a guest-physical address lies in the memory's file."""
        total = len(self._memory)
        low = _LOW_IF_MORE if total >= _LOW_MOST else _LOW_MOST
        offset = address if address < low else address - _HIGH + low
        if (address >= low and address < _HIGH) or offset + length > total:
            raise Broken
        return offset

    def _read(self, address: int, length: int) -> bytes:
        offset = self._offset(address, length)
        return self._memory[offset : offset + length]

    def _write(self, address: int, data: bytes) -> None:
        offset = self._offset(address, len(data))
        self._memory[offset : offset + len(data)] = data
