"""nixosModules and homeModules, evaluated with a stand-in for the module system that has exactly what they use."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixbox.config import load, schema
from nixbox.plan import nixexpr
from nixbox.run import CommandError
from tests.flakes import Clone, make_clone

# A module, what the user says, and the options that exist (by path, with their types) to what the system becomes.
# As in nixpkgs' lib/modules.nix: options have types and defaults, mkIf leaves out what does not hold, mkMerge joins.
MODULES = """
{ module, said, known, system ? "x86_64-linux" }:
let
  inherit (builtins) all attrNames attrValues concatMap elem foldl' isAttrs isBool isList isString listToAttrs;
  type = name: check: { _type = "type"; inherit name check; };
  lib = {
    mkOption = { type, description, default, defaultText ? null, example ? null }: {
      _type = "option";
      inherit type default;
      documented = isString description && description != "";
    };
    mkEnableOption = what: lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = "Whether to enable ${what}.";
    };
    literalExpression = text: { _type = "literalExpression"; inherit text; };
    mkIf = condition: content: { _type = "if"; inherit condition content; };
    mkMerge = contents: { _type = "merge"; inherit contents; };
    filterAttrs = keep: set: removeAttrs set (builtins.filter (name: !(keep name set.${name})) (attrNames set));
    mapAttrs' = f: set: listToAttrs (map (name: f name set.${name}) (attrNames set));
    nameValuePair = name: value: { inherit name value; };
    types = {
      bool = type "boolean" isBool;
      str = type "string" isString;
      package = type "package" (v: isAttrs v && v.type or null == "derivation");
      path = type "path" (v: builtins.isPath v || isString v && builtins.substring 0 1 v == "/");
      anything = type "anything" (_: true);
      nullOr = t: type "null or ${t.name}" (v: v == null || t.check v);
      listOf = t: type "list of ${t.name}" (v: isList v && all t.check v);
      attrsOf = t: type "attribute set of ${t.name}" (v: isAttrs v && all t.check (attrValues v));
    };
  };
  fill = path: options: said:
    if options._type or null == "option" then
      let value = if said == null then options.default else said; in
      if !options.documented then throw "${path}: has no description"
      else if options.type.check value then value
      else throw "${path}: is not of type ${options.type.name}"
    else
      let
        given = if said == null then { } else said;
        unknown = builtins.filter (name: !(options ? ${name})) (attrNames given);
      in
      if unknown != [ ] then throw "${path}.${builtins.head unknown}: no such option"
      else builtins.mapAttrs (name: option: fill "${path}.${name}" option (given.${name} or null)) options;

  # What a module defines, as a list of { path; value; }, for the options in `known`.
  defined = path: value:
    let at = builtins.concatStringsSep "." path; in
    if value._type or null == "if" then (if value.condition then defined path value.content else [ ])
    else if value._type or null == "merge" then concatMap (defined path) value.contents
    else if known ? ${at} then [{ path = at; inherit value; }]
    else if isAttrs value && value.type or null != "derivation" then
      concatMap (name: defined (path ++ [ name ]) value.${name}) (attrNames value)
    else throw "${at}: no such option";
  joined = option: a: b:
    if a == null then b
    else if option == "attrs" then a // b
    else throw "defined twice";
  unwrapped = value:
    if value._type or null == "if" then (if value.condition then unwrapped value.content else { })
    else if value._type or null == "merge" then foldl' (a: b: a // unwrapped b) { } value.contents
    else value;
  right = option: value: { attrs = isAttrs value; list = isList value; bool = isBool value; }.${option};

  evaluated = module { inherit config lib; pkgs.stdenv.hostPlatform.system = system; };
  config = fill "" evaluated.options said;
  found = defined [ ] evaluated.config;
