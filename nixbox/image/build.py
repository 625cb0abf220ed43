"""From an image specification and its lock to a store path: the generated expression and `nix build`."""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nixbox import paths, run
from nixbox.digests import sha256
from nixbox.errors import NixboxError
from nixbox.image import lockfile, store
from nixbox.plan import nixexpr
from nixbox.plan.model import ImageSpec
from nixbox.report import Reporter, harmless
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LOG_TAIL = 25
_EVAL_S = 300.0


# A store path is always the same, and a start asks for each of these several times.
@functools.cache
def _physical(path: Path, _root: Path | None) -> Path:
    return store.physical(path)


@functools.cache
def _sidecars(image: Path, root: Path | None) -> tuple[Path, ...]:
    directory = store.physical(image) / "sidecars"  # raises for an image that is not there, which is not remembered
    links = list(directory.iterdir()) if directory.is_dir() else []
    return tuple(_physical(image / "sidecars" / str(number), root) for number in range(len(links)))


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: `path` is its store path, `root` the garbage collector root that keeps it.

    Its files are opened by `file`, never by `path`, which a private store does not have where it says.
    """

    path: Path
    root: Path
    fresh: bool
    how: str = "there"  # before; else "built", "substituted" or "imported"

    def file(self, name: str) -> Path:
        """Where a file of the image really lies."""
        return _physical(self.path / name, store.private_root())

    @property
    def sidecars(self) -> tuple[Path, ...]:
        """Its further disks, if it has any: each one's files cover those of the ones before, and the root's."""
        try:
            return _sidecars(self.path, store.private_root())
        except FileNotFoundError:
            return ()

    @property
    def meta(self) -> dict[str, Any]:
        """The parsed `image.json`."""
        data: dict[str, Any] = json.loads(self.file("image.json").read_text())
        return data


@dataclass(frozen=True, slots=True)
class Cache:
    """A Nix binary cache that images are taken from.

    `url` as Nix has it. Signatures count that are by one of `keys` (`NAME:BASE64`; where there are none, by those
    that Nix's own configuration trusts); with `unsigned` none is asked for.
    """

    url: str
    keys: tuple[str, ...] = ()
    unsigned: bool = False


@dataclass(frozen=True, slots=True)
class Means:
    """Where else an image may come from than from a build on this host: a binary cache, Nix's remote builders."""

    cache: Cache | None = None
    builders: str | None = None


HERE = Means()


def expression(spec: ImageSpec, lock_file: Path, mirrors: Mapping[str, str]) -> str:
    """The Nix expression of an image: readable, complete, and what `nix build` is given."""
    lock = nixexpr.Call("builtins.fromJSON", nixexpr.Call("builtins.readFile", lock_file))
    arguments: dict[str, nixexpr.Value] = {"lock": lock, "mirrors": dict(mirrors)}
    if spec.build:
        arguments["build"] = [{"origin": s.origin, "script": s.text} for s in spec.build]
        arguments["buildNetwork"] = spec.build_network
    if spec.sidecar:
        arguments["sidecar"] = list(spec.sidecar)
    if spec.base == "nixpkgs":
        arguments["ldLibraries"] = list(spec.ld_libraries)
        arguments["allowUnfree"] = spec.allow_unfree
    image = nixexpr.Call("import", paths.nix_dir() / "image.nix")
    return nixexpr.render(nixexpr.Call(image, arguments)) + "\n"


def _files(root: str, below: str) -> Iterator[str]:
    """Every file of ours that an image can depend on: flake/ is how other flakes come in, eval/ how configs in Nix
    are read, and neither is part of an image.
    """
    with os.scandir(f"{root}/{below}") as entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            if entry.is_file():
                yield name
            elif entry.is_dir() and name not in ("flake", "eval"):
                yield from _files(root, f"{name}/")


def key(spec: ImageSpec, lock_text: str) -> str:
    """What decides whether Nix must be asked at all: the lock, the build scripts, and every file of ours.

    It is finer than the derivation's own hash (any change here asks Nix, which then may find nothing to do),
    and never coarser. Mirrors and pinned plugins are not in it: they do not change the image.
    """
    digest = sha256()
    nix = str(paths.nix_dir())
    for name in sorted(_files(nix, ""), key=lambda name: name.split("/")):
        with open(f"{nix}/{name}", "rb") as file:  # noqa: PTH123 (every start reads them all: paths take as long)
            digest.update(f"{name}\0{os.fstat(file.fileno()).st_mode & 0o111}\0".encode())
            digest.update(sha256(file.read()).digest())
    scripts = [[s.origin, s.text] for s in spec.build]
    parts: list[object] = [lockfile.image_part(lock_text), scripts, spec.build_network, *spec.sidecar]
    if spec.base == "nixpkgs":
        parts += [spec.ld_libraries, spec.allow_unfree]
    digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:32]


