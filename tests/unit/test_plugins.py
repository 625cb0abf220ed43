"""Plugins: where they are found, whether what is there is still the user's, and how they merge."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nixbox import paths, trees
from nixbox.config import cache, fields, plugins, reference, schema
from nixbox.config.load import load, load_plugin
from nixbox.config.plugins import PluginFault
from nixbox.config.settings import Hook, Loaded, Seed
from nixbox.config.sources import Sources
from nixbox.errors import ConfigError
from nixbox.plan import checks


class World:
    """A workspace, a home, and all of nixbox's own directories below one temporary directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.workspace = root / "ws"
        self.write("ws/.nixbox/config.toml", "")

    def write(self, path: str, text: str, mode: int = 0o644) -> Path:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(mode)
        return place

    def load(self, config: str, sources: Sources | None = None) -> Loaded:
        self.write("ws/.nixbox/config.toml", config)
        return load(self.workspace, sources=sources)

    def faults(self, config: str, sources: Sources | None = None) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.load(config, sources)
        return list(caught.value.faults)

    def share(self, directory: Path) -> None:
        """As when a guest was given `directory`, writable."""
        paths.remember(self.workspace, {directory: self.root / "no-such-lock"})


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(paths, "plugins_dir", lambda: tmp_path / "intree")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return World(tmp_path)


# --- finding ---------------------------------------------------------------------------------------------


def test_by_name_in_tree_first_then_the_users_then_the_workspaces(world: World) -> None:
    for n, home in enumerate(("ws/.nixbox/plugins", "xdg/nixbox/plugins", "intree")):
        world.write(f"{home}/p/plugin.toml", f'scripts = ["{n}"]')
        assert world.load('plugins = ["p"]').settings.scripts == (("plugin p", str(n)),)


def test_plugin_toml_comes_before_default_nix(world: World) -> None:
    def never(path: Path) -> Mapping[str, Any]:
        raise AssertionError(path)

    world.write("intree/p/plugin.toml", 'scripts = ["toml"]')
    world.write("intree/p/default.nix", "{ }")
    assert world.load('plugins = ["p"]', Sources(plugin=never)).settings.scripts == (("plugin p", "toml"),)


def test_a_plugin_in_nix_is_what_nix_says(world: World) -> None:
    world.write("intree/p/default.nix", "{ }")
    loaded = world.load('plugins = ["p"]', Sources(plugin=lambda path: {"scripts": [path.name]}))
    assert loaded.settings.scripts == (("plugin p", "default.nix"),)
    assert not loaded.lasting
    (fault,) = world.faults('plugins = ["p"]', Sources(plugin=lambda path: {"scrpts": []}))
    assert fault == f"{world.root}/intree/p/default.nix: scrpts: unknown field (did you mean `scripts`?)"


def test_what_nix_refuses_is_a_fault_like_others(world: World) -> None:
    def refuse(path: Path) -> Mapping[str, Any]:
        raise ConfigError("undefined variable `x`", faults=["line 3, column 5"])

    world.write("intree/p/default.nix", "{ }")
    found = world.faults('plugins = ["p", "q"]', Sources(plugin=refuse))
    assert found[0] == f"{world.root}/intree/p/default.nix: undefined variable `x`\n    line 3, column 5"
    assert len(found) == 2


def test_a_config_in_nix_where_there_is_none_in_toml(world: World) -> None:
    (world.workspace / ".nixbox/config.toml").unlink()
    world.write("ws/.nixbox/config.nix", "{ }")
    assert paths.find_workspace(world.workspace / ".nixbox") == world.workspace
    loaded = load(world.workspace, sources=Sources(config=lambda path: {"name": "from-nix"}))
    assert (loaded.settings.name, loaded.origins["name"], loaded.lasting) == ("from-nix", "config.nix", False)
    assert world.load('name = "toml"').settings.name == "toml"


