"""Templates: guests that were saved once and that machines are restored from, under the cache directory.

A template's directory is named after its key and holds `template.json` (the key), `memory` (the guest's memory, which
machines map privately), `state` (of its devices), for the stage `ready` `overlay.img` (the pristine disk) and
`setup.log`, and `used`, whose time of change is that of the last use. Directories are made aside and renamed. See
docs/decisions/011-templates.md.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nixbox import paths
from nixbox.digests import sha256
from nixbox.errors import NixboxError
from nixbox.machine import saved
from nixbox.values import asdict, dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Stage = Literal["boot", "ready"]
else:  # without what `typing` costs
    Stage = str

FORMAT = 1
MANIFEST = "template.json"


@dataclass(frozen=True, slots=True)
class Key:
    """Everything that a saved guest depends on; a machine that differs in any of it cannot use the template.

    `root` tells the files of the root image and of the sidecars from others at the same store paths (a build that
    used the network can have another result the next time); `hypervisor` is its name and version, `cpu` the host's
    model and features where the guest sees them, `devices` the hypervisor's command line without what is one
    machine's own. For stage `boot` the rest is None: no disk has been looked at. For `ready`, `user` is the guest's
    user, `setup` the hash of the setup that ran (None: none did), `files` that of the files which the base wants on
    a new disk.
    """

    stage: Stage
    image: str
    backend: str
    hypervisor: str
    accelerator: str
    cpu: str
    vcpus: int
    memory_mib: int
    root: str
    devices: tuple[str, ...]
    user: str | None = None
    setup: str | None = None
    disk_mib: int | None = None
    files: str | None = None
    format: int = FORMAT

    def as_dict(self) -> dict[str, object]:
        """For the manifest: JSON has no tuples."""
        return asdict(self) | {"devices": list(self.devices)}

    @property
    def ident(self) -> str:
        """The name of the template's directory: 32 hexadecimal digits."""
        return sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Template:
    """A whole template, its files held open (descriptors): it may be removed while it is used.

    `path` is None for one that was never published.
    """

    path: Path | None
    key: Key
    memory: int
    overlay: int | None
    state: bytes
    setup_log: str = ""

    def close(self) -> None:
        """Let go of the files."""
        for fd in (self.memory, self.overlay):
            if fd is not None:
                os.close(fd)


@dataclass(frozen=True, slots=True)
class Info:
    """What `nixbox template list` shows; times in seconds since the epoch, `damage` None for a whole one."""

    ident: str
    stage: str
    image: str
    vcpus: int
    memory_mib: int
    setup: bool
    size_bytes: int
    created_at: int
    used_at: int
    damage: str | None


def directory() -> Path:
    """`$XDG_CACHE_HOME/nixbox/templates`, made and private."""
    paths.cache_dir().mkdir(parents=True, exist_ok=True)
    return paths.private_dir(paths.cache_dir() / "templates")


def host_cpu(accelerator: str) -> str:
    """What a guest sees of the host's CPU: nothing under emulation; else vendor, model, stepping and flags."""
    if accelerator == "tcg":
        return "emulated"
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    try:
        block = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        import platform

        return f"{platform.machine()} {platform.processor()}"
    found = dict(
        part.split(":", 1) for line in block.splitlines() if (part := line.replace("\t", "")) and ":" in part
    )
    text = "|".join(found.get(name, "").strip() for name in wanted)
    return f"{found.get('model name', '').strip()} {sha256(text.encode()).hexdigest()[:16]}"


@contextmanager
def making(key: Key, on_wait: Callable[[], None]) -> Iterator[Path]:
    """A directory to make a template in, for one process at a time; it is gone afterwards.

    `on_wait` is called once when another process is making it. After a kill -9 the next making clears up.
    """
    fd = _lock_file(key.ident)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(fd, fcntl.LOCK_EX)  # ends with the other process, however that ends
        sweep()
        work = directory() / f".new-{key.ident}"
        paths.remove_tree(work)
        work.mkdir(mode=0o700)
        try:
            yield work
        finally:
            paths.remove_tree(work)
    finally:
        os.close(fd)