def roots_dir() -> Path:
    """Where the images' garbage collector roots lie, named by key."""
    return paths.cache_dir() / "images"


def built(image_key: str) -> Image | None:
    """The image of this key, when it was built before and its root kept it."""
    root = roots_dir() / image_key
    try:
        # A root keeps its target alive, so a target that is there is whole.
        image = Image(root.readlink(), root, fresh=False)
        image.file("image.json")
    except OSError:
        return None
    return image


class BuildError(NixboxError):
    """`nix build` failed; the message names the derivation and shows the end of its log."""


class Log:
    """Follows `nix build --log-format internal-json`: what is being built, and the last lines of each."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.names: dict[int, str] = {}
        self.lines: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=400))
        self.errors: list[str] = []
        self.hosts: Counter[str] = Counter()  # how many derivations each remote builder was given

    def line(self, text: str) -> None:
        if not text.startswith("@nix "):
            if text.strip():
                self.errors.append(text)
            return
        event = json.loads(text.removeprefix("@nix "))
        # libutil/logging.hh: activity 105 is a build (its first field the derivation), result 101 a log line.
        match event:
            case {"action": "start", "type": 105, "id": ident, "fields": [str(drv), *_]}:
                self.names[ident] = drv
                host = event["fields"][1] if event["fields"][1:] else ""
                if host:
                    self.hosts[host] += 1
                verb = "checking" if "checking" in str(event.get("text")) else "building"
                self.reporter.phase(f"{verb} {title(drv)}" + (f" on {host}" if host else ""))
            case {"action": "result", "type": 101, "id": ident, "fields": [str(said), *_]}:
                self.lines[self.names.get(ident, "")].append(_plain(said))
            case {"action": "msg", "level": 0, "msg": str(said)}:
                self.errors.append(_plain(said))

    def failure(self, code: int) -> BuildError:
        said = "\n".join(self.errors)
        failed = re.findall(r"builder for '([^']+)' failed", said)
        lines = list(self.lines.get(failed[0], ())) if failed else []
        every = said + "\n".join(line for kept in self.lines.values() for line in kept)
        lines, reason = _relevant(lines)
        tail = "\n".join(f"  {line}" for line in lines[-_LOG_TAIL:])
        what = f"building {title(failed[0])} failed" if failed else f"nix build exited with {code}"
        if reason:
            what += f": {reason}"
        body = f"{what}\n{tail}" if tail else f"{what}:\n{said}"
        return BuildError(body, hint=_hint(every, failed))


@contextmanager
def scratch() -> Iterator[str]:
    """A place for Nix's build directories (a daemon has its own).

    Nix removes them itself, but on Ctrl-C it does so before the builder has ended, which leaves some; here all go.
    """
    import tempfile

    directory = tempfile.mkdtemp(prefix="nixbox-build-")
    Path(directory).chmod(0o711)  # a build user must get through to its own directory
    try:
        yield directory
    finally:
        for _ in range(50):
            # The builder may be writing still for a moment; it also leaves directories without write permission.
            run.run(["chmod", "-R", "u+rwX", directory], timeout_s=60, check=False)
            paths.remove_tree(Path(directory))
            if not Path(directory).exists():
                break
            time.sleep(0.1)


def _relevant(lines: list[str]) -> tuple[list[str], str | None]:
    """The part of a log that is about the failure, and the reason where a step of ours named one.

    The steps (nix/bases: debian/root.nix, nixpkgs/layout/build) say `nixbox: build of TITLE` before what a script
    says, and after it `nixbox: the build of TITLE failed …`; what comes later is only cleaning up.
    """
    marks = [i for i, line in enumerate(lines) if line.startswith("nixbox: ")]
    reasons = [i for i in marks if not lines[i].startswith(("nixbox: build of ", "nixbox: the image step failed "))]
    if not reasons:
        return [line for i, line in enumerate(lines) if i not in marks], None
    end = reasons[-1]
    begin = max((i for i in marks if i < end and lines[i].startswith("nixbox: build of ")), default=-1)
    return lines[begin + 1 : end], lines[end].removeprefix("nixbox: ")


def title(drv: str) -> str:
    """The name of a derivation or a store path, without its hash."""
    return re.sub(r"^[a-z0-9]{32}-|\.drv$", "", Path(drv).name)


def _hint(output: str, failed: list[str]) -> str | None:
    if "No space left on device" in output:
        return "the disk of /nix/store or of the build directory is full: free some space and try again"
    if "__noChroot" in output or "sandbox=relaxed" in output or "'sandbox' is set to 'true'" in output:
        return "build_network needs a Nix that lets you set `sandbox = relaxed` (be a trusted user)"
    if "nested user namespaces" in output:
        return "allow unprivileged user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0)"
    if "set-debian-mirror" in output:
        return "set [debian] mirror in .nixbox/config.toml"
    if failed:
        return f"the whole log: nix log {failed[0]}"
    return None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an expression comes to before anything is built: the image's derivation, and the path it will have."""

    drv: Path
    out: Path


