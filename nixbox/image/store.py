"""The Nix store: how to call Nix on this host, paths that can be computed, adding files, roots."""

from __future__ import annotations

import fcntl
import functools
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from nixbox import run
from nixbox.digests import sha1, sha256
from nixbox.errors import HostError
from nixbox.values import dataclass

STORE = Path("/nix/store")
_STATE = Path("/nix/var/nix")
_TIMEOUT_S = 120.0
# Nix's own base-32 alphabet: no e, o, u, t (libutil/hash.cc).
_BASE32 = "0123456789abcdfghijklmnpqrsvwxyz"


_NO_CACHE = ("--option", "substituters", "")


@dataclass(frozen=True, slots=True)
class NixSetup:
    """How Nix is called here: its version, and each option that its own configuration lacks, with the reason."""

    version: str
    options: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def options_of_nixpkgs(self) -> tuple[str, ...]:
        """Those for a build that the public cache has something for: without the one that turns it off."""
        words, option = list(self.options), list(_NO_CACHE)
        for i in range(len(words) - len(option) + 1):
            if words[i : i + len(option)] == option:
                return (*words[:i], *words[i + len(option) :])
        return self.options


_DAEMON_SOCKET = Path("/nix/var/nix/daemon-socket/socket")


@functools.cache
def private_root() -> Path | None:
    """The directory of a store of the user's own, where the host's store cannot be used; None where it can.

    It is the place that Nix 2.10 and later choose by themselves in that case ("local store", Nix manual); older
    ones must be told. Builds run in a user namespace that shows it as /nix. $NIX_REMOTE may name another place.
    """
    remote = os.environ.get("NIX_REMOTE", "")
    if remote.startswith("/"):
        return Path(remote)
    place = STORE
    while not place.exists():  # Nix makes its store at its first call, for who may
        place = place.parent
    if remote or os.access(place, os.W_OK) or os.access(_DAEMON_SOCKET, os.W_OK):
        return None
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if data.startswith("/") else Path.home() / ".local/share") / "nix/root"


def through_daemon() -> bool:
    """Whether Nix's daemon does what is asked here: it has rules of its own about whom it trusts."""
    if private_root() is not None:
        return False
    remote = os.environ.get("NIX_REMOTE", "")
    if remote:
        return remote == "daemon" or remote.startswith("unix:")
    return not os.access(_STATE / "db", os.W_OK)


def is_there(path: Path) -> bool:
    """Whether a path of the store is in it."""
    try:
        return physical(path).exists()
    except OSError:
        return False


def place(path: Path) -> Path:
    """Where a path of the store itself lies, whatever it is: `physical` follows one that is a link."""
    root = private_root()
    return path if root is None else root / path.relative_to("/")


def physical(path: Path) -> Path:
    """Where a file of the store really lies, symlinks followed: with a private store not where its name says.

    Raises FileNotFoundError when it is not there.
    """
    root = private_root()
    if root is None:
        return path.resolve(strict=True)
    for _ in range(40):  # as many links as the kernel follows (path_resolution(7))
        place = root / path.relative_to("/") if path.is_relative_to(STORE) else path
        if not place.is_symlink():
            return place.resolve(strict=True)
        path = place.parent / place.readlink()
    raise FileNotFoundError(f"too many links: {path}")


def env() -> dict[str, str]:
    """What Nix commands need in their environment."""
    root = private_root()
    return {"NIX_REMOTE": str(root)} if root else {}


def _nix(argv: Sequence[str], *, check: bool = True, timeout_s: float = _TIMEOUT_S) -> run.Completed:
    return run.run(argv, timeout_s=timeout_s, check=check, env=env())


@functools.cache
def setup() -> NixSetup:
    """Look at this host's Nix once. Raises HostError when there is none or it cannot be used."""
    version = _nix(["nix", "--version"]).stdout.rpartition(" ")[2].strip()
    features = ("--extra-experimental-features", "nix-command flakes")
    # The command was renamed in Nix 2.20.
    for words in (["config", "show"], ["show-config"]):
        done = _nix(["nix", *features, *words, "--json"], check=False)
        if done.code == 0:
            break
    else:
        raise HostError(f"nix does not answer: {done.stderr.strip()}", hint="try `nix show-config` yourself")
    said = json.loads(done.stdout)
    config = {key: entry["value"] for key, entry in said.items()}
    options: list[str] = []
    reasons: list[str] = []

    def add(option: Sequence[str], reason: str) -> None:
        options.extend(option)
        reasons.append(reason)

    # Newer ones count what this very call was given, so the answer says nothing about nix.conf.
    add(features, "`nix build` and flakes are experimental features, and nix.conf need not name them")
    if str(config.get("sandbox")) == "False" or config.get("sandbox") is False:
        add(("--option", "sandbox", "true"), "nix.conf turns the sandbox off; builds here need it")
    group = str(config.get("build-users-group") or "")
    if group and os.geteuid() == 0 and not _has_members(group):
        add(("--option", "build-users-group", ""), f"the group {group} has no build users")
    substituters = said.get("substituters", {})
    if substituters.get("value") and substituters["value"] == substituters.get("defaultValue"):
        # Nothing of a Debian image is ever in that cache, and asking costs seconds without a network.
        add(_NO_CACHE, "only the public Nix cache is set, which has no Debian images")
    return NixSetup(version, tuple(options), tuple(reasons))


