"""apt in an isolated root: its resolver and its signed metadata, nothing of the host's package state.

Only the host's mirror, archive keyring and proxy settings are taken over; where they come from is
sources.list(5) and apt.conf(5).
"""

from __future__ import annotations

import fcntl
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nixbox import paths, run
from nixbox.digests import sha256
from nixbox.errors import ConfigError, HostError, NixboxError
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.image.lock import LockedPackage, Repo

KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
_SOURCES = Path("/etc/apt")
_ROLLING = ("sid", "unstable", "experimental")  # neither updates nor security suites
_OFF = ("no", "false", "without", "off", "disable", "0")  # apt's StringToBool
_UPDATE_TIMEOUT_S = 180.0
_QUERY_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Mirrors:
    """Base URLs of the repositories that a lock names: `debian`, and `security` where there is one."""

    debian: str
    security: str | None

    def as_dict(self) -> dict[str, str]:
        """For the Nix expression: repository name to URL."""
        found = {"debian": self.debian}
        if self.security:
            found["security"] = self.security
        return found


@dataclass(frozen=True, slots=True)
class _Entry:
    """One repository of the host's apt sources."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]


def _one_line_entries(text: str) -> Iterator[_Entry]:
    for line in text.splitlines():
        found = re.match(r"deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line.strip())
        if found:
            yield _Entry(found[1].rstrip("/"), (found[2],), tuple(found[3].split()))


def _deb822_entries(text: str) -> Iterator[_Entry]:
    for stanza in re.split(r"\n\s*\n", text):
        lines = [line for line in stanza.splitlines() if not line.startswith("#")]
        fields: dict[str, list[str]] = {}
        key = ""
        for line in lines:
            if line[:1].isspace():
                fields.get(key, []).extend(line.split())
            elif ":" in line:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                fields[key] = value.split()
        off = " ".join(fields.get("enabled", [])).lower() in _OFF
        if "deb" in fields.get("types", []) and not off:
            for uri in fields.get("uris", []):
                suites, components = fields.get("suites", []), fields.get("components", [])
                yield _Entry(uri.rstrip("/"), tuple(suites), tuple(components))


def _entries(directory: Path) -> Iterator[_Entry]:
    files = [directory / "sources.list", *sorted((directory / "sources.list.d").glob("*"))]
    for file in files:
        if not file.is_file():
            continue
        text = file.read_text(errors="replace")
        if file.suffix == ".sources":
            yield from _deb822_entries(text)
        elif file.suffix == ".list":
            yield from _one_line_entries(text)


def _resolve_mirror_file(uri: str) -> str:
    """`mirror+file:/path` (Debian's cloud images) names a file with one mirror a line; the first serves."""
    if uri.startswith("mirror+file:"):
        try:
            lines = Path(uri.removeprefix("mirror+file:")).read_text().split("\n")
        except OSError:
            return ""
        named = (line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#"))
        return next(named, "").rstrip("/")
    return uri


def host_mirrors(directory: Path = _SOURCES) -> Mirrors | None:
    """The Debian mirrors of the host's apt sources, or None where it has none.

    A repository counts as Debian's own when it has the component `main` and a suite of a Debian release
    (`bookworm`, `stable`, …: third parties use names of their own or another component).
    """
    security = None
    found: dict[str, bool] = {}  # candidates in order, and whether they offer updates as Debian's own mirrors do
    for entry in _entries(directory):
        uri = _resolve_mirror_file(entry.uri)
        if "main" not in entry.components or not uri.startswith(("http://", "https://", "file:/")):
            continue
        last = uri.rpartition("/")[2]
        for suite in entry.suites:
            if suite.endswith("-security") and (last == "debian-security" or last.endswith("security")):
                security = security or uri
            elif last.startswith("debian") and "security" not in last and "/" not in suite:
                found[uri] = found.get(uri, False) or suite.endswith("-updates")
    debian = next((uri for uri, updates in found.items() if updates), next(iter(found), None))
    return Mirrors(debian, security) if debian else None


def mirrors(configured: str | None, configured_security: str | None) -> Mirrors:
    """The configured mirrors, else the host's. Raises ConfigError where there is neither."""
    host = host_mirrors()
    if configured:
        return Mirrors(configured.rstrip("/"), configured_security.rstrip("/") if configured_security else None)
    if host is None:
        raise ConfigError(
            "no Debian mirror: the host's apt sources name none",
            hint='set one in .nixbox/config.toml: [debian] mirror = "http://…/debian"',
        )
    return Mirrors(host.debian, configured_security.rstrip("/") if configured_security else host.security)


def _keyring() -> Path:
    for keyring in KEYRINGS:
        if keyring.is_file():
            return keyring
    raise HostError(
        "Debian's archive keyring is not on this host, so the mirror's signature cannot be checked",
        hint="apt install debian-archive-keyring",
    )


def _proxy_lines() -> str:
    """The host's own way out (proxies), which an isolated configuration would lose."""
    dump = run.run(["apt-config", "dump"], timeout_s=_QUERY_TIMEOUT_S).stdout.splitlines()
    return "\n".join(line for line in dump if re.match(r"Acquire::(http|https)::(Proxy|[^ ]+::Proxy)", line))


class UnknownPackagesError(ConfigError):
    """Requested packages that the suite does not have; `near` maps each to similar names that it has."""

    def __init__(self, suite: str, near: dict[str, list[str]]) -> None:
        faults = [
            f"packages: Debian {suite} has no package `{name}`" + (f" (near: {', '.join(names)})" if names else "")
            for name, names in near.items()
        ]
        super().__init__("the package set cannot be resolved", faults=faults)
        self.near = near


class AptRoot:
    """apt with its own state, for one suite of one mirror; `open_root` makes or reuses it."""

    def __init__(self, directory: Path, suite: str, arch: str, mirrors: Mirrors) -> None:
        self.directory = directory
        self.suite = suite
        self.arch = arch
        self.mirrors = mirrors

    def _write(self) -> None:
        for part in ("state/lists/partial", "cache/archives/partial", "empty"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        (self.directory / "status").touch()
        options = f"[arch={self.arch} signed-by={_keyring()}]"
        lines = [f"deb {options} {self.mirrors.debian} {self.suite} main"]
        if self.suite not in _ROLLING:
            lines.append(f"deb {options} {self.mirrors.debian} {self.suite}-updates main")
            if self.mirrors.security:
                lines.append(f"deb {options} {self.mirrors.security} {self.suite}-security main")
        (self.directory / "sources.list").write_text("\n".join(lines) + "\n")
        d = self.directory
        # apt.conf quotes with double quotes and has no escape for them: paths are checked instead.
        if '"' in str(d):
            raise HostError(f"apt cannot work in a directory with a double quote in its name: {d}")
        (d / "apt.conf").write_text(
            f'Dir "{d}";\nDir::State "{d}/state";\nDir::State::status "{d}/status";\nDir::Cache "{d}/cache";\n'
            f'Dir::Etc::main "{d}/empty/none";\nDir::Etc::parts "{d}/empty";\n'
            f'Dir::Etc::sourcelist "{d}/sources.list";\nDir::Etc::sourceparts "{d}/empty";\n'
            f'Dir::Etc::preferences "{d}/empty/none";\nDir::Etc::preferencesparts "{d}/empty";\n'
            f'Dir::Etc::trusted "{d}/empty/none";\nDir::Etc::trustedparts "{d}/empty";\n'
            f'Dir::Bin::methods "/usr/lib/apt/methods";\nDir::Bin::dpkg "/usr/bin/dpkg";\n'
            f'APT::Architecture "{self.arch}";\nAPT::Architectures {{ "{self.arch}"; }};\n'
            'APT::Install-Recommends "false";\nAPT::Sandbox::User "";\nAcquire::ForceHash "SHA256";\n'
            'Acquire::Languages "none";\nAcquire::Retries "2";\nAcquire::http::Timeout "30";\n'
            + _proxy_lines()
            + "\n"
        )

    @property
    def _env(self) -> dict[str, str]:
        return {"APT_CONFIG": str(self.directory / "apt.conf"), "LC_ALL": "C"}

    def update(self) -> None:
        """Fetch the signed metadata. Raises NixboxError naming the mirror when it cannot be reached."""
        # With a full disk apt waits for ever. Package lists and apt's index of them take about 140 MiB.
        paths.require_space(self.directory, 160 << 20, "the package lists")
        argv = ["apt-get", "update", "-q", "-o", "APT::Update::Error-Mode=any"]
        done = run.run(argv, timeout_s=_UPDATE_TIMEOUT_S, env=self._env, check=False)
        if done.code == 0:
            return
        faults = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))]
        if "No space left on device" in done.stderr:
            raise NixboxError(f"no space left on the disk of {self.directory}", hint="free some space")
        raise NixboxError(
            f"the Debian mirror {self.mirrors.debian} cannot be used for {self.suite}:\n" + "\n".join(faults),
            hint="check the network; or set [debian] mirror and suite in .nixbox/config.toml",
        )

    def _query(self, argv: Sequence[str], *options: str) -> str:
        full = [argv[0], *(f"-o={option}" for option in options), *argv[1:]]
        return run.run(full, timeout_s=_QUERY_TIMEOUT_S, env=self._env).stdout

    def has(self, names: Sequence[str]) -> bool:
        """Whether the suite has packages of all these names."""
        return set(names) <= self._known()

    def _known(self) -> set[str]:
        return set(self._query(["apt-cache", "pkgnames"]).split())

    def check_known(self, names: Sequence[str]) -> None:
        """Raise UnknownPackagesError for every name that the suite lacks, all at once."""
        if not names:
            return
        known = self._known()
        missing = [name for name in names if name not in known]
        if missing:
            import difflib

            near = {name: difflib.get_close_matches(name, known, 3) for name in missing}
            raise UnknownPackagesError(self.suite, near)

    def resolve(self, requests: Sequence[str], installed: Path | None = None) -> list[LockedPackage]:
        """The packages that `apt-get install` would bring for `requests` on top of `installed`.

        `requests` are names or apt patterns (apt-patterns(7)); `installed` is a dpkg status file (default: an
        empty system). Raises NixboxError with apt's own words when the set cannot be satisfied.
        """
        # Without an empty archive directory what was downloaded before would silently be left out.
        options = [f"Dir::Cache::archives={self.directory}/empty"]
        if installed is not None:
            options.append(f"Dir::State::status={installed}")
        argv = ["apt-get", *(f"-o={o}" for o in options), "install", "-qq", "-y", "--print-uris", *requests]
        done = run.run(argv, timeout_s=_QUERY_TIMEOUT_S, env=self._env, check=False)
        if done.code != 0:
            # -qq takes the reasons away as well: ask once more for them.
            loud = run.run([w for w in argv if w != "-qq"], timeout_s=_QUERY_TIMEOUT_S, env=self._env, check=False)
            why = loud.stdout.partition("unmet dependencies:")[2].strip("\n")
            raise ConfigError(
                f"apt cannot resolve {shlex.join(requests)}:\n{why}\n{done.stderr.strip()}",
                hint="change `packages` in the config, the profile or the plugins",
            )
        return self._packages(done.stdout)

    def exact(self, names: Sequence[str]) -> list[LockedPackage]:
        """The named packages alone, without what they depend on."""
        return self._packages(self._query(["apt-get", "download", "-qq", "--print-uris", *names]))

    def _packages(self, uris: str) -> list[LockedPackage]:
        from nixbox.image.lock import LockedPackage  # pydantic, which whoever only wants a mirror need not load

        found = []
        for line in uris.splitlines():
            match = re.fullmatch(r"'([^']+)' (\S+) (\d+) SHA256:([0-9a-f]{64})", line.strip())
            if match is None:
                raise NixboxError(f"apt gave no SHA-256 for {line.partition(' ')[0]}")
            url, file, size, sha256 = match.groups()
            # "name_version_arch.deb"; apt percent-encodes the epoch's colon (and only that) in file names.
            name, version, arch = file.removesuffix(".deb").split("_")
            repo: Repo = "debian"
            if self.mirrors.security and url.startswith(self.mirrors.security + "/"):
                repo = "security"
            base = self.mirrors.as_dict()[repo]
            found.append(
                LockedPackage(
                    name=name,
                    version=_unquote(version),
                    arch=arch,
                    repo=repo,
                    path=_unquote(url.removeprefix(base).lstrip("/")),
                    size=int(size),
                    sha256=sha256,
                )
            )
        return sorted(found, key=lambda p: (p.name, p.arch))

    def write_status(self, packages: Sequence[LockedPackage], target: Path) -> None:
        """Write a dpkg status file that says that exactly these packages are installed."""
        wanted = [f"{p.name}:{p.arch}={p.version}" if p.arch != "all" else f"{p.name}={p.version}" for p in packages]
        shown = self._query(["apt-cache", "show", *wanted])
        seen: set[str] = set()
        stanzas = []
        for stanza in shown.strip().split("\n\n"):
            name = stanza.partition("\n")[0]
            if name not in seen:
                seen.add(name)
                stanzas.append(stanza + "\nStatus: install ok installed\n")
        target.write_text("\n".join(stanzas) + "\n")

    def first_dependency(self, name: str) -> str:
        """The package that a meta-package stands for: its first `Depends`."""
        shown = self._query(["apt-cache", "depends", "--no-recommends", "--no-suggests", name])
        found = re.search(r"^\s*Depends:\s*(\S+)", shown, re.MULTILINE)
        if found is None:
            raise NixboxError(f"Debian's {name} depends on nothing")
        return found[1]


def _unquote(text: str) -> str:
    from urllib.parse import unquote

    return unquote(text)


@contextmanager
def open_root(suite: str, arch: str, mirrors: Mirrors) -> Iterator[AptRoot]:
    """An isolated apt root under the cache directory, locked against a second user of it."""
    run.tool("apt-get")
    ident = sha256(f"{suite} {arch} {mirrors}".encode()).hexdigest()[:12]
    directory = paths.cache_dir() / "apt" / ident
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "nixbox.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = AptRoot(directory, suite, arch, mirrors)
        root._write()
        yield root


def guest_sources(mirrors: Mirrors, suite: str) -> str:
    """A deb822 sources file for the guest's own apt; a mirror that is a file of the host is left out."""
    stanzas = []
    rolling = suite in _ROLLING
    pairs = [(mirrors.debian, [suite] if rolling else [suite, f"{suite}-updates"])]
    if mirrors.security and not rolling:
        pairs.append((mirrors.security, [f"{suite}-security"]))
    for uri, suites in pairs:
        if uri.startswith(("http://", "https://")):
            stanzas.append(
                f"Types: deb\nURIs: {uri}\nSuites: {' '.join(suites)}\nComponents: main\n"
                "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
            )
    return "\n".join(stanzas)
