# The packages of the pinned nixpkgs. This is the only place that imports it, and what it is given is all that it knows
# of the host: no configuration of the user's, no overlays, no environment.
{ lock, system, allowUnfree }:
let
  pkgs = import (import ./source.nix { inherit lock; }) {
    inherit system;
    config = { inherit allowUnfree; };
    overlays = [ ];
  };
  parts = name: builtins.filter builtins.isString (builtins.split "\\." name);
in
{
  inherit pkgs;
  # The attribute that a dotted name means: "python3Packages.requests".
  find = name: builtins.foldl' (set: part: set.${part}) pkgs (parts name);
  inherit parts;

  # What every image holds beside what is asked for. As attributes, so that `nixbox update` can name their versions.
  base = [
    "bashInteractive" "coreutils" "curl" "diffutils" "dropbear" "e2fsprogs" "findutils" "gawk" "getent" "gnugrep"
    "gnused" "gnutar" "gzip" "hostname" "iproute2" "less" "ncurses" "nix" "openssh" "procps" "sudo" "util-linux"
    "which" "xz"
  ] ++ (if (lock.krun or null) == null then [ ] else [ "perl" ]); # nix/guest/stage2, `renew`
  kernel = "linux";
  # What most programs that were built elsewhere want beside the C library.
  libraries = [ "stdenv.cc.cc" "zlib" ];
}