def test_packages_that_nix_names_are_for_nixpkgs(world: World) -> None:
    world.write("intree/p/default.nix", "{ }")
    sources = Sources(plugin=lambda path: {"packages": ["python3Packages.boto3", "jq"]})
    loaded = world.load('plugins = ["p"]\npackages = ["git"]', sources)
    assert loaded.settings.packages == ("git",)
    assert loaded.unserved == (("plugin p", "python3Packages.boto3"), ("plugin p", "jq"))
    loaded = world.load('plugins = ["p"]\nbase = "nixpkgs"', sources)
    assert (loaded.settings.packages, loaded.unserved) == (("python3Packages.boto3", "jq"), ())
    both = Sources(plugin=lambda path: {"packages": {"nixpkgs": ["awscli2"], "debian": ["awscli"]}})
    loaded = world.load('plugins = ["p"]', both)
    assert (loaded.settings.packages, loaded.unserved) == (("awscli",), ())


def test_from_github_by_what_is_pinned(world: World) -> None:
    asked: list[list[str]] = []

    def pinned(refs: Sequence[str]) -> Mapping[str, Path]:
        asked.append(list(refs))
        return dict.fromkeys(refs, world.root / "store")

    world.write("store/plugin.toml", 'hooks.post-up = ["true"]')
    loaded = world.load('plugins = ["github:o/r/tools/warm@v1"]', Sources(pinned=pinned))
    assert asked == [["github:o/r/tools/warm@v1"]]
    assert [used.name for used in loaded.plugins] == ["warm"]
    assert loaded.settings.hooks["post-up"] == (Hook("true", plugin="warm"),)
    assert world.workspace / ".nixbox/nixbox.lock" in loaded.files  # a moved pin is seen
    world.load("plugins = []", Sources(pinned=pinned))
    assert len(asked) == 1  # nobody is asked for nothing


def test_two_plugins_of_one_name(world: World) -> None:
    world.write("intree/p/plugin.toml", "")
    world.write("tools/p/plugin.toml", "")
    (fault,) = world.faults('plugins = ["p", "../tools/p"]')
    assert fault == ".nixbox/config.toml: plugins[1]: `../tools/p` is called `p`, as `p` is"
    assert len(world.load('plugins = ["../tools/p", "../tools/../tools/p"]').plugins) == 2  # the same one


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('commands = [{ name = "go" }]', "commands[0].run: commands/go is not there"),
        ('commands = [{ name = "go", run = "README" }]', "commands[0].run: README is no executable file (chmod +x)"),
        ('commands = [{ name = "go", run = "commands" }]', "commands[0].run: commands is no executable file"),
    ],
)
def test_a_command_that_cannot_be_run(world: World, toml: str, says: str) -> None:
    world.write("intree/p/README", "")
    if 'commands"' in toml:
        world.write("intree/p/commands/other", "")
    world.write("intree/p/plugin.toml", toml)
    (fault,) = world.faults('plugins = ["p"]')
    assert fault.startswith(f"{world.root}/intree/p/plugin.toml: {says}")


def test_a_plugin_that_is_called_as_a_command_of_nixbox(world: World) -> None:
    world.write("intree/run/commands/x", "#!/bin/sh\n", 0o755)
    world.write("intree/run/plugin.toml", 'commands = [{ name = "x" }]')
    (fault,) = world.faults('plugins = ["run"]')
    assert "commands: `run` is nixbox's own command" in fault


def test_one_plugin_alone(world: World) -> None:
    world.write("intree/p/plugin.toml", 'description = "it"')
    world.write("ws/.nixbox/config.toml", "no toml")  # what else is wrong does not matter
    found, said = load_plugin(world.workspace, "p", Sources())
    assert (found.name, said.description) == ("p", "it")
    for ref in ("q", "a b", "github:x"):
        with pytest.raises(ConfigError):
            load_plugin(world.workspace, ref, Sources())


def test_the_reference_names_every_field_with_words() -> None:
    text = reference.plugin_reference()
    for name, field in schema.Plugin.model_fields.items():
        assert f"| `{name}` | {field.description} |" in text
        assert field.description
    for name in ("debian", "post-up", "source", "sentinel", "required", "run", "domains"):
        assert f"| `{name}` | " in text
    assert "~~`env`~~ | a plugin cannot set variables" in text
    assert len([line for line in text.splitlines() if line.startswith("| `required`")]) == 1


