"""lib.mkImage and lib.mkSandbox: a configuration makes the image that nixbox makes, and what is wrong is named."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nixbox.config import load, schema
from nixbox.image import build
from nixbox.plan import nixexpr, resolve
from nixbox.run import CommandError, run
from tests.flakes import HELLO_LOCK, REPO, Clone, make_clone

CONFIG = REPO / "nix" / "flake" / "config.nix"
NAMES = ("image", "default")  # what examples/flake makes


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    yield make_clone(tmp_path_factory.mktemp("library"))


def write(directory: Path, files: Mapping[str, str]) -> Path:
    """A directory of these files."""
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def workspace(directory: Path, files: Mapping[str, str], requested: list[str]) -> Path:
    """A workspace with these files and hello's lock, as if it had been asked for `requested`."""
    write(directory, {f".nixbox/{name}": text for name, text in files.items()})
    locked = json.loads(HELLO_LOCK.read_text()) | {"requested": requested}
    (directory / ".nixbox" / "nixbox.lock").write_text(json.dumps(locked))
    return directory


WORKSPACES: dict[str, tuple[dict[str, str], list[str]]] = {
    "plain": ({"config.toml": 'packages = ["jq"]\n'}, ["jq"]),
    "empty": ({"config.toml": ""}, []),
    "table": ({"config.toml": '[packages]\ndebian = ["jq", "tree"]\nnixpkgs = ["fd"]\n'}, ["jq", "tree"]),
    "plugin": (
        {
            "config.toml": 'plugins = ["mine", "git"]\npackages = ["tree", "git"]\n',
            "plugins/mine/plugin.toml": 'packages = ["jq"]\nbuild = "echo mine"\nscripts = ["true"]\n',
        },
        ["git", "jq", "less", "tree", "openssh-client", "git-lfs"],
    ),
    "all": (
        {
            "config.toml": 'profile = "dev"\nplugins = ["b", "a"]\npackages = ["tree"]\n[resources]\nvcpus = 3\n',
            "plugins/a/plugin.toml": 'packages = { debian = ["jq", "xz-utils"] }\nbuild = "same"\n',
            "plugins/b/plugin.toml": 'packages = ["xz-utils"]\nbuild = "printf \'%s\' \\"$x ${y}\\" \'\'\\n"\n',
            "profiles/dev.toml": 'description = "d"\npackages = ["jq"]\nbuild = "same"\nbuild_network = true\n'
            'setup = "x"\n[disk]\nsize = "1GiB"\n',
        },
        ["jq", "tree", "xz-utils"],
    ),
    "sidecar": (
        {
            "config.toml": 'profile = "dev"\npackages = ["jq"]\n',
            "profiles/dev.toml": 'sidecar = ["/opt/jdk", "/srv", "/opt/jdk"]\n'
            'sidecar_packages = { debian = ["tree"], nixpkgs = ["jdk"] }\n',
        },
        ["jq"],
    ),
    "by path": (
        {
            "config.toml": 'plugins = ["./.nixbox/tools/mine"]\npackages = ["jq"]\n',
            "tools/mine/plugin.toml": 'build = "echo"\n',
        },
        ["jq"],
    ),
}