in
foldl'
  (made: one:
    let value = unwrapped one.value; option = known.${one.path}; in
    if !(right option value) then throw "${one.path}: is no ${option}"
    else made // { ${one.path} = joined option (made.${one.path} or null) value; })
  { }
  found
"""
PACKAGES = """
builtins.listToAttrs (map (system: { name = system; value.nixbox = derivation {
  name = "nixbox-${system}"; inherit system; builder = "/stand-in";
}; }) [ "x86_64-linux" "aarch64-linux" ])
"""
# Options of NixOS and of home-manager, by these very names in their manuals.
NIXOS = {
    "environment.systemPackages": "list",
    "users.groups.kvm.members": "list",
    "boot.kernelModules": "list",
    "security.allowUserNamespaces": "bool",
    "security.unprivilegedUsernsClone": "bool",
    "nix.settings.trusted-users": "list",
}
HOME = {"home.packages": "list", "xdg.configFile": "attrs"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    yield make_clone(tmp_path_factory.mktemp("modules"))


def evaluated(
    clone: Clone, file: str, known: dict[str, str], said: Any, system: str = "x86_64-linux"
) -> dict[str, Any]:
    """What the system becomes with `programs.nixbox` as `said`."""
    modules = clone.top / "modules.nix"
    modules.write_text(MODULES)
    module = f"import {clone.repo}/nix/flake/{file} {{ packages = {PACKAGES}; }}"
    words = nixexpr.render({"known": known, "said": {"programs": {"nixbox": said}}, "system": system})
    made: dict[str, Any] = clone.value(f"import {modules} ({words} // {{ module = {module}; }})")
    return made


def test_a_host_that_does_not_enable_it_is_left_alone(clone: Clone) -> None:
    assert evaluated(clone, "nixos.nix", NIXOS, {}) == {}
    assert evaluated(clone, "home.nix", HOME, {"profiles": {"a": {}}}) == {}


@pytest.mark.parametrize("system", ["x86_64-linux", "aarch64-linux"])
def test_nixos_gets_kvm_and_its_users(clone: Clone, system: str) -> None:
    made = evaluated(clone, "nixos.nix", NIXOS, {"enable": True, "users": ["alice", "bob"]}, system)
    (package,) = made.pop("environment.systemPackages")
    assert package.endswith(f"-nixbox-{system}")
    assert made == {
        "users.groups.kvm.members": ["alice", "bob"],
        "boot.kernelModules": ["kvm", "tun", "vhost_vsock"],
        "security.allowUserNamespaces": True,
        "security.unprivilegedUsernsClone": True,
    }


def test_users_are_trusted_by_nix_only_when_that_is_said(clone: Clone) -> None:
    said = {"enable": True, "users": ["alice"], "trustUsers": True}
    assert evaluated(clone, "nixos.nix", NIXOS, said)["nix.settings.trusted-users"] == ["alice"]


@pytest.mark.parametrize(
    ("file", "said", "fault"),
    [
        ("nixos.nix", {"user": ["alice"]}, r"programs\.nixbox\.user: no such option"),
        ("nixos.nix", {"enable": True, "users": "alice"}, r"programs\.nixbox\.users: is not of type list of string"),
        ("home.nix", {"enable": True, "settings": {"template": {}}}, r"settings\.template: no such option"),
        ("home.nix", {"enable": True, "settings": {"templates": {"limit": True}}}, r"limit: is not of type null or"),
        ("home.nix", {"enable": True, "plugins": {"a": "relative"}}, r"plugins: is not of type"),
    ],
)
def test_a_mistake_is_named(clone: Clone, file: str, said: Any, fault: str) -> None:
    with pytest.raises(CommandError, match=fault):
        evaluated(clone, file, NIXOS if file == "nixos.nix" else HOME, said)


def test_home_manager_s_files_are_what_nixbox_reads(clone: Clone, tmp_path: Path) -> None:
    said: dict[str, Any] = {
        "enable": True,
        "settings": {"templates": {"limit": "40GiB"}, "krun": {"library": "/lib/libkrun.so"}},
        "profiles": {"dev": {"packages": ["jq"], "build": 'echo "$x"\n', "disk": {"size": "2GiB"}}},
        "plugins": {"mine": tmp_path},
    }
    made = evaluated(clone, "home.nix", HOME, said)["xdg.configFile"]

    assert set(made) == {"nixbox/settings.toml", "nixbox/profiles/dev.toml", "nixbox/plugins/mine"}
    assert Path(made["nixbox/plugins/mine"]["source"]).name.endswith(tmp_path.name)
    (tmp_path / "settings.toml").write_text(made["nixbox/settings.toml"]["text"])
    settings = load.user_settings(tmp_path / "settings.toml")
    assert (settings.templates.limit, settings.krun.library) == (40 * 1024, "/lib/libkrun.so")
    profile = tomllib.loads(made["nixbox/profiles/dev.toml"]["text"])
    assert profile == said["profiles"]["dev"]
    assert schema.validate(schema.Profile, profile)[1] == []


def test_home_manager_writes_no_settings_where_none_are_said(clone: Clone) -> None:
    assert evaluated(clone, "home.nix", HOME, {"enable": True})["xdg.configFile"] == {}


def test_every_setting_of_nixbox_is_an_option(clone: Clone) -> None:
    """settings.toml's fields and the module's options are the same ones."""
    fields = {(t, f) for t, i in schema.UserSettings.model_fields.items() for f in _fields(i.annotation)}
    said = {"enable": True, "settings": {t: {f: "1GiB"} for t, f in fields}}
    text = evaluated(clone, "home.nix", HOME, said)["xdg.configFile"]["nixbox/settings.toml"]["text"]
    assert {(t, f) for t, table in tomllib.loads(text).items() for f in table} == fields


def _fields(model: Any) -> list[str]:
    return list(model.model_fields)


def test_the_flake_s_modules_are_these(clone: Clone) -> None:
    names = clone.value(
        "{ nixos = builtins.attrNames flake.nixosModules; home = builtins.attrNames flake.homeModules; }"
    )
    assert names == {"nixos": ["default", "nixbox"], "home": ["default", "nixbox"]}
    default = clone.value(
        "let made = flake.nixosModules.nixbox { config.programs.nixbox.enable = false;"
        ' pkgs.stdenv.hostPlatform.system = "x86_64-linux";'
        " lib = { mkIf = c: _: c; mkOption = o: o.default; mkEnableOption = _: false;"
        " literalExpression = _: null; types = { package = 1; str = 1; bool = 1; listOf = _: 1; }; }; };"
        " in made.options.programs.nixbox.package.name"
    )
    assert default.startswith("nixbox-")
