"""The inputs of the application that is made without nixpkgs (nix/flake/application.nix).

    scripts/application.py lock     resolve them anew, for every architecture, into nix/flake/application-ARCH.lock
    scripts/application.py fetch    put what this host's lock names into its Nix store

Python itself comes from Debian, by apt's own resolver; what nixbox imports comes from PyPI, in the versions of
requirements.lock, by pip. Both go through this host's own settings (apt sources; pip's index): a lock names files by
hash, never a host.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

REPO: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from nixbox import paths, run  # noqa: E402  (the checkout's own, installed or not)
from nixbox.errors import ConfigError, HostError, NixboxError  # noqa: E402
from nixbox.image import apt, fetch, lockfile, store  # noqa: E402
from nixbox.image.lock import Arch, Bootstrap, LockedPackage  # noqa: E402

FORMAT: Final = 1
SUITE: Final = "trixie"
REQUIREMENTS: Final = REPO / "requirements.lock"
# Debian's name for an architecture, and the kernel's, which wheels have in their names.
MACHINES: Final[Mapping[Arch, str]] = {"amd64": "x86_64", "arm64": "aarch64"}
# Beside Python: what it loads when a machine has a network (nixbox/network/watch.py).
LIBRARIES: Final = ("libnftables1",)
TOOLS: Final = ("patchelf",)
_GLIBC: Final = ("2_17", "2_28", "2_34")  # the manylinux generations that Debian's C library can run
_PIP_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class PythonFile:
    """A wheel, or a source archive of pure Python, of PyPI.

    `path` is where PyPI's file server has it, which follows from its BLAKE2b digest; `size` is in bytes, `sha256` in
    hex. `modules` are the directories to take out of a source archive; a wheel is unpacked whole and has none.
    """

    name: str
    version: str
    file: str
    path: str
    size: int
    sha256: str
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lock:
    """A whole lock: Python's own version (`3.13`), its .debs, the build's, and what nixbox imports."""

    suite: str
    arch: Arch
    python: str
    bootstrap: Bootstrap
    packages: tuple[LockedPackage, ...]
    tools: tuple[LockedPackage, ...]
    python_packages: tuple[PythonFile, ...]

    @property
    def debs(self) -> list[LockedPackage]:
        """Every .deb, each once."""
        every = (self.bootstrap.package, *self.packages, *self.tools)
        return list({package.path: package for package in every}.values())

    def text(self) -> str:
        """The lock as its file has it: one file a line."""
        data: dict[str, Any] = {"format": FORMAT, "suite": self.suite, "arch": self.arch, "python": self.python}
        data["bootstrap"] = self.bootstrap.model_dump()
        data["packages"] = [package.model_dump() for package in self.packages]
        data["tools"] = [package.model_dump() for package in self.tools]
        data["python_packages"] = [asdict(one) for one in self.python_packages]
        return lockfile.render(data)


def lock_path(arch: Arch) -> Path:
    """Where the lock of an architecture lies."""
    return REPO / "nix" / "flake" / f"application-{arch}.lock"


def load(arch: Arch) -> Lock:
    """Read the lock of an architecture. Raises ConfigError for one that is damaged or not there."""
    file = lock_path(arch)
    mend = "restore it from version control, or: scripts/application.py lock"
    try:
        data = lockfile.parse(file.read_text(), file)
        return Lock(
            suite=data["suite"],
            arch=data["arch"],
            python=data["python"],
            bootstrap=Bootstrap.model_validate(data["bootstrap"]),
            packages=tuple(map(LockedPackage.model_validate, data["packages"])),
            tools=tuple(map(LockedPackage.model_validate, data["tools"])),
            python_packages=tuple(
                PythonFile(**{**one, "modules": tuple(one["modules"])}) for one in data["python_packages"]
            ),
        )
    except FileNotFoundError:
        raise ConfigError(f"there is no {file}", hint=mend) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: {error}", hint=mend) from None


# --- what nixbox imports ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Requirement:
    """One entry of requirements.lock: `text` is all of it, `via` who asked for it."""

    name: str
    version: str
    marker: str
    text: str
    via: frozenset[str]


def requirements(text: str) -> dict[str, Requirement]:
    """The entries of a requirements.lock by name (`uv pip compile` writes the form that this reads)."""
    found = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", text.strip()):
        head = re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)(?:\s*;\s*([^\\\n]+?))?\s*\\?\n", block + "\n")
        if head is None:
            raise ConfigError(f"{REQUIREMENTS} has an entry of another form: {block.partition(chr(10))[0]}")
        pinned = "\n".join(line for line in block.splitlines() if not line.lstrip().startswith("#"))
        via = re.findall(r"^\s*#\s+(?:via\s+)?([A-Za-z0-9._-]+)(?: \(.*\))?$", block, re.MULTILINE)
        found[head[1]] = Requirement(head[1], head[2], head[3] or "", pinned + "\n", frozenset(via) - {"via"})
    return found


def runtime(every: Mapping[str, Requirement], wanted: Iterable[str], machine: str, python: str) -> list[Requirement]:
    """Those of the entries that `wanted` (names) come to on Linux, with what they need in turn, by name."""
    from packaging.markers import Marker

    here = {
        "implementation_name": "cpython",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }
    names = set(wanted)
    if missing := sorted(names - every.keys()):
        raise ConfigError(f"{REQUIREMENTS} has no {', '.join(missing)}", hint="make lock")
    while more := {one.name for one in every.values() if one.via & names} - names:
        names |= more
    return [every[n] for n in sorted(names) if not every[n].marker or Marker(every[n].marker).evaluate(here)]


def dependencies() -> list[str]:
    """The names in pyproject.toml's `dependencies`."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    return [re.split(r"[<>=!~ ;\[]", line)[0] for line in project["dependencies"]]


