"""What the models accept, and that every fault is told in plain words at the user's own field."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixbox.config import fields, names, schema
from nixbox.config.schema import Config, Plugin, Profile, UserSettings
from nixbox.errors import ConfigError

QUICK = settings(max_examples=50, deadline=None, database=None)


def faults(model: type[Any], toml: str, base: str = "debian") -> list[str]:
    found, result = schema.validate(model, tomllib.loads(toml), base)
    assert (found is None) == bool(result)
    return [str(fault) for fault in result]


def config(toml: str, base: str = "debian") -> Config:
    found, result = schema.validate(Config, tomllib.loads(toml), base)
    assert found is not None, result
    return found


@pytest.mark.parametrize("name", ["a", "web-1", "A0", "x" * 63])
def test_good_names(name: str) -> None:
    assert names.check_name(name, "machine name") == name
    assert names.is_name(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "the machine name is empty"),
        ("..", "`..` may hold only letters"),
        (".", "may hold only"),
        ("a/b", "`a/b` may hold only letters, digits and hyphens"),
        ("x" * 200, "200 characters; at most 63"),
        ("-a", "no hyphen at either end"),
        ("a-", "no hyphen at either end"),
        ("a\n", r"`a\n`"),
        ("\x1b[31m", r"`\x1b[31m`"),
        ("é", "`é`"),
        ("١", "may hold only"),
        ("a\0", r"`a\x00`"),
    ],
)
def test_bad_names_are_named_with_what_is_allowed(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        names.check_name(name, "machine name")
    assert says in caught.value.message
    assert caught.value.message.isprintable()
    assert "1 to 63 letters" in (caught.value.hint or "")
    assert not names.is_name(name)


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("512MiB", 512),
        ("2GiB", 2048),
        ("10 GiB", 10240),
        ("2G", 2048),
        ("512M", 512),
        (300, 300),
        ("300", 300),
    ],
)
def test_sizes(text: str | int, mib: int) -> None:
    assert fields.parse_size(text) == mib


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "2GB", "1.5GiB", "-1", -1, 1.5, True, False, None, [], "2  GiB", "2GiB\n", "٢G", 10**13],
)
def test_bad_sizes_say_what_is_accepted(text: object) -> None:
    with pytest.raises(ValueError, match=r'write "512MiB", "2GiB" \(also 512M, 2G\)'):
        fields.parse_size(text)


@QUICK
@given(st.integers(1, 10**9))
def test_a_formatted_size_reads_back(mib: int) -> None:
    assert fields.parse_size(fields.format_size(mib)) == mib


def test_defaults() -> None:
    default = config("")
    assert (default.base, default.network.mode, default.debian.suite) == ("debian", "open", "trixie")
    assert default.resources.model_dump() == {
        "vcpus": 2,
        "memory": 2048,
        "disk": 10240,
        "return_memory": False,
    }
    assert [m.model_dump() for m in default.mounts] == [{"source": ".", "target": "~/workspace", "readonly": False}]
    assert default.machine.accelerator == "auto"


FULL = """
name = "box"
profile = "dev"
base = "nixpkgs"
plugins = ["git", "./tools/p", "/opt/p", "~/p"]
packages = { debian = ["libstdc++6"], nixpkgs = ["python3Packages.requests", "gtk+3"] }
scripts = ["echo a\\necho b"]
ports = [{ host = 1, guest = 65535 }]
resources = { vcpus = 256, memory = "128MiB", disk = "256M" }
mounts = [{ source = "..", target = "/srv/x", readonly = true }]
network = { mode = "filtered", domains = ["example.org", "localhost"], ports = [1, 65535] }
env = { A = "x = 'y' $z", B_1 = { from_host = "HOME" }, EMPTY = "" }
seeds = [{ source = "~/.npm", target = "~/.npm", exclude = ["*.tmp"], sentinel = "~/x", on_up = false }]
ld_libraries = ["zlib"]
hooks = { pre-up = ["a", { run = "e", required = true }], post-up = ["b"], pre-down = ["c"], post-down = ["d"] }
machine = { accelerator = "tcg" }
[debian]
mirror = "file:///srv/mirror"
security_mirror = "https://mirror.example:8080/x"
suite = "trixie-backports"
[nixpkgs]
source = "github:me/packages@nixos-26.05"
allow_unfree = true
"""


def test_everything_can_be_said() -> None:
    found = config(FULL)
    assert found.model_fields_set == set(Config.model_fields)
    assert found.resources.memory == 128
    assert found.hooks.pre_down == ["c"]


# (model, TOML, the fault): each value is wrong in one way only.
ONE_FAULT = [
    (Config, 'nmae = "x"', "nmae: unknown field (did you mean `name`?)"),
    (Config, "resources.memroy = 1", "resources.memroy: unknown field (did you mean `memory`?)"),
    (Config, 'zzz = "x"', "zzz: unknown field (known here: name, profile, base,"),
    (Config, 'hooks.pre_up = ["x"]', "hooks.pre_up: unknown field (did you mean `pre-up`?)"),
    (Config, 'mounts = [{source="a", target="/b", readnoly=true}]', "mounts[0].readnoly: unknown field (did"),
    (Config, 'env.A = {from_hots = "B", from_host = "B"}', "env.A.from_hots: unknown field (did you mean"),
    (Config, "packages = {debain = []}", "packages.debain: unknown field (did you mean `debian`?)"),
    (Config, '"a b\\n" = 1', '"a b\\n": unknown field'),
    (Config, 'name = "a_b"', "name: `a_b` may hold only"),
    (Config, 'base = "debain"', "base: must be `debian` or `nixpkgs`, not `debain` (did you mean `debian`?)"),
    (Config, "base = 3", "base: must be `debian` or `nixpkgs`, not a whole number"),
    (Config, 'packages = ["jq", "git", "vim", "Bad"]', "packages[3]: `Bad` is not a Debian package name"),
    (Config, 'packages = ["a"]', "packages[0]: `a` is not a Debian package name"),
    (Config, 'packages = ["jq\\n"]', "packages[0]: `jq\\n` is not a Debian"),
    (Config, "packages = [3]", "packages[0]: must be text in quotes, not a whole number"),
    (Config, 'packages = "jq"', "packages: must be a list, not text"),
    (Config, 'packages.nixpkgs = ["9x"]', "packages.nixpkgs[0]: `9x` is not a nixpkgs attribute"),
    (Config, 'packages.nixpkgs = "x"', "packages.nixpkgs: must be a list, not text"),
    (
        Config,
        'nixpkgs.source = "nixos-26.05"',
        "nixpkgs.source: `nixos-26.05` is no nixpkgs: write github:OWNER/",
    ),
    (
        Config,
        'nixpkgs.source = "github:NixOS/nixpkgs"',
        "nixpkgs.source: `github:NixOS/nixpkgs` is no nixpkgs",
    ),
    (Config, 'nixpkgs.source = "github:a/b/c@d"', "nixpkgs.source: `github:a/b/c@d` is no nixpkgs: write"),
    (Config, "nixpkgs.allow_unfree = 1", "nixpkgs.allow_unfree: must be true or false, not a whole number"),
    (Config, "nixpkgs.allowUnfree = true", "nixpkgs.allowUnfree: unknown field (did you mean `allow_unfree`?)"),
    (Config, 'resources.vcpus = "2"', "resources.vcpus: must be a whole number, not text"),
    (Config, "resources.vcpus = 2.0", "resources.vcpus: must be a whole number, not a fraction"),
    (Config, "resources.vcpus = true", "resources.vcpus: must be a whole number, not true or false"),
    (Config, "resources.vcpus = 0", "resources.vcpus: 0 is out of range: a whole number from 1 to 256"),
    (Config, "resources.vcpus = 257", "resources.vcpus: 257 is out of range"),
    (Config, 'resources.memory = "127MiB"', "resources.memory: 127MiB is too little: at least 128MiB"),
    (Config, "resources.disk = 255", "resources.disk: 255MiB is too little: at least 256MiB"),
    (Config, "resources = 1979-05-27", "resources: must be a table, not a date or time"),
    (Config, 'mounts = [{source = "."}]', "mounts[0].target: is missing"),
    (Config, 'mounts = [{source = "", target = "/x"}]', "mounts[0].source: `` is not a path"),
    (Config, 'mounts = [{source = ".", target = "x"}]', "mounts[0].target: `x` is not a place in the guest"),
    (Config, 'mounts = [{source = ".", target = "/a/../x"}]', "mounts[0].target: `/a/../x` is not a place"),
    (Config, 'mounts = [{source = ".", target = "/a", readonly = 1}]', "mounts[0].readonly: must be true or"),
    (Config, 'network.mode = "none"', "network.mode: must be `off`, `filtered` or `open`, not `none`"),
    (Config, 'network.domains = ["*x.org"]', "network.domains[0]: `*x.org` is not a domain"),
    (Config, 'network.domains = ["https://x.org"]', "network.domains[0]: `https://x.org` is not a domain"),
    (Config, "network.ports = [65536]", "network.ports[0]: 65536 is out of range"),
    (Config, 'env."a b" = "x"', 'env."a b": is not a variable name'),
    (Config, 'env.1A = "x"', "env.1A: is not a variable name"),
    (Config, "env.A = 5", "env.A: must be text in quotes, not a whole number"),
    (Config, 'env.A = "a\\u0000b"', "env.A: holds a NUL"),
    (Config, "env.A = {}", "env.A.from_host: is missing"),
    (Config, 'env.A = {from_host = "1"}', "env.A.from_host: is not a variable name"),
    (Config, 'hooks.post-up = "x"', "hooks.post-up: must be a list, not text"),
    (Config, 'scripts = ["a\\u0000"]', "scripts[0]: holds a NUL"),
    (
        Config,
        'plugins = ["github:a"]',
        "plugins[0]: `` is no repository on GitHub",
    ),
    (Config, 'plugins = ["a/b"]', "plugins[0]: `a/b` may hold only"),
    (Config, 'plugins = ["./a\\nb"]', "plugins[0]: `./a\\nb` is not a path"),
    (Config, 'debian.mirror = "ftp://x/debian"', "debian.mirror: `ftp://x/debian` is not a mirror"),
    (
        Config,
        'debian.mirror = "http://x/ [trusted=yes]"',
        "debian.mirror: `http://x/ [trusted=yes]` is not a",
    ),
    (Config, 'debian.mirror = "http:///x"', "debian.mirror: `http:///x` is not a mirror"),
    (Config, 'debian.security_mirror = ""', "debian.security_mirror: `` is not a mirror"),
    (Config, 'debian.suite = "Trixie"', "debian.suite: `Trixie` is not a Debian suite"),
    (
        Config,
        'machine.accelerator = "xen"',
        "machine.accelerator: must be `auto`, `kvm`, `hvf` or `tcg`, not",
    ),
    (Profile, 'setpu = "x"', "setpu: unknown field (did you mean `setup`?)"),
    (Profile, "disk = {}", "disk.size: is missing"),
    (Profile, 'disk.size = "1MiB"', "disk.size: 1MiB is too little"),
    (Profile, 'build_network = "yes"', "build_network: must be true or false, not text"),
    (Profile, 'sidecar = "/opt"', "sidecar: must be a list, not text"),
    (Profile, 'sidecar = ["opt"]', "sidecar[0]: `opt` is not a path in the image: write it whole and plain"),
    (Profile, 'sidecar = ["/opt/"]', "sidecar[0]: `/opt/` is not a path in the image"),
    (Profile, 'sidecar = ["/opt/*"]', "sidecar[0]: `/opt/*` is not a path in the image"),
    (Profile, 'sidecar = ["/opt/../etc"]', "sidecar[0]: `/opt/../etc` is not a path in the image"),
    (
        Profile,
        'sidecar = ["/opt", "/usr/lib"]',
        "sidecar[1]: `/usr/lib` is needed to start a guest: name what is heavy",
    ),
    (Profile, 'sidecar = ["/"]', "sidecar[0]: `/` is needed to start a guest"),
    (Profile, 'sidecar_packages = ["JDK"]', "sidecar_packages[0]: `JDK` is not a Debian package name"),
    (Plugin, 'sidecar = ["/opt"]', "sidecar: unknown field"),
    (Profile, 'env.A = "x"', "env: unknown field"),
    (Profile, 'setup_env = "yes"', "setup_env: must be true or false, not text"),
    (Plugin, "setup_env = true", "setup_env: unknown field"),
    (Config, "setup_env = true", "setup_env: unknown field"),
    (UserSettings, 'templates.limit = "lots"', "templates.limit: `lots` is not a size"),
    (UserSettings, "templates.limit = true", "templates.limit: must be a size"),
    (UserSettings, 'name = "x"', "name: unknown field (known here: templates, krun)"),
    (Plugin, 'scrpts = ["x"]', "scrpts: unknown field (did you mean `scripts`?)"),
    (
        Plugin,
        'env.A = "x"',
        "env: a plugin cannot set variables: secrets are always named in the user's own config",
    ),
    (Plugin, 'setup = "x"', "setup: a plugin has no first-boot setup: a profile has"),
    (Plugin, "resources.vcpus = 2", "resources: a plugin does not shape the machine"),
    (Plugin, "ports = []", "ports: a plugin publishes no ports"),
    (Plugin, 'network.mode = "open"', "network.mode: a plugin cannot choose the mode; the user does"),
    (Plugin, "network.allow_private = true", "network.allow_private: a plugin cannot open private addresses"),
    (Plugin, 'requires_env = ["a b"]', "requires_env[0]: is not a variable name"),
    (Plugin, 'commands = [{ name = "a", run = "/bin/sh" }]', "commands[0].run: `/bin/sh` is not a file in the"),
    (Plugin, 'commands = [{ name = "a", run = "../x" }]', "commands[0].run: `../x` is not a file in the plugin's"),
    (Plugin, 'commands = [{ run = "x" }]', "commands[0].name: is missing"),
    (Plugin, 'hooks.post-up = [{ run = "x", requierd = true }]', "hooks.post-up[0].requierd: unknown field (did you"),
    (Plugin, "hooks.post-up = [3]", "hooks.post-up[0]: must be text in quotes, not a whole number"),
    (Plugin, 'seeds = [{ source = "a", target = "b" }]', "seeds[0].target: `b` is not a place in the guest"),
    (Plugin, 'seeds = [{ source = "a", target = "/b", exclude = "x" }]', "seeds[0].exclude: must be a list, not"),
    (Plugin, 'seeds = [{ source = "a", target = "/b", sentinel = "x" }]', "seeds[0].sentinel: `x` is not a place"),
]


@pytest.mark.parametrize(("model", "toml", "says"), ONE_FAULT, ids=[says for _, _, says in ONE_FAULT])
def test_a_fault_is_one_plain_line(model: type[Any], toml: str, says: str) -> None:
    found = faults(model, toml)
    assert len(found) == 1
    assert found[0].startswith(says)
    assert found[0].isprintable()
    for jargon in ("Input", "should be", "pydantic", "http", "something else"):
        assert jargon not in found[0].replace(says, "").replace("an http, https or file URL such as `http:", "")


def test_every_fault_is_told_at_once() -> None:
    toml = 'nmae = "x"\npackages = [1, "Bad", "jq"]\nresources = { vcpus = 0, disk = "x" }\nenv = { A = 1 }\n'
    assert [fault.split(":")[0] for fault in faults(Config, toml)] == [
        "packages[0]",
        "packages[1]",
        "resources.vcpus",
        "resources.disk",
        "env.A",
        "nmae",
    ]


def test_a_field_named_like_a_union_branch_keeps_its_path() -> None:
    assert faults(Config, 'env.table = { table = "x", from_host = "A" }')[0].startswith("env.table.table: unknown")


def test_a_plain_package_list_is_for_the_chosen_base() -> None:
    assert faults(Config, 'packages = ["Xyz"]', "debian")
    assert not faults(Config, 'packages = ["Xyz"]', "nixpkgs")
    assert schema.packages_for(["jq"], "nixpkgs") == ["jq"]
    assert schema.packages_for({"debian": ["jq"]}, "nixpkgs") == []
    assert schema.packages_for({"debian": ["jq"]}, "debian") == ["jq"]


@pytest.mark.parametrize(
    "value",
    ["12345", '["12345"]', '{from_host = "a-12345"}', '"12345\\u0000"', '{value = "12345"}', "2012-03-04"],
)
def test_no_fault_repeats_a_secret(value: str) -> None:
    found = faults(Config, f"env.A = {value}")
    assert found
    assert not {"12345", "2012"} & set(re.findall(r"\d+", "".join(found)))


def test_models_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config("").base = "nixpkgs"


ANY_TOML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@QUICK
@given(st.dictionaries(st.sampled_from(sorted(Config.model_fields)) | st.text(max_size=8), ANY_TOML, max_size=5))
def test_whatever_is_said_gives_a_config_or_printable_faults(data: dict[str, Any]) -> None:
    found, result = schema.validate(Config, data)
    assert (found is None) == bool(result)
    assert all(str(fault).isprintable() and fault.path for fault in result)
