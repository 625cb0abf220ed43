{ pkgs ? import <nixpkgs> { }, lib ? pkgs.lib }:

with lib;

let
  home = builtins.getEnv "HOME";
  onCi = builtins.getEnv "CI" != "";
  shared = import ./shared.nix;
in
{
  name = "shop";
  base = "nixpkgs";
  plugins = [ "aws" ./plugins/scala-sbt ];

  nix.packages = with pkgs; [ ripgrep fd ] ++ optionals onCi [ coreutils ];

  mounts = {
    "~/workspace" = ../.;
    "~/.m2" = "${home}/.m2";
    "/data" = { source = "/srv/data"; readOnly = true; };
  };

  network = {
    mode = "filtered";
    allowedDomains = shared.domains;
  };

  vcpus = if onCi then 2 else 4;
  memory = "4G";
  diskSize = 20480;

  env = {
    GITHUB_TOKEN = builtins.getEnv "GITHUB_TOKEN";
    NPM_TOKEN = let token = builtins.getEnv "NPM_TOKEN"; in if token == "" then "none" else "${token}";
    UNSET = builtins.getEnv "NOT_SET_HERE";
    EDITOR = "vi";
    JOBS = 4;
  };

  scripts = [
    ./setup.sh
    ''
      ${pkgs.git}/bin/git config --global user.name "agent" # ''${HOME}
      printf 'a\tb\n'
    ''
  ];

  hooks = {
    preUp = [ "docker compose up -d" ];
    "post-down" = { run = "docker compose down"; required = true; };
  };
}
