"""Reading, merging and showing the configuration: where values come from, and every fault at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixbox import paths
from nixbox.config import show
from nixbox.config.cache import template_limit_bytes
from nixbox.config.load import flatten, load, merge
from nixbox.config.names import default_name
from nixbox.config.settings import EnvEntry, Hook, Loaded, Mount, Overrides, resolve_env
from nixbox.errors import ConfigError


class Workspace:
    """A workspace with plugins and user profiles of its own, all below one temporary directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str | bytes) -> Path:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text if isinstance(text, bytes) else text.encode())
        return place

    def load(self, config: str | bytes = "", overrides: Overrides | None = None) -> Loaded:
        self.write("my ws/.nixbox/config.toml", config)
        return load(self.root / "my ws", overrides)

    def faults(self, config: str | bytes = "", overrides: Overrides | None = None) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.load(config, overrides)
        assert caught.value.faults
        assert all(fault.isprintable() for fault in caught.value.faults)
        return list(caught.value.faults)


@pytest.fixture
def ws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(paths, "plugins_dir", lambda: tmp_path / "plugins")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return Workspace(tmp_path)


# --- what comes out --------------------------------------------------------------------------------------


def test_an_empty_config_gives_the_defaults(ws: Workspace) -> None:
    loaded = ws.load()
    s = loaded.settings
    assert (s.name, s.base, s.profile, s.plugins, s.packages) == ("my-ws", "debian", None, (), ())
    assert (s.vcpus, s.memory_mib, s.disk_mib, s.build_network) == (2, 2048, 10240, False)
    assert (s.setup, s.setup_env) == (None, False)
    assert s.mounts == (Mount(".", "~/workspace", False),)
    assert (s.network_mode, s.suite, s.accelerator, s.debian_mirror) == ("open", "trixie", "auto", None)
    assert s.hooks == {"pre-up": (), "post-up": (), "pre-down": (), "post-down": ()}
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.files == (ws.root / "my ws/.nixbox/config.toml",)
    assert loaded.workspace == ws.root / "my ws"


CONFIG = """
profile = "dev"
plugins = ["git", "./tools/p"]
packages = ["vim", "git"]
scripts = ["user"]
resources.memory = "4GiB"
env = { A = "secret-a", B = { from_host = "HOST_B" } }
hooks.post-up = ["make warm"]
"""


@pytest.fixture
def full(ws: Workspace) -> Loaded:
    ws.write("plugins/git/plugin.toml", 'description = "x"\npackages = ["git"]\nscripts = ["g1"]\nbuild = "bg"')
    packages = 'packages = {debian = ["jq"], nixpkgs = ["nope"]}'
    ws.write("my ws/tools/p/plugin.toml", f'{packages}\nscripts = ["g1", "p"]')
    ws.write(
        "my ws/.nixbox/profiles/dev.toml",
        'packages = ["jq", "curl"]\nbuild = "bd"\nbuild_network = true\nsetup = "once"\ndisk.size = "20GiB"',
    )
    overrides = Overrides(vcpus=4, env=(("B", "secret-b"), ("C", "x")), env_from_host=("A",))
    return ws.load(CONFIG, overrides)


def test_layers_are_merged_in_order(full: Loaded) -> None:
    s = full.settings
    assert s.packages == ("git", "jq", "curl", "vim")
    assert s.scripts == (("plugin git", "g1"), ("plugin ./tools/p", "p"), ("config.toml", "user"))
    assert s.build == (("plugin git", "bg"), ("profile dev", "bd"))
    assert (s.build_network, s.setup) == (True, "once")
    assert (s.vcpus, s.memory_mib, s.disk_mib) == (4, 4096, 20480)
    assert s.env == (EnvEntry("A", None, "A"), EnvEntry("B", "secret-b"), EnvEntry("C", "x"))
    assert s.hooks["post-up"] == (Hook("make warm"),)
    assert [p.name for p in full.files] == ["config.toml", "plugin.toml", "plugin.toml", "dev.toml"]


