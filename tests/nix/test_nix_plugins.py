"""Plugins and configs of the bash nixbox, in Nix's language: they load unchanged, and read nothing but their own."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nixbox import loading, paths
from nixbox.config import scaffold, schema
from nixbox.config.load import load
from nixbox.config.settings import Hook
from nixbox.config.sources import Sources
from nixbox.errors import ConfigError, HostError
from nixbox.image import build, nixeval
from nixbox.plan.model import ImageSpec

pytestmark = pytest.mark.skipif(shutil.which("nix") is None, reason="no nix on this host")

THEIRS = Path(__file__).parent / "bash_plugins"
SECRET = "ghp_a-token-that-nobody-may-see"


@pytest.fixture(autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


def plugin(directory: Path, text: str, **files: str) -> dict[str, Any]:
    """What a default.nix of this text comes to, with other files beside it (`x_nix` is x.nix)."""
    directory.mkdir(exist_ok=True)
    for name, content in {"default_nix": text, **files}.items():
        (directory / name.replace("_", ".")).write_text(content)
    return nixeval.plugin(directory / "default.nix")


def config(directory: Path, text: str, **environ: str) -> dict[str, Any]:
    place = directory / ".nixbox"
    place.mkdir(exist_ok=True)
    (place / "config.nix").write_text(text)
    return nixeval.config(place / "config.nix", {"HOME": "/home/somebody"} | environ)


def faults(directory: Path, text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        config(directory, text, **environ)
    assert error.value.hint
    assert SECRET not in "".join([error.value.message, *error.value.faults])
    return list(error.value.faults)


def plugin_faults(directory: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        plugin(directory, text)
    return list(error.value.faults)


# --- the three plugins, as they were ---------------------------------------------------------------------


def validated(name: str) -> tuple[dict[str, Any], schema.Plugin]:
    data = nixeval.plugin(THEIRS / name / "default.nix")
    model, found = schema.validate(schema.Plugin, data, "nixpkgs")
    assert model is not None, found
    return data, model


def test_scala_sbt_loads_unchanged() -> None:
    data, model = validated("scala-sbt")
    assert data["packages"] == ["sbt", "scala", "jdk21", "coursier"]
    assert data["ld_libraries"] == ["stdenv.cc.cc.lib", "zlib"]
    assert {"repo1.maven.org", "repo.scala-sbt.org", "dl.typesafe.com"} <= set(model.network.domains)
    assert data["hooks"] == {"post-up": ["nixbox scala-sbt warm-cache"]}
    assert data["commands"] == [{"name": "warm-cache", "run": "commands/warm-cache"}]
    assert '"${MAVEN_REPO_USER:-}"' in model.scripts[0]
    assert model.scripts[1] == "sbt --version >/dev/null"  # was ${pkgs.sbt}/bin/sbt


def test_aws_loads_unchanged() -> None:
    data, model = validated("aws")
    assert data["packages"] == ["awscli2", "ssm-session-manager-plugin", "python3Packages.boto3", "jq"]
    assert model.network.domains[:3] == ["amazonaws.com", "amazonaws.com.cn", "oidc.eu-central-1.amazonaws.com"]
    assert model.network.ports == [443]
    assert model.mounts == []
    assert model.scripts == ["mkdir -p ~/.aws\nchmod 700 ~/.aws\n"]
    assert data["hooks"] == {"post-up": ["nixbox aws login --if-expired"]}


def test_claude_code_loads_unchanged() -> None:
    data, model = validated("claude-code")
    assert data["packages"] == ["claude-code", "git", "nodejs_22"]
    assert model.network.domains == ["anthropic.com", "claude.ai", "npmjs.org"]
    assert model.network.ports == [443, 80]
    assert data["mounts"] == [
        {"source": "~/.claude/commands", "target": "~/.claude/commands", "readonly": True},
        {"source": "~/.claude/agents", "target": "~/.claude/agents", "readonly": True},
        {"source": "~/.claude/skills", "target": "~/.claude/skills"},
    ]
    assert model.scripts[0] == (THEIRS / "claude-code/scripts/settings.sh").read_text()
    assert model.scripts[1] == "command -v claude"
    assert data["hooks"]["post-up"] == [
        '"$NIXBOX_PLUGIN_DIR"/scripts/sync-config.sh',
        {"run": "nixbox claude-code sync-config", "required": True},
    ]


# --- shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{ nix.packages = [ "jq" "python3Packages.requests" ]; }',
        "{ pkgs }: { nix.packages = [ pkgs.jq pkgs.python3Packages.requests ]; }",
        "{ pkgs, ... }: { nix.packages = with pkgs; [ jq python3Packages.requests ]; }",
        "pkgs: { nix = { packages = with pkgs; [ jq ] ++ (with python3Packages; [ requests ]); }; }",
        "{ pkgs ? import <nixpkgs> { }, lib ? pkgs.lib }: with lib; with pkgs; "
        "{ packages = [ jq ] ++ optional true python3Packages.requests ++ optionals false [ vim ]; }",
        "let pkgs = import <nixpkgs> { system = builtins.currentSystem; }; lib = import <nixpkgs/lib>; in "
        "{ nix.packages = lib.unique [ pkgs.jq pkgs.jq pkgs.python3Packages.requests ]; }",
        "{ jq, python3Packages, ... }: { nix.packages = [ jq python3Packages.requests ]; }",
        "{ ... }@args: { nix.packages = with args.pkgs; [ jq python3Packages.requests ]; }",
        '{ pkgs, ... }: { nix.packages = [ "${pkgs.jq}" pkgs."python3Packages".requests ]; }',
        "{ pkgs, ... }: { nix.packages = import ./more/list.nix pkgs; }",
    ],
)
def test_a_file_asks_for_pkgs_in_many_ways(tmp_path: Path, text: str) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/list.nix").write_text("pkgs: with pkgs; [ jq python3Packages.requests ]")
    assert plugin(tmp_path, text) == {"packages": ["jq", "python3Packages.requests"]}


def test_packages_for_debian_stand_beside_those_of_nixpkgs(tmp_path: Path) -> None:
    text = 'pkgs: { nix.packages = [ pkgs.awscli2 ]; packages.debian = [ "awscli" ]; }'
    assert plugin(tmp_path, text) == {"packages": {"nixpkgs": ["awscli2"], "debian": ["awscli"]}}


@pytest.mark.parametrize(
    ("mounts", "readonly"),
    [
        ('[ "~/.aws:/srv/aws:ro" ]', True),
        ('[ "~/.aws:/srv/aws:rw" ]', False),
        ('[ "$HOME/.aws:/srv/aws" ]', False),
        ('[ "${builtins.getEnv "HOME"}/.aws:/srv/aws" ]', False),
        ('[ { source = "~/.aws"; target = "/srv/aws"; readOnly = true; } ]', True),
        ("[ { host = ~/.aws; guest = /srv/aws; readonly = false; } ]", False),
        ('{ "/srv/aws" = "~/.aws"; }', False),
        ('{ "/srv/aws" = "~/.aws:ro"; }', True),
        ('{ "/srv/aws" = { source = "~/.aws"; readOnly = true; }; }', True),
        ('{ source = "~/.aws"; target = "/srv/aws"; }', False),
    ],
)
def test_mounts(tmp_path: Path, mounts: str, readonly: bool) -> None:
    expected = {"source": "~/.aws", "target": "/srv/aws"} | ({"readonly": True} if readonly else {})
    assert plugin(tmp_path, f"{{ mounts = {mounts}; }}") == {"mounts": [expected]}


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        ('{ preUp = "a"; }', {"pre-up": ["a"]}),
        ('{ "post-up" = [ "a" "b" ]; }', {"post-up": ["a", "b"]}),
        ('{ pre_down = { run = "a"; required = true; }; }', {"pre-down": [{"run": "a", "required": True}]}),
        ('{ postDown = [ "a" ]; post-down = [ "b" ]; }', {"post-down": ["b", "a"]}),
        ("{ postUp = ./x.sh; }", {"post-up": ['bash -e "$NIXBOX_PLUGIN_DIR"/x.sh']}),
        ("{ postUp = [ ]; }", None),
    ],
)
def test_hooks(tmp_path: Path, hooks: str, expected: Mapping[str, Any] | None) -> None:
    found = plugin(tmp_path, f"{{ hooks = {hooks}; }}", x_sh="#!bash -e\ntrue\n")
    assert found == ({"hooks": expected} if expected else {})


@pytest.mark.parametrize(
    "scripts",
    [
        '"echo a"',
        '[ "echo a" ]',
        "[ ./x.sh ]",
        "./x.sh",
        "{ onStart = ./x.sh; }",
        '{ a = "echo a"; }',
        "[ (builtins.readFile ./x.sh) ]",
        'map (name: ./. + "/${name}.sh") [ "x" ]',
    ],
)
def test_scripts(tmp_path: Path, scripts: str) -> None:
    assert plugin(tmp_path, f"{{ scripts = {scripts}; }}", x_sh="echo a") == {"scripts": ["echo a"]}


def test_scripts_of_a_set_run_in_the_order_of_their_names(tmp_path: Path) -> None:
    assert plugin(tmp_path, '{ scripts = { b = "b"; a = [ "a" "c" ]; }; }') == {"scripts": ["a", "c", "b"]}


def test_lib_does_what_the_real_one_does(tmp_path: Path) -> None:
    text = """{ lib, pkgs, ... }: with lib; {
      scripts = [
        (concatMapStringsSep "," (x: removeSuffix "-b" (removePrefix "a-" x)) [ "a-1-b" "a-2" "3-b" ])
        (optionalString (hasInfix "$." "x$.y") (concatStringsSep "|" (splitString "." "a.b.c")))
        (escapeShellArg "it's")
        (toString (attrNames (filterAttrs (n: v: v > 1) (recursiveUpdate { a = 1; b.c = 2; } { b = 3; }))))
        (toString (flatten [ 1 [ 2 [ 3 ] ] (range 4 5) ]) + last [ "!" "?" ])
        (fileContents (pkgs.lib.head [ ./x.sh ]))
        (toString (mapAttrsToList (n: v: n + v) (genAttrs [ "x" "y" ] (n: n))))
      ];
    }"""
    expected = ["1,2,3", "a|b|c", "'it'\\''s'", "b", "1 2 3 4 5?", "echo", "xx yy"]
    assert plugin(tmp_path, text, x_sh="echo\n")["scripts"] == expected


def test_a_plugin_is_found_by_way_of_a_link(tmp_path: Path) -> None:
    plugin(tmp_path / "real", "{ scripts = [ ./x.sh ]; }", x_sh="echo a")
    (tmp_path / "link").symlink_to("real")
    assert nixeval.plugin(tmp_path / "link/default.nix") == {"scripts": ["echo a"]}


def test_a_path_may_hold_what_nix_and_shells_know_otherwise(tmp_path: Path) -> None:
    place = tmp_path / "a b${x}'\"é;"
    assert plugin(place, "{ hooks.preUp = ./x.sh; scripts = [ ./x.sh ]; }", x_sh="a")["scripts"] == ["a"]


def test_a_plugin_may_lie_in_the_store(tmp_path: Path) -> None:
    from nixbox.image import store

    plugin(tmp_path / "nixbox-test-plugin", "{ scripts = [ ./x.sh (import ./y.nix) ]; }", x_sh="a", y_nix='"b"')
    path = store.add_tree(tmp_path / "nixbox-test-plugin")
    try:
        found = nixeval.plugin(store.physical(path) / "default.nix")
        assert found == {"scripts": ["a", "b"]}
    finally:
        store.delete([path])


# --- what is not accepted is said, all at once -----------------------------------------------------------


def test_every_fault_is_told_with_its_line_and_field(tmp_path: Path) -> None:
    text = """{ pkgs, ... }: {
      nix.packages = [ pkgs.jq (pkgs.python3.withPackages (p: [ p.requests ])) 3 ];
      nix.package = [ ];
      mounts = [ "/only-one" { source = "/x"; } 5 ];
      network = { allowedDomain = [ ]; mode = "open"; ports = "80"; };
      scripts = { onStop = "x"; b = pkgs.jq; };
      hooks = { onUp = "x"; preUp = [ 1 ]; };
      env.TOKEN = "SECRET";
      scirpts = [ ];
      description = x: x;
    }"""
    found = plugin_faults(tmp_path, text)
    assert [fault.split(": ")[:3] for fault in found] == [
        ["default.nix", f"line {line}", field]
        for line, field in [
            (2, "nix.packages[1]"),
            (2, "nix.packages[2]"),
            (3, "nix.package"),
            (4, "mounts[0]"),
            (4, "mounts[1].target"),
            (4, "mounts[2]"),
            (5, "network.allowedDomain"),
            (5, "network.mode"),
            (5, "network.ports"),
            (6, "scripts.b"),
            (6, "scripts.onStop"),
            (7, "hooks.onUp"),
            (7, "hooks.preUp[0]"),
            (8, "env"),
            (9, "scirpts"),
            (10, "description"),
        ]
    ]
    assert "python3.withPackages" in found[0]
    assert "did you mean `packages`?" in found[2]
    assert "a plugin cannot choose that" in found[7]
    assert "secrets are always named in the user's own config" in found[13]
    assert "SECRET" not in "".join(found)
    assert "did you mean `scripts`?" in found[14]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[ ]", "must be an attribute set, or a function"),
        ("{ pkgs }: x: { }", "must be an attribute set, or a function"),
        ("let x = { scripts = x; }; in x", "nested|without end|must be"),
        ('{ scripts = [ "sh ${./x.sh}" ]; }', "store path of a file"),
        ('{ scripts = [ "sh ${toString ./x.sh}" ]; }', "the guest does not have"),
        ('{ hooks.preUp = "${./x.sh}"; }', "store path of a file"),
        ('pkgs: { hooks.preUp = "${pkgs.jq}/bin/jq"; }', "hooks run on this host"),
        ('pkgs: { scripts = [ "ls ${pkgs.jq}/share" ]; }', "store path of a package"),
        ("{ scripts = [ ./missing.sh ]; }", "cannot be read: No such file"),
        ("{ scripts = [ ./. ]; }", "is no file"),
        ('{ mounts = [ { source = ./data; target = "/x"; } ]; }', "is the plugin's own"),
        ('{ description = "${builtins.getEnv "USER"}"; }', "host's variable USER"),
    ],
)
def test_a_fault_says_what_is_accepted(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.sh").write_text("x")
    assert any(word in fault for fault in plugin_faults(tmp_path, text) for word in words.split("|"))


# --- errors of Nix ---------------------------------------------------------------------------------------

BROKEN = [
    ("{\n  a = 1\n  b = 2;\n}", "line 3, column 5", "syntax error"),
    ("{ pkgs, ... }: {\n  nix.packages = [ foo ];\n}", "line 2, column 20", "undefined variable 'foo'"),
    ('{ ... }: {\n  scripts = throw "too old\\nby far";\n}', "line 2, column 13", "too old\nby far"),
    ('{ ... }: {\n  scripts = abort "no";\n}', "line 2, column 13", "no"),
    ("{ ... }: {\n  scripts =\n    assert 1 == 2; [ ];\n}", "line 3, column 5", ""),
    ("{ ... }: {\n  scripts = let x = x; in x;\n}", "line 2, column 21", "infinite recursion encountered"),
    ("{ ... }: {\n  scripts = let f = n: 1 + f (n + 1); in f 0;\n}", "line 2", "stack overflow"),
    ("{ ... }: {\n  scripts = { }.foo;\n}", "line 2, column 13", "attribute 'foo' missing"),
    ("{ ... }: {\n  scripts = 1 + [ ];\n}", "line 2, column 1", "a list"),
    ("{ ... }: {\n  scripts = import ./missing.nix;\n}", "line 2, column 13", "No such file|does not exist"),
    ("{ ... }: {\n  scripts = builtins.zzz;\n}", "line 2, column 13", "attribute 'zzz' missing"),
]


@pytest.mark.parametrize(("text", "place", "words"), BROKEN)
def test_an_error_of_nix_is_shown_with_its_place(tmp_path: Path, text: str, place: str, words: str) -> None:
    (fault,) = plugin_faults(tmp_path, text)
    assert fault.startswith(f"default.nix: {place}")
    assert any(word in fault for word in words.split("|"))
    assert "\x1b" not in fault


def test_an_error_in_an_imported_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/x.nix").write_text("{ pkgs }:\n\n  pkgs.jq nope\n")
    (fault,) = plugin_faults(
        tmp_path, "{ pkgs, ... }: { nix.packages = [ (import ./more/x.nix { inherit pkgs; }) ]; }"
    )
    assert fault == "more/x.nix: line 3, column 11: undefined variable 'nope'"


def test_a_missing_argument_names_the_function(tmp_path: Path) -> None:
    (fault,) = plugin_faults(tmp_path, "{ scripts = ({ a }: a) { }; }")
    assert "called without required argument 'a'" in fault
    assert fault.startswith("default.nix: line 1, column ")


def test_without_nix_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "default.nix").write_text("{ }")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="nix"):
        nixeval.plugin(tmp_path / "default.nix")


# What Nix 2.26.3 printed for files of these texts, with --show-trace, as in nixeval; the installed one may be older.
NEWER = {
    "undefined": (
        """error:
       … while evaluating a branch condition
         at «stdin»:1:121:
            1| let scope = { import = p: builtins.scopedImport scope p; }; r = …
             |                                                                 ^
            2|

       … while calling the 'scopedImport' builtin
         at «stdin»:1:65:
            1| let scope = { import = p: builtins.scopedImport scope p; }; r = …
             |                                                                 ^
            2|

       error: undefined variable 'foo'
       at /plugin/default.nix:2:25:
            1| { pkgs, ... }: {
            2|   nix.packages = [ "jq" foo ];
             |                         ^
            3| }