def download(wanted: Sequence[Requirement], machine: str, python: str, target: Path) -> None:
    """Have pip put the file of each requirement into `target`, checked against its hashes. Raises CommandError."""
    listed = target.with_suffix(".txt")
    listed.write_text("".join(one.text for one in wanted))
    tag = "cp" + python.replace(".", "")
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    argv += ["--require-hashes", "--requirement", str(listed), "--dest", str(target), "--prefer-binary"]
    argv += ["--implementation", "cp", "--python-version", python]
    argv += [word for abi in (tag, "abi3", "none") for word in ("--abi", abi)]
    argv += [word for glibc in _GLIBC for word in ("--platform", f"manylinux_{glibc}_{machine}")]
    argv += ["--platform", f"manylinux2014_{machine}"]
    run.run(argv, timeout_s=_PIP_TIMEOUT_S, env=_pip_env(), hint="is pip here, and does it reach its index?")


def _pip_env() -> dict[str, str]:
    import os

    # pip's own settings, which the allow-list for other children does not let through.
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def _described(file: Path, one: Requirement) -> PythonFile:
    data = file.read_bytes()
    blake = hashlib.blake2b(data, digest_size=32).hexdigest()
    path = f"packages/{blake[:2]}/{blake[2:4]}/{blake[4:]}/{file.name}"
    sha256 = hashlib.sha256(data).hexdigest()
    return PythonFile(one.name, one.version, file.name, path, len(data), sha256, _modules(file))


def _modules(file: Path) -> tuple[str, ...]:
    """The packages at the top of a source archive, which must be Python alone; none of a wheel."""
    if file.suffix == ".whl":
        return ()
    with tarfile.open(file) as tar:
        names = [member.name.split("/") for member in tar if member.isfile()]
    if built := [name for name in names if name[-1].endswith((".c", ".pyx", ".rs"))]:
        raise NixboxError(f"{file.name} has to be compiled ({'/'.join(built[0])}), and there is no wheel of it")
    return tuple(sorted({name[1] for name in names if len(name) == 3 and name[2] == "__init__.py"}))


def files_of(wanted: Sequence[Requirement], directory: Path) -> dict[str, Path]:
    """Which file in a directory is whose. Raises NixboxError unless each requirement has exactly one."""

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    found = {}
    for one in wanted:
        start = f"{plain(one.name)}-{plain(one.version)}"
        matching = [f for f in directory.iterdir() if re.match(rf"{re.escape(start)}(-|$)", plain(f.name) + "-")]
        if len(matching) != 1:
            raise NixboxError(f"pip brought {len(matching)} files for {one.name} {one.version}")
        found[one.name] = matching[0]
    return found