def test_a_sidecar_is_of_the_profile_and_for_the_base(ws: Workspace) -> None:
    ws.write(
        "my ws/.nixbox/profiles/dev.toml",
        'sidecar = ["/opt/jdk"]\nsidecar_packages = { debian = ["openjdk-21-jdk"], nixpkgs = ["jdk"] }',
    )
    loaded = ws.load('profile = "dev"')
    assert (loaded.settings.sidecar, loaded.settings.sidecar_packages) == (("/opt/jdk",), ("openjdk-21-jdk",))
    assert loaded.origins["sidecar[0]"] == loaded.origins["sidecar_packages[0]"] == "profile dev"
    ws.write("my ws/.nixbox/profiles/dev.toml", 'sidecar_packages = { nixpkgs = ["jdk"] }')
    assert ws.load('profile = "dev"').unserved == (("profile dev", "jdk"),)


def test_origins_name_the_source_of_each_leaf(full: Loaded) -> None:
    origins = full.origins
    assert origins["packages[0]"] == "plugin git"
    assert origins["packages[1]"] == "plugin ./tools/p"
    assert origins["packages[2]"] == origins["setup"] == origins["resources.disk"] == "profile dev"
    assert origins["packages[3]"] == origins["resources.memory"] == origins["profile"] == "config.toml"
    assert origins["resources.vcpus"] == origins["env.A"] == origins["env.B"] == "command line"
    assert origins["machine.accelerator"] == origins["mounts[0]"] == origins["network.domains"] == "default"


def leaves(tree: dict[str, Any]) -> set[str]:
    """The leaf fields of `to_json`'s settings, found independently of the merge."""
    found = {f"env.{name}" for name in tree["env"]}
    for path, value in flatten({key: value for key, value in tree.items() if key != "env"}).items():
        found |= {f"{path}[{i}]" for i in range(len(value))} if isinstance(value, list) and value else {path}
    return found


def test_origins_cover_every_leaf_and_nothing_else(full: Loaded) -> None:
    shown = show.to_json(full)
    assert set(shown["origins"]) == leaves(shown["settings"])


def test_nothing_shown_holds_a_secret(full: Loaded) -> None:
    as_json = json.dumps(show.to_json(full))
    for text in (as_json, show.render(full), repr(full), repr(Overrides(env=(("A", "secret-a"),)))):
        assert "secret-" not in text
    env = show.to_json(full)["settings"]["env"]
    assert env == {"A": {"from_host": "A"}, "B": "(hidden)", "C": "(hidden)"}


def test_render_is_one_line_per_leaf(full: Loaded) -> None:
    lines = show.render(full).splitlines()
    assert len(lines) == len(full.origins)
    table = dict(line.split("   # ") for line in lines)
    fields = {text.strip(): origin for text, origin in table.items()}
    assert fields['packages[2] = "curl"'] == "profile dev"
    assert fields['resources.memory = "4GiB"'] == "config.toml"
    assert fields["env.B = (hidden)"] == "command line"
    assert fields['env.A = { from_host = "A" }'] == "command line"
    assert fields["debian.mirror = (unset)"] == fields["network.ports = []"] == "default"


def test_render_shortens_scripts(ws: Workspace) -> None:
    text = show.render(ws.load('scripts = ["""\nset -eu\necho hi\n"""]'))
    assert 'scripts[0] = "set -eu" … (2 lines)' in text


def test_the_users_disk_beats_the_profiles(ws: Workspace) -> None:
    ws.write("my ws/.nixbox/profiles/dev.toml", '[disk]\nsize = "20GiB"')
    loaded = ws.load('profile = "dev"\nresources.disk = "5GiB"')
    assert loaded.settings.disk_mib == 5120
    assert loaded.origins["resources.disk"] == "config.toml"


def test_the_users_mounts_replace_the_default(ws: Workspace) -> None:
    loaded = ws.load('mounts = [{ source = "a", target = "/a" }, { source = "a", target = "/a", readonly = false }]')
    assert loaded.settings.mounts == (Mount("a", "/a"),)
    none = ws.load("mounts = []")
    assert none.settings.mounts == ()
    assert none.origins["mounts"] == "config.toml"


def test_the_command_lines_profile_wins(ws: Workspace) -> None:
    ws.write("my ws/.nixbox/profiles/a.toml", 'setup = "a"')
    ws.write("xdg/nixbox/profiles/b.toml", 'setup = "b"')
    loaded = ws.load('profile = "a"', Overrides(profile="b"))
    assert (loaded.settings.profile, loaded.settings.setup) == ("b", "b")
    assert (loaded.origins["profile"], loaded.origins["setup"]) == ("command line", "profile b")