# --- whose it is -----------------------------------------------------------------------------------------


def test_a_plugin_of_the_workspace_is_read_from_a_copy(world: World) -> None:
    world.write("ws/tools/p/plugin.toml", 'commands = [{ name = "go" }]')
    world.write("ws/tools/p/commands/go", "#!/bin/sh\n", 0o755)
    (used,) = world.load('plugins = ["./tools/p"]').plugins
    assert used.source == world.workspace / "tools/p"
    assert used.directory.is_relative_to(paths.state_dir())
    assert os.access(used.directory / "commands/go", os.X_OK)


@pytest.mark.parametrize("change", ["changed", "added", "executable", "replaced"])
def test_what_a_guest_could_have_changed_is_refused_until_it_is_trusted(world: World, change: str) -> None:
    config = 'plugins = ["./tools/p"]'
    toml = world.write("ws/tools/p/plugin.toml", 'hooks.post-up = ["true"]')
    note = world.write("ws/tools/p/note", "")
    (before,) = world.load(config).plugins
    cache.load(world.workspace)
    world.share(world.workspace)
    assert world.load(config).plugins == (before,)
    match change:
        case "changed":
            toml.write_text('hooks.post-up = ["touch /tmp/escaped"]')
        case "added":
            world.write("ws/tools/p/new", "")
        case "executable":
            note.chmod(0o755)
        case "replaced":  # by a link to another directory of the guest's own making
            world.write("ws/evil/plugin.toml", 'hooks.post-up = ["touch /tmp/escaped"]')
            (world.workspace / "tools").rename(world.workspace / "old")
            (world.workspace / "tools").mkdir()
            (world.workspace / "tools/p").symlink_to("../evil")
    (fault,) = world.faults(config)
    assert "guests can write it: its hooks and commands would run on this host" in fault
    assert fault.endswith("nixbox trust")
    with pytest.raises(ConfigError):
        cache.load(world.workspace)  # what was kept from before does not count either
    assert len(plugins.trust(world.workspace)) == 1
    assert plugins.trust(world.workspace) == []
    (after,) = world.load(config).plugins
    assert after.directory != before.directory
    assert (before.directory.exists(), after.directory.exists()) == (change == "replaced", True)


def test_a_new_plugin_where_guests_write_is_refused(world: World) -> None:
    world.share(world.workspace)
    world.write("ws/p/plugin.toml", "")
    (fault,) = world.faults('plugins = ["./p"]')
    assert f"{world.workspace}/p is new, and guests can write it" in fault


def test_where_no_guest_writes_nobody_is_asked(world: World) -> None:
    world.share(world.workspace)
    for place, ref in (("tools/p", "../tools/p"), ("ws/.nixbox/plugins/p", "./.nixbox/plugins/p")):
        toml = world.write(f"{place}/plugin.toml", "")
        world.load(f'plugins = ["{ref}"]')
        toml.write_text('scripts = ["other"]')
        assert world.load(f'plugins = ["{ref}"]').settings.scripts == ((f"plugin {ref}", "other"),)


def test_a_plugin_is_not_trusted_while_a_guest_can_write_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.write("ws/p/plugin.toml", "")
    world.write("ws/.nixbox/config.toml", 'plugins = ["./p"]')
    world.share(world.workspace)
    monkeypatch.setattr("nixbox.locks.held", lambda path: True)
    with pytest.raises(ConfigError, match="a guest that runs can write"):
        plugins.trust(world.workspace)


def test_a_plugin_that_is_changed_while_it_is_read_is_what_was_looked_at(world: World) -> None:
    world.write("ws/p/plugin.toml", "")
    tree = trees.Tree.read(world.workspace / "p")
    world.write("ws/p/plugin.toml", 'scripts = ["evil"]')
    tree.write(world.root / "copy")
    assert (world.root / "copy/plugin.toml").read_text() == ""


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: (p / "x").symlink_to("/etc/passwd"), "x is a symbolic link that leads out of it"),
        (lambda p: (p / "x").symlink_to("../../ws"), "x is a symbolic link that leads out of it"),
        (lambda p: os.mkfifo(p / "x"), "x is neither a file nor a directory"),
        (lambda p: (p / "x").write_bytes(bytes((16 << 20) + 1)), "MiB are in it"),
    ],
)
def test_what_no_plugin_holds(world: World, make: Any, says: str) -> None:
    world.write("ws/p/plugin.toml", "")
    make(world.workspace / "p")
    (fault,) = world.faults('plugins = ["./p"]')
    assert says in fault