""",
        nixeval.Said("undefined variable 'foo'", "/plugin/default.nix", 2, 25),
    ),
    "throw": (
        """error:
       … while evaluating attribute 'nix'
         at /plugin/default.nix:2:3:
            1| { ... }: {
            2|   nix.packages = throw "boom\\nsecond";
             |   ^
            3| }

       … while calling the 'throw' builtin
         at /plugin/default.nix:2:18:
            1| { ... }: {
            2|   nix.packages = throw "boom\\nsecond";
             |                  ^
            3| }

       error: boom
       second
""",
        nixeval.Said("boom\nsecond", "/plugin/default.nix", 2, 18),
    ),
    "argument": (
        """error:
       … from call site
         at «stdin»:1:149:
            1| let scope = { import = p: builtins.scopedImport scope p; }; r = …
             |                                                                 ^
            2|

       error: function 'anonymous lambda' called without required argument 'foo'
       at /plugin/default.nix:1:1:
            1| { pkgs, foo }: {
             | ^
            2|   x = 1;
""",
        nixeval.Said(
            "function 'anonymous lambda' called without required argument 'foo'", "/plugin/default.nix", 1, 1
        ),
    ),
    "overflow": (
        """error:
       … while evaluating attribute 'x'
         at /plugin/default.nix:2:3:
            1| { ... }: {
            2|   x = let f = n: 1 + f (n + 1); in f 0;
             |   ^
            3| }

       (19999 duplicate frames omitted)

       error: stack overflow; max-call-depth exceeded
       at /plugin/default.nix:2:22:
            1| { ... }: {
            2|   x = let f = n: 1 + f (n + 1); in f 0;
             |                      ^
            3| }
""",
        nixeval.Said("stack overflow; max-call-depth exceeded", "/plugin/default.nix", 2, 22),
    ),
    "type": (
        """error:
       … while selecting an attribute
         at /plugin/default.nix:2:7:
            1| { ... }: {
            2|   x = (1).foo;
             |       ^
            3| }

       error: expected a set but found an integer: 1
""",
        nixeval.Said("expected a set but found an integer: 1", "/plugin/default.nix", 2, 7),
    ),
}


@pytest.mark.parametrize("name", NEWER)
def test_newer_versions_put_the_error_last(name: str) -> None:
    stderr, expected = NEWER[name]
    assert nixeval.understand(stderr, Path("/plugin")) == expected
    coloured = stderr.replace("error:", "\x1b[31;1merror:\x1b[0m")
    assert nixeval.understand(coloured, Path("/plugin")) == expected


def test_an_error_of_no_known_form_is_shown_as_it_is() -> None:
    assert nixeval.understand("Killed\n", Path("/plugin")) == nixeval.Said("Killed")
    assert nixeval.understand("", Path("/plugin")) == nixeval.Said("Nix says nothing")


# --- hostile files ---------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A secret beside the plugin's directory, and links to it from within."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "id").write_text(SECRET)
    (place / "x.nix").write_text(f'"{SECRET}"')
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin/link").symlink_to("../outside/id")
    (tmp_path / "plugin/directory").symlink_to("../outside")
    return place


@pytest.mark.parametrize(
    "expression",
    [
        "builtins.readFile OUTSIDE/id",
        'builtins.readFile "OUTSIDE/id"',
        "builtins.readFile ../outside/id",
        'builtins.readFile (./. + "/../outside/id")',
        "builtins.readFile ./link",
        "builtins.readFile ./directory/id",
        "import ../outside/x.nix",
        "import ./directory/x.nix",
        "toString (builtins.attrNames (builtins.readDir ../outside))",
        "builtins.readFileType ../outside/id",
        "toString (builtins.pathExists ../outside/id)",
        'toString (builtins.pathExists "${toString ./.}/../outside/id")',
        'builtins.hashFile "sha256" ../outside/id',
        '"${../outside/id}"',
        "builtins.toJSON ./link",
        "toString (builtins.path { path = ../outside; })",
        "builtins.readFile <outside/id>",
        'builtins.findFile [ { prefix = ""; path = "OUTSIDE"; } ] "id"',
        "(builtins.scopedImport { } ../outside/x.nix)",
        "scopedImport { } ../outside/x.nix",
        "../outside/id",
        "./link",
        "./directory/id",
    ],
)
def test_nothing_outside_its_own_directory_is_read(tmp_path: Path, outside: Path, expression: str) -> None:
    text = f"{{ ... }}: {{\n  scripts = [ ({expression.replace('OUTSIDE', str(outside))}) ];\n}}"
    found = plugin_faults(tmp_path / "plugin", text)
    assert SECRET not in "".join(found)
    assert all(fault.startswith("default.nix: line 2") for fault in found)


def test_the_file_itself_must_not_be_a_link_out(tmp_path: Path, outside: Path) -> None:
    (outside / "x.nix").write_text("{ scripts = [ ]; }")
    (tmp_path / "plugin/default.nix").symlink_to("../outside/x.nix")
    with pytest.raises(ConfigError) as error:
        nixeval.plugin(tmp_path / "plugin/default.nix")
    assert "restricted mode" in error.value.faults[0]


@pytest.mark.parametrize(
    "expression",
    [
        'builtins.getEnv "NIXBOX_TEST_SECRET"',
        '__getEnv "NIXBOX_TEST_SECRET"',
        'builtins.builtins.getEnv "NIXBOX_TEST_SECRET"',
        '"a ${builtins.getEnv ("NIXBOX_TEST_" + "SECRET")}"',
        'builtins.toJSON (builtins.getEnv "NIXBOX_TEST_SECRET")',
        'builtins.substring 0 9 (builtins.getEnv "NIXBOX_TEST_SECRET")',
        'builtins.unsafeDiscardStringContext (builtins.getEnv "NIXBOX_TEST_SECRET")',
        'builtins.hashString "sha256" (builtins.getEnv "NIXBOX_TEST_SECRET")',
    ],
)
def test_a_plugin_is_given_no_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expression: str) -> None:
    monkeypatch.setenv("NIXBOX_TEST_SECRET", SECRET)
    monkeypatch.setenv("NIX_TEST_SECRET", SECRET)  # of a name that children of ours do see
    (fault,) = plugin_faults(tmp_path, f"{{ scripts = [ ({expression}) ]; }}")
    assert SECRET not in fault
    texts = ["SECRET", "NIX_TEST_SECRET"]
    conditions = " ".join(f'(if builtins.getEnv "{name}" == "" then "unset" else "set")' for name in texts)
    assert plugin(tmp_path, f"{{ scripts = [ {conditions} ]; }}") == {"scripts": ["unset", "unset"]}


@pytest.mark.parametrize(
    "expression",
    [
        'builtins.fetchurl "http://127.0.0.1:PORT/x"',
        'builtins.fetchTarball "http://127.0.0.1:PORT/x"',
        'fetchTarball "http://127.0.0.1:PORT/x"',
        'builtins.fetchGit "http://127.0.0.1:PORT/x"',
        '__fetchGit { url = "http://127.0.0.1:PORT/x"; rev = "643809054d65fdd466a63e3155b8c498cb483c04"; }',
        'builtins.fetchGit "file://OUTSIDE"',
        'fetchMercurial "http://127.0.0.1:PORT/x"',
        'builtins.fetchTree { type = "tarball"; url = "http://127.0.0.1:PORT/x"; }',
        'builtins.getFlake "git+http://127.0.0.1:PORT/x"',
        'import <nix/fetchurl.nix> { url = "http://127.0.0.1:PORT/x"; }',
        'import (derivation { name = "x"; system = builtins.currentSystem; builder = "/bin/sh"; })',
        'builtins.readFile (derivation { name = "x"; system = builtins.currentSystem; builder = "/bin/sh"; })',
        'builtins.toFile "x" "y"',
        "builtins.storePath OUTSIDE",
        'builtins.exec [ "/bin/true" ]',
        "toString builtins.currentTime",
    ],
)
def test_nothing_is_fetched_built_or_run(tmp_path: Path, outside: Path, expression: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        text = expression.replace("PORT", str(server.getsockname()[1])).replace("OUTSIDE", str(outside))
        (fault,) = plugin_faults(tmp_path / "plugin", f"{{ scripts = [ ({text}) ]; }}")
        assert "is not available here" in fault or "missing" in fault
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("toString (builtins.elemAt (builtins.genList (n: n) 1000000000) 5)", "out of memory"),
        ('builtins.foldl\' (a: n: a + a) "aaaaaaaa" (builtins.genList (n: n) 40)', "out of memory"),
        (
            "let many = builtins.genList (n: n) 20000; loop = f: builtins.foldl' (a: _: f a) 0 many; "
            "in toString (loop (_: loop (_: loop (x: x))))",
            "still evaluating",
        ),
        ("builtins.readFile ./fifo", "still evaluating"),
    ],
)
def test_an_endless_file_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    monkeypatch.setattr(nixeval, "_HEAP_BYTES", 256 << 20)
    if words == "still evaluating":
        monkeypatch.setattr(nixeval, "_TIMEOUT_S", 1.0)
    os.mkfifo(tmp_path / "fifo")
    (fault,) = plugin_faults(tmp_path, f"{{ scripts = [ ({text}) ]; }}")
    assert fault.startswith("default.nix") and words in fault


def test_values_that_hold_themselves_end(tmp_path: Path) -> None:
    (fault,) = plugin_faults(tmp_path, "let x = { scripts = x; }; in x")
    assert "without end" in fault


# --- a config --------------------------------------------------------------------------------------------


def workspace(tmp_path: Path) -> Path:
    """A workspace with the config.nix of the bash nixbox, and what it names."""
    place = tmp_path / "shop"
    shutil.copytree(THEIRS, place / ".nixbox", ignore=shutil.ignore_patterns("aws", "claude-code", "scala-sbt"))
    for name in ("scala-sbt", "aws"):
        shutil.copytree(THEIRS / name, place / ".nixbox/plugins" / name)
    return place


ENVIRON = {"HOME": "/home/somebody", "GITHUB_TOKEN": SECRET, "NPM_TOKEN": "npm-secret-text", "CI": "true"}


def test_a_whole_config(tmp_path: Path) -> None:
    data = nixeval.config(workspace(tmp_path) / ".nixbox/config.nix", ENVIRON)
    assert data["plugins"] == ["aws", "./.nixbox/plugins/scala-sbt"]
    assert data["packages"] == ["ripgrep", "fd", "coreutils", "git"]
    assert data["mounts"] == [
        {"source": "/srv/data", "target": "/data", "readonly": True},
        {"source": "~/.m2", "target": "~/.m2"},
        {"source": ".", "target": "~/workspace"},
    ]
    assert data["network"] == {"mode": "filtered", "domains": ["github.com", "pypi.org"]}
    assert data["resources"] == {"vcpus": 2, "memory": "4G", "disk": 20480}
    assert data["env"] == {
        "EDITOR": "vi",
        "GITHUB_TOKEN": {"from_host": "GITHUB_TOKEN"},
        "JOBS": "4",
        "NPM_TOKEN": {"from_host": "NPM_TOKEN"},
        "UNSET": {"from_host": "NOT_SET_HERE"},
    }
    assert data["scripts"][0] == (THEIRS / "setup.sh").read_text()
    assert data["hooks"]["post-down"] == [{"run": "docker compose down", "required": True}]


def test_conditions_see_the_environment(tmp_path: Path) -> None:
    path = workspace(tmp_path) / ".nixbox/config.nix"
    data = nixeval.config(path, {"HOME": "/home/somebody", "GITHUB_TOKEN": SECRET})
    assert data["resources"]["vcpus"] == 4
    assert data["env"]["NPM_TOKEN"] == "none"
    assert "coreutils" not in data["packages"]


def test_a_config_names_files_of_its_workspace(tmp_path: Path) -> None:
    (tmp_path / "up.sh").write_text("echo up\n")
    (tmp_path / "run").write_text("#!/bin/sh\n")
    (tmp_path / "run").chmod(0o755)
    (tmp_path / "link").symlink_to("/etc/hostname")
    data = config(tmp_path, "{ scripts = [ ../up.sh ]; hooks.preUp = [ ../up.sh ../run ]; }")
    assert data == {"scripts": ["echo up\n"], "hooks": {"pre-up": ["sh ./up.sh", "./run"]}}
    found = faults(tmp_path, "{ scripts = [ ../link ../../x ]; hooks.preUp = /bin/sh; }")
    assert ["outside of" in fault or "No such file" in fault for fault in found] == [True] * 3


def test_domains_without_a_mode_are_all_that_is_allowed(tmp_path: Path) -> None:
    assert config(tmp_path, '{ network.allow = [ "a.org" ]; }')["network"]["mode"] == "filtered"
    assert config(tmp_path, '{ network = { mode = "open"; allow = [ "a.org" ]; }; }')["network"]["mode"] == "open"
    assert config(tmp_path, "{ network.ports = [ 443 ]; }") == {"network": {"ports": [443]}}


@pytest.mark.parametrize(
    "value",
    [
        'builtins.getEnv "TOKEN"',
        '"${builtins.getEnv "TOKEN"}"',
        'let get = builtins.getEnv; name = "TOK" + "EN"; in get name',
        'if builtins.getEnv "TOKEN" != "" then builtins.getEnv "TOKEN" else "none"',
        "import ./token.nix",
        '{ from_host = "TOKEN"; }',
        'builtins.head (builtins.match "(.*)" (builtins.getEnv "TOKEN"))',
    ],
)
@pytest.mark.parametrize("secret", [SECRET, "x"])
def test_a_variable_handed_over_is_named(tmp_path: Path, value: str, secret: str) -> None:
    (tmp_path / ".nixbox").mkdir()
    (tmp_path / ".nixbox/token.nix").write_text('builtins.getEnv "TOKEN"')
    data = config(tmp_path, f'{{ env = {{ A = {value}; B = "x"; }}; }}', TOKEN=secret)
    assert data == {"env": {"A": {"from_host": "TOKEN"}, "B": "x"}}


@pytest.mark.parametrize(
    "text",
    [
        'env.A = "x-${builtins.getEnv "TOKEN"}";',
        'env.A = builtins.getEnv "TOKEN" + builtins.getEnv "TOKEN";',
        'env.A = builtins.getEnv "TOKEN" + builtins.getEnv "UNSET";',
        'env.A = builtins.substring 4 99 (builtins.getEnv "TOKEN");',
        'env.A = builtins.replaceStrings [ "-" ] [ "_" ] (builtins.getEnv "TOKEN");',
        'env.A = builtins.toJSON { a = builtins.getEnv "TOKEN"; };',
        'env.A = builtins.concatStringsSep "" (builtins.filter builtins.isString '
        '(builtins.split "-" (builtins.getEnv "TOKEN")));',
        'env.A.from_host = builtins.getEnv "TOKEN";',
        'scripts = [ "curl -H ${builtins.getEnv "TOKEN"} example.org" ];',
        'hooks.preUp = "login ${builtins.getEnv "TOKEN"}";',
        'mounts = [ "/${builtins.getEnv "TOKEN"}:/x" ];',
        'network.allow = [ (builtins.getEnv "TOKEN") ];',
        'name = builtins.getEnv "TOKEN";',
        'memory = builtins.getEnv "TOKEN";',
        'plugins = [ (builtins.getEnv "TOKEN") ];',
        'nix.packages = [ (builtins.getEnv "TOKEN") ];',
    ],
)
def test_a_variable_is_written_nowhere(tmp_path: Path, text: str) -> None:
    (fault,) = faults(tmp_path, f"{{ ... }}: {{\n  {text}\n}}", TOKEN=SECRET)
    assert fault.startswith("config.nix: line 2: ")
    assert "TOKEN" in fault and "builtins.getEnv" in fault


@pytest.mark.parametrize(
    "value",
    [
        '(builtins.getEnv "TOKEN").x',
        'builtins.fromJSON (builtins.getEnv "TOKEN")',
        'throw "no ${builtins.getEnv "TOKEN"}"',
        'builtins.hashString "md5" (builtins.getEnv "TOKEN")',
        '{ ${builtins.getEnv "TOKEN"} = 1; }',
    ],
)
def test_an_error_does_not_tell_a_variable(tmp_path: Path, value: str) -> None:
    (fault,) = faults(tmp_path, f"{{ env.A = {value}; }}", TOKEN=SECRET)
    assert fault.startswith("config.nix: line 1")


def test_a_variable_is_on_no_command_line_and_in_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("nix")
    seen, programs = tmp_path / "seen", tmp_path / "bin"
    programs.mkdir()
    program = programs / "nix"
    program.write_text(f'#!/bin/sh\n{{ printf "%s\\n" "$@"; env; }} > {seen}\nexec {shlex.quote(str(real))} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("TOKEN", SECRET)
    config(tmp_path, '{ env.A = builtins.getEnv "TOKEN"; }', TOKEN=SECRET)
    assert "restrict-eval" in seen.read_text()
    assert SECRET not in seen.read_text()


def test_a_home_directory_that_is_not_known_is_no_path(tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, '{ mounts = [ "${builtins.getEnv "HOME"}/.aws:/x" ]; }', HOME="")
    assert "HOME" in fault


# --- converting ------------------------------------------------------------------------------------------


def test_the_converted_config_is_the_same(tmp_path: Path) -> None:
    place = workspace(tmp_path)
    nix = place / ".nixbox/config.nix"
    data = nixeval.config(nix, ENVIRON)
    before = load(place, sources=Sources(plugin=nixeval.plugin, config=lambda path: nixeval.config(path, ENVIRON)))
    written = scaffold.from_nix(place, data)
    assert written == place / ".nixbox/config.toml"
    text = written.read_text()
    assert tomllib.loads(text) == data
    assert SECRET not in text and ENVIRON["NPM_TOKEN"] not in text
    assert text.startswith("# ") and "config.nix" in text.splitlines()[0]
    after = load(place, sources=Sources(plugin=nixeval.plugin))
    assert repr(after.settings) == repr(before.settings).replace("config.nix", "config.toml")
    assert [(e.name, e.value, e.from_host) for e in after.settings.env] == [
        (e.name, e.value, e.from_host) for e in before.settings.env
    ]


TEXTS = [
    "one line",
    "two\nlines\n",
    "'''\n\"\"\"\n",
    'back\\slash "quoted"\n\ttab\n',
    "\nfirst line empty",
    "dos\r\nlines\r\n",
    "é 𝄞 \x7f\x01\n# [x]\n",
    'ends in a quote\n"',
    "ends in a backslash\n\\",
    "",
]


def test_any_script_survives_the_conversion(tmp_path: Path) -> None:
    data = {"scripts": TEXTS, "env": {f"V{i}": text for i, text in enumerate(TEXTS)}, "hooks": {"pre-up": TEXTS}}
    written = scaffold.from_nix(tmp_path, data)
    assert tomllib.loads(written.read_text()) == data


@pytest.mark.parametrize("base", schema.BASES)
def test_all_three_in_a_workspace_of_either_base(tmp_path: Path, base: str) -> None:
    """As a user has them: copied into a workspace, named by path, read by what `up` reads."""
    shutil.copytree(THEIRS, tmp_path / "plugins")
    (tmp_path / ".nixbox").mkdir()
    named = ", ".join(f'"./plugins/{name}"' for name in ("scala-sbt", "aws", "claude-code"))
    (tmp_path / ".nixbox/config.toml").write_text(f'base = "{base}"\nplugins = [{named}]\n')
    loaded = loading.load(tmp_path)
    found = loaded.settings
    assert {"sbt", "awscli2", "claude-code"} <= {*found.packages, *(name for _, name in loaded.unserved)}
    assert ("sbt" in found.packages) == (base == "nixpkgs")  # their names are those of nixpkgs
    assert {"repo1.maven.org", "anthropic.com"} <= set(found.domains)
    assert Hook("nixbox scala-sbt warm-cache", plugin="scala-sbt") in found.hooks["post-up"]
    assert [used.name for used in loaded.plugins] == ["scala-sbt", "aws", "claude-code"]


def test_a_conversion_overwrites_nothing(tmp_path: Path) -> None:
    scaffold.init(tmp_path)
    before = (tmp_path / ".nixbox/config.toml").read_text()
    with pytest.raises(ConfigError, match="exists already"):
        scaffold.from_nix(tmp_path, {"name": "x"})
    assert (tmp_path / ".nixbox/config.toml").read_text() == before


def test_a_conversion_with_faults_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        scaffold.from_nix(tmp_path, {"name": "-", "resources": {"vcpus": 0}}, "old.nix")
    assert [fault.split(": ")[:2] for fault in error.value.faults] == [
        ["old.nix", "name"],
        ["old.nix", "resources.vcpus"],
    ]
    assert list(tmp_path.iterdir()) == []


# --- beside the image ------------------------------------------------------------------------------------


def test_how_files_are_read_is_no_part_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "nix"
    shutil.copytree(paths.nix_dir(), copy)
    monkeypatch.setattr(paths, "nix_dir", lambda: copy)
    spec = ImageSpec(base="debian", suite="trixie", packages=(), build=(), build_network=False)
    first = build.key(spec, "{}")
    (copy / "eval/read.nix").write_text("{ }")
    assert build.key(spec, "{}") == first
    (copy / "image.nix").write_text("{ }")
    assert build.key(spec, "{}") != first