def test_a_profiles_setup_may_ask_for_the_environment(ws: Workspace) -> None:
    ws.write("my ws/.nixbox/profiles/dev.toml", 'setup = "x"\nsetup_env = true')
    loaded = ws.load('profile = "dev"')
    assert loaded.settings.setup_env
    assert loaded.origins["setup_env"] == "profile dev"
    assert show.to_json(loaded)["settings"]["setup_env"] is True
    assert ws.faults("setup_env = true")[0].startswith(".nixbox/config.toml: setup_env: unknown field")


def test_the_workspaces_profile_comes_before_the_users(ws: Workspace) -> None:
    ws.write("xdg/nixbox/profiles/dev.toml", 'setup = "user"')
    assert ws.load('profile = "dev"').settings.setup == "user"
    ws.write("my ws/.nixbox/profiles/dev.toml", 'setup = "workspace"')
    assert ws.load('profile = "dev"').settings.setup == "workspace"


def test_plugins_by_directory(ws: Workspace) -> None:
    ws.write("home/q/plugin.toml", 'packages = ["aa"]')
    ws.write("p/plugin.toml", 'packages = ["bb"]')
    loaded = ws.load(f'plugins = ["~/q", "../p", "{ws.root}/p"]')
    assert loaded.settings.packages == ("aa", "bb")
    assert loaded.origins["packages[0]"] == "plugin ~/q"


def test_plain_packages_of_plugins_are_for_the_chosen_base(ws: Workspace) -> None:
    ws.write("plugins/p/plugin.toml", 'packages = ["python3Packages.requests"]')
    loaded = ws.load('base = "nixpkgs"\nplugins = ["p"]')
    assert loaded.settings.packages == ("python3Packages.requests",)
    assert ws.faults('plugins = ["p"]')[0].startswith(f"{ws.root}/plugins/p/plugin.toml: packages[0]: `python3Pa")


@pytest.mark.parametrize(
    ("directory", "name"),
    [("web", "web"), ("my ws", "my-ws"), ("_a__b_", "a-b"), ("...", "nixbox"), ("日本", "nixbox")],
)
def test_the_default_name_is_the_directorys(directory: str, name: str) -> None:
    assert default_name(Path("/") / directory) == name


def test_a_long_or_missing_directory_name() -> None:
    assert default_name(Path("/")) == "nixbox"
    assert default_name(Path("/" + "x" * 200)) == "x" * 63
    assert default_name(Path("/" + "x" * 62 + "_y")) == "x" * 62


# --- faults ----------------------------------------------------------------------------------------------


def test_every_fault_of_every_file_at_once(ws: Workspace) -> None:
    ws.write("plugins/git/plugin.toml", "env = {}\n")
    ws.write("plugins/bad/plugin.toml", "x = [\n")
    ws.write("my ws/.nixbox/profiles/dev.toml", 'setpu = "x"\ndisk.size = 1')
    config = 'profile = "dev"\nplugins = ["git", "bad", "gti"]\nresources.memroy = 1\npackages = ["a b"]'
    found = ws.faults(config, Overrides(vcpus=0, memory="lots", env=(("1", "x"),), env_from_host=("a b",)))
    plugins = f"{ws.root}/plugins"
    expected = [
        ".nixbox/config.toml: packages[0]: `a b` is not a Debian package name",
        ".nixbox/config.toml: resources.memroy: unknown field (did you mean `memory`?)",
        "--cpus: 0 is out of range: a whole number from 1 to 256 is needed",
        "--memory: `lots` is not a size: write",
        "--env 1: is not a variable name",
        '--env-from-host "a b": is not a variable name',
        f"{plugins}/git/plugin.toml: env: a plugin cannot set variables",
        f"{plugins}/bad/plugin.toml: line 1, column 6: ",
        ".nixbox/config.toml: plugins[2]: no plugin `gti` (did you mean `git`?): ",
        ".nixbox/profiles/dev.toml: disk.size: 1MiB is too little",
        ".nixbox/profiles/dev.toml: setpu: unknown field (did you mean `setup`?)",
    ]
    assert len(found) == len(expected), found
    for fault, start in zip(found, expected, strict=True):
        assert fault.startswith(start)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('a = 1\n  b = "x\n', "line 2, column 9: Illegal character '\\n': `b = \"x`"),
        ("a = 1\na = 2\n", "line 2, column 6: Cannot overwrite a value: `a = 2`"),
        ("a = 1\r\n!\r\n", "line 2, column 1: Invalid statement: `!`"),
        ("a =", "column 4: Invalid value: `a =`"),
        ("a = [\n1,", "line 2, column 3: "),
        (b"a = 1\nb = '\xff'", "line 2: is not valid UTF-8 text"),
        ("a = " + "[" * 5000, "is nested too deeply"),
        ("a = " + "1" * 5000, "holds a number of more digits than can be read"),
        ("[env]\nA = 'secret\n", 'line 2, column 12: Expected "\'": `A = (hidden)`'),
        ("env.A = 'secret\n", "env.A = (hidden)"),
        ("[env]\nA = '''secret\nsecret", "(hidden)"),
    ],
)
def test_a_syntax_error_names_line_column_and_the_line(ws: Workspace, text: str | bytes, says: str) -> None:
    (fault,) = ws.faults(text)
    assert fault.startswith(".nixbox/config.toml: ")
    assert says in fault
    assert "secret" not in fault


