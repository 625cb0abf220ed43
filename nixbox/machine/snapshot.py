"""The saved state of one machine: memory, devices, and `snapshot.json`, which says when it may be used.

`snapshot.json` holds exactly these fields:

    imageHash           "nix:" and the 32 characters of the image's store path that are its hash
    overlayFingerprint  "sha256:" over the disk's size, its time of last change (ns) and its first MiB
    envHash             "sha256:" over the machine's id and its environment, sorted by name
    hypervisorVersion   hypervisor with version, accelerator, CPU, host system, and the machine's shape
    createdAt           ISO 8601, UTC, to the second
    invalidateReasons   [] as long as it may be used; else why it may not, and memory and state are gone

The memory holds whatever the guest held, secrets too: the directory is 0700, its files 0600. See
docs/decisions/013-what-a-snapshot-contains.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from nixbox import paths
from nixbox.digests import sha256
from nixbox.machine import saved
from nixbox.values import asdict, dataclass

MANIFEST = "snapshot.json"
_FIRST_BYTES = 1 << 20
_GOING_ON = "going-on"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The fields of `snapshot.json`, which are named as the format has them."""

    imageHash: str
    overlayFingerprint: str
    envHash: str
    hypervisorVersion: str
    createdAt: str
    invalidateReasons: tuple[str, ...] = ()


_WORDS = {
    "imageHash": "the image has changed",
    "overlayFingerprint": "the disk was changed since",
    "envHash": "the environment has changed",
    "hypervisorVersion": "the hypervisor, the CPU or the machine's shape has changed",
}


def image_hash(image: str) -> str:
    """Of a store path, `/nix/store/<hash>-<name>`."""
    return f"nix:{Path(image).name[:32]}"


def overlay_fingerprint(overlay: Path) -> str:
    """Changes with every write to the disk's file."""
    info = overlay.stat()
    with overlay.open("rb") as file:
        first = file.read(_FIRST_BYTES)
    return "sha256:" + sha256(f"{info.st_size} {info.st_mtime_ns} ".encode() + first).hexdigest()


def env_hash(machine_id: str, env: Mapping[str, str]) -> str:
    """Names and values; the machine's id keeps equal ones of two machines apart."""
    text = json.dumps([machine_id, sorted(env.items())])
    return "sha256:" + sha256(text.encode(errors="surrogateescape")).hexdigest()


def hypervisor_version(hypervisor: str, cpu: str, shape: list[str]) -> str:
    """All that the saved state of devices depends on, readable but for the command line, which is hashed."""
    import platform

    digest = sha256("\0".join(shape).encode()).hexdigest()[:16]
    return f"{hypervisor}; {cpu}; {platform.system()} {platform.machine()}; shape {digest}"


def now() -> str:
    """ISO 8601, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all."""
    text = json.dumps(asdict(manifest), indent=2) + "\n"
    paths.write_atomic(directory / MANIFEST, text, mode=0o600)


def read(directory: Path) -> Manifest | None:
    """The manifest; None where there is none. One that cannot be read says so in its reasons."""
    try:
        data = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        data = None
    fields = tuple(Manifest.__dataclass_fields__)
    if not isinstance(data, dict) or set(data) != set(fields) or not isinstance(data["invalidateReasons"], list):
        return Manifest("", "", "", "", "", (f"{MANIFEST} is damaged",))
    return Manifest(**(data | {"invalidateReasons": tuple(map(str, data["invalidateReasons"]))}))


def reasons(directory: Path, kept: Manifest, wanted: Manifest) -> list[str]:
    """Why a snapshot may not be used; empty when it may."""
    if kept.invalidateReasons:
        return list(kept.invalidateReasons)
    found = [words for name, words in _WORDS.items() if getattr(kept, name) != getattr(wanted, name)]
    if _lost_track(directory):
        found.append("it was resumed before the host's last start")
    return found + saved.faults(directory)


def invalidate(directory: Path, kept: Manifest, why: list[str]) -> None:
    """Take memory and state away; the manifest stays and says why."""
    for name in ("memory", "state", saved.SEAL, _GOING_ON):
        (directory / name).unlink(missing_ok=True)
    write(directory, Manifest(**(asdict(kept) | {"invalidateReasons": tuple(why)})))


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def going_on(directory: Path) -> None:
    """Remember, before a guest goes on from here, in which life of the host it did."""
    paths.write_atomic(directory / _GOING_ON, _boot_id(), mode=0o600)


def went_on(directory: Path) -> bool:
    """Whether a guest has gone on from here."""
    return (directory / _GOING_ON).exists()


def _lost_track(directory: Path) -> bool:
    """Whether a guest went on from here in a former life of the host: a power cut can lose the disk's new times."""
    try:
        return (directory / _GOING_ON).read_text() != _boot_id()
    except FileNotFoundError:
        return False


def remove(directory: Path) -> None:
    """Remove a snapshot, used or not."""
    paths.remove_tree(directory)