@pytest.mark.parametrize("case", WORKSPACES)
def test_a_workspace_makes_the_image_that_nixbox_makes(
    clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    files, requested = WORKSPACES[case]
    place = workspace(tmp_path / "w", files, requested)
    spec = resolve.resolve(load.load(place)).image
    if case == "plugin":  # whatever nixbox's own plugin says by now
        locked = json.loads((place / ".nixbox/nixbox.lock").read_text()) | {"requested": list(spec.packages)}
        (place / ".nixbox/nixbox.lock").write_text(json.dumps(locked))
    if case == "sidecar":
        assert (spec.sidecar, spec.sidecar_packages) == (("/opt/jdk", "/srv"), ("tree",))
        locked = json.loads((place / ".nixbox/nixbox.lock").read_text())
        locked |= {"sidecar_requested": ["tree"], "sidecar_packages": locked["packages"][:1]}
        (place / ".nixbox/nixbox.lock").write_text(json.dumps(locked))
    assert sorted(spec.packages) == sorted(json.loads((place / ".nixbox/nixbox.lock").read_text())["requested"])
    own = clone.top / "own.nix"
    own.write_text(build.expression(spec, place / ".nixbox/nixbox.lock", {}))

    made = clone.value(
        f"let made = flake.lib.mkImage {{ workspace = {place}; }}; in"
        f" {{ mine = (import {own}).image.drvPath; its = made.drvPath; }}"
    )

    assert made["its"] == made["mine"]


def test_parts_make_the_image_that_files_make(clone: Clone, tmp_path: Path) -> None:
    files, requested = WORKSPACES["all"]
    place = workspace(tmp_path / "w", files, requested)
    dev = tomllib.loads(files["profiles/dev.toml"])
    plugin = tomllib.loads(files["plugins/a/plugin.toml"])
    parts: dict[str, Any] = {
        "lock": place / ".nixbox/nixbox.lock",
        "packages": ["tree"],
        "profile": {"name": "dev", **dev},
        "plugins": [place / ".nixbox/plugins/b", {"name": "a", **plugin}],
    }
    made = clone.value(
        f"map (given: (flake.lib.mkImage given).drvPath) [ {{ workspace = {place}; }} ({nixexpr.render(parts)})"
        f" ({nixexpr.render(parts | {'profile': place / '.nixbox/profiles/dev.toml'})})"
        f" ({nixexpr.render({**parts, 'lock': json.loads((place / '.nixbox/nixbox.lock').read_text())})})"
        f" ({nixexpr.render({**parts, 'profile': None})}) ]"
    )
    assert len(set(made[:4])) == 1
    assert made[4] != made[0], "the profile changes the image"


def test_a_pinned_plugin_is_the_one_in_the_store(clone: Clone, tmp_path: Path) -> None:
    """From GitHub by revision and hash: what is in the store by that hash needs no network, which is not there."""
    tree = write(tmp_path / "source", {"tool/plugin.toml": 'packages = ["tree"]\nbuild = "echo pinned"\n'})
    added = clone.nix("store", "add-path", "--name", "source", str(tree)).strip()
    digest = json.loads(clone.nix("path-info", "--json", added))
    entry = digest[0] if isinstance(digest, list) else digest[added]
    ref = "github:owner/repo/tool@v1"
    place = workspace(tmp_path / "w", {"config.toml": f'plugins = ["{ref}"]\npackages = ["jq"]\n'}, ["jq", "tree"])
    lock = place / ".nixbox/nixbox.lock"
    pin = {"ref": ref, "rev": "0" * 40, "hash": entry["narHash"]}
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"plugins": [pin]}))

    described = clone.value(f"removeAttrs (import {CONFIG} {{ workspace = {place}; }}) [ {' '.join(UNSHOWN)} ]")
    assert described["packages"] == ["tree", "jq"]
    assert described["build"] == [{"origin": f"plugin {ref}", "script": "echo pinned"}]

    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"plugins": []}))
    with pytest.raises(CommandError, match="plugins: the lock has no pin of `github:owner/repo/tool@v1`"):
        clone.value(f"(flake.lib.mkImage {{ workspace = {place}; }}).drvPath")


UNSHOWN = ('"lock"', '"plugins"')