# --- the two commands ------------------------------------------------------------------------------------


def resolve(arch: Arch, mirrors: apt.Mirrors) -> Lock:
    """Resolve everything for an architecture; nothing is written but caches. Raises NixboxError, ConfigError."""
    with apt.open_root(SUITE, arch, mirrors) as root:
        root.update()
        stdlib = root.first_dependency("libpython3-stdlib")
        version = re.fullmatch(r"libpython(3\.[0-9]+)-stdlib", stdlib)
        if version is None:
            raise NixboxError(f"Debian {SUITE} calls its Python {stdlib}, which this script does not know")
        python = version[1]
        packages = root.resolve([f"python{python}-minimal", stdlib, *LIBRARIES])
        tools = root.resolve(TOOLS)
        busybox = root.exact(["busybox-static"])[0]
    machine = MACHINES[arch]
    wanted = runtime(requirements(REQUIREMENTS.read_text()), dependencies(), machine, python)
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory, "files")
        target.mkdir()
        download(wanted, machine, python, target)
        files = files_of(wanted, target)
        python_packages = tuple(_described(files[one.name], one) for one in wanted)
    bootstrap = Bootstrap(package=busybox, nar_hash=fetch.busybox_nar_hash(busybox, mirrors))
    return Lock(SUITE, arch, python, bootstrap, tuple(packages), tuple(tools), python_packages)


def renew() -> None:
    """Write the locks anew."""
    mirrors = apt.mirrors(None, None)
    for arch in MACHINES:
        made = resolve(arch, mirrors)
        paths.write_atomic(lock_path(arch), made.text())
        debs, wheels = len(made.debs), len(made.python_packages)
        print(f"{lock_path(arch).relative_to(REPO)}: {debs} Debian packages, {wheels} of PyPI")


def put(arch: Arch) -> int:
    """Put every file of an architecture's lock into the Nix store; returns how many were fetched.

    Raises ConfigError where requirements.lock has moved on, NixboxError where a file cannot be fetched.
    """
    held = load(arch)
    fetched = fetch.ensure_packages(held.debs, held.bootstrap, apt.mirrors(None, None))
    lacking = store.invalid([store.flat_path(one.file, one.sha256) for one in held.python_packages])
    missing = [one for one in held.python_packages if store.flat_path(one.file, one.sha256) in lacking]
    if not missing:
        return fetched
    entries = requirements(REQUIREMENTS.read_text())
    if moved := [one.name for one in missing if one.name not in entries or entries[one.name].version != one.version]:
        raise ConfigError(
            f"{REQUIREMENTS.name} has another version of {', '.join(moved)} than {lock_path(arch).name}",
            hint="scripts/application.py lock",
        )
    wanted = [entries[one.name] for one in missing]
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory, "files")
        target.mkdir()
        download(wanted, MACHINES[arch], held.python, target)
        files = files_of(wanted, target)
        for one in missing:
            file = files[one.name]
            if (file.name, hashlib.sha256(file.read_bytes()).hexdigest()) != (one.file, one.sha256):
                raise NixboxError(
                    f"pip brought {file.name}, and {lock_path(arch).name} has {one.file} with other bits",
                    hint="scripts/application.py lock",
                )
        store.add_files([files[one.name] for one in missing])
    return fetched + len(missing)


def main(words: Sequence[str]) -> int:
    """Run the command that `words` name; returns the exit code."""
    try:
        if list(words) == ["lock"]:
            renew()
        elif list(words) == ["fetch"]:
            arch = next((a for a, machine in MACHINES.items() if machine == platform.machine()), None)
            if arch is None:
                raise HostError(f"there is no lock for {platform.machine()} hosts")
            fetched = put(arch)
            print(json.dumps({"arch": arch, "fetched": fetched}))
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except NixboxError as error:
        print(f"error: {error.message}", *getattr(error, "faults", ()), sep="\n  ", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