def evaluate(expression_text: str) -> Evaluated:
    """Evaluate a generated expression; nothing is written to the store. Raises CommandError."""
    argv = ["nix-instantiate", "--eval", "--json", "-A", "image.drvPath", "-A", "image.outPath", "-"]
    done = run.run([*argv, *store.setup().options], stdin=expression_text, timeout_s=_EVAL_S, env=store.env())
    drv, out = re.findall(r'"([^"]+)"', done.stdout)  # older Nix writes nothing between the two
    return Evaluated(Path(drv), Path(out))


def instantiate(expression_file: Path) -> Path:
    """Write the derivation of an image, and all those that it needs, to the store; returns its path."""
    argv = ["nix-instantiate", str(expression_file), "-A", "image", *store.setup().options]
    return Path(run.run(argv, timeout_s=_EVAL_S, env=store.env()).stdout.strip())


def agent(where: str | None) -> dict[str, str]:
    """The caller's SSH agent, for Nix to reach a builder or a store by SSH (`where` names it)."""
    socket = os.environ.get("SSH_AUTH_SOCK", "")
    return {"SSH_AUTH_SOCK": socket} if where and socket else {}


def build(
    spec: ImageSpec, image_key: str, expression_text: str, reporter: Reporter, builders: str | None = None
) -> Image:
    """Run `nix build` on a generated expression and root the result. Raises BuildError.

    `builders` are Nix's remote builders, as its option of that name takes them.

    Ctrl-C ends Nix, which leaves no half-made path: outputs are registered when they are whole.
    """
    roots = roots_dir()
    roots.mkdir(parents=True, exist_ok=True)
    source = roots / f"{image_key}.nix"
    paths.write_atomic(source, expression_text)
    setup = store.setup()
    root = roots / image_key
    options = [*(setup.options_of_nixpkgs if spec.base == "nixpkgs" else setup.options)]
    if spec.build_network:
        options += ["--option", "sandbox", "relaxed"]  # the last one of a name counts
    if builders is not None:
        options += ["--option", "builders", builders]
    argv = ["nix", *options, "build", "--log-format", "internal-json", "--json", "-f", str(source)]
    argv += ["--out-link", str(root), "image", "inputs"]
    log = Log(reporter)
    with scratch() as directory:
        done = run.stream(argv, on_err=log.line, env=store.env() | agent(builders) | {"TMPDIR": directory})
    if done.code != 0:
        raise log.failure(done.code)
    path = Path(json.loads(done.stdout)[0]["outputs"]["out"])
    for host, count in log.hosts.items():
        reporter.note(f"{count} of its derivations were built on {host}")
    return Image(path, root, fresh=True, how="built")


def _plain(text: str) -> str:
    """A log line that cannot drive a terminal: without colours, other control characters as `?`."""
    return harmless(re.sub(r"\x1b\[[0-9;]*m", "", text), "\n\t")
