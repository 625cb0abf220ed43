"""The launcher of a cloud-hypervisor machine: its process for as long as the machine lives, in its network namespace.

It starts cloud-hypervisor and the VM, and does what that has no word for: hosts come and go on the control channel
and on SSH (`relay`), connected sockets become directories of the guest (`cloud_hypervisor_vhost`), and a guest that
restarts ends.

A program of its own: `main` reads what to do as JSON from its standard input, and says why it failed on stderr, the
machine's log. Each ends with the other, cloud-hypervisor and its launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nixbox import light, linux, run
from nixbox.errors import NixboxError
from nixbox.machine import relay
from nixbox.machine.cloud_hypervisor_api import Api
from nixbox.machine.cloud_hypervisor_vhost import Directory
from nixbox.plan.network import GUEST_MAC
from nixbox.values import dataclass, field

_NET = "net"
_BOOT_TIMEOUT_S = 60.0  # all of a guest's memory is mapped, on a busy host
_RESTORE_TIMEOUT_S = 600.0
_UNPLUG_TIMEOUT_S = 5.0
_CLIENT_TIMEOUT_S = 10.0
_REQUEST_LIMIT = 1 << 16  # bytes; it comes as one piece
_REBOOT = re.compile(rb'"event":\s*"rebooting"')
_REBOOT_LONGEST = 40  # bytes that it may match


@dataclass(frozen=True, slots=True)
class Settings:
    """What `CloudHypervisor.start` wants: the fields of its JSON. `fds` are ours and cloud-hypervisor's, by name."""

    program: str
    vm: dict[str, Any]
    incoming: bool
    api: str
    guest: list[Any]
    log: str
    fds: dict[str, int]
    pass_fds: list[int]


def main() -> None:
    """Be the launcher; ends with cloud-hypervisor's exit code, or 1 when there never was a VM."""
    settings = Settings(**json.load(sys.stdin))
    try:
        code = Launcher(settings).live()
    except (NixboxError, OSError) as error:
        print(f"nixbox: the machine could not be started: {error}", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code if code >= 0 else 128 - code)  # the relays' threads wait for what does not come any more


