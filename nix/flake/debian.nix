# lib.mkDebianImage: a nixbox image as a derivation of another flake, made without nixpkgs.
#
#   lock          a nixbox.lock: its path, or its content as an attribute set
#   mirrors, build, buildNetwork and the result, { image; inputs; }: as in ../image.nix
#
# The static busybox that starts the build has to be in the store: `nixbox build` puts it there, with every .deb.
{ lock, mirrors ? { }, build ? [ ], buildNetwork ? false }:
import ../image.nix {
  inherit mirrors build buildNetwork;
  lock = if builtins.isAttrs lock then lock else builtins.fromJSON (builtins.readFile lock);
}
