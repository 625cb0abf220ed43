# nixosModules.nixbox: what a NixOS host needs for machines under KVM, and who may use them.
#
#   packages   the flake's own: system -> { nixbox; }
{ packages }:
{ config, lib, pkgs, ... }:
let
  cfg = config.programs.nixbox;
in
{
  options.programs.nixbox = {
    enable = lib.mkEnableOption "nixbox, which runs a directory's programs in a microVM";
    package = lib.mkOption {
      type = lib.types.package;
      default = packages.${pkgs.stdenv.hostPlatform.system}.nixbox;
      defaultText = lib.literalExpression "nixbox.packages.\${system}.nixbox";
      description = "The nixbox that every user gets.";
    };
    users = lib.mkOption {
      type = lib.types.listOf lib.types.str;
      default = [ ];
      example = [ "alice" ];
      description = "Users who may use KVM: they become members of the group kvm.";
    };
    trustUsers = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = ''
        Whether these users are trusted by Nix, which `build_network` in a profile needs: an image's build script
        reaches the network then. Whoever Nix trusts can become root.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ cfg.package ];
    users.groups.kvm.members = cfg.users;
    # The processor's own part of KVM is loaded by udev. No rule is needed: /dev/kvm and /dev/vhost-vsock belong to
    # the group kvm, and /dev/net/tun is everybody's.
    boot.kernelModules = [ "kvm" "tun" "vhost_vsock" ];
    # A machine's network, its mounts and the image's build have namespaces of their own, without root.
    security.allowUserNamespaces = true;
    security.unprivilegedUsernsClone = true;
    nix.settings.trusted-users = lib.mkIf cfg.trustUsers cfg.users;
  };
}