def test_links_inside_a_plugin_survive(world: World) -> None:
    world.write("ws/p/plugin.toml", "")
    world.write("ws/p/lib/x", "content")
    (world.workspace / "p/x").symlink_to("lib/x")
    (used,) = world.load('plugins = ["./p"]').plugins
    assert (used.directory / "x").read_text() == "content"


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..") and len(os.fsencode(name)) < 100
)
contents = st.dictionaries(names, st.tuples(st.binary(max_size=20), st.booleans()), max_size=5)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents, contents)
def test_trees_are_equal_when_their_digests_are(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, Any], other: dict[str, Any]
) -> None:
    def make(files: dict[str, Any]) -> trees.Tree:
        place = tmp_path_factory.mktemp("tree")
        for name, (data, executable) in files.items():
            (place / name).write_bytes(data)
            (place / name).chmod(0o755 if executable else 0o644)
        return trees.Tree.read(place)

    assert (make(one).digest == make(other).digest) == (one == other)
    copy = tmp_path_factory.mktemp("copy") / "c"
    make(one).write(copy)
    assert trees.Tree.read(copy) == make(one)


# --- merging ---------------------------------------------------------------------------------------------

words = st.sampled_from(["aa", "bb", "cc", "dd"])
hooks = st.lists(words | st.fixed_dictionaries({"run": words}, optional={"required": st.booleans()}), max_size=3)
seeds = st.lists(
    st.fixed_dictionaries(
        {"source": st.just("~/c"), "target": words.map("~/{}".format)}, optional={"on_up": st.booleans()}
    ),
    max_size=2,
)
PARTS = {
    "packages": st.lists(words, max_size=3),
    "scripts": st.lists(words, max_size=3),
    "hooks": st.dictionaries(st.sampled_from(schema.EVENTS), hooks, max_size=3),
    "seeds": seeds,
    "network": st.fixed_dictionaries({}, optional={"domains": st.lists(words), "ports": st.lists(st.just(22))}),
    "mounts": st.lists(st.fixed_dictionaries({"source": words, "target": words.map("/{}".format)}), max_size=2),
}
PLUGIN = st.fixed_dictionaries({}, optional=PARTS | {"requires_env": st.lists(words, max_size=2)})
USER = st.fixed_dictionaries({}, optional=PARTS)


@settings(max_examples=80, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLUGIN, PLUGIN, USER)
def test_everything_of_plugins_comes_before_the_users_own(
    world: World, one: dict[str, Any], two: dict[str, Any], user: dict[str, Any]
) -> None:
    said = {"one": one, "two": two}
    for name in said:
        world.write(f"intree/{name}/default.nix", "")
    sources = Sources(plugin=lambda path: said[path.parent.name], config=lambda path: user | {"plugins": list(said)})
    user = {"base": "nixpkgs", **user}  # in Nix's language a plain list of packages is nixpkgs'
    world.write("ws/.nixbox/config.nix", "")
    (world.workspace / ".nixbox/config.toml").unlink(missing_ok=True)
    found = load(world.workspace, sources=sources).settings

    def all_of(*keys: str) -> list[tuple[str, Any]]:
        entries = []
        for origin, tree in (*((f"plugin {name}", tree) for name, tree in said.items()), ("config.nix", user)):
            value: Any = tree
            for key in keys:
                value = value.get(key, {})
            entries += [(origin, entry) for entry in value or ()]
        return entries

    def once(entries: Any) -> tuple[Any, ...]:
        return tuple(e for i, e in enumerate(entries) if e not in list(entries)[:i])

    assert found.packages == once([entry for _, entry in all_of("packages")])
    assert [text for _, text in found.scripts] == list(once([entry for _, entry in all_of("scripts")]))
    assert found.domains == once([entry for _, entry in all_of("network", "domains")])
    assert found.ports == once([entry for _, entry in all_of("network", "ports")])
    assert {name for _, name in found.requires_env} == {name for _, name in all_of("requires_env")}
    assert found.seeds == once([Seed(**entry) for _, entry in all_of("seeds")])
    for event in schema.EVENTS:
        expected = [
            Hook(
                plugin=origin.removeprefix("plugin ") if origin.startswith("plugin ") else None,
                **(entry if isinstance(entry, dict) else {"run": entry}),
            )
            for origin, entry in all_of("hooks", event)
        ]
        assert found.hooks[event] == once(expected)
    own = [(m["source"], m["target"]) for _, m in all_of("mounts")]
    default = [] if "mounts" in user else [(".", "~/workspace")]
    assert [(m.source, m.target) for m in found.mounts] == list(once(default + own))