WRONG: dict[str, tuple[dict[str, str], str, str]] = {
    "unknown field": ({"config.toml": "pakages = []\n"}, "", r"\.nixbox/config\.toml: pakages: unknown field"),
    "not a list": ({"config.toml": 'packages = "jq"\n'}, "", r"config\.toml: packages: must be a list, not text"),
    "not text": ({"config.toml": "packages = [1]\n"}, "", r"config\.toml: packages\[0\]: must be text"),
    "no name": ({"config.toml": 'packages = ["Jq!"]\n'}, "", r"packages\[0\]: `Jq!` is no name of a package"),
    "base": ({"config.toml": 'base = "arch"\n'}, "", r"config\.toml: base: must be `debian` or `nixpkgs`"),
    "other packages": ({"config.toml": 'packages = ["tree"]\n'}, "", r"new: tree; gone: jq"),
    "other suite": (
        {"config.toml": 'packages = ["jq"]\n[debian]\nsuite = "forky"\n'},
        "",
        r"lock: is for trixie, and the config says forky",
    ),
    "other base": (
        {"config.toml": 'base = "nixpkgs"\n'},
        "",
        r"lock: is for the base debian, and the config's is nixpkgs",
    ),
    "no plugin": ({"config.toml": 'plugins = ["nope"]\n'}, "", r"plugins: no plugin `nope`"),
    "home": ({"config.toml": 'plugins = ["~/mine"]\n'}, "", r"plugins: `~/mine`: there is no home directory here"),
    "in Nix": (
        {"config.toml": 'plugins = ["old"]\n', "plugins/old/default.nix": "{ }"},
        "",
        r"plugins: `old` is a plugin in Nix's language",
    ),
    "plugin's field": (
        {"config.toml": 'plugins = ["m"]\n', "plugins/m/plugin.toml": "env = {}\n"},
        "",
        r"m/plugin\.toml: env: unknown field",
    ),
    "no profile": ({"config.toml": 'profile = "dev"\n'}, "", r"profile: no profile `dev`"),
    "profile's field": (
        {"config.toml": 'profile = "dev"\n', "profiles/dev.toml": "build = 1\n"},
        "",
        r"profiles/dev\.toml: build: must be text in quotes, not a whole number",
    ),
    "build_network": (
        {"config.toml": 'profile = "dev"\n', "profiles/dev.toml": 'build_network = "yes"\n'},
        "",
        r"profiles/dev\.toml: build_network: must be true or false, not text",
    ),
    "sidecar": (
        {"config.toml": 'profile = "dev"\npackages = ["jq"]\n', "profiles/dev.toml": 'sidecar = ["/opt/../etc"]\n'},
        "",
        r'profiles/dev\.toml: sidecar: "/opt/\.\./etc" is not a path in the image',
    ),
    "other sidecar": (
        {"config.toml": 'profile = "dev"\n', "profiles/dev.toml": 'sidecar_packages = ["jq"]\n'},
        "",
        r"lock: has other packages in the sidecar",
    ),
    "argument": (
        {"config.toml": 'packages = ["jq"]\n'},
        'packages = [ "jq" 1 ];',
        r"packages: packages\[1\]: must be text",
    ),
    "nameless": ({"config.toml": 'packages = ["jq"]\n'}, "profile = { };", r"profile: name: is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_file_and_field(clone: Clone, tmp_path: Path, case: str) -> None:
    files, more, said = WRONG[case]
    place = workspace(tmp_path / "w", files, ["jq"])
    with pytest.raises(CommandError, match=said):
        clone.value(f"(flake.lib.mkImage {{ workspace = {place}; {more} }}).drvPath")


def test_without_a_lock_it_says_so(clone: Clone, tmp_path: Path) -> None:
    place = write(tmp_path / "w", {".nixbox/config.toml": ""})
    with pytest.raises(CommandError, match=r"has no nixbox\.lock: `nixbox lock` makes it"):
        clone.value(f"(flake.lib.mkImage {{ workspace = {place}; }}).drvPath")
    with pytest.raises(CommandError, match="lock: is missing"):
        clone.value("(flake.lib.mkImage { }).drvPath")


@pytest.mark.parametrize(
    ("name", "model"), [("config", schema.Config), ("profile", schema.Profile), ("plugin", schema.Plugin)]
)
def test_nix_knows_the_fields_that_python_knows(name: str, model: type[schema._Model]) -> None:
    listed = re.search(rf"\n    {name} = \[([^\]]*)\]", CONFIG.read_text())
    assert listed is not None
    assert set(re.findall(r'"([^"]+)"', listed[1])) == {f.alias or n for n, f in model.model_fields.items()}


# --- TOML --------------------------------------------------------------------------------------------------

CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")
TEXT = st.text(CHARACTERS | st.sampled_from('"\\\n\r\t\x7f\x1f$'), max_size=12)
LEAF = TEXT | st.booleans() | st.integers(-(2**62), 2**62)
VALUE = st.recursive(LEAF, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=8)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(TEXT, VALUE, max_size=4))
def test_toml_is_read_back_as_it_was(value: dict[str, Any]) -> None:
    call = nixexpr.render(nixexpr.Call(nixexpr.Call("import", REPO / "nix/flake/toml.nix"), value))
    argv = ["nix-instantiate", "--eval", "--strict", "--json", "-"]
    text = json.loads(run(argv, stdin=call, env={"NIX_REMOTE": "dummy://"}, timeout_s=60).stdout)
    assert tomllib.loads(text) == value


def test_what_toml_cannot_say_is_refused_with_its_place(clone: Clone) -> None:
    toml = REPO / "nix/flake/toml.nix"
    assert clone.value(f"import {toml} {{ a = null; b.c = null; }}") == "b = {  }\n"
    with pytest.raises(CommandError, match=r"a\.b: TOML has no lambda"):
        clone.value(f"import {toml} {{ a.b = x: x; }}")


# --- mkSandbox ---------------------------------------------------------------------------------------------


def test_a_sandbox_s_workspace_is_its_configuration(clone: Clone, tmp_path: Path) -> None:
    """Evaluated alone; tests/vm runs one."""
    files, requested = WORKSPACES["all"]
    place = workspace(tmp_path / "w", files, requested)
    made = clone.value(
        f'let box = flake.lib.mkSandbox {{ name = "demo"; workspace = {place}; }};'
        " in { inherit (box) name drvPath system; inherit (box.meta) mainProgram; image = box.image.drvPath; "
        "config = builtins.fromTOML box.text0; "
        f"plain = (flake.lib.mkImage {{ workspace = {place}; }}).drvPath; inherit (box) files plugins; }}"
    )
    assert (made["name"], made["system"]) == ("nixbox-sandbox-demo", "x86_64-linux")
    assert made["mainProgram"] == "demo"
    assert made["image"] == made["plain"]
    given = tomllib.loads(files["config.toml"])
    assert made["config"] == given | {"base": "debian", "name": "demo", "packages": {"debian": ["tree"]}}
    assert made["files"].split("\n")[:4] == [". config.toml", ". nixbox.lock", ". gitignore", "profiles dev.toml"]
    assert [line.split()[0] for line in made["plugins"].splitlines()] == ["b", "a"]


@pytest.mark.parametrize("case", ["plain", "plugin", "all", "by path"])
def test_nixbox_makes_the_sandbox_s_image_of_its_workspace(
    clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    files, requested = WORKSPACES[case]
    place = workspace(tmp_path / "w", files, requested)
    locked = json.loads((place / ".nixbox/nixbox.lock").read_text())
    (place / ".nixbox/nixbox.lock").write_text(
        json.dumps(locked | {"requested": list(resolve.resolve(load.load(place)).image.packages)})
    )
    more = '{ name = "more"; build = "x"; }'
    box = f'flake.lib.mkSandbox {{ name = "demo"; workspace = {place}; plugins = [ {more} ]; }}'
    made = clone.value(
        f"let box = {box}; in {{ image = box.image.drvPath; inherit (box) files plugins;"
        ' texts = map (name: box.${name}) (builtins.filter (n: builtins.match "text[0-9]+" n != null)'
        " (builtins.sort (a: b: a < b) (builtins.attrNames box.drvAttrs))); }"
    )
    # What the build lays out, and sandbox.sh copies.
    theirs = tmp_path / "theirs"
    for line, text in zip(made["files"].splitlines(), made["texts"], strict=True):
        write(theirs / ".nixbox", {"/".join(line.split()): text})
    for line in made["plugins"].splitlines():
        name, path = line.split()
        shutil.copytree(clone.physical(path), theirs / ".nixbox/plugins" / name)
    spec = resolve.resolve(load.load(theirs)).image
    own = clone.top / "theirs.nix"
    own.write_text(build.expression(spec, theirs / ".nixbox/nixbox.lock", {}))
    assert clone.eval("--impure", "--file", str(own), "image.drvPath") == made["image"]
    assert spec.build[-1].origin in ("plugin more", "profile dev")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('name = "a b";', "name: `a b` may hold only letters"),
        ('name = "x"; build = [ ];', "mkSandbox takes no `build`"),
        ('name = "x"; plugins = [ { name = "git"; } ];', "plugins: `git` is the name of one of nixbox's own"),
    ],
)
def test_a_sandbox_that_cannot_be_is_refused(clone: Clone, tmp_path: Path, more: str, said: str) -> None:
    place = workspace(tmp_path / "w", {"config.toml": 'packages = ["jq"]\n'}, ["jq"])
    with pytest.raises(CommandError, match=said):
        clone.value(f"(flake.lib.mkSandbox {{ workspace = {place}; {more} }}).drvPath")