def test_a_missing_profile_says_where_it_was_looked_for(ws: Workspace) -> None:
    ws.write("my ws/.nixbox/profiles/develop.toml", "")
    ws.write("xdg/nixbox/profiles/dev2.toml", "")
    (fault,) = ws.faults('profile = "devel"')
    assert fault.startswith(".nixbox/config.toml: profile: no profile `devel` (did you mean `develop` or `dev2`?)")
    assert "looked for devel.toml in .nixbox/profiles and " in fault
    assert str(ws.root / "xdg/nixbox/profiles") in fault
    (fault,) = ws.faults("", Overrides(profile="x"))
    assert fault.startswith("--profile: no profile `x`: looked for")


@pytest.mark.parametrize("name", ["..", "../../etc/passwd", "", "x" * 200])
def test_a_profile_name_never_becomes_another_path(ws: Workspace, name: str) -> None:
    ws.write("my ws/.nixbox/secret.toml", "")
    assert len(ws.faults("", Overrides(profile=name))) == 1
    (fault,) = ws.faults(f"profile = {json.dumps(name)}")
    assert fault.startswith(".nixbox/config.toml: profile: ")


def test_a_missing_plugin_directory(ws: Workspace) -> None:
    (fault,) = ws.faults('plugins = ["./tools/x"]')
    assert fault == (".nixbox/config.toml: plugins[0]: no plugin `./tools/x`: tools/x/plugin.toml is not there")


def test_no_config_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert caught.value.faults == (".nixbox/config.toml: cannot be read: No such file or directory",)


def test_one_fault_is_the_message(ws: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"the configuration has a fault$"):
        ws.load("x = 1")
    with pytest.raises(ConfigError, match="the configuration has 2 faults"):
        ws.load("x = 1\ny = 2")


# --- what belongs to no workspace ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        (None, 20 << 30),
        ("", 20 << 30),
        ("[templates]\n", 20 << 30),
        ('templates.limit = "5GiB"', 5 << 30),
        ('[templates]\nlimit = "512M"', 512 << 20),
        ("[templates]\nlimit = 1", 1 << 20),
    ],
)
def test_how_much_templates_may_take(ws: Workspace, text: str | None, limit: int) -> None:
    if text is not None:
        ws.write("xdg/nixbox/settings.toml", text)
    assert template_limit_bytes() == limit


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("x = 1", ["x: unknown field"]),
        ('templates.limti = "1GiB"', ["templates.limti: unknown field (did you mean `limit`?)"]),
        ('templates.limit = "lots"', ["templates.limit: `lots` is not a size: write"]),
        ("templates.limit = 0", ["templates.limit: 0MiB is too little"]),
        ("templates.limit = 1.5\nx = 1", ["templates.limit: must be a size: write", "x: unknown field"]),
        ("templates = 1", ["templates: must be a table"]),
        ("templates =", ["line 1, column 12: "]),
        (b"\xff", ["line 1: is not valid UTF-8 text"]),
    ],
)
def test_every_fault_of_the_users_settings(ws: Workspace, text: str | bytes, faults: list[str]) -> None:
    path = ws.write("xdg/nixbox/settings.toml", text)
    with pytest.raises(ConfigError) as caught:
        template_limit_bytes()
    assert len(caught.value.faults) == len(faults)
    for found, start in zip(sorted(caught.value.faults), faults, strict=True):
        assert found.startswith(f"{path}: {start}")
    assert f"{path} has " in caught.value.message