def test_what_a_plugin_needs_of_the_user(world: World) -> None:
    world.write("intree/p/plugin.toml", 'requires_env = ["TOKEN", "HOST"]')
    with pytest.raises(ConfigError) as caught:
        checks.check(world.load('plugins = ["p"]\nenv.HOST = "x"'))
    (fault,) = caught.value.faults
    assert fault.startswith('env: plugin p needs the variable TOKEN: add TOKEN = { from_host = "TOKEN" } there')
    checks.check(world.load('plugins = ["p"]\nenv = { HOST = "x", TOKEN = { from_host = "T" } }'))


def test_a_plugins_domains_wait_for_a_filter(world: World) -> None:
    world.write("intree/p/plugin.toml", 'network = { domains = ["example.org"], ports = [443] }')
    checks.check(world.load('plugins = ["p"]'))
    checks.check(world.load('plugins = ["p"]\nnetwork.mode = "off"'))
    loaded = world.load('plugins = ["p"]\nnetwork = { mode = "filtered", domains = ["example.com"] }')
    assert loaded.settings.domains == ("example.org", "example.com")
    with pytest.raises(ConfigError, match="cannot be done"):
        checks.check(world.load('plugins = ["p"]\nnetwork.domains = ["example.com"]'))


def test_two_seeds_of_one_target(world: World) -> None:
    world.write("intree/p/plugin.toml", 'seeds = [{ source = "~/a", target = "~/c" }]')
    with pytest.raises(ConfigError) as caught:
        checks.check(world.load('plugins = ["p"]\nseeds = [{ source = "~/b", target = "~/c/" }]'))
    assert caught.value.faults == ("seeds[1] (from config.toml): ~/c is the target of an earlier one as well",)


def test_what_is_kept_of_plugins_is_what_was_read(world: World) -> None:
    world.write("ws/p/plugin.toml", json_toml())
    world.write("ws/p/commands/go", "#!/bin/sh\n", 0o755)
    fresh = world.load('plugins = ["./p"]')
    assert cache.load(world.workspace) == fresh
    assert cache.load(world.workspace) == fresh
    assert fresh.plugins[0].commands[0].run == "commands/go"


def json_toml() -> str:
    hook = '{ run = "x", required = true }'
    return (
        f'hooks = {{ post-up = ["a", {hook}] }}\n'
        'seeds = [{ source = "~/a", target = "~/b", exclude = ["*.lock"] }]\n'
        'commands = [{ name = "go", description = "Go." }]\nrequires_env = ["A"]\n'
    )


@pytest.mark.parametrize("value", ["p", "./p", "~/p", "/p", "github:a/b/c@v1"])
def test_well_formed_references(value: str) -> None:
    assert fields.is_plugin_ref(value)
    assert json.loads(json.dumps(value)) == value


def test_a_plugin_fault_is_words(world: World) -> None:
    with pytest.raises(PluginFault, match=r"no plugin `gti` \(did you mean `git`\?\): looked for it in "):
        world.write("intree/git/plugin.toml", "")
        plugins.find("gti", world.workspace, {})