def test_the_template_of_a_flake_makes_both(clone: Clone, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    shutil.copytree(REPO / "examples/flake", place)
    lock = ("--override-input", "nixbox", f"path:{clone.repo}", "--no-write-lock-file")
    run(["git", "init", "--quiet"], cwd=place, env=clone.env, timeout_s=60)
    run(["git", "add", "--all"], cwd=place, env=clone.env, timeout_s=60)
    with pytest.raises(CommandError, match=r"has no nixbox\.lock: `nixbox lock` makes it \(and git must know it\)"):
        clone.nix("eval", *lock, ".#image.drvPath", cwd=place)
    shutil.copy(HELLO_LOCK, place / ".nixbox/nixbox.lock")
    run(["git", "add", "--all"], cwd=place, env=clone.env, timeout_s=60)
    assert run(["git", "ls-files", ".nixbox"], cwd=place, env=clone.env, timeout_s=60).stdout.split() == [
        ".nixbox/.gitignore",
        ".nixbox/config.toml",
        ".nixbox/nixbox.lock",
    ]
    system = "packages.x86_64-linux"
    made = [json.loads(clone.nix("eval", "--json", *lock, f".#{system}.{n}.drvPath", cwd=place)) for n in NAMES]
    assert [Path(drv).name[33:] for drv in made] == ["nixbox-image.drv", "nixbox-sandbox-hello.drv"]
    # The very image of the flake's own example, whose configuration is the same.
    assert made[0] == clone.eval(f".#{system}.image-hello-debian.drvPath")
