"""What answers in cloud-hypervisor's place in the unit tests, where there is no KVM: no guest, but its API.

It holds every request against cloud-hypervisor's own description of the API (tests/data/cloud-hypervisor.yaml) and
refuses what does not fit. What it got is written down. Run as a program it takes cloud-hypervisor's options.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DESCRIPTION = Path(__file__).parent / "data/cloud-hypervisor.yaml"
# What the description lacks. RestoreConfig in vmm/src/config.rs, and docs/snapshot_restore.md:
# "For a VM created with FDs explicitly passed to NetConfig, a set of valid FDs need to be provided".
BEYOND: dict[str, dict[str, Any]] = {
    "RestoreConfig": {
        "net_fds": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "num_fds"],
                "properties": {"id": {"type": "string"}, "num_fds": {"type": "integer"}},
            },
        }
    }
}
TYPES: dict[str, type] = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
SAID = {"description", "default", "format", "deprecated"}  # keywords that demand nothing
UNDERSTOOD = {"$ref", "type", "enum", "required", "properties", "additionalProperties", "items", "minimum"}


class Description:
    """The API's description, and what does not fit it."""

    def __init__(self) -> None:
        document = yaml.safe_load(DESCRIPTION.read_text())
        self.paths: dict[str, Any] = document["paths"]
        self.schemas: dict[str, Any] = document["components"]["schemas"]

    def request(self, method: str, path: str, body: Any) -> list[str]:
        """The faults of a request; `body` None: it has none."""
        described = self.paths.get(path.removeprefix("/api/v1"), {}).get(method.lower())
        if described is None or not path.startswith("/api/v1/"):
            return [f"there is no {method} {path}"]
        wanted = described.get("requestBody")
        if wanted is None or body is None:
            return (
                []
                if wanted is None and body is None
                else [f"{path}: a body is {'missing' if wanted else 'not taken'}"]
            )
        return list(self.faults(body, wanted["content"]["application/json"]["schema"], path))

    def faults(self, value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
        """What of a value does not fit a schema; a property that is not described is a fault."""
        beyond: dict[str, Any] = {}
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            schema, beyond = self.schemas[name], BEYOND.get(name, {})
        assert set(schema) <= UNDERSTOOD | SAID, f"{where}: {set(schema) - UNDERSTOOD - SAID} is not understood here"
        kind = TYPES[schema["type"]]
        if type(value) is not kind:
            yield f"{where}: {value!r} is no {schema['type']}"
        elif "enum" in schema and value not in schema["enum"]:
            yield f"{where}: {value!r} is none of {schema['enum']}"
        elif "minimum" in schema and value < schema["minimum"]:
            yield f"{where}: {value!r} is below {schema['minimum']}"
        elif isinstance(value, list):
            for number, item in enumerate(value):
                yield from self.faults(item, schema["items"], f"{where}[{number}]")
        elif isinstance(value, dict):
            yield from (f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value)
            properties = schema.get("properties", {}) | beyond
            for name, item in value.items():
                described = properties.get(name, schema.get("additionalProperties"))
                if described is None:
                    yield f"{where}.{name} is unknown"
                else:
                    yield from self.faults(item, described, f"{where}.{name}")


@dataclass
class Refusal(Exception):
    """An answer of HTTP's `status`, with the chain of causes that cloud-hypervisor sends."""

    status: int
    words: list[str]


@dataclass
class StandIn:
    """The API's server: the VM's config and state, and a guest that knows a few words on its serial port."""

    listener: socket.socket
    events: int
    record: Path
    state: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    description: Description = field(default_factory=Description)
    directories: dict[str, socket.socket] = field(default_factory=dict)
    running: threading.Event = field(default_factory=threading.Event)

    def serve(self) -> None:
        """One request a connection, until `vmm.shutdown`."""
        while True:
            connection, _ = self.listener.accept()
            with connection:
                if self._answer(connection) == "/api/v1/vmm.shutdown":
                    return

    def _answer(self, connection: socket.socket) -> str:
        data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 8)
        head, _, content = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, path, _ = first.split()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(content) < int(headers.get("content-length", "0")):
            content += connection.recv(1 << 16)
        body = json.loads(content) if content else None
        links = [str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in fds]
        for fd in fds:
            os.close(fd)
        faults = self.description.request(method, path, body)
        with self.record.open("a") as file:
            what = path.removeprefix("/api/v1/")
            file.write(json.dumps({"what": what, "body": body, "fds": links, "faults": faults}) + "\n")
        status, answer = 400, faults
        if not faults:
            try:
                answer = self._do(what, body, links)
                status = 204 if answer is None else 200
            except Refusal as refusal:
                status, answer = refusal.status, refusal.words
        text = "" if answer is None else json.dumps(answer)
        length = f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n" if text else ""
        connection.sendall(f"HTTP/1.1 {status} \r\nServer: Cloud Hypervisor API\r\n{length}\r\n{text}".encode())
        if self.state == "Running":
            self.running.set()
        return path

    def _do(self, what: str, body: Any, fds: list[str]) -> Any:
        match what:
            case "vm.create":
                self._created(body, "Created")
            case "vm.add-net":
                if len(fds) != 1:
                    raise Refusal(500, ["Error from API", f"{len(fds)} descriptors"])
                self.config["net"] = [body]
            case "vm.boot":
                self._turn("Created", "Running")
            case "vm.pause":
                self._turn("Running", "Paused")
            case "vm.resume":
                self._turn("Paused", "Running")
            case "vm.info":
                if self.state is None:
                    raise Refusal(404, ["Error from API", "The VM info is not available", "VM is not created"])
                return {"config": self.config, "state": self.state}
            case "vm.snapshot":
                self._snapshot(Path(body["destination_url"].removeprefix("file://")))
            case "vm.restore":
                directory = Path(body["source_url"].removeprefix("file://"))
                assert (directory / "state.json").read_text() == "the state" and len(fds) == 1
                self._created(json.loads((directory / "config.json").read_text()), "Paused")
            case "vm.add-fs":
                return self._add_fs(body)
            case "vm.remove-device":
                if body["id"] not in self.directories:
                    raise Refusal(404, ["Error from API", f"no device {body['id']}"])
                self.directories.pop(body["id"]).close()
        return None

    def _turn(self, before: str, after: str) -> None:
        if self.state != before:
            raise Refusal(500, ["Error from API", f"Invalid VM state transition: {self.state} to {after}"])
        self.state = after

    def _created(self, config: dict[str, Any], state: str) -> None:
        kernel = Path(config["payload"]["kernel"])
        if not kernel.exists():
            raise Refusal(500, ["Error from API", "Cannot open kernel file", f"{kernel}: No such file or directory"])
        Path(config["console"]["file"]).write_text("")
        self.config, self.state = config, state
        port = socket.socket(socket.AF_UNIX)
        port.bind(config["serial"]["socket"])
        port.listen(1)
        threading.Thread(target=self._guest, args=(port,), daemon=True).start()

    def _guest(self, port: socket.socket) -> None:
        """What a guest says on its serial port, and what it does when it is told."""
        line, _ = port.accept()
        self.running.wait()
        with line, line.makefile("rb") as lines:
            line.sendall(b"boot 2\n")
            for said in lines:
                match said:
                    case b"ping\n":
                        line.sendall(b"pong\n")
                    case b"die\n":
                        os._exit(7)
                    case b"reboot\n":
                        event = {"timestamp": {"secs": 1}, "source": "vm", "event": "rebooting", "properties": None}
                        os.write(self.events, json.dumps(event, indent=2).encode() + b"\n\n")

    def _snapshot(self, directory: Path) -> None:
        if self.state != "Paused":
            raise Refusal(500, ["Error from API", "The VM is not paused"])
        (directory / "config.json").write_text(json.dumps(self.config))
        (directory / "state.json").write_text("the state")

    def _add_fs(self, body: dict[str, Any]) -> dict[str, str]:
        zones = self.config["memory"].get("zones", [])
        if not all(zone["shared"] for zone in zones) or not zones:
            raise Refusal(500, ["Error from API", "Using vhost-user requires using shared memory or huge pages"])
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(body["socket"])
        # Ask for the features, as every vhost-user front-end does first (docs/interop/vhost-user.rst).
        connection.sendall(struct.pack("=III", 1, 1, 0))
        reply = connection.recv(20)
        if reply != struct.pack("=IIIQ", 1, 5, 8, 1 << 30):
            raise Refusal(500, ["Error from API", f"the backend said {reply!r}"])
        self.directories[body["id"]] = connection
        return {"id": body["id"], "bdf": "0000:00:06.0"}


def main() -> None:
    """The program: cloud-hypervisor's options, and where to write down what came."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--api-socket", required=True)
    parser.add_argument("--event-monitor", required=True)
    parser.add_argument("--seccomp", choices=["true"], required=True)
    options = parser.parse_args()
    api, events = (int(word.removeprefix("fd=")) for word in (options.api_socket, options.event_monitor))
    options.record.with_suffix(".pid").write_text(str(os.getpid()))
    StandIn(socket.socket(fileno=api), events, options.record).serve()


if __name__ == "__main__":
    main()