def _has_members(group: str) -> bool:
    import grp

    try:
        return bool(grp.getgrnam(group).gr_mem)
    except KeyError:
        return False


def _base32(data: bytes) -> str:
    length = (len(data) * 8 - 1) // 5 + 1
    number = int.from_bytes(data, "little")
    return "".join(_BASE32[(number >> (5 * i)) & 31] for i in reversed(range(length)))


def _store_path(kind: str, digest_hex: str, name: str) -> Path:
    """Nix manual, "Store path specification": a SHA-256 of the description, folded to 20 bytes."""
    whole = sha256(f"{kind}:sha256:{digest_hex}:{STORE}:{name}".encode()).digest()
    folded = bytearray(20)
    for i, byte in enumerate(whole):
        folded[i % 20] ^= byte
    return STORE / f"{_base32(bytes(folded))}-{name}"


def flat_path(name: str, sha256_hex: str) -> Path:
    """The store path of a fixed-output file with this SHA-256 (what `nix-store --add-fixed sha256` gives)."""
    inner = sha256(f"fixed:out:sha256:{sha256_hex}:".encode()).hexdigest()
    return _store_path("output:out", inner, name)


def recursive_path(name: str, nar_hash: str) -> Path:
    """The store path of a fixed-output tree with this NAR hash (`sha256-…`, base 64)."""
    from binascii import a2b_base64  # `base64` has all the other alphabets, too

    digest = a2b_base64(nar_hash.removeprefix("sha256-")).hex()
    return _store_path("source", digest, name)


def invalid(paths: Iterable[Path]) -> set[Path]:
    """Those of the paths that the store does not hold."""
    wanted = [str(path) for path in paths]
    if not wanted:
        return set()
    argv = ["nix-store", "--check-validity", "--print-invalid", *wanted]
    return {Path(line) for line in _nix(argv).stdout.split()}


def add_files(files: Sequence[Path]) -> None:
    """Add files under their own names as fixed-output paths (SHA-256)."""
    # Bounded command lines: a lock has hundreds of files.
    for start in range(0, len(files), 100):
        argv = ["nix-store", "--add-fixed", "sha256", *map(str, files[start : start + 100])]
        _nix(argv)


def add_tree(directory: Path) -> Path:
    """Add a directory under its own name, content-addressed (recursive SHA-256); returns the store path."""
    argv = ["nix-store", "--add-fixed", "--recursive", "sha256", str(directory)]
    return Path(_nix(argv).stdout.strip())


def nar_hash(path: Path) -> str:
    """The NAR hash of a file tree as `sha256-…` (base 64)."""
    argv = ["nix", *setup().options, "hash", "path", "--type", "sha256", "--sri", str(path)]
    done = _nix(argv, check=False)
    if done.code != 0:  # newer Nix: SHA-256 and SRI are the defaults, and the options are gone
        done = _nix(["nix", *setup().options, "hash", "path", str(path)])
    return done.stdout.strip()


def requisites(path: Path) -> list[Path]:
    """A store path with everything it refers to."""
    argv = ["nix-store", "--query", "--requisites", str(path)]
    return [Path(line) for line in _nix(argv).stdout.split()]


@dataclass(frozen=True, slots=True)
class PathInfo:
    """What the store knows of a path: the SHA-256 (hex) and size of its NAR, and what it refers to."""

    path: Path
    nar_sha256: str
    nar_size: int
    references: tuple[Path, ...]


def path_infos(paths: Sequence[Path]) -> list[PathInfo]:
    """What the store knows of these paths, in their order."""
    if not paths:
        return []
    # Not `nix path-info --json`, whose form changes from version to version.
    words = [str(path) for path in paths]
    hashes = _nix(["nix-store", "--query", "--hash", *words]).stdout.split()
    sizes = _nix(["nix-store", "--query", "--size", *words]).stdout.split()
    found = []
    for path, said, size in zip(paths, hashes, sizes, strict=True):
        listed = _nix(["nix-store", "--query", "--references", str(path)]).stdout.split()
        references = tuple(Path(line) for line in sorted(listed))
        found.append(PathInfo(path, hash_hex(said), int(size), references))
    return found


