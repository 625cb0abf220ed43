"""What the configuration comes to: plain values, for whoever uses them without reading a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nixbox.errors import ConfigError
from nixbox.values import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.config.schema import Accelerator, Backend, Base, NetworkMode


TEMPLATE_LIMIT_MIB = 20 << 10  # unless the user's settings.toml says otherwise


@dataclass(frozen=True, slots=True)
class Mount:
    """A host directory (as written: relative to the workspace, or with `~`) and its place in the guest."""

    source: str
    target: str
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """A TCP port of the guest's own loopback that the host's loopback has as `host`."""

    host: int
    guest: int


@dataclass(frozen=True, slots=True)
class Seed:
    """A directory of the host (as written: relative to the workspace, or with `~`) that the guest gets a copy of.

    `exclude` are patterns of what is left out, `sentinel` the guest's file that says that it is done (None: one of
    nixbox's own), `on_up`: `up` seeds it, and not only `nixbox seed`.
    """

    source: str
    target: str
    exclude: tuple[str, ...] = ()
    sentinel: str | None = None
    on_up: bool = True


@dataclass(frozen=True, slots=True)
class Hook:
    """A shell command for the host; `required`: what it belongs to fails with it. `plugin`: whose it is, if one's."""

    run: str
    required: bool = False
    plugin: str | None = None

    @property
    def whose(self) -> str:
        """Where it comes from, for people."""
        return f"plugin {self.plugin}" if self.plugin else "config.toml"

    @property
    def first_line(self) -> str:
        """What is shown of it."""
        return self.run.strip().partition("\n")[0]


@dataclass(frozen=True, slots=True)
class Command:
    """A program of a plugin for the host: `nixbox PLUGIN NAME`. `run` is its path in the plugin's directory."""

    name: str
    description: str
    run: str


@dataclass(frozen=True, slots=True)
class Used:
    """A plugin that the config uses: `ref` as written there, `name` as commands call it, and where its files are.

    `directory` is what is read and run from, which for a plugin that guests could write is a copy of `source`.
    """

    name: str
    ref: str
    directory: Path
    source: Path
    description: str = ""
    commands: tuple[Command, ...] = ()


@dataclass(frozen=True, slots=True)
class EnvEntry:
    """A variable for the guest: a literal `value` or the host variable to take it from, never both."""

    name: str
    value: str | None = field(default=None, repr=False)  # a secret must not reach a log through repr()
    from_host: str | None = None


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the command line says instead of the config; `memory` is text as in the config ("4GiB")."""

    profile: str | None = None
    vcpus: int | None = None
    memory: str | None = None
    backend: str | None = None
    env: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    env_from_host: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """The merged configuration. Sizes are MiB; `build` and `scripts` are (origin, shell script) pairs."""

    name: str
    base: Base
    profile: str | None
    plugins: tuple[str, ...]
    packages: tuple[str, ...]  # for `base` only
    build: tuple[tuple[str, str], ...]
    build_network: bool
    sidecar: tuple[str, ...]  # paths of the image that lie in an image of their own
    sidecar_packages: tuple[str, ...]  # for `base` only, likewise
    setup: str | None
    setup_env: bool
    vcpus: int
    memory_mib: int
    disk_mib: int
    return_memory: bool
    mounts: tuple[Mount, ...]
    network_mode: NetworkMode
    domains: tuple[str, ...]
    ports: tuple[int, ...]
    allow_private: bool
    published: tuple[Published, ...]
    env: tuple[EnvEntry, ...]
    scripts: tuple[tuple[str, str], ...]
    hooks: Mapping[str, tuple[Hook, ...]]  # every event of schema.EVENTS is a key
    seeds: tuple[Seed, ...]
    requires_env: tuple[tuple[str, str], ...]  # (origin, name) pairs
    ld_libraries: tuple[str, ...]  # nixpkgs attributes whose libraries foreign programs find; for that base only
    debian_mirror: str | None
    debian_security_mirror: str | None
    suite: str
    nixpkgs: str  # github:OWNER/REPO@REF
    allow_unfree: bool
    accelerator: Accelerator
    backend: Backend


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, the origin of each leaf field ("packages[0]": "profile dev"), and the files read.

    A file that came to one of the places `absent` would be read instead of one of `files`. `lasting`: the same files
    always come to the same settings, which is not so where Nix evaluated one of them. `unserved` are the packages
    (origin, name) that are named for the other base only.
    """

    workspace: Path
    settings: Settings
    origins: dict[str, str]
    files: tuple[Path, ...]
    absent: tuple[Path, ...] = ()
    plugins: tuple[Used, ...] = ()
    lasting: bool = True
    unserved: tuple[tuple[str, str], ...] = ()


def resolve_env(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """The guest's variables with their values; raises one ConfigError for all that the host lacks."""
    missing = [e.from_host for e in settings.env if e.from_host is not None and e.from_host not in environ]
    if missing:
        names = list(dict.fromkeys(missing))
        what = "the variable" if len(names) == 1 else "the variables"
        export = "; ".join(f"export {name}=…" for name in names)
        raise ConfigError(
            f"the host's environment lacks {what} {', '.join(names)}, which the config hands to the guest",
            hint=f"set what is missing ({export}) or take it out of [env]",
            faults=[f"env: the host variable {name} is not set" for name in names],
        )
    return {e.name: environ[e.from_host] if e.from_host else e.value or "" for e in settings.env}