# --- variables -------------------------------------------------------------------------------------------


def test_variables_are_resolved_byte_for_byte(ws: Workspace) -> None:
    nasty = "a b'\"$`\\\n\té𝄞"
    loaded = ws.load(
        f"env = {{ A = {json.dumps(nasty, ensure_ascii=False)}, E = '', B = {{ from_host = 'HOST_B' }} }}"
    )
    resolved = resolve_env(loaded.settings, {"HOST_B": nasty, "OTHER": "x"})
    assert resolved == {"A": nasty, "E": "", "B": nasty}


def test_all_missing_host_variables_are_named_at_once(ws: Workspace) -> None:
    loaded = ws.load("env = { A = {from_host='X'}, B = {from_host='Y'}, C = {from_host='X'}, D = {from_host='Z'} }")
    with pytest.raises(ConfigError) as caught:
        resolve_env(loaded.settings, {"Z": ""})
    assert "lacks the variables X, Y," in caught.value.message
    assert "export X=…; export Y=…" in (caught.value.hint or "")
    assert len(caught.value.faults) == 2


# --- the merge itself ------------------------------------------------------------------------------------

QUICK = settings(max_examples=100, deadline=None, database=None)
SCALARS = st.integers(0, 5)
# As schemas guarantee: a field is a list in every layer or in none.
LAYERS = st.fixed_dictionaries(
    {}, optional={"a": SCALARS, "t.b": SCALARS, "l": st.lists(SCALARS, max_size=4), "t.m": st.lists(SCALARS)}
)
Layer = dict[str, Any]


def values_of(*layers: Layer) -> Layer:
    return merge([(str(i), layer) for i, layer in enumerate(layers)])[0]


@QUICK
@given(LAYERS, LAYERS, LAYERS)
def test_merge_is_associative(a: Layer, b: Layer, c: Layer) -> None:
    assert values_of(values_of(a, b), c) == values_of(a, values_of(b, c)) == values_of(a, b, c)


@QUICK
@given(st.lists(LAYERS, max_size=4))
def test_lists_concatenate_without_doubles(layers: list[Layer]) -> None:
    merged = values_of(*layers)
    for path in ("l", "t.m"):
        everything = [entry for layer in layers for entry in layer.get(path, [])]
        assert merged.get(path, []) == list(dict.fromkeys(everything))


@QUICK
@given(st.lists(LAYERS, max_size=4), LAYERS)
def test_the_last_layers_scalars_win_and_the_others_stay(layers: list[Layer], user: Layer) -> None:
    before, merged = values_of(*layers), values_of(*layers, user)
    for path in ("a", "t.b"):
        assert merged.get(path) == user.get(path, before.get(path))


@QUICK
@given(st.lists(LAYERS, max_size=4))
def test_every_leaf_has_the_origin_that_said_it(layers: list[Layer]) -> None:
    merged, origins = merge([(str(i), layer) for i, layer in enumerate(layers)])
    expected: dict[str, Any] = {}
    for path, value in merged.items():
        entries = {f"{path}[{i}]": entry for i, entry in enumerate(value)} if isinstance(value, list) else {}
        expected |= entries or {path: value}
    assert origins.keys() == expected.keys()
    for path, value in expected.items():
        said = layers[int(origins[path])][path.partition("[")[0]]
        assert value in said if path.endswith("]") else value == said


@QUICK
@given(st.lists(LAYERS, max_size=4))
def test_merging_changes_no_layer(layers: list[Layer]) -> None:
    before = repr(layers)
    values_of(*layers)
    assert repr(layers) == before


TOML_TEXT = st.text(st.characters(codec="utf-8"), max_size=60) | st.text("[]{}=.,\"'#\n a1-", max_size=60)


@QUICK
@given(TOML_TEXT)
def test_any_text_loads_or_is_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    workspace = tmp_path_factory.mktemp("ws")
    (workspace / ".nixbox").mkdir()
    (workspace / ".nixbox/config.toml").write_text(text, newline="")
    try:
        load(workspace)
    except ConfigError as error:
        assert all(fault.isprintable() for fault in error.faults)