def hash_hex(text: str) -> str:
    """A SHA-256 in hex from Nix's own `sha256:BASE32` (or `sha256:HEX`). Raises ValueError."""
    digest = text.removeprefix("sha256:")
    if len(digest) == 64:
        return bytes.fromhex(digest).hex()
    number = 0
    for i, letter in enumerate(reversed(digest)):
        number |= _BASE32.index(letter) << (5 * i)
    return number.to_bytes(32, "little").hex()


def hash_base32(sha256_hex: str) -> str:
    """A SHA-256 as Nix writes it: `sha256:BASE32`."""
    return f"sha256:{_base32(bytes.fromhex(sha256_hex))}"


def sizes(paths: Iterable[Path]) -> int:
    """Bytes that these store paths take together."""
    wanted = [str(path) for path in paths]
    if not wanted:
        return 0
    found = _nix(["nix-store", "--query", "--size", *wanted]).stdout.split()
    return sum(map(int, found))


def deriver(path: Path) -> Path | None:
    """The derivation that a store path was built by here; None for one that came from elsewhere."""
    said = _nix(["nix-store", "--query", "--deriver", str(path)]).stdout.strip()
    return Path(said) if said.endswith(".drv") else None


def closure_size(path: Path) -> int:
    """Bytes of a store path with everything it refers to."""
    return sizes(requisites(path))


def roots_of(path: Path) -> list[Path]:
    """The garbage collector roots (files outside the store) that keep a path alive."""
    argv = ["nix-store", "--query", "--roots", str(path)]
    lines = _nix(argv, check=False).stdout.splitlines()
    return [Path(line.split(" -> ")[0]) for line in lines if line.startswith("/")]


def add_root(link: Path, path: Path) -> None:
    """Make `link` a symlink to a store path and register it as a garbage collector root."""
    with adding_root(link, path):
        pass


def adding_root(link: Path, path: Path) -> AbstractContextManager[None]:
    """`add_root`, done when the body is: where Nix has to be asked, that takes some 20 ms."""
    if _rooted_at_once(link, path):
        return nullcontext()
    link.unlink(missing_ok=True)
    argv = ["nix-store", "--realise", str(path), "--add-root", str(link), "--indirect"]
    return run.beside(argv, timeout_s=_TIMEOUT_S, env=env())


def _rooted_at_once(link: Path, path: Path) -> bool:
    """Register a root without starting Nix; False where that is not ours to do, or a garbage collector is at work.

    What `nix-store --add-root` does: an indirect root is a link in `gcroots/auto`, named by the SHA-1 of the path of
    `link`, which it leads to (Nix manual, "Garbage Collector Roots"; libstore/gc.cc). The collector has `gc.lock` for
    itself (flock(2)) from before it looks for roots to its end: one that begins while it is shared finds this one.
    """
    elsewhere = not (os.environ.get("NIX_REMOTE") or "/").startswith("/") or "NIX_STATE_DIR" in os.environ
    if elsewhere or through_daemon():
        return False
    state = place(_STATE)
    name = _base32(sha1(os.fsencode(link)).digest())
    try:
        lock = os.open(state / "gc.lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # Nix's own to make
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not os.path.lexists(place(path)):
            return False
        for at, to in ((link, path), (state / "gcroots/auto" / name, link)):
            if not (at.is_symlink() and at.readlink() == to):
                _replace_link(at, to)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _replace_link(link: Path, to: Path) -> None:
    """A symlink, in the place of the one that is there."""
    temporary = link.with_name(f"{link.name}.tmp-{os.getpid()}")
    temporary.symlink_to(to)
    try:
        temporary.replace(link)
    except OSError:
        temporary.unlink()
        raise


def dead(paths: Iterable[Path]) -> list[Path]:
    """Those of the paths that no garbage collector root reaches."""
    wanted = set(paths)
    printed = _nix(["nix-store", "--gc", "--print-dead"]).stdout.split()
    return sorted(wanted & {Path(line) for line in printed})


def delete(paths: Sequence[Path]) -> int:
    """Delete dead store paths; returns how many went. One that other garbage refers to stays until that goes."""
    if not paths:
        return 0
    if _nix(["nix-store", "--delete", *map(str, paths)], check=False, timeout_s=600).code == 0:
        return len(paths)
    return sum(_nix(["nix-store", "--delete", str(path)], check=False).code == 0 for path in paths)