@dataclass(slots=True)
class Launcher:
    """One machine's cloud-hypervisor, its relays, and its shared directories by tag."""

    settings: Settings
    directories: dict[str, Directory] = field(default_factory=dict)
    _number: int = 0

    def live(self) -> int:
        """The whole life of the machine; returns cloud-hypervisor's exit code. Raises NixboxError, OSError."""
        settings = self.settings
        events, theirs = os.pipe()
        child = self._start(theirs)
        for fd in (theirs, settings.fds["api"]):  # or who waits at them would not see cloud-hypervisor's end
            os.close(fd)
        _thread(_end_at_reboot, events, child)
        try:
            if not settings.incoming:
                self._boot()
        except BaseException:
            child.kill()
            child.wait()
            raise
        _thread(relay.serve_shell, _listener(settings.fds["shell"]), (settings.guest[0], settings.guest[1]))
        _thread(self._serve, _listener(settings.fds["launcher"]))
        return child.wait()

    def _start(self, events: int) -> run.Process:
        """cloud-hypervisor without a VM: its API listens already, on the descriptor that it inherits."""
        settings = self.settings
        argv = [settings.program, "--api-socket", f"fd={settings.fds['api']}"]
        argv += ["--event-monitor", f"fd={events}", "--seccomp", "true"]
        ours = os.getpid()
        inherited = (settings.fds["api"], events, *settings.pass_fds)
        log = Path(settings.log)

        def inside() -> None:
            linux.make_room()
            linux.end_with_parent(ours)

        return run.spawn(argv, log=log, pass_fds=inherited, inside=inside)

    def _boot(self) -> None:
        api = Api(Path(self.settings.api))
        Path(self.settings.vm["serial"]["socket"]).unlink(missing_ok=True)  # it is only ever made anew
        api.put("vm.create", self.settings.vm, timeout_s=_BOOT_TIMEOUT_S)
        # It takes the largest packet's size from the device, and could not set it: it has no right over the network.
        api.put("vm.add-net", {"id": _NET, "mac": GUEST_MAC}, fds=[self.settings.fds["tap"]])
        self._serve_control()
        api.put("vm.boot", timeout_s=_BOOT_TIMEOUT_S)

    def _serve_control(self) -> None:
        """Connect to the guest's first serial port, and let hosts come to it."""
        guest = socket.socket(socket.AF_UNIX)
        guest.connect(self.settings.vm["serial"]["socket"])
        _thread(relay.serve_control, _listener(self.settings.fds["control"]), guest)

    # --- what the machine's owner asks for while it runs ---

    def _serve(self, listener: socket.socket) -> None:
        while True:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):  # one that has gone, or says nothing
                client.settimeout(_CLIENT_TIMEOUT_S)
                data, fds = light.receive_fds(client, _REQUEST_LIMIT, 1)
                try:
                    answer = self._do(json.loads(data), fds)
                except (NixboxError, OSError, LookupError, ValueError) as error:
                    answer = {"error": str(error)}
                finally:
                    for fd in fds:
                        os.close(fd)
                client.sendall(json.dumps(answer).encode())

    def _do(self, request: dict[str, str], fds: list[int]) -> dict[str, Any]:
        match request["do"]:
            case "attach":
                self._attach(request["tag"], socket.socket(fileno=fds.pop()))
                return {}
            case "detach":
                return {"gone": self._detach(request["tag"])}
            case "restore":
                self._restore(Path(request["directory"]))
                return {}
            case what:
                raise NixboxError(f"the launcher cannot {what}")

    def _attach(self, tag: str, connection: socket.socket) -> None:
        self._number += 1
        path = Path(self.settings.api).with_name(f"fs{self._number}")
        directory = Directory(connection)
        device = {"id": tag, "tag": tag, "socket": str(path), "num_queues": 1, "queue_size": 512}
        with directory.offered(path):
            Api(Path(self.settings.api)).put("vm.add-fs", device)
        self.directories[tag] = directory

    def _detach(self, tag: str) -> bool:
        """Whether the guest let go of it: cloud-hypervisor then closes its end."""
        directory = self.directories.get(tag)
        if directory is None:
            return False
        try:
            Api(Path(self.settings.api)).put("vm.remove-device", {"id": tag})
        except NixboxError:
            return False
        if not directory.wait(_UNPLUG_TIMEOUT_S):
            return False
        del self.directories[tag]
        return True

    def _restore(self, directory: Path) -> None:
        """Begin the VM from a snapshot, with this machine's own files in place of the saved one's."""
        file = directory / "config.json"
        file.write_text(json.dumps(with_own_files(json.loads(file.read_text()), self.settings.vm)))
        Path(self.settings.vm["serial"]["socket"]).unlink(missing_ok=True)
        wanted = {"source_url": f"file://{directory}", "net_fds": [{"id": _NET, "num_fds": 1}]}
        api = Api(Path(self.settings.api))
        api.put("vm.restore", wanted, fds=[self.settings.fds["tap"]], timeout_s=_RESTORE_TIMEOUT_S)
        self._serve_control()


def with_own_files(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A saved VmConfig in which the disks, the console, the serial port and the memory's file are those of `own`."""
    config = saved | {"console": saved["console"] | own["console"], "serial": saved["serial"] | own["serial"]}
    paths = {disk["id"]: disk["path"] for disk in own["disks"]}
    config["disks"] = [disk | {"path": paths[disk["id"]]} for disk in saved["disks"]]
    zones = {zone["id"]: zone for zone in own["memory"].get("zones", ())}
    if zones:
        kept = [zone | zones[zone["id"]] for zone in saved["memory"]["zones"]]
        config["memory"] = saved["memory"] | {"zones": kept}
    return config


def _end_at_reboot(events: int, child: run.Process) -> None:
    """End cloud-hypervisor when its guest restarts, or a kernel that panicked would begin anew for ever.

    It tells what happens as JSON (docs/api.md); with all buffers full it forgets, so everything has to be read.
    """
    seen = b""
    with os.fdopen(events, "rb", buffering=0) as pipe:
        while data := pipe.read(1 << 16):
            seen = seen[-_REBOOT_LONGEST:] + data
            if _REBOOT.search(seen):
                child.kill()


def _listener(fd: int) -> socket.socket:
    return socket.socket(fileno=fd)


def _thread(work: Callable[..., object], *args: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=args, daemon=True)
    thread.start()
    return thread
