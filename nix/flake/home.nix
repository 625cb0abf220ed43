# homeModules.nixbox: nixbox for one user of home-manager, with what ~/.config/nixbox holds.
#
#   packages   the flake's own: system -> { nixbox; }
{ packages }:
{ config, lib, pkgs, ... }:
let
  cfg = config.programs.nixbox;
  toml = import ./toml.nix;
  table = lib.types.attrsOf lib.types.anything;
  said = builtins.mapAttrs (_: lib.filterAttrs (_: value: value != null)) cfg.settings;
  settings = lib.filterAttrs (_: value: value != { }) said;
  named = directory: make: lib.mapAttrs' (name: value: lib.nameValuePair "nixbox/${directory}/${name}" (make value));
in
{
  options.programs.nixbox = {
    enable = lib.mkEnableOption "nixbox, which runs a directory's programs in a microVM";
    package = lib.mkOption {
      type = lib.types.package;
      default = packages.${pkgs.stdenv.hostPlatform.system}.nixbox;
      defaultText = lib.literalExpression "nixbox.packages.\${system}.nixbox";
      description = "The nixbox to install.";
    };
    settings.templates.limit = lib.mkOption {
      type = lib.types.nullOr lib.types.str;
      default = null;
      example = "40GiB";
      description = "How much of the disk all templates together may take.";
    };
    settings.krun.library = lib.mkOption {
      type = lib.types.nullOr lib.types.str;
      default = null;
      description = "The path of libkrun, where it is not the one that nixbox comes with.";
    };
    profiles = lib.mkOption {
      type = lib.types.attrsOf table;
      default = { };
      example = { dev.packages = [ "jq" ]; };
      description = "Profiles by name, with the fields of a profile's TOML.";
    };
    plugins = lib.mkOption {
      type = lib.types.attrsOf lib.types.path;
      default = { };
      description = "Plugins by name: directories with a plugin.toml.";
    };
  };

  config = lib.mkIf cfg.enable {
    home.packages = [ cfg.package ];
    xdg.configFile = lib.mkMerge [
      (lib.mkIf (settings != { }) { "nixbox/settings.toml".text = toml settings; })
      (named "profiles" (profile: { text = toml profile; }) (lib.mapAttrs' (name: lib.nameValuePair "${name}.toml") cfg.profiles))
      (named "plugins" (plugin: { source = plugin; }) cfg.plugins)
    ];
  };
}
