# lib.mkImage: the image of a configuration, as a derivation of another flake. The same configuration in a workspace
# makes the same derivation by `nixbox build`.
#
#   mirrors       as in ../image.nix
#   build         [ { origin; script; } ]: further scripts, after those of plugins and profile
#   buildNetwork  the profile's build_network, unless said here
#   options       further arguments of ../image.nix, for what a base has of its own
#   all others    as in ./config.nix
#
# Files that the lock names have to be in the store, or a mirror is named: see docs/nix.md.
{ mirrors ? { }, build ? [ ], buildNetwork ? null, options ? { }, ... }@given:
let
  described = import ./config.nix (import ./arguments.nix given);
  scripts = described.build ++ build;
in
(import ../image.nix ({
  inherit (described) lock;
  inherit (described) sidecar;
  inherit mirrors;
  build = scripts;
  buildNetwork = if buildNetwork != null then buildNetwork else described.buildNetwork;
} // (if described.base == "nixpkgs" then { inherit (described) ldLibraries allowUnfree; } else { }) // options)).image