def _lock_file(ident: str) -> int:
    return os.open(directory() / f"{ident}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def sweep() -> None:
    """Remove what a making or a removal that was killed has left."""
    for left in directory().glob(".new-*"):
        fd = _lock_file(left.name.removeprefix(".new-"))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            paths.remove_tree(left)
        except BlockingIOError:  # it is being made
            continue
        finally:
            os.close(fd)
    for left in directory().glob(".gone-*"):
        paths.remove_tree(left)


def publish(work: Path, key: Key) -> None:
    """Seal the files in `work` and make them the template of `key`, in one step."""
    names = ["memory", "state", *(["overlay.img"] if key.stage == "ready" else [])]
    manifest = key.as_dict() | {"created_at": int(time.time())}
    (work / "used").touch(mode=0o600)
    paths.write_atomic(work / MANIFEST, json.dumps(manifest, indent=1) + "\n", mode=0o600)
    saved.seal(work, [*names, MANIFEST])
    target = directory() / key.ident
    remove(target)
    work.rename(target)
    # What it was sealed with still holds: a rename of a directory changes no time of the files in it.


def find(key: Key, on_damage: Callable[[str], None]) -> Template | None:
    """The template of `key`, checked and opened, or None. One that is damaged is said, and removed."""
    path = directory() / key.ident
    if not os.path.lexists(path):
        return None
    try:
        opened = open_files(path, key)
    except OSError:
        opened = None
    # Checked after it was opened: what is checked is what will be used.
    with ExitStack() as undo:
        if opened is not None:
            undo.callback(opened.close)
        wrong = _damage(path, key)
        if wrong is None and opened is not None:
            with contextlib.suppress(OSError):
                os.utime(path / "used")
            undo.pop_all()
            return opened
    if os.path.lexists(path):  # else somebody has just removed it
        on_damage(f"a template is damaged ({wrong or 'it cannot be read'}); it is removed and made again")
        remove(path)
    return None


def open_files(path: Path, key: Key, *, published: bool = True) -> Template:
    """Open a template's files. Raises OSError."""
    log = path / "setup.log"
    with ExitStack() as undo:
        # QEMU opens it for writing, too, though it maps it privately.
        memory = os.open(path / "memory", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        undo.callback(os.close, memory)
        overlay = None
        if key.stage == "ready":
            overlay = os.open(path / "overlay.img", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            undo.callback(os.close, overlay)
        state = (path / "state").read_bytes()
        text = log.read_text(errors="replace") if log.exists() else ""
        undo.pop_all()
    return Template(path if published else None, key, memory, overlay, state, text)


def _damage(path: Path, key: Key | None) -> str | None:
    """What is wrong with a template, or None."""
    overlay = ("overlay.img",) if key is not None and key.stage == "ready" else ()
    wrong = saved.faults(path, ("memory", "state", MANIFEST, *overlay))
    if wrong:
        return "; ".join(wrong)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        manifest.pop("created_at")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} is damaged"
    if key is not None and manifest != key.as_dict():
        differs = [name for name, value in key.as_dict().items() if manifest.get(name) != value]
        return f"it was made for another {', '.join(differs) or 'machine'}"
    return None


def remove(path: Path) -> None:
    """Remove a template, which those who use it do not notice. Raises OSError."""
    gone = path.with_name(f".gone-{path.name}-{os.urandom(4).hex()}")
    try:
        path.rename(gone)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        gone = path  # a container's image has it: its file system (overlayfs) renames no directory of a lower layer
    if gone.is_dir() and not gone.is_symlink():
        paths.remove_tree(gone)
    else:
        gone.unlink(missing_ok=True)


def every() -> list[Info]:
    """Every template, the last used first."""
    found = []
    for path in directory().glob("[0-9a-f]*"):
        if path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # it is being removed
                found.append(_info(path))
    return sorted(found, key=lambda info: -info.used_at)


def _info(path: Path) -> Info:
    size = sum(file.lstat().st_blocks * 512 for file in path.iterdir())
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        facts = (manifest["stage"], manifest["image"], manifest["vcpus"], manifest["memory_mib"])
        setup, created = manifest["setup"] is not None, manifest["created_at"]
    except (OSError, ValueError, KeyError, TypeError):
        facts, setup, created = ("?", "?", 0, 0), False, int(path.lstat().st_mtime)
    used = path / "used"
    used_at = int(used.stat().st_mtime) if used.exists() else created
    damage = "; ".join(saved.faults(path)) or None
    return Info(path.name, *facts, setup, size, created, used_at, damage)


def over_limit(infos: list[Info], limit_bytes: int, keep: str | None = None) -> list[Info]:
    """Those to remove so that the rest fits into `limit_bytes`: damaged ones, then the least recently used.

    `keep` names one that stays in any case.
    """
    going = [info for info in infos if info.damage is not None and info.ident != keep]
    staying = [info for info in infos if info not in going]
    total = sum(info.size_bytes for info in staying)
    for info in sorted(staying, key=lambda info: info.used_at):
        if total <= limit_bytes:
            break
        if info.ident != keep:
            going.append(info)
            total -= info.size_bytes
    return going


def by_name(beginning: str) -> list[Info]:
    """The templates whose identifier begins so. Raises NixboxError when there is none."""
    found = [info for info in every() if info.ident.startswith(beginning)]
    if not found:
        raise NixboxError(f"no template's name begins with `{beginning}`", hint="`nixbox template list` shows them")
    return found
